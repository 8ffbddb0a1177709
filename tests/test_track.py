"""Nothing is lost, nothing is sent twice, and no run waits for a server."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SenderThread
from PIL import Image

from vapi import compare, config, data, track
from vapi.config import Config
from vapi.track import sender

REPO = Path(__file__).parent.parent
NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_db: Path) -> Path:
    """An empty project with a database of its own, entered."""
    return enter_project(tmp_path / "clone", monkeypatch, mlflow_db)


@pytest.fixture
def project(clone: Path, sender_thread: None) -> Path:
    """The same, with the sender in this process."""
    return clone


def enter_project(folder: Path, monkeypatch: pytest.MonkeyPatch, mlflow_db: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "params.yaml").write_text(config.dump(Config()))
    (folder / "mlflow.db").write_bytes(mlflow_db.read_bytes())
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    return folder


def settings(lr: float = 1e-5, **tracking: str) -> Config:
    values = config.plain(Config())
    values["tune"]["lr"] = lr
    values["track"] |= tracking
    return config.build(Config, values)


def client(project: Path) -> Any:
    return track.connect(f"sqlite:///{project / 'mlflow.db'}")


def runs(project: Path) -> dict[str, list[Any]]:
    """All runs of the project, by stage, the oldest first."""
    mlflow = client(project)
    experiment = mlflow.get_experiment_by_name("vapi")
    found: dict[str, list[Any]] = {}
    for run in mlflow.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
        found.setdefault(run.data.tags["stage"], []).append(run)
    return found


def files(project: Path, run: Any) -> list[str]:
    return sorted(str(p.relative_to(project / "mlruns")) for p in (project / "mlruns").rglob(f"*{run.info.run_id}*/**/*") if p.is_file())


def test_a_stage_arrives_with_everything_it_logged(project: Path) -> None:
    (project / "notes.txt").write_text("as it was")
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    with track.start("tune", settings(lr=2e-6)) as run:
        for step in range(20):
            run.metrics({"tune/reward": step / 2, "tune/loss": float("nan")}, step)
        run.image("samples/tune", picture, 10)
        run.image("samples/best", picture)
        run.metrics({"tuned/fid": 9.5})
        run.artifact("notes.txt", "text")
        run.dataset("digits", "d" * 64, "data/digits")
        run.tag("colour", "blue")
        (project / "notes.txt").write_text("changed later")
    found = runs(project)
    (child,), (parent,) = found["tune"], found["pipeline"]

    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert child.data.params["tune.lr"] == parent.data.params["tune.lr"] == "2e-06"
    assert "subset.source" in parent.data.params and "subset.source" not in child.data.params
    assert "evaluate.samples" not in parent.data.params, "the stages to come log theirs"
    history = client(project).get_metric_history(child.info.run_id, "tune/reward")
    assert [(m.step, m.value) for m in history] == [(step, step / 2) for step in range(20)]
    assert parent.data.metrics == {"tuned/fid": 9.5}
    assert child.data.tags["colour"] == "blue" and child.data.tags["mlflow.loggedImages"] == "True"
    assert [d.dataset.digest for d in child.inputs.dataset_inputs] == ["d" * 36]
    names = [Path(name).name for name in files(project, child)]
    assert sum(name.startswith("samples~tune+step+10+timestamp+") for name in names) == 2  # the picture and its thumbnail
    assert sum("samples~best" in name for name in files(project, parent)) == 2
    assert next((project / "mlruns").rglob("text/notes.txt")).read_text() == "as it was"
    assert not list((project / ".vapi").rglob("files/*"))  # the copies are gone once they are sent


def test_files_lie_beside_the_database_wherever_the_stage_stands(project: Path) -> None:
    elsewhere = project.parent / "volume"
    elsewhere.mkdir()
    (project / "mlflow.db").rename(elsewhere / "mlflow.db")
    (project / "notes.txt").touch()
    with track.start("tune", settings(uri=f"sqlite:///{elsewhere}/mlflow.db")) as run:
        run.artifact("notes.txt", "text")
    (child,) = runs(elsewhere)["tune"]
    assert "text/notes.txt" in files(elsewhere, child)[0] and not (project / "mlruns").exists()


def test_stages_of_one_configuration_meet_and_others_do_not(project: Path) -> None:
    output = project / "artifacts" / "subset" / "config.json"
    with track.start("subset", settings()):
        output.parent.mkdir(parents=True)
        output.write_text("{}")
    with track.start("tune", settings(lr=3e-6)):
        pass  # here DVC has skipped subset: its result is that of the other execution
    with track.start("subset", settings(experiment="vapi")):
        pass
    found = runs(project)
    first, second = found["pipeline"]
    assert [run.data.tags["mlflow.parentRunId"] for run in found["subset"]] == [first.info.run_id] * 2
    assert found["tune"][0].data.tags["mlflow.parentRunId"] == second.info.run_id
    assert second.data.tags["vapi.from.subset"] == found["subset"][0].info.run_id
    assert "vapi.from.subset" not in first.data.tags


def test_what_was_deleted_of_a_run_is_said_when_it_is_fetched(project: Path, tmp_path: Path) -> None:
    output = project / "artifacts" / "subset" / "config.json"
    with track.start("subset", settings()):
        output.parent.mkdir(parents=True)
        output.write_text("{}")
    with track.start("tune", settings(lr=3e-6)) as run:
        run.metrics({"tune/ce": 4.0}, 1)
    found, mlflow, uri = runs(project), client(project), f"sqlite:///{project / 'mlflow.db'}"
    first, second = (run.info.run_id for run in found["pipeline"])
    assert set(compare.read("whole", track.fetch(second, uri, tmp_path / "whole")).folders) == {"subset", "tune"}
    mlflow.delete_run(found["subset"][0].info.run_id)
    mlflow.set_tag(second, "vapi.from.tokens", "f" * 32)  # one that is purged
    run = compare.read("rest", track.fetch(second, uri, tmp_path / "rest"))
    assert set(run.folders) == {"tune"}
    for stage in ("subset", "tokens"):
        assert any(f"its stage {stage} is not shown" in notice and "deleted in MLflow" in notice for notice in run.notices)
    mlflow.delete_run(second)
    run = compare.read("child", track.fetch(found["tune"][0].info.run_id, uri, tmp_path / "child"))
    assert set(run.folders) == {"tune"} and f"the run above it, {second}, was deleted" in run.notices[0]
    with pytest.raises(ValueError, match=f"{second} is neither a folder here nor a run's id(.|\n)*{first}"):
        track.fetch(second, uri, tmp_path / "nothing")


def test_execution_follows_configuration_and_data_alone(project: Path) -> None:
    before = track.execution(settings())
    assert track.execution(settings(uri="http://elsewhere", experiment="other")) == before
    assert track.execution(settings(lr=3e-6)) != before
    (project / "data.dvc").write_text("outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  path: data\n")
    assert track.execution(settings()) != before
    assert track.data_digest(settings()) == "0123456789abcdef0123456789abcdef.dir"


def test_an_unreachable_server_costs_a_notice_and_the_numbers_are_sent_later(
    clone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    begin = time.monotonic()
    with track.start("tune", settings()) as run:
        run.metrics({"tune/reward": 1.0}, 3)
        with pytest.raises(ValueError, match="cannot be reached.*start it"):
            run.server()
    assert time.monotonic() - begin < 8
    assert len(caplog.messages) == 1 and "vapi track --resend" in caplog.text
    (folder,) = track.waiting()
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace(NOWHERE, f"sqlite:///{clone / 'mlflow.db'}"))
    assert track.resend() == 0
    assert runs(clone)["tune"][0].data.metrics == {"tune/reward": 1.0}


def test_one_journal_that_cannot_be_sent_does_not_hold_up_the_others(clone: Path) -> None:
    for stage, uri in (("tokens", NOWHERE), ("tune", NOWHERE)):
        with track.start(stage, settings(uri=uri)) as run:
            run.metrics({"x": 1.0}, 1)
    stuck, free = track.waiting()
    assert "tokens" in stuck.name
    journal = free / "journal.jsonl"
    journal.write_text(journal.read_text().replace(NOWHERE, f"sqlite:///{clone / 'mlflow.db'}"))
    assert track.resend() == 1 and track.waiting() == [stuck]
    assert runs(clone)["tune"][0].data.metrics == {"x": 1.0}


def test_a_server_that_accepts_and_never_answers_does_not_hold_up_a_run(clone: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with track.start("tune", settings(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")) as run:
            run.metrics({"tune/reward": 1.0}, 1)
        assert time.monotonic() - begin < 10
    assert len(track.waiting()) == 1


class Slow(BaseHTTPRequestHandler):
    """A server that is there, and takes its time to refuse a login."""

    def do_GET(self) -> None:
        if self.path != "/health":
            time.sleep(1)
        self.send_response(200 if self.path == "/health" else 401)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def test_a_server_that_answers_is_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "GRACE", 0.5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (
            track.start("register", settings(uri=f"http://127.0.0.1:{server.server_port}")) as run,
            pytest.raises(ValueError, match="error code 401"),  # its own word, not that none came
        ):
            run.server()
        server.shutdown()
    assert len(track.waiting()) == 1


KILLED = """
import os, signal
from vapi import track
from vapi.config import Config
with track.start("tune", Config()) as run:
    for step in range(100):
        run.metrics({"tune/reward": float(step)}, step)
        if step == 40:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_that_cannot_say_what_a_run_is_ends_the_question_with_its_words(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sender._HASTY:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for uri, words in ((NOWHERE, "Connection refused"), (f"http://127.0.0.1:{silent.getsockname()[1]}", "timed out")):
            with pytest.raises(
                ValueError, match=f"^here is no folder here, and cannot be looked up .*{words}.* start it, or point track.uri"
            ):
                track.fetch("here", uri, clone / "fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(server.socket):
        for ask in (track.fetch, track.attach):
            with pytest.raises(ValueError, match=r"^MLflow at http://127.* says: .*failed with error code"):
                ask("f" * 32, f"http://127.0.0.1:{server.server_port}", clone / "page.html")
        server.shutdown()


def test_a_killed_run_is_reported_and_the_same_command_goes_on_in_it(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (path.parent for path in data.state_dir("track").rglob("journal.jsonl"))
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"do": "metrics", "ti')  # the kill came in the middle of a word
    wait_for(lambda: not track.waiting())  # the process beside it outlived it
    run = runs(clone)["tune"][0]
    assert run.info.status == "KILLED" and run.data.metrics == {"tune/reward": 40.0}

    monkeypatch.setattr(track.sender, "spawn", SenderThread)
    with track.start("tune", Config()) as again:
        again.metrics({"tune/reward": 41.0}, 41)
    (resumed,) = runs(clone)["tune"]
    assert resumed.info.run_id == run.info.run_id and resumed.info.status == "FINISHED"
    history = client(clone).get_metric_history(run.info.run_id, "tune/reward")
    assert [m.step for m in history] == list(range(42))


def test_a_journal_whose_sender_died_too_is_sent_whole_and_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track.sender, "PIECE", 7)
    with track.start("tune", settings()) as run:
        for step in range(30):
            run.metrics({"tune/reward": float(step)}, step)
        run.image("samples/tune", Image.new("RGB", (4, 4)), 5)
        kept = {path: path.read_bytes() for path in run.folder.rglob("*.png")}  # type: ignore[attr-defined]
    run.sender.wait()  # type: ignore[attr-defined]
    # as if the sender had been killed between sending a piece and noting that it did
    state = track.State.read(run.folder)  # type: ignore[attr-defined]
    with (run.folder / "journal.jsonl").open("rb") as file:  # type: ignore[attr-defined]
        state.offset, state.done = sum(len(file.readline()) for _ in range(9)), False
    state.write(run.folder)  # type: ignore[attr-defined]
    for path, content in kept.items():
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert len(track.waiting()) == 1
    with track.start("subset", settings()):
        pass  # the next run brings along what others left
    wait_for(lambda: not track.waiting())
    (child,) = runs(project)["tune"]
    assert [m.step for m in client(project).get_metric_history(child.info.run_id, "tune/reward")] == list(range(30))
    assert len(files(project, child)) == 2


def test_a_sender_waits_for_another_that_is_at_work(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    with track.start("tune", settings()) as run:
        second = SenderThread(run.folder)  # type: ignore[attr-defined]
        run.metrics({"tune/loss": 2.0}, 1)
    second.join()
    (child,) = runs(project)["tune"]
    assert child.data.metrics == {"tune/loss": 2.0} and not caplog.messages


def test_a_run_killed_before_its_first_word_is_in_nobody_s_way(project: Path) -> None:
    folder = data.state_dir("track", track.execution(settings()), "tune-0")
    (folder / "journal.jsonl").write_text('{"do": "sta')
    assert track.waiting() == []
    with track.start("tune", settings()) as run:
        run.metrics({"tune/loss": 2.0}, 1)
    assert runs(project)["tune"][0].data.metrics == {"tune/loss": 2.0}


def test_what_the_server_refuses_does_not_hold_up_the_rest(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    with track.start("tune", settings()) as run:
        run.params({"colour": "blue"})
        run.params({"colour": "red"})  # MLflow keeps the first value of a parameter
        run.metrics({"odd@name, (really)": 1.0, "tune/loss": 2.0}, 0)
    (child,) = runs(project)["tune"]
    assert child.data.params["colour"] == "blue"
    assert child.data.metrics == {"odd_name_ _really_": 1.0, "tune/loss": 2.0}
    assert "colour" in caplog.text


def test_an_exception_marks_the_run_failed_and_an_interrupt_killed(project: Path) -> None:
    with pytest.raises(ValueError, match="our own"), track.start("tokens", settings()):
        raise ValueError("our own")
    with pytest.raises(SystemExit), track.start("subset", settings()):
        sys.exit(75)
    found = runs(project)
    assert (found["tokens"][0].info.status, found["subset"][0].info.status) == ("FAILED", "KILLED")


def test_an_injected_run_takes_everything_and_its_parent_the_final_numbers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client(project)
    experiment = mlflow.create_experiment("someone's pipeline")
    parent = mlflow.create_run(experiment)
    child = mlflow.create_run(experiment, tags={"mlflow.parentRunId": parent.info.run_id})
    monkeypatch.setenv("MLFLOW_RUN_ID", child.info.run_id)
    with track.start("evaluate", settings()) as run:
        run.metrics({"tune/loss": 1.0}, 1)
        run.metrics({"tuned/fid": 9.0})
    child, parent = mlflow.get_run(child.info.run_id), mlflow.get_run(parent.info.run_id)
    assert child.data.metrics == {"tune/loss": 1.0, "tuned/fid": 9.0} and parent.data.metrics == {"tuned/fid": 9.0}
    assert child.data.tags["stage"] == "evaluate" and child.data.params["evaluate.temperature"] == "1.0"
    assert child.info.status == "RUNNING"  # whoever made it ends it
    assert mlflow.get_experiment_by_name("vapi") is None


def test_off_and_other_ranks_leave_no_trace(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with track.start("tune", settings(uri="off")) as run:
        run.metrics({"tune/loss": 1.0}, 1)
        assert run.server() is None
    monkeypatch.setenv("RANK", "1")
    with track.start("tune", settings()) as run:
        run.image("samples/tune", Image.new("RGB", (4, 4)), 5)
    assert not (project / ".vapi").exists()


def test_a_throw_away_copy_of_dvc_reports_to_the_clone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = project / ".dvc" / "tmp" / "exps" / "tmpabc"
    copy.mkdir(parents=True)
    (copy / "params.yaml").write_text("")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_EXP_NAME", "brisk-otter")
    with track.start("tune", settings()) as run:
        run.metrics({"tune/loss": 1.0}, 1)
    assert runs(project)["pipeline"][0].info.run_name.startswith("brisk-otter ")
    assert runs(project)["tune"][0].data.tags["DVC_EXP_NAME"] == "brisk-otter"
    assert not (copy / "mlflow.db").exists() and not (copy / ".vapi").exists()


def test_four_processes_that_meet_in_a_new_project_all_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_db: Path) -> None:
    project = enter_project(tmp_path / "fresh", monkeypatch, mlflow_db)
    (project / "mlflow.db").unlink()
    code = "import sys; from vapi import track; from vapi.config import Config\nwith track.start(sys.argv[1], Config()): pass"
    stages = [subprocess.Popen([sys.executable, "-c", code, stage]) for stage in ("subset", "tokens", "tune", "evaluate")]
    assert [stage.wait() for stage in stages] == [0, 0, 0, 0]
    wait_for(lambda: not track.waiting())
    found = runs(project)
    assert sorted(found) == ["evaluate", "pipeline", "subset", "tokens", "tune"]
    assert all(len(same) == 1 for same in found.values())


def test_the_plain_ui_looks_where_the_runs_are(project: Path) -> None:
    from mlflow.tracking._tracking_service.utils import _get_default_tracking_uri

    with track.start("tune", settings()):
        pass
    assert (project / _get_default_tracking_uri().removeprefix("sqlite:///")).samefile(project / "mlflow.db")
    assert all(run.info.artifact_uri.startswith(str(project / "mlruns")) for same in runs(project).values() for run in same)


def test_tracking_imports_the_library_only_when_it_sends() -> None:
    code = "import sys; from importlib.util import find_spec; import vapi.track; print('mlflow' in sys.modules, find_spec('mlflow').origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "False"
    assert "site-packages" in found[1]  # and not the folder mlflow/ of this project
    assert not (REPO / "mlflow" / "__init__.py").exists() and not (REPO / "mlflow" / "mlflow.py").exists()


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
