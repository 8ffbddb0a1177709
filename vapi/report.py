"""What the numbers say: a verdict in words, a table for the terminal, and one HTML page.

The page (``markup.py``) has no scripts. It holds no date and no timing, so the same results make the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vapi import data, images, markup, report_prompts
from vapi.config import ARTIFACTS, STAGES
from vapi.markup import esc

Scores = Mapping[str, Any]
Results = Mapping[str, Any]
Sheets = Mapping[str, Mapping[str, np.ndarray]]

# Relative difference that counts as none when there is no spread over seeds to judge by: from seed to seed, FID of
# 2,000 samples of the digits' base scattered by 4.5 % (standard deviation), so the difference of two by 6 %.
SAME = 0.06


@dataclass(frozen=True)
class Column:
    """One metric in a table."""

    key: str
    title: str
    lower: bool  # is lower better
    digits: int = 0  # after the point; 0: as many as a distance needs
    scale: float = 1.0

    def show(self, value: float) -> str:
        value *= self.scale
        return f"{value:.{self.digits}f}" if self.digits else markup.distance(value)


COMPARED = ("base", "tuned", "base_guided", "tuned_guided", "base_best", "tuned_best")  # in pairs; guided where it was asked for

COLUMNS = (
    Column("fid", "FID", True),
    Column("sfid", "sFID", True),
    Column("kid", "KID x 1000", True, 2, scale=1000),
    Column("inception_score", "IS", False, 2),
    Column("inception_score_adm", "IS, as drawn", False, 2),
    Column("precision", "precision", False, 3),
    Column("recall", "recall", False, 3),
    Column("precision_adm", "prec. (ADM)", False, 3),
    Column("recall_adm", "rec. (ADM)", False, 3),
    Column("class_accuracy", "class acc.", False, 3),
    Column("fid_random", "random FID", True),
    Column("fd_dinov2", "FD DINOv2", True),
    Column("geneval", "GenEval", False, 3),  # or whatever its detector's weights allow it to be called
    Column("geneval_second", "second judge", False, 3),
    Column("clipscore", "CLIPScore", False, 4),
    Column("hpsv2", "HPSv2", False, 4),
    Column("reward", "reward", False, 4),
)


def columns_of(results: Results) -> list[Column]:
    """The columns for which somebody has a number."""
    names = judges(results)
    some = [column for column in COLUMNS if any(scores.get(column.key) is not None for scores in rows(results).values())]
    return [dataclasses.replace(column, title=names.get(column.key, column.title)) for column in some]


def judges(results: Results) -> dict[str, str]:
    """Titles of the columns whose name hangs on who judged, by key."""
    return report_prompts.names(results["prompts"]) if "prompts" in results else {}


def rows(results: Results) -> dict[str, Scores]:
    """The table's rows by their titles."""

    def title(name: str) -> str:
        model, _, kind = name.partition("_")
        if not kind:
            return name
        setting = f"temperature {results[name]['temperature']:g}"
        setting += f", guidance {results[name]['guidance']:g}" if results[name]["guidance"] != 1 else ""
        return f"{model} {'at its best' if kind == 'best' else kind} ({setting})"

    return {
        **{title(name): results[name] for name in COMPARED if name in results},
        "tokenizer reconstructions": results["anchors"]["reconstruction"],
        "real images": results["anchors"]["real"],
    }


def cell(scores: Scores, column: Column) -> str:
    """A number with its spread over the seeds, or a dash where it was not measured."""
    value, spread = scores.get(column.key), scores.get(f"{column.key}_std")
    if value is None:
        return "-"
    shown = column.show(value)
    decimals = len(shown.partition(".")[2])
    return shown + (f" ± {spread * column.scale:.{decimals}f}" if spread else "")


# --- the verdict -------------------------------------------------------------------------------


def direction(base: Scores, tuned: Scores, key: str, lower: bool = True) -> int:
    """1: tuned is better; -1: worse; 0: no difference that can be told from noise."""
    before, after = base[key], tuned[key]
    spreads = [scores[f"{key}_std"] for scores in (base, tuned) if scores.get(f"{key}_std") is not None]
    noise = math.hypot(*spreads) if len(spreads) == 2 else SAME * abs(before)
    if abs(after - before) <= noise:
        return 0
    return 1 if (after < before) == lower else -1


def verdict(results: Results) -> str:
    """One or two sentences: what tuning did at equal settings, and with each model at its best."""
    base, tuned = results["base"], results["tuned"]
    before, after = markup.distance(base["fid"]), markup.distance(tuned["fid"])
    change = f"{100 * (tuned['fid'] / base['fid'] - 1):+.0f} %".replace("-", "−") if base["fid"] else "was 0"
    plain = direction(base, tuned, "fid")
    titles = {column.key: column.title for column in COLUMNS}
    asked = f"{report_prompts.verdict(results['prompts'], titles)} ".lstrip() if "prompts" in results else ""
    first = {
        1: f"Tuning lowered FID from {before} to {after} ({change}).",
        0: f"Tuning did not change FID by more than chance would: {before} before, {after} after.",
        -1: f"Tuning raised FID from {before} to {after} ({change}): it did not improve the model.",
    }[plain]
    return f"{asked}{first} {_at_best(results, plain)}"


def _at_best(results: Results, plain: int) -> str:
    base, tuned = results["base_best"], results["tuned_best"]
    ours, theirs = f"{markup.distance(tuned['fid'])} at {_setting(tuned)}", f"{markup.distance(base['fid'])} at {_setting(base)}"
    both = f"each at its own best setting, tuned reaches {ours} and the base {theirs}"
    match direction(base, tuned, "fid"), plain:
        case 1, 1:
            return f"The lead holds when both are sampled as well as they can be: {both}."
        case 1, _:
            return f"Yet {both}."
        case 0, 1:
            return f"But {both}: sampling the base differently is worth as much as tuning it."
        case -1, 1:
            return f"But {both}: sampling the base differently is worth more than tuning it."
        case 0, _:
            return f"Nor does it matter how they are sampled: {both}."
        case _:
            return f"And {both}."


def _setting(best: Scores) -> str:
    return f"temperature {best['temperature']:g}" + (f" and guidance {best['guidance']:g}" if best["guidance"] != 1 else "")


def caveats(results: Results) -> list[str]:
    """What else the reader must know: whether other metrics agree, and what was paid."""
    base, tuned = results["base"], results["tuned"]
    plain = direction(base, tuned, "fid")
    notes = []
    others = {"KID": "kid", "FID in a network with random weights": "fid_random"}
    split: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for title, key in others.items():
        split[direction(base, tuned, key)].append(title)
    if plain:
        agree, against = " and ".join(split[plain]), " and ".join(split[-plain])
        notes += [f"{agree} {_verb(split[plain], 'agree')}."] if agree else []
        notes += [f"{against} {_verb(split[-plain], 'say')} the opposite."] if against else []
        notes += [f"{' and '.join(split[0])} {_verb(split[0], 'show')} no clear difference."] if split[0] else []
    paid = [
        f"{title} fell from {base[key]:.3f} to {tuned[key]:.3f}"
        for title, key in (("recall", "recall"), ("precision", "precision"), ("class accuracy", "class_accuracy"))
        if key in base and direction(base, tuned, key, lower=False) < 0
    ]
    if paid:
        notes.append(_sentence("; ".join(paid)))
    seeds = len(results["protocol"]["seeds"])
    spread = f"Mean and standard deviation over {seeds} seeds of sampling." if seeds > 1 else "One seed of sampling, so no spread is known."
    return [*notes, spread]


def _verb(subjects: Sequence[str], verb: str) -> str:
    return verb if len(subjects) > 1 else f"{verb}s"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


# --- the terminal ------------------------------------------------------------------------------


def table(artifacts: Path = ARTIFACTS) -> str:
    """Base and tuned side by side, seconds per stage, and where to look next.

    Raises ValueError if there is no evaluation yet.
    """
    artifacts = Path(artifacts)
    results = data.read_json(artifacts / "evaluate" / "metrics.json")
    asked = [report_prompts.grid(results["prompts"]), ""] if results.get("prompts", {}).get("detectors") else []
    gates = [_gates(artifacts / "register"), ""] if has_judged(artifacts / "register", artifacts / "evaluate") else []
    parts = [verdict(results), " ".join(caveats(results)), "", grid(results), "", *asked, *gates, _seconds(artifacts), ""]
    parts.append(_pointers(artifacts / ("register" if gates else "evaluate")))
    return "\n".join(parts)


def grid(results: Results) -> str:
    """The table as aligned text."""
    columns = columns_of(results)
    lines = [["", *(column.title for column in columns)]]
    lines += [[title, *(cell(scores, column) for column in columns)] for title, scores in rows(results).items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [line[0].ljust(widths[0]) + "".join(f"  {word:>{width}}" for word, width in zip(line[1:], widths[1:])) for line in lines]
    rule = "-" * len(text[0])
    pairs = [[*text[n : n + 2], rule] for n in range(1, len(text) - 2, 2)]
    return "\n".join([text[0], rule, *(line for pair in pairs for line in pair), *text[-2:]])


def _seconds(artifacts: Path) -> str:
    found = {stage: artifacts / stage / "provenance.json" for stage in STAGES}
    spent = {stage: data.read_json(path)["seconds"] for stage, path in found.items() if path.is_file()}
    words = [f"{stage} {seconds:.1f}" for stage, seconds in spent.items()]
    return f"seconds   {'   '.join(words)}   all {sum(spent.values()):.1f}"


def has_judged(register: Path, evaluate: Path) -> bool:
    """Whether the gates in one folder have seen the very evaluation in another."""
    made = register / "config.json"
    return made.is_file() and data.read_json(made)["inputs"].get("evaluate") == data.file_digest(evaluate)


def _gates(register: Path) -> str:
    """What the gates said, a line for each alias, with those that are shut."""
    found = data.read_json(register / "registration.json")
    shut = {alias: [gate["metric"] for gate in against["gates"] if not gate["passed"]] for alias, against in found["against"].items()}
    return "\n".join(gate_title(found, alias) + (f" ({', '.join(names)})" if names else "") for alias, names in shut.items())


def _pointers(folder: Path) -> str:
    program = Path(sys.executable).parent / "mlflow"
    mlflow = os.path.relpath(program) if program.is_relative_to(Path.cwd()) else "mlflow"
    return "\n".join(
        [
            f"report    {folder / 'report.html'}, and beside other runs: vapi report",
            f"runs      {mlflow} ui, then http://127.0.0.1:5000",
            "yours     point model.generator, model.tokenizer and subset.source in params.yaml at your own, then: dvc repro",
        ]
    )


# --- sheets ------------------------------------------------------------------------------------


TITLE_HEIGHT = 30


def banded_sheet(bands: Iterable[tuple[str, np.ndarray]], columns: int) -> Image.Image:
    """Bands of images, uint8 (N, H, W, 3), one below the other, each under its title; titles may be equal."""
    parts = [(title, images.sheet(band, columns, images.tile_scale(band.shape[1]))) for title, band in bands]
    width = max(part.width for _, part in parts)
    canvas = Image.new("RGB", (width, sum(part.height + TITLE_HEIGHT for _, part in parts)), "white")
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(size=17), 0
    for title, part in parts:
        draw.text((4, y + 5), title, fill="#222222", font=font)
        canvas.paste(part, (0, y + TITLE_HEIGHT))
        y += part.height + TITLE_HEIGHT
    return canvas


def unbanded(sheet: np.ndarray, counts: Sequence[int], columns: int, side: int) -> list[np.ndarray]:
    """The bands of images with ``side`` pixels that such a sheet, uint8 (H, W, 3), was made of: uint8 (N, side, side, 3) for each count.
    Raises ValueError for a sheet of another shape."""
    bands, y = [], 0
    for count in counts:
        top, height = y + TITLE_HEIGHT, images.sheet_height(count, columns, side)
        bands.append(images.cut(sheet[top : top + height], count, columns, side))
        y = top + height
    return bands


def _picture(band: np.ndarray, columns: int, alt: str) -> str:
    """A sheet for the page: pixels as they are when they are few, reduced when they are many."""
    side = 128
    if band.shape[1] > side:
        band = np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.LANCZOS)) for one in band])
    scale = max(1, 64 // band.shape[1])
    picture = images.sheet(band, columns, scale, gap=0)
    uri = images.data_uri(images.png_bytes(picture))
    return f'<img src="{uri}" alt="{esc(alt)}" width="{picture.width}" height="{picture.height}">'


# --- charts ------------------------------------------------------------------------------------


def sweep_chart(results: Results) -> str:
    """FID of both models over the swept temperatures (over the guidances, if only those were swept)."""
    points = results["sweep"]
    over = "temperature" if len({p["temperature"] for p in points}) > 1 or len({p["guidance"] for p in points}) == 1 else "guidance"
    other = "guidance" if over == "temperature" else "temperature"
    values = sorted({p[other] for p in points})
    lines = []
    for name in ("base", "tuned"):
        best = min((p for p in points if p["model"] == name), key=lambda p: p["fid"])
        for n, value in enumerate(values):
            own = sorted((p for p in points if p["model"] == name and p[other] == value), key=lambda p: p[over])
            star = own.index(best) if best in own else -1
            title = name + (f", {other} {value:g}" if len(values) > 1 else "")
            lines.append(markup.Line(title, [(p[over], p["fid"]) for p in own], f"{name} dash{n % 4}", star=star))
    return markup.chart(lines, over, "FID against the validation images (log scale)", log=True)


def exposure_chart(results: Results, width: int = 520) -> str:
    """Two dots per model: FID of draws on real contexts, FID of free-running samples; the bar between is the gap."""
    exposure = results["exposure"]
    left, right, row, top = 60, 60, 64, 40
    high = max(one[key] for one in exposure.values() for key in ("fid_teacher_forced", "fid_free_running")) * 1.08 or 1.0

    def px(value: float) -> float:
        return left + value / high * (width - left - right)

    height = top + row * len(exposure) + 22
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="FID teacher-forced and free-running">']
    for x in markup.ticks(0, high):
        parts.append(f'<line class="grid" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{top - 16}" y2="{height - 34}"/>')
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - 18}" text-anchor="middle">{markup.number(x)}</text>')
    parts.append(f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 2}" text-anchor="middle">FID</text>')
    for n, (name, one) in enumerate(exposure.items()):
        y, a, b = top + row * n + 22, px(one["fid_teacher_forced"]), px(one["fid_free_running"])
        gap = f"gap {markup.distance(one['gap'])}".replace("-", "−")
        parts.append(f'<text class="name" x="0" y="{y + 4}">{esc(name)}</text>')
        parts.append(f'<line class="gap {esc(name)}" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot hollow {esc(name)}" cx="{a:.1f}" cy="{y}" r="6"/>')
        parts.append(f'<circle class="dot {esc(name)}" cx="{b:.1f}" cy="{y}" r="6"/>')
        parts.append(f'<text class="tick" x="{(a + b) / 2:.1f}" y="{y - 13}" text-anchor="middle">{gap}</text>')
    parts.append("</svg>")
    legend = '<span class="key ring">teacher-forced, on real contexts</span><span class="key disc">free-running</span>'
    return "".join(parts) + f'<p class="legend">{legend}</p>'


CURVES = {
    "reward": "reward",
    "ce": "cross-entropy, nats per code",
    "entropy": "entropy, nats per code",
    "ratio": "log-ratio to the base, own class",
    "ratio_other": "log-ratio to the base, another class",
    "told_apart": "share likelier under its own class",
}
"""Terms of metrics.jsonl that are drawn, and their titles; the last three are objective cca's."""


def curve_charts(curves: Sequence[Scores]) -> str:
    """The terms of ``CURVES`` while tuning: the batches, and the held-out images."""
    figures = []
    for key, title in CURVES.items():
        lines = []
        for prefix, name, kind in (("tune", "batches", "faint"), ("holdout", "held-out images", "tuned")):
            points = [(row["step"], row[f"{prefix}/{key}"]) for row in curves if f"{prefix}/{key}" in row]
            if points:
                lines.append(markup.Line(name, points, kind, dots=prefix == "holdout"))
        if lines:
            figures.append(f"<figure>{markup.chart(lines, 'step', title, width=380, height=250)}</figure>")
    return f'<div class="three">{"".join(figures)}</div>' if figures else ""


def read_curves(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the stage tune, a dictionary per step. A last line that was not written to its end, by a run that was killed or
    still goes on, is left out."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not here; it comes with the tuned weights: vapi tune")
    *whole, last = Path(path).read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in whole]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again, or run the stage again: vapi tune") from None
    with contextlib.suppress(ValueError):  # empty, where the line before it ended
        rows.append(json.loads(last))
    return rows


# --- the page ----------------------------------------------------------------------------------


def page(results: Results, curves: Sequence[Scores], sheets: Sheets, provenance: Scores, columns: int, shown: Sequence[Scores] = ()) -> str:
    """The whole report as one HTML file. ``sheets``: base and tuned {plain, best, prompts}, anchors {real, reconstruction}; ``shown``: the
    prompts of these pictures, with verdicts."""
    first, _, second = verdict(results).partition(". ")
    sections = [
        f'<header><p class="eyebrow">vapi · evaluation of a tuned generator</p><h1>{esc(first)}.</h1>'
        f'<p class="lead">{esc(second)}</p><p class="notes">{esc(" ".join(caveats(results)))}</p></header>',
        _before_after(results, sheets, columns),
        f"<section><h2>The numbers</h2>{_table(results)}<p class='small'>{esc(table_note(results))}</p></section>",
        _charts(results),
    ]
    if "prompts" in results:
        answers = {name: sheets[name]["prompts"] for name in ("base", "tuned")}
        sections.insert(1, report_prompts.section(results["prompts"], answers, shown))
    charts = curve_charts(curves)
    if charts:
        sections.append(f"<section><h2>While tuning</h2>{charts}</section>")
    sections += [_more_sheets(results, sheets, columns), _details(results, provenance)]
    return markup.document(first, sections)


GATE = {"rival": "rival", "candidate": "tuned", "limit": "limit", "margin": "margin"}
"""Numbers of a gate as registration.json holds them, and their titles."""


def gate_title(judged: Results, alias: str) -> str:
    """Of the gates in front of an alias: whether all are open, and who is on the other side."""
    against = judged["against"][alias]
    shut = "FAILED" if not all(gate["passed"] for gate in against["gates"]) else "FAILED with challenger"  # never without it
    return f"{alias}: {'passed' if judged['passed'][alias] else shut}, tuned against {against['rival']}"


def gate_numbers(gate: Scores) -> list[str]:
    """A gate's numbers in words."""
    return ["missing" if gate[name] is None else f"{gate[name]:.4g}" for name in GATE]


def gated(text: str, judged: Results) -> str:
    """A page of ``page`` with what the gates said, below its verdict. ``judged``: registration.json."""
    head = "".join(f"<th>{title}</th>" for title in ("", *GATE.values(), "passed"))
    parts = []
    for alias, against in judged["against"].items():
        rows = "".join(_gate(gate) for gate in against["gates"])
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        parts.append(f'<h3>{esc(gate_title(judged, alias))}</h3><div class="scroll">{table}</div>')
    note = f'<p class="small">{esc(judged["note"])}</p>' if judged["note"] else ""
    return text.replace("</header>", f"</header>\n<section><h2>Gates</h2>{''.join(parts)}{note}</section>", 1)


def _gate(gate: Scores) -> str:
    cells = "".join(f"<td>{esc(number.replace('-', '−'))}</td>" for number in gate_numbers(gate))
    return f'<tr><th scope="row">{esc(gate["metric"])}</th>{cells}<td>{"yes" if gate["passed"] else "<b>no</b>"}</td></tr>'


def _before_after(results: Results, sheets: Sheets, columns: int) -> str:
    half = max(1, columns // 2) if len(sheets["base"]["plain"]) > columns else columns
    figures = [
        markup.figure(
            _picture(sheets[name]["plain"], half, f"samples of the {name} model"),
            title,
            f"FID {markup.distance(results[name]['fid'])}",
            name,
        )
        for name, title in (("base", "Before: base"), ("tuned", "After: tuned"))
    ]
    sampler = results["protocol"]["sampler"]
    note = f"The same random numbers and classes on both sides, nothing selected; temperature {sampler['temperature']:g}"
    note += f", guidance {sampler['guidance']:g}." if sampler["guidance"] != 1 else ", no guidance."
    return f'<section><div class="pair">{"".join(figures)}</div><p class="small">{esc(note)}</p></section>'


def _table(results: Results) -> str:
    groups = rows(results)
    columns = columns_of(results)
    head = "".join(f'<th scope="col">{esc(column.title)}&nbsp;{arrow(column)}</th>' for column in columns)
    titles, compared = list(groups), len(groups) - 2  # the anchors come last
    body = []
    for n, (title, scores) in enumerate(groups.items()):
        pair = groups[titles[n ^ 1]] if n < compared else None  # base and tuned, each with what it is compared with
        cells = "".join(f'<td class="{better(scores, pair, c)}">{html_cell(scores, c)}</td>' for c in columns)
        name, _, setting = title.partition(" (")
        shown = esc(name) + (f"<i>{esc(setting.rstrip(')'))}</i>" if setting else "")
        first, tuned = "first" if n and n % 2 == 0 else "", "after" if n < compared and n % 2 else ""
        body.append(f'<tr class="{first}{tuned}"><th scope="row">{shown}</th>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def arrow(column: Column) -> str:
    return '<abbr title="lower is better">↓</abbr>' if column.lower else '<abbr title="higher is better">↑</abbr>'


def better(scores: Scores, other: Scores | None, column: Column) -> str:
    if other is None or scores.get(column.key) is None or other.get(column.key) is None:
        return ""
    return "win" if direction(other, scores, column.key, column.lower) > 0 else ""


def html_cell(scores: Scores, column: Column) -> str:
    value, _, spread = cell(scores, column).partition(" ± ")
    value = value.replace("-", "−") if value != "-" else "–"
    return f"<span>{esc(value)}</span>" + (f"<i>± {esc(spread)}</i>" if spread else "")


def table_note(results: Results) -> str:
    protocol, anchors = results["protocol"], results["anchors"]
    note = f"{protocol['samples']:,} samples per model and seed against {protocol['reference']['images']:,} real images. "
    if protocol["reference"].get("moments", "these images") != "these images":
        note += "FID and sFID compare with moments that were published of many more; the other numbers with these. "
    note += f"The last two rows are {anchors['real']['images']:,} other real images and what the tokenizer keeps of them. "
    note += "Arrows point to where better is; bold is better than its partner by more than the noise. "
    note += "The reward is that of held-out images under teacher forcing."
    if anchors["real"]["images"] < protocol["samples"]:
        note += " The anchors have fewer images than the models, which raises their FID: compare them with each other."
    return note


def _charts(results: Results) -> str:
    sweep, gaps = results["protocol"]["sweep"], results["exposure"]
    left = f"{sweep['samples']:,} samples per point against the validation images, so the numbers differ from the table's. "
    left += "Large dots: the best setting."
    right = "What is lost when a model must read its own codes instead of true ones, at temperature 1; "
    right += f"{gaps['base']['images']:,} images each."

    def half(title: str, figure: str, note: str) -> str:
        return f'<div><h2>{title}</h2><figure>{figure}</figure><p class="small">{esc(note)}</p></div>'

    halves = half("How each model likes to be sampled", sweep_chart(results), left) + half("Exposure bias", exposure_chart(results), right)
    return f'<section class="two">{halves}</section>'


def _more_sheets(results: Results, sheets: Sheets, columns: int) -> str:
    best = [
        markup.figure(
            _picture(sheets[name]["best"], columns, f"samples of the {name} model at its best setting"),
            f"{name.capitalize()} at its best",
            f"{_setting(results[f'{name}_best'])} · FID {markup.distance(results[f'{name}_best']['fid'])}",
            name,
        )
        for name in ("base", "tuned")
    ]
    anchors = [
        markup.figure(_picture(sheets["anchors"][key], columns, title), title, f"FID {markup.distance(results['anchors'][key]['fid'])}")
        for key, title in (("real", "Real images"), ("reconstruction", "Their reconstructions"))
    ]
    return (
        f'<section><h2>Each at its best setting</h2><div class="pair">{"".join(best)}</div></section>'
        f'<section><h2>What is possible</h2><div class="pair">{"".join(anchors)}</div></section>'
    )


def _details(results: Results, provenance: Scores) -> str:
    return (
        f'<section class="two"><div><h2>Protocol</h2>{markup.facts(results["protocol"])}</div>'
        f"<div><h2>Provenance</h2>{markup.facts(provenance)}</div></section>"
    )
