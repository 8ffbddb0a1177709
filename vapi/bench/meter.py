"""Seconds, bytes and operations: what a measurement is made of.

Shapes: none; work is a function without arguments.
"""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
Work = Callable[[], object]


@dataclass(frozen=True)
class Peak:
    """What a device can do at most, and how that is known."""

    flops: float  # operations per second in the precision asked for
    bandwidth: float  # bytes per second to and from memory
    source: str


# name on the card -> dense bfloat16 and float32 (no tensor cores, torch's default) operations and bytes per second:
# NVIDIA's data sheets. The first name that occurs as a word counts.
CARDS = {
    "H200": (989e12, 67e12, 4.8e12),
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100 NVL": (835e12, 60e12, 3.9e12),
    "H100": (989e12, 67e12, 3.35e12),
    "A100 80GB PCIe": (312e12, 19.5e12, 1.935e12),
    "A100-SXM4-80GB": (312e12, 19.5e12, 2.039e12),
    "A100": (312e12, 19.5e12, 1.555e12),
    "L40S": (362e12, 91.6e12, 0.864e12),
    "L4": (121e12, 30.3e12, 0.3e12),
    "A10": (125e12, 31.2e12, 0.6e12),
}
PROBE = 1024  # side of the matrices that show what an unknown device can do
PROBE_BYTES = 1 << 26


def machine() -> dict[str, Any]:
    """What the figures were taken on, without names of its own."""
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "cpu": _cpu()}
    if torch.cuda.is_available():  # float32 there may mean TF32: torch's default for convolutions, not for products
        found |= {"gpu": torch.cuda.get_device_name(), "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    return {**found, "torch": torch.__version__}


def _cpu() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def synchronise(device: torch.device) -> None:
    """Wait for what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Work) -> float:
    """How long ``work`` takes."""
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def take_turns(device: torch.device, ways: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each way, all of them once per round; one unmeasured round first."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, work in ways.items():
            took = seconds(device, work)
            if turn:
                found[name].append(took)
    return {name: statistics.median(times) for name, times in found.items()}


class Stopwatch:
    """``with watch("forward"): ...`` adds up seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        begin = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def shares(self) -> dict[str, float]:
        """Each name's part of the whole."""
        total = sum(self.seconds.values())
        return {name: took / total for name, took in self.seconds.items()}


# --- memory ------------------------------------------------------------------------------------


def peak_memory(device: torch.device, work: Work) -> int:
    """The most bytes that were taken while ``work`` ran, with what was there before: of the GPU, or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # where it may not be reset, the peak is that of the process's whole life
        Path("/proc/self/clear_refs").write_text("5")
    work()
    return _resident_peak()


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- operations --------------------------------------------------------------------------------


def flops(work: Work) -> int:
    """Operations of matrix products, convolutions and attention in ``work``: two per multiply and add; causal attention counts whole."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def weightless(thing: T, tensors: Iterator[Tensor]) -> T:
    """A copy of something that holds ``tensors``, with shapes in their place (device meta): counting needs no more."""
    memo: dict[int, Any] = {}
    for tensor in tensors:
        shape = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(thing, memo)


def peak(device: torch.device, precision: str) -> Peak:
    """The device's limits: from the table of cards, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, (low, full, bandwidth) in CARDS.items():
            if re.search(rf"\b{card}\b", name):
                return Peak(low if precision == "bfloat16" else full, bandwidth, f"data sheet of {card}")
    return _probe(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)


def _probe(device: torch.device, dtype: torch.dtype) -> Peak:
    a = torch.ones(PROBE, PROBE, device=device, dtype=dtype)
    out = torch.empty_like(a)
    product = min(seconds(device, lambda: torch.mm(a, a, out=out)) for _ in range(6))
    x = torch.ones(PROBE_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copied = min(seconds(device, lambda: y.copy_(x)) for _ in range(6))
    return Peak(2 * PROBE**3 / product, 2 * PROBE_BYTES / copied, f"measured: a product of {PROBE} x {PROBE} matrices, a copy in memory")
