"""What a generator of captions makes of prompts: pictures of each, judged by detectors, by text metrics, or by both.

Picture i of prompt p has its own random numbers, so base and tuned answer the same questions, and every sampling
setting too. Two detectors look at every picture, because a number that one of them alone believes in is worth little.
Beside the models stand anchors: the real pictures of the same prompts where there are some, the tokenizer's
reconstructions of these, and pictures judged by another prompt of their task (chance).

Pictures stream into verdicts, which are kept like features are (``metrics/stream.py``): a killed evaluation goes on.

Shapes: P prompts, S seeds, I images per prompt and seed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vapi import data
from vapi.config import JUDGES, EvaluateConfig
from vapi.geneval import AT_ONCE, detector_of
from vapi.metrics import geneval, text
from vapi.metrics.detections import Detector
from vapi.metrics.geneval import Prompt
from vapi.metrics.stream import Judge, Make
from vapi.metrics.text import Checked
from vapi.models import Policy
from vapi.references import RealImages, Subjects

Scores = dict[str, Any]
Verdicts = dict[str, np.ndarray]  # by judge: bool (P, S, I) of detectors, float of text metrics

SHUFFLED = "shuffled"  # a detector's verdict by another prompt of the same task: what chance would be right about


@dataclass(frozen=True)
class Anchors:
    """What is known without any model: verdicts on real pictures and on reconstructions of them, and which prompts have some."""

    prompts: Sequence[Prompt] = ()
    verdicts: Mapping[str, Verdicts] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Prompts, and who judges their pictures."""

    prompts: Sequence[Prompt]
    images: int  # I
    detectors: Mapping[str, Detector]
    metrics: Mapping[str, Checked]
    digest: str  # of everything that decides a verdict beside the picture

    @classmethod
    def of(cls, evaluate: EvaluateConfig, device: torch.device) -> Panel:
        """Read prompts and judges. Raises ValueError for what is missing, and for prompts that a detector cannot judge."""
        require(evaluate)
        named = {name: getattr(evaluate, field) for name, field in JUDGES.items()}
        detectors = {name: detector_of(where, evaluate.clip, device) for name, where in named.items() if where}
        lists = [geneval.read_prompts(evaluate.prompts, judge.classes, judge.colours) for judge in detectors.values()]
        lists = lists or [text.read_prompts(evaluate.prompts)]
        metrics = text.load(evaluate, device)
        judges = {name: _told(judge) for name, judge in detectors.items()}
        described = {name: metric.describe for name, metric in metrics.items()}
        parts = [data.file_digest(Path(evaluate.prompts)), evaluate.images_per_prompt, judges, described]
        return cls(lists[0], evaluate.images_per_prompt, detectors, metrics, hashlib.sha256(json.dumps(parts).encode()).hexdigest())

    def fit(self, policy: Policy) -> None:
        """Raises ValueError for prompts that the generator cannot read, and says how many it reads at their beginning alone."""
        if cut := policy.cut([prompt.text for prompt in self.prompts]):
            words = f"{cut} of {len(self.prompts)} prompts are longer than the generator reads; what they end with is not asked for"
            print(words, file=sys.stderr, flush=True)

    def protocol(self) -> Scores:
        """What two scores must share to be compared."""
        return {
            "list": geneval.list_digest(self.prompts),
            "images_per_prompt": self.images,
            "detectors": {name: _told(judge) for name, judge in self.detectors.items()},
            "text_metrics": {name: metric.describe for name, metric in self.metrics.items()},
        }

    @property
    def shown(self) -> list[int]:
        """Places of the prompts that reports show: the first of each task."""
        tasks = dict.fromkeys(prompt.tag for prompt in self.prompts)
        return [
            place for task in tasks for place in [n for n, prompt in enumerate(self.prompts) if prompt.tag == task][: data.PROMPTS_SHOWN]
        ]

    def pictures(self, make: Make) -> Tensor:
        """A model's pictures of these prompts: uint8 (K * I, 3, H, W)."""
        return make([place * self.images + image for place in self.shown for image in range(self.images)])[0]

    def captions(self, found: Mapping[str, Verdicts]) -> list[Scores]:
        """What to write beside them: the text, and the first judge's verdicts on the first seed's, by model."""
        first = self.judges[0]
        return [
            {"text": self.prompts[place].text, **{side: verdicts[first][place, 0].tolist() for side, verdicts in found.items()}}
            for place in self.shown
        ]

    @property
    def judges(self) -> list[str]:
        """Detectors, then text metrics."""
        return [*self.detectors, *self.metrics]

    @property
    def subjects(self) -> Subjects:
        """Picture n shows prompt n // I."""
        return Subjects(0, [prompt.text for prompt in self.prompts for _ in range(self.images)])

    def judge(self, pixels: Tensor, prompts: Sequence[Prompt], others: Sequence[Prompt]) -> dict[str, Tensor]:
        """Verdicts on pictures, uint8 (B, 3, H, W), one prompt each; ``others`` are prompts to find chance with."""
        pictures = list(pixels.permute(0, 2, 3, 1).cpu().numpy())
        found: dict[str, Tensor] = {}
        for name, detector in self.detectors.items():
            found[name], found[f"{SHUFFLED}/{name}"] = _correct(detector, pictures, prompts, others)
        if self.metrics:
            texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
            for name, metric in self.metrics.items():
                found[name] = torch.tensor(metric(np.stack(pictures), texts, metadata), dtype=torch.float64)
        return found

    def verdicts(
        self, judge: Judge, made_from: Scores, draw: Callable[[int, Subjects], Make], seeds: Sequence[int], title: str
    ) -> Verdicts:
        """All judges' verdicts on what a model draws for every prompt, over several seeds."""
        order = [place for place in range(len(self.prompts)) for _ in range(self.images)]
        return self._verdicts(judge, made_from, lambda seed: draw(seed, self.subjects), order, seeds, title, self.images)

    def anchors(self, judge: Judge, real: RealImages, reconstruct: Callable[[Tensor], Tensor], key: Scores) -> Anchors:
        """Verdicts on real pictures of these prompts, and on reconstructions of them (uint8 both); nothing where there are none."""
        own = self.pictures_of(real)
        if len(own) < len(self.prompts):  # a score of some of the prompts stands beside no score of all
            return Anchors()
        count = min(map(len, own.values()))
        order = [place for place, pictures in own.items() for _ in pictures[:count]]
        rows = [row for pictures in own.values() for row in pictures[:count]]

        def plain(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            these = torch.tensor([rows[n] for n in numbers if n < len(rows)])
            return real.pixels[these], these

        def decoded(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            pixels, these = plain(numbers)
            return reconstruct(pixels), these

        makes = {"real": lambda _: plain, "reconstruction": lambda _: decoded}
        verdicts = {name: self._verdicts(judge, {**key, "anchor": name}, make, order, [0], name, count) for name, make in makes.items()}
        return Anchors([self.prompts[place] for place in own], verdicts)

    def pictures_of(self, real: RealImages) -> dict[int, list[int]]:
        """The real pictures of each prompt that has some, by the prompt's place."""
        places = {prompt.text: place for place, prompt in enumerate(self.prompts)}
        found: dict[int, list[int]] = {}
        for row, caption in enumerate(real.captions):
            if caption in places:
                found.setdefault(places[caption], []).append(row)
        return dict(sorted(found.items()))

    def _verdicts(
        self,
        judge: Judge,
        made_from: Scores,
        make: Callable[[int], Make],
        order: Sequence[int],  # the prompt of each picture
        seeds: Sequence[int],
        title: str,
        images: int,
    ) -> Verdicts:
        others = partners(self.prompts)

        def look(pixels: Tensor, _: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
            asked = [order[n] for n in numbers if n < len(order)]
            found = self.judge(pixels[: len(asked)], [self.prompts[n] for n in asked], [self.prompts[others[n]] for n in asked])
            # what fills the last batch up has no verdict
            return {name: torch.nn.functional.pad(rows, (0, len(numbers) - len(asked))) for name, rows in found.items()}

        key = {**made_from, "panel": self.digest}
        runs = [judge.kept({**key, "seed": seed}, len(order), make(seed), look, f"{title}, prompts") for seed in seeds]
        shape = (len(order) // images, images)
        kinds = {name: float if rows.is_floating_point() else bool for name, rows in runs[0].items()}
        return {name: np.stack([run[name].numpy().reshape(shape) for run in runs], axis=1).astype(kind) for name, kind in kinds.items()}


def _correct(detector: Detector, pictures: Sequence[np.ndarray], *asked: Sequence[Prompt]) -> list[Tensor]:
    """Whether each picture is what its prompt asks for, uint8 (B,), for each list of prompts. A few pictures at a time."""
    found: list[list[bool]] = [[] for _ in asked]
    for start in range(0, len(pictures), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        seen = detector.detect(pictures[part])
        for verdicts, prompts in zip(found, asked, strict=True):
            verdicts += [outcome.correct for outcome in geneval.outcomes(detector, prompts[part], pictures[part], seen)]
    return [torch.tensor(verdicts, dtype=torch.uint8) for verdicts in found]


def _told(detector: Detector) -> Scores:
    """Everything that tells two detectors apart."""
    identity = detector.identity
    return {"name": identity.name, "weights": identity.weights, **identity.more, **vars(detector.rules)}


def partners(prompts: Sequence[Prompt]) -> list[int]:
    """For each prompt the place of another of its task that asks for something else (itself, where there is none)."""
    found = list(range(len(prompts)))
    for task in dict.fromkeys(prompt.tag for prompt in prompts):
        rows = [n for n, prompt in enumerate(prompts) if prompt.tag == task]
        for at, n in enumerate(rows):
            turned = rows[at + 1 :] + rows[:at]
            found[n] = next((other for other in turned if prompts[other].include != prompts[n].include), n)
    return found


def require(evaluate: EvaluateConfig) -> None:
    """Raises ValueError for judges that do not go together or are not here, and for prompts that cannot be read, without loading a
    network. (Whether a detector knows what a prompt asks for is seen when it is loaded.)"""
    if evaluate.second_detector and not evaluate.detector:
        raise ValueError(f"evaluate.second_detector is {evaluate.second_detector} and evaluate.detector is empty; name that, or neither")
    if not evaluate.detector and not evaluate.text_metrics:
        raise ValueError("evaluate.detector and evaluate.text_metrics are empty, and somebody must look at the pictures; name one")
    if evaluate.resize:
        raise ValueError(f"evaluate.resize is {evaluate.resize}, and pictures of prompts are judged as they are drawn; set it to 0")
    text.require(evaluate)
    if evaluate.detector:
        geneval.read_prompts(evaluate.prompts, None, None)
    else:
        text.read_prompts(evaluate.prompts)


# --- results -----------------------------------------------------------------------------------


def results(panel: Panel, found: Mapping[str, Verdicts], anchors: Anchors) -> Scores:
    """The section ``prompts`` of metrics.json. ``found``: verdicts by model and setting (base, tuned, base_best, ...)."""
    sides = [(name, f"tuned{name.removeprefix('base')}") for name in found if name.startswith("base")]
    judged = {
        name: {
            **{side: geneval.summary(_run(panel.prompts, verdicts[name]), judge.identity, judge.rules) for side, verdicts in found.items()},
            "difference": {
                tuned: geneval.compare(*(_run(panel.prompts, found[side][name]) for side in (base, tuned)))
                for base, tuned in sides
                if tuned in found
            },
            "anchors": {
                side: geneval.summary(_run(anchors.prompts, verdicts[name]), judge.identity, judge.rules, panel.prompts)
                for side, verdicts in anchors.verdicts.items()
            },
        }
        for name, judge in panel.detectors.items()
    }
    for name, judge in panel.detectors.items():
        chance = _run(panel.prompts, found["base"][f"{SHUFFLED}/{name}"])
        judged[name]["anchors"][SHUFFLED] = geneval.summary(chance, judge.identity, judge.rules)
    return {
        "prompts": len(panel.prompts),
        "images_per_prompt": panel.images,
        "detectors": judged,
        "agreement": {side: agreement(panel, verdicts) for side, verdicts in found.items()} if len(panel.detectors) > 1 else {},
        "metrics": {
            name: {
                "description": metric.describe,
                "difference": {tuned: _paired(found[base][name], found[tuned][name]) for base, tuned in sides if tuned in found},
                **{side: _mean(verdicts[name]) for side, verdicts in [*found.items(), *anchors.verdicts.items()]},
            }
            for name, metric in panel.metrics.items()
        },
    }


def by_prompt(panel: Panel, found: Mapping[str, Verdicts]) -> list[Scores]:
    """A row for each prompt: its task, its text, and by model and setting the share of its pictures that each detector finds right, and
    the mean of each text metric."""
    columns = {f"{side}/{name}": verdicts[name].mean(axis=(1, 2)) for side, verdicts in found.items() for name in panel.judges}
    return [
        {"task": prompt.tag, "prompt": prompt.text, **{column: float(f"{shares[n]:.6g}") for column, shares in columns.items()}}
        for n, prompt in enumerate(panel.prompts)
    ]


def scores(panel: Panel, verdicts: Verdicts) -> Scores:
    """What a model's row of the table shows: GenEval's overall score by each detector and the text metrics' means, with the standard
    deviation over seeds (None for one)."""
    found: Scores = {}
    for name in panel.judges:
        by_seed = np.moveaxis(verdicts[name], 1, 0)  # (S, P, I)
        if name in panel.detectors:
            tasks = _run(panel.prompts, verdicts[name]).of_task()
            values = [geneval.overall(one.mean(axis=1), tasks) for one in by_seed]
        else:
            values = [float(one.mean()) for one in by_seed]
        found[name] = float(f"{np.mean(values):.6g}")
        found[f"{name}_std"] = float(f"{np.std(values, ddof=1):.6g}") if len(values) > 1 else None
    return found


def agreement(panel: Panel, verdicts: Verdicts) -> float:
    """Share of pictures on which the two detectors' verdicts are the same."""
    one, other = (verdicts[name] for name in panel.detectors)
    return float((one == other).mean())


def _run(prompts: Sequence[Prompt], correct: np.ndarray) -> geneval.Run:
    return geneval.Run.of(prompts, correct)


def _mean(values: np.ndarray) -> Scores:
    """Mean and standard error of a text metric, pictures of a prompt being one observation."""
    of_prompts = values.mean(axis=(1, 2))
    error = float(of_prompts.std(ddof=1) / len(of_prompts) ** 0.5) if len(of_prompts) > 1 else None
    return {"mean": float(of_prompts.mean()), "standard_error": error}


def _paired(base: np.ndarray, tuned: np.ndarray) -> Scores | None:
    """What tuning did to a text metric's mean, with the 95 % interval over prompts, in pairs; None for one prompt."""
    gaps = (tuned - base).mean(axis=(1, 2))
    if len(gaps) < 2:
        return None
    gap, half = float(gaps.mean()), 1.96 * float(gaps.std(ddof=1)) / len(gaps) ** 0.5
    return {"a": float(base.mean()), "b": float(tuned.mean()), "difference": gap, "low": gap - half, "high": gap + half}
