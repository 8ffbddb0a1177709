"""Does VA-pi do here what the paper says it does? Arms, seeds and controls on the embedded world.

    python benchmarks/evidence.py [--out artifacts/evidence] [--samples 5000] [--workers 0]

Two pretraining seeds x three tuning seeds of every arm: VA-pi, the prior alone (in the paper about the
base), the reward alone (in the paper a collapse). Each arm gets the same search of learning rates, on
the validation images with pretraining seed 0 and a tuning seed of its own; the reported numbers come
from the reference images, which chose nothing. Base and VA-pi are also compared each at its best
temperature. Resumable: whatever is finished is kept; the same command goes on. Runs do not depend on each
other: ``--workers`` of them go on at a time, by default one per core, with the cores shared out. Prints
JSON on the last line, and writes evidence.json and evidence.md beside the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from vapi import config, data, models
from vapi.config import Config, EvaluateConfig, ModelConfig
from vapi.digits import build
from vapi.evaluate import evaluate
from vapi.subset import subset
from vapi.tokens import tokens
from vapi.tune import tune

ARMS: dict[str, dict[str, Any]] = {"va-pi": {}, "prior alone": {"policy_weight": 0.0}, "reward alone": {"prior_weight": 0.0}}
SHOWN = ("fid", "kid", "inception_score", "precision", "recall", "class_accuracy", "fid_random")
Scores = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)
    pretraining_seeds: tuple[int, ...] = (0, 1)
    tuning_seeds: tuple[int, ...] = (0, 1, 2)
    search_seed: int = 1000
    search_samples: int = 2000
    samples: int = 5000


class Evidence:
    """The runs under one folder; a run that is there is not made again."""

    arms = ARMS

    def __init__(self, out: Path, params: Config, plan: Plan, world: Any) -> None:
        self.out, self.params, self.plan, self.world = out, params, plan, world
        self.subset, self.tokens = out / "subset", out / "tokens"

    def prepare(self) -> None:
        """Subset and tokens."""
        if not self.subset.exists():
            subset(self.params.subset, self.subset)
        _require_same(self.subset, subset=self.params.subset)
        if not self.tokens.exists():
            tokens(self.params.model, self.params.tokens, self.subset, self.tokens)
        _require_same(self.tokens, tokens=self.params.tokens)
        _require_inputs(self.tokens, subset=self.subset, tokenizer=self.params.model.tokenizer)

    def pretrain(self, seed: int) -> None:
        """The generator of a pretraining seed."""
        path = Path(self.model(seed).generator)
        if not path.exists():
            print(f"pretraining the generator with seed {seed}", flush=True)
            build.pretrain_generator(models.load_tokenizer(self.params.model), path, self.world, seed, lambda line: print(line, flush=True))

    def model(self, pretraining: int) -> ModelConfig:
        """Pretraining seed 0 is the bundled generator."""
        if pretraining == 0:
            return self.params.model
        return dataclasses.replace(self.params.model, generator=str(self.out / f"pretrained-{pretraining}" / "generator.safetensors"))

    def tuned(self, arm: str, lr: float, pretraining: int, seed: int) -> Path:
        """The folder of a tuned model."""
        chosen = dataclasses.replace(self.params.tune, **self.arms[arm], lr=lr, seed=seed)
        folder = self.out / "tune" / f"{arm.replace(' ', '-')}-lr{lr:g}-p{pretraining}-s{seed}"
        if not folder.exists():
            print(f"tuning: {folder.name}", flush=True)
            tune(self.model(pretraining), chosen, self.subset, self.tokens, folder)
        _require_same(folder, tune=chosen)
        made_of = self.model(pretraining)
        _require_inputs(folder, subset=self.subset, tokens=self.tokens, generator=made_of.generator, tokenizer=made_of.tokenizer)
        return folder

    def scores(self, folder: Path, pretraining: int, how: EvaluateConfig, purpose: str) -> Scores:
        """metrics.json of a tuned model against its base."""
        out = self.out / purpose / folder.name
        if not out.exists():
            evaluate(self.model(pretraining), how, folder, out)
        _require_same(out, evaluate=how)
        _require_inputs(out, tune=folder, reference=how.reference, validation=how.validation, extractor=how.extractor)
        result: Scores = data.read_json(out / "metrics.json")
        return result

    def search(self, arm: str, lr: float) -> Scores:
        """A learning rate, judged on the validation images."""
        how = dataclasses.replace(
            self.params.evaluate,
            reference=self.params.evaluate.validation,
            samples=self.plan.search_samples,
            seeds=[0],
            temperatures=[1.0],
            guidances=[1.0],
        )
        result: Scores = self.scores(self.tuned(arm, lr, 0, self.plan.search_seed), 0, how, "search")["tuned"]
        return result

    def report(self, arm: str, lr: float, pretraining: int, seed: int) -> Scores:
        """A run at the chosen rate, against the reference images."""
        temperatures = self.params.evaluate.temperatures if arm == "va-pi" else [1.0]
        how = dataclasses.replace(self.params.evaluate, samples=self.plan.samples, seeds=[0], temperatures=temperatures)
        metrics = self.scores(self.tuned(arm, lr, pretraining, seed), pretraining, how, "report")
        return {"pretraining": pretraining, "seed": seed, **{k: v for k, v in metrics.items() if k not in ("protocol", "sweep")}}

    def work(self, job: tuple[Any, ...]) -> Any:
        """One of the above: (its name, arguments)."""
        return getattr(self, job[0])(*job[1:])


def share(evidence: Evidence, jobs: Iterable[tuple[Any, ...]], workers: int) -> list[Any]:
    """The results of ``jobs`` in their order, ``workers`` at a time."""
    cores = len(os.sched_getaffinity(0))
    workers = workers or cores
    if workers == 1:
        return [evidence.work(job) for job in jobs]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, fresh, _begin_worker, (max(1, cores // workers),)) as pool:
        return list(pool.map(evidence.work, jobs))


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers outlive a killed parent, and would hold the locks of the runs they are at."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _require_same(folder: Path, **sections: Any) -> None:
    made = data.read_json(folder / "config.json")["sections"]
    for name, section in sections.items():
        if made[name] != config.plain(section):
            raise ValueError(f"{folder} was made with other settings; move it away, or give another --out")


def _require_inputs(folder: Path, **paths: str | Path) -> None:
    made = data.read_json(folder / "config.json")["inputs"]
    for name, path in paths.items():
        if made[name] != data.file_digest(Path(path)):
            raise ValueError(f"{folder} was made with another {name} than {path}; move it away, or give another --out")


def interval(differences: list[float]) -> dict[str, float]:
    """Mean of paired differences with a 95 % interval (Student's t). Runs of one pretraining seed share their
    base, so it is too narrow as a statement about other bases."""
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(student.ppf(0.975, len(differences) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def spread(rows: list[Scores], which: str, name: str) -> dict[str, float]:
    """Mean and standard deviation over models; a base that several runs share counts once."""
    models_once = {row["weights"][which.removesuffix("_best")]: row[which][name] for row in rows}
    values = list(models_once.values())
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def summarise(found: dict[str, list[Scores]]) -> Scores:
    """Means over runs, paired differences with the base, and the comparison at each one's best."""
    shown = found["va-pi"]
    rows: Scores = {"base": {name: spread(shown, "base", name) for name in SHOWN}}
    for arm, runs in found.items():
        rows[arm] = {name: spread(runs, "tuned", name) for name in SHOWN}
        rows[arm]["fid minus base"] = interval([run["tuned"]["fid"] - run["base"]["fid"] for run in runs])
    pairs = list(zip(found["va-pi"], found["prior alone"], strict=True))
    rows["va-pi"]["fid minus prior alone"] = interval([a["tuned"]["fid"] - b["tuned"]["fid"] for a, b in pairs])
    rows["base at its best"] = {name: spread(shown, "base_best", name) for name in SHOWN}
    rows["va-pi at its best"] = {name: spread(shown, "tuned_best", name) for name in SHOWN}
    rows["va-pi at its best"]["fid minus base at its best"] = interval(
        [run["tuned_best"]["fid"] - run["base_best"]["fid"] for run in shown]
    )
    return rows


def markdown(rows: Scores, searched: dict[str, dict[str, Scores]], plan: Plan) -> str:
    """The tables that the README quotes."""
    seeds = f"{len(plan.pretraining_seeds)} pretraining x {len(plan.tuning_seeds)} tuning seeds"
    lines = [f"{plan.samples:,} samples per model, {seeds}; mean and standard deviation over models.", ""]
    lines += _table(["", *SHOWN], [[name, *(_cell(row[metric]) for metric in SHOWN)] for name, row in rows.items()])
    lines += ["", "Paired differences in FID, mean and 95 % interval:", ""]
    for name, row in rows.items():
        for key, value in row.items():
            if "minus" in key:
                lines.append(f"- {name}: {key} = {value['mean']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})")
    lines += ["", f"Learning rates searched (FID on the validation images, {plan.search_samples:,} samples):", ""]
    rates = list(next(iter(searched.values())))
    lines += _table(["arm", *rates], [[arm, *(f"{scores['fid']:.2f}" for scores in by_lr.values())] for arm, by_lr in searched.items()])
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.3g} ± {value['std']:.2g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def run(evidence: Evidence, workers: int = 1) -> Scores:
    """Search, pretrain, repeat, summarise; evidence.json and evidence.md in the folder."""
    plan = evidence.plan
    evidence.prepare()
    sweep = [("search", arm, lr) for arm in ARMS for lr in plan.rates]
    scores = share(evidence, [*(("pretrain", seed) for seed in plan.pretraining_seeds), *sweep], workers)[len(plan.pretraining_seeds) :]
    searched: dict[str, dict[str, Scores]] = {arm: {} for arm in ARMS}
    for (_, arm, lr), score in zip(sweep, scores, strict=True):
        searched[arm][f"{lr:g}"] = score
    chosen = {arm: float(min(by_lr, key=lambda lr: by_lr[lr]["fid"])) for arm, by_lr in searched.items()}
    grid = [("report", arm, chosen[arm], p, s) for arm in ARMS for p in plan.pretraining_seeds for s in plan.tuning_seeds]
    found: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
    for job, row in zip(grid, share(evidence, grid, workers), strict=True):
        found[job[1]].append(row)
    rows = summarise(found)
    summary = {"plan": dataclasses.asdict(plan), "chosen": chosen, "summary": rows, "searched": searched, "runs": found}
    config.write_text(evidence.out / "evidence.json", json.dumps(summary, indent=1) + "\n")
    config.write_text(evidence.out / "evidence.md", markdown(rows, searched, plan))
    return {"chosen": chosen, "summary": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifacts/evidence"))
    parser.add_argument("--samples", type=int, default=Plan.samples)
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0: one per core")
    arguments = parser.parse_args()
    result = run(Evidence(arguments.out, config.load(), Plan(samples=arguments.samples), build.WORLD), arguments.workers)
    print((arguments.out / "evidence.md").read_text())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
