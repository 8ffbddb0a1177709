"""A stage as a step: what its artifacts hold, what lies on the volume under which key, and what it tells the tracker."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import world

from vapi import config, data, recipes, track
from vapi.cluster import origin, pages, preflight, step
from vapi.cluster.origin import Origin
from vapi.cluster.step import Command
from vapi.config import Config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write(tmp_path_factory.mktemp("world"))


@pytest.fixture
def volume(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("VAPI_STATE", "VAPI_WORK_DIR", "MLFLOW_TRACKING_URI", "KFP_RUN_ID", "TORCH_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what a step sets is taken back
    monkeypatch.chdir(root)
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


def plan(root: Path, stage: str = "subset", work_dir: str = "", **changes: Any) -> step.Plan:
    made = world.settings(recipes.recipe("digits"), **changes)
    return preflight.plans(made, Origin(str(root)), step.Place(root, Path(work_dir) if work_dir else None))[stage]


class Written:
    """In place of the stage's process: notes the command, and writes what a stage writes."""

    def __init__(self, code: int = 0, large: bytes = b"x" * (step.SMALL + 1)) -> None:
        self.commands: list[Command] = []
        self.code, self.large = code, large

    def __call__(self, command: Command) -> int:
        self.commands.append(command)
        out = command.folders["out"]
        if not self.code:
            out.mkdir(parents=True)
            (out / "large.bin").write_bytes(self.large)
            (out / "sheets").mkdir()
            (out / "sheets/one.png").write_bytes(b"png")
            data.write_json(out / "config.json", {"stage": command.stage})
        return self.code


# --- with a volume -----------------------------------------------------------------------------


def test_large_files_stay_on_the_volume_and_the_artifact_describes_them(root: Path, volume: Path, tmp_path: Path) -> None:
    write = Written()
    folder = step.run("subset", plan(root, work_dir=str(volume)), str(volume), str(tmp_path / "artifact"), write)
    assert folder.parent == volume / "artifacts/subset" and (folder / "large.bin").is_file()
    assert sorted(path.relative_to(tmp_path / "artifact").as_posix() for path in (tmp_path / "artifact").rglob("*") if path.is_file()) == [
        "config.json", "descriptor.json", "sheets/one.png",
    ]  # fmt: skip
    described = json.loads((tmp_path / "artifact/descriptor.json").read_text())
    assert described["path"] == str(folder) and described["sha256"] == data.file_digest(folder)
    assert described["bytes"] == {"config.json": 23, "large.bin": step.SMALL + 1, "sheets/one.png": 3}
    assert step.opened(tmp_path / "artifact") == folder


def test_the_key_is_of_configuration_data_and_code_and_of_no_run(
    root: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, made = Written(), set()

    def run(**changes: Any) -> Path:
        return step.run("subset", plan(root, work_dir=str(volume), **changes), str(volume), str(tmp_path / f"a{len(made)}"), write)

    made.add(run())
    monkeypatch.setenv("KFP_RUN_ID", "another")
    assert run() in made and len(write.commands) == 1, "a cloned run finds it"
    assert run(tune_lr=0.5) in made, "what the stage does not read is nothing to it"
    made.add(run(subset_seed=3))
    source = root / "data/digits/train.parquet"
    before = source.read_bytes()
    world.write_images(source, 60, seed=9)
    made.add(run())
    source.write_bytes(before)
    monkeypatch.setattr(data, "code_version", lambda: {"version": "1", "commit": "", "source": "other"})
    made.add(run())
    assert len(made) == len(write.commands) == 4


def test_the_key_is_of_what_earlier_steps_made(root: Path, volume: Path, tmp_path: Path) -> None:
    """Another subset, and nothing else, makes another key of its tokens."""
    made = set()
    for n, digest in enumerate(("a", "b", "a")):
        artifact = tmp_path / f"subset{n}"
        artifact.mkdir()
        data.write_json(artifact / "descriptor.json", {"path": str(root), "sha256": digest * 64, "bytes": {}})
        made.add(
            step.run("tokens", plan(root, "tokens", str(volume)), str(volume), str(tmp_path / f"t{n}"), Written(), subset=str(artifact))
        )
    assert len(made) == 2


def test_a_file_that_is_not_whole_is_refused(root: Path, volume: Path, tmp_path: Path) -> None:
    folder = step.run("subset", plan(root, work_dir=str(volume)), str(volume), str(tmp_path / "a"), Written())
    (folder / "large.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"large.bin is not here, or not whole"):
        step.opened(tmp_path / "a")


def test_two_runs_of_one_result_make_it_once(root: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, for a while."""
    made = plan(root, work_dir=str(volume))
    first = step.run("subset", made, str(volume), str(tmp_path / "a"), Written())
    shutil.rmtree(first)
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Written):
        def __call__(self, command: Command) -> int:
            entered.set()
            assert go_on.wait(20)
            return super().__call__(command)

    slow, second = Slow(), Written()
    thread = threading.Thread(target=step.run, args=("subset", made, str(volume), str(tmp_path / "b"), slow))
    thread.start()
    assert entered.wait(20)
    monkeypatch.setattr(step, "LOCK_SECONDS", 0.2)
    with pytest.raises(SystemExit):
        step.run("subset", made, str(volume), str(tmp_path / "c"), second)
    go_on.set()
    thread.join()
    assert step.run("subset", made, str(volume), str(tmp_path / "d"), second) == first and not second.commands


def test_a_folder_takes_the_place_of_a_volume_that_cannot_be_mounted(
    root: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAPI_WORK_DIR", str(volume))
    folder = step.run("subset", plan(root, work_dir="/mnt/vapi"), "/mnt/vapi", str(tmp_path / "a"), Written())
    assert folder.is_relative_to(volume)


def test_what_was_taken_away_is_made_again(root: Path, volume: Path, tmp_path: Path) -> None:
    write = Written()
    folder = step.run("subset", plan(root, work_dir=str(volume)), str(volume), str(tmp_path / "a"), write)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is not here, or not whole; mount the volume"):
        step.opened(tmp_path / "a")
    again = Written(large=b"y" * (step.SMALL + 2))
    assert step.run("subset", plan(root, work_dir=str(volume)), str(volume), str(tmp_path / "b"), again) == folder
    assert json.loads((tmp_path / "b/descriptor.json").read_text())["bytes"]["large.bin"] == step.SMALL + 2, "described anew"


def test_a_stage_that_fails_leaves_nothing_and_gives_its_code(
    root: Path, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        step.run("subset", plan(root, work_dir=str(volume)), str(volume), str(tmp_path / "a"), Written(code=75))
    assert stop.value.code == 75 and "vapi subset ended with code 75" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_registering_is_done_every_time_and_lies_nowhere(root: Path, volume: Path, tmp_path: Path) -> None:
    write = Written()
    inputs = {}
    for name in ("tune", "evaluate"):
        inputs[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    for n in range(2):
        folder = step.run("register", plan(root, "register", str(volume)), str(volume), str(tmp_path / f"r{n}"), write, **inputs)
        assert folder == tmp_path / f"r{n}"
    assert len(write.commands) == 2 and not (volume / "artifacts/register").exists()


def test_caches_of_published_weights_lie_on_the_volume(root: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.delenv(name)
    step.run("subset", plan(root, work_dir=str(volume)), str(volume), str(tmp_path / "a"), Written())
    assert os.environ["TORCH_HOME"] == f"{volume}/torch" and os.environ["VAPI_STATE"] == f"{volume}/.vapi"
    monkeypatch.setenv("TORCH_HOME", "")
    monkeypatch.setenv("HF_HOME", "")


# --- bad input ---------------------------------------------------------------------------------


def test_a_step_that_cannot_begin_says_why_without_a_traceback(
    root: Path, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    wrong = {
        "is the volume mounted there?": lambda: step.run("subset", plan(root), "/nowhere", str(tmp_path / "a"), Written()),
        "run the step that makes it again": lambda: step.run("tokens", plan(root, "tokens"), "", "x", Written(), subset="/none"),
        "holds no descriptor.json": lambda: step.run(
            "tokens", plan(root, "tokens", str(volume)), str(volume), "x", Written(), subset=str(tmp_path / "plain")
        ),
    }
    for words, call in wrong.items():
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_data_that_changed_since_preflight_is_refused(root: Path, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(root)
    made["files"]["subset.source"] = "0" * 64
    with pytest.raises(SystemExit):
        step.run("subset", made, "", str(tmp_path / "a"), Written())
    assert "subset.source has changed since preflight looked at it" in capsys.readouterr().err


# --- the stage's own process -------------------------------------------------------------------


def test_the_image_s_code_runs_wherever_the_data_lies(root: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of this project as the data's folder must not bring its code with it."""
    (tmp_path / "checkout/vapi").mkdir(parents=True)
    (tmp_path / "checkout/vapi/__init__.py").write_text("raise SystemExit('the checkout ran')")
    monkeypatch.chdir(tmp_path / "checkout")
    command = Command("subset", {"out": tmp_path / "out"}, Config(), {})
    assert step.here(command) == 2, "its data is not here"


def test_the_exit_code_of_the_stage_is_the_step_s(root: Path, volume: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        step.run("subset", plan(root, subset_images=61), "", str(tmp_path / "a"))
    captured = capfd.readouterr()
    assert stop.value.code == 2 and "subset.images is 61, and data/digits/train.parquet holds 60" in captured.out
    assert "vapi subset ended with code 2; its words are above" in captured.err


def test_mlflow_learns_which_run_and_which_data(
    root: Path, volume: Path, tmp_path: Path, mlflow_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copyfile(mlflow_db, database)
    uri = f"sqlite:///{database}"
    monkeypatch.setenv("KFP_RUN_ID", "0a1b2c3d-run")
    made = plan(root, track_uri=uri)
    made["data"] |= {"revision": "f" * 40, "digest": "d" * 32}
    monkeypatch.setattr(step, "_require_same", lambda *args: None)
    monkeypatch.setattr(origin, "root", lambda *args: root)
    step.run("subset", made, "", str(tmp_path / "a"))
    client = track.connect(uri)
    runs = client.search_runs([client.get_experiment_by_name("vapi").experiment_id])
    (parent,) = (run for run in runs if run.data.tags["stage"] == "pipeline")
    (child,) = (run for run in runs if run.data.tags["stage"] == "subset")
    assert parent.data.tags["vapi.execution"] == parent.data.tags["kubeflow.run"] == "0a1b2c3d-run"
    assert parent.data.tags["data"] == "d" * 32 and parent.data.tags["data.revision"] == "f" * 40
    assert parent.data.tags["git"] == made["code"]["commit"], "the code is the image's, wherever the data is from"
    assert parent.data.tags["data.uri"] == str(root) and child.data.params["subset.images"] == "40"
    assert "tune.lr" not in parent.data.params, "of the stages to come this step knows nothing"


def test_without_an_address_nothing_is_tracked(root: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step.settings_of(plan(root, track_uri="")).track.uri == "off"
    assert step.settings_of(plan(root, track_uri="http://x")).track.uri == "http://x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://y")
    assert step.settings_of(plan(root, track_uri="")).track.uri == ""


# --- pages -------------------------------------------------------------------------------------


def test_numbers_that_kubeflow_cannot_keep_are_left_out() -> None:
    assert pages.scalars({"a": 1, "b": float("nan"), "c": float("inf"), "d": "x", "e": True, "f": 0.5, "g": None}) == {"a": 1.0, "f": 0.5}


def test_a_registration_has_a_link_where_a_server_can_be_looked_at(tmp_path: Path) -> None:
    gate = {"metric": "fid", "rival": 1.0, "candidate": 0.9, "limit": 0.95, "margin": 0.05, "passed": True}
    against = {"challenger": {"rival": "base", "gates": [gate, {**gate, "candidate": None, "margin": None, "passed": False}]}}
    made = {"name": "m", "passed": {"challenger": True, "champion": False}, "against": against, "note": ""}
    for more, words in (
        ({"version": "3", "aliases": ["challenger"], "registry": "http://mlflow"}, "[m version 3](http://mlflow/#/models/m/versions/3)"),
        ({"version": "3", "aliases": ["challenger"], "registry": "sqlite:///x"}, "Registered: m version 3, challenger"),
        ({}, "there is no MLflow server"),
        ({"passed": {"challenger": False, "champion": False}}, "Not promoted: a gate is shut."),
    ):  # fmt: skip
        data.write_json(tmp_path / "registration.json", {**made, **more})
        page = pages.registration(tmp_path)
        assert words in page and "| fid | 1 | missing | 0.95 | missing | **no** |" in page


# --- what it costs -----------------------------------------------------------------------------


def test_a_step_loads_no_library_that_its_stage_has_to_load_again() -> None:
    program = (
        "import sys, vapi.cluster.step, vapi.cluster.pages; print({'torch', 'mlflow', 'kubernetes', 'pandas', 'dvc'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_plans_are_plain_values(root: Path, volume: Path) -> None:
    made = plan(root, "register")
    assert json.loads(json.dumps(made)) == made
    assert config.build(Config, {**config.plain(Config()), **made["config"]}).tune.steps == 6
