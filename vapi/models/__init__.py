"""What a base model owes the pipeline, and the table of those that pay.

A new base model is one file with a class of these methods and one line in ``POLICIES``; the tests in
``tests/test_policies.py`` run over the table. One that reads captions itself is named in ``config.READERS`` too; the packages
that serving it needs are named in ``register``, and ``vapi export`` (``cli``) writes it in its project's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor, nn

from vapi.config import READERS, TUNED, ModelConfig, nearest
from vapi.models import weights
from vapi.models.memory import Footprint
from vapi.models.sampler import Sampling


class Policy(Protocol):
    """An autoregressive generator of image codes (trainable) with its tokenizer (frozen).

    B images, T codes of an image (``num_codes``), V codebook (``vocab``).
    """

    image_size: int
    num_codes: int
    vocab: int
    num_classes: int  # 0: it draws from captions

    @property
    def generator(self) -> nn.Module: ...

    @property
    def tokenizer(self) -> nn.Module: ...

    @property
    def blocks(self) -> list[nn.Module]:
        """The generator's repeated layers, in order: the units of sharding, compilation and checkpointing."""

    @property
    def device(self) -> torch.device: ...

    def condition(self, what: Sequence[int] | Sequence[str] | Tensor) -> Tensor:
        """What is drawn (class ids, or captions in words or as cached features) -> what ``logits`` and ``generate`` take."""

    def cut(self, captions: Sequence[str]) -> int:
        """How many of these captions are read at their beginning alone. Raises ValueError for one that cannot be read."""

    def logits(self, condition: Tensor, context: Tensor) -> Tensor:
        """Codes (B, T) -> (B, T, V); ``logits[:, t]`` depends on ``context[:, :t]`` only."""

    def features(self, condition: Tensor, context: Tensor) -> Tensor:
        """The first half of ``logits``: (B, T, D)."""

    def predict(self, features: Tensor) -> Tensor:
        """The second half, position by position: (..., D) -> (..., V)."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, T)."""

    def decode(self, codes: Tensor) -> Tensor:
        """(B, T) -> (B, 3, H, W), not clamped."""

    @property
    def codebook(self) -> Tensor:
        """The vectors that codes stand for, (V, K), as they are decoded."""

    def paint(self, vectors: Tensor) -> Tensor:
        """``decode`` of vectors (B, T, K), the codebook's or between them: what a gradient passes through."""

    def generate(self, condition: Tensor, seeds: Sequence[int], images_per_batch: int = 0, **how: Unpack[Sampling]) -> Tensor:
        """Free-running codes (B, T); image n depends on seed n alone. In batches of exactly ``images_per_batch``; 0: all at once."""

    def footprint(self, guided: bool = False) -> Footprint:
        """Bytes that sampling takes, with or without guidance, under the caller's autocast."""

    def save(self, path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the generator's weights; ``tensors``, if they are not at hand in the module (sharded)."""


def _llamagen() -> ModuleType:
    from vapi.models import llamagen

    return llamagen


def _janus() -> ModuleType:
    from vapi.models import janus

    return janus


# name -> the module, with ``load`` and ``load_tokenizer``, and of config.READERS with ``require_readable``; imported when named, so
# that one model's dependencies are not another's.
POLICIES: dict[str, Callable[[], ModuleType]] = {
    "llamagen": _llamagen,
    "janus": _janus,
}


def device_of(model: ModelConfig) -> torch.device:
    """The device that ``model.device`` means here. Raises ValueError for a GPU that is not there."""
    name = model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"model.device is {model.device}, but no GPU is visible; use cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"model.device is {model.device!r}; use auto, cpu or cuda") from None


def device_name(device: torch.device) -> str:
    """What seconds were spent on: the card's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic that ``model.precision`` names, for forward passes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _module(model: ModelConfig) -> ModuleType:
    if model.policy not in POLICIES:
        raise ValueError(f"model.policy is {model.policy!r}; {nearest(model.policy, POLICIES)}")
    return POLICIES[model.policy]()


def require_readable(model: ModelConfig, captions: Sequence[str]) -> None:
    """Raises ValueError for captions that a policy which reads them itself cannot read, and for files of it that do not belong
    together, before any weights are on a device. What others read, their text encoder sees to."""
    if model.policy in READERS:
        _module(model).require_readable(model, captions)


def load(model: ModelConfig, generator: str | Path = "") -> Policy:
    """The base model, or the same with other generator weights (a tuned checkpoint)."""
    policy: Policy = _module(model).load(model, generator or model.generator, device_of(model))
    return policy


@dataclass(frozen=True)
class Networks:
    """A base, or what was tuned of it: which generator draws, and which tokenizer paints."""

    model: ModelConfig
    generator: Path
    changed: Path  # the file that tells it from the base

    @classmethod
    def base(cls, model: ModelConfig) -> Networks:
        path = weights.locate(model.generator)
        return cls(model, path, path)

    @classmethod
    def tuned(cls, model: ModelConfig, folder: Path) -> Networks:
        """Of the stage tune's output. Raises ValueError if there are no weights in it."""
        generator, tokenizer = (Path(folder) / name for name in TUNED.values())
        if tokenizer.is_file():
            return cls(replace(model, tokenizer=str(tokenizer)), weights.locate(model.generator), tokenizer)
        if not generator.is_file():
            raise ValueError(f"{generator} is not here; make it with: vapi tune")
        return cls(model, generator, generator)

    def load(self) -> Policy:
        return load(self.model, self.generator)


def load_tokenizer(model: ModelConfig) -> Any:
    """The frozen tokenizer alone: ``encode``, ``decode``, ``vocab``."""
    return _module(model).load_tokenizer(model, device_of(model))
