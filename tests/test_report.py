"""The report says what the numbers say, in one file that needs no other."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vapi import markup, report


def scores(fid: float, spread: float | None = None, **others: Any) -> dict[str, Any]:
    values = {"fid": fid, "kid": fid / 1000, "fid_random": fid / 10, "inception_score": 3.0}
    values |= {"precision": 0.6, "recall": 0.7, "class_accuracy": 0.8, **others}
    return {**values, **{f"{name}_std": spread and spread * abs(value) for name, value in values.items()}, "images": 100}


def results(
    base: float = 14.0, tuned: float = 9.0, base_best: float = 8.0, tuned_best: float = 9.0, spread: float | None = None, **others: Any
) -> dict:
    sweep = [
        {"model": name, "temperature": temperature, "guidance": 1.0, "fid": fid * (1 + abs(temperature - best))}
        for name, fid, best in (("base", base_best, 0.9), ("tuned", tuned_best, 1.0))
        for temperature in (0.8, 0.9, 1.0)
    ]
    return {
        "protocol": {
            "samples": 100, "seeds": [0] if spread is None else [0, 1, 2], "reference": {"images": 200, "sha256": "ab" * 32},
            "sampler": {"temperature": 1.0, "guidance": 1.0}, "sweep": {"samples": 50},
        },
        "base": {**scores(base, spread), "reward": -0.4}, "tuned": {**scores(tuned, spread, **others), "reward": -0.3},
        "base_best": {**scores(base_best, spread), "temperature": 0.9, "guidance": 1.0},
        "tuned_best": {**scores(tuned_best, spread), "temperature": 1.0, "guidance": 1.0},
        "anchors": {"real": scores(0.4), "reconstruction": scores(0.6)},
        "exposure": {name: {"fid_teacher_forced": 3.0, "fid_free_running": 9.0, "gap": 6.0, "images": 100} for name in ("base", "tuned")},
        "sweep": sweep,
    }  # fmt: skip


LOOK = {"holdout/reward": -0.4, "holdout/ce": 4.0, "holdout/entropy": 3.9}
CURVES = [{"step": 0, **LOOK}] + [
    {"step": n, "tune/reward": -0.4 + n / 100, "tune/ce": 4.0, "tune/entropy": 3.9, **LOOK} for n in (1, 2, 3)
]


def page(found: dict, provenance: dict | None = None, curves: list | None = None, side: int = 32) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (20, side, side, 3), dtype=np.uint8)
    samples = {"plain": pixels, "best": pixels}
    sheets = {"base": samples, "tuned": samples, "anchors": {"real": pixels, "reconstruction": pixels}}
    return report.page(found, CURVES if curves is None else curves, sheets, provenance or {"code": "x"}, 10)


class Outline(html.parser.HTMLParser):
    """Every tag with its attributes, and a check that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((14, 9, 12, 9), ["Tuning lowered FID from 14.00 to 9.00 (−36 %).", "The lead holds"]),
        ((14, 9, 8, 9), ["Tuning lowered FID", "the base 8.00 at temperature 0.9: sampling the base differently is worth more"]),
        ((14, 9, 9, 9), ["Tuning lowered FID", "is worth as much as tuning it."]),
        ((9, 14, 8, 14), ["Tuning raised FID from 9.00 to 14.00 (+56 %): it did not improve the model.", "And each"]),
        ((9, 14, 8, 7), ["Tuning raised FID", "Yet each"]),
        ((9, 9.01, 8, 8), ["Tuning did not change FID", "Nor does it matter"]),
    ],
)
def test_the_verdict_says_what_happened(numbers: tuple[float, ...], words: list[str]) -> None:
    said = report.verdict(results(*numbers))
    assert all(word in said for word in words), said


def test_a_difference_within_the_spread_is_none() -> None:
    assert "did not change FID" in report.verdict(results(14.0, 13.0, spread=0.1))
    assert "lowered FID" in report.verdict(results(14.0, 13.0, spread=0.01))


def test_caveats_tell_of_disagreement_and_of_the_price() -> None:
    fair = " ".join(report.caveats(results()))
    assert "KID and FID in a network with random weights agree." in fair and "One seed" in fair
    doubtful = " ".join(report.caveats(results(fid_random=5.0, recall=0.5)))
    assert "KID agrees." in doubtful and "FID in a network with random weights says the opposite." in doubtful
    assert "Recall fell from 0.700 to 0.500." in doubtful


def test_gates_stand_below_the_verdict() -> None:
    gate = {"metric": "<fid>", "rival": 14.0, "candidate": None, "limit": None, "margin": -0.5, "passed": False}
    judged = {"passed": {"champion": False}, "against": {"champion": {"rival": "base", "gates": [gate]}}, "note": "by another protocol"}
    text = report.gated(page(results()), judged)
    Outline(text)
    assert text.index("</header>") < text.index("champion: FAILED, tuned against base") < text.index("Before: base")
    assert (
        "&lt;fid&gt;" in text and "<td>missing</td><td>missing</td><td>−0.5</td><td><b>no</b></td>" in text and "another protocol" in text
    )


# --- the terminal ------------------------------------------------------------------------------


def artifacts(folder: Path, found: dict) -> Path:
    for stage, seconds in (("subset", 1.5), ("tune", 70.25), ("evaluate", 90.0)):
        (folder / stage).mkdir()
        (folder / stage / "provenance.json").write_text(json.dumps({"seconds": seconds}))
    (folder / "evaluate" / "metrics.json").write_text(json.dumps(found))
    return folder


def test_the_terminal_table(tmp_path: Path) -> None:
    text = report.table(artifacts(tmp_path, results(spread=0.1)))
    assert "14.00 ± 1.40" in text and "base at its best (temperature 0.9)" in text and "real images" in text
    assert "subset 1.5   tune 70.2   evaluate 90.0   all 161.8" in text
    assert "report.html" in text and "mlflow" in text and "params.yaml" in text
    grid = report.grid(results()).splitlines()
    assert len({len(line) for line in grid}) == 1


def test_the_table_without_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the stage that makes it: vapi evaluate"):
        report.table(tmp_path)


def test_a_metric_that_was_not_measured_is_a_dash_or_left_out() -> None:
    found = results()
    for name in ("base", "tuned", "base_best", "tuned_best"):
        del found[name]["class_accuracy"]
    for anchor in found["anchors"].values():
        del anchor["class_accuracy"]
    assert "class acc." not in report.grid(found) and "class acc." not in page(found)
    assert report.grid(found).splitlines()[-1].endswith("-")  # no reward for real images


# --- the page ----------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_no_other_file() -> None:
    text = page(results(spread=0.1))
    outline = Outline(text)
    tags = [tag for tag, _ in outline.found]
    assert tags.count("img") == 6 and tags.count("svg") == 5 and "script" not in tags and "link" not in tags
    pictures = [attributes for tag, attributes in outline.found if tag == "img"]
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme:dark" in text


def test_the_page_is_the_same_every_time() -> None:
    assert page(results()) == page(results())


def test_everything_is_escaped() -> None:
    nasty = '<script>alert("x")</script>'
    found = results()
    found["protocol"]["note"] = nasty
    found["protocol"]["listed"] = [nasty]
    text = page(found, {"code": {nasty: nasty}})
    assert nasty not in text and "&lt;script&gt;" in text
    Outline(text)


def test_the_better_of_two_is_bold() -> None:
    text = page(results())
    row = re.search(r'<tr class="after"><th scope="row">tuned</th>(.*?)</tr>', text)
    assert row and row[1].startswith('<td class="win"><span>9.00')


def test_without_a_reward_there_is_no_reward_curve() -> None:
    bare = [{"step": 1, "tune/ce": 4.0}, {"step": 2, "tune/ce": 3.9}]
    assert page(results(), curves=bare).count("<svg") == 3
    assert "While tuning" not in page(results(), curves=[])


def test_large_images_are_reduced() -> None:
    widths = [int(attributes["width"]) for tag, attributes in Outline(page(results(), side=256)).found if tag == "img"]
    assert max(widths) == 1280


# --- charts and sheets -------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.42, -0.36), (7.3, 91.0), (3.0, 3.0001), (0.0, 1e-6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = markup.ticks(low, high)
    assert 2 <= len(found) <= 11 and all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    assert max(len(f"{value:.6g}") for value in found) <= 7


def test_log_ticks() -> None:
    assert markup.ticks(8, 90, log=True) == [10, 20, 50]
    assert len(markup.ticks(8.0, 9.0, log=True)) >= 3


def test_a_chart_keeps_its_points_inside() -> None:
    line = markup.Line("a < b", [(0.7, 64.0), (1.0, 8.0)], "base", star=1)
    svg = markup.chart([line], "x", "y", log=True)
    assert "a &lt; b" in svg
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert 0 <= float(x) <= 520 and 0 <= float(y) <= 300


def test_a_single_point_and_a_flat_line_can_be_drawn() -> None:
    assert "<circle" in markup.chart([markup.Line("one", [(1.0, 5.0)], "base")], "x", "y")
    assert "<polyline" in markup.chart([markup.Line("flat", [(0.0, 0.0), (1.0, 0.0)], "base")], "x", "y", log=True)


def test_guidance_is_an_axis_when_it_alone_was_swept() -> None:
    found = results()
    found["sweep"] = [{"model": m, "temperature": 1.0, "guidance": g, "fid": g + 3} for m in ("base", "tuned") for g in (1.0, 1.5, 2.0)]
    assert ">guidance</text>" in report.sweep_chart(found)
    found["sweep"] = [{**p, "temperature": t} for p in found["sweep"] for t in (0.9, 1.0)]
    assert report.sweep_chart(found).count("<polyline") == 6


def test_bands_lie_one_below_the_other() -> None:
    pixels = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    picture = report.banded_sheet([("one", pixels), ("one", pixels)], 10)
    assert picture.width == 10 * (96 + 2) + 2 and picture.height == 2 * (2 * 98 + 2 + 30)


def test_curves_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="comes with the tuned weights"):
        report.read_curves(tmp_path / "metrics.jsonl")


def test_a_last_line_that_a_killed_run_tore_is_left_out_and_no_other(tmp_path: Path) -> None:
    path, lines = tmp_path / "metrics.jsonl", [json.dumps(row) for row in CURVES]
    for end in ("\n", ""):
        path.write_text("\n".join(lines) + end)
        assert report.read_curves(path) == CURVES
    for torn in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        path.write_text("\n".join([*lines[:-1], lines[-1][:torn]]))
        assert report.read_curves(path) == CURVES[:-1]
    path.write_text("\n".join([lines[0][:9], *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged .* vapi tune"):
        report.read_curves(path)
    path.write_text("")
    assert report.read_curves(path) == []


def test_charts_of_any_numbers() -> None:
    """Two networks that see no difference give distances of 1e-13; a diverged one gives thousands."""
    for values in ([3e-13, 4e-13], [0.0, 0.0], [1e-13, 4000.0], [-2.0, 5.0]):
        drawn = markup.chart([markup.Line("one", list(enumerate(values)), "base")], "x", "y", log=True)
        assert "nan" not in drawn and drawn.count('class="tick"') >= 4
