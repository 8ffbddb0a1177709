"""A dataset on the hub gives the images that were picked, by ranges, each once; what it refuses is said before anything is read."""

from __future__ import annotations

import bisect
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from imports import ROOT
from PIL import Image
from stubs import Hub, Request, hub_at, serving

from vapi import config as configs
from vapi import data, hub, images, sources
from vapi.config import Config, SubsetConfig
from vapi.listing import write_listing
from vapi.models import text, weights
from vapi.run import Run
from vapi.subset import subset

FILES, ROWS, GROUP = 4, 24, 4
ADDRESS = "hf://datasets/team/pictures"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of six row groups, larger than what pyarrow reads of a file's end at one go."""
    root = tmp_path_factory.mktemp("repository")
    (root / "data").mkdir()
    (root / "README.md").write_text("pictures")
    for part in range(FILES):
        numbers = range(part * ROWS, (part + 1) * ROWS)
        noise = (np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8) for n in numbers)
        columns = {
            "image": [{"bytes": images.png_bytes(Image.fromarray(pixels)), "path": f"{n}.png"} for n, pixels in zip(numbers, noise)],
            "label": [n % 4 for n in numbers],
            "caption": [f"picture {n}" for n in numbers],
        }
        pq.write_table(pa.table(columns), root / "data" / f"train-{part:05d}-of-{FILES:05d}.parquet", row_group_size=GROUP)
    return root


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with serving(Hub(folder)) as stub:
        assert isinstance(stub, Hub)
        hub_at(stub.url, monkeypatch)
        yield stub


def config(source: str = ADDRESS, **changes: Any) -> SubsetConfig:
    return dataclasses.replace(SubsetConfig(source=source, images=8, classes=0, balance="random"), **changes)


def groups_read(server: Hub) -> list[str]:
    """The row groups that ranges lie in; the first range of each file is its end, and no other is."""
    ends, found = set(), []
    for path, span in server.ranges:
        file = server.folder / path
        first, last = map(int, span.split("-"))
        if last == file.stat().st_size - 1:
            assert path not in ends
            ends.add(path)
            continue
        metadata = pq.read_metadata(file)
        starts = [metadata.row_group(group).column(0).dictionary_page_offset for group in range(metadata.num_row_groups)]
        group = bisect.bisect(starts, first) - 1
        assert last < [*starts, file.stat().st_size][group + 1], "a range lies in one"
        found.append(f"{Path(path).name}:{group}")
    return found


class Tags(Run):
    """Keeps what it is told about the run."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def tag(self, key: str, value: str) -> None:
        self.tags[key] = value


# --- what is read ------------------------------------------------------------------------------


def test_two_row_groups_of_twenty_four_and_nothing_else(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Tags()
    subset(config(), tmp_path / "subset", run)
    made = data.read_subset(tmp_path / "subset")
    places = [(Path(file).name, int(row)) for file, _, row in (key.partition(":") for key in made.keys)]
    groups = {f"{name}:{row // GROUP}" for name, row in places}
    assert len(groups) == 2 and set(groups_read(server)) == groups, "neighbours come together"
    for i, (name, row) in enumerate(places):
        table = pq.read_table(server.folder / "data" / name)
        assert made.image(i) == table["image"][row].as_py()["bytes"] and made.captions[i] == table["caption"][row].as_py()
    asked = sum(int(last) - int(first) + 1 for first, last in (span.split("-") for _, span in server.ranges))
    whole = sum(path.stat().st_size for path in server.folder.rglob("*.parquet"))
    assert asked - FILES * 2**16 < 1.1 * whole * 2 / 24
    assert f"2 row groups, 0.1 of {whole / 1e6:.1f} MB, come from" in capsys.readouterr().err
    assert data.read_json(tmp_path / "subset/provenance.json")["commit"] == run.tags["subset.commit"] == "a" * 40


def test_a_commit_that_changes_no_file_changes_no_result(server: Hub, tmp_path: Path) -> None:
    subset(config(), tmp_path / "one")
    server.revisions["main"] = "c" * 40
    subset(config(), tmp_path / "two")
    assert data.file_digest(tmp_path / "one") == data.file_digest(tmp_path / "two")
    assert [data.read_json(tmp_path / name / "provenance.json")["commit"] for name in ("one", "two")] == ["a" * 40, "c" * 40]


def test_a_larger_subset_begins_with_the_smaller_and_reads_what_is_new(server: Hub, tmp_path: Path) -> None:
    subset(config(images=6), tmp_path / "small")
    before = list(server.ranges)
    subset(config(images=12), tmp_path / "large")
    assert data.read_subset(tmp_path / "large").keys[:6] == data.read_subset(tmp_path / "small").keys
    assert server.ranges[: len(before)] == before and len(set(server.ranges)) == len(server.ranges)
    assert len(set(groups_read(server))) == 3
    subset(config(images=6, seed=1), tmp_path / "other")
    assert data.read_subset(tmp_path / "other").keys != data.read_subset(tmp_path / "small").keys


def test_classes_are_balanced_by_a_column_of_labels(server: Hub, tmp_path: Path) -> None:
    subset(config(classes=4, balance="class"), tmp_path / "subset")
    assert np.bincount(data.read_subset(tmp_path / "subset").labels).tolist() == [2] * 4
    large = [span for _, span in server.ranges if np.diff(list(map(int, span.split("-"))))[0] > 10_000]
    assert len(set(groups_read(server))) == FILES * ROWS // GROUP and len(large) == FILES + 2, "of the others the labels alone"


def test_what_has_no_caption_is_passed_over(server: Hub, tmp_path: Path) -> None:
    server.folder = tmp_path / "gaps"
    server.folder.mkdir()
    noise = [np.random.default_rng(n).integers(0, 256, (20, 20, 3), dtype=np.uint8) for n in range(6)]
    columns = {"image": [images.png_bytes(Image.fromarray(one)) for one in noise], "caption": ["one", None, " ", "two", "three", "four"]}
    pq.write_table(pa.table(columns), server.folder / "all.parquet", row_group_size=3)
    subset(config(images=4), tmp_path / "subset")
    assert sorted(data.read_subset(tmp_path / "subset").captions) == ["four", "one", "three", "two"]
    with (tmp_path / "subset/quarantine.csv").open() as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["no caption (no text under 'caption')"] * 2


# --- resuming ----------------------------------------------------------------------------------


def stage(source: str, out: Path, server: Hub) -> subprocess.Popen[str]:
    """The command, as a terminal would type it."""
    params = out.with_suffix(".yaml")
    params.write_text(configs.dump(dataclasses.replace(Config(), subset=config(source, images=40))))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url}
    command = [sys.executable, "-m", "vapi", "subset", "--params", str(params), "--track.uri", "off", "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_and_continued(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 after half of it: the same command asks for the other half, and makes what an undisturbed run makes."""
    subset(config(images=40), tmp_path / "undisturbed")
    undisturbed = sorted(server.ranges)
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "state"))
    server.ranges.clear()
    let = threading.Event()

    def hold() -> None:
        if len(server.ranges) > FILES + 6 and not let.is_set():
            let.wait()
            raise ConnectionAbortedError

    server.before = hold
    process = stage(ADDRESS, tmp_path / "subset", server)
    deadline = time.monotonic() + 120
    while len(server.ranges) < FILES + 7 or len(kept(tmp_path / "state")) < len(server.ranges):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    let.set()
    half = list(server.ranges)
    assert not (tmp_path / "subset").exists() and FILES < len(half) < len(undisturbed)
    process = stage(ADDRESS, tmp_path / "subset", server)
    assert process.wait() == 0, process.communicate()
    assert server.ranges[: len(half)] == half and sorted(server.ranges) == undisturbed, "nothing twice, nothing else"
    assert data.file_digest(tmp_path / "subset") == data.file_digest(tmp_path / "undisturbed")


def kept(state: Path) -> list[Path]:
    return [path for path in (state / "hub").rglob("*-*") if path.is_file() and not path.name.startswith(".") and path.suffix == ""]


def test_at_a_commit_what_is_kept_needs_no_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    pinned = config(f"{ADDRESS}@{'a' * 40}/data")
    with serving(Hub(folder)) as server:
        hub_at(server.url, monkeypatch)
        subset(pinned, tmp_path / "one")
        assert not server.asked("revision|GET /api/datasets/team/pictures$"), "a commit need not be asked for"
    hub_at(NOWHERE, monkeypatch)
    subset(pinned, tmp_path / "two")
    write_listing(pinned, tmp_path / "listing.json")
    assert data.file_digest(tmp_path / "one") == data.file_digest(tmp_path / "two")
    with pytest.raises(ValueError, match="the hub does not give team/pictures .*name the folder that holds them"):
        subset(config(), tmp_path / "three")


def test_the_listing_changes_with_a_file_and_not_with_a_commit(server: Hub, tmp_path: Path) -> None:
    write_listing(config(), tmp_path / "one.json")
    listed = json.loads((tmp_path / "one.json").read_text())
    assert [set(line) for line in listed] == [{"name", "bytes", "digest"}] * FILES and not server.ranges
    server.revisions["main"] = "c" * 40
    write_listing(config(), tmp_path / "two.json")
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


def test_a_connection_that_breaks_is_made_again(server: Hub, tmp_path: Path) -> None:
    broken = []

    def once() -> None:
        if not broken:
            broken.append(1)
            raise ConnectionAbortedError

    server.before = once
    subset(config(), tmp_path / "subset")
    assert broken and len(set(server.ranges)) == len(server.ranges)


def test_a_connection_that_breaks_in_the_middle_is_made_again(server: Hub, tmp_path: Path) -> None:
    subset(config(), tmp_path / "undisturbed")
    (tmp_path / ".vapi").rename(tmp_path / "kept")
    broken = []

    def half(request: Request, path: str) -> Any:
        def body() -> Iterator[bytes]:
            yield b"half"
            raise ConnectionAbortedError

        if path in broken:
            return server._range(request, path)
        broken.append(path)
        return 206, body()

    server.routes.insert(0, ("GET", "/storage/(.*)", half))
    subset(config(), tmp_path / "subset")
    assert len(broken) == FILES and data.file_digest(tmp_path / "subset") == data.file_digest(tmp_path / "undisturbed")


def test_a_whole_file_that_comes_for_a_range_is_not_waited_for(server: Hub, tmp_path: Path) -> None:
    sent = []

    def body() -> Iterator[bytes]:
        for _ in range(400):
            sent.append(1)
            yield bytes(2**20)

    server.routes.insert(0, ("GET", "/storage/(.*)", lambda request, path: (200, body())))
    with pytest.raises(ValueError, match="a whole file came in place of 65,536 bytes of it"):
        subset(config(f"{ADDRESS}/data/train-00000-*"), tmp_path / "subset")
    assert len(sent) < 200


def test_a_file_of_another_version_is_fetched_anew(server: Hub, tmp_path: Path) -> None:
    subset(config(images=96), tmp_path / "one")
    (path,) = server.folder.glob("data/train-00000-*")
    folder = shutil.copytree(server.folder, tmp_path / "repository")
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(len(table)))[::-1]), folder / path.relative_to(server.folder), row_group_size=GROUP)
    server.folder, server.revisions["main"] = folder, "c" * 40
    subset(config(images=96), tmp_path / "two")
    one, two = (data.read_subset(tmp_path / name) for name in ("one", "two"))
    rows = {key: two.image(i) for i, key in enumerate(two.keys) if "train-00000" in key}
    before = {key: one.image(i) for i, key in enumerate(one.keys) if "train-00000" in key}
    assert [rows[key] for key in sorted(rows)] == [before[key] for key in sorted(before)][::-1] and len(rows) == ROWS


def test_an_end_of_more_than_64_kib_takes_a_second_range(server: Hub, tmp_path: Path) -> None:
    """And no more than the end."""
    server.folder = tmp_path / "long"
    server.folder.mkdir()
    columns = {"image": [bytes(100)] * 1000, "caption": ["words"] * 1000}
    pq.write_table(pa.table(columns), server.folder / "all.parquet", row_group_size=2)
    sources.HubParquet(config()).described()
    size = (server.folder / "all.parquet").stat().st_size
    metadata = pq.read_metadata(server.folder / "all.parquet").serialized_size
    assert 2**16 < metadata < size
    assert [span for _, span in server.ranges] == [f"{size - 2**16}-{size - 1}", f"{size - 8 - metadata}-{size - 9}"]


def test_to_describe_a_dataset_takes_the_end_of_its_first_file(server: Hub) -> None:
    assert "4 files" in sources.HubParquet(config()).described()
    ((path, span),) = server.ranges
    first, last = map(int, span.split("-"))
    assert last == (server.folder / path).stat().st_size - 1 and last - first < 2**16


def test_large_row_groups_come_in_pieces(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subset(config(), tmp_path / "whole")
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(hub, "PIECE", 10_000)
    subset(config(), tmp_path / "pieces")
    assert data.file_digest(tmp_path / "whole") == data.file_digest(tmp_path / "pieces")
    assert max(path.stat().st_size for path in kept(tmp_path / "state")) == 10_000


@pytest.mark.parametrize("name", ["team/model", "team/model/model.safetensors"])
def test_a_model_that_was_fetched_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever wants to know whether it is there, and how large."""
    hub_at(NOWHERE, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sizes = [weights.size, *([text.size] if name == "team/model" else [])]
    for size in sizes:
        with pytest.raises(ValueError, match="is no local f.*, and the hub does not show it"):
            size(name)
    files = {"refs/main": "e" * 40, f"snapshots/{'e' * 40}/config.json": "{}", f"snapshots/{'e' * 40}/model.safetensors": "weights"}
    for path, content in files.items():
        (place := tmp_path / "models--team--model" / path).parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    assert {size(name) for size in sizes} == {9 if name == "team/model" else 7}


# --- what is named -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "count"),
    [
        *(("", 4), ("/", 4), ("@main", 4), ("@refs/convert/parquet/data", 4), ("@refs%2Fconvert%2Fparquet", 4), ("/data", 4)),
        *(("/data/train-*", 4), ("/data/train-0000[12]-*.parquet", 2), ("@main/data/train-00003-of-00004.parquet", 1)),
    ],
)
def test_addresses(server: Hub, path: str, count: int) -> None:
    assert len(list(sources.open_source(config(ADDRESS + path)).files())) == count


def test_of_several_splits_one_is_proposed(server: Hub, tmp_path: Path) -> None:
    """In the layout of the branch of Parquet files that the hub makes itself."""
    first = next(server.folder.rglob("*.parquet"))
    server.folder = tmp_path / "converted"
    for split in ("test", "train"):
        (server.folder / "default" / split).mkdir(parents=True)
        shutil.copy(first, server.folder / "default" / split / "0000.parquet")
    branch = f"{ADDRESS}@refs/convert/parquet"
    with pytest.raises(ValueError, match=f"holds shards of test and train; name those .* as in subset.source '{branch}/default/train'$"):
        sources.open_source(config(branch)).files()
    assert [name for name, _ in sources.open_source(config(f"{branch}/default/train")).files()] == ["0000.parquet"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"source": "hf://team/pictures"}, "names no dataset; write hf://datasets/OWNER/NAME"),
        ({"source": "hf://datasets/pictures"}, "names no dataset"),
        ({"source": "hf://datasets/team/pitcures"}, "the hub knows no dataset team/pitcures, or shows it to others only; .*HF_TOKEN"),
        ({"source": f"{ADDRESS}@v7"}, "has no revision 'v7'; give a branch, a tag or a commit"),
        ({"source": f"{ADDRESS}@{'d' * 40}"}, "has no revision 'dddd"),
        ({"source": f"{ADDRESS}/date"}, "the dataset holds no date at commit aaaa"),
        ({"source": f"{ADDRESS}/data/trian-*.parquet"}, "no file is called hf://datasets/team/pictures/data/trian"),
        ({"format": "webdataset"}, "subset.format is webdataset, and on a hub Parquet alone is read"),
        ({"caption_column": "caption_original"}, "data/train-0000.*has no column 'caption_original'; did you mean 'caption'"),
        ({"image_column": "label"}, "'label' holds int64, not image bytes"),
        ({"images": 100}, "subset.images is 100, and hf://datasets/team/pictures holds 96"),
        ({"source": f"{ADDRESS}/README.*"}, "README.md is not a Parquet file, or not a whole one"),
    ],
)  # fmt: skip
def test_what_the_hub_cannot_give(server: Hub, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        subset(config(**changes), tmp_path / "subset")
    assert not (tmp_path / "subset").exists() and len(server.ranges) <= FILES, "nothing but the files' ends was read"


def gated(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated = True


def no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_at(NOWHERE, monkeypatch)


def offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_commit(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.revisions["main"] = "../../elsewhere"


def no_library(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("huggingface_hub", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, name, None)


def no_ranges(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.routes.insert(0, ("GET", "/storage/(.*)", lambda _, path: (200, (server.folder / path).read_bytes())))


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (gated, "is gated or closed to you; accept its terms on its page, give a token that may read it .HF_TOKEN"),
        (no_network, "the hub does not give team/pictures .*where there is no network, fetch the files somewhere else and name the folder"),
        (offline, "the hub does not give team/pictures .*fline"),
        (no_commit, "the hub does not give team/pictures .it calls '../../elsewhere' a commit"),
        (no_library, "lies on the hub; to read it: pip install huggingface_hub"),
        (no_ranges, "a whole file came in place of 65,536 bytes of it; does a proxy drop the header Range.*run the same command again"),
    ],
)
def test_what_stands_between(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[Hub, pytest.MonkeyPatch], None], why: str
) -> None:
    trouble(server, monkeypatch)
    with pytest.raises(ValueError, match=why):
        subset(config(), tmp_path / "subset")
    assert not (tmp_path / "subset").exists() and not server.ranges


def test_a_full_disk_says_so(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write .*/hub/.*Make room and run the same command again"):
            subset(config(), tmp_path / "subset")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
