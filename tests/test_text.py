"""Captions as features: the same bits everywhere and in any company, cached once, and cut or refused by stated rules."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_GPT, write_tiny
from test_launch import run, words
from test_tokens import SMALL, encoded, row
from test_tune import config, same

from vapi import data, models
from vapi import tokens as stage
from vapi import tune as tuning
from vapi.config import Config, ModelConfig, TokensConfig
from vapi.models import text
from vapi.models.cleaning import clean

CAPTIONS = ["a red 3", "a blue 7 left of a green 9", "three yellow 5s", "a red 3 and a blue 4 and a green 5", "a photo of a 2"]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def write_t5(folder: Path, width: int = 32, seed: int = 0) -> str:
    """A T5 as flan-t5 is built, two layers of it with random weights, and a tokenizer of letters and a few longer pieces."""
    singles = [(piece, -4.0) for piece in "abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    longer = [(piece, -3.0) for piece in ("\u2581a", "\u2581photo", "\u2581of", "\u2581red", "ing")]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *singles, *longer]
    transformers.utils.logging.disable_progress_bar()
    transformers.T5Tokenizer(vocab=pieces, extra_ids=4).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    settings = transformers.T5Config(vocab_size=64, feed_forward_proj="gated-gelu", **sizes)
    transformers.T5EncoderModel(settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A tiny generator of captions, as the embedded encoder reads them."""
    sizes = dataclasses.replace(TINY_GPT, classes=0, caption_dim=text.Words.width, prefix=12)
    return dataclasses.replace(write_tiny(tmp_path_factory.mktemp("captioned"), gpt_config=sizes), text_encoder="words")


def subset(folder: Path, captions: list[str]) -> Path:
    folder.mkdir(parents=True)
    data.write_subset(folder, [dataclasses.replace(row(n), label=-1, caption=caption) for n, caption in enumerate(captions)])
    return folder


def digest_of(features: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(feature.numpy().astype("<f4").tobytes() for feature in features)).hexdigest()


# --- words -------------------------------------------------------------------------------------


def test_words_are_the_same_everywhere() -> None:
    """Golden: a generator was trained on these bits."""
    encoder = text.load("words")
    assert digest_of(encoder.encode(CAPTIONS)) == "e1dc7f797a1d343e2e5b3bfc764297b05fa913a8951bad74f41c22e4ddddf613"
    assert (encoder.width, encoder.digest) == (176, text.digest("words")) and encoder.digest.startswith("59ba74b6f69551fc")
    assert encoder.lengths(CAPTIONS) == [3, 8, 3, 11, 5] == [len(feature) for feature in encoder.encode(CAPTIONS)]
    for feature in encoder.encode(CAPTIONS):
        assert feature.dtype == torch.float32 and torch.equal(feature, feature.bfloat16().float())


def test_words_know_their_neighbours_and_nothing_further() -> None:
    encoder = text.load("words")
    (one,), (other,) = encoder.encode(["a red 3 left of a blue 7"]), encoder.encode(["a red 3 left of a blue 8"])
    assert (one != other).any(dim=1).tolist() == [False] * 6 + [True] * 2  # the word itself and the one before it
    (swapped,) = encoder.encode(["a red 7 left of a blue 3"])
    assert not torch.equal(one.sum(dim=0), swapped.sum(dim=0)), "a sum over positions, all that attention takes, tells who is red"
    own = one[:, 3 * 32 : 4 * 32]
    assert own.abs().unique().tolist() == [1.0] and torch.equal(own[0], own[5]), "a word is the same word anywhere"
    assert (
        torch.equal(one[3, :32], own[0]) and torch.equal(one[2, 128:160], own[3]) and not one[0, :96].any() and not one[-1, 128:160].any()
    )


def test_words_are_letters_and_digits() -> None:
    encoder = text.load("words")
    assert torch.equal(*(encoder.encode([caption])[0] for caption in ("A RED-3, (left)", " a red 3 left.")))
    with pytest.raises(ValueError, match="'\u732b' has no word of the letters a to z"):
        encoder.lengths(["a cat", "\u732b"])
    (long,) = encoder.encode(["word " * 150])
    assert len(long) == 120 and encoder.lengths(["word " * 150]) == [150]


def test_padding() -> None:
    features = [torch.full((length, 3), float(length)) for length in (1, 4, 6)]
    condition = text.pad(features, 4)
    assert condition.shape == (3, 4, 4) and condition.dtype == torch.float32
    assert condition[..., -1].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert condition[0, :3].abs().sum() == 0 and condition[0, 3, 0] == 1 and condition[1, 0, 0] == 4
    rising = torch.arange(6.0)[:, None]
    assert text.pad([rising], 4)[0, :, 0].tolist() == [0, 1, 2, 3], "cut at the end"
    encoder = text.load("words")
    (short,) = encoder.encode(["a red 3"])
    assert torch.equal(text.pad([short], 8)[0, 5:, :-1], short)


# --- T5 ----------------------------------------------------------------------------------------


def as_llamagen(folder: str, captions: list[str], precision: torch.dtype) -> list[torch.Tensor]:
    """What LlamaGen stores of a caption: one at a time, padded to 120 positions, masked."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16).to(precision).eval()
    found = []
    for caption in captions:
        how: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
        given = tokenizer([clean(caption)], max_length=120, add_special_tokens=True, **how)
        with torch.no_grad():
            hidden = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        found.append(hidden[0, : int(given["attention_mask"].sum())].float())
    return found


@pytest.mark.parametrize(("precision", "off"), [(torch.float32, 2**-8), (torch.bfloat16, 2**-4)])
def test_t5_gives_what_llamagen_stores(t5: str, precision: torch.dtype, off: float) -> None:
    """Up to the rounding of what is kept, or of what LlamaGen's script, which has its own precision, rounds on the way."""
    captions = [*CAPTIONS, "A Photo, of MANY things " * 9, "x"]
    encoder = text.load(t5, "cpu", 256)
    assert encoder.width == 32 and encoder.digest == text.digest(t5)
    made, theirs = encoder.encode(captions), as_llamagen(t5, captions, precision)
    assert [len(feature) for feature in made] == [len(feature) for feature in theirs] == [min(120, n) for n in encoder.lengths(captions)]
    for ours, upstream in zip(made, theirs, strict=True):
        assert torch.equal(ours, ours.bfloat16().float()), "nothing is lost in half precision"
        torch.testing.assert_close(ours, upstream, rtol=off, atol=off)


def test_t5_does_not_depend_on_batch_mates(t5: str) -> None:
    """To the bit: the cache keeps features whatever they were encoded with."""
    random = np.random.default_rng(0)
    captions = ["".join(random.choice(list("abcdefg hij"), random.integers(3, 60))) for _ in range(40)]
    encoder = text.load(t5, "cpu", 256)
    together = encoder.encode(captions)
    order = random.permutation(40).tolist()
    shuffled = encoder.encode([captions[i] for i in order])
    assert all(torch.equal(shuffled[place], together[i]) for place, i in enumerate(order))
    assert all(torch.equal(encoder.encode([captions[i]])[0], together[i]) for i in range(0, 40, 3))
    assert encoder.encode([]) == []


def test_batches_are_sorted_and_bounded() -> None:
    lengths = np.random.default_rng(0).integers(1, 130, 500).tolist()
    batches = list(text.batches(lengths, 256))
    assert sorted(i for some in batches for i in some) == list(range(500))
    positions = [min(120, 4 * math.ceil(max(lengths[i] for i in some) / 4)) for some in batches]  # lengths that share a shape mix
    assert positions == sorted(positions) and positions[0] == 4 and positions[-1] == 120
    for some in batches:
        padded = min(120, 4 * -(-max(lengths[i] for i in some) // 4))
        assert len(some) * padded <= 256 and padded - min(lengths[i] for i in some) < 4
    assert list(text.batches([100, 3], 1)) == [[1], [0]], "one at a time at least"


def test_a_t5_that_is_none_is_refused(t5: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)

    def refused(name: str | Path, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            text.load(str(name))

    refused("wrods", "neither words, nor a folder that is here, nor a hub id")
    refused(tmp_path / "none", "neither words, nor a folder")
    refused(tmp_path, "holds no T5: weights")
    broken = tmp_path / "broken"
    write_t5(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    refused(broken, "type 'bert', not a T5")
    (broken / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    refused(broken, "no whole T5: .* missing")
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    refused(broken, "no (whole )?T5|pieces")
    (broken / "config.json").write_text(json.dumps(config))
    text.load(str(broken))
    (broken / "tokenizer.json").write_text("{}")
    refused(broken, "holds no T5 that can be read")
    (broken / "config.json").unlink()
    refused(broken, "config.json missing")


def test_a_t5s_digest_is_its_content(t5: str, tmp_path: Path) -> None:
    assert text.digest(t5) == text.digest(write_t5(tmp_path / "same")) != text.digest(write_t5(tmp_path / "other", seed=1))
    (tmp_path / "same" / "notes.txt").write_text("not read")
    assert text.digest(str(tmp_path / "same")) == text.digest(t5)
    known = list((tmp_path / ".vapi" / "digests").iterdir())
    text.digest(str(tmp_path / "other"))
    assert sorted((tmp_path / ".vapi" / "digests").iterdir()) == sorted(known), "nothing large is read twice"


def test_cleaning_is_llamagens() -> None:
    """Golden: what LlamaGen's own code made of these."""
    for caption, cleaned in CLEANED:
        assert clean(caption) == cleaned, caption


# --- the stage tokens --------------------------------------------------------------------------


def test_features_are_the_encoders_and_equal_captions_are_kept_once(captioned: ModelConfig, tmp_path: Path) -> None:
    captions = [*CAPTIONS, CAPTIONS[1], "word " * 130, CAPTIONS[0], "word " * 130]
    stage.tokens(captioned, SMALL, subset(tmp_path / "subset", captions), tmp_path / "tokens")
    made, picked = data.read_tokens(tmp_path / "tokens"), data.read_subset(tmp_path / "subset")
    direct = text.load("words").encode(captions)
    assert all(torch.equal(*pair) for pair in zip(made.features(range(9)), direct, strict=True))
    assert torch.equal(made.features(torch.tensor([4]))[0], direct[4])
    told = made.summary["captions"]
    words = 3 + 8 + 3 + 11 + 5 + 120
    assert told == {
        "encoder": text.digest("words"),
        **{"width": 176, "captions": 9, "distinct": 6, "max_words": 120, "longest": 130, "cut": 2, "empty": 0},
        **{"words": words, "bytes": words * 176 * 2},
    }
    assert made.captions is not None and made.captions.bits.shape == (words, 176) and isinstance(made.captions.bits, np.memmap)
    assert data.read_json(tmp_path / "tokens" / "config.json")["inputs"]["text_encoder"] == text.digest("words")
    made.require(captioned, picked)
    made.require(dataclasses.replace(captioned, text_encoder=""), picked)


def test_without_a_text_encoder_there_are_no_features(tiny_model: ModelConfig, captioned: ModelConfig, tmp_path: Path) -> None:
    stage.tokens(tiny_model, SMALL, subset(tmp_path / "subset", CAPTIONS), tmp_path / "tokens")
    made, picked = data.read_tokens(tmp_path / "tokens"), data.read_subset(tmp_path / "subset")
    assert made.captions is None and not (tmp_path / "tokens" / "features.npy").exists() and "captions" not in made.summary
    with pytest.raises(ValueError, match="no features of captions; name model.text_encoder and run: vapi tokens"):
        made.features([0])
    with pytest.raises(ValueError, match="hold no features of captions, and model.text_encoder names an encoder"):
        made.require(dataclasses.replace(tiny_model, text_encoder="words"), picked)


def test_features_of_another_encoder_or_of_other_captions(t5: str, captioned: ModelConfig, tmp_path: Path) -> None:
    stage.tokens(captioned, SMALL, subset(tmp_path / "subset", CAPTIONS), tmp_path / "tokens")
    made, picked = data.read_tokens(tmp_path / "tokens"), data.read_subset(tmp_path / "subset")
    with pytest.raises(ValueError, match="encoded by another encoder than .*; run: vapi tokens"):
        made.require(dataclasses.replace(captioned, text_encoder=t5), picked)
    others = data.read_subset(subset(tmp_path / "others", [*CAPTIONS[:4], "another"]))
    with pytest.raises(ValueError, match="a subset with other captions"):
        made.require(captioned, others)
    (tmp_path / "tokens" / "features.npy").unlink()
    with pytest.raises(ValueError, match="features.npy is missing or not whole"):
        data.read_tokens(tmp_path / "tokens")


@pytest.mark.parametrize("kind", ["words", "t5"])
def test_what_is_known_is_not_read_again(kind: str, t5: str, captioned: ModelConfig, tmp_path: Path) -> None:
    model = dataclasses.replace(captioned, text_encoder=t5) if kind == "t5" else captioned
    small = dataclasses.replace(SMALL, words_per_batch=64)
    captions = [f"a photo of {n} things" + " and more" * (n % 7) for n in range(30)]

    def made(name: str, captions: list[str]) -> int:
        stage.tokens(model, small, subset(tmp_path / name, captions), tmp_path / "tokens")
        return int(data.read_json(tmp_path / "tokens" / "provenance.json")["captions_encoded"])

    assert made("a", captions[:20]) == 20
    assert made("b", captions[::-1]) == 10 and encoded(tmp_path / "tokens") == 10
    after_another = (tmp_path / "tokens" / "features.npy").read_bytes()
    assert made("c", captions[::-1]) == 0
    (cache,) = (tmp_path / ".vapi" / "captions").iterdir()
    (cache / "features.bin").unlink()
    assert made("d", captions[::-1]) == 30
    assert (tmp_path / "tokens" / "features.npy").read_bytes() == after_another, "the same to the bit, whatever was encoded before"


def test_a_killed_run_goes_on(t5: str, captioned: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(captioned, text_encoder=t5)
    small = dataclasses.replace(SMALL, words_per_batch=64)
    source = subset(tmp_path / "subset", [f"a photo of {n} things" + " and more" * (n % 7) for n in range(30)])
    stage.tokens(model, small, source, tmp_path / "undisturbed")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "again"))
    append, calls = stage.Cache.append, []

    def dies(self: stage.Cache, sha256: list[str], numbers: list[np.ndarray]) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(sha256))
        append(self, sha256, numbers)

    monkeypatch.setattr(stage.Cache, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.tokens(model, small, source, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(stage.Cache, "append", append)
    (file,) = (tmp_path / "again" / ".vapi" / "captions").glob("*/features.bin")
    with file.open("ab") as torn:
        torn.write(file.read_bytes()[:555])  # less than a record
    stage.tokens(model, small, source, tmp_path / "killed")
    assert data.read_json(tmp_path / "killed" / "provenance.json")["captions_encoded"] == 30 - sum(calls)
    assert data.file_digest(tmp_path / "killed") == data.file_digest(tmp_path / "undisturbed")


def test_cut_and_empty_captions_are_counted(t5: str, captioned: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["bcdfgh " * 40, "http://x.com/y", "free download", "a photo", "bcdfgh " * 40]
    model = dataclasses.replace(captioned, text_encoder=t5)
    stage.tokens(model, SMALL, subset(tmp_path / "subset", captions), tmp_path / "tokens")
    made = data.read_tokens(tmp_path / "tokens")
    told = made.summary["captions"]
    assert (told["cut"], told["empty"], told["distinct"], told["max_words"]) == (2, 2, 4, 120) and told["longest"] > 120
    assert [len(feature) for feature in made.features(range(5))] == [120, 1, 1, 3, 120]
    assert "4 captions, 2 of them cut at 120 words, 2 of them empty once cleaned" in capsys.readouterr().out


def test_a_subset_without_captions_is_refused(captioned: ModelConfig, tmp_path: Path) -> None:
    for name, captions in (("none", [""] * 3), ("some", ["a red 3", " ", "a blue 4"])):
        with pytest.raises(ValueError, match="of 3 images of .* have no caption .*subset.caption_column"):
            stage.tokens(captioned, SMALL, subset(tmp_path / name, captions), tmp_path / "tokens")
        assert not (tmp_path / "tokens").exists()
    with pytest.raises(ValueError, match="has no word of the letters"):
        stage.tokens(captioned, SMALL, subset(tmp_path / "signs", ["a red 3", "\u732b"]), tmp_path / "tokens")


def test_processes_encode_together(t5: str, captioned: ModelConfig, tmp_path: Path) -> None:
    source = subset(tmp_path / "subset", [f"a photo of {n} things" + " and more" * (n % 5) for n in range(23)])
    model, sizes = dataclasses.replace(captioned, text_encoder=t5), TokensConfig(images_per_batch=8, words_per_batch=64)
    settings = dataclasses.replace(Config(), model=model, tokens=sizes)
    stage.tokens(settings.model, settings.tokens, source, tmp_path / "one")
    done = run(2, words("tokens", settings, {"subset": source, "out": tmp_path / "many"}), tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert data.file_digest(tmp_path / "many") == data.file_digest(tmp_path / "one")


def test_write_weights_names_the_encoder(t5: str, captioned: ModelConfig, tmp_path: Path) -> None:
    for name in ("words", t5):
        data.write_weights(dataclasses.replace(captioned, text_encoder=name), tmp_path / "out")
        assert data.read_json(tmp_path / "out" / "text_encoder.json") == {"sha256": text.digest(name)}
    data.write_weights(dataclasses.replace(captioned, text_encoder=""), tmp_path / "none")
    assert data.read_json(tmp_path / "none" / "text_encoder.json") == {"sha256": "none"}


# --- tuning ------------------------------------------------------------------------------------


def inputs(model: ModelConfig, folder: Path, captions: list[str]) -> dict[str, Path]:
    stage.tokens(model, SMALL, subset(folder / "subset", captions), folder / "tokens")
    return {"subset": folder / "subset", "tokens": folder / "tokens"}


def test_a_batch_holds_the_captions_of_its_images(captioned: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = [f"a photo of {n} things" for n in range(14)] + ["a much longer caption " * 4]
    folders, policy = inputs(captioned, tmp_path, captions), models.load(captioned)
    examples = tuning.Examples(captioned, config(), **folders)
    examples.fit(policy)
    rows = examples.order(1)
    assert torch.equal(examples.load(rows, policy).condition, policy.condition([captions[i] for i in rows.tolist()]))
    tuning.tune(captioned, config(), **folders, out=tmp_path / "a")
    assert "1 of 15 captions are longer than the generator reads, and cut" in capsys.readouterr().err
    assert data.read_json(tmp_path / "a" / "summary.json")["captions_cut"] == 1
    tuning.tune(captioned, config(), **folders, out=tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


def test_a_generator_of_captions_wants_its_encoders_features(t5: str, captioned: ModelConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(captioned, text_encoder=t5)
    with pytest.raises(ValueError, match="12 positions x 176 features, and these have 12 x 32"):
        tuning.tune(other, config(), **inputs(other, tmp_path / "t5", CAPTIONS * 3), out=tmp_path / "tune")
    with pytest.raises(ValueError, match="gives 32 features per word, the generator reads 176"):
        models.load(other).condition(["a red 3"])
    plain = dataclasses.replace(captioned, text_encoder="")
    folders = inputs(plain, tmp_path / "plain", CAPTIONS * 3)
    with pytest.raises(ValueError, match="hold no features of captions, and model.text_encoder names"):
        tuning.tune(captioned, config(), **folders, out=tmp_path / "tune")
    assert not (tmp_path / "tune").exists()


CLEANED = [
    ("A photo of a bench.", "a photo of a bench."),
    ("  A   Photo of TWO dogs,one cat/bird ", "a photo of two dogs, one cat bird"),
    ("see https://example.com/a.html now", "see html now"),
    ("www.shop.com best price", "best price"),
    ("<b>Bold</b> &amp; <i>brave</i>", "bold brave"),
    ("<person> at work", "person at work"),
    ("by @artist #12 #123456", "by"),
    ("猫 a cat 犬", "a cat"),
    ("red — blue – green", "red - blue - green"),
    ("“quoted” ‘words’", "quoted\" 'words"),
    ("'all of it quoted'", "all of it quoted"),
    ("192.168.0.1 is home", "is home"),
    ("meeting at 3:45 ", "meeting at 3:45"),
    ("one\\ntwo", "one two"),
    ("IMG_1234.jpg of a lake", "of a lake"),
    ("wait... what ... now", "wait what now"),
    ("***SALE*** (50% off) [new]", "sale 50% off new"),
    ("this-is-my-cute-cat", "this is my cute cat"),
    ("a-b c_d", "a-b c_d"),
    ("jc6640 lens jc6640vc 6640vc231", "lens"),
    ("free shipping on all, worldwide free shipping", "on all"),
    ("free download free", ""),
    ("click for more, click on this", ""),
    ("jpg images of png", "of"),
    ("see page 12", "see"),
    ("poster 10x20 and 3.5×4", "poster and"),
    ("title : text", "title: text"),
    ("schÃ¶n", "schã¶n"),
    ("naïve café ﬁne", "naïve café fine"),
    ("%20encoded+plus%21", "encoded plus!"),
    ("&lt;p&gt;", ""),
    ("http://x.com", ""),
    ("-dash-", "dash"),
    (".hidden", ""),
    ("12345678 pieces", "pieces"),
    ("j2d1a2a9 code", "code"),
    ("emoji 🎉 stays", "emoji 🎉 stays"),
    ("a photo of a bench left of a bear", "a photo of a bench left of a bear"),
]
