"""Where a step's data comes from: the image, a folder, a URI, a DVC repository at a revision; always the same bytes."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vapi.cluster import origin
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
        ("https://me:hunter2@host/a.git", "main", "data_uri holds a password"),
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


def test_a_file_that_changed_is_fetched_again(tmp_path: Path) -> None:
    """On this machine's disk, by another name: fsspec tells versions apart by size and time there, by ETag elsewhere."""
    folder = tmp_path / "source"
    (folder / "data").mkdir(parents=True)
    (folder / "data/a").write_text("one")
    uri = f"local://{folder}"
    root = origin.root(Origin(uri), ["data/a"], tmp_path / "state")
    assert (root / "data/a").read_text() == "one"
    (root / "data/a").write_text("ours")  # unchanged at its origin, it is not fetched again
    assert (origin.root(Origin(uri), ["data/a"], tmp_path / "state") / "data/a").read_text() == "ours"
    (folder / "data/a").write_text("three")
    assert (origin.root(Origin(uri), ["data/a"], tmp_path / "state") / "data/a").read_text() == "three"
    (folder / "data/b").write_text("b")
    assert (origin.root(Origin(uri), ["data/*"], tmp_path / "state") / "data/b").read_text() == "b"


def test_a_uri_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_uri http://127.0.0.1:9 .*(cannot be read|holds none of)"):
        origin.root(Origin("http://127.0.0.1:9"), NAMES, tmp_path)
    with pytest.raises(ValueError, match=r"data_uri is nonsense://x"):
        origin.root(Origin("nonsense://x"), NAMES, tmp_path)


# --- what is there -----------------------------------------------------------------------------


def test_the_files_of_a_configuration_are_known() -> None:
    found = origin.files(Config(), ["model", "tune", "evaluate"])
    assert found["model.generator"] == "data/models/generator.safetensors" and found["tune.perceptual"] == "data/models/reward.safetensors"
    assert "tune.perceptual_weights" not in found and "evaluate.dinov2" not in found, "fields that are empty"


def test_a_mark_changes_with_the_bytes_and_a_digest_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"one")
    settings = Config(model=ModelConfig(generator="a.bin", tokenizer="org/name/file.pt"))
    marks, digests = [origin.mark("a.bin")], [origin.digests(settings, ["model"])]
    (tmp_path / "a.bin").write_bytes(b"two!")
    marks.append(origin.mark("a.bin"))
    digests.append(origin.digests(settings, ["model"]))
    assert len(set(marks)) == 2 and digests[0] != digests[1]
    assert digests[0].keys() == {"model.generator"} and origin.mark("org/name/file.pt") == "org/name/file.pt"
    (tmp_path / "folder").mkdir()
    before = origin.mark("folder")
    (tmp_path / "folder/x").touch()
    assert origin.mark("folder") != before
