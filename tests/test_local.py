"""Compiled packages in kfp's own local runner: the numbers of the stages to the last bit, and a run that survives its killing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import world
from imports import ROOT

from pipelines import pipeline
from vapi import cli, config, recipes
from vapi.config import STAGES, Config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write(tmp_path_factory.mktemp("world"))


def command(package: str, made: Config, root: Path, out: Path, *more: str) -> list[str]:
    """``python -m pipelines run-local`` on the tiny world."""
    recipe, gpu = recipes.recipe(package), recipes.RECIPES[package].gpu
    values = world.fields(pipeline.fields(gpu, nodes=False), made, recipe) | {"data_uri": str(root), "track_uri": "off"}
    fields = [
        word for name, value in values.items() for word in ("-p", f"{name}={value if isinstance(value, str) else config.scalar(value)}")
    ]
    return [sys.executable, "-m", "pipelines", "run-local", package, "--root", str(out), *fields, *more]


def run(words: list[str], folder: Path, code: int = 0) -> str:
    """Run it in another folder, as a user may."""
    ran = subprocess.run(words, cwd=folder, env=world.ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == code, ran.stdout[-6000:] + ran.stderr[-2000:]
    return ran.stdout + ran.stderr


def stages(made: Config, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stages as a terminal or DVC runs them; their artifacts."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("VAPI_STATE", str(folder / "state"))
    for stage, spec in STAGES.items():
        inputs = {name: folder / name for name in spec.inputs}
        cli.run_stage(stage, made, {**inputs, "out": folder / stage})
    return folder


def made_by(out: Path) -> Path:
    """The last local run's folder."""
    return max((path for path in out.iterdir() if path.is_dir() and path.name != "volume"), key=lambda path: path.stat().st_mtime)


def contents(folder: Path) -> dict[str, bytes]:
    skipped = ("provenance.json", "report.html")  # (a page that shows the code's version and no time; its numbers are compared)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skipped}


def test_the_compiled_package_makes_what_the_stages_make_to_the_last_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.settings(recipes.recipe("digits"))
    out = run(command("digits", made, root, tmp_path / "kubeflow"), ROOT)
    assert "the packages" not in out
    ours, artifacts = made_by(tmp_path / "kubeflow"), stages(made, root, tmp_path / "stages", monkeypatch)
    for stage, artifact in {
        "subset": "subset",
        "tokens": "tokens",
        "tune": "model",
        "evaluate": "evaluation",
        "register": "registration",
    }.items():
        theirs = contents(ours / stage / artifact)
        assert theirs == contents(artifacts / stage), stage
        assert theirs, stage
    # what the graph shows
    assert "<svg" in (ours / "tune/curves").read_text() and (ours / "tune/curves").read_text().count("data:image/png;base64") == 2
    assert (ours / "subset/quality").read_text() == (artifacts / "subset/quality.html").read_text()
    assert "http" not in (ours / "evaluate/report").read_text().replace("http://www.w3.org", "")
    assert "codes per image | 16" in (ours / "tokens/summary").read_text() and "| form | ok |" in (ours / "preflight/checks").read_text()
    assert "challenger" in (ours / "register/verdict").read_text()
    numbers = json.loads((ours / "evaluate/executor_output.json").read_text())["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    results = json.loads((artifacts / "evaluate/metrics.json").read_text())
    assert numbers["base_fid"] == results["base"]["fid"] and numbers["tuned_fid"] == results["tuned"]["fid"]


def test_a_killed_run_continues_and_a_cloned_one_finds_everything(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the paper's run, eight GPUs compiled in, here on a CPU: its tune step's processes are killed, and the
    same run again goes on from the last checkpoint on the volume. A third one finds every result there."""
    recipe = recipes.recipe("llamagen-xl-c2i")
    made = world.settings(recipe, tune_steps=12)
    words = command("llamagen-xl-c2i", made, root, tmp_path / "kubeflow")
    with subprocess.Popen(
        words, cwd=ROOT, env=world.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as child:
        checkpoint = _wait_for(tmp_path / "kubeflow/volume/.vapi/resume/tune", "checkpoint.pt", child)
        (stage,) = (pid for pid, line in _processes().items() if "vapi tune" in line and str(tmp_path) in line)
        step = int(Path(f"/proc/{stage}/stat").read_text().rpartition(")")[2].split()[1])
        os.killpg(os.getpgid(step), signal.SIGKILL)  # the box and kfp; the stage has a session of its own, and must die with it
        assert child.wait(60) != 0
    assert not [line for line in _processes().values() if "vapi tune" in line and str(tmp_path) in line], "nothing goes on"
    assert checkpoint.is_file(), "what was done is on the volume"
    again = run(words, ROOT)
    assert "continuing after step" in again and "holds this result already" in again
    third = run(words, ROOT)
    assert third.count("holds this result already") == 4 and "step 12 of 12" not in third

    volume = tmp_path / "kubeflow/volume/artifacts"
    descriptor = json.loads((made_by(tmp_path / "kubeflow") / "tune/model/descriptor.json").read_text())
    assert Path(descriptor["path"]).parent == volume / "tune" and descriptor["bytes"]["model.safetensors"] > 0
    whole = stages(made, root, tmp_path / "stages", monkeypatch)
    assert (Path(descriptor["path"]) / "model.safetensors").read_bytes() == (whole / "tune/model.safetensors").read_bytes()


def _wait_for(folder: Path, name: str, child: subprocess.Popen[str]) -> Path:
    for _ in range(1200):
        if found := list(folder.glob(f"*/{name}")):
            return found[0]
        assert child.poll() is None, child.stdout.read() if child.stdout else ""
        time.sleep(0.1)
    raise AssertionError(f"no {name}")


def _processes() -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def test_sigterm_saves_and_ends_everything(root: Path, tmp_path: Path) -> None:
    made = world.settings(recipes.recipe("llamagen-xl-c2i"), tune_steps=200, tune_checkpoint_every=1000)
    words = command("llamagen-xl-c2i", made, root, tmp_path / "kubeflow")
    with subprocess.Popen(words, cwd=ROOT, env=world.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        numbers = _wait_for(tmp_path / "kubeflow/volume/.vapi/resume/tune", "metrics.jsonl", child)
        while numbers.read_text().count("\n") < 2:  # it trains
            assert child.poll() is None
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=60)
    assert child.returncode != 0
    deadline = time.monotonic() + 30
    while [line for line in _processes().values() if "vapi tune" in line and str(tmp_path) in line]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list((tmp_path / "kubeflow/volume/.vapi/resume/tune").glob("*/checkpoint.pt")), out[-3000:]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["digitz"], "no recipe is called 'digitz'; did you mean 'digits'?"),
        (["digits", "-p", "tune_lr=quick"], "tune_lr is 'quick'; it must be a float"),
        (["digits", "-p", "tune_lrr=1"], "the form has no field 'tune_lrr'; did you mean 'tune_lr'?"),
        (["digits", "-p", "tune_lr"], "'tune_lr' is no field and value"),
        (["digits", "-p", "tune_steps=0"], "tune_steps is 0; it must be at least 1"),
        (["digits", "-p", "overrides={tune.temprature: 1}"], "tune has no field 'temprature'; did you mean 'temperature'?"),
        (["digits", "-p", "evaluate_seeds=3"], "evaluate_seeds is 3; it must be a list"),
        (["digits", "-p", "overrides=[1]"], "overrides is [1]; it must be a mapping"),
        (["digits", "-p", "model_generator=/opt/python3.11/x"], "cannot have 'python3' in a value"),
        (["none.yaml"], "none.yaml is not here"),
        ([], "which package?"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    words: list[str], complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import commands, local

    monkeypatch.setenv(local.SUPERVISED, "1")
    monkeypatch.delenv("VAPI_DEBUG", raising=False)
    monkeypatch.setenv("VAPI_STATE", str(tmp_path))
    assert commands.main(["run-local", *words, "--root", str(tmp_path)]) == 2
    err = capfd.readouterr().err.strip()
    assert complaint in err and err.startswith("error: ") and "\n" not in err
