"""Networks as Hugging Face keeps them: a folder with config.json and model.safetensors, local or on the hub.

Nothing is executed, nothing is fetched where the folder is local or already in the hub's cache, and a folder that does not
fill its network in every key and shape is refused, with the list: transformers itself fills a gap with random numbers.
Left out: pytorch_model.bin (a pickle) and weights in several files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"
UNUSED = ("relative_position_index", "position_ids", ".swin.layernorm.")  # tables that are computed; a norm behind the last map


def require_transformers(setting: str, extra: str = "geneval") -> None:
    """Raises ValueError, saying what to install, where the library is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{setting} needs the library transformers; install it with: pip install 'vapi-align[{extra}]'")


def locate(name: str | Path, setting: str, example: str, more: tuple[str, ...] = ()) -> Path:
    """A local folder as it is, or ``org/name`` from the hub (its cache, if it is there). ``more``: files beside the two.

    Raises ValueError for a folder that lacks a file, saying which setting asked for it and what would fit.
    """
    files = (CONFIG, WEIGHTS, *more)
    folder, parts = Path(name), str(name).split("/")
    lacking = [file for file in files if not (folder / file).is_file()]
    if not lacking:
        return folder
    if folder.is_absolute() or len(parts) != 2 or "" in parts or Path(parts[0]).exists():
        raise ValueError(f"{setting} is {name}, which lacks {', '.join(lacking)}; give a folder of weights such as {example}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{setting} is {name}, which is no local folder; to take it from the hub: pip install huggingface_hub") from None
    try:
        return [Path(hf_hub_download(str(name), file)) for file in files][0].parent
    except Exception as error:
        raise ValueError(f"{setting} is {name}, which is no local folder, and the hub did not give it: {error}") from error


def read_config(folder: Path, kind: str, setting: str, example: str) -> dict[str, Any]:
    """config.json. Raises ValueError if it is not one of this kind of network."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != kind:
        raise ValueError(f"{setting} is {folder}, which holds a {found or 'nameless'} network, not {kind}; give {example}")
    return config


def load(cls: Any, folder: Path, device: torch.device | str) -> Any:
    """A network of transformers' class ``cls`` in float32, frozen. Raises ValueError with the list of what does not fit."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    logging.disable_progress_bar()
    try:
        network, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise ValueError(f"{folder} is not whole, or no network of its own config.json: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    problems = [f"missing {name}" for name in sorted(info["missing_keys"]) if not _unused(name)]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"]) if not _unused(name)]
    mismatched = sorted(found if isinstance(found, str) else " ".join(map(str, found)) for found in info["mismatched_keys"])
    problems += [f"another shape: {found}" for found in mismatched]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{folder} does not fit the network:\n  {shown}")
    return network.float().to(device).eval().requires_grad_(False)


def _unused(name: str) -> bool:
    return any(part in name for part in UNUSED)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Products in full float32: a sampler may have allowed TensorFloat-32, which moves scores that stand near a threshold."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
