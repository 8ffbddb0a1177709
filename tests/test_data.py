"""Folders on disk: whole or not at all, and the same to the bit."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vapi import data, images
from vapi.config import ModelConfig, SubsetConfig


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def rows(count: int) -> list[data.Row]:
    made = []
    for i in range(count):
        png = images.png_bytes(Image.new("RGB", (20, 16), (i % 256, 7, 9)))
        made.append(data.Row(f"k{i}", i % 10, f"caption {i}", 20, 16, "RGB", png, hashlib.sha256(png).hexdigest()))
    return made


def write(out: Path, count: int) -> None:
    with data.output_folder(out, "subset") as folder:
        data.write_subset(folder, rows(count))
        data.describe(folder, "subset", {"subset": SubsetConfig()}, {"source": "abc"}, 1.5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_root_is_the_clone_around_throw_away_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "clone" / ".dvc" / "tmp" / "exps" / "standalone" / "x1"
    (copy / ".dvc").mkdir(parents=True)
    (copy / "vapi").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(copy))
    assert data.project_root() == tmp_path / "clone"
    monkeypatch.delenv("DVC_ROOT")
    for place, root in ((copy / "vapi", "clone"), (tmp_path / "clone", "clone")):
        monkeypatch.chdir(place)
        assert data.project_root() == tmp_path / root
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "params.yaml").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert data.state_dir("a", "b") == tmp_path / "elsewhere" / ".vapi" / "a" / "b" and data.state_dir("a").is_dir()


def test_state_that_cannot_be_kept_here_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot make .*/file/locks: .*VAPI_STATE"):
        data.state_dir("locks")


def test_the_commit_is_the_clones_or_what_the_image_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAPI_COMMIT", raising=False)
    assert data._commit(tmp_path) == ""
    monkeypatch.setenv("VAPI_COMMIT", "0123abc")
    assert data._commit(tmp_path) == "0123abc"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert data._commit(tmp_path) == "", "a clone without a commit is not that of the image"
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert data._commit(tmp_path) == head


def test_a_result_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "artifacts" / "subset"
    write(out, 3)
    with pytest.raises(RuntimeError), data.output_folder(out, "subset") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert names(out.parent) == ["subset"] and len(data.read_subset(out)) == 3  # the old one is still there
    (out.parent / ".subset.partial").mkdir()  # what a killed process leaves
    (out.parent / ".subset.partial" / "junk").touch()
    write(out, 5)
    assert names(out.parent) == ["subset"] and len(data.read_subset(out)) == 5 and "junk" not in names(out)


def test_foreign_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "holiday"
    mine.mkdir()
    (mine / "beach.jpg").write_text("mine")
    with pytest.raises(ValueError, match="no stage of vapi wrote"):
        write(mine, 1)
    (mine / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no stage of vapi wrote"):
        write(mine, 1)
    (mine / "config.json").write_text('{"stage": "tune"}')
    with pytest.raises(ValueError, match="holds the result of vapi tune"):
        write(mine, 1)
    with pytest.raises(ValueError, match="is a file"):
        write(mine / "beach.jpg", 1)
    assert names(mine) == ["beach.jpg", "config.json"] and (mine / "beach.jpg").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 1)


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for count in (1, 2):
        write(tmp_path / "out", count)
    assert (tmp_path / "out").is_symlink() and len(data.read_subset(tmp_path / "disk")) == 2
    assert names(tmp_path) == [".vapi", "disk", "out"]


def test_killed_between_its_two_renames_it_restores_the_earlier_result(tmp_path: Path) -> None:
    write(tmp_path / "out", 2)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(RuntimeError), data.output_folder(tmp_path / "out", "subset"):
        raise RuntimeError
    assert names(tmp_path) == [".vapi", "out"] and len(data.read_subset(tmp_path / "out")) == 2


def test_mount_points_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="is a mount point"):
        write(Path("/proc"), 1)


def test_a_read_only_result_is_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path / "out", 1)
    (tmp_path / "out").chmod(0o555)
    code = (
        "import sys; from pathlib import Path; from vapi import data\nwith data.output_folder(Path(sys.argv[1]), 'subset'): print('began')"
    )
    mortal = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    ran = subprocess.run([*mortal, sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert "is read-only" in ran.stderr and "began" not in ran.stdout
    assert len(data.read_subset(tmp_path / "out")) == 1


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # permissions do not stop root, a file in the way does
    with pytest.raises(ValueError, match="cannot write to"):
        write(tmp_path / "file" / "subset", 1)
    with pytest.raises(ValueError, match="cannot write to"):
        write(Path("/proc/vapi/subset"), 1)


def _hold(path: Path, seconds: float) -> None:
    with data.locked(path):
        path.with_suffix(".held").touch()
        time.sleep(seconds)


def test_a_second_process_is_refused_or_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "x.lock"
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(lock, 0.8))
    other.start()
    while not lock.with_suffix(".held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is at work"), data.locked(lock, wait=False):
        pass
    with data.locked(lock):
        assert "waiting for another process" in capsys.readouterr().err
    other.join()


def test_repeating_a_command_gives_the_same_bits(tmp_path: Path) -> None:
    digests = []
    for out in (tmp_path / "a", tmp_path / "b"):
        write(out, 40)
        assert set(json.loads((out / "provenance.json").read_text())["code"]) == {"version", "commit", "source"}
        (out / "provenance.json").write_text(str(time.time()))
        digests.append(data.file_digest(out))
    assert digests[0] == digests[1]
    (tmp_path / "b" / "more").touch()
    assert data.file_digest(tmp_path / "b") != digests[0]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["stage"] == "subset" and config["sections"]["subset"]["images"] == 2048 and config["inputs"] == {"source": "abc"}
    with pytest.raises(ValueError, match="is not here"):
        data.file_digest(tmp_path / "c")


@pytest.mark.parametrize("per_shard", [7, 32, 50, 1000])
def test_subset_gives_back_every_byte(tmp_path: Path, per_shard: int) -> None:
    original = rows(101)
    data.write_subset(tmp_path, original, per_shard)
    assert len(list(tmp_path.glob("images-*.parquet"))) == -(-101 // per_shard)
    subset = data.read_subset(tmp_path)
    assert len(subset) == 101 and subset.labels.tolist() == [row.label for row in original]
    assert subset.captions[3] == "caption 3" and subset.keys[3] == "k3" and subset.sha256[3] == original[3].sha256
    order = np.random.default_rng(0).permutation(101).tolist()
    assert list(data.parallel(subset.image, order, 4)) == [original[i].data for i in order]


def test_subset_is_what_hugging_face_reads(tmp_path: Path) -> None:
    data.write_subset(tmp_path, rows(3))
    table = pq.read_table(tmp_path / "images-00000.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names and features["image"]["_type"] == "Image"
    assert set(table["image"][0].as_py()) == {"bytes", "path"}


def test_missing_folders_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vapi subset"):
        data.read_subset(tmp_path)
    with pytest.raises(ValueError, match="vapi tokens"):
        data.read_tokens(tmp_path)


def test_what_is_written_about_weights_is_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    files = {name: tmp_path / f"{name}.pt" for name in ("generator", "tokenizer")}
    model = ModelConfig(**{name: str(path) for name, path in files.items()})
    for name, path in files.items():
        path.write_text(name)

    def written() -> dict[str, object]:
        data.write_weights(model, tmp_path / "out")
        return {name: data.read_json(tmp_path / "out" / f"{name}.json") for name in files}

    first = written()
    assert first["generator"] == {"bytes": 9, "sha256": hashlib.sha256(b"generator").hexdigest()} and written() == first
    files["generator"].write_text("GENERATOR")  # as long as before
    os.utime(files["generator"], (1, 1))
    assert written()["generator"] == {"bytes": 9, "sha256": hashlib.sha256(b"GENERATOR").hexdigest()}
    assert written()["tokenizer"] == first["tokenizer"]
    files["tokenizer"].unlink()
    with pytest.raises(ValueError, match="tokenizer.pt is not here"):
        written()


def test_read_images_wants_one_size_and_the_right_column(tmp_path: Path) -> None:
    data.write_subset(tmp_path, rows(12), 5)
    (tmp_path / "manifest.parquet").unlink()
    pixels, labels, _ = data.read_images(tmp_path)
    assert pixels.shape == (12, 16, 20, 3) and pixels.dtype == np.uint8 and labels.tolist() == [i % 10 for i in range(12)]
    assert pixels[7, 0, 0].tolist() == [7, 7, 9] and len(data.read_images(tmp_path, limit=6)[0]) == 6
    with pytest.raises(ValueError, match="did you mean 'image'"):
        data.read_images(tmp_path, image_column="imgae")
    odd = [images.png_bytes(Image.new("RGB", size)) for size in ((8, 8), (9, 8))]
    pq.write_table(pa.table({"image": odd}), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match="must agree"):
        data.read_images(tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match="neither a Parquet"):
        data.read_images(tmp_path / "none.parquet")


def test_parallel_keeps_order_and_holds_few() -> None:
    taken, lock = [], threading.Lock()

    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    def items() -> object:
        for i in range(60):
            with lock:
                taken.append(i)
            yield i

    results = data.parallel(slow, items(), 3)  # type: ignore[arg-type]
    assert [next(results) for _ in range(5)] == list(range(5)) and len(taken) <= 5 + 4 * 3
    assert list(results) == list(range(5, 60))
