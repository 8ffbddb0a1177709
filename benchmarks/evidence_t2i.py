"""What VA-pi does for captions on the embedded scenes: arms, seeds, controls, and the context noise of the paper's table 5 (digits-t2i).

    python benchmarks/evidence_t2i.py [--recipe digits-t2i] [--rates 3e-5 1e-4 3e-4]
        [--images-per-prompt 4] [--out artifacts/evidence-t2i] [--workers 0]

Three tuning seeds of every arm, each sampled with a seed of its own, against the base sampled with the same three. Learning
rates are searched alike for VA-pi, the prior alone and the reward alone, by the overall score on the validation prompts with
a tuning seed of its own; VA-pi's context noises take its rate. The reported numbers are of the test prompts, which chose
nothing. Intervals resample prompts within tasks, in pairs, on shares averaged over seeds. Resumable, as evidence.py. Prints
JSON on the last line, and writes evidence.json and evidence.md beside the runs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import numpy as np

from vapi import config, data
from vapi.metrics import geneval
from vapi.recipes import recipe

Scores = dict[str, Any]
JUDGES = ("geneval", "geneval_second")
NOISES = {f"va-pi, noise {noise:g}": {"context_noise": noise} for noise in (0.25, 0.5, 0.75)}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {"digits-t2i": evidence.ARMS | NOISES, "digits-janus": evidence.ARMS}
HELD_OUT = ("reward", "ce")  # what the images that tune holds out show, before and after


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    tuning_seeds: tuple[int, ...] = (0, 1, 2)
    search_seed: int = 1000
    samples: int = 600
    images_per_prompt: int = 4
    pretraining_seeds: tuple[int, ...] = (0,)


class Evidence(evidence.Evidence):
    """The runs under one folder."""

    searched = ("va-pi", "prior alone", "reward alone")

    def __init__(self, out: Path, params: config.Config, plan: Plan, arms: dict[str, dict[str, Any]]) -> None:
        super().__init__(out, params, plan, None)  # type: ignore[arg-type]
        self.arms, self.images_per_prompt = arms, plan.images_per_prompt

    def how(self, **changes: Any) -> Any:
        """The recipe's evaluation with as few pictures beside those of prompts as it allows."""
        wanted = self.params.evaluate
        few: dict[str, Any] = {"samples": self.plan.samples, "sweep_samples": 20, "temperatures": [1.0], "guidances": [wanted.guidance]}
        return dataclasses.replace(wanted, **few, images_per_prompt=self.images_per_prompt, **changes)

    def search(self, arm: str, lr: float) -> Scores:
        """A learning rate, judged by the validation prompts."""
        params = self.params.evaluate
        how = self.how(reference=params.validation, prompts=str(Path(params.prompts).with_name("validation.jsonl")), seeds=[0])
        result: Scores = self.scores(self.tuned(arm, lr, 0, self.plan.search_seed), 0, how, "search")["tuned"]
        return result

    def report(self, arm: str, lr: float, pretraining: int, seed: int) -> Scores:
        """A run at the chosen rate, on the test prompts."""
        folder = self.tuned(arm, lr, pretraining, seed)
        found = self.scores(folder, pretraining, self.how(seeds=[seed]), "report")
        with open(self.out / "report" / folder.name / "prompts.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        shares = {f"{side}/{judge}": [float(row[f"{side}/{judge}"]) for row in rows] for side in ("base", "tuned") for judge in JUDGES}
        kept = {name: found[name] for name in ("base", "tuned", "weights")} | {
            "holdout": data.read_json(folder / "summary.json")["holdout"]
        }
        return {"seed": seed, **kept, "anchors": _anchors(found), "tasks": [row["task"] for row in rows], "shares": shares}


def _anchors(found: Scores) -> Scores:
    judged = found["prompts"]["detectors"]
    return {judge: {name: one["overall"] for name, one in judged[judge]["anchors"].items()} for judge in JUDGES}


def by_task(runs: list[Scores], judge: str) -> Scores:
    """Base, tuned, their difference and its 95 % interval, by task and overall, averaged over the runs."""
    base, tuned = (np.mean([run["shares"][f"{side}/{judge}"] for run in runs], axis=0) for side in ("base", "tuned"))
    names = np.array(runs[0]["tasks"])
    tasks = {task: np.flatnonzero(names == task) for task in geneval.TASKS}
    draws = geneval.resampled(tuned - base, tasks)
    low, high = np.quantile(draws, [0.025, 0.975], axis=1)
    rows: Scores = {}
    for n, name in enumerate([*tasks, "overall"]):
        one, other = (geneval.overall(x, tasks) if name == "overall" else float(x[tasks[name]].mean()) for x in (base, tuned))
        rows[name] = {
            "base": one, "tuned": other, "difference": other - one, "standard_error": float(draws[n].std()),
            "low": float(low[n]), "high": float(high[n]),
        }  # fmt: skip
    return rows


def run(made: Evidence, workers: int = 1) -> Scores:
    """Search, repeat, summarise; evidence.json and evidence.md in the folder."""
    plan = made.plan
    made.prepare()
    # a single rate is not searched
    sweep = [("search", arm, lr) for arm in made.searched for lr in plan.rates if len(plan.rates) > 1]
    searched: dict[str, dict[str, Scores]] = {arm: {} for arm in made.searched}
    for (_, arm, lr), score in zip(sweep, evidence.share(made, sweep, workers), strict=True):
        searched[arm][f"{lr:g}"] = score
    best = {arm: float(max(by_lr, key=lambda lr: by_lr[lr]["geneval"])) if by_lr else plan.rates[0] for arm, by_lr in searched.items()}
    chosen = {arm: best.get(arm, best["va-pi"]) for arm in made.arms}
    grid = [("report", arm, chosen[arm], 0, seed) for arm in made.arms for seed in plan.tuning_seeds]
    found: dict[str, list[Scores]] = {arm: [] for arm in made.arms}
    for job, row in zip(grid, evidence.share(made, grid, workers), strict=True):
        found[job[1]].append(row)
    tables = {arm: {judge: by_task(runs, judge) for judge in JUDGES} for arm, runs in found.items()}
    seeds = {arm: {judge: [run["tuned"][judge] - run["base"][judge] for run in runs] for judge in JUDGES} for arm, runs in found.items()}
    summary = {
        "chosen": chosen,
        "tables": tables,
        "differences_by_seed": seeds,
        "fid": _fids(found),
        "held_out": {arm: _held_out(runs) for arm, runs in found.items()},
        "anchors": found["va-pi"][0]["anchors"],
    }
    # without the shares of every prompt, which stay in the reports' prompts.csv
    kept = {arm: [{name: run[name] for name in run.keys() - {"shares", "tasks"}} for run in runs] for arm, runs in found.items()}
    everything = {"plan": dataclasses.asdict(plan), **summary, "searched": searched, "runs": kept}
    config.write_text(made.out / "evidence.json", json.dumps(everything, indent=1) + "\n")
    config.write_text(made.out / "evidence.md", markdown(summary, searched))
    return summary


def _fids(found: dict[str, list[Scores]]) -> Scores:
    sides = {"base": [run["base"]["fid"] for run in found["va-pi"]]}
    sides |= {arm: [run["tuned"]["fid"] for run in runs] for arm, runs in found.items()}
    return {name: statistics.fmean(values) for name, values in sides.items()}


def _held_out(runs: list[Scores]) -> Scores:
    """Of the held-out images, each number before and after, averaged over the runs."""
    sides = {"before": "first", "after": "last"}
    return {
        name: {side: statistics.fmean(run["holdout"][look][f"holdout/{name}"] for run in runs) for side, look in sides.items()}
        for name in HELD_OUT
    }


def markdown(summary: Scores, searched: dict[str, dict[str, Scores]]) -> str:
    """The tables that the documentation quotes."""
    lines = []
    for judge, title in zip(JUDGES, ("classical judge", "learned judge"), strict=True):
        arms = {arm: tables[judge] for arm, tables in summary["tables"].items()}
        head = ["", *geneval.TASKS, "overall", "minus base (95 %)", "FID"]
        rows = [["base", *(f"{row['base']:.3f}" for row in arms["va-pi"].values()), "", f"{summary['fid']['base']:.2f}"]]
        for arm, table in arms.items():
            gain = table["overall"]
            words = f"{gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
            rows.append([arm, *(f"{row['tuned']:.3f}" for row in table.values()), words, f"{summary['fid'][arm]:.2f}"])
        anchors = ", ".join(f"{name} {value:.3f}" for name, value in summary["anchors"][judge].items())
        lines += [f"By the {title}:", "", *evidence._table(head, rows), "", f"Anchors: {anchors}.", ""]
    lines += ["Held-out images:", ""]
    rows = [
        [arm, *(f"{held[name][side]:.4f}" for name in HELD_OUT for side in ("before", "after"))]
        for arm, held in summary["held_out"].items()
    ]
    head = ["", *(f"{name} {side}" for name in ("reward", "cross-entropy") for side in ("before", "after"))]
    lines += [*evidence._table(head, rows), ""]
    if not next(iter(searched.values())):
        return "\n".join(lines) + "\n"
    lines += ["Learning rates searched (overall on the validation prompts, classical judge):", ""]
    rates = list(next(iter(searched.values())))
    cells = [[arm, *(f"{scores['geneval']:.3f}" for scores in by_lr.values())] for arm, by_lr in searched.items()]
    return "\n".join([*lines, *evidence._table(["arm", *rates], cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="digits-t2i")
    parser.add_argument("--rates", type=float, nargs="+", default=Plan.rates, help="learning rates to search")
    parser.add_argument("--images-per-prompt", type=int, default=Plan.images_per_prompt)
    parser.add_argument("--out", type=Path, help="artifacts/evidence-t2i, or as the recipe is called")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0: one per core")
    arguments = parser.parse_args()
    out = arguments.out or Path("artifacts") / f"evidence-{arguments.recipe.removeprefix('digits-')}"
    plan = Plan(rates=tuple(arguments.rates), images_per_prompt=arguments.images_per_prompt)
    made = Evidence(out, recipe(arguments.recipe), plan, RECIPES[arguments.recipe])
    result = run(made, arguments.workers)
    print((out / "evidence.md").read_text())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
