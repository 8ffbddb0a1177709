"""Run the frozen tokenizer over the subset's images, and the frozen text encoder over its captions, once.

The tokenizer never changes while the generator is tuned, so its codes are computed once and kept, by
content: the cache is named after the tokenizer's weights, the image size and the crop, and inside it
a record is named after the sha256 of the encoded image. An unchanged input is not encoded again, a
hundred added images encode a hundred, and codes of another tokenizer cannot slip in. The cache is
one file of records, appended batch by batch, each with its own checksum: a run that was
killed goes on where it stopped, and the torn end of the file is cut off.

Features of captions (only where ``model.text_encoder`` names an encoder) are kept in such a cache of their own, named
after the encoder, by the sha256 of the caption: as many rows as it has words, in bfloat16, which loses nothing (see
``models.text``). Equal captions are encoded once. What is longer than the encoder reads is cut at its end, and counted; so
are captions of which a T5's cleaning leaves nothing, which are encoded as such, as LlamaGen does.

Every batch has the same size (the last is filled up with repeats), so an image meets the same
arithmetic whichever images it happens to be encoded with. Threads decode and crop the next batches while
the device encodes one. It does so in float32 on every device, TF32 off: rounding decides between two
entries of the codebook that are about as near, and codes are kept for good. Left out: bfloat16 for that
reason (with random weights 9 % of VQ-16's codes came out otherwise), and the ten crops per image with which
LlamaGen was pretrained; VA-pi's own loader takes the centre crop alone.

Shapes: B images, T codes of an image, V codebook, L words of a caption, C channels of a feature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vapi import data, images, launch, models
from vapi.config import ModelConfig, TokensConfig
from vapi.data import Subset
from vapi.launch import World
from vapi.models import text
from vapi.models.text import TextEncoder
from vapi.run import NO_RUN, Run

FORMAT = 1
"""Of the cache's records. Raise it when crop or encoding change, and old codes are left behind."""
JUDGED = 256
"""Images whose reconstruction is compared with the original."""


def tokens(model: ModelConfig, tokens: TokensConfig, subset: Path, out: Path, run: Run = NO_RUN) -> None:
    """The stage. Writes codes.npy (uint16 (N, T)), index.parquet (key, label, sha256, crop) and summary.json; with
    ``model.text_encoder`` features.npy too, and in the index where in it an image's caption is.

    Raises ValueError, with nothing written, if the subset cannot be read or the codes do not pass validation.
    """
    started = time.perf_counter()
    world = launch.world(model.device)
    with world.first_enters(data.output_folder(out, "tokens")) as folder:
        picked = data.read_subset(subset)
        require_captions(model, picked, subset)
        models.require_readable(model, picked.captions)
        tokenizer, device = models.load_tokenizer(model), models.device_of(model)
        features, counts = _features(picked, device, model, tokens, world) if model.text_encoder else (None, {})
        codes, encoded = _codes(tokenizer, device, picked, model, tokens, world)
        if folder is None:
            return
        summary = {
            "images": len(picked),
            "tokenizer": data.tokenizer_digest(model),
            "image_size": model.image_size,
            "crop": tokens.crop,
            **describe(codes, tokenizer.vocab),
            **_reconstruct(tokenizer, device, codes, picked, model, tokens),
        }
        _require_valid(codes, summary, tokens)
        inputs, timings = {"subset": data.file_digest(subset), "tokenizer": summary["tokenizer"]}, {"encoded": encoded}
        if counts:
            timings["captions_encoded"] = counts.pop("encoded")
            summary["captions"] = counts
            inputs["text_encoder"] = counts["encoder"]
        data.write_tokens(folder, codes, picked, tokens.crop, summary, features)
        data.describe(folder, "tokens", {"model": model, "tokens": tokens}, inputs, time.perf_counter() - started, **timings)
    run.metrics({f"tokens/{name}": summary[name] for name in ("codebook_usage", "perplexity", "psnr")})
    print(
        f"{len(picked):,} images, {encoded:,} of them encoded now; {summary['codebook_usage']:.0%} of the codebook in use, "
        f"perplexity {summary['perplexity']:.0f}, reconstruction {summary['psnr']:.1f} dB{_said(counts)} -> {out}"
    )


def _said(counts: dict[str, Any]) -> str:
    if not counts:
        return ""
    cut = f", {counts['cut']:,} of them cut at {counts['max_words']} words" if counts["cut"] else ""
    empty = f", {counts['empty']:,} of them empty once cleaned" if counts["empty"] else ""
    return f"; {counts['distinct']:,} captions{cut}{empty}"


# --- encoding ----------------------------------------------------------------------------------


def _codes(
    tokenizer: Any, device: torch.device, picked: Subset, model: ModelConfig, config: TokensConfig, world: World
) -> tuple[np.ndarray, int]:
    """Codes of every image (uint16 (N, T)), and how many had to be encoded for it. Only the first process gets them,
    and only it touches the cache; the others encode for it."""
    named = {"format": FORMAT, "tokenizer": data.tokenizer_digest(model), "image_size": model.image_size, "crop": config.crop}
    name = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:24]
    folder = data.state_dir("tokens", name)
    with world.first_enters(data.locked(folder / "lock")):
        count = _num_codes(tokenizer, device, model.image_size)
        cache = Cache(folder, {**named, "codes": count, "vocab": tokenizer.vocab}, count) if world.first else None
        missing = world.once(lambda: [i for i, digest in enumerate(picked.sha256) if cache is not None and digest not in cache])
        with tqdm(total=len(missing), desc="tokens", unit="image", disable=None if world.first else True) as bar:
            for some, codes in _encode_together(tokenizer, device, picked, missing, model.image_size, config, world):
                if cache is not None:
                    cache.append([picked.sha256[i] for i in some], list(codes[:, None]))
                bar.update(len(some))
        codes = np.concatenate(cache.take(picked.sha256)) if cache is not None else np.empty((0, count), np.uint16)
        return codes, len(missing)


def _encode_together(
    tokenizer: Any, device: torch.device, picked: Subset, wanted: Sequence[int], size: int, config: TokensConfig, world: World
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """``encode`` by all processes, who take batches in turn; every process gets every batch, in order."""
    batches = list(_batches(wanted, config.images_per_batch))
    mine = [i for some in batches[world.rank :: world.size] for i in some]
    encoded = encode(tokenizer, device, picked, mine, size, config)
    for _ in range(0, len(batches), world.size):
        for found in world.gather(next(encoded, None)):
            if found is not None:
                yield found


def encode(
    tokenizer: Any, device: torch.device, picked: Subset, wanted: Sequence[int], size: int, config: TokensConfig
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Some images of a subset, batch by batch: their numbers and their codes, uint16 (B, T).

    A batch is handed out when the next one is on its way to the device.
    """
    workers, ahead = config.workers or data.cores(), 2 * config.images_per_batch
    pixels = data.parallel(lambda i: picked.pixels(i, size), wanted, workers, max(ahead, 4 * workers))
    running: tuple[Sequence[int], Tensor] | None = None
    for some in _batches(wanted, config.images_per_batch):
        batch = np.stack([next(pixels) for _ in some])
        padding = config.images_per_batch - len(some)
        full = np.concatenate([batch, np.repeat(batch[:1], padding, axis=0)]) if padding else batch
        started = some, _encode(tokenizer, images.to_float(full, device))
        if running is not None:
            yield running[0], _codes_of(tokenizer, *running)
        running = started
    if running is not None:
        yield running[0], _codes_of(tokenizer, *running)


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


@torch.inference_mode()
def _encode(tokenizer: Any, batch: Tensor) -> Tensor:
    """Codes (B, T), on the device and perhaps still being computed there."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return tokenizer.encode(batch)


def _codes_of(tokenizer: Any, some: Sequence[int], encoded: Tensor) -> np.ndarray:
    """The codes of a batch's first images as they are kept: uint16 (B, T)."""
    codes = encoded[: len(some)].cpu().numpy()
    if codes.min() < 0 or codes.max() >= tokenizer.vocab:
        raise ValueError(f"the tokenizer gave codes from {codes.min()} to {codes.max()}, outside of its codebook of {tokenizer.vocab}")
    return codes.astype(np.uint16)


def _num_codes(tokenizer: Any, device: torch.device, size: int) -> int:
    if tokenizer.vocab > 2**16:
        raise ValueError(f"the tokenizer has {tokenizer.vocab} codes; more than 65536 do not fit in uint16, in which codes are kept")
    return _encode(tokenizer, torch.zeros(1, 3, size, size, device=device)).shape[1]


# --- captions ----------------------------------------------------------------------------------


def require_captions(model: ModelConfig, picked: Subset, folder: Path) -> None:
    """Raises ValueError if the model draws from captions and images of a subset have none."""
    without = [key for key, caption in zip(picked.keys, picked.captions, strict=True) if not caption.strip()]
    if model.captions and without:
        reader = f"model.text_encoder is {model.text_encoder}" if model.text_encoder else f"model.policy {model.policy} reads captions"
        raise ValueError(
            f"{reader}, and {len(without)} of {len(picked)} images of {folder} have no caption "
            f"({', '.join(without[:3])}); name their column in subset.caption_column, set subset.classes 0, and run: vapi subset"
        )


def _features(
    picked: Subset, device: torch.device, model: ModelConfig, config: TokensConfig, world: World
) -> tuple[list[np.ndarray] | None, dict[str, Any]]:
    """Features of each distinct caption, as bits of bfloat16 (uint16 (L, C)), and what is said about them. Only the first process
    gets them, and only it touches the cache; the others encode for it."""
    encoder = text.load(model.text_encoder, device, config.words_per_batch)
    captions = data.distinct(picked.captions)
    digests = [data.text_digest(caption) for caption in captions]
    named = {"format": FORMAT, "encoder": encoder.digest, "width": encoder.width, "arithmetic": encoder.arithmetic}
    folder = data.state_dir("captions", hashlib.sha256(json.dumps(named).encode()).hexdigest()[:24])
    with world.first_enters(data.locked(folder / "lock")):
        cache = Cache(folder, named, encoder.width, ragged=True, name="features") if world.first else None
        lengths = world.once(lambda: _lengths(encoder, captions, picked))
        missing = world.once(lambda: [i for i, digest in enumerate(digests) if cache is not None and digest not in cache])
        with tqdm(total=len(missing), desc="captions", unit="caption", disable=None if world.first else True) as bar:
            for some, found in read_captions(encoder, captions, lengths, missing, config, world):
                if cache is not None:
                    cache.append([digests[i] for i in some], found)
                bar.update(len(some))
        if cache is None:
            return None, {}
        features = cache.take(digests)
    length_of = dict(zip(captions, lengths, strict=True))
    return features, {
        "encoder": encoder.digest,
        "width": encoder.width,
        "captions": len(picked),
        "distinct": len(captions),
        "max_words": encoder.max_words,
        "longest": max(lengths),  # before the cut
        "cut": sum(length_of[caption] > encoder.max_words for caption in picked.captions),
        "empty": sum(length_of[caption] <= encoder.end_marks for caption in picked.captions),  # once they were cleaned
        "words": sum(map(len, features)),
        "bytes": sum(one.nbytes for one in features),
        "encoded": len(missing),
    }


def _lengths(encoder: TextEncoder, captions: Sequence[str], picked: Subset) -> list[int]:
    """Words of each caption. Raises ValueError that names the image of one that the encoder cannot read."""
    try:
        return encoder.lengths(captions)
    except ValueError:
        for key, caption in zip(picked.keys, picked.captions, strict=True):
            try:
                encoder.lengths([caption])
            except ValueError as error:
                raise ValueError(f"{key}: {error}; leave it out of the source, or give it another caption") from None
        raise


def read_captions(
    encoder: TextEncoder, captions: Sequence[str], lengths: Sequence[int], wanted: Sequence[int], config: TokensConfig, world: World
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Numbers and features of captions by all processes, who take batches in turn; every process gets every batch, in order."""
    batches = [[wanted[i] for i in some] for some in text.batches([lengths[i] for i in wanted], config.words_per_batch)]
    for first in range(0, len(batches), world.size):
        mine = batches[first + world.rank : first + world.rank + 1]
        for found in world.gather([(some, _bits(encoder.encode([captions[i] for i in some]))) for some in mine]):
            yield from found


def _bits(features: Sequence[Tensor]) -> list[np.ndarray]:
    """Features as they are kept. A bfloat16's bits are the upper half of a float32's."""
    kept = [feature.to(torch.bfloat16) for feature in features]
    assert all(torch.equal(half.float(), feature.float()) for half, feature in zip(kept, features, strict=True)), "more than bfloat16 holds"
    return [half.view(torch.int16).numpy().view(np.uint16) for half in kept]


# --- cache -------------------------------------------------------------------------------------


class Cache:
    """Rows of numbers (uint16) by the sha256 of what they were made of, in a file that only grows. Hold a lock around it.

    A record is the sha256, where records are ``ragged`` the number of its rows, the rows, ``width`` numbers each, and a checksum.
    ``named`` is what the numbers depend on beside that; a folder with another name inside is refused.
    """

    def __init__(self, folder: Path, named: dict[str, Any], width: int, ragged: bool = False, name: str = "codes") -> None:
        self._require_name(folder / "cache.json", named)
        self.path, self.width, self.ragged = folder / f"{name}.bin", width, ragged
        self.path.touch()
        self.rows: dict[bytes, tuple[int, int]] = {}  # where in the file a record's rows begin, and how many
        self.end = self._walk()
        os.truncate(self.path, self.end)  # a killed run's torn end

    def _require_name(self, path: Path, named: dict[str, Any]) -> None:
        if not path.is_file():
            data.write_json(path, named)
        elif data.read_json(path) != named:
            raise ValueError(f"{path.parent} holds what was made otherwise (see cache.json in it); delete it, it will be made anew")

    def _walk(self) -> int:
        """Note the records up to the first that is torn, and say where it begins."""
        body = self._mapped().data
        at, head = 0, 36 if self.ragged else 32
        while at + head <= len(body):
            rows = int.from_bytes(body[at + 32 : at + 36], "little") if self.ragged else 1
            end = at + head + 2 * self.width * rows
            if end + 4 > len(body) or zlib.crc32(body[at:end]) != int.from_bytes(body[end : end + 4], "little"):
                break
            self.rows[bytes(body[at : at + 32])] = (at + head, rows)
            at = end + 4
        return at

    def _mapped(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.empty(0, np.uint8)

    def __contains__(self, sha256: str) -> bool:
        return bytes.fromhex(sha256) in self.rows

    def append(self, sha256: Sequence[str], numbers: Sequence[np.ndarray]) -> None:
        """Keep what belongs to each (uint16 (rows, width)); it is on the disk when this returns."""
        records = [self._record(digest, rows) for digest, rows in zip(sha256, numbers, strict=True)]
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kept = f"the {len(self.rows):,} in it are safe"
            raise ValueError(f"cannot write the token cache {self.path}: {error.strerror or error}; {kept}. {data.AGAIN}") from error
        for digest, rows, record in zip(sha256, numbers, records, strict=True):
            self.rows[bytes.fromhex(digest)] = (self.end + len(record) - 4 - rows.nbytes, len(rows))
            self.end += len(record)

    def _record(self, sha256: str, rows: np.ndarray) -> bytes:
        assert rows.dtype == np.uint16 and rows.shape[1:] == (self.width,) and (self.ragged or len(rows) == 1), (rows.dtype, rows.shape)
        count = len(rows).to_bytes(4, "little") if self.ragged else b""
        body = bytes.fromhex(sha256) + count + np.ascontiguousarray(rows, "<u2").tobytes()
        return body + zlib.crc32(body).to_bytes(4, "little")

    def take(self, sha256: Sequence[str]) -> list[np.ndarray]:
        """What belongs to each, uint16 (rows, width), mapped from the file."""
        body, places = self._mapped(), [self.rows[bytes.fromhex(digest)] for digest in sha256]
        return [body[at : at + 2 * rows * self.width].view("<u2").reshape(rows, self.width) for at, rows in places]


# --- what is said about them -------------------------------------------------------------------


def describe(codes: np.ndarray, vocab: int) -> dict[str, Any]:
    """Range of the codes (uint16 (N, T)), share of the codebook in use, and perplexity: 2^entropy of all codes pooled."""
    counts = np.bincount(codes.ravel(), minlength=vocab)
    shares = counts[counts > 0] / counts.sum()
    return {
        "codes": codes.shape[1],
        "vocab": vocab,
        "smallest": int(codes.min()),
        "largest": int(codes.max()),
        "codebook_usage": float((counts > 0).mean()),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }


@torch.inference_mode()
def _reconstruct(
    tokenizer: Any, device: torch.device, codes: np.ndarray, picked: Subset, model: ModelConfig, config: TokensConfig
) -> dict[str, Any]:
    """PSNR in dB of decoded codes against the cropped images, in uint8; mean and lowest of up to 256 images."""
    judged = range(min(JUDGED, len(picked)))
    originals = data.parallel(lambda i: picked.pixels(i, model.image_size), judged, config.workers or data.cores())
    values: list[float] = []
    for some in _batches(judged, config.images_per_batch):
        decoded = images.to_uint8(tokenizer.decode(torch.from_numpy(codes[list(some)].astype(np.int64)).to(device)))
        for made in decoded.permute(0, 2, 3, 1).cpu().numpy():
            values.append(psnr(made, next(originals)))
    return {"psnr": float(np.mean(values)), "psnr_lowest": float(np.min(values)), "psnr_images": len(values)}


def psnr(made: np.ndarray, original: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; 100 at most (the same image)."""
    error = np.square(made.astype(np.float64) - original).mean()
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def _require_valid(codes: np.ndarray, summary: dict[str, Any], config: TokensConfig) -> None:
    """Raises ValueError for codes that are no basis for tuning; the cache keeps them all the same."""
    if summary["largest"] >= summary["vocab"]:
        raise ValueError(f"code {summary['largest']} lies outside of the codebook of {summary['vocab']}")
    if summary["codebook_usage"] < config.min_codebook_usage:
        raise ValueError(
            f"{summary['codebook_usage']:.1%} of the codebook occur in the subset, less than tokens.min_codebook_usage "
            f"{config.min_codebook_usage:.1%}; take more or more varied images, or another tokenizer"
        )
    same = len(np.unique(codes, axis=0))
    if same == 1 and len(codes) > 1:
        raise ValueError("every image has the same codes; the tokenizer's weights are not those of a trained tokenizer")
