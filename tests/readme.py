"""README.md as a program: its commands and its Python, in order. ``python tests/readme.py`` runs them in a clone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"

ELSEWHERE = {
    "make lint": ".ci/run's first command",
    "make test": ".ci/run's last command",
    ". .venv/bin/activate": "here: the commands run with .venv/bin first on the path",
    "mlflow ui": "tests/test_readme.py starts it, since it does not end by itself",
    "export KF_PIPELINES_ENDPOINT=https://kubeflow.example.com/pipeline": "a line for the two below it, not a command of ours",
    "python -m pipelines check llamagen-xxl-c2i": "tests/test_server.py has a server that speaks Kubeflow's protocol for it",
    "python -m pipelines submit llamagen-xxl-c2i -p tune_lr=2e-6 --wait": "as the line before: tests/test_server.py",
    "make demo-t2i": "takes ten minutes; tests/test_t2i.py runs its stages at tiny size",
    "make demo-janus": "as the line before",
    "vapi experiment table4 --seeds 0,1,2": "takes long; tests/test_experiment.py runs a grid at tiny size",
    "make evidence": "takes hours, and is run by hand for the numbers that README.md shows",
}
"""Commands that are not run here, and what runs them."""


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks as (language, content)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def programs() -> list[list[str]]:
    """What to execute, in order: each line of the sh blocks, and each python block whole."""
    found: list[list[str]] = []
    for language, content in blocks(README.read_text()):
        if language == "sh":
            found += [["bash", "-c", line] for line in content.splitlines() if line not in ELSEWHERE]
        elif language == "python":
            found.append([sys.executable, "-c", content])
    return found


if __name__ == "__main__":
    for program in programs():
        print(f"\n$ {program[-1]}", flush=True)
        subprocess.run(program, check=True, cwd=README.parent, stdin=subprocess.DEVNULL)
