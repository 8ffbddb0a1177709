"""Runs beside each other: what a run has kept, read from its folders, and what two of them have in common.

A run is the folder ``artifacts`` (or a copy, or the folder of one stage beside the others), finished or not: whatever is there is
read, and a notice says what is not. Folders that do not belong together, because a stage was repeated without those after it, are
not taken for one run. ``compare_page.py`` makes the page; ``keep`` hands MLflow what a page is made of, so that a run can be
compared that is nowhere else any more (``track/reader.py`` fetches it).

Numbers of two protocols are never set side by side: ``by_protocol`` sorts runs into groups that may be compared.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vapi import data, images, report
from vapi.config import FOR_REWARDS, STAGES, TUNED, flat

T = TypeVar("T")
Scores = Mapping[str, Any]

UNFINISHED = "metrics.jsonl"
"""What a run of the stage tune that has not ended (.vapi/resume/tune/...) is known by; it has no config.json."""
KEPT: dict[str, tuple[str, ...]] = {
    "subset": ("quality.json",),
    "tokens": ("summary.json",),
    "tune": (UNFINISHED, "summary.json", "sheets"),
    "evaluate": ("metrics.json", "classes.csv", "prompts.csv", "sheet-before-after.png", "sheet-best.png", "sheet-prompts.png"),
    "register": ("registration.json",),
}
"""What a page reads of each stage's folder, beside config.json and provenance.json."""
HEAVY = {"tune": "model.safetensors", "tokens": "codes.npy", "subset": "manifest.parquet", "evaluate": "report.html"}
"""What a copy that was made for the page alone does not hold; a whole folder can be held against its digest."""
REWARD_FILES = {"lpips": ("perceptual", "vgg", "alex", "lpips"), "class": ("classifier",), "clip": ("clip",)}
"""What the inputs of the stage tune call the files behind a reward."""
MOST = 6
"""Runs on a page, each with a colour of its own."""
SIDES = {"plain": "sheet-before-after.png", "best": "sheet-best.png"}


@dataclass(frozen=True)
class Looked:
    """What one sheet of the stage tune shows: pictures uint8 (B, H, W, 3) by row, rewards of its draws by part, and what a part counts."""

    step: int
    keys: Sequence[str]
    rewards: Mapping[str, Sequence[float]]
    weights: Mapping[str, float]
    pictures: Mapping[str, np.ndarray]

    @property
    def subject(self) -> str:
        """Digest of what was to be redrawn: the images as they were prepared, and what the tokenizer keeps of them."""
        return hashlib.sha256(b"".join(self.pictures[row].tobytes() for row in ("real", "reconstruction"))).hexdigest()

    def draws_like(self, other: Looked) -> bool:
        """Whether another one drew the same pictures and was rewarded alike for them."""
        alike = self.rewards == other.rewards and self.weights == other.weights
        return alike and np.array_equal(self.pictures["draw"], other.pictures["draw"])


@dataclass(frozen=True)
class Run:
    """One run, as far as it has come."""

    name: str  # a letter
    place: str  # as the user names it; empty where there is one only
    folders: Mapping[str, Path]  # by stage
    notices: Sequence[str] = ()  # what a reader must know

    def _json(self, stage: str, file: str) -> dict[str, Any]:
        path = self.folders[stage] / file if stage in self.folders else None
        return _read_json(path) if path and path.is_file() else {}

    def _rows(self, stage: str, file: str) -> list[dict[str, str]]:
        path = self.folders[stage] / file if stage in self.folders else None
        if path is None or not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as text:
            return list(csv.DictReader(text))

    @cached_property
    def made(self) -> dict[str, dict[str, Any]]:
        """config.json by stage: the sections of the configuration, and digests of the inputs."""
        return {stage: self._json(stage, "config.json") for stage in self.folders}

    @cached_property
    def told(self) -> dict[str, dict[str, Any]]:
        """provenance.json by stage: code, seconds, device."""
        return {stage: self._json(stage, "provenance.json") for stage in self.folders}

    @cached_property
    def results(self) -> dict[str, Any]:
        """metrics.json; empty before the evaluation."""
        return self._json("evaluate", "metrics.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the stage tune says of itself at its end."""
        return self._json("tune", "summary.json")

    @cached_property
    def registration(self) -> dict[str, Any]:
        """What the gates said, and which version was made; empty before the stage register."""
        return self._json("register", "registration.json")

    @cached_property
    def tokens(self) -> dict[str, Any]:
        """What the stage tokens says of the codes of real images."""
        return self._json("tokens", "summary.json")

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """A dictionary per step of tuning."""
        path = self.folders["tune"] / UNFINISHED if "tune" in self.folders else None
        return report.read_curves(path) if path and path.is_file() else []

    @cached_property
    def classes(self) -> list[dict[str, float]]:
        """By class: its number, samples, and the share that is recognised, of base and tuned; empty where that is not known."""
        return [{name: float(value) for name, value in row.items()} for row in self._rows("evaluate", "classes.csv")]

    @cached_property
    def prompts(self) -> list[dict[str, str]]:
        """The prompts of evaluate's sheet: the first of each task, with the share of right pictures by side and judge."""
        rows = self._rows("evaluate", "prompts.csv")
        tasks = dict.fromkeys(row["task"] for row in rows)
        return [row for task in tasks for row in [row for row in rows if row["task"] == task][: data.PROMPTS_SHOWN]]

    @property
    def settings(self) -> dict[str, Any]:
        """All fields of the configuration that its stages wrote down, by dotted name; later stages have the last word."""
        return {name: value for stage in STAGES if stage in self.made for name, value in flat(self.made[stage].get("sections", {})).items()}

    @property
    def weights(self) -> dict[str, float]:
        """What each part of the reward counts; nothing where that was not written down."""
        start = "tune.rewards."
        return {name.removeprefix(start): value for name, value in self.settings.items() if name.startswith(start)}

    @property
    def protocol(self) -> dict[str, Any]:
        """What its numbers may be compared by."""
        return flat(self.results["protocol"]) if self.results else {}

    # --- pictures, cut from the sheets ---

    def samples(self, setting: str) -> dict[str, np.ndarray]:
        """The first samples of base and tuned (plain, or best: each at its best), uint8 (N, H, W, 3); nothing where there is no sheet."""
        path = self.folders["evaluate"] / SIDES[setting] if "evaluate" in self.folders else None
        if path is None or not path.is_file():
            return {}
        asked = self.made["evaluate"]["sections"]
        side, count = asked["evaluate"]["resize"] or asked["model"]["image_size"], asked["evaluate"]["sheet_images"]
        return dict(zip(("base", "tuned"), _bands(path, [count] * 2, data.SHEET_COLUMNS, side), strict=True))

    @cached_property
    def answers(self) -> dict[str, np.ndarray]:
        """Pictures of base and tuned for ``prompts``, uint8 (K, I, H, W, 3)."""
        path = self.folders["evaluate"] / "sheet-prompts.png" if self.prompts else None
        if path is None or not path.is_file():
            return {}
        asked = self.made["evaluate"]["sections"]
        each = asked["evaluate"]["images_per_prompt"]
        bands = _bands(path, [2 * each] * len(self.prompts), 2 * each, asked["model"]["image_size"])
        return {name: np.stack([band[n * each : (n + 1) * each] for band in bands]) for n, name in enumerate(("base", "tuned"))}

    @cached_property
    def looks(self) -> tuple[Looked, ...]:
        """The first and the last sheet of the stage tune; nothing where there are not two."""
        paths = sorted((self.folders["tune"] / "sheets").glob("step-*.json")) if "tune" in self.folders else []
        if len(paths) < 2 or "model" not in self.made["tune"].get("sections", {}):
            return ()
        return self._look(paths[0]), self._look(paths[-1])

    def _look(self, path: Path) -> Looked:
        found = _read_json(path)
        side, count = self.made["tune"]["sections"]["model"]["image_size"], len(found["keys"])
        rows = images.cut(_open(path.with_suffix(".png")), len(data.SHEET_ROWS) * count, count, side, captions=True)
        pictures = {row: rows[n * count : (n + 1) * count] for n, row in enumerate(data.SHEET_ROWS)}
        return Looked(found["step"], found["keys"], found["rewards"], self.weights, pictures)


def _bands(path: Path, counts: Sequence[int], columns: int, side: int) -> list[np.ndarray]:
    """``report.unbanded`` of a sheet of the stage evaluate."""
    try:
        return report.unbanded(_open(path), counts, columns, side)
    except ValueError as error:
        raise ValueError(f"{path} cannot be cut up ({error}); run the stage again: vapi evaluate") from None


def _open(path: Path) -> np.ndarray:
    return np.asarray(images.decode(path.read_bytes()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(data.read_json(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again, or run the stage again: vapi {path.parent.name}") from None


# --- folders -> runs ---------------------------------------------------------------------------


def read_all(places: Mapping[str, Path]) -> list[Run]:
    """The runs in some folders, by the names that the user gave them. Raises ValueError for a folder without one."""
    if len(places) > MOST:
        raise ValueError(f"{len(places)} runs do not fit on a page, where each has a colour of its own; give {MOST} at most")
    return [read(place, folder, chr(ord("A") + n)) for n, (place, folder) in enumerate(places.items())]


def read(place: str, folder: Path, name: str = "A") -> Run:
    """The run in a folder. Raises ValueError if there is none."""
    folders = _stages_in(folder)
    if not folders:
        stages = ", ".join(STAGES)
        raise ValueError(
            f"{folder} holds no run: neither it nor a folder in it ({stages}) is what a stage of vapi wrote; "
            "give a folder like artifacts, or a run's id in MLflow"
        )
    fetched = folder / data.NOTICES
    notices = data.read_json(fetched) if fetched.is_file() else ()
    return _without_strangers(Run(name, place, folders, notices), _stage_of(folder))


def of(evaluate: Path, tune: Path) -> Run:
    """The run of one evaluation that has just ended, and what lies beside the tuned weights; no gates, which come later."""
    before = {stage: folder for stage, folder in _beside(tune).items() if stage != "register"}
    return _without_strangers(Run("A", "", {**before, "tune": tune, "evaluate": evaluate}), "evaluate")


def _stages_in(folder: Path) -> dict[str, Path]:
    """The stages' folders in ``folder``, or beside it where it is a stage's own."""
    own = _stage_of(folder)
    if not own:
        return _below(folder)
    return {own: folder} if own == "tune" and not (folder / "config.json").is_file() else {**_beside(folder), own: folder}


def _beside(folder: Path) -> dict[str, Path]:
    return _below(folder.resolve().parent)


def _below(folder: Path) -> dict[str, Path]:
    return {stage: folder / stage for stage in STAGES if _stage_of(folder / stage) == stage}


def _stage_of(folder: Path) -> str:
    """Which stage wrote a folder; empty if none."""
    if (folder / "config.json").is_file():
        return str(_read_json(folder / "config.json").get("stage", ""))
    return "tune" if (folder / UNFINISHED).is_file() else ""


def _without_strangers(run: Run, named: str) -> Run:
    """The same without folders that others of it were not made from: artifacts/tune made anew, and not evaluated yet. ``named`` is the
    stage whose folder the user named, which is what he wants to see; empty for a whole run."""
    folders, notices = dict(run.folders), list(run.notices)
    tuned = [path for path in map(folders["tune"].joinpath, TUNED.values()) if path.is_file()] if "tune" in folders else []
    measured = run.results.get("weights", {}).get("tuned")
    if measured and tuned and data.known_digest(tuned[0]) != measured:
        if named == "tune":
            folders = {stage: folder for stage, folder in folders.items() if stage not in ("evaluate", "register")}
        else:
            folders = {stage: folder for stage, folder in folders.items() if stage in ("evaluate", "register")}
            notices.append("its tuning is not shown: the evaluation is of other weights than those that lie beside it; run: vapi evaluate")
    for stage in ("subset", "tokens"):
        wanted = run.made.get("tune", {}).get("inputs", {}).get(stage)
        if wanted and stage in folders and (folders[stage] / HEAVY[stage]).is_file() and data.known_digest(folders[stage]) != wanted:
            notices.append(f"its {stage} are not shown: those that lie beside it are not those it was tuned on; run: vapi tune")
            del folders[stage]
    if "register" in folders and not _judged(folders):
        notices.append("its gates are not shown: they judged another evaluation than lies beside them; run: vapi register")
        del folders["register"]
    return _with_notices(Run(run.name, run.place, folders, notices))


def _judged(folders: Mapping[str, Path]) -> bool:
    """Whether the gates are of the evaluation beside them. A copy that was made for the page alone is taken at its word."""
    if "evaluate" not in folders:
        return False
    whole = (folders["evaluate"] / HEAVY["evaluate"]).is_file()
    return not whole or report.has_judged(folders["register"], folders["evaluate"])


def _with_notices(run: Run) -> Run:
    """The same, with words for what has not been done or was not kept."""
    notices = list(run.notices)
    if status := next((made["status"] for made in run.made.values() if made.get("status")), ""):
        notices.append(f"MLflow calls it {status.lower()}: what it had logged by then is shown, and pictures are kept at a stage's end")
    elif "tune" in run.folders and not run.summary:
        last = run.curves[-1]["step"] if run.curves else 0
        notices.append(f"tuning has not ended: step {last} is the last so far; the same vapi tune continues it")
    if "evaluate" not in run.folders:
        notices.append("it is not evaluated, so FID and its kin are missing; run: vapi evaluate")
    return Run(run.name, run.place, run.folders, notices)


# --- what runs have in common ------------------------------------------------------------------


def by_protocol(runs: Sequence[Run]) -> list[list[Run]]:
    """The evaluated runs, those of one protocol together, in the order given."""
    return _alike([run for run in runs if run.results], lambda run: json.dumps(run.protocol, sort_keys=True))


def by_subjects(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs whose samples answer the same questions, together: the same random numbers, and classes or captions."""

    def asked(run: Run) -> str:
        protocol = run.results["protocol"]
        size = protocol["image_size"], protocol["resize"]
        return json.dumps([protocol["seeds"][0], protocol["labels"], size, protocol["reference"]["sha256"]])

    return _alike([run for run in runs if run.samples("plain")], asked)


def by_images(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that hold out the same images, to the pixel, and whose tokenizer makes the same of them, together."""
    return _alike([run for run in runs if run.looks], lambda run: json.dumps([run.looks[0].keys, run.looks[0].subject]))


def _alike(items: Sequence[T], key: Callable[[T], str]) -> list[list[T]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def differing(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The names whose values are not the same in all columns, with the value in each; None where one has none."""
    names = dict.fromkeys(name for column in columns for name in column)
    found = {name: [column.get(name) for column in columns] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before looking at numbers, in sentences: what each run lacks, and which ones do not compare."""
    found = [f"{run.name} ({run.place}): {notice}." if run.place else f"{notice}." for run in runs for notice in run.notices]
    groups = by_protocol(runs)
    if len(groups) > 1:
        fields = ", ".join(differing([group[0].protocol for group in groups]))
        names = " and ".join(", ".join(run.name for run in group) for group in groups)
        found.append(f"{names} were measured by different protocols ({fields}): their numbers do not compare, and have their own tables.")
    weighed = _weighed_differently([run for run in runs if run.weights])
    if weighed:
        found.append(f"Rewards are put together differently ({', '.join(weighed)}): compare a curve with its own beginning.")
    return found


def _weighed_differently(runs: Sequence[Run]) -> list[str]:
    """The fields in which runs that say what they rewarded differ: weights that count, and the networks behind them."""
    fields = [*differing([{f"tune.rewards.{part}": weight for part, weight in run.weights.items() if weight} for run in runs])]
    for part, files in REWARD_FILES.items():
        field, *_ = FOR_REWARDS[part]
        fields += [field] if _differ_in([run for run in runs if run.weights.get(part)], field, files) else []
    return fields


def _differ_in(runs: Sequence[Run], field: str, files: Sequence[str]) -> bool:
    """Whether a network is not the same in all runs: by the digests of its files where all have them, else by its name."""
    digests = [[run.made["tune"]["inputs"].get(name) for name in files] for run in runs]
    names = [run.settings.get(field) for run in runs]
    known: list[Any] = digests if all(map(any, digests)) else [name for name in names if name]
    return any(one != known[0] for one in known)


# --- what MLflow keeps -------------------------------------------------------------------------


def kept(stage: str, out: Path) -> list[Path]:
    """The files and folders of a stage's result that a page is made of."""
    return [out / name for name in ("config.json", "provenance.json", *KEPT[stage]) if (out / name).exists()]
