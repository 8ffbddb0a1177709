"""GenEval: the official function's answers, every rule's place in them, statistics, folders of pictures and what is wrong with them."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import inspect
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
from PIL import Image

from vapi import cli, data, geneval, models
from vapi.config import EvaluateConfig, ModelConfig
from vapi.metrics import geneval as metric
from vapi.metrics.detections import Detections, Identity, Objects, Rules
from vapi.metrics.geneval import Prompt, Run
from vapi.models import sampler

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "geneval.json.gz"


# --- the official function ---------------------------------------------------------------------


@functools.cache
def golden() -> list[dict[str, Any]]:
    """Made by tests/golden/make_geneval.py: prompts and detections with the official outcome."""
    cases: list[dict[str, Any]] = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return cases


def seen(case: dict[str, Any]) -> dict[str, Objects]:
    return {
        name: Objects(np.array(rows, np.float32).reshape(-1, 5), colours=case["colours"][name]) for name, rows in case["objects"].items()
    }


def colours(objects: Objects) -> Sequence[str]:
    return list(objects.colours)


def differing(module: ModuleType) -> list[int]:
    """Cases in which a scoring does not come to the official outcome."""
    wrong = []
    for number, case in enumerate(golden()):
        prompt = module.parse_prompt(json.dumps(case["metadata"]), f"case {number}")
        objects = seen(case)
        found = module.score(prompt, objects, Rules(**case["rules"]), colours)
        details = {name: objects[name].boxes[rows].tolist() for name, rows in case["kept"].items()}
        if (found.correct, found.reasons, found.details) != (case["correct"], case["reasons"], details):
            wrong.append(number)
    return wrong


def test_scoring_equals_the_official_function() -> None:
    assert len(golden()) >= 300 and not differing(metric)
    tags = {case["metadata"]["tag"]: set() for case in golden()}
    for case in golden():
        tags[case["metadata"]["tag"]].add(case["correct"])
    assert tags == {tag: {True, False} for tag in metric.TASKS}


MUTANTS = {
    "a score at the threshold counts": ("scores[order] > threshold", "scores[order] >= threshold"),
    "counting has no threshold of its own": (
        'rules.counting_threshold if prompt.tag == "counting" else rules.threshold',
        "rules.threshold",
    ),
    "the limit of objects is 3": ("[: rules.max_objects]", "[:3]"),
    "objects without limit": ("[: rules.max_objects]", ""),
    "the least sure come first": ("[::-1]", ""),
    "overlapping objects stay": ("if rules.max_overlap == 1:", "if True:"),
    "overlap without the last pixel": (
        "box[2] - box[0] + 1, 0) * np.maximum(box[3] - box[1] + 1",
        "box[2] - box[0], 0) * np.maximum(box[3] - box[1]",
    ),
    "an overlap at the limit stays": ("< rules.max_overlap]", "<= rules.max_overlap]"),
    "colours of all objects": (
        "complaint = _complaint(clause, found,",
        "complaint = _complaint(clause, kept.get(clause.name, NOTHING) if clause.colour else found,",
    ),
    "one object of the colour is enough": ('    if count >= clause.count:\n        return ""', '    if count:\n        return ""'),
    "position after a failed colour": ("if clause.relation and not complaint:", "if clause.relation:"),
    "position of a target that failed": ("groups.append(NOTHING if complaint else found)", "groups.append(found)"),
    "the first object's position decides": ("for box in found.boxes:", "for box in found.boxes[:1]:"),
    "the first target decides": ("for other in target.boxes:", "for other in target.boxes[:1]:"),
    "another margin": ("np.abs(offset) - margin *", "np.abs(offset) - margin / 2 *"),
    "the margin of one object": ("(sizes[0] + sizes[1])", "sizes[0]"),
    "position over the distance beyond the margin": ("beyond / np.linalg.norm(offset)", "beyond / np.linalg.norm(beyond)"),
    "diagonals have one relation": ('"left of": x < -0.5', '"left of": x < -0.71'),
    "y upwards": ('"above": y < -0.5, "below": y > 0.5', '"above": y > 0.5, "below": y < -0.5'),
    "one too many is fine": (
        "        if count >= clause.count:\n            reasons",
        "        if count > clause.count:\n            reasons",
    ),
    "nothing is one too many": ("for clause in prompt.exclude:", "for clause in ():"),
    "one demand is enough": ("Outcome(not reasons,", "Outcome(len(reasons) < len(prompt.include),"),
}


def mutant(old: str, new: str) -> ModuleType:
    source = inspect.getsource(metric)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the scoring"
    module = ModuleType("mutant")
    sys.modules["mutant"] = module  # where dataclasses look for annotations
    try:
        exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    finally:
        del sys.modules["mutant"]
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_every_rule_shows_in_the_golden_cases(name: str) -> None:
    assert differing(mutant(*MUTANTS[name])), "no case would notice"


# --- prompts -----------------------------------------------------------------------------------


def line(**changes: Any) -> str:
    """A prompt's JSON; None takes a field away."""
    values: dict[str, Any] = {"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"} | changes
    return json.dumps({name: value for name, value in values.items() if value is not None})


def test_the_official_list() -> None:
    prompts = metric.read_prompts(ROOT / geneval.PROMPTS)
    assert len(prompts) == metric.OFFICIAL_PROMPTS and metric.list_digest(prompts) == metric.OFFICIAL
    tags = [prompt.tag for prompt in prompts]
    assert [tags.count(task) for task in metric.TASKS] == [80, 99, 80, 94, 100, 100]
    assert metric.list_digest(prompts[::-1]) == metric.OFFICIAL != metric.list_digest(prompts[1:])
    assert "MIT" in (ROOT / geneval.PROMPTS).with_name("LICENSE").read_text() and "Dhruba Ghosh" in (ROOT / "NOTICE").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "a prompt is a mapping with tag, include"),
        (line(tag="colour"), "tag 'colour' is unknown; known: single_object, two_object, counting"),
        (line(tag=None), "it lacks tag"),
        (line(prompt=None), "it lacks prompt"),
        (line(prompt=" "), "prompt is ' '"),
        (line(include=None), "it lacks include"),
        (line(include=[]), "include is []"),
        (line(exlude=[]), "field 'exlude'; did you mean 'exclude'?"),
        (line(include=["bench"]), "include[0] is 'bench'; it must be a mapping"),
        (line(include=[{"class": "bench"}]), "include[0] lacks count"),
        (line(include=[{"class": "bench", "count": 0}]), "include[0].count is 0"),
        (line(include=[{"class": "bench", "count": "2"}]), "include[0].count is '2'"),
        (
            line(include=[{"class": "mouse", "count": 1}]),
            "include[0].class is 'mouse', which the detector does not know; did you mean 'computer mouse'?",
        ),
        (line(include=[{"class": ["bench"], "count": 1}]), "include[0].class is ['bench']; it must be a name"),
        (line(include=[{"class": "bench", "count": 1, "colour": "red"}]), "unknown field 'colour'; did you mean 'color'?"),
        (line(include=[{"class": "bench", "count": 1, "color": "rde"}]), "include[0].color is 'rde'"),
        (line(include=[{"class": "bench", "count": 1, "position": ["above", 0]}]), "refers to include[0]; it must be an earlier one"),
        (line(include=[{"class": "bench", "count": 1, "position": "above"}]), "position is 'above'; it must be a relation and"),
        (
            line(include=[{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": ["over", 0]}]),
            "include[1].position is 'over'; known: left of, right of, above, below",
        ),
        (line(exclude=[{"class": "bench", "count": 2, "color": "red"}]), "exclude[0] has an unknown field 'color'"),
    ],
)
def test_a_line_that_is_no_prompt(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line() + "\n\n" + text + "\n")
    with pytest.raises(ValueError, match="line 3") as error:
        metric.read_prompts(path)
    assert words in str(error.value)


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, words in (("none.jsonl", "is not here"), ("empty.jsonl", "is empty"), ("binary.jsonl", "no text in UTF-8")):
        with pytest.raises(ValueError, match=words):
            metric.read_prompts(tmp_path / name)


def test_a_detector_without_colours_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="it knows none .*--clip"):
        metric.parse_prompt(line(include=[{"class": "bench", "count": 1, "color": "red"}]), "here", metric.CLASSES, ())


def test_notes_beside_a_prompt_are_kept() -> None:
    prompt = metric.parse_prompt(line(index=7), "here")
    assert prompt.metadata["index"] == 7 and prompt.key == metric.parse_prompt(line(), "here").key


# --- the table ---------------------------------------------------------------------------------

IDENTITY = Identity("blocks", "ab" * 32, "GenEval (blocks)")


def prompts_of(counts: dict[str, int]) -> list[Prompt]:
    return [Prompt(f"{tag} {n}", tag, (metric.Clause("bench", n + 1),)) for tag, count in counts.items() for n in range(count)]


SIZES = {"single_object": 80, "counting": 50, "position": 100}


def run_of(seed: int, shift: float = 0.0, seeds: int = 1, count: int = 4) -> Run:
    """Prompts of different difficulty, the same for every seed."""
    prompts = prompts_of(SIZES)
    ease = np.random.default_rng(99).beta(0.5, 0.7, len(prompts))
    correct = np.random.default_rng(seed).random((len(prompts), seeds, count)) < (ease + shift)[:, None, None]
    return Run.of(prompts, correct)


def test_the_table_is_the_official_one() -> None:
    """Against what the official summary computes with pandas."""
    run = run_of(0)
    rows = [
        {"metadata": prompt.text, "tag": prompt.tag, "correct": bool(one)}
        for prompt, of in zip(run.prompts, run.correct[:, 0])
        for one in of
    ]
    frame = pd.DataFrame(rows)
    found = metric.summary(run, IDENTITY, Rules())
    by_task = frame.groupby("tag", sort=False)["correct"].mean()
    assert {task: row["score"] for task, row in found["tasks"].items()} == pytest.approx(by_task.to_dict())
    assert found["overall"] == pytest.approx(by_task.mean()) != pytest.approx(frame["correct"].mean(), abs=1e-4)
    assert found["correct_images"] == pytest.approx(frame["correct"].mean())
    assert found["correct_prompts"] == pytest.approx(frame.groupby("metadata")["correct"].any().mean())
    text = metric.table(found)
    for words in ("GenEval (blocks) by blocks (weights abababababab)", "Total images: 920", "Total prompts: 230"):
        assert words in text
    correct = int(run.correct[80:130].sum())
    assert f"counting         = {correct / 200:.2%} ({correct} / 200)  S.E. " in text
    assert f"Overall score (avg. over tasks): {found['overall']:.5f}  S.E. {found['standard_error']:.5f}" in text
    assert json.loads(json.dumps(found)) == found


def test_the_standard_error_is_that_of_drawing_prompts() -> None:
    run = run_of(0)
    found = metric.summary(run, IDENTITY, Rules())
    variances = [np.var(run.shares[rows]) / len(rows) for rows in run.of_task().values()]
    assert found["standard_error"] == pytest.approx(np.sqrt(np.sum(variances)) / 3, rel=0.03)
    for task, variance in zip(run.of_task(), variances):
        assert found["tasks"][task]["standard_error"] == pytest.approx(np.sqrt(variance), rel=0.03)
    assert found == metric.summary(run, IDENTITY, Rules()), "one seed, one answer"


def test_the_standard_error_is_what_new_prompts_and_pictures_scatter_by() -> None:
    random = np.random.default_rng(5)
    prompts = prompts_of(SIZES)
    scores, errors = [], []
    for _ in range(150):
        ease = random.beta(0.5, 0.7, len(prompts))
        run = Run.of(prompts, random.random((len(prompts), 4)) < ease[:, None])
        scores.append(metric.overall(run.shares, run.of_task()))
        if len(errors) < 5:
            errors.append(metric.standard_errors(run.shares, run.of_task())["overall"])
    assert np.std(scores) == pytest.approx(np.mean(errors), rel=0.15)
    naive = np.sqrt(sum(0.25 / (4 * count) for count in SIZES.values())) / 3
    assert np.mean(errors) > 1.2 * naive, "pictures of a prompt are no independent draws"


def test_seeds_are_averaged_and_shown() -> None:
    run = run_of(0, seeds=3)
    found = metric.summary(run, IDENTITY, Rules())
    single = [metric.summary(Run.of(run.prompts, run.correct[:, seed]), IDENTITY, Rules()) for seed in range(3)]
    assert found["by_seed"] == pytest.approx([one["overall"] for one in single])
    for name in ("overall", "correct_images", "correct_prompts"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in single]))
    assert "By seed: " in metric.table(found)


def test_a_task_of_one_prompt_has_no_standard_error() -> None:
    found = metric.summary(Run.of(prompts_of({"counting": 1, "colors": 5}), np.eye(6, 4, dtype=bool)), IDENTITY, Rules())
    assert found["tasks"]["counting"]["standard_error"] is None is found["standard_error"]
    assert found["tasks"]["colors"]["standard_error"] is not None and "S.E." in metric.table(found)


def test_the_official_list_must_be_complete() -> None:
    official = metric.read_prompts(ROOT / geneval.PROMPTS)

    def words(prompts: Sequence[Prompt], count: int, asked: Sequence[Prompt] = ()) -> dict[str, Any]:
        return metric.summary(Run.of(prompts, np.ones((len(prompts), count), bool)), IDENTITY, Rules(), asked)

    whole = words(official, 4)
    assert whole["list"] == "GenEval" and not whole["partial"] and "PARTIAL" not in metric.table(whole)
    assert words(official, 2)["partial"] == ["2 instead of 4 images per prompt"]
    part = words(official[9:], 4, official)
    assert part["partial"] == ["544 of 553 prompts"] and part["missing"] == [prompt.text for prompt in official[:9]]
    assert "PARTIAL: 544 of 553 prompts; missing: 'a photo of a bench', " in metric.table(part)
    own = words(official[9:], 4)
    assert own["list"] == "other" and "other prompts than GenEval's" in metric.table(own)
    with pytest.raises(ValueError, match="1 prompts are not in the list"):
        words(prompts_of({"colors": 1}), 4, official)


@pytest.mark.parametrize("shape", [(229, 4), (230,), (230, 0), (230, 0, 4)])
def test_outcomes_that_do_not_fit_the_prompts(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not belong to 230 prompts"):
        Run.of(prompts_of(SIZES), np.zeros(shape))


# --- two runs ----------------------------------------------------------------------------------


def test_runs_are_paired_by_prompt_whatever_their_order() -> None:
    a, b = run_of(1, seeds=3), run_of(2, 0.05, seeds=2, count=5)
    order = np.random.default_rng(0).permutation(len(b.prompts))
    shuffled = Run([b.prompts[n] for n in order], b.correct[order])
    found = metric.compare(a, b)
    assert metric.compare(a, shuffled) == found
    row = found["overall"]
    assert row["difference"] == pytest.approx(
        metric.summary(b, IDENTITY, Rules())["overall"] - metric.summary(a, IDENTITY, Rules())["overall"]
    )
    assert row["low"] < row["difference"] < row["high"] and set(found) == {*SIZES, "overall"}
    back = metric.compare(b, a)["overall"]
    assert back["difference"] == pytest.approx(-row["difference"]) and back["low"] == pytest.approx(-row["high"])


def test_pairing_sees_what_two_standard_errors_would_not() -> None:
    a, b = run_of(1, seeds=3), run_of(2, 0.05, seeds=3)
    row = metric.compare(a, b)["overall"]
    apart = np.hypot(*(metric.summary(run, IDENTITY, Rules())["standard_error"] for run in (a, b)))
    assert row["standard_error"] < 0.7 * apart and row["low"] > 0 > row["difference"] - 1.96 * apart


def test_a_run_gains_nothing_on_itself() -> None:
    run = run_of(1)
    assert set(metric.compare(run, run)["overall"].values()) == {0.0, metric.overall(run.shares, run.of_task())}
    assert "overall" in metric.comparison_table(metric.compare(run, run))


def test_the_interval_covers_no_difference_in_nineteen_of_twenty_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "RESAMPLES", 1000)
    covered = [(row := metric.compare(run_of(2 * n), run_of(2 * n + 1))["overall"])["low"] <= 0 <= row["high"] for n in range(60)]
    assert 0.88 <= np.mean(covered) <= 1.0


def test_runs_of_different_prompts_do_not_compare() -> None:
    a = run_of(1)
    with pytest.raises(ValueError, match="1 are in the first alone, 0 in the second alone"):
        metric.compare(a, Run(a.prompts[1:], a.correct[1:]))


# --- a tiny world: benches are wide blocks, dogs are tall ones -------------------------------------

PAINT = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@dataclasses.dataclass
class Blocks:
    """A detector of solid blocks on black. It may die after some pictures, as a process does."""

    identity: Identity = IDENTITY
    rules: Rules = Rules()
    classes: tuple[str, ...] = ("bench", "dog")
    colours: tuple[str, ...] = tuple(PAINT)
    life: int = 10**9
    looked: int = 0

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        return [self._see(picture) for picture in pictures]

    def _see(self, picture: np.ndarray) -> Detections:
        if self.looked == self.life:
            raise KeyboardInterrupt
        self.looked += 1
        found: dict[str, list[list[float]]] = {}
        for rows, columns in scipy.ndimage.find_objects(scipy.ndimage.label(picture.any(axis=-1))[0]):
            name = "bench" if columns.stop - columns.start > rows.stop - rows.start else "dog"
            found.setdefault(name, []).append([columns.start, rows.start, columns.stop, rows.stop, 0.95])
        return {name: Objects(np.array(boxes, np.float32)) for name, boxes in found.items()}

    def colour(self, picture: np.ndarray, objects: Objects) -> list[str]:
        assert objects.name in self.classes
        centres = [picture[int(y0 + y1) // 2, int(x0 + x1) // 2] for x0, y0, x1, y1, _ in objects.boxes]
        return ["red" if centre[0] else "blue" for centre in centres]


def block_prompts() -> list[Prompt]:
    """Five prompts, of five tasks."""
    bench, dog = {"class": "bench", "count": 1}, {"class": "dog", "count": 1}
    rows = [
        ("single_object", [bench], "a bench"),
        ("two_object", [bench, dog], "a bench and a dog"),
        ("counting", [dog | {"count": 2}], "two dogs"),
        ("colors", [dog | {"color": "red"}], "a red dog"),
        ("position", [bench, dog | {"position": ["right of", 0]}], "a dog right of a bench"),
    ]
    more = [{"exclude": [dog | {"count": 3}]} if tag == "counting" else {} for tag, _, _ in rows]
    texts = [json.dumps({"tag": tag, "include": include, **extra, "prompt": text}) for (tag, include, text), extra in zip(rows, more)]
    return [metric.parse_prompt(text, text) for text in texts]


def paint(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """What a caption says, except that some seeds paint everything blue, and some paint nothing."""
    pictures = np.zeros((len(captions), 24, 24, 3), np.uint8)
    for picture, caption, seed in zip(pictures, captions, seeds):
        colour = PAINT["blue" if seed % 3 == 1 else "red"]
        if seed % 5 == 4:
            continue
        if "bench" in caption:
            picture[10:13, 1:9] = colour
        for n in range(caption.count("dog") + caption.count("two")):
            picture[2 + 12 * n : 9 + 12 * n, 18:21] = colour
    return pictures


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gallery(project: Path) -> Path:
    """A complete folder: 5 prompts, 4 pictures each."""
    geneval.generate_folder(paint, block_prompts(), project / "images")
    return project / "images"


def test_a_folder_is_scored(gallery: Path) -> None:
    found = geneval.score_folder(gallery, Blocks())
    # numbers 0 .. 19: every fifth shows nothing, and seed 1 mod 3 paints dogs blue, which one prompt minds
    expected = np.array([number % 5 != 4 and not (12 <= number < 16 and number % 3 == 1) for number in range(20)])
    rows = [json.loads(row) for row in (gallery / "results.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == expected.tolist() and found["overall"] == pytest.approx(expected.mean())
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert rows[13]["reason"] == "expected red dog>=1, found 0 red; and 1 blue" and rows[9]["reason"] == "expected dog>=2, found 0"
    assert json.loads(rows[0]["details"]) == {"bench": [[1, 10, 9, 13, pytest.approx(0.95)]]}
    assert Path(rows[13]["filename"]) == gallery / "00003/samples/0001.png"
    kept = data.read_json(gallery / "summary.json")
    assert kept == found and kept["detector"]["name"] == "blocks" and kept["rules"]["counting_threshold"] == 0.9 and kept["list"] == "other"


def test_a_scoring_that_was_stopped_goes_on(gallery: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        geneval.score_folder(gallery, Blocks(life=13))
    assert not (gallery / "results.jsonl").exists()
    (kept,) = (gallery.parent / ".vapi" / "geneval").glob("*/outcomes.jsonl")
    with kept.open("a") as file:
        file.write('{"key": "torn')
    rest = Blocks()
    found = geneval.score_folder(gallery, rest)
    distinct = len({path.read_bytes() for path in gallery.glob("*/samples/*.png")})
    assert 0 < rest.looked < 20 and distinct < 20, "equal pictures of a prompt are judged once"
    again = Blocks()
    assert geneval.score_folder(gallery, again, gallery.parent / "elsewhere")["tasks"] == found["tasks"] and again.looked == 0
    other = Blocks(dataclasses.replace(IDENTITY, weights="cd" * 32))
    assert geneval.score_folder(gallery, other)["tasks"] == found["tasks"] and other.looked > rest.looked
    ruled = Blocks(rules=Rules(threshold=0.96))
    assert geneval.score_folder(gallery, ruled)["tasks"]["single_object"]["score"] == 0 and ruled.looked > rest.looked


def spoil(gallery: Path) -> Iterator[tuple[str, Any, str]]:
    """Ways to spoil a folder, and the words for it."""
    place = gallery / "00002"
    png = place / "samples" / "0001.png"
    yield "no metadata", (place / "metadata.jsonl").unlink, "00002/metadata.jsonl is missing"
    yield "bad metadata", lambda: (place / "metadata.jsonl").write_text("{"), "00002/metadata.jsonl is not JSON"
    yield "strange class", lambda: (place / "metadata.jsonl").write_text(line(include=[{"class": "cat", "count": 1}])), "'cat', which the"
    yield "too few", png.unlink, "00002/samples holds 3 pictures, and 4 were asked for"
    yield "too many", lambda: shutil.copy(png, png.with_name("0004.png")), "00002/samples holds 5 pictures"
    yield "other names", lambda: png.rename(png.with_name("0001.jpg")), "holds 3 pictures, and 4 were asked for; 0001.jpg is not read"
    yield "no pictures", lambda: shutil.rmtree(place / "samples"), "00002/samples holds 0 pictures"
    yield "no picture", lambda: png.write_text("x"), "00002/samples/0001.png not an image"
    yield "half a picture", lambda: png.write_bytes(png.read_bytes()[:-30]), "00002/samples/0001.png cannot be"
    yield "a gap", lambda: shutil.rmtree(place), "00003 comes where 00002 is expected; give the whole list with --prompts"
    yield "a number twice", lambda: shutil.copytree(place, gallery / "2"), "are the same number"
    yield "nothing", lambda: [shutil.rmtree(one) for one in gallery.glob("0*")], "holds no folder of a prompt"
    yield "no folder", lambda: shutil.rmtree(gallery), "is not here; it should hold a folder a prompt"


WAYS = [name for name, _, _ in spoil(Path("nowhere"))]


@pytest.mark.parametrize("name", WAYS)
def test_a_folder_that_cannot_be_scored(name: str, gallery: Path) -> None:
    spoiled, words = next((do, words) for way, do, words in spoil(gallery) if way == name)
    spoiled()
    detector = Blocks()
    with pytest.raises(ValueError, match=r".") as error:
        geneval.score_folder(gallery, detector)
    assert words in str(error.value) and not detector.looked


def test_all_problems_are_counted_and_a_handful_shown(gallery: Path) -> None:
    for path in gallery.glob("*/samples/000[12].png"):
        path.write_text("x")
    with pytest.raises(ValueError, match="10 problems") as error:
        geneval.score_folder(gallery, Blocks())
    assert str(error.value).count("not an image") == geneval.SHOWN and "... and 5 more" in str(error.value)


def prompt_file(path: Path, prompts: Sequence[Prompt]) -> Path:
    path.write_text("".join(json.dumps(prompt.metadata) + "\n" for prompt in prompts))
    return path


def test_a_list_that_was_asked_for(gallery: Path) -> None:
    prompts = block_prompts()
    asked = prompt_file(gallery.parent / "asked.jsonl", prompts)
    assert geneval.score_folder(gallery, Blocks(), prompts=asked)["partial"] == []
    shutil.rmtree(gallery / "00002")
    found = geneval.score_folder(gallery, Blocks(), prompts=asked)
    assert found["partial"] == ["4 of 5 prompts"] and found["missing"] == ["two dogs"] and "counting" not in found["tasks"]
    prompt_file(asked, [prompts[n] for n in (1, 0, 2, 3)])
    with pytest.raises(ValueError, match="4 problems|3 problems") as error:
        geneval.score_folder(gallery, Blocks(), prompts=asked)
    assert "00000 holds 'a bench', which is number 00001 of the list: folders are out of order" in str(error.value)
    assert "00004 holds 'a dog right of a bench', which is not in the list" in str(error.value)


def test_the_official_list_is_recognised_where_it_lies(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official = metric.read_prompts(geneval.PROMPTS)
    geneval.generate_folder(paint, official[:6], project / "images", images_per_prompt=1)
    detector = Blocks(classes=metric.CLASSES, colours=metric.COLOURS)
    with pytest.raises(ValueError, match="holds 1 pictures, and 4 were asked for"):
        geneval.score_folder(project / "images", detector)
    found = geneval.score_folder(project / "images", detector, images_per_prompt=1)
    assert found["list"] == "GenEval" and found["partial"] == ["6 of 553 prompts", "1 instead of 4 images per prompt"]
    monkeypatch.setattr(geneval, "PROMPTS", project / "nowhere.jsonl")
    found = geneval.score_folder(project / "images", detector, project / "out", images_per_prompt=1)
    assert found["list"] == "other" and "is not with this package" in capsys.readouterr().err


def test_a_picture_is_turned_as_it_says(gallery: Path) -> None:
    path = gallery / "00000" / "samples" / "0000.png"
    turned = Image.open(path).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    assert np.array_equal(np.asarray(Image.open(path)), np.rot90(np.asarray(Image.open(path.with_name("0002.png")).convert("RGB"))))
    assert geneval.score_folder(gallery, Blocks())["tasks"]["single_object"]["correct"] == 4


# --- detections from a file --------------------------------------------------------------------


def dump(gallery: Path, path: Path) -> Path:
    """What another environment would write of the same pictures."""
    detector, rows = Blocks(), [{"detector": {"name": "elsewhere", "weights": "ef" * 32}}]
    for file in sorted(gallery.glob("*/samples/*.png")):
        picture = np.asarray(Image.open(file))
        (objects,) = detector.detect([picture])
        colours = {name: detector.colour(picture, dataclasses.replace(these, name=name)) for name, these in objects.items()}
        boxes = {name: these.boxes.tolist() for name, these in objects.items()}
        rows.append({"filename": f"/there/{file.relative_to(gallery)}", "objects": boxes, "colours": colours})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_detections_from_a_file_come_to_the_same(gallery: Path) -> None:
    recorded = geneval.recorded_detections(dump(gallery, gallery.parent / "seen.jsonl"))
    found = geneval.score_folder(gallery, recorded)
    assert found["tasks"] == geneval.score_folder(gallery, Blocks())["tasks"]
    assert found["title"] == "GenEval (detections from a file)" and found["detector"]["name"] == "elsewhere"
    assert found["detector"]["more"] == {"network's weights": "ef" * 32}


def test_a_file_must_know_every_picture_and_the_colours_asked_for(gallery: Path) -> None:
    path = dump(gallery, gallery.parent / "seen.jsonl")
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]))
    with pytest.raises(ValueError, match="2 problems") as error:
        geneval.score_folder(gallery, geneval.recorded_detections(path))
    assert "elsewhere has no line for 00004/samples/0002.png" in str(error.value)
    path.write_text("".join(json.dumps({name: row[name] for name in row if name != "colours"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="has no colours of a dog whose prompt asks for one"):
        geneval.score_folder(gallery, geneval.recorded_detections(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 is no picture's detections"),
        ("[]", "it is no mapping"),
        ('{"objects": {}}', "it lacks filename"),
        ('{"filename": "a"}', "it lacks objects"),
        ('{"filename": "a", "objects": []}', "are mappings by class"),
        ('{"filename": "a", "objects": {"mouse": []}}', "class 'mouse' is unknown; did you mean 'computer mouse'?"),
        ('{"filename": "a", "objects": {"dog": [[1, 2, 3, 4]]}}', "are not rows of x0, y0, x1, y1, score"),
        ('{"filename": "a", "objects": {"dog": [[1, 2, 3, 4, NaN]]}}', "is not finite"),
        ('{"filename": "a", "objects": {"dog": []}, "colours": {"dog": ["red"]}}', "0 boxes and 1 colours"),
        ('{"filename": "a", "objects": {"dog": [[1, 2, 3, 4, 1]]}, "colours": {"dog": ["rot"]}}', "colour 'rot' of dog is unknown"),
        ('{"filename": "a", "objects": {}}\n{"filename": "a", "objects": {}}', "line 2: a has a line already"),
        ('{"detector": {"name": "x"}}', "holds no detections"),
        ('{"detector": "x"}\n', "line 1 is no picture's detections"),
    ],
)
def test_a_file_that_holds_no_detections(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "seen.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r".") as error:
        geneval.recorded_detections(tmp_path / "seen.jsonl")
    assert words in str(error.value)


# --- generation --------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_generation_goes_on_and_ends_with_the_same_bytes(gallery: Path) -> None:
    whole = contents(gallery)
    assert {"00000/metadata.jsonl", "00000/grid.png", "00004/samples/0003.png", "generated.json"} <= whole.keys()
    batches: list[list[int]] = []

    def dies(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        batches.append(list(seeds))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return paint(captions, seeds)

    again = gallery.parent / "again"
    with pytest.raises(KeyboardInterrupt):
        geneval.generate_folder(dies, block_prompts(), again, images_per_batch=9)
    assert {place.name for place in again.iterdir() if place.is_dir()} <= {"00000", "00001"}
    shutil.rmtree(again / "00001", ignore_errors=True)
    (again / ".00001.partial").mkdir()
    geneval.generate_folder(dies, block_prompts(), again, images_per_batch=9)
    assert contents(again) == whole and batches[2] == batches[0], "a prompt is drawn again in the company it had"
    batches.clear()
    geneval.generate_folder(dies, block_prompts(), again, images_per_batch=9)
    assert not batches


def test_every_picture_has_a_seed_of_its_own(project: Path) -> None:
    seen: list[int] = []

    def draw(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        seen.extend(seeds)
        return paint(captions, seeds)

    for seed in (0, 1):
        geneval.generate_folder(draw, block_prompts(), project / str(seed), seed=seed)
    assert len(set(seen)) == 40 and seen[20:] == [sampler.image_seed(1, number) for number in range(20)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "another seed"),
        ({"images_per_prompt": 2}, "another images_per_prompt"),
        ({"made_by": {"generator": "x"}}, "another generator"),
    ],
)
def test_a_folder_of_other_pictures_is_left_alone(change: dict[str, Any], words: str, gallery: Path) -> None:
    with pytest.raises(ValueError, match=words):
        geneval.generate_folder(paint, block_prompts(), gallery, **change)
    with pytest.raises(ValueError, match="another prompts"):
        geneval.generate_folder(paint, block_prompts()[:4], gallery)
    with pytest.raises(ValueError, match="something else"):
        geneval.generate_folder(paint, block_prompts(), gallery / "00000")


def test_a_policy_paints(tiny_policy: models.Policy, tiny_model: ModelConfig) -> None:
    """Through the interface of a generator of captions, with one of classes that reads their length."""
    classes = tiny_policy.condition
    tiny_policy.condition = lambda captions: classes([len(caption) % 10 for caption in captions])  # type: ignore[method-assign,assignment]
    draw = geneval.painter(tiny_policy, tiny_model, EvaluateConfig(images_per_batch=4))
    pictures = draw(["a", "bb", "ccc", "a", "bb"], [1, 2, 3, 4, 2])
    assert pictures.shape == (5, 16, 16, 3) and pictures.dtype == np.uint8
    assert np.array_equal(pictures[1], pictures[4]) and not np.array_equal(pictures[0], pictures[3])


# --- the command -------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["geneval", *words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_score_and_compare_at_the_command_line(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = dump(gallery, gallery.parent / "seen.jsonl")
    code, out, _ = call(capsys, "score", str(gallery), "--detections", str(seen))
    assert code == 0 and "GenEval (detections from a file) by elsewhere" in out and "Overall score (avg. over tasks): " in out
    other = gallery.parent / "other"
    geneval.generate_folder(paint, block_prompts(), other, seed=1)
    code, _, _ = call(capsys, "score", str(other), "--detections", str(dump(other, gallery.parent / "others.jsonl")))
    code, _, err = call(capsys, "compare", str(gallery), str(other))
    assert code == cli.MISTAKE and "different detectors, whose numbers do not compare" in err
    for folder in (gallery, other):
        geneval.score_folder(folder, Blocks())
    code, out, _ = call(capsys, "compare", str(gallery), str(other))
    assert code == 0 and "5 prompts, seeds x images 1 x 4 and 1 x 4" in out and "95 % interval" in out
    code, out, _ = call(capsys, "compare", str(gallery), str(other), "--with", str(other), str(gallery))
    assert code == 0 and "2 x 4 and 2 x 4" in out and "overall" in out and "+0.0000" in out


def test_results_of_the_official_command_compare(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    geneval.score_folder(gallery, Blocks())
    shutil.copy(gallery / "results.jsonl", gallery.parent / "theirs.jsonl")
    code, out, _ = call(capsys, "compare", str(gallery), str(gallery.parent / "theirs.jsonl"))
    assert code == 0 and "not every result says its detector" in out
    (gallery.parent / "theirs.jsonl").write_text('{"correct": true}\n')
    code, _, err = call(capsys, "compare", str(gallery), str(gallery.parent / "theirs.jsonl"))
    assert code == cli.MISTAKE and "line 1 is no line of GenEval's results" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scores"], "vapi geneval has no 'scores'; did you mean 'score'?"),
        (["score"], "takes one folder"),
        (["score", "x"], "who looks at the pictures?"),
        (["score", "x", "--detector", "digit"], "did you mean 'digits'?"),
        (["score", "x", "--detector", "judge.safetensors"], "judge.safetensors is not here"),
        (["score", "x", "--detector", "digits", "--detections", "y"], "give one or the other"),
        (["score", "x", "--detections", "y"], "y is not here"),
        (["score", "x", "--detections", "y", "--images-per-prompt", "few"], "--images-per-prompt is 'few'"),
        (["score", "x", "--detektor", "y"], "vapi geneval score has no flag --detektor; did you mean 'detector'?"),
        (["compare", "a"], "takes two results"),
        (["compare", "a", "b"], "a/results.jsonl is not here|a is not here"),
        (["convert-detector", "a"], "takes a file and a folder"),
        (["generate"], "takes one new folder"),
    ],
)
def test_mistakes_at_the_command_line(words: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *words)
    assert code == cli.MISTAKE and any(part in err for part in message.split("|")), err


def test_a_generator_of_classes_draws_no_captions(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vapi import recipes

    recipes.write("digits")
    code, _, err = call(capsys, "generate", "out", "--prompts", "prompts.jsonl", "--images-per-prompt", "2")
    assert code == cli.MISTAKE and "model.text_encoder is empty" in err


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in cli.GENEVAL)])
def test_help(words: list[str], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *words)
    assert code == 0 and out.startswith("usage: vapi geneval")
