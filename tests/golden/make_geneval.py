"""What GenEval's own evaluation answers to random detections, into geneval.json.gz, which tests/test_geneval.py reads.

    python tests/golden/make_geneval.py GENEVAL     # a checkout

The official file wants mmdet, open_clip and a GPU before it says a word; it gets empty modules of these names. The detector's
answer and the colours are made up here, everything after them is the official function. Detections are drawn near
the places where a rule decides: scores at the threshold, boxes that touch, small boxes, distances about the margin.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
CASES, SIDE = 360, 128
CLASSES = ("bench", "dog", "computer mouse", "orange")
COLOURS = ("red", "orange", "blue", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RULES = {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16, "max_overlap": 1.0, "position_margin": 0.1}


def official(checkout: Path) -> ModuleType:
    """The official evaluation as a module, with the options that main() sets."""
    scores = "clip_benchmark.metrics.zeroshot_classification"
    names = ["mmdet", "mmdet.apis", "open_clip", "clip_benchmark", "clip_benchmark.metrics", scores]
    empty = {name: mock.MagicMock() for name in names}
    empty["clip_benchmark.metrics"].zeroshot_classification = empty[scores]
    spec = importlib.util.spec_from_file_location("official", checkout / "evaluation" / "evaluate_images.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, empty), mock.patch.object(torch.cuda, "is_available", lambda: True):
        spec.loader.exec_module(module)
    module.classnames = (checkout / "evaluation" / "object_names.txt").read_text().splitlines()
    module.object_detector = None
    unordered = module.relative_position
    module.relative_position = lambda a, b: sorted(unordered(a, b))  # joined from a set, in an order that changes with every start
    return module


def answer(module: ModuleType, case: dict[str, Any], picture: str) -> dict[str, Any]:
    """The official outcome of one case."""
    rules = RULES | case["rules"]
    module.THRESHOLD, module.COUNTING_THRESHOLD = rules["threshold"], rules["counting_threshold"]
    module.MAX_OBJECTS, module.NMS_THRESHOLD = rules["max_objects"], rules["max_overlap"]
    module.POSITION_THRESHOLD = rules["position_margin"]
    boxes = {name: np.array(rows, np.float32).reshape(-1, 5) for name, rows in case["objects"].items()}
    row_of = {name: {tuple(box.tolist()): n for n, box in enumerate(these)} for name, these in boxes.items()}
    nothing = np.zeros((0, 5), np.float32)
    module.inference_detector = lambda *_: ([boxes.get(name, nothing) for name in module.classnames], None)
    module.color_classification = lambda _, found, name: [case["colours"][name][row_of[name][tuple(box.tolist())]] for box, _ in found]
    found = module.evaluate_image(picture, case["metadata"])
    details = json.loads(found["details"])
    kept = {name: [row_of[name][tuple(box)] for box in these] for name, these in details.items()}
    return {"correct": bool(found["correct"]), "reasons": sorted(filter(None, found["reason"].split("\n"))), "kept": kept}


# --- random cases ------------------------------------------------------------------------------


def case(random: np.random.Generator) -> dict[str, Any]:
    """A prompt and detections that often fit it."""
    tag = str(random.choice(TASKS, p=[0.06, 0.08, 0.16, 0.12, 0.44, 0.14]))
    metadata = prompt(random, tag)
    asked = {clause["class"]: clause["count"] for clause in metadata["include"]}
    near = 0.9 if tag == "counting" else 0.3
    objects: dict[str, list[list[float]]] = {}
    if tag == "position" and random.random() < 0.6:
        objects = beside(random, asked)
    for name in sorted({*asked, str(random.choice(CLASSES))} - objects.keys()):
        count = int(random.integers(17, 22)) if random.random() < 0.04 else asked.get(name, 0) + int(random.integers(-1, 3))
        if count > 0:
            objects[name] = boxes(random, count, near)
    wanted = {clause["class"]: clause.get("color") for clause in metadata["include"]}
    colours = {
        name: [wanted.get(name) if wanted.get(name) and random.random() < 0.6 else str(random.choice(COLOURS)) for _ in rows]
        for name, rows in objects.items()
    }
    rules: dict[str, Any] = {}
    if random.random() < 0.3:
        rules["max_overlap"] = float(random.choice([0.3, 0.5, 0.7]))
    if random.random() < 0.1:
        rules["max_objects"] = int(random.integers(1, 4))
    if random.random() < 0.1:
        rules["position_margin"] = 0.3
    return {"metadata": metadata, "objects": objects, "colours": colours, "rules": rules}


def prompt(random: np.random.Generator, tag: str) -> dict[str, Any]:
    """As GenEval's, and now and then with more in it than GenEval asks."""
    first, second, third = (str(name) for name in random.permutation(CLASSES)[:3])
    count = int(random.integers(2, 5)) if tag == "counting" else 1 + int(random.random() < 0.15)
    include: list[dict[str, Any]] = [{"class": first, "count": count}]
    if tag in ("colors", "color_attr") or random.random() < 0.1:
        include[0]["color"] = str(random.choice(COLOURS))
    if tag in ("two_object", "position", "color_attr"):
        include.append({"class": second, "count": 1 + int(random.random() < 0.15)})
    if tag == "color_attr" or (tag == "position" and random.random() < 0.3):
        include[1]["color"] = str(random.choice(COLOURS))
    if tag == "position" or (tag == "color_attr" and random.random() < 0.4):
        include[1]["position"] = [str(random.choice(RELATIONS)), 0]
    if tag == "position" and random.random() < 0.15:
        include.append({"class": third, "count": 1, "position": [str(random.choice(RELATIONS)), int(random.integers(2))]})
    made: dict[str, Any] = {"tag": tag, "include": include}
    if tag == "counting" or random.random() < 0.05:
        made["exclude"] = [{"class": first, "count": count + 1}]
    return {**made, "prompt": f"a {tag} case"}


def boxes(random: np.random.Generator, count: int, near: float) -> list[list[float]]:
    """Rows x0, y0, x1, y1, score: no score twice (the order of equal ones would be a matter of luck), one now and then exactly ``near``."""
    small = random.random() < 0.4
    rows = []
    scores = near + (random.permutation(60)[:count] - 20) * (0.098 - near / 10) / 4
    for n, score in enumerate(scores.clip(0.02)):
        side = random.integers(3, 12, 2) if small else random.integers(15, 60, 2)
        if rows and random.random() < 0.15:  # the upper half of the last one, to the pixel
            x0, y0, x1, y1, _ = rows[-1]
            place, side = np.array([x0, y0]), np.array([x1 - x0, (y1 - y0 + 1) // 2 - 1])
        elif rows and random.random() < 0.5:  # nearly where the last one is
            place = np.array(rows[-1][:2]) + random.integers(-4, 5, 2)
        else:
            place = random.integers(0, SIDE // (4 if small else 1), 2)
        exact = near if n == 0 and random.random() < 0.2 else score + n * 1e-4
        rows.append([*(float(x) for x in (*place, *(place + side))), round(float(exact), 4)])
    return rows


def beside(random: np.random.Generator, asked: dict[str, int]) -> dict[str, list[list[float]]]:
    """As many sure objects as asked for, each a little way from the last one."""
    centre, objects = np.array([SIDE / 2, SIDE / 2]), {}
    for name, count in asked.items():
        objects[name] = []
        for n in range(count):
            turn, distance, half = random.random() * 2 * np.pi, 2 + 30 * random.random(), random.integers(8, 25, 2)
            centre = (centre + distance * np.array([np.cos(turn), np.sin(turn)])).round()
            score = round(0.95 - 0.1 * n - 0.01 * random.random(), 4)
            objects[name].append([*(float(x) for x in (*(centre - half), *(centre + half))), score])
    return objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geneval", type=Path)
    module = official(parser.parse_args().geneval)
    random = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(suffix=".png") as picture:
        Image.new("RGB", (SIDE, SIDE)).save(picture.name)
        made = [(one := case(random)) | answer(module, one, picture.name) for _ in range(CASES)]
    path = HERE / "geneval.json.gz"
    text = "[\n" + ",\n".join(json.dumps(one, separators=(",", ":")) for one in made) + "\n]\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print({"cases": len(made), "correct": sum(one["correct"] for one in made), "bytes": path.stat().st_size})


if __name__ == "__main__":
    main()
