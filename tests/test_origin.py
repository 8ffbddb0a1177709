"""Where a step's data comes from: the image, a folder, a URI, a DVC repository at a revision; always the same bytes."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import ROOT

from vapi import config, keys, track
from vapi.cluster import origin, preflight, step
from vapi.cluster.origin import Origin
from vapi.config import Config, ModelConfig

NAMES = ["data/digits/train.parquet", "data/models/generator.safetensors"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.com", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.com",
}  # fmt: skip


def run(folder: Path, *words: str) -> str:
    environment = {**ENVIRONMENT, "DVC_SITE_CACHE_DIR": str(folder.parent / "site")}
    ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A DVC repository with a remote in its own folder, as ours has, and its commits, the oldest first."""
    folder = tmp_path_factory.mktemp("dvc") / "repository"
    (folder / "data/digits").mkdir(parents=True)
    (folder / "data/models").mkdir()
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "remote", "add", "--default", "bundled", str(folder / ".dvc/bundled"))
    (folder / ".dvc/config").write_text("[core]\n    remote = bundled\n['remote \"bundled\"']\n    url = bundled\n")
    (folder / "notes.txt").write_text("git's own")
    commits = []
    for version in ("one", "two"):
        for name in NAMES:
            (folder / name).write_text(f"{name} {version}")
        run(folder, "dvc", "add", "-q", "data/digits", "data/models/generator.safetensors")
        run(folder, "dvc", "push", "-q")
        run(folder, "git", "add", "-A")
        run(folder, "git", "commit", "-qm", version)
        commits.append(run(folder, "git", "rev-parse", "HEAD"))
    run(folder, "git", "tag", "v1", commits[0])
    return folder, commits


def test_without_a_uri_the_image_holds_the_data(tmp_path: Path) -> None:
    assert origin.root(Origin(), NAMES, tmp_path) == origin.IMAGE
    assert (origin.IMAGE / "vapi/cluster/origin.py").is_file()


def test_a_mounted_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert origin.root(Origin(str(tmp_path)), NAMES, tmp_path) == tmp_path == origin.root(Origin(f"file://{tmp_path}"), NAMES, tmp_path)
    with pytest.raises(ValueError, match="there is no such folder; mount the volume"):
        origin.root(Origin(str(tmp_path / "none")), NAMES, tmp_path)


def test_a_repository_gives_the_bytes_of_its_revision(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, commits = repository
    for commit, version in zip(commits, ("one", "two")):
        root = origin.root(Origin(f"file://{folder}", commit), NAMES, tmp_path)
        assert [(root / name).read_text() for name in NAMES] == [f"{name} {version}" for name in NAMES]
        assert (root / "notes.txt").read_text() == "git's own" and (root / "data/digits.dvc").is_file()


def test_only_what_is_read_is_fetched(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, commits = repository
    root = origin.root(Origin(str(folder), commits[1]), [NAMES[1], "org/name/file.pt", "data/nothing.npz"], tmp_path)
    assert (root / NAMES[1]).is_file() and not (root / NAMES[0]).exists()
    assert origin.root(Origin(str(folder), commits[1]), ["data/digits/*.parquet"], tmp_path) == root
    assert (root / NAMES[0]).is_file(), "a pattern's folder is fetched"


def test_part_of_a_folder_is_not_taken_for_all_of_it(tmp_path: Path) -> None:
    """DVC tracks a folder as one thing. A step wants one file of it, another a pattern, a third the whole."""
    folder = tmp_path / "repository"
    (folder / "data/digits").mkdir(parents=True)
    for name in ("a.parquet", "b.parquet", "notes.txt"):
        (folder / "data/digits" / name).write_text(name)
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    run(folder, "dvc", "add", "-q", "data/digits")
    run(folder, "dvc", "push", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "one")
    source = Origin(str(folder), run(folder, "git", "rev-parse", "HEAD"))
    state = tmp_path / "state"

    def there(name: str) -> list[str]:
        return sorted(path.name for path in (origin.root(source, [name], state) / "data/digits").glob("*"))

    assert there("data/digits/a.parquet") == ["a.parquet"]
    assert "b.parquet" in there("data/digits/*.parquet")
    assert there("data/digits") == ["a.parquet", "b.parquet", "notes.txt"]
    assert origin.bytes_of(source, ["data/digits", "data/digits/*.parquet", "data/none"], state) == {
        "data/digits": 27, "data/digits/*.parquet": 18,
    }  # fmt: skip


def test_origins_are_waited_for_one_by_one(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Who fetches from one keeps nobody from another, and only one fetches from it."""
    folder, commits = repository
    source = Origin(str(folder), commits[0])
    with origin._held(source, tmp_path):
        assert origin.root(Origin(f"local://{folder}"), ["notes.txt"], tmp_path)
        thread = threading.Thread(target=origin.root, args=(source, [], tmp_path))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(20)
    assert not thread.is_alive()


def test_a_tag_becomes_the_commit_it_means_now(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, commits = repository
    assert origin.resolve(Origin(str(folder), "v1"), tmp_path) == Origin(str(folder), commits[0])
    assert origin.resolve(Origin(str(folder), "main"), tmp_path).revision == commits[1]
    assert origin.resolve(Origin(), tmp_path) == Origin()


def test_a_commit_is_cloned_once(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, commits = repository
    root = origin.root(Origin(str(folder), commits[0]), [], tmp_path)
    (root / "mark").touch()
    assert (origin.root(Origin(str(folder), commits[0]), [], tmp_path) / "mark").exists()


@pytest.mark.parametrize(
    ("uri", "revision", "words"),
    [
        ("https://me:hunter2@host/a.git", "main", "data_uri holds a login or a signature"),
        ("https://hunter2@host/a.git", "main", "data_uri holds a login or a signature"),
        ("https://host/a?sig=hunter2", "", "data_uri holds a login or a signature"),
        ("https://host/a.git", "", "give data_revision"),
        ("git@host:a.git", "", "give data_revision"),
        ("", "main", "data_revision is given without data_uri"),
    ],
)
def test_a_field_that_lacks_another_is_refused_at_once(uri: str, revision: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Origin(uri, revision)
    assert "hunter2" not in str(error.value)


def test_a_repository_that_is_not_there_is_named(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.git cannot be cloned"):
        origin.root(Origin(f"{tmp_path}/nowhere.git", "main"), NAMES, tmp_path)
    with pytest.raises(ValueError, match="data_revision 'nonsense' is not in .*has it been pushed"):
        origin.root(Origin(str(repository[0]), "nonsense"), NAMES, tmp_path)


def test_data_that_dvc_cannot_fetch_is_named(repository: tuple[Path, list[str]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run(tmp_path, "git", "clone", "-q", str(repository[0]), str(copy))
    run(copy, "git", "rm", "-qr", ".dvc/bundled")
    run(copy, "git", "commit", "-qm", "without the bytes")
    commit = run(copy, "git", "rev-parse", "HEAD")
    with pytest.raises(ValueError, match=r"DVC cannot fetch data/digits/train.parquet"):
        origin.root(Origin(str(copy), commit), NAMES, tmp_path / "state")


# --- a URI -------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server over a folder, and the folder."""
    folder = tmp_path / "web"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_a_uri_is_copied_file_by_file(web: tuple[str, Path], tmp_path: Path) -> None:
    uri, _ = web
    root = origin.root(Origin(uri), [*NAMES, "data/none.npz", "/absolute"], tmp_path / "state")
    assert [(root / name).read_text() for name in NAMES] == NAMES and not (root / "data/none.npz").exists()


def test_a_file_that_changed_is_fetched_again_and_others_are_not(web: tuple[str, Path], tmp_path: Path) -> None:
    uri, folder = web
    root = origin.root(Origin(uri), NAMES, tmp_path / "state")
    (root / NAMES[0]).write_text("ours")  # unchanged at its origin, it is not fetched again
    (folder / NAMES[1]).write_text("changed")
    os.utime(folder / NAMES[1], (10**9, 10**9))
    assert origin.root(Origin(uri), NAMES, tmp_path / "state") == root
    assert [(root / name).read_text() for name in NAMES] == ["ours", "changed"]


def test_a_folder_is_fetched_file_by_file(tmp_path: Path) -> None:
    folder, state = tmp_path / "source", tmp_path / "state"
    (folder / "data/deep").mkdir(parents=True)
    (folder / "data/a").write_text("one")
    (folder / "data/deep/b").write_text("b")
    root = origin.root(Origin(f"local://{folder}"), ["data"], state)
    assert (root / "data/deep/b").read_text() == "b"
    (root / "data/deep/b").write_text("ours")
    (folder / "data/a").write_text("three")
    (folder / "data/deep/c").write_text("c")
    origin.root(Origin(f"local://{folder}"), ["data"], state)
    assert [(root / f"data/{name}").read_text() for name in ("a", "deep/b", "deep/c")] == ["three", "ours", "c"]
    assert origin.bytes_of(Origin(f"local://{folder}"), ["data", "data/d*/*", "none"], state) == {"data": 7, "data/d*/*": 2}


def test_an_origin_that_does_not_tell_versions_apart_is_always_read() -> None:
    assert origin._version({"size": 3, "name": "x"}) == ""
    assert origin._version({"size": 3, "ETag": "a"}) != origin._version({"size": 3, "ETag": "b"})


@pytest.mark.parametrize("name", ["../artifacts", "data/../../x", "../../../etc/passwd"])
def test_a_name_that_leads_out_of_the_data_is_refused(repository: tuple[Path, list[str]], tmp_path: Path, name: str) -> None:
    """It is a field that anybody fills in, and next to what is fetched lie the results of others."""
    (tmp_path / "state/fetched").mkdir(parents=True)
    kept = tmp_path / "state/artifacts"
    kept.mkdir()
    for source in (Origin(f"local://{tmp_path}"), Origin(str(repository[0]), repository[1][0])):
        with pytest.raises(ValueError, match="leads out of the data"):
            origin.root(source, [name], tmp_path / "state")
        with pytest.raises(ValueError, match="leads out of the data"):
            origin.bytes_of(source, [name], tmp_path / "state")
    assert kept.is_dir()


def test_a_uri_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_uri http://127.0.0.1:9 .*(cannot be read|holds none of)"):
        origin.root(Origin("http://127.0.0.1:9"), NAMES, tmp_path)
    with pytest.raises(ValueError, match=r"data_uri is nonsense://x"):
        origin.root(Origin("nonsense://x"), NAMES, tmp_path)


# --- what is there -----------------------------------------------------------------------------


def test_the_files_of_a_configuration_are_known() -> None:
    found = config.named_files(Config(), ["model", "tune", "evaluate"])
    assert found["model.generator"] == "data/models/generator.safetensors" and found["tune.perceptual"] == "data/models/reward.safetensors"
    assert "tune.perceptual_weights" not in found and "evaluate.dinov2" not in found, "fields that are empty"


def test_a_mark_changes_with_the_bytes_and_a_digest_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"one")
    settings = Config(model=ModelConfig(generator="a.bin", tokenizer="org/name/file.pt"))
    marks, digests = [keys.mark("a.bin")], [origin.digests(settings, ["model"])]
    (tmp_path / "a.bin").write_bytes(b"two!")
    marks.append(keys.mark("a.bin"))
    digests.append(origin.digests(settings, ["model"]))
    assert len(set(marks)) == 2 and digests[0] != digests[1]
    assert digests[0].keys() == {"model.generator"} and keys.mark("org/name/file.pt") == "org/name/file.pt"
    (tmp_path / "folder").mkdir()
    before = keys.mark("folder")
    (tmp_path / "folder/x").touch()
    assert keys.mark("folder") != before


def test_a_cluster_s_run_and_a_repro_read_the_same_bytes_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This very project's data as the origin: the digest that MLflow is told, and the files themselves, are those of the clone."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / ".dvc/bundled", clone / ".dvc/bundled")
    for name in (".dvc/config", "data.dvc", "params.yaml"):
        shutil.copyfile(ROOT / name, clone / name)
    run(clone, "git", "init", "-q", "-b", "main")
    run(clone, "git", "add", "-A")
    run(clone, "git", "commit", "-qm", "one")
    commit = run(clone, "git", "rev-parse", "HEAD")
    source = origin.resolve(Origin(f"file://{clone}", "main"), tmp_path)
    settings = Config()
    wanted = config.named_files(settings, ["subset", "model"])
    root = origin.root(source, wanted.values(), tmp_path)
    for name in wanted.values():
        md5 = hashlib.md5((root / name).read_bytes()).hexdigest()
        assert f"md5: {md5}" in (clone / "data.dvc").read_text(), name
    monkeypatch.chdir(root)
    told = preflight.plans(settings, source, step.Place(tmp_path))["tune"]["data"]
    monkeypatch.chdir(clone)
    assert told == {"uri": f"file://{clone}", "revision": commit, "digest": track.data_digest(settings)}
