"""What ImageNet's size costs before a GPU is needed: listing, picking, decoding, cropping.

    python benchmarks/data.py                     # JSON on standard output, about three minutes on 2 cores

ImageNet is not here, so its shape is: a thousand class folders of JPEG files of 500 x 375 pixels and about its
average weight, names for the listing (hard links: --names 1281 a class for all of them), and tars and Parquet with
as many labels. Times are
processor seconds of this process and its threads (``cpu``), which other work on the machine does not lengthen
as it does the clock's (``wall``). ``expected`` multiplies them to 1.28 million names and 12,800 images and divides
by 16 cores what threads share; reading from a disk or a network that is slower than a processor comes on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import resource
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vapi import data, images, sources
from vapi.config import SubsetConfig
from vapi.listing import listing
from vapi.subset import subset

CLASSES, CORES, SIZE = 1000, 16, 384
IMAGENET, PICKED = 1_281_167, 12_800
Times = dict[str, float]


def jpeg(random: np.random.Generator, width: int, height: int) -> bytes:
    """A picture with large shapes and grain: about as many bytes as ImageNet's 110,000 on average."""
    shapes = random.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    grain = random.normal(0, 17, (height, width, 3))
    encoded = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def wnid(label: int) -> str:
    return f"n{1_440_764 + 7 * label:08d}"


def make_folders(root: Path, pictures: list[bytes], each: int, links: int) -> tuple[Path, Path]:
    """Class folders of images that all differ (in bytes after the picture's end), and class folders of many names."""
    distinct, names = root / "distinct", root / "names"
    for label in range(CLASSES):
        (distinct / wnid(label)).mkdir(parents=True)
        (names / wnid(label)).mkdir(parents=True)
        for i in range(each):
            number = label * each + i
            (distinct / wnid(label) / f"{wnid(label)}_{i}.JPEG").write_bytes(pictures[number % len(pictures)] + b"%d" % number)
        target = distinct / wnid(label) / f"{wnid(label)}_0.JPEG"
        for i in range(links):
            os.link(target, names / wnid(label) / f"{wnid(label)}_{i}.JPEG")
    return distinct, names


def make_tars(folder: Path, count: int, shards: int = 16) -> Path:
    """Samples of three members each, as timm's imagenet-1k-wds; of the image only a few bytes."""
    folder.mkdir()
    for shard in range(shards):
        _make_tar(folder / f"imagenet1k-train-{shard:04d}.tar", count // shards)
    return folder


def _make_tar(path: Path, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            label = number % CLASSES
            fields = json.dumps({"label": label, "width": 500, "height": 375, "filename": f"{wnid(label)}_{number}.JPEG"})
            for suffix, body in (("cls", str(label).encode()), ("jpg", b"picture"), ("json", fields.encode())):
                member = tarfile.TarInfo(f"{wnid(label)}_{number}.{suffix}")
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))


def make_parquet(path: Path, pictures: list[bytes], count: int) -> Path:
    """As the hub's imagenet-1k: row groups of 100 images."""
    bodies = [{"bytes": pictures[number % len(pictures)] + b"%d" % number, "path": f"{number}.JPEG"} for number in range(count)]
    pq.write_table(pa.table({"image": bodies, "label": [number % CLASSES for number in range(count)]}), path, row_group_size=100)
    return path


@contextmanager
def timed(into: Times) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into |= {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}


def list_everything(source: sources.Source) -> tuple[int, Times]:
    """Names and labels, then sizes and times, as ``vapi listing`` and ``vapi subset`` need them."""
    times: Times = {}
    with timed(times):
        count = len(source.entries())
        listing(source)
    return count, times


def crop(pictures: list[bytes], threads: int, count: int) -> Times:
    """Bytes to the tokenizer's pixels."""
    times: Times = {}
    with timed(times):
        for _ in data.parallel(lambda i: images.center_crop(images.decode(pictures[i % len(pictures)]), SIZE), range(count), threads):
            pass
    return times


def peak_memory() -> int:
    """The most bytes this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(root: Path, picked: int, links: int) -> dict[str, object]:
    random = np.random.default_rng(0)
    pictures = [jpeg(random, *((500, 375) if i % 3 else (375, 500))) for i in range(64)]
    each, samples = -(-picked // CLASSES), 20_000
    distinct, names = make_folders(root, pictures, each, links)
    config = SubsetConfig(source=str(distinct), images=picked, classes=CLASSES, max_imbalance=2.0)

    def opened(path: Path) -> sources.Source:
        return sources.open_source(dataclasses.replace(config, source=str(path)))

    listed = {
        "folder": list_everything(opened(names)),
        "webdataset": list_everything(opened(make_tars(root / "tars", samples))),
        "parquet": list_everything(opened(make_parquet(root / "train.parquet", [b"picture"], samples))),
    }
    listing_memory = peak_memory()
    cropped = {threads: crop(pictures, threads, 600) for threads in (1, 2)}
    stage: Times = {}
    with timed(stage):
        subset(config, root / "subset")
    made = data.read_subset(root / "subset")
    fed: Times = {}
    with timed(fed):
        for _ in data.parallel(lambda i: made.pixels(i, SIZE), range(600), 2):
            pass
    feeding = fed["cpu"] / 600
    return {
        "image_bytes": round(sum(map(len, pictures)) / len(pictures)),
        "listing": {
            name: {"names": count, **times, "names_per_cpu_second": round(count / times["cpu"])} for name, (count, times) in listed.items()
        },
        "listing_peak_memory_bytes": listing_memory,
        "decode_and_crop": {
            "size": SIZE,
            "images_per_core_second": round(600 / cropped[1]["cpu"], 1),
            "wall_speedup_of_two_threads": round(cropped[1]["wall"] / cropped[2]["wall"], 2),
        },
        "subset": {"images": picked, **stage, "peak_memory_bytes": peak_memory()},
        "feeding_the_tokenizer": {"images_per_core_second": round(1 / feeding, 1)},
        "expected": {
            "listing_imagenet_seconds_one_core": {
                name: round(IMAGENET * times["cpu"] / count, 1) for name, (count, times) in listed.items()
            },
            f"pick_{PICKED}_seconds_one_core": round(PICKED * stage["cpu"] / picked, 1),  # some of it is one thread's
            f"decode_and_crop_{PICKED}_seconds_{CORES}_cores": round(PICKED * feeding / CORES, 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=PICKED, help="how many the subset picks")
    parser.add_argument("--names", type=int, default=100, help="names per class in the folder that is listed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder  # what a stage keeps goes there too
        made = measure(Path(folder), given.images, given.names)
    made |= {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(made))


if __name__ == "__main__":
    main()
