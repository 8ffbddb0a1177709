"""``vapi geneval``: folders of pictures in GenEval's layout, scored and generated; detectors by name, for stage ``evaluate`` too.

    IMAGES/00000/metadata.jsonl   IMAGES/00000/samples/0000.png ...      one folder a prompt

Whatever is wrong with a folder is found and said before a detector looks at the first picture: a score over what
happens to be there is not the score of the list. The one thing that may be missing is whole prompts, and then the result says
"partial" and which. What was judged is kept by the picture's content, its prompt, the detector and this
package's code, so a scoring that was stopped goes on where it was, and another folder with the same pictures costs
nothing. Rules and table are ``metrics/geneval.py``'s.

A generated folder appears prompt by prompt, each whole or not at all; picture n has random numbers of its
own, so whatever was there already is what would be drawn again.

Left out: several processes, since 2,212 pictures are minutes on one GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from vapi import data, images, models
from vapi.config import EvaluateConfig, ModelConfig, nearest, write_text
from vapi.metrics import geneval as metric
from vapi.metrics import recorded
from vapi.metrics.detections import Detections, Detector, Identity
from vapi.metrics.geneval import Outcome, Prompt, Run
from vapi.metrics.recorded import Recorded
from vapi.models import Policy, sampler, weights
from vapi.models.sampler import image_seed

PROMPTS = Path(__file__).parents[1] / "data" / "geneval" / "prompts.jsonl"
"""The official list, in the clone or the image."""
RESULTS, SUMMARY, MADE = "results.jsonl", "summary.json", "generated.json"
AT_ONCE = 8
"""Pictures that a detector gets at a time: masks of a hundred objects on each are in memory meanwhile."""
ONE_BATCH = 32
"""Pictures that are drawn at a time, unless evaluate.images_per_batch says."""
SHOWN = 5
"""Problems that are named; the others are counted."""


# --- detectors ---------------------------------------------------------------------------------


def detector_of(name: str, clip: str = "", device: torch.device | str = "cpu") -> Detector:
    """The detector that ``evaluate.detector`` means: digits (classical), a .safetensors (learned, for the embedded scenes), or
    Mask2Former's weights, a folder or a hub id. ``clip``: folder of CLIP's weights, for colours. Raises ValueError for another name."""
    if name == "digits":
        found = _module("scenes").classical()
    elif name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise ValueError(f"the detector {name} is not here; the bundled ones come with: dvc pull data.dvc")
        found = _module("scenes").learned(Path(name))
    elif name and Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        found = _module("mask2former").load(name, clip, device)
    else:
        known = "digits, a .safetensors of ours, or a folder of Mask2Former's weights"
        raise ValueError(f"the detector {name!r} is neither here nor known; give {known} ({nearest(name, ['digits'])})")
    return cast(Detector, found)


def convert_detector(source: Path, target: Path) -> None:
    """OpenMMLab's checkpoint of Mask2Former to a folder that ``detector_of`` takes."""
    _module("mask2former").convert(source, target)


def convert_clip(source: Path, target: Path, words: Path) -> None:
    """open_clip's checkpoint of a CLIP, as HPSv2's is, to a folder for ``evaluate.hps`` or ``evaluate.clip``."""
    _module("open_clip").convert(source, target, words)


def _module(name: str) -> Any:
    """A judge's module, imported when named: its libraries are optional."""
    return importlib.import_module(f"vapi.metrics.{name}")


def recorded_detections(path: Path) -> Recorded:
    """Detections in a file (see ``metrics/recorded.py``). Raises ValueError for what cannot be used."""
    if not path.is_file():
        raise ValueError(f"{path} is not here; it should hold detections, one line of JSON a picture")
    return recorded.read(path, data.file_digest(path), metric.CLASSES, metric.COLOURS)


# --- pictures ----------------------------------------------------------------------------------


def judge(detector: Detector | Recorded, shown: Iterable[tuple[Prompt, str, np.ndarray]], at_once: int = AT_ONCE) -> Iterator[Outcome]:
    """The outcome of each (prompt, name of the picture, picture), in order; names matter to recorded detections alone."""
    for batch in _batches(shown, at_once):
        prompts, _, pictures = zip(*batch)
        yield from metric.outcomes(cast(Detector, detector), prompts, pictures, _look(detector, batch))


def _look(detector: Detector | Recorded, batch: Sequence[tuple[Prompt, str, np.ndarray]]) -> Sequence[Detections]:
    if isinstance(detector, Recorded):
        return [detector.of(name) for _, name, _ in batch]
    return detector.detect([picture for _, _, picture in batch])


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# --- a folder of pictures ----------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A file that answers a prompt."""

    path: Path
    prompt: Prompt
    sha256: str

    @property
    def name(self) -> str:
        return recorded.picture_name(self.path.as_posix())


@dataclass(frozen=True)
class Gallery:
    """A folder that can be scored."""

    prompts: Sequence[Prompt]  # P
    asked: Sequence[Prompt]  # the whole list
    pictures: Sequence[Picture]  # P x I, a prompt's in a row


class Problems:
    """What is wrong with a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []

    def add(self, words: str) -> None:
        self.found.append(words)

    def stop(self) -> None:
        """Raises ValueError if there are any."""
        if not self.found:
            return
        count = f"{len(self.found)} problems" if len(self.found) > 1 else "a problem"
        more = [f"... and {len(self.found) - SHOWN} more"] if len(self.found) > SHOWN else []
        raise ValueError("\n  ".join([f"{self.folder} cannot be scored, {count}:", *self.found[:SHOWN], *more]))


def score_folder(
    folder: Path, detector: Detector | Recorded, out: Path | None = None, prompts: Path | None = None, images_per_prompt: int = 0
) -> dict[str, Any]:
    """Score a folder of pictures; writes results.jsonl (a line a picture, the official fields) and summary.json to ``out``
    (none: the folder itself), and returns the summary.

    ``prompts``: the list that was asked for; none: the official one, if all prompts of the folder are in it, else the folder's own.
    ``images_per_prompt``: how many pictures each prompt must have; 0: GenEval's 4. Raises ValueError, before a detector looks,
    with what is wrong with the folder.
    """
    begin = time.perf_counter()
    folder, out = Path(folder), Path(out or folder)
    gallery = examine(folder, detector, prompts, images_per_prompt or metric.OFFICIAL_IMAGES)
    outcomes = _outcomes(gallery, detector)
    correct = np.array([outcome["correct"] for outcome in outcomes]).reshape(len(gallery.prompts), -1)
    found = metric.summary(Run.of(gallery.prompts, correct), detector.identity, detector.rules, gallery.asked)
    found |= {"folder": str(folder), "code": data.code_version(), "seconds": round(time.perf_counter() - begin, 3)}
    write_text(out / RESULTS, "".join(json.dumps(_row(*pair)) + "\n" for pair in zip(gallery.pictures, outcomes, strict=True)))
    data.write_json(out / SUMMARY, found)
    return found


def _row(picture: Picture, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A picture's line, in the official fields and their order."""
    return {
        "filename": str(picture.path),
        "tag": picture.prompt.tag,
        "prompt": picture.prompt.text,
        "correct": outcome["correct"],
        "reason": "\n".join(outcome["reasons"]),
        "metadata": json.dumps(picture.prompt.metadata),
        "details": json.dumps(outcome["details"]),
    }


def examine(folder: Path, detector: Detector | Recorded, prompts: Path | None, images_per_prompt: int) -> Gallery:
    """A folder's prompts and pictures. Raises ValueError with all that is wrong: a handful in words, the rest in number."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not here; it should hold a folder a prompt: 00000/metadata.jsonl, 00000/samples/0000.png ...")
    listed = metric.read_prompts(prompts, detector.classes, detector.colours) if prompts else []
    problems = Problems(folder)
    places = sorted((place for place in folder.iterdir() if place.is_dir() and place.name.isdigit()), key=lambda place: int(place.name))
    if not places:
        raise ValueError(f"{folder} holds no folder of a prompt (00000, 00001, ...), each with metadata.jsonl and samples/0000.png ...")
    read = {place: _metadata(place, detector, problems) for place in places}
    files = {place: _files(place, images_per_prompt, problems) for place in places}
    problems.stop()
    asked = listed or _official(list(read.values())) or list(read.values())
    _require_order(read, asked, problems)
    problems.stop()
    pairs = [(file, read[place]) for place in places for file in files[place]]
    if isinstance(detector, Recorded):
        _require_recorded(detector, pairs, problems)
    pictures = _digests(pairs, problems)
    problems.stop()
    return Gallery(list(read.values()), asked, pictures)


def _metadata(place: Path, detector: Detector | Recorded, problems: Problems) -> Prompt:
    path, nothing = place / "metadata.jsonl", Prompt("", "", ())
    where = f"{place.name}/metadata.jsonl"
    if not path.is_file():
        problems.add(f"{where} is missing")
        return nothing
    try:
        return metric.parse_prompt(path.read_text(encoding="utf-8"), where, detector.classes, detector.colours)
    except ValueError as error:
        problems.add(str(error))
        return nothing


def _files(place: Path, count: int, problems: Problems) -> list[Path]:
    """A prompt's pictures in the order of their numbers."""
    samples = place / "samples"
    names = sorted(path.name for path in samples.iterdir()) if samples.is_dir() else []
    found = sorted((name for name in names if re.fullmatch(r"\d+\.png", name)), key=lambda name: int(name[:-4]))
    if len(found) != count:
        others = [name for name in names if Path(name).suffix.lower() in images.SUFFIXES and name not in found]
        hint = f"; {others[0]} is not read, names are numbers and .png" if others else ""
        problems.add(f"{place.name}/samples holds {len(found)} pictures, and {count} were asked for{hint}")
    return [samples / name for name in found]


def _official(found: Sequence[Prompt]) -> list[Prompt]:
    """The official list if it is here and holds all these prompts, else nothing."""
    if not PROMPTS.is_file():
        print(f"{PROMPTS.name} of GenEval is not with this package: a partial list is told by --prompts alone", file=sys.stderr)
        return []
    official = metric.read_prompts(PROMPTS)
    return official if {prompt.key for prompt in found} <= {prompt.key for prompt in official} else []


def _require_order(read: Mapping[Path, Prompt], asked: Sequence[Prompt], problems: Problems) -> None:
    """Folder n holds the list's prompt n: otherwise pictures may well have got to another prompt's metadata."""
    before: dict[int, str] = {}
    own = asked == list(read.values())
    for place, prompt in read.items():
        number = int(place.name)
        if number in before:
            problems.add(f"{place.name} and {before[number]} are the same number")
        elif own and number != len(before):
            hint = "give the whole list with --prompts, and the result says what is missing"
            problems.add(f"{place.name} comes where {len(before):05d} is expected; {hint}")
            return
        elif not own and (number >= len(asked) or asked[number].key != prompt.key):
            at = [n for n, other in enumerate(asked) if other.key == prompt.key]
            right = f"number {at[0]:05d} of the list: folders are out of order" if at else "not in the list"
            problems.add(f"{place.name} holds {prompt.text!r}, which is {right}")
        before[number] = place.name


def _require_recorded(detector: Recorded, pairs: Sequence[tuple[Path, Prompt]], problems: Problems) -> None:
    names = [recorded.picture_name(path.as_posix()) for path, _ in pairs]
    missing = [name for name in names if name not in detector.seen]
    for name in missing:
        problems.add(f"{detector.identity.name} has no line for {name}")


def _digests(pairs: Sequence[tuple[Path, Prompt]], problems: Problems) -> list[Picture]:
    """Read every picture once: whether it can be read at all, and its sha256."""
    found = []
    read = data.parallel(lambda pair: _try(pair[0]), pairs, data.cores())
    for (path, prompt), (sha256, why) in zip(pairs, tqdm(read, "reading", len(pairs), unit="image", disable=None), strict=True):
        if why:
            problems.add(f"{recorded.picture_name(path.as_posix())} {why}")
        found.append(Picture(path, prompt, sha256))
    return found


def _try(path: Path) -> tuple[str, str]:
    """sha256 of a picture, and what is wrong with it."""
    read = path.read_bytes()
    try:
        _pixels(read)
    except ValueError as error:
        return "", str(error)
    return hashlib.sha256(read).hexdigest(), ""


def _pixels(read: bytes) -> np.ndarray:
    """uint8 (H, W, 3), turned as its EXIF says, which the official evaluation does too."""
    return np.asarray(ImageOps.exif_transpose(images.unpack(images.inspect(read))))


# --- what was judged already -------------------------------------------------------------------


class Kept:
    """Outcomes by picture and prompt, in a file of lines that only grows. Hold a lock around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        os.truncate(path, end)  # a killed run's torn end
        rows = map(json.loads, whole[:end].splitlines())
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in rows}

    def append(self, found: Mapping[str, Outcome]) -> None:
        """Keep outcomes; they are on the disk when this returns."""
        rows: list[dict[str, Any]] = [
            {"key": key, "correct": one.correct, "reasons": one.reasons, "details": one.details} for key, one in found.items()
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["key"]: row for row in rows}


def _key(picture: Picture) -> str:
    return hashlib.sha256(f"{picture.sha256}\0{picture.prompt.key}".encode()).hexdigest()


def _outcomes(gallery: Gallery, detector: Detector | Recorded) -> list[dict[str, Any]]:
    """The outcome of every picture; those that are known are not judged again."""
    name = hashlib.sha256(json.dumps(_judge_key(detector), sort_keys=True).encode()).hexdigest()[:24]
    place = data.state_dir("geneval", name)
    with data.locked(place / "lock"):
        kept = Kept(place / "outcomes.jsonl")
        keys = [_key(picture) for picture in gallery.pictures]
        missing = {key: picture for key, picture in zip(keys, gallery.pictures, strict=True) if key not in kept.rows}
        with tqdm(total=len(keys), initial=len(keys) - len(missing), desc="geneval", unit="image", disable=None) as bar:
            shown = data.parallel(_shown, missing.values(), data.cores(), 2 * AT_ONCE)
            outcomes = zip(missing, judge(detector, shown), strict=True)
            for batch in _batches(outcomes, AT_ONCE):
                kept.append(dict(batch))
                bar.update(len(batch))
        return [kept.rows[key] for key in keys]


def _shown(picture: Picture) -> tuple[Prompt, str, np.ndarray]:
    return picture.prompt, picture.name, _pixels(picture.path.read_bytes())


def _judge_key(detector: Detector | Recorded) -> dict[str, Any]:
    """What outcomes depend on beside picture and prompt."""
    identity: Identity = detector.identity
    told = {"name": identity.name, "weights": identity.weights, "more": dict(identity.more)}
    return {"detector": told, "rules": vars(detector.rules), "code": data.code_version()["source"], "torch": torch.__version__}


# --- two runs ----------------------------------------------------------------------------------


def read_run(places: Sequence[Path]) -> tuple[Run, list[str]]:
    """Several seeds' results (folders with results.jsonl, or such files, the official command's too) as one run, and what judged
    each: empty where summary.json is missing. Raises ValueError where they do not answer the same prompts."""
    read = [_results(place) for place in places]
    prompts = [prompts for prompts, _ in read]
    for place, found in zip(places[1:], prompts[1:]):
        if [prompt.key for prompt in found] != [prompt.key for prompt in prompts[0]]:
            raise ValueError(f"{place} and {places[0]} answer different prompts; they are no seeds of one run")
    counts = {correct.shape[1] for _, correct in read}
    if len(counts) > 1:
        raise ValueError(f"{', '.join(map(str, places))} have different numbers of images per prompt: {sorted(counts)}")
    return Run.of(prompts[0], np.stack([correct for _, correct in read], axis=1)), [_judged_by(place) for place in places]


def _results(place: Path) -> tuple[list[Prompt], np.ndarray]:
    """Prompts, sorted, and bool (P, I)."""
    path = place / RESULTS if place.is_dir() else place
    if not path.is_file():
        raise ValueError(f"{path} is not here; make it with: vapi geneval score {place}")
    found: dict[tuple[str, str], list[bool]] = {}  # by prompt, and by folder, where a list holds a prompt twice
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            metadata, correct, place = row["metadata"], bool(row["correct"]), Path(row["filename"]).parent.parent
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no line of GenEval's results") from None
        metadata = metadata if isinstance(metadata, str) else json.dumps(metadata)  # official files hold it as text
        prompt = metric.parse_prompt(metadata, f"{path} line {number}", None, None)
        prompts[prompt.key] = prompt
        found.setdefault((prompt.key, place.name), []).append(correct)
    counts = {len(row) for row in found.values()}
    if len(counts) != 1:
        raise ValueError(f"{path} holds {sorted(counts)} images per prompt; every prompt needs as many as the others")
    return [prompts[key] for key, _ in sorted(found)], np.array([found[key] for key in sorted(found)])


def _judged_by(place: Path) -> str:
    path = place / SUMMARY if place.is_dir() else place.with_name(SUMMARY)
    if not path.is_file():
        return ""
    read = data.read_json(path)
    return json.dumps([read["detector"][name] for name in ("name", "weights", "more")] + [read["rules"]])


def compare(a: Sequence[Path], b: Sequence[Path]) -> str:
    """Two runs of one or several seeds, paired by prompt, as text. Raises ValueError if they had different judges or prompts."""
    (first, judges_a), (second, judges_b) = read_run(a), read_run(b)
    known = {judge for judge in (*judges_a, *judges_b) if judge}
    if len(known) > 1:
        raise ValueError(f"these results come from different detectors, whose numbers do not compare: {' and '.join(sorted(known))}")
    lines = [f"a: {', '.join(map(str, a))}", f"b: {', '.join(map(str, b))}"]
    counts = " and ".join(f"{run.seeds} x {run.images}" for run in (first, second))
    lines += [f"{len(first.prompts):,} prompts, seeds x images {counts}, paired by prompt", ""]
    if not (all(judges_a) and all(judges_b)):
        lines.insert(2, f"not every result says its detector (no {SUMMARY} beside it); see that they had the same")
    return "\n".join([*lines, metric.comparison_table(metric.compare(first, second))])


# --- generation --------------------------------------------------------------------------------

Draw = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Captions and seeds (B) to pictures, uint8 (B, H, W, 3); each hangs on its own caption and seed alone."""


def generate_folder(
    draw: Draw,
    prompts: Sequence[Prompt],
    out: Path,
    images_per_prompt: int = metric.OFFICIAL_IMAGES,
    seed: int = 0,
    images_per_batch: int = ONE_BATCH,
    made_by: Mapping[str, Any] | None = None,
) -> None:
    """Write GenEval's layout: NNNNN/metadata.jsonl, NNNNN/samples/0000.png ..., NNNNN/grid.png, and generated.json.

    Image i of prompt n is number n * images_per_prompt + i of the seed (``image_seed``). Prompts that are complete are left as
    they are. ``made_by``: what else the pictures hang on, as plain values. Raises ValueError if ``out`` holds anything else.
    """
    out = Path(out)
    made = {"prompts": metric.list_digest(prompts), "images_per_prompt": images_per_prompt, "seed": seed, **(made_by or {})}
    with data.locked(data.state_dir("locks") / f"{data.short_digest(str(out.resolve()))}.lock", wait=False):
        _require_ours(out, made)
        missing = {number for number in range(len(prompts)) if not (out / f"{number:05d}").is_dir()}
        done = (len(prompts) - len(missing)) * images_per_prompt
        with tqdm(total=len(prompts) * images_per_prompt, initial=done, desc="generate", unit="image", disable=None) as bar:
            drawn = _drawn(draw, prompts, missing, images_per_prompt, seed, images_per_batch)
            written = data.parallel(lambda one: _write_prompt(out / f"{one[0]:05d}", prompts[one[0]], one[1]), drawn, data.cores())
            for _ in written:  # by threads, while the next ones are drawn
                bar.update(images_per_prompt)


def _drawn(
    draw: Draw, prompts: Sequence[Prompt], missing: set[int], images_per_prompt: int, seed: int, images_per_batch: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Pictures (I, H, W, 3) of every prompt that is missing, with its number."""
    # the same prompts share a batch whatever was there before: a place in a batch may decide a last bit
    for numbers in _batches(range(len(prompts)), max(1, images_per_batch // images_per_prompt)):
        if missing.isdisjoint(numbers):
            continue
        captions = [prompts[number].text for number in numbers for _ in range(images_per_prompt)]
        seeds = [image_seed(seed, number * images_per_prompt + i) for number in numbers for i in range(images_per_prompt)]
        drawn = draw(captions, seeds)
        assert drawn.dtype == np.uint8 and drawn.ndim == 4 and len(drawn) == len(seeds), (drawn.dtype, drawn.shape)
        pictures = drawn.reshape(len(numbers), images_per_prompt, *drawn.shape[1:])
        yield from ((number, pictures[n]) for n, number in enumerate(numbers) if number in missing)


def _require_ours(out: Path, made: dict[str, Any]) -> None:
    """Enter a folder that is new, or that the same command began."""
    path = out / MADE
    if path.is_file():
        before = data.read_json(path)
        plain = json.loads(json.dumps(made))
        if differing := sorted(name for name in before.keys() | plain.keys() if before.get(name) != plain.get(name)):
            raise ValueError(f"{out} holds pictures that were made with another {', '.join(differing)}; give another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than pictures of this command; give a new folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        data.write_json(path, made)


def _write_prompt(place: Path, prompt: Prompt, pictures: np.ndarray) -> None:
    """One prompt's folder, whole or not at all."""
    partial = place.with_name(f".{place.name}.partial")
    if partial.exists():  # a killed run's
        shutil.rmtree(partial)
    (partial / "samples").mkdir(parents=True)
    write_text(partial / "metadata.jsonl", json.dumps(prompt.metadata) + "\n")
    for n, picture in enumerate(pictures):
        _write_png(partial / "samples" / f"{n:04d}.png", Image.fromarray(picture))
    _write_png(partial / "grid.png", images.sheet(pictures, columns=2))
    partial.rename(place)


def _write_png(path: Path, picture: Image.Image) -> None:
    with path.open("wb") as file:
        file.write(images.png_bytes(picture))
        file.flush()
        os.fsync(file.fileno())


def painter(policy: Policy, model: ModelConfig, evaluate: EvaluateConfig) -> Draw:
    """How a generator of captions draws, with the sampler of the configuration; at most ``images_per_batch`` pictures at a time."""
    how = {name: getattr(evaluate, name) for name in sampler.Sampling.__annotations__}

    @torch.inference_mode()
    def draw(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        condition = policy.condition(captions)
        with models.autocast(model.precision, policy.device):
            codes = policy.generate(condition, seeds, evaluate.images_per_batch, **how)
        return images.to_uint8(sampler.decode(policy, codes)).permute(0, 2, 3, 1).cpu().numpy()

    return draw


def generate(model: ModelConfig, evaluate: EvaluateConfig, out: Path) -> None:
    """Pictures of ``model.generator`` for ``evaluate.prompts`` as a folder. Raises ValueError for a generator of classes."""
    if not model.captions:
        raise ValueError("model.text_encoder is empty: this generator draws classes, and knows no captions")
    if len(evaluate.seeds) > 1:
        raise ValueError(f"evaluate.seeds is {evaluate.seeds}, and a folder holds one seed's pictures; give one, as in --seeds 1")
    prompts = metric.read_prompts(evaluate.prompts, None, None)
    made_by = {
        "generator": data.known_digest(weights.locate(model.generator)),
        "tokenizer": data.tokenizer_digest(model),
        "text_encoder": data.encoder_digest(model),
        "code": data.code_version()["source"],
        "batch": evaluate.images_per_batch or ONE_BATCH,
    }
    made_by |= {name: getattr(evaluate, name) for name in sampler.Sampling.__annotations__}
    made_by |= {name: getattr(model, name) for name in ("policy", "image_size", "precision")}
    draw = painter(models.load(model), model, evaluate)
    generate_folder(draw, prompts, out, evaluate.images_per_prompt, evaluate.seeds[0], evaluate.images_per_batch or ONE_BATCH, made_by)
    print(f"{len(prompts):,} prompts x {evaluate.images_per_prompt} images -> {out}", file=sys.stderr)
