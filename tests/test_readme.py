"""What README.md says is there and works. ``.ci/run`` executes its commands; this file sees that none is left out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from imports import MODULES, ROOT
from readme import ELSEWHERE, README, blocks, programs

from vapi import cli, track
from vapi.config import STAGES, Config


def commands() -> list[str]:
    return [line for language, content in blocks(README.read_text()) if language == "sh" for line in content.splitlines()]


def test_every_command_is_executed_by_ci_or_by_a_test_that_is_named() -> None:
    steps = (ROOT / ".ci/run").read_text().splitlines()
    assert "python tests/readme.py" in steps and "make lint" in steps and steps[-1] == "make test"
    ran = [program[-1] for program in programs()]
    assert all(command in ran or command in ELSEWHERE for command in commands())
    assert set(ELSEWHERE) <= set(commands()), "nothing is excused that is not there"
    for reason in ELSEWHERE.values():
        for word in reason.replace(",", " ").split():
            assert not word.startswith("tests/") or (ROOT / word).is_file()


def test_python_is_executed_too() -> None:
    assert any(program[0] == sys.executable for program in programs())


def test_the_commands_in_the_text_exist() -> None:
    text = README.read_text()
    for target in [word for line in commands() if line.startswith("make ") for word in line.split()[1:]]:
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
    for line in commands():
        if line.startswith("vapi ") and not line.startswith("vapi --"):
            assert line.split()[1] in {*STAGES, *cli.COMMANDS}
    assert all(f"`{stage}`" in text for stage in STAGES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"vapi.__main__", "vapi.digits.__main__", "vapi.track.__main__"}))
def test_the_tree_names_every_file(module: str) -> None:
    tree = README.read_text().rpartition("    vapi/\n")[2]
    path = MODULES[module]
    name = path.name if path.name != "__init__.py" or module == "vapi" else f"{path.parent.name}/"
    assert module == "vapi" or f" {name} " in tree


def test_links_lead_somewhere() -> None:
    for part in README.read_text().split("](")[1:]:
        target = part.partition(")")[0]
        assert target.startswith("https://") or (ROOT / target).exists()


def test_mlflow_ui_starts(tmp_path: Path) -> None:
    """`mlflow ui` as typed, but for a port of its own and a database that is new."""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    program = [str(Path(sys.executable).parent / "mlflow"), "ui", "--port", "5057", "--workers", "1"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(program, cwd=tmp_path, env=environment, stdout=log, stderr=log) as server:
        try:
            assert _answers("http://127.0.0.1:5057/health", 120), (tmp_path / "log").read_text()
        finally:
            server.terminate()


def _answers(address: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            time.sleep(0.5)
    return False


def test_the_numbers_were_measured_on_the_data_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    digest = track.data_digest(Config())[:8]
    for page in (README, ROOT / "docs/embedded-world.md"):
        assert f"data `{digest}`" in page.read_text(), "the world changed: measure again what the page says, then state its digest"
