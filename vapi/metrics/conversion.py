"""Another project's checkpoint to a folder for transformers (``pretrained.load``): every weight once, by a list of rules.

A rule says what a weight is called there, under which names it is kept here, and what becomes of its numbers on the way. What a
rule misses and what no rule takes is refused, with the list. A checkpoint is read as weights alone, and never executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vapi.metrics import pretrained
from vapi.metrics.features import sha256

MARKER = "converted.json"
"""What a folder was converted from."""
Rule = tuple[str, Sequence[str], Callable[[Tensor], Sequence[Tensor]]]
"""Their name, ours, and how the one becomes the others."""


def read_checkpoint(source: Path, hint: str) -> dict[str, Tensor]:
    """A state dict, or one under ``state_dict``. Raises ValueError for anything else; ``hint``: which file it should be."""
    if not source.is_file():
        raise ValueError(f"{source} is not here; {hint}")
    try:
        whole = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{source} holds more than weights, or is damaged; it is not executed ({error})") from None
    state = whole.get("state_dict", whole) if isinstance(whole, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{source} holds no weights (looked for a state dict, or one under state_dict)")
    return dict(state)


def translate(state: Mapping[str, Tensor], rules: Iterable[Rule], complaint: str) -> dict[str, Tensor]:
    """Weights under the names of transformers' files. Raises ValueError, ``complaint`` and a list, for keys left over or missing."""
    rest, made, problems = dict(state), dict[str, Tensor](), []
    for theirs, ours, change in rules:
        if theirs in rest:
            made |= dict(zip(ours, change(rest.pop(theirs))))
        else:
            problems.append(f"missing {theirs}")
    problems += [f"unexpected {name}" for name in rest]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{complaint}:\n  {shown}")
    return made


def write(folder: Path, source: Path, config: Any, tensors: Mapping[str, Tensor], network: Any, files: Iterable[Path] = ()) -> None:
    """A new folder, whole or not at all, that fits transformers' class ``network`` in every key and shape; ``files`` go with it.
    Raises ValueError where it does not fit or cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / pretrained.WEIGHTS, metadata={"format": "pt"})
        for file in files:
            shutil.copy(file, partial)
        pretrained.load(network, partial, "cpu")
        marker = {"source": source.name, "source_sha256": sha256(source), "weights_sha256": sha256(partial / pretrained.WEIGHTS)}
        (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Raises ValueError for a folder that is there already."""
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a new folder")


def source_of(folder: Path, weights: str) -> str:
    """sha256 of the checkpoint that these very weights were converted from, or empty."""
    if not (folder / MARKER).is_file():
        return ""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return str(marker.get("source_sha256", "")) if marker.get("weights_sha256") == weights else ""


# --- rules -------------------------------------------------------------------------------------


def count(state: Mapping[str, Tensor], name: str) -> int:
    """How many layers there are: the first number for which ``name`` is no key."""
    number = 0
    while name.format(number) in state:
        number += 1
    return number


def both(theirs: str, ours: str) -> Iterator[Rule]:
    """Weight and bias, as they are."""
    yield from ((f"{theirs}.{kind}", [f"{ours}.{kind}"], same) for kind in ("weight", "bias"))


def attention(theirs: str, ours: Sequence[str]) -> Iterator[Rule]:
    """Weight and bias of queries, keys and values: one there (``theirs`` with the kind filled in), three here."""
    for kind in ("weight", "bias"):
        yield theirs.format(kind), [f"{name}.{kind}" for name in ours], thirds


def same(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def thirds(tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(3))


def turned(tensor: Tensor) -> list[Tensor]:
    """A matrix that stands on the right there."""
    return [tensor.T]
