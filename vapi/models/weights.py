"""Reading and writing weights: from a path or a hub, never executing anything, never by halves.

What a file is follows from its content, not from its name: safetensors, or one of torch's checkpoints,
in which the weights stand alone (as FSDP consolidates them) or under one of ``WRAPPERS`` beside optimizer,
steps and arguments. The names that DDP, FSDP, activation checkpointing and ``torch.compile`` put in front
of a parameter's own are taken away, half precision becomes float32. The file is mapped into memory, so that
reading costs one copy of the weights and a network need not be initialised first (device meta).

Where a file holds averaged weights (``ema``) beside others, the others are taken: LlamaGen's scripts that
extract codes, train and sample all read ``model``; only its demo of the tokenizer prefers ``ema``.

A checkpoint that does not match the network in every key and shape is refused, with the list.

Left out: checkpoints in several files (sharded FSDP, DeepSpeed's ZeRO); both ship with scripts that join them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WRAPPERS = ("model", "module", "state_dict", "ema")  # in this order: LlamaGen's DDP, DeepSpeed, others; averages if nothing else
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of names that training adds
NO_HUB = "{} is no local file; to take it from the hub: pip install huggingface_hub"
WHOLE_MODEL = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")  # of a hub's repository that is one model
ARGUMENT = "args."  # metadata of this name is an argument of the script that made the checkpoint


def locate(name: str | Path) -> Path:
    """A local file or folder as it is, or ``org/name/file`` or all of ``org/name`` from the hub (downloaded once, then from its
    cache)."""
    path = Path(name)
    if path.exists():
        return path
    return _fetched(str(name))


@functools.cache  # a process that asks twice gets the same commit
def _fetched(name: str) -> Path:
    parts = _hub_parts(name)
    try:
        return _take(parts)
    except ImportError:
        raise ValueError(NO_HUB.format(name)) from None
    except Exception as error:
        raise ValueError(f"{name} is no local file, and the hub did not give it: {error}") from error


def _take(parts: list[str], local_files_only: bool = False) -> Path:
    """A file or a whole model of the hub, in the hub's cache. Raises one of the hub's errors if it cannot be had."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if len(parts) == 2:
        return Path(snapshot_download("/".join(parts), allow_patterns=[*WHOLE_MODEL], local_files_only=local_files_only))
    return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), local_files_only=local_files_only))


def _hub_parts(name: str | Path) -> list[str]:
    """``org/name/file`` or ``org/name`` in its parts. Raises ValueError for a path that leads nowhere and is no hub id."""
    parts = str(name).split("/")
    file = len(parts) == 2 and Path(parts[1]).suffix in (".safetensors", ".pt", ".pth", ".bin")
    if Path(name).is_absolute() or len(parts) < 2 or file or Path(parts[0]).exists():
        raise ValueError(
            f"{name} is not here" + ("; the bundled weights come with: dvc pull data.dvc" if "data/models/" in str(name) else "")
        )
    return parts


def size(name: str | Path) -> int:
    """Bytes of a local file or folder, or of one on the hub, which is not fetched for it, and not asked for what its cache holds whole.
    Raises ValueError if it cannot be reached."""
    path = Path(name)
    if path.exists():
        return path.stat().st_size if path.is_file() else sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    parts = _hub_parts(name)
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        from huggingface_hub import HfApi, errors, get_hf_file_metadata, hf_hub_url

        with contextlib.suppress(errors.LocalEntryNotFoundError):
            return size(_take(parts, local_files_only=True))
        if not file:
            files = HfApi().model_info(repository, files_metadata=True, timeout=10).siblings or []
            return sum(one.size or 0 for one in files if any(fnmatch(one.rfilename, pattern) for pattern in WHOLE_MODEL))
        return int(get_hf_file_metadata(hf_hub_url(repository, file), timeout=10).size or 0)
    except ImportError:
        raise ValueError(NO_HUB.format(name)) from None
    except Exception as error:
        raise ValueError(f"{name} is no local file, and the hub does not show it: {error}") from error


def read(name: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint, mapped from the file: for ``fill``, which copies them.

    Metadata is safetensors' own, or the arguments that LlamaGen's training stores, as ``args.image_size`` and
    the like. Raises ValueError for a file that is no checkpoint, not whole, or holds anything but data.
    """
    path = locate(name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file of weights in it")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # eight bytes of length, then JSON
        return _read_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not a whole checkpoint (its end is missing); fetch it again")
        return _read_torch(path, mmap=True)
    if start[:1] == b"\x80":  # a pickle, as torch wrote them before version 1.6
        return _read_torch(path, mmap=False)
    raise ValueError(f"{path} is no checkpoint: it is neither safetensors nor torch's, and begins with {start!r}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return _plain({key: file.get_tensor(key) for key in file.keys()}, path), file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None


def _read_torch(path: Path, mmap: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen keeps its arguments in one: plain values
            if mmap and path.suffix != ".safetensors":  # torch believes that name, and maps a file only by its name
                whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                with open(path, "rb") as file:
                    whole = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds more than weights, or is damaged; it is not executed ({error})") from None
    state, arguments = whole, whole.get("args") if isinstance(whole, dict) else None
    while isinstance(state, dict) and (inner := [state[w] for w in WRAPPERS if isinstance(state.get(w), dict)]):
        state = inner[0]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no weights (looked for a state dict, or one under {', '.join(WRAPPERS)})")
    named = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return _plain(state, path), {f"{ARGUMENT}{key}": str(value) for key, value in named.items()}


def _plain(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Under the names that the parameters have in their own network."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPED): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise ValueError(f"{path} holds {len(state) - len(plain)} of its weights twice, under names that differ in {', '.join(WRAPPED)}")
    return plain


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def require(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raises ValueError that lists what is missing, unexpected, or of another shape."""
    own = module.state_dict()
    want, have = shapes(own), shapes(state)
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unexpected {name}" for name in have if name not in want]
    problems += [f"{n} is {have[n]}, not {want[n]}" for n in want if n in have and have[n] != want[n]]
    both = [n for n in want if n in have]
    problems += [f"{n} holds {state[n].dtype}" for n in both if state[n].is_floating_point() != own[n].is_floating_point()]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{source} does not fit the network:\n  {shown}")


def fill(module: nn.Module, state: dict[str, Tensor], source: str | Path, device: torch.device | str = "cpu") -> None:
    """Give ``module`` (which may be on device meta) a copy of every tensor of ``state``, in the precision of its own,
    on ``device``. Raises ValueError that lists what is missing, unexpected, or of another shape."""
    require(module, state, source)
    own = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    copies = {name: state[name].detach().to(device, dtype, copy=True) for name, dtype in own.items()}
    module.load_state_dict(copies, assign=True)
    module.to(device)  # what no checkpoint holds: tables that are computed


def save(module: nn.Module, path: str | Path, metadata: dict[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write float32 weights (a module's, or ``tensors``) as safetensors, whole or not at all.

    Raises ValueError if they cannot be written (disk full).
    """
    save_tensors(tensors or module.state_dict(), path, metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write tensors as safetensors, whole or not at all. Raises ValueError if they cannot be written (disk full)."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _whole(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", **metadata})
        with open(temporary, "r+b") as file:
            _sort_metadata(file)


def save_torch(state: Mapping[str, Any], path: str | Path) -> None:
    """Write tensors and plain values as torch's checkpoint, whole or not at all. Raises ValueError if they cannot be written."""
    with _whole(path) as temporary:
        torch.save(dict(state), temporary)


@contextlib.contextmanager
def _whole(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` once what was written is on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch wraps a full disk in RuntimeError
        raise ValueError(f"cannot write {path}: {error}; make room and run the same command again") from error
    finally:
        if temporary.parent.is_dir():
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
