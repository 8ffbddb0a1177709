"""Reading and writing weights: from a path or a hub, never executing anything, never by halves.

A checkpoint that does not match the network in every key and shape is refused, with the list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WRAPPERS = ("model", "module", "state_dict")


def locate(name: str | Path) -> Path:
    """A local file as it is, or ``org/name/file`` from the hub (downloaded once, then from its cache)."""
    path = Path(name)
    if path.is_file():
        return path
    parts = str(name).split("/")
    if path.is_absolute() or len(parts) < 3 or Path(parts[0]).exists():  # a path that leads nowhere, and no hub id
        raise ValueError(f"{name} is not here; the bundled weights come with: dvc pull data.dvc")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{name} is no local file; to take it from the hub: pip install huggingface_hub") from None
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as error:
        raise ValueError(f"{name} is no local file, and the hub did not give it: {error}") from error


def read(name: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint. Raises ValueError for a file that is none."""
    path = locate(name)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds more than weights, or is damaged; it is not executed ({error})") from None
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights (looked for a state dict, or one under {', '.join(WRAPPERS)})")
    return state, {}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def fill(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load every tensor of ``state`` into ``module``. Raises ValueError that lists what is missing,
    unexpected, or of another shape."""
    want, have = shapes(module.state_dict()), shapes(state)
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unexpected {name}" for name in have if name not in want]
    problems += [f"{n} is {have[n]}, not {want[n]}" for n in want if n in have and have[n] != want[n]]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{source} does not fit the network:\n  {shown}")
    module.load_state_dict(state)


def save(module: nn.Module, path: str | Path, metadata: dict[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write float32 weights (a module's, or ``tensors``) as safetensors, whole or not at all.

    Raises ValueError if they cannot be written (disk full).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or module.state_dict()).items()}
    try:
        save_file(state, temporary, metadata={"format": "pt", **metadata})
        with open(temporary, "r+b") as file:
            _sort_metadata(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}; make room and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sort_metadata(file: BinaryIO) -> None:
    """safetensors writes its metadata in another order each time; sorted, equal weights are equal files."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size, (len(text), size)
    file.seek(8)
    file.write(text.ljust(size))
