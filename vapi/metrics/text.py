"""How well pictures fit their prompts, in other eyes than GenEval's: scores by a CLIP, and the place to plug in one's own.

A score is a function ``(images, prompts, metadata) -> numbers``, made from the evaluation's configuration; ``module:function`` in
``evaluate.text_metrics`` makes one's own (docs/text-metrics.md has an example of a few lines). Prompts that no detector judges are
read here too.

``clipscore`` is the plain cosine between CLIP's features of picture and prompt, without a prefix: the scale (0.245 to 0.291) on
which papers on LlamaGen report. Others multiply by 2.5 and cut at 0 (Hessel et al. 2021), by 100 (torchmetrics), or put "A photo
depicts " before the prompt (LlamaGen's own script), and take another CLIP: only like variants compare, so results carry ``describe``.
``hpsv2`` is the same cosine by a CLIP that learned what people prefer (arXiv 2306.09341).
Left out: PickScore, ImageReward, VQAScore: each brings libraries and weights of its own, and fits the same place.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vapi.config import TEXT_METRICS, EvaluateConfig, nearest
from vapi.metrics import clip as clips
from vapi.metrics.features import sha256
from vapi.metrics.geneval import Prompt

PICTURES = 32  # at a time

TextMetric = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]
"""uint8 (B, H, W, 3), B prompts, and B rows of GenEval's metadata (or empty ones) to B finite numbers."""
Factory = Callable[[EvaluateConfig], TextMetric]


@dataclass(frozen=True)
class ClipScore:
    """Cosine of CLIP's features of picture and prompt, in float32; a prompt beyond 77 tokens is cut off."""

    clip: clips.Clip

    @property
    def description(self) -> str:
        """What must be the same for two numbers to compare."""
        return f"cosine of picture and prompt, no prefix, not scaled; {self.clip.architecture}, weights {self.clip.sha256}"

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
        """As ``TextMetric``."""
        found: list[float] = []
        for start in range(0, len(images), PICTURES):
            some = slice(start, start + PICTURES)
            seen = self.clip.image_features([Image.fromarray(image) for image in images[some]])
            found += F.cosine_similarity(seen, self.clip.text_features(prompts[some]), dim=1).tolist()
        return found


def _folder(config: EvaluateConfig, name: str) -> tuple[str, str]:
    """Where the CLIP of a metric of ours lies, and which field says so. Raises ValueError where it says nothing."""
    setting = f"evaluate.{TEXT_METRICS[name]}"
    folder: str = getattr(config, TEXT_METRICS[name])
    if not folder:
        example = f" ({clips.EXAMPLE})" if setting == clips.SETTING else ", as transformers keeps a CLIP"
        raise ValueError(f"evaluate.text_metrics asks for {name}; set {setting} to a folder of its weights{example}")
    return folder, setting


@dataclass(frozen=True)
class Checked:
    """A text metric that is held to what it owes."""

    name: str
    metric: TextMetric
    source: str = ""  # sha256 of the file that somebody's own one stands in: what was kept of another text is not its

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
        """As ``TextMetric``. Raises ValueError for anything but B finite numbers."""
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3, (images.dtype, images.shape)
        assert len(images) == len(prompts) == len(metadata), (len(images), len(prompts), len(metadata))
        found = [float(number) for number in self.metric(images, prompts, metadata)]
        if len(found) != len(images):
            raise ValueError(f"the text metric {self.name} returned {len(found)} numbers for {len(images)} images")
        if not np.isfinite(found).all():
            raise ValueError(f"the text metric {self.name} returned numbers that are not finite")
        return found

    @property
    def describe(self) -> str:
        """The metric's own ``description``, for results, else its name; and the text of the file it stands in, if it is not ours."""
        return str(getattr(self.metric, "description", self.name)) + (f"; code {self.source[:16]}" if self.source else "")


def require(config: EvaluateConfig) -> dict[str, Factory]:
    """Those of ``evaluate.text_metrics`` that are somebody's own, after all that can be checked without reading weights.
    Raises ValueError for unknown names, and where the CLIP of one is not there."""
    own = {name: _imported(name) for name in config.text_metrics if name not in TEXT_METRICS}
    for name in config.text_metrics:
        if name not in own:
            clips.require(*_folder(config, name))
    return own


def load(config: EvaluateConfig, device: torch.device | str) -> dict[str, Checked]:
    """The metrics of ``evaluate.text_metrics`` by name. Raises ValueError as ``require`` does, and as their factories do."""
    own = require(config)
    return {
        name: Checked(name, own[name](config), _source_of(own[name])) if name in own else Checked(name, _by_clip(config, name, device))
        for name in config.text_metrics
    }


def _by_clip(config: EvaluateConfig, name: str, device: torch.device | str) -> ClipScore:
    folder, setting = _folder(config, name)
    return ClipScore(clips.load(folder, device, setting))


def _source_of(function: Factory) -> str:
    file = inspect.getsourcefile(function)
    return sha256(Path(file)) if file else ""


def _imported(name: str) -> Factory:
    """What ``module:function`` names. Raises ValueError where there is no such thing."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"evaluate.text_metrics names {name!r}; {nearest(name, list(TEXT_METRICS))}, or give module:function of your own")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"evaluate.text_metrics names {name!r}, which cannot be imported: {error}") from error


# --- prompts -----------------------------------------------------------------------------------

TEXT, GROUP = ("prompt", "prompts", "caption"), ("tag", "category", "challenge")  # as GenEval's, DrawBench's and PartiPrompts' files say
ALL = "all"  # the group of prompts that have none


def read_prompts(path: Path | str) -> list[Prompt]:
    """Prompts in which nobody looks for objects: JSON lines, CSV or TSV with a field prompt (or prompts, caption) and perhaps one of
    groups (tag, category, challenge), in any case; or a plain text with a prompt a line. Raises ValueError that names the line for
    whatever is none of these."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not here; it should hold prompts: JSON lines, CSV, TSV, or a line of text each")
    try:
        found = [_prompt(row, f"{path} line {number}") for number, row in _rows(path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    if not found:
        raise ValueError(f"{path} is empty; it should hold prompts")
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Fields of each prompt, and the line they stand in (of CSV, where they end)."""
    text = path.read_text(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        # nothing is quoted in TSV, and a quotation mark is one
        how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
        reader = csv.DictReader(io.StringIO(text, newline=""), **how)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path} line {reader.line_num} has more or fewer fields than its first line; put quotation marks around commas"
                )
            yield reader.line_num, row
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, _json(line, f"{path} line {number}") if suffix in (".jsonl", ".json") else {TEXT[0]: line}


def _json(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}; give one prompt a line") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {found!r:.60}; give a mapping with a field {TEXT[0]} on each line")
    return found


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    named = {str(name).strip().lower(): value for name, value in row.items()}
    field = next((name for name in TEXT if name in named), None)
    if field is None:
        raise ValueError(f"{where} has the fields {', '.join(row)}; one must be called {' or '.join(TEXT)}")
    if not isinstance(named[field], str) or not named[field].strip():
        raise ValueError(f"{where}: {field} is {named[field]!r}; it must be a text")
    groups = (str(named[name]).strip() for name in GROUP if named.get(name) is not None)
    return Prompt(named[field].strip(), next(filter(None, groups), ALL), ())
