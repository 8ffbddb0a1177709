"""``vapi experiment NAME``: the runs of a grid, one after the other, and the table that they make, with the paper's numbers beside ours.

Each point and seed is the stages subset, tokens, tune and evaluate, run by the very commands that a terminal would type, so that
resuming, tracking and the start on several GPUs are theirs. A result lies under a name that follows from what decides it
(``keys.py``):

    artifacts/experiments/runs/<stage>/<key>/          points of any grid that share a stage share its folder
    artifacts/experiments/<grid>/                      table.md, table.csv, results.json, and curves.png of a grid with a curve;
                                                       written after every evaluation

so the same command goes on where it was stopped. A whole table of one seed comes before the next seed's. A point that fails is
noted, and the others go on.

Left out: several stages at a time, since one takes all cores or GPUs by itself; the stage register.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vapi import config, curves, data, grids, inputs, keys, recipes, report, signals, track
from vapi.config import ARTIFACTS, STAGES, Config
from vapi.grids import Grid, Point
from vapi.report import Column

FOLDER = ARTIFACTS / "experiments"
LAST = "evaluate"
DECIDE_NOTHING = tuple(
    f"{name}.py" for name in ("__main__", "cli", "config", "curves", "experiment", "grids", "inputs", "keys", "recipes", "run")
)
"""Source that changes no stage's result, so that a new point in a grid does not make all others anew."""
PAPER = "arXiv 2512.19680"
Scores = dict[str, Any]
Launch = Callable[[Sequence[str], Mapping[str, str]], int]


@dataclass(frozen=True)
class Step:
    """A stage of a run: what it reads, and where its result lies."""

    stage: str
    title: str  # of the first point and seed that ask for it
    settings: Config
    inputs: dict[str, Path]
    folder: Path

    @property
    def made(self) -> bool:
        return is_made(self.folder)

    def words(self) -> list[str]:
        """What to type after ``vapi``."""
        folders = {**self.inputs, "params": self.folder.with_suffix(".yaml"), "out": self.folder}
        return [self.stage, *(word for name, path in folders.items() for word in (f"--{name}", str(path)))]


class Experiment:
    """A grid with a configuration and seeds. Raises ValueError, before anything is run, for a point that cannot be: fields that do not
    go together, weights or images that are not here."""

    def __init__(self, name: str, base: Config, seeds: Sequence[int], out: Path | None = None) -> None:
        self.name, self.grid, self.base, self.seeds = name, grids.grid(name), base, seeds
        self.queue: dict[Path, Step] = {}
        self.known: dict[str, Path] = {}  # results by stage and configuration, whose names take a look at every file
        self.failed: set[Path] = set()
        runs = grids.runs(self.grid, base, seeds)
        self.points = [point for point in self.grid.points if (point.name, seeds[0]) in runs]
        _require_inputs(runs)
        ends = {(point, seed): self._plan(settings, grids.title(point, seed)) for (point, seed), settings in runs.items()}
        self.table = Table(name, base, seeds, out or FOLDER / name, ends, self.failed)

    def _plan(self, settings: Config, title: str) -> Path:
        """Queue what a run takes, each stage once; the folder of its evaluation."""
        folders: dict[str, Path] = {}
        for stage, spec in STAGES.items():
            inputs = {name: folders[name] for name in spec.inputs}
            values = {name: config.plain(getattr(settings, name)) for name in spec.sections}
            wanted = json.dumps([stage, values, {name: str(path) for name, path in inputs.items()}], sort_keys=True)
            if wanted not in self.known:
                self.known[wanted] = FOLDER / "runs" / stage / _key(stage, settings, inputs)
            folders[stage] = self.known[wanted]
            self.queue.setdefault(folders[stage], Step(stage, title, settings, inputs, folders[stage]))
            if stage == LAST:
                break
        return folders[LAST]

    # --- running -------------------------------------------------------------------------------

    def run(self, launch: Launch | None = None) -> int:
        """Make what is not there yet, and the table. The exit code: 0, or that of the last stage that failed.

        ``launch`` runs a command (words after ``vapi``, more environment) and returns its exit code. Raises SystemExit with a
        stage's code if it was stopped.
        """
        print(self.outlook(), flush=True)
        tracked: set[str] = set()
        code = 0
        for number, step in enumerate(self.queue.values(), 1):
            if self.failed.intersection(step.inputs.values()):
                self.failed.add(step.folder)
            elif ended := self._make(step, launch or here, f"[{number}/{len(self.queue)}] {step.stage}: {step.title}"):
                if ended in signals.STOPPED:
                    print(f"stopped; what is finished is in {FOLDER / 'runs'}, and the same command goes on", file=sys.stderr)
                    raise SystemExit(ended)
                print(f"{step.title}: {step.stage} ended with code {ended}, what it said is above; the other points go on", file=sys.stderr)
                self.failed.add(step.folder)
                code = ended
            if step.stage == LAST:
                self.table.track(self.table.write(), tracked)
        print(f"{self.table.markdown(self.table.write())}\n{self.table.out / 'table.md'}")
        return code

    def _make(self, step: Step, launch: Launch, title: str) -> int:
        with data.locked(step.folder.with_suffix(".lock")):  # another experiment may want the same
            if step.made:
                return 0
            if _key(step.stage, step.settings, step.inputs) != step.folder.name:
                changed = "the source of vapi, or a file that the configuration names, has changed since this command began"
                raise ValueError(f"{changed}; what is finished is in {FOLDER / 'runs'}, and the same command goes on")
            print(title, flush=True)
            config.write_text(step.folder.with_suffix(".yaml"), config.dump(step.settings, comments=False))
            tags = {"vapi.experiment": self.name, "vapi.point": step.title}
            return launch(step.words(), {track.GIVEN: json.dumps({"tags": tags})})

    def plan(self) -> str:
        """The rows with what they change, and how far each is."""
        width = max(len(point.name) for point in self.grid.points)
        lines = []
        for row in self.table.rows():
            changes = ", ".join(f"{name} {value}" for name, value in (row["changes"] or {}).items())
            lines.append(f"  {row['name']:{width}}  {row['state']}" + (f"; {changes}" if changes else ""))
        return "\n".join([f"{self.grid.doc} {self.grid.source[0].upper()}{self.grid.source[1:]}.", *lines, self.outlook()])

    def outlook(self) -> str:
        """How much there is to do, and how long it takes if what is left takes as long as its like that is finished."""
        left = [step.stage for step in self.queue.values() if not step.made]
        words = f"{self.name}: {len(self.points)} rows, seeds {_listed(self.seeds)}; {len(left)} of {len(self.queue)} stages to run"
        spent: dict[str, list[float]] = {}
        for step in self.queue.values():
            if step.made:
                spent.setdefault(step.stage, []).append(data.read_json(step.folder / "provenance.json")["seconds"])
        if left and set(left) <= spent.keys():
            seconds = sum(statistics.fmean(spent[stage]) for stage in left)
            minutes = max(1, round(seconds / 60))
            words += f", about {minutes} minute{'s' * (minutes > 1)} if they take as long as those that are finished"
        return words


# --- results -----------------------------------------------------------------------------------


@dataclass
class Table:
    """What there is by now of a grid with a configuration and seeds. ``ends``: the folder of each point's and seed's evaluation,
    made or not; ``failed``: those of them that will not be."""

    name: str
    base: Config
    seeds: Sequence[int]
    out: Path
    ends: Mapping[tuple[str, int], Path]
    failed: set[Path]

    @property
    def grid(self) -> Grid:
        return grids.grid(self.name)

    def rows(self) -> list[Scores]:
        """What is known of each row: the paper's numbers, ours by metric, and which runs they come from."""
        return [self._row(point) for point in self.grid.points]

    def _row(self, point: Point) -> Scores:
        changes = {name: str(value) if isinstance(value, recipes.Times) else value for name, value in point.changes.items()}
        row: Scores = {"name": point.name, "changes": changes, "paper": point.paper, "about": point.about}
        row |= {"runs": [], "ours": {}, "judges": {}}
        if (point.name, self.seeds[0]) not in self.ends:
            return row | {"state": "not run here"}
        ends = [self.ends[point.name, seed] for seed in self.seeds]
        made = [end for end in ends if is_made(end)]
        found = [data.read_json(end / "metrics.json") for end in made]
        if self.grid.holds:
            found = [results | {f"{side}_held": scores for side, scores in curves.held(end).items()} for results, end in zip(found, made)]
        for results in found:
            row["judges"] |= report.judges(results)
        for metric in self.grid.metrics:
            values = [value for results in found if (value := number(results, point.side, metric)) is not None]
            if values:
                row["ours"][metric] = {
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "values": values,
                }
        if self.grid.curve and made and point.side == "tuned":
            row["curve"] = curves.curve(made, self.grid.curve)
        state = "failed" if self.failed.intersection(ends) else "done" if len(made) == len(ends) else "not finished"
        return row | {"state": state, "runs": [str(end) for end in made]}

    def write(self) -> list[Scores]:
        """table.md, table.csv, results.json and the curves, of what there is by now."""
        rows = self.rows()
        summary = {"experiment": self.name, "source": self.grid.source, "seeds": list(self.seeds), "config": config.plain(self.base)}
        data.write_json(self.out / "results.json", summary | {"rows": rows})
        lines = [
            {
                "row": row["name"],
                "metric": metric,
                "paper": row["paper"].get(metric),
                "read_off_a_plot": row["about"],
                "ours": row["ours"].get(metric, {}).get("mean"),
                "deviation": row["ours"].get(metric, {}).get("std"),
                "runs": len(row["runs"]),
                "state": row["state"],
            }
            for row in rows
            for metric in self.grid.metrics
        ]
        config.write_text(self.out / "table.csv", pd.DataFrame(lines).to_csv(index=False))
        config.write_text(self.out / "table.md", self.markdown(rows))
        if drawn := {row["name"]: row["curve"] for row in rows if "curve" in row}:
            curves.write(self.out / "curves.png", [(self.grid.source, drawn)], column(f"held/{self.grid.curve}").title)
        return rows

    def markdown(self, rows: Sequence[Scores]) -> str:
        """The table: for each metric the paper's number, then ours, mean and standard deviation over the seeds."""
        papers = any(row["paper"] for row in rows)
        judges = {key: title for row in rows for key, title in row["judges"].items()}
        head = [""]
        for metric in self.grid.metrics:
            theirs, ours = column(metric).title, column(metric, judges).title
            head += [f"{theirs}, paper", "ours" if ours == theirs else f"ours: {ours}"] if papers else [ours]
        lines = [head, ["---"] * len(head)]
        for row in rows:
            cells = [row["name"] + (f" ({row['state']})" if row["state"] not in ("done", "not run here") else "")]
            for metric in self.grid.metrics:
                cells += [_paper(row, metric), _ours(row, metric)] if papers else [_ours(row, metric)]
            lines.append(cells)
        recipe = f"ours: {self._base()}, seeds {_listed(self.seeds)}"
        about = recipe if self.grid.source == grids.OURS else f"{recipe}; the paper ({PAPER}): {self.grid.source}"
        return "\n".join([f"# {self.name}: {self.grid.doc}", "", f"{about}.", "", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"

    def _base(self) -> str:
        closest = recipes.closest(self.base)
        changes = recipes.changes(recipes.recipe(closest), self.base)
        some = ", ".join(f"{name} {theirs}" for name, (_, theirs) in changes.items() if not name.startswith(("register.", "track.")))
        return f"recipe {closest}" + (f" with {some}" if some else "")

    def track(self, rows: Iterable[Scores], tracked: set[str]) -> None:
        """Log the rows that are complete: in MLflow's compare view they line up, each with the fields that the grid varies."""
        for n, (point, row) in enumerate(zip(self.grid.points, rows, strict=True)):
            if row["state"] != "done" or point.name in tracked:
                continue
            tracked.add(point.name)
            flat = config.flat(grids.settings(self.grid, self.base, point, self.seeds[0]))
            with track.start_point(self.name, n, point.name, self.base, "\n".join(row["runs"])) as run:
                run.params({name: flat.get(name, 0.0) for name in self.grid.varied} | {"side": point.side, "seeds": _listed(self.seeds)})
                numbers = {f"paper/{metric}": value for metric, value in point.paper.items()}
                for metric, ours in row["ours"].items():
                    numbers |= {metric: ours["mean"]} | ({f"{metric}_std": ours["std"]} if ours["std"] is not None else {})
                run.metrics(numbers, step=0)  # a step, because what has none is the parent's too
                run.tag("source", f"{PAPER}, {self.grid.source}" if point.paper else grids.OURS)


def is_made(folder: Path) -> bool:
    """Whether a stage has finished its result."""
    return (folder / "config.json").is_file()


def _require_inputs(runs: Mapping[tuple[str, int], Config]) -> None:
    """Raises ValueError, in words that name the point, for what one of the runs will read and cannot. Each thing is looked at once."""
    seen: set[tuple[str, str]] = set()
    for (point, _), settings in runs.items():
        for named, look in inputs.looks(settings).items():
            if named not in seen:
                seen.add(named)
                try:
                    look()
                except ValueError as error:
                    raise ValueError(f"{point}: {named[0]}: {error}. Nothing was run") from error


def _key(stage: str, settings: Config, inputs: Mapping[str, Path]) -> str:
    """What a stage's result is called, as the source and the files are now."""
    return keys.of(stage, settings, {name: path.name for name, path in inputs.items()}, data.source_digest(DECIDE_NOTHING))


def here(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command of ``vapi`` in a process of its own; its exit code, and that of a stop if one was asked for."""
    package = Path(__file__).parents[1]
    known = {
        **os.environ,
        **environment,
        "VAPI_STARTED_BY": str(os.getpid()),  # it ends with this process
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")])),
    }
    asked: list[int] = []
    child = subprocess.Popen([sys.executable, "-m", "vapi", *words], env=known, start_new_session=True)

    def stop(number: int) -> None:
        asked.append(number)
        child.send_signal(number)

    with signals.handed_on(stop):
        code = signals.exit_code(child.wait())
    return os.EX_TEMPFAIL if asked and code not in signals.STOPPED else code


# --- numbers -----------------------------------------------------------------------------------


_HELD_OUT = (Column("ce", "cross-entropy", True, 3), Column("reward_mse", "-MSE", False, 5), Column("reward_lpips", "-LPIPS", False, 5))
"""Of images held out of tuning, beside what an evaluation measures."""


def number(results: Scores, side: str, metric: str) -> float | None:
    """A metric of base or tuned in metrics.json, None if it is not there; as ADM's evaluator counts it where the reference is ADM's."""
    kind, _, name = metric.rpartition("/")
    if kind == "task":
        judged = results.get("prompts", {}).get("detectors", {})
        tasks = judged["geneval"][side]["tasks"] if judged else {}
        return float(tasks[name]["score"]) if name in tasks else None
    scores = results.get(f"{side}_{kind}" if kind else side, {})
    value = scores.get(f"{name}_adm", scores.get(name))
    return None if value is None or not math.isfinite(value) else float(value)


def column(metric: str, judges: Mapping[str, str] | None = None) -> Column:
    """How a metric is titled and shown. ``judges``: titles of those whose name hangs on who judged (``report.judges``)."""
    kind, _, name = metric.rpartition("/")
    known = {one.key: one for one in (*report.COLUMNS, *_HELD_OUT)}
    shown = known.get(name, Column(name, name.replace("_", " "), False, 3 if kind == "task" else 2))
    title = (judges or {}).get(name, shown.title)
    title = {"guided": f"{title}, guided", "best": f"{title} at its best", "held": f"{title}, held out"}.get(kind, title)
    return dataclasses.replace(shown, title=title)


def _paper(row: Scores, metric: str) -> str:
    value = row["paper"].get(metric)
    return "-" if value is None else f"{'≈ ' if row['about'] else ''}{value:g}"


def _ours(row: Scores, metric: str) -> str:
    shown = column(metric)
    ours = row["ours"].get(metric)
    if ours is None:
        return row["state"] if row["state"] == "not run here" else "-"
    return report.cell({shown.key: ours["mean"], f"{shown.key}_std": ours["std"]}, shown)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
