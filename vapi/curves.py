"""What tuning did over its steps to images that were held out of it: the paper's figure 5, for an experiment that has a curve.

Reads curves.csv of an evaluation, which is metrics.jsonl of the tuning that it measures: some looks at held-out images, the first
before the first step, the last after the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

LOOK = "holdout/"
COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:purple", "tab:brown")


def looks(evaluation: Path) -> pd.DataFrame:
    """A row for each look at held-out images: step, reward, ce, ..."""
    frame = pd.read_csv(evaluation / "curves.csv")
    names = {name: name.removeprefix(LOOK) for name in frame if name.startswith(LOOK)}
    return frame[["step", *names]].dropna(subset=list(names), how="all").rename(columns=names)


def held(evaluation: Path) -> dict[str, dict[str, float]]:
    """What the first look says, which is of the base, and the last, which is of the tuned."""
    found = looks(evaluation).drop(columns="step")
    ends = {"base": found.iloc[0], "tuned": found.iloc[-1]}
    return {side: {str(name): float(value) for name, value in row.dropna().items()} for side, row in ends.items()}


def curve(evaluations: Sequence[Path], name: str) -> dict[str, Any]:
    """One quantity over the steps that all runs looked at: {"steps": [S], "values": for each run [S]}."""
    runs = [looks(one).set_index("step")[name] for one in evaluations]
    steps = sorted(set.intersection(*(set(run.index.tolist()) for run in runs)))
    return {"steps": steps, "values": [run.loc[steps].tolist() for run in runs]}


def draw(axis: Any, curves: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A line for each row, mean over its runs, in the band from the lowest to the highest."""
    for colour, (name, found) in zip(COLOURS, curves.items()):
        values = np.array(found["values"])
        axis.plot(found["steps"], values.mean(axis=0), color=colour, marker="o", ms=3, label=name)
        axis.fill_between(found["steps"], values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
    axis.set_xlabel("step")
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def write(path: Path, panels: Iterable[tuple[str, Mapping[str, Mapping[str, Any]]]], what: str) -> None:
    """A picture of panels side by side: of each its title and what it shows, by row."""
    from matplotlib.figure import Figure

    shown = list(panels)
    figure = Figure(figsize=(1 + 3.6 * len(shown), 3.4), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(axis, curves, title)
        axis.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel(what)
    figure.savefig(path, dpi=110)
