"""Features of captions: this project's encoding and cache against LlamaGen's extraction script, on the same random weights.

    python benchmarks/text.py > benchmarks/results/text.json       # a minute or two on a core
    python benchmarks/text.py --shape flan-t5-xl --captions 20000 --words-per-batch 16384 --device cuda

LlamaGen's script (language/extract_t5_feature.py) takes one caption at a time, pads it to 120 positions, and writes a float32
file (1, L, C) per caption, of its L own positions; its data loader pads that to (1, 120, C) once more. Here captions are sorted
by length, encoded many at a time, and kept as bfloat16. Both clean and tokenize alike; both are timed from the caption in words
to the features on the disk, in turns, and the median of the rounds counts. ``cpu`` is processor time, which other work on the
machine does not lengthen as it does the clock's.

Lengths are drawn as those of short captions (LAION-COCO's, COCO's, of about ten words): log-normal around 14 pieces, spread 0.35,
cut to 8 .. 60; the end mark is one of them. On a CPU arithmetic is all there is to save: about 120 / 17 of it, padding and
repeats included (``positions_ratio``), and what larger products gain. On a GPU one caption at a time leaves the card idle, too.

Wanted (issue 5): 8 times the throughput, a quarter of the bytes. Half the bytes is what half precision makes of LlamaGen's
files, which hold no padding; of what its loader makes of them it is a sixteenth. A quarter would take features that are not the
encoder's any more (8 bits), or a compressed file that cannot be mapped.

Both compute in what ``models.text.T5`` does: float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vapi import data
from vapi.bench import meter
from vapi.config import TokensConfig
from vapi.launch import ALONE
from vapi.models import text
from vapi.models.cleaning import clean
from vapi.tokens import Cache, read_captions

SHAPES: dict[str, dict[str, Any]] = {
    "flan-t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "flan-t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "flan-t5-xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
}
PIECES = 2000


def pieces() -> list[str]:
    """Words of a language of its own, each a piece of the tokenizer, none of which cleaning would touch."""
    random = np.random.default_rng(0)
    return sorted({"".join(random.choice(list("aeioulmnrst"), 6)) for _ in range(PIECES)})


def write_t5(folder: Path, shape: str) -> Path:
    """A T5 of a published shape with random weights, and a tokenizer whose pieces are whole words."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{piece}", -5.0) for piece in pieces())]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=4).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=PIECES + 128, feed_forward_proj="gated-gelu", **SHAPES[shape])
    transformers.T5EncoderModel(config).bfloat16().save_pretrained(folder)
    return folder


def draw(count: int) -> list[str]:
    """Captions that all differ."""
    random, words = np.random.default_rng(1), pieces()
    lengths = np.clip(np.round(random.lognormal(np.log(14), 0.35, count)), 8, 60).astype(int)
    captions = [" ".join(random.choice(words, length - 1)) for length in lengths]
    assert len(set(captions)) == count
    return captions


def ours(encoder: text.T5, captions: list[str], folder: Path, words_per_batch: int) -> None:
    """What the stage tokens does."""
    cache = Cache(folder, {"benchmark": "text"}, encoder.width, ragged=True, name="features")
    digests = [data.text_digest(caption) for caption in captions]
    config = TokensConfig(words_per_batch=words_per_batch)
    for some, found in read_captions(encoder, captions, encoder.lengths(captions), range(len(captions)), config, ALONE):
        cache.append([digests[i] for i in some], found)


@torch.no_grad()
def theirs(encoder: text.T5, captions: list[str], folder: Path) -> None:
    """What LlamaGen's script does."""
    folder.mkdir()
    how: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
    for number, caption in enumerate(captions):
        given = encoder.tokenizer([clean(caption)], max_length=120, add_special_tokens=True, **how).to(encoder.device)
        found = encoder.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        np.save(folder / f"{number}.npy", found[:, : int(given["attention_mask"].sum())].float().cpu().numpy())


def timed(work: Callable[[], None]) -> dict[str, float]:
    clean.cache_clear()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def bytes_of(folder: Path, suffix: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(f"*{suffix}"))


def measure(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    captions = draw(given.captions)
    encoder = text.T5(str(write_t5(root / "t5", given.shape)), given.device, given.words_per_batch)
    few = captions[: given.singly]
    ours(encoder, few[:8], root / "warm", given.words_per_batch)
    theirs(encoder, few[:2], root / "warm upstream")
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "upstream": []}
    for number in range(given.rounds):
        rounds["upstream"].append(timed(lambda: theirs(encoder, few, root / f"upstream {number}")))  # noqa: B023
        rounds["ours"].append(timed(lambda: ours(encoder, captions, root / f"ours {number}", given.words_per_batch)))  # noqa: B023
    counts = {"ours": len(captions), "upstream": len(few)}
    rates = {
        name: {clock: counts[name] / statistics.median(one[clock] for one in found) for clock in ("wall", "cpu")}
        for name, found in rounds.items()
    }
    lengths = encoder.lengths(captions)
    ours(encoder, few, root / "the same", given.words_per_batch)
    kept, files = bytes_of(root / "the same", ".bin"), bytes_of(root / "upstream 0", ".npy")
    padded = len(few) * (120 * encoder.width * 4)
    return {
        "shape": {"name": given.shape, **SHAPES[given.shape], "precision": str(encoder.model.dtype).removeprefix("torch.")},
        "captions": {
            **counts,
            "pieces": {"mean": round(statistics.mean(lengths), 2), "median": statistics.median(lengths), "longest": max(lengths)},
        },
        "words_per_batch": given.words_per_batch,
        "captions_per_second": {name: {clock: round(rate, 3) for clock, rate in found.items()} for name, found in rates.items()},
        "throughput_ratio": {clock: round(rates["ours"][clock] / rates["upstream"][clock], 2) for clock in ("wall", "cpu")},
        "throughput_ratio_by_round": [
            round(one["cpu"] / counts["upstream"] / (other["cpu"] / counts["ours"]), 2)
            for one, other in zip(rounds["upstream"], rounds["ours"], strict=True)
        ],
        "positions_ratio": round(120 * len(captions) / positions(lengths, given.words_per_batch), 2),
        "bytes": {
            **{"captions": len(few), "ours": kept, "upstream_files": files, "upstream_padded_to_120": padded},
            **{"share_of_files": round(kept / files, 4), "share_of_padded": round(kept / padded, 4)},
        },
        "wanted": {
            "throughput_ratio": {
                "at_least": 8,
                "met": {clock: rates["ours"][clock] >= 8 * rates["upstream"][clock] for clock in ("wall", "cpu")},
            },
            "share_of_bytes": {"at_most": 0.25, "met": {"files": kept <= files / 4, "padded": kept <= padded / 4}},
        },
    }


def positions(lengths: list[int], words_per_batch: int) -> int:
    """Positions that are computed here, padding and repeats included; LlamaGen computes 120 per caption."""
    return sum(text.shape(max(lengths[i] for i in some), words_per_batch).numel() for some in text.batches(lengths, words_per_batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="flan-t5-small")
    parser.add_argument("--captions", type=int, default=1000, help="encoded here")
    parser.add_argument("--singly", type=int, default=30, help="of them, encoded one at a time")
    parser.add_argument("--words-per-batch", type=int, default=256, help="tokens.words_per_batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder
        found = measure(Path(folder), given)
    print(
        json.dumps(
            {"date": datetime.date.today().isoformat(), "command": "python benchmarks/text.py", "machine": meter.machine(), **found},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
