"""Does a run on N processes equal the run on one? The default recipe's tokens, tune and evaluate, both ways.

    python benchmarks/processes.py [--processes 8] [--steps 100] [--samples 500] > benchmarks/results/processes.json

The processes share what cores there are, so this measures agreement and never speed. Codes and evaluation must
come out the same to the bit. Tuning adds the same numbers in another order: the first step agrees to rounding, and
from there on whatever a hundred steps make of it is what is printed. Exit code 1 if codes or evaluation differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vapi import config, data
from vapi.recipes import recipe

REPOSITORY = Path(__file__).resolve().parents[1]
START = "import sys; from vapi import launch; sys.exit(launch.start([sys.executable, '-m', 'vapi', *sys.argv[2:]], int(sys.argv[1])))"


def settings(steps: int, samples: int) -> config.Config:
    """The default recipe with fewer samples, its temperatures left out."""
    default = recipe("digits")
    replace = dataclasses.replace
    return replace(
        default,
        tune=replace(default.tune, steps=steps),
        evaluate=replace(default.evaluate, samples=samples, sweep_samples=50, temperatures=[1.0], images_per_batch=50),
        track=replace(default.track, uri="off"),
    )


def stage(folder: Path, processes: int, name: str, *flags: str) -> None:
    """One stage in as many processes, in a project of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", START, str(processes), name, *flags]
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=sys.stderr)


def project(folder: Path, made: config.Config) -> Path:
    """A folder to run stages in."""
    folder.mkdir()
    (folder / "data").symlink_to(REPOSITORY / "data")
    config.write_text(folder / "params.yaml", config.dump(made))
    return folder


def curves(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "artifacts" / "tune" / "metrics.jsonl").read_text().splitlines()]


def agreement(one: Path, many: Path) -> dict[str, Any]:
    """What came out on N processes beside what came out on one."""
    a, b = (load_file(folder / "artifacts" / "tune" / "model.safetensors") for folder in (one, many))
    base = load_file(REPOSITORY / recipe("digits").model.generator)
    apart, moved = (torch.stack([(x[n] - y[n]).norm() for n in base]).norm().item() for x, y in ((a, b), (a, base)))
    ours, theirs = curves(one), curves(many)

    def worst(name: str, until: int) -> float:
        return max(abs(x[name] - y[name]) for x, y in zip(ours[:until], theirs[:until], strict=True) if name in x)

    measured = [json.loads((folder / "artifacts" / "evaluate" / "metrics.json").read_text()) for folder in (one, many)]
    return {
        "codes_identical": same(one, many, "tokens", "codes.npy"),
        "first_step_gradient_norm_off": abs(ours[1]["tune/grad_norm"] - theirs[1]["tune/grad_norm"]),
        "loss_off_over_10_steps": worst("tune/loss", 11),
        "loss_off_over_all_steps": worst("tune/loss", len(ours)),
        "reward_off_over_all_steps": worst("tune/reward", len(ours)),
        "weights_off_relative_to_their_change": apart / moved,
        "evaluation_identical": measured[0] == measured[1],
        "fid": {name: measured[0][name]["fid"] for name in ("base", "tuned")},
    }


def same(one: Path, many: Path, name: str, file: str) -> bool:
    first, second = ((folder / "artifacts" / name / file).read_bytes() for folder in (one, many))
    return first == second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=500)
    given = parser.parse_args()
    made = settings(given.steps, given.samples)
    with tempfile.TemporaryDirectory() as temporary:
        one, many = (project(Path(temporary) / name, made) for name in ("one", "many"))
        for folder, processes in ((one, 1), (many, given.processes)):
            stage(folder, 1, "subset")
            stage(folder, processes, "tokens")
            stage(folder, processes, "tune")
        # both judge the same weights, so that it is the evaluation that is compared
        stage(one, 1, "evaluate")
        stage(many, given.processes, "evaluate", "--tune", str(one / "artifacts" / "tune"))
        found = agreement(one, many)
    cores = len(os.sched_getaffinity(0))
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cores} cores, no GPU",
        "command": "python benchmarks/processes.py " + " ".join(sys.argv[1:]),
        "code": data.code_version(),
        "processes": given.processes,
        "steps": given.steps,
    }
    print(json.dumps({**head, **found}, indent=1))
    raise SystemExit(0 if found["codes_identical"] and found["evaluation_identical"] else 1)


if __name__ == "__main__":
    main()
