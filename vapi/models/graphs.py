"""The sampling loop for a GPU: one step, recorded once as a CUDA graph, replayed for every code.

A step of a large generator is some hundred small kernels, and Python would take longer to launch them
than the GPU to run them. So every tensor that a step touches lies in a fixed place (weights, cache,
codes, uniform numbers, the position itself), the step moves its own position on, and the CPU says "again".

What lies between two matrix products (norms, rotary positions, gates, residuals) is compiled, once for
all layers; attention is a kernel of ours (``kernels.py``), which reads the filled part of the cache alone.
What bounds a step is then memory: weights once, and the cache so far.

Without Triton or a C compiler, which Triton needs, sampling goes without all this (``missing``).
Conditions that are shorter than the loop's have more padding in front. Left out: a pool of loops (the last one is kept).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from vapi.models import sampler
from vapi.models.sampler import Network, Sampling

if TYPE_CHECKING:
    from torch.cuda import Stream

WARM_UP = 3  # runs before recording: they compile, and let libraries take their workspaces


@dataclass(frozen=True)
class Shape:
    """What a recorded loop cannot change: temperature, guidance and its schedule it can."""

    rows: int
    guided: bool
    top_k: int
    top_p: float
    dtype: torch.dtype
    weights: tuple[int, ...]  # addresses: a loop is of no use for weights that moved
    prefix: int  # positions of a condition; there is room for shorter ones

    @classmethod
    def of(cls, model: Network, condition: Tensor, guidance: float, top_k: int, top_p: float) -> Shape:
        places = tuple(weight.data_ptr() for weight in model.parameters())
        prefix = max(model.positions(condition), model.config.prefix)
        return cls(len(condition), guidance != 1.0, top_k, top_p, sampler.number_type(model), places, prefix)

    def holds(self, other: Shape) -> bool:
        """Whether a loop of this shape serves for the other."""
        return self.prefix >= other.prefix and self == replace(other, prefix=self.prefix)


def missing() -> str:
    """What a GPU's machine lacks for this, in words; "" if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler, and there is none (gcc or clang, or name one in CC)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Triton needs Python's headers, and there are none (Debian: apt-get install python3-dev)"
    return ""


@functools.cache
def _compiled(kind: Any) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """What comes before and after attention in a block; one compilation serves all layers.

    Not ``fullgraph``: a process that goes through more shapes than torch likes to compile is to be slow, not to fail.
    """
    fuse = functools.partial(torch.compile, dynamic=False)
    return fuse(kind.before), fuse(kind.after)


class Loop:
    """Sampling in one shape. On a CPU, where nothing is recorded, the same steps run one by one: for tests."""

    def __init__(self, model: Network, shape: Shape) -> None:
        from vapi.models import kernels  # needs Triton

        self.attend = kernels.attend
        self.model, self.shape = model, shape
        device, count = model.output.weight.device, model.config.codes
        rows = shape.rows * (2 if shape.guided else 1)
        with torch.inference_mode(False), torch.no_grad():
            self.twin = sampler.lowered(model, shape.dtype)
            self.cache = self.twin.new_cache(rows, shape.prefix)
            self.front_embeddings = self.cache.new_zeros(rows, shape.prefix, model.config.dim)
            self.starts = torch.zeros(rows, dtype=torch.long, device=device)  # where padding ends
            self.codes = torch.zeros(shape.rows, count, dtype=torch.long, device=device)
            self.numbers = torch.zeros(shape.rows, count, dtype=torch.float64, device=device)
            self.scales = torch.ones(count, device=device)
            self.temperature = torch.ones((), device=device)
            self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the code that comes next
            self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            self.front, self.step = (self._recorded(part, self.stream) for part in (self._front, self._step))

    def _recorded(self, part: Callable[[], None], stream: Stream | None) -> Callable[[], None]:
        if stream is None:
            return part
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream), torch.autocast("cuda", enabled=False):
            for _ in range(WARM_UP):
                self.position.fill_(1)
                part()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads may go on with their work
                part()
        return graph.replay

    def _front(self) -> None:
        """The first code, from the condition."""
        starts = self.starts if self.twin.padded else None  # without a mask attention is faster
        self._choose(self.twin.prefill(self.front_embeddings, self.cache, starts), 0 * self.position)

    def _step(self) -> None:
        """The code at ``position``, from those before it; then one further."""
        before, after = _compiled(type(self.twin))
        last = self.codes.index_select(1, self.position - 1)  # (B, 1)
        x = self.twin.embed(torch.cat([last, last]) if self.shape.guided else last)
        at = self.position + (self.shape.prefix - 1)
        table = self.twin.table(at, self.starts)
        for layer, cache in zip(self.twin.layers, self.cache, strict=True):
            q, k, v = before(layer, x, table)
            x = after(layer, x, self.attend(q, k, v, cache, at, self.starts))
        self._choose(self.twin.predict(x[:, 0]), self.position)
        self.position.add_(1)

    def _choose(self, logits: Tensor, position: Tensor) -> None:
        if self.shape.guided:
            logits = sampler.guide(logits, self.scales.index_select(0, position))
        number = self.numbers.index_select(1, position).squeeze(1)
        # not compiled: where a codebook has 16,384 codes, torch 2.11 fails to compile a running sum over it
        codes = sampler.choose(logits, number, self.temperature, self.shape.top_k, self.shape.top_p)
        self.codes.index_copy_(1, position, codes.unsqueeze(1))

    def run(self, condition: Tensor, seeds: Sequence[int], temperature: float, scales: Tensor) -> Tensor:
        """Codes (B, T) of exactly as many images as the loop has rows."""
        assert len(condition) == len(seeds) == self.shape.rows, (len(condition), len(seeds), self.shape.rows)
        device = self.codes.device
        caller = torch.cuda.current_stream(device) if self.stream else None
        if self.stream and caller:
            self.stream.wait_stream(caller)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self.stream), torch.autocast(device.type, enabled=False):
            if self.twin is not self.model:  # a few milliseconds, and the copy is never behind
                pairs = [*zip(self.twin.parameters(), self.model.parameters(), strict=True)]
                torch._foreach_copy_([ours for ours, _ in pairs], [theirs.detach() for _, theirs in pairs])
            embedded, starts = self.twin.front(condition, self.shape.guided)
            before = self.shape.prefix - embedded.shape[1]  # more padding
            self.front_embeddings[:, :before] = 0
            self.front_embeddings[:, before:] = embedded
            if starts is not None:
                self.starts.copy_(starts + before)
            self.numbers.copy_(sampler.uniforms(seeds, self.codes.shape[1]))
            self.temperature.fill_(temperature)
            self.scales.copy_(scales)
            self.front()
            self.position.fill_(1)
            for _ in range(1, self.codes.shape[1]):
                self.step()
            codes = self.codes.clone()
        if self.stream and caller:
            caller.wait_stream(self.stream)
            codes.record_stream(caller)
        return codes


class Loops:
    """The loop that was used last: recording takes a minute, and holds a batch's memory."""

    def __init__(self) -> None:
        self.last: Loop | None = None

    def sample(self, model: Network, condition: Tensor, seeds: Sequence[int], **how: Unpack[Sampling]) -> Tensor:
        """As ``sampler.generate``: on a GPU, if this machine can, with a recorded loop."""
        if condition.device.type != "cuda":
            return sampler.generate(model, condition, seeds, **how)
        if lacking := missing():
            warnings.warn(f"sampling goes step by step, several times slower: {lacking}", stacklevel=2)
            return sampler.generate(model, condition, seeds, **how)
        return self.generate(model, condition, seeds, **how)

    def generate(self, model: Network, condition: Tensor, seeds: Sequence[int], **how: Unpack[Sampling]) -> Tensor:
        """As ``sampler.generate``, with a recorded loop of this many rows."""
        guidance = how.get("guidance", 1.0)
        shape = Shape.of(model, condition, guidance, how.get("top_k", 0), how.get("top_p", 1.0))
        if self.last is None or not self.last.shape.holds(shape):
            self.last = None  # its memory first
            self.last = Loop(model, shape)
        schedule = how.get("guidance_schedule", "constant")
        scales = sampler.guidance_scales(guidance, schedule, how.get("guidance_power", 2.0), model.config.codes)
        return self.last.run(condition, seeds, how.get("temperature", 1.0), scales)
