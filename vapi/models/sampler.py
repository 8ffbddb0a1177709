"""Free-running sampling with a KV cache, for evaluation only: VA-pi never rolls out while tuning.

Randomness belongs to the image, not to the process: image n uses one uniform number per code, drawn
from seed n, and takes the code at which the cumulative probability passes it. Which images share a
batch, and how many processes share the work, changes nothing. A matrix product of another shape may
round its last bit otherwise, so batches have one shape: the last one is filled up, and images at the
same place of the same shape are the same to the bit, on any number of GPUs. Between two shapes a code
can differ only where its uniform number falls between two roundings of the cumulative probability:
next to never in float32, now and then in bfloat16, after which the rest of that image goes another way.

``generate`` is the plain loop, which attends to the filled part of the cache and to nothing beyond.
``graphs.py`` is the same loop as a CUDA graph; ``stream`` has the decoder work beside either.

Left out: beam search; speculative drafts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from vapi.models import memory

if TYPE_CHECKING:
    from vapi.models import Policy


T = TypeVar("T")
R = TypeVar("R")
Batch = tuple[Tensor, Sequence[int]]  # condition and seeds


class Network(Protocol):
    """What sampling asks of a generator, a module that its ``config`` alone can make anew.

    B rows, S positions of a condition, T codes, V codebook, D width.
    """

    @property
    def config(self) -> Any:
        """With codes: T, and prefix."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    @property
    def output(self) -> nn.Linear:
        """The layer that predicts: its weights' type and device are the network's."""

    def front(self, condition: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """What stands before the first code, (B, S, D), or (2 B, S, D) with nothing as the condition of the second half; and where
        padding ends in each row, if there may be some."""

    def new_cache(self, rows: int, prefix: int) -> Tensor:
        """Room for what attention keeps of S + T - 1 positions."""

    def prefill(self, condition: Tensor, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Logits (B, V) of the first code."""

    def step(self, codes: Tensor, position: int, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Logits (B, V) of code ``position``, from the codes (B,) before it; in order."""

    # --- a step in its parts, for the recorded loop (graphs.py) ---

    @property
    def padded(self) -> bool:
        """Whether there may be padding in front of a condition."""

    def positions(self, condition: Tensor) -> int:
        """S of a condition. ``config.prefix`` of them are recorded at least."""

    @property
    def layers(self) -> nn.ModuleList: ...

    def embed(self, codes: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""

    def table(self, at: Tensor, starts: Tensor) -> Any:
        """What ``before`` needs to know of the position ``at`` (1,)."""

    @staticmethod
    def before(layer: Any, x: Tensor, table: Any, /) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, 1, D), each (B, H, 1, E)."""

    @staticmethod
    def after(layer: Any, x: Tensor, y: Tensor, /) -> Tensor:
        """A layer's output, from its input x (B, 1, D) and what attention found there, y (B, H, 1, E)."""

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, V) of what the last layer says (B, D)."""


N = TypeVar("N", bound=Network)


class Sampling(TypedDict, total=False):
    """How codes are drawn from predictions; what is left out is as in ``generate``."""

    temperature: float
    top_k: int
    top_p: float
    guidance: float
    guidance_schedule: Literal["constant", "power-cosine"]
    guidance_power: float


# --- from predictions to codes -----------------------------------------------------------------


def image_seed(seed: int, number: int) -> int:
    """The random seed of image ``number``: its own for every image of a seed, and far from those of other seeds.

    32 bits, because that is all torch's CPU generator uses; seeds lie multiples of the golden ratio apart.
    """
    return (number + seed * 2654435769) % 2**32


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """One row of ``count`` numbers in [0, 1) for each seed: (B, count), float64."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(int(seed)), dtype=torch.float64) for seed in seeds])


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the likeliest codes of (B, V) to -inf: the ``top_k`` best (0: all), then the smallest
    set that holds probability ``top_p`` (1.0: all)."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: probabilities (B, V) and one uniform number each (B,) to codes (B,)."""
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def guide(logits: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance: conditional rows above, unconditional rows below. The float 1.0 says that there are
    none below; a tensor that holds 1 gives the conditional rows to the bit."""
    if isinstance(guidance, float) and guidance == 1.0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return conditional + (guidance - 1) * (conditional - unconditional)


def guidance_scales(guidance: float, schedule: str, power: float, codes: int) -> Tensor:
    """Guidance at every code: (T,), float32.

    ``power-cosine`` is the released VA-pi sampler's (LlamaGen/autoregressive/models/generate.py, decode_n_tokens): the
    first code has all of it, the i-th after it 1 + (guidance - 1) (1 - cos(pi (i / (T - 1)) ** power)) / 2, from i = 0.
    """
    if schedule == "constant":
        return torch.full((codes,), guidance)
    assert schedule == "power-cosine", schedule
    turns = [math.pi * (i / (codes - 1)) ** power for i in range(codes - 1)]
    return torch.tensor([guidance, *(1 + (guidance - 1) * (1 - math.cos(turn)) / 2 for turn in turns)])


def choose(logits: Tensor, uniform: Tensor, temperature: float | Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) and one uniform number each (B,) to codes (B,)."""
    return pick(keep_likely(logits / temperature, top_k, top_p).softmax(dim=-1), uniform)


# --- the loop ----------------------------------------------------------------------------------


def number_type(model: Network) -> torch.dtype:
    """What sampling computes in: the caller's autocast, if it is on, else the weights' own."""
    kind = model.output.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.output.weight.dtype


def lowered(model: N, dtype: torch.dtype) -> N:
    """The model with weights of ``dtype``: cast once, where autocast would do it at every step. Norms and residual
    stream are of that type too, rotary positions are not: so upstream samples. Shares what needs no cast."""
    if dtype == model.output.weight.dtype:
        return model
    assert isinstance(model, nn.Module)
    with torch.device("meta"):
        twin = type(model)(model.config)
    for name, weight in model.named_parameters():
        place, _, last = name.rpartition(".")
        setattr(twin.get_submodule(place), last, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
    for name, constant in model.named_buffers():
        place, _, last = name.rpartition(".")
        setattr(twin.get_submodule(place), last, constant)
    return twin.eval()


@torch.no_grad()
def generate(
    model: Network,
    condition: Tensor,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    guidance_schedule: str = "constant",
    guidance_power: float = 2.0,
) -> Tensor:
    """Draw codes (B, T) for a condition (class ids (B,) or captions (B, S, C + 1)), one seed each, all in one batch.

    ``top_k`` 0, ``top_p`` 1 and ``guidance`` 1 leave the predictions as they are.
    """
    assert len(seeds) == len(condition), (len(seeds), len(condition))
    guided, count = guidance != 1.0, model.config.codes
    model, device = lowered(model, number_type(model)), condition.device
    with torch.autocast(device.type, enabled=False):
        scales = guidance_scales(guidance, guidance_schedule, guidance_power, count).to(device)
        numbers = uniforms(seeds, count).to(device)
        embedded, starts = model.front(condition, guided)
        cache = model.new_cache(*embedded.shape[:2])
        codes = torch.empty(len(condition), count, dtype=torch.long, device=device)
        logits = model.prefill(embedded, cache, starts)
        for position in range(count):
            if position > 0:
                last = codes[:, position - 1]
                logits = model.step(torch.cat([last, last]) if guided else last, position, cache, starts)
            logits = guide(logits, scales[position] if guided else 1.0)
            codes[:, position] = choose(logits, numbers[:, position], temperature, top_k, top_p)
    return codes


def filled_up(condition: Tensor, seeds: Sequence[int], rows: int) -> Iterator[tuple[Tensor, list[int], int]]:
    """Batches of exactly ``rows``: condition, seeds, and how many of them count. The last image stands in for those missing."""
    for start in range(0, len(seeds), rows):
        places = [min(n, len(seeds) - 1) for n in range(start, start + rows)]
        yield condition[places], [seeds[n] for n in places], min(rows, len(seeds) - start)


# --- images ------------------------------------------------------------------------------------


def decode(policy: Policy, codes: Tensor) -> Tensor:
    """Codes (B, T) to images (B, 3, H, W), as many at a time as memory suggests: at full resolution an image takes
    hundreds of times the room of its codes."""
    at_once = memory.images_per_decode(policy.footprint(), policy.device)
    return torch.cat([policy.decode(part) for part in codes.split(at_once)])


def encode(policy: Policy, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) to codes (B, T), as many at a time as are decoded."""
    at_once = memory.images_per_decode(policy.footprint(), policy.device)
    return torch.cat([policy.encode(part) for part in images.split(at_once)])


def stream(
    policy: Policy,
    batches: Iterable[Batch],
    images_per_batch: int,
    arithmetic: contextlib.AbstractContextManager[object],
    **how: Unpack[Sampling],
) -> Iterator[Tensor]:
    """Images (B, 3, H, W) of each batch (condition, seeds) in order, as they come; codes are drawn within ``arithmetic``.

    On a GPU the next batch is sampled, on a stream of its own, while this one is decoded and looked at: sampling leaves
    most of its arithmetic idle. On a CPU both wait for the same cores, and take turns.
    """

    def sample(batch: Batch) -> Tensor:
        with arithmetic:
            return policy.generate(*batch, images_per_batch=images_per_batch, **how)

    drawn = map(sample, batches) if policy.device.type == "cpu" else _beside(sample, batches, policy.device)
    yield from (decode(policy, codes) for codes in drawn)


def _beside(sample: Callable[[Batch], Tensor], batches: Iterable[Batch], device: torch.device) -> Iterator[Tensor]:
    """Codes of each batch, drawn by a thread on a stream of its own, one batch ahead.

    Either stream waits for what it needs of the other and for no more: sampling for its condition, the reader for these codes.
    """
    reader, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def draw(given: tuple[Batch, torch.cuda.Event]) -> tuple[Tensor, torch.cuda.Event]:
        (condition, seeds), made = given
        with torch.cuda.stream(side):
            side.wait_event(made)
            condition.record_stream(side)
            return sample((condition, seeds)), side.record_event()

    for codes, ready in ahead(draw, ((batch, reader.record_event()) for batch in batches)):
        reader.wait_event(ready)
        codes.record_stream(reader)
        yield codes


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``map`` with a thread that is one item further than its reader."""
    with ThreadPoolExecutor(1) as beside:
        waiting: Future[R] | None = None
        for item in items:
            done, waiting = waiting, beside.submit(function, item)
            if done is not None:
                yield done.result()
        if waiting is not None:
            yield waiting.result()
