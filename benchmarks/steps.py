"""What a Kubeflow box costs beside its stage: the compiled package in kfp's local runner against the stages' own commands.

    python benchmarks/steps.py [--rounds 3] > benchmarks/results/steps.json

Both run the embedded digits at a small size, in turns; seconds are those of whole processes, from kfp's own time stamps for the
boxes. Medians over the rounds, and the difference for each stage. (On a cluster a pod's start comes on top, the image's
pull included.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vapi import config
from vapi.config import STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = {
    "subset.images": 256,
    "tune.steps": 3,
    "tune.holdout_images": 32,
    "evaluate.samples": 60,
    "evaluate.sweep_samples": 50,
    "evaluate.temperatures": [1.0],
}
FIELDS = ("subset_images", "tune_steps", "evaluate_samples")
STAMP = re.compile(r"(\d\d):(\d\d):(\d\d\.\d+) - INFO - (Executing task|Task) \S*'([a-z]+)'")


def boxes(state: Path, root: Path) -> dict[str, float]:
    """Seconds of each box in kfp's local runner."""
    named = {name.replace(".", "_", 1): (name, value) for name, value in SIZES.items()}
    others = {name: value for flat, (name, value) in named.items() if flat not in FIELDS}
    words = [f"{flat}={config.scalar(value)}" for flat, (_, value) in named.items() if flat in FIELDS]
    words += [f"overrides={config.scalar(others)}", "track_uri=off"]
    command = [sys.executable, "-m", "pipelines", "run-local", "digits", "--root", str(root)]
    log = run([*command, *(word for pair in words for word in ("-p", pair))], state)
    began: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for hours, minutes, rest, what, name in STAMP.findall(log):
        now = 3600 * int(hours) + 60 * int(minutes) + float(rest)
        if what == "Executing task":
            began[name] = now
        elif name not in seconds:
            seconds[name] = now - began[name]
    return seconds


def stages(state: Path, root: Path) -> dict[str, float]:
    """Seconds of each stage's command."""
    seconds = {}
    for stage, spec in STAGES.items():
        folders = {name: root / name for name in spec.inputs} | {"out": root / stage}
        words = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
        for name, value in SIZES.items():
            if name.partition(".")[0] in spec.sections:
                words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        begin = time.perf_counter()
        run([sys.executable, "-m", "vapi", stage, *words, "--track.uri", "off"], state)
        seconds[stage] = time.perf_counter() - begin
    return seconds


def run(words: list[str], state: Path) -> str:
    """A command in the clone, with a state of its own; what it said."""
    environment = {**os.environ, "VAPI_STATE": str(state), "NO_COLOR": "1"}
    ran = subprocess.run(words, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(words)}\n{ran.stdout[-3000:]}")
    return re.sub(r"\x1b\[[0-9;]*m", "", ran.stdout)


def main() -> None:
    """Take turns, and print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, measure in (("box", boxes), ("command", stages)):
                for stage, seconds in measure(Path(folder) / f"state-{kind}", Path(folder) / kind).items():
                    found.setdefault(stage, {}).setdefault(kind, []).append(round(seconds, 3))
                print(f"round {number + 1} of {rounds}: {kind}", file=sys.stderr, flush=True)
    medians = {stage: {kind: statistics.median(seconds) for kind, seconds in kinds.items()} for stage, kinds in found.items()}
    over = {stage: round(kinds["box"] - kinds["command"], 3) for stage, kinds in medians.items() if "command" in kinds}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores",
        "command": f"python benchmarks/steps.py --rounds {rounds}",
        "seconds": medians,
        "overhead_seconds": over,
        "rounds": found,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
