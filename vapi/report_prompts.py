"""The part of a report that is about prompts: GenEval's table before and after, drawn and in numbers, and the pictures.

Reads the section ``prompts`` of metrics.json (``prompted.results``) and nothing else. A number bears the name that its
detector's weights allow: only OpenMMLab's make it "GenEval".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vapi import images
from vapi.markup import esc

Scores = Mapping[str, Any]

TITLES = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colour",
    "position": "position",
    "color_attr": "colour of each",
    "overall": "overall",
}
STRIP = 96  # about the side of a picture on the page, in pixels


def names(prompts: Scores) -> dict[str, str]:
    """What each detector's overall score may be called, by its column in the table."""
    return {name: judged["base"]["title"] for name, judged in prompts["detectors"].items()}


def verdict(prompts: Scores, titles: Mapping[str, str]) -> str:
    """A sentence for each detector, or where there is none for each text metric (called as ``titles`` say): what tuning did to the
    score, and whether it is more than chance."""
    rows = [(judged["base"]["title"], judged["difference"]["tuned"]["overall"]) for judged in prompts["detectors"].values()]
    if not rows:
        found = {name: sides["difference"]["tuned"] for name, sides in prompts["metrics"].items()}
        rows = [(titles.get(name, name), row) for name, row in found.items() if row]
    return " ".join(_sentence(title, row, prompts["prompts"], n) for n, (title, row) in enumerate(rows))


def _sentence(title: str, row: Scores, count: int, number: int) -> str:
    change = f"from {row['a']:.3f} to {row['b']:.3f}"
    interval = f"{_signed(row['difference'])}, 95 % {_signed(row['low'])} to {_signed(row['high'])}"
    moved = _beyond_chance(row)
    if number == 0 and moved:
        return f"Tuning {'raised' if moved > 0 else 'lowered'} {title} on {count:,} prompts: {change} ({interval})."
    words = {1: "rose", -1: "fell", 0: "moved no more than chance would"}[moved]
    return f"{title} {words}{f' on {count:,} prompts' if number == 0 else ''}: {change} ({interval})."


def _beyond_chance(row: Scores) -> int:
    """1 where all of the interval is above 0, -1 where all is below."""
    return 1 if row["low"] > 0 else -1 if row["high"] < 0 else 0


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def grid(prompts: Scores) -> str:
    """The tables of all detectors as aligned text: tasks, base, tuned, the difference and its interval, anchors."""
    lines = []
    for judged in prompts["detectors"].values():
        rows = _rows(judged)
        head = ["", *rows[0][1]]
        body = [[title, *cells.values()] for title, cells in rows]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines += [judged["base"]["title"]]
        lines += ["  " + line[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths[1:])) for line in [head, *body]]
        if judged["base"]["partial"]:
            lines.append(f"  PARTIAL: {'; '.join(judged['base']['partial'])}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _rows(judged: Scores) -> list[tuple[str, dict[str, str]]]:
    """Title of each task, and its cells by column."""
    difference = judged["difference"]["tuned"]
    rows = []
    for task, row in difference.items():
        cells = {"base": f"{row['a']:.3f}", "tuned": f"{row['b']:.3f}"}
        cells["tuned - base (95 %)"] = f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        for side in ("base_guided", "tuned_guided", "base_best", "tuned_best"):
            if side in judged:
                cells[side.replace("_best", " at its best").replace("_", " ")] = f"{_score(judged[side], task):.3f}"
        for anchor, found in judged["anchors"].items():
            cells[{"real": "real images", "shuffled": "other prompts of the task"}.get(anchor, anchor)] = f"{_score(found, task):.3f}"
        rows.append((TITLES[task], cells))
    return rows


def _score(found: Scores, task: str) -> float:
    if task == "overall":
        return float(found["overall"])
    return float(found["tasks"][task]["score"]) if task in found["tasks"] else float("nan")


# --- the page ----------------------------------------------------------------------------------


def section(prompts: Scores, sheets: Mapping[str, np.ndarray], shown: Sequence[Scores]) -> str:
    """HTML: a chart and a table for each detector, then some prompts with both models' pictures.

    ``sheets``: base and tuned, uint8 (K * I, H, W, 3) for the K prompts ``shown`` ({text, base, tuned}: verdicts of the first judge).
    """
    parts = [f"<section><h2>What was asked for, and what came</h2><p class='small'>{esc(_note(prompts))}</p>"]
    for judged in prompts["detectors"].values():
        parts.append(f"<h3>{esc(judged['base']['title'])}</h3><figure>{chart(judged)}{LEGEND}</figure>{_table(judged)}")
    parts.append(notes(prompts))
    return "".join([*parts, "</section>", pictures(sheets, shown, prompts["images_per_prompt"])])


def notes(prompts: Scores) -> str:
    """HTML: how often the judges agree, and what text metrics say."""
    parts = []
    if prompts["agreement"]:
        shares = ", ".join(f"{side.replace('_', ' ')} {share:.1%}" for side, share in prompts["agreement"].items())
        parts.append(f"Pictures on which both judges say the same: {shares}.")
    for name, sides in prompts["metrics"].items():
        words = ", ".join(
            f"{side.replace('_', ' ')} {one['mean']:.4f}{_error(one)}"
            for side, one in sides.items()
            if side not in ("description", "difference")
        )
        parts.append(f"{name}: {words}. {sides['description']}.")
    return "".join(f"<p class='small'>{esc(words)}</p>" for words in parts)


def _error(one: Scores) -> str:
    return f" (S.E. {one['standard_error']:.4f})" if one["standard_error"] is not None else ""


def _note(prompts: Scores) -> str:
    note = f"{prompts['prompts']:,} prompts, {prompts['images_per_prompt']} pictures of each and seed"
    if not (first := next(iter(prompts["detectors"].values()), None)):
        return f"{note}, scored by {' and '.join(prompts['metrics'])}."
    note += ", share of pictures that are as asked. Overall is the plain mean of the tasks. Intervals resample prompts, in pairs. Anchors: "
    note += (
        "real pictures of these prompts and the tokenizer's reconstructions of them, where there are some, and pictures judged by another "
    )
    note += "prompt of their task. What is each model's best setting was chosen by FID on the validation images, not by these scores."
    return note + (f" PARTIAL: {'; '.join(first['base']['partial'])}." if first["base"]["partial"] else "")


LEGEND = '<p class="legend"><span class="key ring">base</span><span class="key disc">tuned, with the interval of the difference</span></p>'


def chart(judged: Scores) -> str:
    """Tasks one below the other, base and tuned of each on a line from 0 to 1."""
    rows = judged["difference"]["tuned"]
    left, right, step, width = 130, 24, 30, 720

    def px(value: float) -> float:
        return left + min(1.0, max(0.0, value)) * (width - left - right)

    height = step * len(rows) + 34
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Score by task, before and after">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="6" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{px(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for n, (task, row) in enumerate(rows.items()):
        y = 22 + step * n
        low, high = px(row["a"] + row["low"]), px(row["a"] + row["high"])
        parts.append(f'<text class="name" x="0" y="{y + 4}">{esc(TITLES[task])}</text>')
        parts.append(f'<line class="gap tuned" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot hollow base" cx="{px(row["a"]):.1f}" cy="{y}" r="6"/>')
        parts.append(f'<circle class="dot tuned" cx="{px(row["b"]):.1f}" cy="{y}" r="6"/>')
    return "".join([*parts, "</svg>"])


def _table(judged: Scores) -> str:
    rows = _rows(judged)
    head = "".join(f'<th scope="col">{esc(column)}</th>' for column in rows[0][1])
    body = []
    for (title, cells), row in zip(rows, judged["difference"]["tuned"].values(), strict=True):
        better = row["low"] > 0
        shown = "".join(
            f'<td class="{"win" if better and name == "tuned" else ""}"><span>{esc(c)}</span></td>' for name, c in cells.items()
        )
        body.append(f'<tr><th scope="row">{esc(title)}</th>{shown}</tr>')
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def pictures(sheets: Mapping[str, np.ndarray], shown: Sequence[Scores], count: int) -> str:
    """Prompts one below the other, each with the pictures of base and tuned, and what the first judge thinks of them."""
    rows = []
    for n, one in enumerate(shown):
        cells = []
        for side in ("base", "tuned"):
            band = sheets[side][n * count : (n + 1) * count]
            marks = " ".join(map(_mark, one[side]))
            picture = _strip(band, f"{side}: {one['text']}")
            cells.append(f'<td>{picture}<div class="marks {side}">{marks}</div></td>')
        rows.append(f'<tr><th scope="row">{esc(one["text"])}</th>{"".join(cells)}</tr>')
    head = '<thead><tr><th></th><th scope="col">base</th><th scope="col">tuned</th></tr></thead>'
    note = "The first prompts of each task, nothing selected; the same random numbers on both sides. Marks are the first judge's."
    return (
        f'<section><h2>Some prompts</h2><div class="scroll"><table class="prompts">{head}<tbody>{"".join(rows)}</tbody></table></div>'
        f"<p class='small'>{note}</p></section>"
    )


def _mark(verdict: bool | float) -> str:
    """A detector's, or a score."""
    return f"{verdict:.3f}" if isinstance(verdict, float) else "✓" if verdict else "✗"


def _strip(band: np.ndarray, alt: str) -> str:
    if band.shape[1] > STRIP:
        band = np.stack([np.asarray(Image.fromarray(one).resize((STRIP,) * 2, Image.Resampling.LANCZOS)) for one in band])
    picture = images.sheet(band, len(band), max(1, round(STRIP / band.shape[1])), gap=2)
    return f'<img src="{images.data_uri(images.png_bytes(picture))}" alt="{esc(alt)}" width="{picture.width}" height="{picture.height}">'


def bands(sheets: Mapping[str, np.ndarray], shown: Sequence[Scores], count: int) -> list[tuple[str, np.ndarray]]:
    """The same as titles and rows of pictures, for a PNG: base on the left, tuned on the right."""
    return [
        (
            f"{one['text']}   (base {_total(one['base'])}, tuned {_total(one['tuned'])})",
            np.concatenate([sheets[side][n * count : (n + 1) * count] for side in ("base", "tuned")]),
        )
        for n, one in enumerate(shown)
    ]


def _total(verdicts: Sequence[bool | float]) -> str:
    if isinstance(verdicts[0], float):
        return f"{sum(verdicts) / len(verdicts):.3f}"
    return f"{sum(verdicts)} of {len(verdicts)}"
