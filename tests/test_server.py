"""submit, schedule and check against servers that speak Kubeflow's protocol, a registry's and Kubernetes', errors included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stubs
from imports import ROOT
from kfp import components

from pipelines import commands, packages, pipeline, registry, server, worktree
from vapi import config, recipes


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[stubs.Kubeflow]:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path))  # where kfp keeps a namespace, and docker its logins
    monkeypatch.delenv("VAPI_DEBUG", raising=False)
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIES"):
        monkeypatch.delenv(name, raising=False)
    with stubs.serving(stubs.Kubeflow()) as stub:
        yield stub


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stubs.Kubernetes]:
    with stubs.serving(stubs.Kubernetes()) as stub:
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(stub.kubeconfig(tmp_path)))
        yield stub


def images(status: int = 200) -> stubs.Stub:
    """A registry with one image."""
    stub = stubs.Stub()
    stub.route("HEAD", "/v2/team/vapi/manifests/1.2.3")(lambda request: (status, {}))
    return stub


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = commands.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def submit(capsys: pytest.CaptureFixture[str], stub: stubs.Kubeflow, *words: str) -> tuple[int, str, str]:
    return call(capsys, "submit", "digits", "--endpoint", stub.url, "--no-check", *words)


# --- submit ------------------------------------------------------------------------------------


def test_a_package_is_uploaded_once_and_run_each_time(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        code, out, _ = submit(capsys, kubeflow, "-p", "tune_lr=2e-6", "-p", "evaluate_seeds=[0, 1]", "-p", "tune_steps=7")
        assert code == 0 and f"{kubeflow.url}/#/runs/details/r-" in out
    assert len(kubeflow.asked("POST .*/pipelines$")) == len(kubeflow.asked("POST .*/upload_version$")) == 1
    version = server.version_of(packages.COMPILED / "digits.yaml")
    assert [one["display_name"] for one in kubeflow.versions["p-digits"]] == [version]
    first, second = kubeflow.runs.values()
    assert first["pipeline_version_reference"] == {"pipeline_id": "p-digits", "pipeline_version_id": f"v-{version}"}
    assert first["runtime_config"]["parameters"] == {"tune_lr": 2e-6, "evaluate_seeds": [0, 1], "tune_steps": 7}
    assert first["experiment_id"] == second["experiment_id"] == "e-vapi"


def test_waiting_follows_the_run_and_its_end_is_the_exit_code(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    kubeflow.tasks = [
        {"display_name": "root", "state": "RUNNING"},
        {"display_name": "Tune", "state": "RUNNING", "parent_task_id": "1"},
        {"display_name": "tune-driver", "state": "SUCCEEDED", "parent_task_id": "1"},
    ]
    code, out, _ = submit(capsys, kubeflow, "--wait")
    assert code == 0 and out.count("Tune: running") == 1 and "succeeded" in out and "driver" not in out
    kubeflow.states = ["RUNNING", "FAILED"]
    code, out, _ = submit(capsys, kubeflow, "--wait")
    assert code == 1 and "failed, task tune failed" in out
    kubeflow.states = ["CANCELED"]
    assert submit(capsys, kubeflow, "--wait")[0] == 1


def test_a_server_that_stumbles_while_it_is_followed_is_forgiven(
    kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([500, 503])
    plain = kubeflow._look

    def look(request: stubs.Request, which: str) -> stubs.Answer:
        status = next(answers, 200)
        return plain(request, which) if status == 200 else (status, {"message": "later"})

    kubeflow.routes.insert(0, ("GET", "/apis/v2beta1/runs/([^/]+)", look))
    assert submit(capsys, kubeflow, "--wait")[0] == 0
    monkeypatch.setattr(server, "PATIENCE", 0.0)
    kubeflow.faults["GET .*/runs/"] = 500
    code, _, err = submit(capsys, kubeflow, "--wait")
    assert code == 2 and "HTTP 500" in err


def test_a_login_that_runs_out_ends_the_waiting_and_not_the_run(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    kubeflow.faults["GET .*/runs/"] = 401
    code, out, err = submit(capsys, kubeflow, "--wait")
    assert code == 2 and "KF_PIPELINES_TOKEN" in err and f"the run goes on: {kubeflow.url}/#/runs/details/r-0" in err
    assert out.count("http") == 1, "kfp's own links are not shown beside ours"


@pytest.mark.parametrize(
    ("pattern", "fault", "words"),
    [
        ("POST .*/runs", 401, "does not accept this login; set KF_PIPELINES_TOKEN"),
        ("POST .*/runs", 403, "does not allow this; check --namespace"),
        ("GET .*/pipelines", 404, "does --endpoint lead to Kubeflow Pipelines"),
        ("POST .*/upload_version", 409, "has one of that name already"),
        ("POST .*/experiments", 500, "HTTP 500: Internal Server Error; fault 500"),
        ("POST .*/runs", "cut", "cannot be reached"),
        ("POST .*/runs", "hang", "cannot be reached"),
    ],
)
def test_what_the_server_says_is_one_line(
    kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pattern: str, fault: Any, words: str
) -> None:
    monkeypatch.setattr(server, "SECONDS", 1)
    kubeflow.faults[pattern] = fault
    code, _, err = submit(capsys, kubeflow)
    assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1


def test_profiles_have_pipelines_of_their_own(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    for namespace in ("a", "b", "a", "a"):
        assert submit(capsys, kubeflow, "--namespace", namespace)[0] == 0
    assert kubeflow.pipelines == {("a", "digits"): "p-a-digits", ("b", "digits"): "p-b-digits"}
    assert [len(versions) for versions in kubeflow.versions.values()] == [1, 1]
    used = [run["pipeline_version_reference"]["pipeline_id"] for run in kubeflow.runs.values()]
    assert used == ["p-a-digits", "p-b-digits", "p-a-digits", "p-a-digits"]


def test_somebody_who_was_faster_is_no_error(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    listed = iter([[], [{"pipeline_id": "p-digits", "display_name": "digits"}]])
    kubeflow.pipelines["", "digits"], kubeflow.versions["p-digits"] = "p-digits", []
    kubeflow.routes.insert(0, ("GET", "/apis/v2beta1/pipelines", lambda request: (200, {"pipelines": next(listed)})))
    assert submit(capsys, kubeflow)[0] == 0 and kubeflow.versions["p-digits"]


def test_login_and_namespace_are_sent(
    kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "t0ken")
    monkeypatch.setenv("KF_PIPELINES_COOKIES", "a=b")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url)
    assert call(capsys, "submit", "digits", "--no-check", "--namespace", "team", "--name", "mine", "--experiment", "e")[0] == 0
    (made,) = kubeflow.asked("POST .*/runs")
    assert made.headers["Authorization"] == "Bearer t0ken" and made.headers["Cookie"] == "a=b" and made.json["display_name"] == "mine"
    assert kubeflow.asked("POST .*/experiments")[0].json["namespace"] == "team"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["submit", "digits"], "where is Kubeflow?"),
        (["submit", "digits", "--endpoint", "kubeflow.local"], "it begins with http://"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "-p", "tune_lr=quick"], "tune_lr is 'quick'; it must be a float"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "-p", "subset_images=-1"], "subset_images is -1"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "-p", "tune_steps=0"], "tune_steps is 0; it must be at least 1"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "-p", "evaluate_guidance=-1"], "evaluate_guidance is -1.0"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "-p", "overrides={tune.temprature: 1}"], "did you mean 'temperature'?"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "--no-check"], "cannot be reached"),
        (["schedule", "digits", "--endpoint", "http://127.0.0.1:9", "--cron", "0 2 * * *"], "it has six fields"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "--no-check", "-p", "data_uri=https://me:x@h/a.git"], "holds a login"),
        (["submit", "digits", "--endpoint", "http://127.0.0.1:9", "--no-check", "-p", "cluster_tolerations=[nvidia]"], "a toleration is a"),
        (["submit", "llamagen-xxl-c2i", "--endpoint", "http://127.0.0.1:9", "-p", "cluster_volume="], "cluster_volume is empty"),
        (
            ["submit", "llamagen-xxl-c2i", "--endpoint", "http://127.0.0.1:9", "-p", "cluster_volume=a.b"],
            "cluster_volume is 'a.b'; Kubeflow",
        ),
        (["submit", "llamagen-xxl-c2i-trainjob", "--endpoint", "http://127.0.0.1:9", "-p", "tune_nodes=0"], "tune_nodes is 0"),
        (["submit", "nothing", "--endpoint", "http://127.0.0.1:9"], "no recipe is called 'nothing'"),
        (["submit", "digits-prior-alone", "--endpoint", "http://x"], "python -m pipelines compile digits-prior-alone"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(
    kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    code, _, err = call(capsys, *words)
    assert code == 2 and complaint in err and err.startswith("error: ")


# --- schedule ----------------------------------------------------------------------------------


def test_a_recurring_run_is_made(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["schedule", "digits", "--endpoint", kubeflow.url, "--no-check", "--cron", "0 0 2 * * *", "-p", "tune_steps=7"]
    code, out, _ = call(capsys, *words)
    assert code == 0 and "recurring run rr-1" in out
    (made,) = kubeflow.recurring
    assert made["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *" and made["max_concurrency"] in (1, "1") and made["no_catchup"]
    assert made["runtime_config"]["parameters"] == {"tune_steps": 7}
    kubeflow.faults["recurringruns"] = 403
    assert call(capsys, *words)[0] == 2


# --- check -------------------------------------------------------------------------------------


def test_check_looks_at_everything_and_submit_refuses_what_it_finds(
    kubeflow: stubs.Kubeflow, kubernetes: stubs.Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    with stubs.serving(images()) as shelf:
        image = f"{shelf.url.removeprefix('http://')}/team/vapi:1.2.3"
        words = ["llamagen-xxl-c2i", "--endpoint", kubeflow.url, "-p", f"cluster_image={image}"]
        code, out, _ = call(capsys, "check", *words)
        assert code == 0, out
        assert "failed" not in out and all(
            name in out for name in ("endpoint", "cluster_image", "tune_gpus", "cluster_volume", "track_uri")
        )
        kubernetes.nodes = [stubs.node("a", gpus=4)]
        code, out, _ = call(capsys, "check", *words)
        assert code == 2 and out.splitlines()[-1].startswith("failed") and "largest node has 4" in out
        code, _, err = call(capsys, "submit", *words)
        assert code == 2 and "tune_gpus: asks for 8" in err and "--no-check" in err and not kubeflow.runs
        assert call(capsys, "submit", *words, "-p", "tune_gpus=4", "-p", "tokens_gpus=4", "-p", "evaluate_gpus=4")[0] == 0


def test_check_judges_the_package_and_says_that_it_is_stale(
    kubeflow: stubs.Kubeflow, kubernetes: stubs.Kubernetes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of whatever recipe and under whatever name: what a package asks for is in it."""
    facts = tmp_path / "cluster.yaml"
    facts.write_text(packages.CLUSTER.read_text().replace("memory: 512Gi", "memory: 5000Gi"))
    assert call(capsys, "compile", "llamagen-xl-c2i-official-trainjob", "--cluster", str(facts), "--out", str(tmp_path))[0] == 0
    mine = (tmp_path / "llamagen-xl-c2i-official-trainjob.yaml").rename(tmp_path / "mine.yaml")
    code, out, _ = call(capsys, "check", str(mine), "--endpoint", kubeflow.url)
    assert code == 2 and "asks for 64 cpu, 5000Gi memory" in out and "trainer.runtime" in out
    (tmp_path / "other.yaml").write_text("a: b")
    assert "is no package that python -m pipelines compile made" in call(capsys, "check", str(tmp_path / "other.yaml"))[2]


def test_check_names_a_reward_that_nobody_knows(kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "check", "digits", "--endpoint", kubeflow.url, "-p", "tune_rewards={lpip: 1}")
    assert code == 2 and "no reward is called 'lpip'; did you mean 'lpips'?" in out


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.17.0", "ok"), ("v2.18.1", "ok"), ("3.0.0", "ok"), ("2.16.1", "failed"), ("1.8.22", "failed"), ("unknown", "warning")],
)
def test_a_server_that_is_too_old_is_named(kubeflow: stubs.Kubeflow, version: str, status: str) -> None:
    kubeflow.version = version
    (found,) = server.check(server.Login(kubeflow.url))
    assert found.status == status and found.field == "endpoint", found


@pytest.mark.parametrize(
    ("fault", "words"), [(401, "KF_PIPELINES_TOKEN"), (404, "lead to Kubeflow Pipelines"), (500, "HTTP 500"), ("cut", "is it running?")]
)
def test_a_server_that_does_not_answer_is_named(kubeflow: stubs.Kubeflow, fault: Any, words: str) -> None:
    kubeflow.faults["healthz"] = fault
    (found,) = server.check(server.Login(kubeflow.url))
    assert found.status == "failed" and words in found.found


def test_a_login_page_in_place_of_kubeflow_is_named() -> None:
    stub = stubs.Stub()
    stub.route("GET", "/apis/v2beta1/healthz")(lambda request: (200, b"<html>log in</html>"))
    with stubs.serving(stub):
        (found,) = server.check(server.Login(stub.url))
    assert found.status == "failed" and "is a login page in between?" in found.found


def test_without_a_kubeconfig_check_warns(
    kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with stubs.serving(images()) as shelf:
        words = ["check", "digits", "--endpoint", kubeflow.url, "-p", f"cluster_image={shelf.url.removeprefix('http://')}/team/vapi:1.2.3"]
        code, out, _ = call(capsys, *words)
    assert code == 0 and "nodes, volume and secrets were not looked at" in out


# --- the registry of images --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("vapi:1.0", ("registry-1.docker.io", "library/vapi", "1.0")),
        ("team/vapi:1.0", ("registry-1.docker.io", "team/vapi", "1.0")),
        ("ghcr.io/team/vapi:1.0", ("ghcr.io", "team/vapi", "1.0")),
        ("localhost:5000/vapi@sha256:ab", ("localhost:5000", "vapi", "sha256:ab")),
        ("r.example.com/a/b/c:1@sha256:cd", ("r.example.com", "a/b/c", "sha256:cd")),
    ],
)
def test_a_name_has_three_parts(image: str, parts: tuple[str, str, str]) -> None:
    assert registry.split(image) == parts


@pytest.mark.parametrize(
    ("status", "expected", "words"),
    [
        (200, "ok", "is there"),
        (404, "failed", "has no team/vapi 1.2.3; push it"),
        (401, "warning", "wants a login"),
        (500, "warning", "HTTP 500"),
    ],
)
def test_the_registry_is_asked(kubeflow: stubs.Kubeflow, status: int, expected: str, words: str) -> None:
    with stubs.serving(images(status)) as shelf:
        found = registry.check(f"{shelf.url.removeprefix('http://')}/team/vapi:1.2.3")
    assert (found.status, found.field) == (expected, "cluster_image") and words in found.found


def test_a_token_is_fetched_where_the_registry_wants_one(kubeflow: stubs.Kubeflow, tmp_path: Path) -> None:
    shelf = stubs.Stub()

    def manifest(request: stubs.Request) -> stubs.Answer:
        if request.headers.get("Authorization") == "Bearer abc":
            return 200, {}
        challenge = f'Bearer realm="{shelf.url}/token",service="shelf",scope="repository:team/vapi:pull"'
        return 401, ({}, {"WWW-Authenticate": challenge})

    shelf.route("HEAD", "/v2/team/vapi/manifests/1.2.3")(manifest)
    shelf.route("GET", "/token")(lambda request: (200, {"token": "abc"}))
    with stubs.serving(shelf):
        host = shelf.url.removeprefix("http://")
        (tmp_path / ".docker").mkdir()
        (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {host: {"auth": "bWU6c2VjcmV0"}}}))
        assert registry.check(f"{host}/team/vapi:1.2.3").status == "ok"
        (asked,) = shelf.asked("GET /token")
    assert (
        asked.query == {"service": "shelf", "scope": "repository:team/vapi:pull"} and asked.headers["Authorization"] == "Basic bWU6c2VjcmV0"
    )


def test_names_that_say_enough_by_themselves() -> None:
    assert "the placeholder" in registry.check("registry.example.com/vapi:0.1.0").found
    assert registry.check("ghcr.io/team/vapi:latest").status == "failed"
    assert registry.check("127.0.0.1:9/team/vapi:1").status == "warning"


# --- from the working tree ---------------------------------------------------------------------


ADDRESS = "https://example.com/team/clone.git"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with params.yaml, pushed to a remote, whose address then is one of the network."""
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "remote.git")
    git(tmp_path, "clone", "-q", str(tmp_path / "remote.git"), "clone")
    clone = tmp_path / "clone"
    text = recipes.text("digits").replace("steps: 100", "steps: 7").replace("  temperature: 1.0", "  temperature: 0.9", 1)
    (clone / "params.yaml").write_text(text)
    (clone / "dvc.lock").write_text("one")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "one")
    git(clone, "push", "-q", "origin", "HEAD:main")
    git(clone, "remote", "set-url", "origin", ADDRESS)
    return clone


def git(folder: Path, *words: str) -> str:
    names = {f"GIT_{who}_{what}": "t@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(["git", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def taken(clone: Path, dirty: bool = False) -> dict[str, Any]:
    """What a run of the tree takes over."""
    form = components.load_component_from_file(str(packages.COMPILED / "digits.yaml"))
    return worktree.values(clone, form, config.plain(recipes.recipe("digits")), dirty)


def test_a_run_takes_the_tree_s_values_and_revision(clone: Path) -> None:
    assert taken(clone) == {
        "tune_steps": 7,
        "overrides": {"tune.temperature": 0.9},
        "data_uri": ADDRESS,
        "data_revision": git(clone, "rev-parse", "HEAD"),
    }
    assert worktree.closest(clone) == "digits"


def test_edits_are_refused_but_for_dvc_lock(clone: Path) -> None:
    (clone / "dvc.lock").write_text("this machine ran a stage")
    (clone / "notes.txt").write_text("nothing that a run depends on is untracked")
    assert taken(clone)
    (clone / "params.yaml").write_text(recipes.text("digits"))
    with pytest.raises(ValueError, match=r"params.yaml differ from the last commit.*--dirty"):
        taken(clone)
    assert "tune_steps" not in taken(clone, dirty=True)


def test_a_commit_that_nobody_else_has_is_refused(clone: Path, tmp_path: Path) -> None:
    git(clone, "remote", "set-url", "origin", str(tmp_path / "remote.git"))
    with pytest.raises(ValueError, match="a folder of this machine"):
        taken(clone)
    (clone / "params.yaml").write_text(recipes.text("digits"))
    git(clone, "commit", "-qam", "two")
    with pytest.raises(ValueError, match="is in none of origin yet; git push"):
        taken(clone)
    git(clone, "remote", "remove", "origin")
    with pytest.raises(ValueError, match="this clone has no remote"):
        taken(clone)


def test_data_that_was_edited_or_never_pushed_is_refused(clone: Path, tmp_path: Path) -> None:
    """What DVC tracks is as much of a revision as what git does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVC_SITE_CACHE_DIR": str(tmp_path / "site")}

    def dvc(*words: str) -> None:
        subprocess.run(["dvc", *words], cwd=clone, env=environment, capture_output=True, check=True)

    dvc("init", "-q")
    (clone / "data").write_text("one")
    dvc("add", "-q", "data")
    dvc("remote", "add", "-q", "--default", "store", str(tmp_path / "store"))
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "data")
    git(clone, "push", "-q", str(tmp_path / "remote.git"), "HEAD:main")
    git(clone, "update-ref", "refs/remotes/origin/main", "HEAD")
    with pytest.raises(ValueError, match="data are in no remote of DVC's; dvc push"):
        taken(clone)
    dvc("push", "-q")
    assert taken(clone)
    (clone / "data").unlink()
    assert taken(clone), "data that was not pulled yet is no edit"
    (clone / "data").write_text("two")
    with pytest.raises(ValueError, match="data differ from the last commit"):
        taken(clone)
    assert taken(clone, dirty=True)


def test_submit_from_dvc(
    clone: Path, kubeflow: stubs.Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "ROOT", clone)
    words = ["submit", "--from-dvc", "--endpoint", kubeflow.url, "--no-check"]
    assert call(capsys, *words, "-p", "tune_lr=1e-5", "-p", "overrides={tune.beta1: 0.5}")[0] == 0
    assert call(capsys, *words, "-p", "data_uri=/mnt/data")[0] == 0
    first, second = (run["runtime_config"]["parameters"] for run in kubeflow.runs.values())
    assert first["tune_steps"] == 7 and first["tune_lr"] == 1e-5 and len(first["data_revision"]) == 40
    assert first["overrides"] == {"tune.temperature": 0.9, "tune.beta1": 0.5}
    assert second["data_uri"] == "/mnt/data" and "data_revision" not in second


def test_the_recipe_of_a_tree_becomes_no_changes() -> None:
    for name in packages.PUBLISHED:
        base = config.plain(recipes.recipe(name))
        form = pipeline.fields(recipes.RECIPES[name].gpu, nodes=False)
        assert worktree.changes(recipes.recipe(name), base, form) == {}
        assert worktree.changes(config.build(config.Config, base), base, form) == {}


# --- manifests ---------------------------------------------------------------------------------


def test_manifests_name_the_namespace_and_only_these_secrets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "cluster.yaml"
    path.write_text(
        packages.CLUSTER.read_text()
        .replace("secrets: {}", "secrets: {login: {user: A}}")
        .replace("storage_class: ''", "storage_class: nfs")
    )
    code, out, _ = call(capsys, "manifests", "--cluster", str(path), "--namespace", "team", "--service-account", "me")
    objects = {one["kind"]: one for one in yaml.safe_load_all(out)}
    assert code == 0 and objects["PersistentVolumeClaim"]["spec"]["storageClassName"] == "nfs"
    assert objects["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": "me", "namespace": "team"}]
    secrets = [rule for rule in objects["Role"]["rules"] if "secrets" in rule["resources"]]
    assert secrets == [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["login"]}]
    assert objects["ClusterRoleBinding"]["roleRef"]["name"] == objects["ClusterRole"]["metadata"]["name"]
    none = list(yaml.safe_load_all((ROOT / "pipelines/manifests/rbac.yaml").read_text()))
    assert not [rule for rule in none[0]["rules"] if "secrets" in rule["resources"]]


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in commands.COMMANDS)])
def test_help_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        commands.main(words)
    assert stop.value.code == 0 and "usage: python -m pipelines" in capsys.readouterr().out


def test_it_is_a_program() -> None:
    ran = subprocess.run([sys.executable, "-m", "pipelines", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and all(f"    {name}" in ran.stdout for name in commands.COMMANDS)
