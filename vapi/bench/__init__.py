"""``vapi bench``: what a machine makes of the pipeline's expensive parts, as ratios to a naive reference.

A benchmark is a function from settings to a dict of plain numbers; ``run`` adds date, machine and command and
prints it as JSON on the last line. Ours and the reference (``naive``) take turns in one run, so that a busy
machine slows both. Weights are random where a file is missing: no figure depends on them.

Left out: comparisons over time. A line of JSON goes to a file, and what reads it is somebody else's tool.
"""

from __future__ import annotations

import datetime
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from vapi.config import Measured


def run(name: str, settings: Measured, command: str) -> dict[str, Any]:
    """Measure, and print one line of JSON; append it to ``settings.bench.out`` too. Raises ValueError if it cannot be run here."""
    from vapi.bench import meter

    function = getattr(importlib.import_module(f"vapi.bench.{name}"), name)
    about = {"bench": name, "date": datetime.date.today().isoformat(), "command": command, "machine": meter.machine()}
    found = {**about, **rounded(function(settings))}
    if settings.bench.out:
        append(Path(settings.bench.out), found)
    print(json.dumps(found))
    return found


def append(path: Path, found: dict[str, Any]) -> None:
    """Add one line of JSON to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def rounded(value: Any) -> Any:
    """Floats to four significant digits, which is more than a measurement repeats."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def say(words: str) -> None:
    """A line for whoever waits."""
    print(words, file=sys.stderr, flush=True)
