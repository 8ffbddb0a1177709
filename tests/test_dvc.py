"""DVC on a real clone of this project: the bundled data, experiments, and that nobody's file is ever lost.

The clone holds the files of the working tree and, in place of the embedded data, a few small painted
images and stand-in weights, bundled by the command that bundles the real ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from imports import ROOT
from PIL import Image

from vapi import config

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_", "MLFLOW_"))},
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.com", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.com",
}  # fmt: skip
WEIGHTS = ("generator", "metric", "reward", "tokenizer")


def call(clone: Path, *words: str, code: int = 0) -> str:
    """Run a command in a clone; its output. DVC keeps what it knows about files beside the clone, not for the whole machine."""
    environment = {**ENVIRONMENT, "DVC_SITE_CACHE_DIR": str(clone.parent / f"{clone.name}-site")}
    ran = subprocess.run(words, cwd=clone, env=environment, text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert ran.returncode == code, f"{words}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


def paint(path: Path, images: int) -> None:
    """A Parquet file of noise images as Hugging Face writes them, two classes."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(images):
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": encoded, "label": [n % 2 for n in range(images)]}), path)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository like ours, with tiny data in place of the embedded."""
    origin = tmp_path_factory.mktemp("dvc") / "origin"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file() and not name.startswith((".dvc/bundled", "data.dvc", "dvc.lock", "tests/", "docs/")):
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, origin / name)
    for part in ("train", "validation", "reference"):
        paint(origin / f"data/digits/{part}.parquet", 24)
    for network in WEIGHTS:
        (origin / f"data/models/{network}.safetensors").parent.mkdir(exist_ok=True)
        (origin / f"data/models/{network}.safetensors").write_text(network)
    text = (
        config.dump(config.Config())
        .replace("images: 2048", "images: 8")
        .replace("classes: 10", "classes: 2")
        .replace('uri: ""', "uri: off")
    )
    (origin / "params.yaml").write_text(text.replace("uri: ''", "uri: off"))
    call(origin, "git", "init", "-q", "-b", "main")
    call(origin, "make", "--assume-old=.venv/.setup-done", "bundle")
    call(origin, "git", "add", "-A")
    call(origin, "git", "commit", "-qm", "all")
    return origin


@pytest.fixture
def clone(origin: Path, tmp_path: Path) -> Path:
    call(tmp_path, "git", "clone", "-q", str(origin), "clone")
    return tmp_path / "clone"


def contents(clone: Path) -> dict[str, bytes]:
    return {str(path.relative_to(clone)): path.read_bytes() for path in sorted((clone / "data").rglob("*")) if path.is_file()}


def bundled(clone: Path) -> set[str]:
    return {str(path.relative_to(clone)) for path in (clone / ".dvc/bundled").rglob("*")}


def test_a_fresh_clone_gets_its_data_without_a_network(origin: Path, clone: Path) -> None:
    assert not (clone / "data/digits").exists()
    call(clone, "dvc", "pull", "data.dvc")
    assert contents(clone) == contents(origin)
    assert call(clone, "git", "status", "--short") == ""


def test_dvc_asks_nobody_and_has_no_default_remote(clone: Path) -> None:
    settings = call(clone, "dvc", "config", "--list")
    assert all(line in settings for line in ("core.analytics=false", "core.check_update=false", "core.autostage=false"))
    assert "core.remote" not in settings


MINE = {"data/notes.txt": b"mine", "data/digits/more.parquet": b"mine", "data/mine/image.png": b"mine"}
"""Files that a user puts beside ours."""


def put(clone: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(content)


def test_files_beside_ours_are_never_touched(origin: Path, clone: Path) -> None:
    put(clone, MINE)
    everything = {**contents(origin), **MINE}
    call(clone, "dvc", "pull", "data.dvc")
    assert contents(clone) == everything
    for words in (
        ["repro", "data.dvc", "listing"],
        ["pull", "--force", "data.dvc"],
        ["checkout", "--force", "data.dvc"],
        ["exp", "run", "--set-param", "subset.seed=1", "data.dvc", "listing"],
        ["exp", "run", "--temp", "--set-param", "subset.seed=2", "data.dvc", "listing"],
        ["gc", "--workspace", "--force"],
    ):
        call(clone, "dvc", *words)
        assert contents(clone) == everything, words


def test_a_file_of_the_user_in_our_place_is_not_overwritten(clone: Path) -> None:
    put(clone, {"data/digits/train.parquet": b"mine"})
    answer = call(clone, "dvc", "pull", "data.dvc", code=1)
    assert "train.parquet" in answer and "unsaved files" in answer
    assert (clone / "data/digits/train.parquet").read_bytes() == b"mine"


def test_an_edited_file_of_ours_stays_edited(clone: Path) -> None:
    """`dvc pull` refuses, a run adopts the edit into data.dvc, and only `git checkout data.dvc` with a pull brings ours back."""
    call(clone, "dvc", "pull", "--quiet", "data.dvc")
    edited = clone / "data/digits/train.parquet"
    ours = edited.read_bytes()
    paint(edited, 30)
    mine = edited.read_bytes()
    call(clone, "dvc", "pull", "data.dvc", code=1)
    assert edited.read_bytes() == mine
    experiment = ["exp", "run", "--set-param", "subset.seed=1", "data.dvc", "listing"]
    for words in (experiment, ["repro", "data.dvc"], ["pull", "data.dvc"], ["checkout", "data.dvc"]):
        call(clone, "dvc", *words)
        assert edited.read_bytes() == mine, words
    call(clone, "git", "checkout", "data.dvc")
    call(clone, "dvc", "pull", "data.dvc")
    assert edited.read_bytes() == ours


def test_values_set_by_an_experiment_arrive(clone: Path) -> None:
    """`dvc exp run -S tune.lr=2e-6` writes 2e-06 and a bare word, which plain PyYAML takes for a text and for False."""
    call(clone, "dvc", "pull", "--quiet", "data.dvc")
    call(clone, "dvc", "exp", "run", "-S", "tune.lr=2e-6", "-S", "track.uri=off", "-S", "subset.images=4", "listing")
    text = (clone / "params.yaml").read_text()
    assert "lr: 2e-06" in text and "uri: off" in text
    settings = config.load(clone / "params.yaml")
    assert (settings.tune.lr, settings.track.uri, settings.subset.images) == (2e-6, "off", 4)
    assert "--tune.lr 2.0e-06" in call(clone, sys.executable, "-m", "vapi", "tune", "--help")


# --- weights, wherever they lie ------------------------------------------------------------------


def set_model(clone: Path, **values: str) -> None:
    """Edit params.yaml as a user does."""
    params = clone / "params.yaml"
    for name, value in values.items():
        text = params.read_text()
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name}:")]
        params.write_text(text.replace(line, f"  {name}: {value}"))


def test_stages_depend_on_what_the_weights_are(clone: Path) -> None:
    call(clone, "dvc", "pull", "--quiet", "data.dvc")
    call(clone, "dvc", "repro", "weights")
    written = {name: (clone / f"artifacts/weights/{name}.json").read_text() for name in ("generator", "tokenizer")}
    (clone / "data/models/mine.safetensors").write_text("mine")
    set_model(clone, generator="data/models/mine.safetensors")
    call(clone, "dvc", "repro", "weights")
    now = {name: (clone / f"artifacts/weights/{name}.json").read_text() for name in written}
    assert now["tokenizer"] == written["tokenizer"] and now["generator"] != written["generator"]
    deps = config.read_yaml((clone / "dvc.yaml").read_text())["stages"]
    for stage in ("tune", "evaluate"):
        assert {f"artifacts/weights/{name}.json" for name in written} < set(deps[stage]["deps"])


def test_weights_on_a_hub(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub's own library, offline, on a cache as a download leaves it."""
    pytest.importorskip("huggingface_hub")
    commit, blob = "0" * 40, b"the weights of somebody"
    cache = clone.parent / "hub" / "models--someone--something"
    for path, content in (("refs/main", commit.encode()), (f"snapshots/{commit}/some/file.pt", blob)):
        (cache / path).parent.mkdir(parents=True)
        (cache / path).write_bytes(content)
    monkeypatch.setitem(ENVIRONMENT, "HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setitem(ENVIRONMENT, "HF_HUB_OFFLINE", "1")
    call(clone, "dvc", "pull", "--quiet", "data.dvc")
    set_model(clone, generator="someone/something/some/file.pt")
    call(clone, "dvc", "repro", "weights")
    assert hashlib.sha256(blob).hexdigest() in (clone / "artifacts/weights/generator.json").read_text()
    set_model(clone, generator="someone/something/some/other.pt")
    assert "is no local file, and the hub did not give it" in call(clone, "dvc", "repro", "weights", code=255)


# --- one clone in which the first stages have run ----------------------------------------------


@pytest.fixture(scope="module")
def reproduced(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduced")
    call(folder, "git", "clone", "-q", str(origin), "clone")
    call(folder / "clone", "dvc", "pull", "--quiet", "data.dvc")
    call(folder / "clone", "dvc", "repro", "subset")
    return folder / "clone"


def seconds(clone: Path, *words: str) -> float:
    """Processor time of a command and its children, which other work on the machine does not lengthen as it does the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call(clone, *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_second_repro_does_nothing_and_quickly(reproduced: Path) -> None:
    assert "Stage 'subset' didn't change, skipping" in call(reproduced, "dvc", "repro", "subset")
    assert seconds(reproduced, "dvc", "repro", "subset") - seconds(reproduced, "dvc", "--version") < 5


def test_a_push_never_fills_the_clone(reproduced: Path) -> None:
    before = bundled(reproduced)
    call(reproduced, "dvc", "push", code=1)
    assert bundled(reproduced) == before


def test_what_only_the_clock_decides_is_no_result(reproduced: Path) -> None:
    """provenance.json is outside DVC, so that a stage that makes the same again does not set off those after it."""
    lock = (reproduced / "dvc.lock").read_text()
    timing = reproduced / "artifacts/subset/provenance.json"
    made = timing.stat().st_mtime_ns
    call(reproduced, "dvc", "repro", "--force", "--single-item", "subset")
    assert timing.stat().st_mtime_ns > made and (reproduced / "dvc.lock").read_text() == lock


def test_a_changed_source_is_noticed(reproduced: Path) -> None:
    manifest = (reproduced / "artifacts/subset/manifest.parquet").read_bytes()
    paint(reproduced / "data/digits/train.parquet", 40)
    assert "Running stage 'subset'" in call(reproduced, "dvc", "repro", "subset")
    assert (reproduced / "artifacts/subset/manifest.parquet").read_bytes() != manifest
