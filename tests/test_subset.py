"""What is picked hangs on the seed and the keys alone; what cannot be used is named, never replaced."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vapi import data, images, quality, sources
from vapi.config import SubsetConfig
from vapi.listing import write_listing
from vapi.subset import subset


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def png(number: int, width: int = 20, height: int = 18) -> bytes:
    """A picture like no other."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return images.png_bytes(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))


def folder(root: Path, classes: int = 4, each: int = 6) -> Path:
    for label in range(classes):
        (root / f"class-{label}").mkdir(parents=True)
        for i in range(each):
            (root / f"class-{label}" / f"{i}.png").write_bytes(png(100 * label + i))
    return root


def config(source: Path, **changes: object) -> SubsetConfig:
    return dataclasses.replace(SubsetConfig(source=str(source), images=0, classes=4, max_unreadable=0.2), **changes)  # type: ignore[arg-type]


def fails(settings: SubsetConfig, out: Path, why: str) -> None:
    """The stage says why, and leaves nothing."""
    with pytest.raises(ValueError, match=why):
        subset(settings, out)
    assert not out.exists() and not list(out.parent.glob(".subset*"))


def picks(settings: SubsetConfig, out: Path) -> list[str]:
    subset(settings, out)
    return data.read_subset(out).keys


# --- what is picked ----------------------------------------------------------------------------


def test_bytes_labels_and_manifest(tmp_path: Path) -> None:
    source = folder(tmp_path / "src")
    out = tmp_path / "artifacts" / "subset"
    subset(config(source, images=12, images_per_shard=5), out)
    made = data.read_subset(out)
    assert len(made) == 12 and np.bincount(made.labels).tolist() == [3, 3, 3, 3]
    for i, key in enumerate(made.keys):
        assert made.image(i) == (source / key).read_bytes() and key.startswith(f"class-{made.labels[i]}/")
    manifest = pd.read_parquet(out / "manifest.parquet")
    assert list(manifest) == ["key", "label", "caption", "width", "height", "mode", "bytes", "sha256", "shard", "row"]
    assert manifest["sha256"][0] == hashlib.sha256(made.image(0)).hexdigest() and manifest["width"].unique().tolist() == [20]
    assert sorted(p.name for p in out.iterdir()) == [
        *("config.json", "images-00000.parquet", "images-00001.parquet", "images-00002.parquet", "manifest.parquet"),
        *("provenance.json", "quality.html", "quality.json", "quarantine.csv"),
    ]
    summary = data.read_json(out / "quality.json")
    assert summary["passed"] and summary["classes"] == [3] * 4 and all(check["passed"] for check in summary["checks"])
    first = data.file_digest(out)
    subset(config(source, images=12, images_per_shard=5), out)
    assert data.file_digest(out) == first


def test_the_file_systems_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "src")
    settings = config(source, images=10)
    picked = picks(settings, tmp_path / "a")
    entries = sources.Folder.entries

    def shuffled(self: sources.Folder) -> list[sources.Entry]:
        return random.Random(1).sample(found := entries(self), len(found))

    monkeypatch.setattr(sources.Folder, "entries", shuffled)
    assert picks(settings, tmp_path / "b") == picked
    assert picks(dataclasses.replace(settings, seed=1), tmp_path / "c") != picked


def test_a_larger_subset_begins_with_the_smaller_and_every_prefix_is_balanced(tmp_path: Path) -> None:
    source = folder(tmp_path / "src")
    small, large = (picks(config(source, images=n), tmp_path / str(n)) for n in (9, 24))
    assert large[:9] == small
    for n in range(1, 25):
        counts = np.bincount([int(key[6]) for key in large[:n]], minlength=4)
        assert counts.max() - counts.min() <= 1
    random_picks = picks(config(source, images=9, balance="random", max_imbalance=0), tmp_path / "random")
    assert len(set(random_picks)) == 9 and random_picks != small


# --- sources -----------------------------------------------------------------------------------


def table(tmp_path: Path, rows: list[dict[str, object]], name: str) -> Path:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def samples(count: int = 8) -> list[tuple[str, bytes, int, str]]:
    return [(f"{i:04d}", png(i), i % 4, f"picture <b>{i}</b>") for i in range(count)]


def as_parquet(tmp_path: Path) -> Path:
    (tmp_path / "pq").mkdir()
    for part in range(2):
        rows = samples()[part::2]
        columns = {
            "image": [{"bytes": body, "path": None} for _, body, _, _ in rows],
            "label": [label for _, _, label, _ in rows],
            "caption": [caption for _, _, _, caption in rows],
        }
        pq.write_table(pa.table(columns), tmp_path / "pq" / f"train-{part}.parquet", row_group_size=3)
    return tmp_path / "pq"


def as_binary(tmp_path: Path) -> Path:
    columns = {name: [row[i] for row in samples()] for name, i in (("image", 1), ("label", 2), ("caption", 3))}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    return tmp_path / "all.parquet"


def _as_table(tmp_path: Path, name: str) -> Path:
    (tmp_path / "files").mkdir()
    for key, body, _, _ in samples():
        (tmp_path / "files" / f"{key}.png").write_bytes(body)
    return table(tmp_path, [{"image": f"files/{key}.png", "label": label, "caption": text} for key, _, label, text in samples()], name)


def as_csv(tmp_path: Path) -> Path:
    return _as_table(tmp_path, "list.csv")


def as_jsonl(tmp_path: Path) -> Path:
    return _as_table(tmp_path, "list.jsonl")


def as_tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    for part in range(2):
        members = {}
        for key, body, label, caption in samples()[part::2]:
            members |= {f"./{key}.png": body, f"./{key}.cls": f"{label}\n".encode(), f"./{key}.txt": caption.encode()}
        tar(tmp_path / "tars" / f"{part}.tar", members)
    return tmp_path / "tars"


def as_tar_with_json(tmp_path: Path) -> Path:
    members = {}
    for key, body, label, caption in samples():
        members |= {f"d/{key}.json": json.dumps({"label": label, "caption": caption}).encode(), f"d/{key}.png": body}
    return tar(tmp_path / "one.tar", members)


@pytest.mark.parametrize("make", [as_parquet, as_binary, as_csv, as_jsonl, as_tars, as_tar_with_json])
def test_every_source_gives_the_same_images(make: object, tmp_path: Path) -> None:
    source = make(tmp_path)  # type: ignore[operator]
    opened = sources.open_source(config(source))
    entries = opened.entries()
    assert len({entry.key for entry in entries}) == 8
    read = {body: (entry.label, entry.caption) for entry, body in opened.read(reversed(entries))}
    assert read == {body: (label, caption) for _, body, label, caption in samples()}
    assert all(path.is_file() and not Path(name).is_absolute() for name, path in opened.files())
    unlabelled = sources.open_source(config(source, classes=0)).entries()
    assert {entry.label for entry in unlabelled} == {-1} and {entry.caption for entry in unlabelled} == {text for *_, text in samples()}


def test_captions_instead_of_labels_end_to_end(tmp_path: Path) -> None:
    subset(config(as_jsonl(tmp_path), classes=0, images=5), tmp_path / "subset")
    made = data.read_subset(tmp_path / "subset")
    assert made.labels.tolist() == [-1] * 5 and all(caption.startswith("picture") for caption in made.captions)


BLANK = (None, "", " \n\t ", 17, ["a list"], {"a": "dict"}, True)
"""What is no caption."""


def as_captioned(kind: str, tmp_path: Path, captions: list[object]) -> Path:
    """Pictures with these captions and no labels."""
    pictures = {f"{n:04d}.png": png(n) for n in range(len(captions))}
    if kind == "webdataset":  # as img2dataset writes LAION-COCO
        members = {}
        for (name, body), caption in zip(pictures.items(), captions, strict=True):
            stem = name.partition(".")[0]
            fields = json.dumps({"caption": caption, "url": "http://x/y.jpg", "status": "success", "key": stem})
            beside = caption.encode(errors="ignore") if isinstance(caption, str) else b""
            members |= {name: body, f"{stem}.json": fields.encode(), f"{stem}.txt": beside}
        return tar(tmp_path / "00000.tar", members)
    if kind == "table":
        for name, body in pictures.items():
            (tmp_path / name).write_bytes(body)
        return table(tmp_path, [{"image": name, "caption": caption} for name, caption in zip(pictures, captions, strict=True)], "all.jsonl")
    columns = {"image": list(pictures.values()), "caption": [caption if isinstance(caption, str) else None for caption in captions]}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    return tmp_path / "all.parquet"


@pytest.mark.parametrize("kind", ["webdataset", "table", "parquet"])
def test_what_has_no_caption_is_quarantined_and_counted(kind: str, tmp_path: Path) -> None:
    captions = ["a red  three\n", *BLANK, "two \ud83d sevens" if kind != "parquet" else "two sevens", "a red  three\n"]
    source = as_captioned(kind, tmp_path, captions)
    subset(config(source, classes=0), tmp_path / "subset")
    made, summary = data.read_subset(tmp_path / "subset"), data.read_json(tmp_path / "subset" / "quality.json")
    assert sorted(made.captions) == ["a red three", "a red three", "two sevens"], "on one line, without halves of characters"
    assert summary["captions"] == 3 and summary["quarantined"] == len(BLANK) and summary["unreadable"] == 0
    with (tmp_path / "subset" / "quarantine.csv").open() as file:
        assert {row["reason"] for row in csv.DictReader(file)} == {"no caption (no text under 'caption')"}
    assert len(picks(config(source, classes=0, images=3), tmp_path / "three")) == 3, "others take their place"
    fails(config(source, classes=0, images=4), tmp_path / "four", "does not hold that many which can be used; .*no caption")
    fails(config(as_captioned(kind, tmp_path, [*BLANK]), classes=0), tmp_path / "none", "no image of .* can be used: .*: no caption")


def test_beside_a_label_a_caption_may_be_missing(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    rows: list[dict[str, object]] = [{"image": f"{n}.png", "label": 0, "caption": caption} for n, caption in enumerate(("one", None, 3))]
    subset(config(table(tmp_path, rows, "all.jsonl"), classes=1), tmp_path / "subset")
    assert sorted(data.read_subset(tmp_path / "subset").captions) == ["", "", "one"]


def test_tars_without_matching_json_are_refused_by_name(tmp_path: Path) -> None:
    fields = json.dumps({"caption": "a red three"}).encode()
    whole = {"a.jpg": png(1), "a.json": fields, "c.json": fields}  # c was not to be had: it has no picture, and is none
    subset(config(tar(tmp_path / "whole.tar", whole), classes=0), tmp_path / "subset")
    assert data.read_subset(tmp_path / "subset").keys == ["whole.tar/a"]
    lacks = config(tar(tmp_path / "lacks.tar", {**whole, "b.jpg": png(2)}), classes=0)
    fails(lacks, tmp_path / "no", "b has no caption: neither a .txt member nor 'caption' in its .json")
    other = config(tar(tmp_path / "other.tar", whole), classes=0, caption_column="top_caption")
    fails(other, tmp_path / "no", "a has no caption: neither a .txt member nor 'top_caption' in its .json")
    damaged = config(tar(tmp_path / "damaged.tar", {**whole, "a.json": b"{"}), classes=0)
    fails(damaged, tmp_path / "no", "a.json is not JSON")
    assert len(picks(dataclasses.replace(lacks, caption_column=""), tmp_path / "bare")) == 2


def test_the_named_caption_goes_before_the_text_beside_it(tmp_path: Path) -> None:
    fields = json.dumps({"caption": "of the page", "top_caption": "of a model"}).encode()
    source = tar(tmp_path / "one.tar", {"a.jpg": png(1), "a.json": fields, "a.txt": b"of the page"})
    for name, wanted in (("caption", "of the page"), ("top_caption", "of a model"), ("none", "of the page")):
        subset(config(source, classes=0, caption_column=name), tmp_path / name)
        assert data.read_subset(tmp_path / name).captions == [wanted]


def test_a_folder_without_classes_may_nest_and_hide(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", classes=2, each=2)
    (source / "top.png").write_bytes(png(7))
    (source / "class-0" / "deep").mkdir()
    (source / "class-0" / "deep" / "x.JPG").write_bytes(png(8))
    (source / ".cache").mkdir()
    (source / ".cache" / "y.png").write_bytes(png(9))
    (source / "class-0" / "notes.txt").write_text("no image")
    keys = {entry.key for entry in sources.open_source(config(source, classes=0)).entries()}
    assert keys == {"top.png", "class-0/0.png", "class-0/1.png", "class-1/0.png", "class-1/1.png", "class-0/deep/x.JPG"}
    labelled = {entry.key: entry.label for entry in sources.open_source(config(source, classes=2)).entries()}
    assert labelled["class-0/deep/x.JPG"] == 0 and labelled["class-1/1.png"] == 1 and "top.png" not in labelled


def test_listing_tells_of_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = folder(tmp_path / "src"), tmp_path / "artifacts" / "listing.json"

    def listed() -> list[dict[str, object]]:
        write_listing(config(source), out)
        return json.loads(out.read_text())

    first = listed()
    assert len(first) == 24 and first[0]["name"] == "class-0/0.png" and set(first[0]) == {"name", "bytes", "sha256"}
    os.utime(source / "class-0" / "0.png", (1, 1))
    assert listed() == first  # small: contents count
    (source / "class-0" / "0.png").write_bytes(png(999))
    assert listed() != first
    monkeypatch.setattr("vapi.listing.HASHED_BELOW", 10)
    first = listed()
    assert set(first[0]) == {"name", "bytes", "changed"}
    os.utime(source / "class-0" / "0.png", (2, 2))
    assert listed() != first


# --- ImageNet as people have it ----------------------------------------------------------------

WNIDS = ("n01440764", "n01443537", "n01484850", "n02085620")


def imagenet(root: Path, wnids: tuple[str, ...] = WNIDS) -> Path:
    """As distributed: train/<wnid>/<wnid>_<number>.JPEG."""
    for label, wnid in enumerate(wnids):
        (root / wnid).mkdir(parents=True)
        for i in range(3):
            Image.open(io.BytesIO(png(100 * label + i))).save(root / wnid / f"{wnid}_{i}.JPEG")
    return root


def imagenet_tars(root: Path) -> Path:
    """As timm's imagenet-1k-wds: several members per image in numbered shards, two splits in one folder."""
    root.mkdir()
    for part in range(3):
        members = {}
        for label, wnid in enumerate(WNIDS):
            stem = f"{wnid}_{part}"
            fields = {"label": label, "width": 20, "height": 18, "filename": f"{stem}.JPEG"}
            members |= {
                f"{stem}.cls": str(label).encode(),
                f"{stem}.jpg": png(100 * label + part),
                f"{stem}.json": json.dumps(fields).encode(),
            }
        tar(root / f"imagenet1k-train-{part:04d}.tar", members)
    tar(root / "imagenet1k-validation-00.tar", {"v.cls": b"0", "v.jpg": png(7)})
    return root


def imagenet_parquet(root: Path) -> Path:
    """As the hub's imagenet-1k: data/<split>-<part>-of-<parts>.parquet; the test split's labels are -1."""
    (root / "data").mkdir(parents=True)
    for part in range(3):
        bodies = [{"bytes": png(100 * label + part), "path": f"{wnid}_{part}.JPEG"} for label, wnid in enumerate(WNIDS)]
        columns = {"image": bodies, "label": list(range(4))}
        pq.write_table(pa.table(columns), root / "data" / f"train-{part:05d}-of-00003.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": bodies, "label": [-1] * 4}), root / "data" / "test-00000-of-00001.parquet")
    return root


def test_imagenet_as_distributed(tmp_path: Path) -> None:
    source = imagenet(tmp_path / "train")
    (source / ".ipynb_checkpoints").mkdir()
    subset(config(source, images=8), tmp_path / "subset")
    made = data.read_subset(tmp_path / "subset")
    assert [made.keys[i].split("/")[0] for i in range(8)] == [WNIDS[label] for label in made.labels]
    assert np.bincount(made.labels).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("make", "pattern"),
    [(imagenet_tars, "imagenet1k-train-*.tar"), (imagenet_parquet, "data/train-*.parquet")],
    ids=["timm", "hugging-face"],
)
def test_a_split_is_named_by_a_pattern(make: object, pattern: str, tmp_path: Path) -> None:
    source = make(tmp_path / "imagenet")  # type: ignore[operator]
    fails(config(source), tmp_path / "subset", "holds shards of (test and train|train and validation); name those .*train")
    subset(config(source / pattern), tmp_path / "subset")
    made = data.read_subset(tmp_path / "subset")
    assert {made.image(i): made.labels[i] for i in range(12)} == {png(100 * label + i): label for label in range(4) for i in range(3)}
    fails(config(source / pattern.replace("train", "trian")), tmp_path / "no", "no file is called .*trian")


@pytest.mark.parametrize(
    ("train", "test", "named"),
    [
        ("default/train/0000.parquet", "default/test/0000.parquet", "default/train"),
        ("default/partial-train/0000.parquet", "default/test/0000.parquet", "default/partial-train"),
        ("data/train-0.parquet", "data/test-0.parquet", "data/*train*.parquet"),
        ("train.parquet", "other/test.parquet", "*train*.parquet"),
    ],
)
def test_what_is_proposed_for_several_splits_names_one(train: str, test: str, named: str, tmp_path: Path) -> None:
    """However they are laid out; the first as the hub's branch refs/convert/parquet."""
    made = imagenet_parquet(tmp_path / "made") / "data"
    for name, part in ((train, "train-00000-of-00003"), (test, "test-00000-of-00001")):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / f"{part}.parquet", tmp_path / "source" / name)
    with pytest.raises(ValueError, match="holds shards of test and train") as error:
        sources.open_source(config(tmp_path / "source")).files()
    proposed = str(error.value).split("'")
    assert proposed[1] == f"{tmp_path / 'source'}/{named}"
    assert [file for _, file in sources.open_source(config(proposed[1])).files()] == [tmp_path / "source" / train]
    assert ("for all" in str(error.value)) == (train.rpartition("/")[0] == test.rpartition("/")[0] == "data")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    data_folder = imagenet_parquet(tmp_path / "imagenet") / "data"
    (data_folder / "train-00001-of-00003.parquet").unlink()
    fails(config(data_folder / "train-*.parquet"), tmp_path / "subset", "2 of 3 shards, without train-00001-of-00003.parquet")
    subset(config(data_folder / "train-0000[02]-*.parquet"), tmp_path / "subset")  # meant
    assert len(data.read_subset(tmp_path / "subset")) == 8


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda at: (at / "__MACOSX").mkdir(), "holds 13 class folders .* is 12: 1 too many; not like the others: __MACOSX"),
        (lambda at: (at / "n09999999").mkdir(), "holds 13 class folders .* is 12: 1 too many; without images: n09999999"),
        (lambda at: (at / "n00000003").rename(at.parent / "gone"), "holds 11 class folders .* is 12: 1 too few"),
        (lambda at: (at / "n00000003").rename(at / "lost+found"), "12 folders, but lost.found is no ImageNet class"),
    ],
    ids=["odd", "empty", "missing", "missing-and-odd"],
)
def test_a_class_folder_too_many_or_too_few(change: object, why: str, tmp_path: Path) -> None:
    source = imagenet(tmp_path / "train", tuple(f"n{number:08d}" for number in range(12)))
    change(source)  # type: ignore[operator]
    fails(config(source, classes=12), tmp_path / "subset", why)


def test_the_folder_above_the_classes_names_the_one_below(tmp_path: Path) -> None:
    imagenet(tmp_path / "imagenet" / "train")
    (tmp_path / "imagenet" / "val").mkdir()
    fails(config(tmp_path / "imagenet"), tmp_path / "subset", "did you mean .*imagenet/train")


# --- bad input ---------------------------------------------------------------------------------


def test_unreadable_images_are_quarantined_and_replaced_by_the_next(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", classes=4, each=10)
    good = picks(config(source, images=20), tmp_path / "good")
    bad = {good[0]: b"words, not pixels", good[5]: (source / good[5]).read_bytes()[:60]}
    for key, body in bad.items():
        (source / key).write_bytes(body)
    subset(config(source, images=20), tmp_path / "subset")
    made = data.read_subset(tmp_path / "subset")
    assert np.bincount(made.labels).tolist() == [5] * 4 and not set(bad) & set(made.keys)
    assert set(good) - set(bad) < set(made.keys)  # the others stay
    rows = pd.read_csv(tmp_path / "subset" / "quarantine.csv")
    assert set(rows["key"]) == set(bad) and "not an image" in rows["reason"].str.cat() and "cannot be" in rows["reason"].str.cat()
    assert data.read_json(tmp_path / "subset" / "quality.json")["unreadable"] == 2
    fails(config(source, images=20, max_unreadable=0.05), tmp_path / "no", "2 of 2[01] examined images are unreadable.*not an image")


def test_duplicates_keep_the_first_and_say_so(tmp_path: Path) -> None:
    source = folder(tmp_path / "src")
    (source / "class-1" / "5.png").write_bytes((source / "class-0" / "3.png").read_bytes())
    (source / "class-2" / "4.png").write_bytes((source / "class-2" / "2.png").read_bytes())
    subset(config(source, max_unreadable=0), tmp_path / "subset")  # a duplicate is readable
    made = data.read_subset(tmp_path / "subset")
    rows = {row["key"]: row["reason"] for row in csv.DictReader((tmp_path / "subset" / "quarantine.csv").open())}
    assert len(made) == 22 and len(set(made.sha256)) == 22 and len(rows) == 2 and not set(rows) & set(made.keys)
    for key, reason in rows.items():
        assert reason.startswith("duplicate of ") and ("which has label" in reason) == (key[6] in "01")
    fails(config(source, images=24), tmp_path / "no", "does not hold that many of every class.*duplicate of")


def test_strange_modes_and_sizes_are_kept_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    rgb = Image.open(io.BytesIO(png(1)))
    rgb.convert("CMYK").save(source / "cmyk.jpg")
    rgb.quantize(8).save(source / "palette.png")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(source / "sixteen.png")
    rgb.resize((17, 700)).save(source / "tall.webp")
    Image.new("RGB", (900, 1)).save(source / "strip.png")
    subset(config(source, classes=0), tmp_path / "subset")
    manifest = pd.read_parquet(tmp_path / "subset" / "manifest.parquet").set_index("key")
    assert manifest["mode"].to_dict() == {"cmyk.jpg": "CMYK", "palette.png": "P", "sixteen.png": "I;16", "tall.webp": "RGB"}
    assert 'strip.png,"900 x 1 is a strip' in (tmp_path / "subset" / "quarantine.csv").read_text()


def test_too_small_images_fail_validation_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", each=3)
    (source / "class-2" / "1.png").write_bytes(png(1, 40, 9))
    fails(config(source), tmp_path / "subset", r"shorter side has at least 16 pixels: image class-2/1.png, 9")
    subset(config(source, min_size=8), tmp_path / "subset")


def test_unbalanced_classes_fail_validation_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", each=6)
    for i in range(1, 6):
        (source / "class-3" / f"{i}.png").unlink()
    fails(config(source), tmp_path / "subset", "every class has at least 4 images .*: class 3, 1")
    subset(config(source, max_imbalance=0), tmp_path / "subset")
    fails(config(source, images=16), tmp_path / "no", "that is 4 of class 3, which has 1; ask for at most 4, or")


def test_validation_names_every_kind_of_row() -> None:
    frame = pd.DataFrame(
        {
            "key": ["a", "b", "b", "c"],
            "label": [0, 7, 1, 1],
            "caption": ["", "", None, ""],
            **{"width": 20, "height": 20, "mode": "RGB", "bytes": 9, "shard": 0, "row": 0},
            "sha256": ["x", "y", "z", "x"],
        }
    )
    checks = quality.validate(frame, [("d", "not an image", False)], config(Path(), classes=2, max_imbalance=0))
    with pytest.raises(ValueError, match="do not pass validation") as error:
        quality.require(checks)
    for words in (
        "keys are unique: image b",
        "same bytes (sha256): image a, x; c, x",
        "0 .. 1: image b, 7",
        "caption is never null: image b",
    ):
        assert words in str(error.value)
    assert "unreadable" not in str(error.value)  # one in five, and a fifth is allowed
    strict = quality.validate(frame, [("d", "", False), ("e", "", False)], config(Path(), classes=2, max_imbalance=0))
    assert "examined image d" in "".join(quality._failure(check) for check in strict if not check.passed)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"images": 25}, "subset.images is 25, and .* holds 24"),
        ({"images": 25, "balance": "random"}, "holds 24"),
        ({"classes": 3}, "holds 4 class folders .*subset.classes is 3"),
        ({"classes": 5}, "holds 4 class folders"),
        ({"format": "table"}, "is a folder"),
        ({"format": "parquet"}, "holds no .parquet files"),
    ],
)
def test_what_the_source_cannot_give(changes: dict[str, object], why: str, tmp_path: Path) -> None:
    fails(config(folder(tmp_path / "src"), **changes), tmp_path / "subset", why)


def test_empty_sources_and_classes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(config(Path("nowhere/at/all")), tmp_path / "subset", "nowhere/at/all is not here")
    fails(config(tmp_path / "empty"), tmp_path / "subset", "holds no class folders")
    fails(config(tmp_path / "empty", classes=0), tmp_path / "subset", "holds no images")
    source = folder(tmp_path / "src")
    for path in (source / "class-2").iterdir():
        path.unlink()
    fails(config(source), tmp_path / "subset", "class 2 is empty")
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 2]}), tmp_path / "x.parquet")
    fails(config(tmp_path / "x.parquet"), tmp_path / "subset", "no images of class 1, 3")


def test_everything_unreadable(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.png").write_text("words")
    fails(config(source, classes=0), tmp_path / "subset", "1 of 1 examined images are unreadable")
    fails(config(source, classes=0, max_unreadable=1.0), tmp_path / "subset", "no image of .* can be used: a.png: not an image")


@pytest.mark.parametrize("label", [4, -1, "cat", None, 1.5, True])
def test_labels_outside_of_the_classes(label: object, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    rows = [{"image": f"files/{i}.png", "label": i} for i in range(4)]
    rows[2]["label"] = label
    fails(config(table(tmp_path, rows, "list.jsonl")), tmp_path / "subset", "(outside of 0 .. 3.*files/2.png: |line 3, has label)")


def test_missing_columns_name_the_nearest(tmp_path: Path) -> None:
    fails(config(as_parquet(tmp_path), label_column="lable"), tmp_path / "subset", "no column 'lable'; did you mean 'label'")
    fails(config(as_csv(tmp_path), image_column="img"), tmp_path / "subset", "no column 'img'; ")
    fails(config(tmp_path / "list.csv", classes=0, caption_column="captoin"), tmp_path / "subset", "did you mean 'caption'")
    subset(config(tmp_path / "list.csv", classes=0, caption_column="", images=2), tmp_path / "subset")
    fails(config(tmp_path / "pq", image_column="label"), tmp_path / "no", "not image bytes")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "files/../../secret.png"])
def test_tables_cannot_climb_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "in").mkdir()
    for kind in ("list.csv", "list.jsonl"):
        fails(config(table(tmp_path / "in", [{"image": name, "label": 0}], kind)), tmp_path / "subset", "leads out of the data")


def test_tables_name_their_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "label": 0}\n{"image": \n')
    fails(config(tmp_path / "x.jsonl"), tmp_path / "subset", "line 2 is not JSON")
    (tmp_path / "x.jsonl").write_text('{"image": "", "label": 0}\n')
    fails(config(tmp_path / "x.jsonl"), tmp_path / "subset", "line 1 names no image")
    (tmp_path / "x.jsonl").write_text('{"image": "gone.png", "label": 0}\n')
    fails(config(tmp_path / "x.jsonl", classes=1), tmp_path / "subset", "gone.png: no such file")


def test_tables_that_are_no_tables_name_the_line(tmp_path: Path) -> None:
    for text, why in (
        (b"image,label\na.png,0,a cat, sitting\n", "line 2 has more fields than the header"),
        (b"image,label\na.png,0\nb.png," + b"9" * 200_000 + b"\n", "after line 2: field larger"),
        (b"image,label\na.png," + b"9" * 400 + b"\n", "labels are class ids"),
        ("image,label\ngr\u00fcn.png,0\n".encode("latin-1"), "must be UTF-8 text"),
    ):
        (tmp_path / "x.csv").write_bytes(text)
        fails(config(tmp_path / "x.csv"), tmp_path / "subset", why)


def test_archives_that_are_no_data_are_refused(tmp_path: Path) -> None:
    whole = as_tar_with_json(tmp_path)
    for name in ("../../x.png", "/x.png", "a/../../x.png"):
        fails(config(tar(tmp_path / "out.tar", {name: png(1)})), tmp_path / "subset", "leads out of the data")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "link.tar", "w") as archive:
            info = tarfile.TarInfo("x.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        fails(config(tmp_path / "link.tar"), tmp_path / "subset", "link, a device")
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:3000])
    fails(config(tmp_path / "cut.tar"), tmp_path / "subset", "not a plain, whole tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(whole)
    fails(config(tmp_path / "packed.tar"), tmp_path / "subset", "unpacked first")
    fails(config(tar(tmp_path / "bare.tar", {"a.png": png(1)})), tmp_path / "subset", "a has no label")
    fails(config(tar(tmp_path / "bad.tar", {"a.png": png(1), "a.json": b"["})), tmp_path / "subset", "is not JSON")


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("words")
    fails(config(tmp_path / "x.parquet"), tmp_path / "subset", "is not a Parquet file")
    (tmp_path / "x.zip").write_text("words")
    fails(config(tmp_path / "x.zip"), tmp_path / "subset", "cannot tell what")


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_half_downloaded_files_are_named(tmp_path: Path) -> None:
    parquet = as_binary(tmp_path)
    fails(config(cut(parquet, parquet.stat().st_size // 2)), tmp_path / "subset", "all.parquet is not a Parquet file, or not a whole one")
    whole = as_tar_with_json(tmp_path)
    with tarfile.open(whole) as archive:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in archive]
    for size in (ends[3], ends[3] + 512, ends[3] - 512, ends[3] + 100):  # between two members, in a header, in a body
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes())
        fails(config(cut(tmp_path / "cut.tar", size)), tmp_path / "subset", "cut.tar is not a (plain, )?whole tar archive")


def test_damage_inside_parquet_names_the_file(tmp_path: Path) -> None:
    source = as_binary(tmp_path)
    body = bytearray(source.read_bytes())
    body[4:400] = bytes(396)  # the first page's header
    source.write_bytes(body)
    fails(config(source), tmp_path / "subset", "all.parquet: row group 0 cannot be read")


@pytest.mark.parametrize("make", [imagenet, as_parquet, as_csv, as_tars], ids=["folder", "parquet", "table", "tars"])
def test_a_source_taken_away_in_mid_run(make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage says so and leaves nothing; put back, the same command makes the same as an undisturbed run."""
    source = make(tmp_path / "src") if make is imagenet else make(tmp_path)  # type: ignore[operator]
    settings, top, away = config(source), source if source.is_dir() else source.parent / "files", tmp_path / "away"
    subset(settings, tmp_path / "undisturbed")
    inspect, seen = images.inspect, []

    def disturbed(*given: object) -> Image.Image:
        if not seen:
            top.rename(away)
            if source.is_file():
                source.rename(tmp_path / "away.csv")
        seen.append(1)
        return inspect(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(images, "inspect", disturbed)
    fails(settings, tmp_path / "subset", "was there and cannot be read any more .*run the same command again")
    away.rename(top)
    if (tmp_path / "away.csv").exists():
        (tmp_path / "away.csv").rename(source)
    subset(settings, tmp_path / "subset")
    assert data.file_digest(tmp_path / "subset") == data.file_digest(tmp_path / "undisturbed")


def test_disk_full_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "src", each=40), tmp_path / "artifacts" / "subset"
    subset(config(source, images=8), out)
    before = data.file_digest(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (2_000, 20_000):  # the spool, the shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(ValueError, match="cannot write .*artifacts/subset.*Make room and run the same command again"):
                subset(config(source), out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert data.file_digest(out) == before and [path.name for path in out.parent.iterdir()] == ["subset"]
    subset(config(source), out)
    assert len(data.read_subset(out)) == 160


def test_bombs_are_quarantined_unopened(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", classes=1)
    (source / "class-0" / "bomb.png").write_bytes(png(1, 300, 300))
    subset(config(source, classes=1, max_pixels=80_000), tmp_path / "subset")
    assert 'bomb.png,"300 x 300 would unpack to 90,000 pixels' in (tmp_path / "subset" / "quarantine.csv").read_text()


def test_markup_in_data_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    (tmp_path / "files").mkdir()
    for i in range(3):
        (tmp_path / "files" / f"<img src=x>{i}.png").write_bytes(png(i) if i else b"")
    rows = [{"image": f"files/<img src=x>{i}.png", "caption": evil} for i in range(3)]
    subset(config(table(tmp_path, rows, "<u>.jsonl"), classes=0, max_unreadable=0.5), tmp_path / "subset")
    page = (tmp_path / "subset" / "quality.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "<u>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;img src=x&gt;0.png" in page
    assert "http" not in page.split("</style>")[1]
    assert data.read_subset(tmp_path / "subset").captions == [evil] * 2


def test_read_only_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # permissions do not stop root, a file in the way does
    with pytest.raises(ValueError, match="cannot write to"):
        subset(config(folder(tmp_path / "src")), tmp_path / "file" / "subset")
