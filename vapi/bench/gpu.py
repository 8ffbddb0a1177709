"""The whole table for one GPU in under nine minutes: LlamaGen-XXL at 384 pixels, 128 images per step, eight draws each.

Every part is a run of ``vapi bench`` in a process of its own with a time of its own, so that memory is given back
and a part that hangs costs only itself. A part that runs out of memory is tried again with smaller pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from vapi.bench import say
from vapi.config import Measured

XXL = "--recipe llamagen-xxl-c2i --device cuda"
LIMIT = 530  # seconds for everything


@dataclass(frozen=True)
class Part:
    """One benchmark: its words, in the order in which they are tried, and how many seconds it may take."""

    name: str
    tries: tuple[str, ...]
    seconds: int


ROOM = 120e9  # bytes of memory from which 256 images are sampled at a time, by our loop and the naive one side by side


def parts(memory: int) -> tuple[Part, ...]:
    """What is run on a card with ``memory`` bytes."""
    batches = (256, 128) if memory > ROOM else (128, 64)
    pieces = ("", " --images-per-forward 8 --images-per-reward 16")  # the recipe's, and half of that
    return (
        Part("tune", tuple(f"tune {XXL} --rounds 2{smaller}" for smaller in pieces), 255),
        Part("sample", tuple(f"sample {XXL} --images-per-batch {images} --rounds 1" for images in batches), 110),
        Part("reward", tuple(f"reward {XXL} --rounds 3{smaller}" for smaller in pieces), 85),
        Part("fid", (f"fid {XXL} --images-per-batch 64 --rounds 1",), 80),
    )


def gpu(settings: Measured) -> dict[str, Any]:
    """Run the table. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("vapi bench gpu needs a GPU, and none is visible; on a CPU: vapi bench tune, sample, reward or fid")
    return table(parts(torch.cuda.get_device_properties(0).total_memory), settings.bench.out)


def table(parts: tuple[Part, ...], out: str) -> dict[str, Any]:
    """All parts in their order, within ``LIMIT`` seconds; each appends its own line to the file ``out``."""
    began, found = time.perf_counter(), dict[str, Any]()
    for part in parts:
        left = LIMIT - (time.perf_counter() - began)
        found[part.name] = _run(part, left, out)
    found["seconds"] = time.perf_counter() - began
    return found | _headline(found)


def _run(part: Part, limit: float, out: str) -> dict[str, Any]:
    """The part's result, or why there is none. Each try has the part's time, as far as ``limit`` seconds go."""
    ends = time.perf_counter() + limit
    result: dict[str, Any] = {"error": "no time was left"}
    for words in part.tries:
        left = min(part.seconds, ends - time.perf_counter())
        if left <= 0:
            break
        say(f"vapi bench {words}  (at most {left:.0f} s)")
        result = attempt([*words.split(), *(["--out", out] if out else [])], left)
        if "out of memory" not in result.get("error", ""):
            break
    return result


def attempt(words: list[str], limit: float) -> dict[str, Any]:
    """One benchmark in a process of its own: its result, or ``{"error": ...}``."""
    program = [sys.executable, "-m", "vapi", "bench", *words]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {limit:.0f} s"}
        finally:  # after Ctrl-C too, which does not reach a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the compiler's workers
    if process.returncode:
        lines = err.strip().splitlines()
        memory = [line for line in lines if "out of memory" in line.lower()]
        return {"error": f"out of memory: {memory[-1]}" if memory else (lines[-1] if lines else f"exit code {process.returncode}")}
    return json.loads(out.splitlines()[-1])


def _headline(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that are asked for first."""
    tune, sample, reward = found["tune"], found["sample"], found["reward"]
    names = ("seconds_per_step", "naive_seconds_per_step", "speedup", "transformer_flops_utilisation", "peak_memory_bytes")
    first = {name: tune[name] for name in names if name in tune}
    first |= {"samples_per_second": sample["images_per_second"]} if "images_per_second" in sample else {}
    return first | ({"rewarded_per_second": reward["images_per_second"]} if "images_per_second" in reward else {})
