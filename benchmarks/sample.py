"""Sampling: ours against LlamaGen's own ``generate``, same weights (random), same batch. JSON on standard output.

    python benchmarks/sample.py LLAMAGEN                                     # a checkout; GPT-B at 256 pixels, float32
    python benchmarks/sample.py LLAMAGEN --size GPT-XXL --grid 6 --rounds 1  # the largest shape, 36 codes of it

The two take turns, so that a busy machine slows both; medians of wall time, and of the process's CPU time, which other
processes disturb less. Both draw at temperature 1 from all codes, without guidance unless ``--guidance`` says so.
``vapi bench sample`` measures the same on any device, for any recipe, against a loop of our own that works as theirs does.

What a GPU is to reach: GPT-XXL at 384 pixels in bfloat16, without guidance, 50 images per second on an H200. Nothing but
memory stands against it: ``bound`` is the arithmetic, the bytes that must be read for every code (all weights once, and
the keys and values so far) over what a card reads in a second. The rate that follows is a ceiling, for sampling alone.
To be run where there is one: ``vapi bench sample --recipe llamagen-xxl-c2i --images-per-batch 256``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import upstream

from vapi.bench import meter
from vapi.bench.sample import bytes_read
from vapi.models import gpt, sampler

Work = Callable[[], object]


def bound(size: str = "GPT-XXL", codes: int = 576, precision: str = "bfloat16") -> dict[str, Any]:
    """Images per second that memory allows, without guidance: card -> images in a batch -> rate."""
    with torch.device("meta"):
        model = gpt.Transformer(gpt.published(size, codes=codes))

    def rate(bandwidth: float, images: int) -> float:
        return round(images * bandwidth / bytes_read(model, codes, images, precision), 1)

    cards = {name: meter.CARDS[name][2] for name in ("H200", "H100")}
    rates = {name: {images: rate(bandwidth, images) for images in (16, 64, 128, 256)} for name, bandwidth in cards.items()}
    weights = bytes_read(model, codes, 0, precision) / codes
    cache = (bytes_read(model, codes, 1, precision) - codes * weights) / codes
    return {"size": size, "codes": codes, "precision": precision, "weight_bytes_per_code": weights, "cache_bytes_per_code_and_image": cache,
            "images_per_second": rates}  # fmt: skip


def pair(size: str, grid: int, images: int, guidance: float) -> dict[str, Work]:
    """Name -> drawing ``images`` images of grid x grid codes; weights are shared."""
    config = gpt.published(size, codes=grid * grid)
    with torch.device("meta"):
        ours = gpt.Transformer(config)
    state = upstream.random_state(ours, 0)
    ours.load_state_dict(state, assign=True)
    ours.eval()
    theirs: Any = upstream.generator(config, state)
    theirs.load_state_dict(state, assign=True)
    labels = torch.arange(images)
    draw = upstream.theirs("autoregressive.models.generate").generate
    return {
        "upstream": lambda: draw(theirs, labels, config.codes, cfg_scale=guidance, temperature=1.0, top_k=0, top_p=1.0),
        "ours": lambda: sampler.generate(ours, labels, list(range(images)), guidance=guidance),
    }


def measure(works: dict[str, Work], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds, and CPU seconds, of each."""
    wall: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name, work in works.items():
            begin, busy = time.perf_counter(), time.process_time()
            work()
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - busy)
            print(f"{turn}: {name} {wall[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return tuple({name: statistics.median(values) for name, values in found.items()} for found in (wall, cpu))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llamagen", type=Path, help="checkout of LlamaGen")
    parser.add_argument("--size", default="GPT-B", choices=gpt.PUBLISHED)
    parser.add_argument("--grid", type=int, default=16, help="codes along a side; 16 is 256 pixels")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # theirs asks for attention kernels in a way that torch has given up
    with upstream.checkout(given.llamagen):
        wall, cpu = measure(pair(given.size, given.grid, given.images, given.guidance), given.rounds)
    flags = " ".join(f"--{name} {value}" for name, value in vars(given).items() if name != "llamagen")
    report = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/sample.py LLAMAGEN {flags}",
        "machine": {**meter.machine(), "load_average": round(os.getloadavg()[0], 1)},  # above the number of cores: shared with others
        "images_per_second": round(given.images / wall["ours"], 4),
        "upstream_images_per_second": round(given.images / wall["upstream"], 4),
        "speedup": round(wall["upstream"] / wall["ours"], 2),
        "cpu_seconds": {name: round(value, 2) for name, value in cpu.items()},
        "cpu_speedup": round(cpu["upstream"] / cpu["ours"], 2),
        "bound": bound(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
