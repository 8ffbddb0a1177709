"""Codes are computed once, kept by content, and do not depend on the company they were computed in."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_VQ, write_tiny
from PIL import Image

from vapi import data, images, models
from vapi import tokens as stage
from vapi.config import ModelConfig, TokensConfig
from vapi.models import vq, weights

SMALL = TokensConfig(images_per_batch=8)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def row(number: int) -> data.Row:
    random = np.random.default_rng(number)
    width, height = (int(side) for side in random.integers(16, 40, 2))
    pixels = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    png = images.png_bytes(pixels)
    return data.Row(f"k{number}", number % 10, "", width, height, "RGB", png, hashlib.sha256(png).hexdigest())


def subset(folder: Path, numbers: range | list[int]) -> Path:
    folder.mkdir(parents=True)
    data.write_subset(folder, [row(n) for n in numbers])
    return folder


def encoded(out: Path) -> int:
    return int(data.read_json(out / "provenance.json")["encoded"])


def test_codes_are_the_tokenizers(tiny_model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage.tokens(tiny_model, SMALL, subset(tmp_path / "subset", range(21)), tmp_path / "tokens")
    made, picked = data.read_tokens(tmp_path / "tokens"), data.read_subset(tmp_path / "subset")
    assert made.codes.shape == (21, 16) and made.codes.dtype == np.uint16
    assert made.keys == picked.keys and made.labels.tolist() == picked.labels.tolist() and set(made.crop) == {"center"}
    tokenizer = models.load_tokenizer(tiny_model)
    pixels = np.stack([images.center_crop(images.decode(picked.image(i)), 16) for i in range(21)])
    with torch.inference_mode():
        assert np.array_equal(tokenizer.encode(images.to_float(pixels)).numpy(), made.codes)
    counts = np.bincount(made.codes.ravel(), minlength=32)
    shares = counts[counts > 0] / counts.sum()
    assert made.summary["codebook_usage"] == (counts > 0).mean() and made.summary["vocab"] == 32
    assert made.summary["perplexity"] == pytest.approx(2 ** -(shares * np.log2(shares)).sum())
    assert 0 < made.summary["psnr_lowest"] <= made.summary["psnr"] < 60 and made.summary["psnr_images"] == 21
    made.require(tiny_model, picked)
    assert "21 of them encoded now" in capsys.readouterr().out


def test_what_is_known_is_not_encoded_again(tiny_model: ModelConfig, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    stage.tokens(tiny_model, SMALL, subset(tmp_path / "a", range(20)), out)
    first, digest = data.read_tokens(out), data.file_digest(out)
    assert encoded(out) == 20
    stage.tokens(tiny_model, SMALL, tmp_path / "a", out)
    assert encoded(out) == 0 and data.file_digest(out) == digest
    stage.tokens(tiny_model, SMALL, subset(tmp_path / "b", [25, 3, 24, *range(5), 21][::-1]), out)
    assert encoded(out) == 3
    second = data.read_tokens(out)
    assert np.array_equal(second.codes[second.keys.index("k4")], first.codes[4])


def test_codes_do_not_depend_on_company(tiny_model: ModelConfig, tmp_path: Path) -> None:
    together = data.read_subset(subset(tmp_path / "a", range(40)))
    tokenizer = models.load_tokenizer(tiny_model)

    def codes(order: list[int], size: int) -> np.ndarray:
        made = np.zeros((40, 16), np.uint16)
        for some, batch in stage.encode(tokenizer, torch.device("cpu"), together, order, 16, TokensConfig(images_per_batch=size)):
            made[list(some)] = batch
        return made

    expected = codes(list(range(40)), 8)
    for order in (list(range(39, -1, -1)), np.random.default_rng(0).permutation(40).tolist()):
        assert np.array_equal(codes(order, 8), expected)
    assert np.array_equal(np.stack([codes([i], 8)[i] for i in range(40)]), expected)
    shapes = []
    whole = tokenizer.encode
    tokenizer.encode = lambda batch: shapes.append(batch.shape) or whole(batch)
    codes(list(range(11)), 8)
    assert shapes == [(8, 3, 16, 16)] * 2  # the last batch is as large as any


def test_another_tokenizer_never_mixes_in(tiny_model: ModelConfig, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    source = subset(tmp_path / "a", range(12))
    stage.tokens(tiny_model, SMALL, source, tmp_path / "t1")
    stage.tokens(other, SMALL, source, tmp_path / "t2")
    assert encoded(tmp_path / "t2") == 12
    first, picked = data.read_tokens(tmp_path / "t1"), data.read_subset(source)
    assert not np.array_equal(first.codes, data.read_tokens(tmp_path / "t2").codes)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        first.require(other, picked)
    with pytest.raises(ValueError, match="16-pixel images and model.image_size is 32"):
        first.require(dataclasses.replace(tiny_model, image_size=32), picked)
    with pytest.raises(ValueError, match="another subset"):
        first.require(tiny_model, data.read_subset(subset(tmp_path / "b", range(11))))
    caches = sorted((tmp_path / ".vapi" / "tokens").iterdir())
    assert len(caches) == 2
    for name in ("cache.json", "codes.bin"):  # somebody copies a cache over another
        (caches[0] / name).write_bytes((caches[1] / name).read_bytes())
    with pytest.raises(ValueError, match="made otherwise"):
        for model in (tiny_model, other):
            stage.tokens(model, SMALL, source, tmp_path / "t3")


def test_a_killed_run_goes_on(tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = subset(tmp_path / "a", range(30))
    stage.tokens(tiny_model, SMALL, source, tmp_path / "undisturbed")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "again"))
    append, calls = stage.Cache.append, []

    def dies(self: stage.Cache, sha256: list[str], codes: np.ndarray) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(sha256))
        append(self, sha256, codes)

    monkeypatch.setattr(stage.Cache, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.tokens(tiny_model, SMALL, source, tmp_path / "killed")
    assert not (tmp_path / "killed").exists() and sum(calls) == 16
    monkeypatch.setattr(stage.Cache, "append", append)
    (file,) = (tmp_path / "again" / ".vapi" / "tokens").glob("*/codes.bin")
    with file.open("ab") as torn:
        torn.write(file.read_bytes()[:51])  # half a record
    stage.tokens(tiny_model, SMALL, source, tmp_path / "killed")
    assert encoded(tmp_path / "killed") == 14
    assert data.file_digest(tmp_path / "killed") == data.file_digest(tmp_path / "undisturbed")


def test_the_subset_taken_away_in_mid_run(tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage says so, keeps what it has encoded, and with the folder back goes on to the same bits."""
    source = tmp_path / "a"
    source.mkdir()
    data.write_subset(source, [row(n) for n in range(60)], images_per_shard=1)  # more files than are kept open
    settings = dataclasses.replace(SMALL, images_per_batch=4, workers=1)
    stage.tokens(tiny_model, settings, source, tmp_path / "undisturbed")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "again"))
    append = stage.Cache.append

    def disturbed(self: stage.Cache, sha256: list[str], codes: np.ndarray) -> None:
        append(self, sha256, codes)
        if len(self.rows) == 8:
            source.rename(tmp_path / "away")

    monkeypatch.setattr(stage.Cache, "append", disturbed)
    with pytest.raises(ValueError, match="a was there and cannot be read any more .*vapi subset, and run the same command again"):
        stage.tokens(tiny_model, settings, source, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    (tmp_path / "away").rename(source)
    monkeypatch.setattr(stage.Cache, "append", append)
    stage.tokens(tiny_model, settings, source, tmp_path / "tokens")
    assert 0 < encoded(tmp_path / "tokens") <= 52
    assert data.file_digest(tmp_path / "tokens") == data.file_digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("size", [1_000, 2_200], ids=["cache", "result"])
def test_disk_full_says_so_and_goes_on(tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    source = subset(tmp_path / "a", range(30))
    stage.tokens(tiny_model, SMALL, source, tmp_path / "undisturbed")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "again"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write (the token cache|.*tokens: ).*Make room and run the same command again"):
            stage.tokens(tiny_model, SMALL, source, tmp_path / "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "tokens").exists()
    stage.tokens(tiny_model, SMALL, source, tmp_path / "tokens")
    assert encoded(tmp_path / "tokens") == (16 if size == 1_000 else 0)  # 14 records of 68 bytes were whole, or all
    assert data.file_digest(tmp_path / "tokens") == data.file_digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("ragged", [False, True])
def test_cache_drops_records_that_are_damaged(tmp_path: Path, ragged: bool) -> None:
    named = {"codes": 4, "tokenizer": "x"}
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(6)]
    kept = [np.arange(4 * (1 + ragged * i), dtype=np.uint16).reshape(-1, 4) + np.uint16(2048 * i) for i in range(6)]

    def opened() -> stage.Cache:
        return stage.Cache(tmp_path, named, 4, ragged)

    def holds(digests: list[str], kept: list[np.ndarray]) -> bool:
        return all(np.array_equal(found, rows) for found, rows in zip(opened().take(digests), kept, strict=True))

    cache = opened()
    cache.append(digests[:4], kept[:4])
    cache.append(digests[4:], kept[4:])
    assert all(np.array_equal(found, rows) for found, rows in zip(cache.take(digests), kept, strict=True))
    assert holds(digests[::-1], kept[::-1])
    whole = (tmp_path / "codes.bin").read_bytes()
    start = sum(36 + 4 * ragged + rows.nbytes for rows in kept[:4])  # of record 4
    for place, left in ((start + 33, 4), (start + 5, 4), (len(whole) - 1, 5), (3, 0)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "codes.bin").write_bytes(damaged)
        again = opened()
        assert [digest in again for digest in digests] == [True] * left + [False] * (6 - left)
        again.append(digests[left:], kept[left:])
        assert holds(digests, kept)
    for cut in range(len(whole) - 40, len(whole)):
        (tmp_path / "codes.bin").write_bytes(whole[:cut])
        assert digests[4] in opened() and digests[5] not in opened()


def test_psnr() -> None:
    flat = np.full((4, 4, 3), 100, np.uint8)
    assert stage.psnr(flat, flat) == 100 and stage.psnr(flat + np.uint8(10), flat) == pytest.approx(28.13, abs=0.01)


def test_too_little_of_the_codebook_fails(tiny_model: ModelConfig, tmp_path: Path) -> None:
    source = subset(tmp_path / "a", range(2))
    with pytest.raises(ValueError, match="less than tokens.min_codebook_usage 100.0%"):
        stage.tokens(tiny_model, TokensConfig(min_codebook_usage=1.0), source, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_collapsed_tokenizer_fails(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    tokenizer = models.load_tokenizer(model)
    with torch.no_grad():
        for parameter in tokenizer.quant_conv.parameters():
            parameter.zero_()
    weights.save(tokenizer, model.tokenizer, vq.metadata(TINY_VQ))
    with pytest.raises(ValueError, match="every image has the same codes"):
        stage.tokens(model, SMALL, subset(tmp_path / "a", range(5)), tmp_path / "tokens")


def test_codebooks_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    big = vq.VQConfig(vocab=2**16 + 1, code_dim=4, channels=8, multipliers=(1, 2, 2), blocks=1, z_channels=16, groups=4)
    with pytest.raises(ValueError, match="65537 codes; more than 65536"):
        stage._num_codes(vq.VQModel(big), torch.device("cpu"), 16)


def test_bad_inputs_leave_nothing(tiny_model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no subset"):
        stage.tokens(tiny_model, SMALL, tmp_path / "empty", tmp_path / "tokens")
    source = subset(tmp_path / "a", range(3))
    with pytest.raises(ValueError, match="is not here"):
        stage.tokens(dataclasses.replace(tiny_model, tokenizer="data/none.safetensors"), SMALL, source, tmp_path / "tokens")
    damaged = dataclasses.replace(row(1), data=b"words")
    (tmp_path / "b").mkdir()
    data.write_subset(tmp_path / "b", [row(0), damaged])
    with pytest.raises(ValueError, match="k1: not an image"):
        stage.tokens(tiny_model, SMALL, tmp_path / "b", tmp_path / "tokens")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"):
        stage.tokens(tiny_model, SMALL, source, tmp_path / "file" / "tokens")
    assert not (tmp_path / "tokens").exists()
