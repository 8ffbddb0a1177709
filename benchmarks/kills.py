"""Ten kills, none lost: SIGKILL at random moments of the stages, then the same command again.

    python benchmarks/kills.py [--kills 10] [--seed 0]      # JSON on standard output, minutes

A tiny embedded world is built, the stages run once undisturbed, and then each again in another folder
while it is being killed. Whatever a stage writes, provenance.json aside, must come out the same to the bit,
and no half-written folder may ever stand where a result belongs. Exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vapi import config, data
from vapi.digits import build
from vapi.recipes import recipe

STAGES = ("subset", "tokens", "tune", "evaluate", "register")
REPOSITORY = Path(__file__).resolve().parents[1]


def tiny() -> config.Config:
    """The default recipe at a size that takes seconds per stage."""
    default = recipe("digits")
    replace = dataclasses.replace
    every = {"holdout_every": 10, "sheet_every": 20, "checkpoint_every": 3}
    return replace(
        default,
        subset=replace(default.subset, images=60, max_imbalance=0.0),
        tokens=replace(default.tokens, images_per_batch=8),
        tune=replace(default.tune, steps=60, images_per_step=8, images_per_forward=4, holdout_images=8, **every),
        evaluate=replace(
            default.evaluate, samples=40, sweep_samples=20, images_per_batch=10, temperatures=[0.9, 1.0], sheet_images=8, seeds=[0, 1]
        ),
        track=replace(default.track, uri="off"),
    )


def project(folder: Path, world: Path) -> Path:
    """A folder to run stages in."""
    folder.mkdir()
    shutil.copytree(world, folder / "data")
    config.write_text(folder / "params.yaml", config.dump(tiny()))
    return folder


def start(stage: str, folder: Path) -> subprocess.Popen[bytes]:
    """``vapi <stage>`` in ``folder``, with the code of this clone."""
    environment = {name: value for name, value in os.environ.items() if name != "DVC_ROOT"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "vapi", stage], cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def finish(stage: str, folder: Path) -> float:
    """Run a stage to its end; seconds. Raises RuntimeError if it fails."""
    begin = time.perf_counter()
    code = start(stage, folder).wait()
    if code != 0:
        raise RuntimeError(f"{stage} ended with code {code}")
    return time.perf_counter() - begin


def kill_at(stage: str, folder: Path, seconds: float) -> bool:
    """Start a stage and kill it after ``seconds``; False if it had ended by then."""
    process = start(stage, folder)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode != 0


def trial(stage: str, undisturbed: Path, killed: Path, fractions: list[float]) -> dict[str, float]:
    """Run a stage once in peace and once under fire. ``lost``: results that differ, final or left by a kill."""
    seconds = finish(stage, undisturbed)
    wanted, out = data.file_digest(undisturbed / "artifacts" / stage), killed / "artifacts" / stage
    hits = lost = 0
    for fraction in fractions:
        hits += kill_at(stage, killed, fraction * seconds)
        if out.exists():  # it ended first, or was killed on its way out: then the result is whole
            lost += data.file_digest(out) != wanted
            shutil.rmtree(out)
    finish(stage, killed)
    lost += data.file_digest(out) != wanted
    return {"seconds": round(seconds, 1), "kills": len(fractions), "while_running": hits, "lost": lost}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="picks stages' shares and moments")
    given = parser.parse_args()
    dice = random.Random(given.seed)
    report: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary) / "world"
        build.build(world, build.TINY)
        undisturbed, killed = project(Path(temporary) / "undisturbed", world), project(Path(temporary) / "killed", world)
        for number, stage in enumerate(STAGES):
            kills = given.kills * (number + 1) // len(STAGES) - given.kills * number // len(STAGES)
            report[stage] = trial(stage, undisturbed, killed, [dice.uniform(0.1, 0.95) for _ in range(kills)])
            print(json.dumps({stage: report[stage]}), file=sys.stderr, flush=True)
    lost = sum(row["lost"] for row in report.values())
    print(json.dumps({"kills": given.kills, "lost": lost, "stages": report}, indent=1))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
