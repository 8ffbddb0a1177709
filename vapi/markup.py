"""What our HTML pages are made of: the document around them, one style sheet, charts, tables that can be sorted, pictures.

A page is a single file that fetches nothing: styles, scripts and charts (SVG of our own) are inline, pictures are data URIs. It
follows the reader's light or dark setting, prints on white, and can be used from the keyboard; text has a contrast of 4.5 : 1 at
least in both. All text is escaped on its way in (``esc``). Scripts are an offer: without them a page says the same.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Scores = Mapping[str, Any]


def esc(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text), quote=True)


def distance(value: float) -> str:
    """A Frechet distance with as many digits as it is worth."""
    return f"{value:.2f}" if abs(value) >= 0.995 else f"{value:.3f}"


def number(value: float) -> str:
    """Six digits at most, with a minus that is as long as a plus."""
    return f"{value:.6g}".replace("-", "−")


# --- the document ------------------------------------------------------------------------------


def document(title: str, sections: Iterable[str], script: str = "") -> str:
    """A whole page of ours around some HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + f"\n</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def figure(picture: str, title: str, note: str = "", kind: str = "") -> str:
    """A sheet in a frame, under its title."""
    small = f"<span>{esc(note)}</span>" if note else ""
    return f'<figure class="sheet {esc(kind)}"><figcaption><b>{esc(title)}</b>{small}</figcaption>{picture}</figure>'


def facts(values: Scores) -> str:
    """Nested plain values as a definition list."""
    items = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            shown = facts(value)
        else:
            shown = digest(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        items.append(f"<dt>{esc(name.replace('_', ' '))}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def digest(text: str) -> str:
    """A word; a digest in type of one width, shortened where it is long, whole in its title."""
    if len(text) < 16 or not all(c in "0123456789abcdef" for c in text):
        return esc(text)
    return f'<code title="{esc(text)}">{esc(text[:12])}</code>' if len(text) >= 40 else f"<code>{esc(text)}</code>"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: HTML, what it is sorted by (None: its text), and its CSS class."""

    shown: str
    by: float | None = None
    kind: str = ""


def table(name: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], kind: str = "") -> str:
    """A table that can be sorted by any column, with the heads of its rows first; ``head`` and heads are HTML. ``name`` says what it is,
    ``kind`` is its CSS class (words: aligned for reading)."""
    columns = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in head)
    body = "".join(f'<tr><th scope="row">{title}</th>{"".join(map(_cell, cells))}</tr>' for title, cells in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{esc(name)}" tabindex="0"><table class="sortable {esc(kind)}">'
        f'<caption class="hidden">{esc(name)}</caption><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(cell: Cell) -> str:
    by = "" if cell.by is None else f' data-by="{cell.by:.10g}"'
    kind = f' class="{esc(cell.kind)}"' if cell.kind else ""
    return f"<td{kind}{by}>{cell.shown}</td>"


# --- pictures ----------------------------------------------------------------------------------

ENCODINGS: tuple[tuple[int, int], ...] = ((48, 0), (256, 88), (192, 82), (128, 80), (96, 78), (64, 75))
"""Side to which a picture is reduced at most, in pixels, and WebP's quality (0: a PNG, to the bit), the best first."""


def encoding(pictures: Sequence[np.ndarray], budget: int) -> tuple[int, int]:
    """The best of ``ENCODINGS`` with which pictures, uint8 (H, W, 3), fit into so many bytes together, by a sample of them."""
    some = pictures[:: max(1, len(pictures) // 16)]
    largest = max((len(one) for one in some), default=0)
    for side, quality in ENCODINGS:
        fits = sum(len(encoded(one, (side, quality))) for one in some) * len(pictures) <= budget * len(some)
        if fits and (quality or largest <= side):
            return side, quality
    return ENCODINGS[-1]


def encoded(pixels: np.ndarray, how: tuple[int, int]) -> bytes:
    """A picture, uint8 (H, W, 3), as a file."""
    side, quality = how
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4) if quality else image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def img(pixels: np.ndarray, alt: str, how: tuple[int, int]) -> str:
    """A picture, uint8 (H, W, 3), as an element."""
    kind = "webp" if how[1] else "png"
    uri = f"data:image/{kind};base64,{base64.b64encode(encoded(pixels, how)).decode()}"
    return f'<img src="{uri}" alt="{esc(alt)}" width="{pixels.shape[1]}" height="{pixels.shape[0]}">'


@dataclass(frozen=True)
class Shot:
    """One picture of a card."""

    pixels: np.ndarray
    title: str
    kind: str = ""


def card(shots: Sequence[Shot], name: str, tip: str, number: str, how: tuple[int, int]) -> str:
    """Pictures that belong together, as a button that enlarges them, with words that show on hover and focus."""
    shown = "".join(
        f'<span class="shot {esc(shot.kind)}">{img(shot.pixels, f"{name}: {shot.title}", how)}<span>{esc(shot.title)}</span></span>'
        for shot in shots
    )
    return (
        f'<div class="card"><button type="button" class="zoom" aria-describedby="{number}">{shown}</button>'
        f'<div class="tip" id="{number}" role="tooltip"><b>{esc(name)}</b>{tip}</div></div>'
    )


# --- charts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``kind`` is its CSS class."""

    title: str
    points: Sequence[tuple[float, float]]
    kind: str
    dots: bool = True
    star: int = -1  # index of the point to single out


def ticks(low: float, high: float, count: int = 5, log: bool = False) -> list[float]:
    """Round numbers within a range."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        within = [value for value in found if low <= value <= high]
        if len(within) >= 3:
            return within
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - rough))
    return [float(f"{n * step:.12g}") for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(lines: Sequence[Line], x_title: str, y_title: str, log: bool = False, width: int = 520, height: int = 300) -> str:
    """A line chart as inline SVG, coloured by the page's style sheet."""
    left, right, top, bottom = 52, 14, 26, 40
    xs, ys = [x for line in lines for x, _ in line.points], [y for line in lines for _, y in line.points]
    log = log and min(ys) > 0
    scale: Callable[[float], float] = math.log10 if log else float
    x_low, x_high = padded(min(xs), max(xs), 0.02)
    low, high = padded(scale(min(ys)), scale(max(ys)), 0.14 if any(line.star >= 0 for line in lines) else 0.08)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (scale(y) - low) / (high - low) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(_told(lines, x_title, y_title))}">']
    y_range = (10**low, 10**high) if log else (low, high)
    for y in ticks(*y_range, log=log):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(x_low, x_high, 6):
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text class="axis" x="{left - 40}" y="14">{esc(y_title)}</text>')
    parts.append(f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">{esc(x_title)}</text>')
    for line in lines:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line {esc(line.kind)}" points="{path}"/>')
        for n, (x, y) in enumerate(line.points if line.dots else ()):
            radius = 6 if n == line.star else 3
            words = f"<title>{esc(line.title)}: {number(y)} at {esc(x_title)} {number(x)}</title>"
            parts.append(f'<circle class="dot {esc(line.kind)}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{radius}">{words}</circle>')
            if n == line.star:
                place = f'x="{px(x):.1f}" y="{py(y) + 22:.1f}" text-anchor="middle"'
                parts.append(f'<text class="star {esc(line.kind)}" {place}>{distance(y)}</text>')
    parts.append("</svg>")
    return "".join(parts) + legend((line.title, line.kind) for line in lines)


def _told(lines: Iterable[Line], x_title: str, y_title: str) -> str:
    """A chart in words, for whoever does not see it."""
    ends = [f"{line.title} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in lines]
    return f"{y_title} over {x_title}: {'; '.join(ends)}"


@dataclass(frozen=True)
class Dot:
    """A value on a lane, with what it may be off by on both sides (0: not known)."""

    value: float
    words: str
    kind: str
    hollow: bool = False
    off: float = 0.0


def lanes(name: str, rows: Sequence[tuple[str, Sequence[Dot]]], ends: tuple[float, float] | None = None, left: int = 170) -> str:
    """Rows one below the other, dots with error bars on a common axis, as inline SVG; joined where a row has several."""
    width, right, step = 520, 24, 28
    numbers = [value for _, dots in rows for dot in dots for value in (dot.value - dot.off, dot.value + dot.off)]
    low, high = ends or padded(min(numbers), max(numbers), 0.08)
    height = step * len(rows) + 34

    def px(value: float) -> float:
        return left + (min(high, max(low, value)) - low) / (high - low) * (width - left - right)

    told = "; ".join(f"{title}: {', '.join(dot.words for dot in dots)}" for title, dots in rows)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(name)}: {esc(told)}">']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="4" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{px(tick):.1f}" y="{height - 8}" text-anchor="middle">{number(tick)}</text>')
    for n, (title, dots) in enumerate(rows):
        y = 18 + step * n
        parts.append(f'<text class="name" x="0" y="{y + 4}">{esc(title)}</text>')
        if len(dots) > 1:
            places = [px(dot.value) for dot in dots]
            parts.append(f'<line class="grid" x1="{min(places):.1f}" x2="{max(places):.1f}" y1="{y}" y2="{y}"/>')
        for dot in dots:
            if dot.off:
                near, far = px(dot.value - dot.off), px(dot.value + dot.off)
                parts.append(f'<line class="gap {dot.kind}" x1="{near:.1f}" x2="{far:.1f}" y1="{y}" y2="{y}"/>')
            hollow = " hollow" * dot.hollow
            parts.append(
                f'<circle class="dot{hollow} {dot.kind}" cx="{px(dot.value):.1f}" cy="{y}" r="5.5"><title>{esc(dot.words)}</title></circle>'
            )
    return "".join([*parts, "</svg>", f'<p class="legend">{esc(name)}</p>'])


@dataclass(frozen=True)
class Point:
    """A point on a plane, with what it may be off by (0: not known); points of one ``path`` are joined."""

    title: str
    x: float
    y: float
    kind: str
    hollow: bool = False
    small: bool = False
    off: tuple[float, float] = (0.0, 0.0)
    path: str = ""


def plane(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points with error bars as inline SVG."""
    width, height, left, bottom, top, right = 520, 320, 48, 40, 24, 16
    x_low, x_high = padded(min(one.x - one.off[0] for one in points), max(one.x + one.off[0] for one in points), 0.1)
    y_low, y_high = padded(min(one.y - one.off[1] for one in points), max(one.y + one.off[1] for one in points), 0.1)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    said = [f"{one.title}: {y_title} {one.y:.3f}, {x_title} {one.x:.3f}" for one in points]
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc("; ".join(dict.fromkeys(said)))}">']
    for y in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(x_low, x_high, 6):
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">{esc(x_title)}</text>')
    parts.append(f'<text class="axis" x="8" y="14">{esc(y_title)}</text>')
    for path in dict.fromkeys(one.path for one in points):
        joined = [one for one in points if one.path == path]
        corners = " ".join(f"{px(one.x):.1f},{py(one.y):.1f}" for one in joined)
        parts.append(f'<polyline class="line faint {joined[-1].kind}" points="{corners}"/>')
    for one, words in zip(points, said, strict=True):
        x, y, (dx, dy) = px(one.x), py(one.y), one.off
        if dx or dy:
            parts.append(
                f'<line class="line thin {one.kind}" x1="{px(one.x - dx):.1f}" x2="{px(one.x + dx):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<line class="line thin {one.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{py(one.y - dy):.1f}" y2="{py(one.y + dy):.1f}"/>'
            )
        kind = f"dot{' hollow' * one.hollow} {one.kind}"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{4 if one.small else 6.5}"><title>{esc(words)}</title></circle>')
    return "".join([*parts, "</svg>"])


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """A range with some room on both sides."""
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - room, high + room


def legend(keys: Iterable[tuple[str, str]]) -> str:
    """Titles and CSS classes below a chart."""
    return '<p class="legend">' + "".join(f'<span class="key {esc(kind)}">{esc(title)}</span>' for title, kind in keys) + "</p>"


STYLE = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1c1b1a;--soft:#67645e;--rule:#e6e3dd;--base:#62676f;--tuned:#c2410c;
--run1:#1d4ed8;--run2:#15803d;--run3:#7e22ce;--run4:#92610a;--run5:#be185d}
@media (prefers-color-scheme:dark){:root{
--bg:#141414;--card:#1c1c1d;--ink:#ecebe8;--soft:#a09d97;--rule:#323234;--base:#9aa0aa;--tuned:#fb923c;
--run1:#84a9ff;--run2:#4ade80;--run3:#c99bff;--run4:#facc15;--run5:#f472b6}}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#55524d;--rule:#cfccc6;--base:#62676f;--tuned:#c2410c;
--run1:#1d4ed8;--run2:#15803d;--run3:#7e22ce;--run4:#92610a;--run5:#be185d}}
.base,.faint{--own:var(--base)}.tuned,.run0{--own:var(--tuned)}
.run1{--own:var(--run1)}.run2{--own:var(--run2)}.run3{--own:var(--run3)}.run4{--own:var(--run4)}.run5{--own:var(--run5)}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:56px 28px 80px}
header{max-width:900px;margin-bottom:36px}
.eyebrow{margin:0 0 14px;color:var(--soft);font-size:13px;letter-spacing:.04em}
h1{margin:0 0 14px;font-size:clamp(26px,3.6vw,38px);line-height:1.15;letter-spacing:-.02em;font-weight:650;text-wrap:balance}
.lead{margin:0 0 10px;font-size:19px;line-height:1.45}
.notes{margin:0;color:var(--soft)}
section{margin:0 0 48px}
h2{margin:0 0 14px;font-size:19px;letter-spacing:-.01em;font-weight:650}
h3{margin:22px 0 10px;font-size:16px;font-weight:650}
a{color:inherit}
:focus-visible{outline:3px solid var(--tuned);outline-offset:2px}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.below{margin-top:20px}.small{margin:10px 0 0;color:var(--soft);font-size:13.5px}
.pair,.two{display:grid;grid-template-columns:1fr 1fr;gap:24px}
.three{display:grid;grid-template-columns:repeat(3,1fr);gap:20px}
.pair>*,.two>*,.three>*{min-width:0}
@media (max-width:760px){.pair,.two,.three{grid-template-columns:1fr}}
figure{margin:0;padding:18px;background:var(--card);border:1px solid var(--rule);border-radius:10px}
figure.sheet{padding:0;overflow:hidden}
figure.sheet+figure.sheet{margin-top:20px}
.pair figure.sheet+figure.sheet{margin-top:0}
figure.tuned{border-color:var(--tuned)}
figcaption{display:flex;justify-content:space-between;gap:12px;padding:10px 14px;font-size:14.5px}
figcaption span{color:var(--soft);font-variant-numeric:tabular-nums}
figure.tuned figcaption b{color:var(--tuned)}
img{display:block;width:100%;height:auto;image-rendering:pixelated}img[src^="data:image/webp"]{image-rendering:auto}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px}
table{width:100%;border-collapse:collapse;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:9px 11px;text-align:right;white-space:nowrap;vertical-align:baseline}
th:first-child{text-align:left;padding-left:16px}td:last-child,th:last-child{padding-right:16px}
thead th{font-weight:600;border-bottom:1px solid var(--rule)}
tbody th{font-weight:500}
abbr{text-decoration:none;color:var(--soft);font-weight:400}
th i,td i{display:block;font-style:normal;font-weight:400;font-size:11.5px;color:var(--soft)}
tr.first th,tr.first td{border-top:1px solid var(--rule)}
tr.after th{color:var(--tuned)}
td.win span{font-weight:700}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;overflow:visible}
.grid{stroke:var(--rule)}
.tick,.axis{fill:var(--soft)}
.name{fill:var(--ink);font-weight:600}
.star{font-weight:700;fill:var(--own)}
.line{fill:none;stroke:var(--own);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}.line.faint{stroke-width:1.1;opacity:.65}
.dash1{stroke-dasharray:7 5}.dash2{stroke-dasharray:2 5}.dash3{stroke-dasharray:9 4 2 4}
.dot{fill:var(--own);stroke:var(--card);stroke-width:1.5;stroke-dasharray:none}
.dot.hollow{fill:var(--card);stroke:var(--own);stroke-width:2.5}
.gap{stroke:var(--own);stroke-width:4;opacity:.35}
table.prompts th,table.prompts td{vertical-align:middle}
table.prompts th{white-space:normal;text-align:left;font-weight:500;max-width:240px}table.prompts td{text-align:left}
table.prompts img{width:auto;max-width:none}
.marks{font-size:13px;color:var(--soft);letter-spacing:.2em;margin-top:3px}.marks.tuned{color:var(--tuned)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0 0;font-size:13px;color:var(--soft)}
.key::before{content:"";display:inline-block;width:14px;height:3px;margin-right:7px;border-radius:2px;vertical-align:middle;
background:var(--own,var(--base))}
.key.ring::before,.key.disc::before{width:11px;height:11px;border-radius:50%;background:var(--own,var(--soft))}
.key.none::before{display:none}.key.faint::before{height:1.2px;opacity:.65}
.key.dash1::before{background:linear-gradient(90deg,var(--own) 40%,transparent 40% 60%,var(--own) 60%)}
.key.ring::before{background:none;border:2px solid var(--own,var(--soft))}
dl{display:grid;grid-template-columns:minmax(96px,auto) 1fr;gap:4px 16px;margin:0;font-size:13.5px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}dd dl{font-size:13px}
code{font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.sortable thead button{font:inherit;color:inherit;background:none;border:0;padding:0;margin:0}
.js .sortable thead button{cursor:pointer;text-decoration:underline dotted;text-underline-offset:4px}
.sortable th[aria-sort=ascending] button::before{content:"▲ "}.sortable th[aria-sort=descending] button::before{content:"▼ "}
.words th,.words td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.verdict{margin:0 0 10px;font-size:17px}
.notice{margin:18px 0;padding:14px 18px;border:1px solid var(--ink);border-left-width:6px;border-radius:8px;background:var(--card)}
.notice ul{margin:6px 0 0;padding-left:20px}
.who{list-style:none;margin:18px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:6px 22px}.who span{overflow-wrap:anywhere}
.letter{display:inline-block;min-width:1.5em;margin-right:5px;padding:0 .35em;text-align:center;color:var(--own);
border:2px solid var(--own);border-radius:6px;font-size:.82em;line-height:1.5}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:0 0 40px;padding:12px 0;border-block:1px solid var(--rule);font-size:14.5px}
.cards{display:flex;flex-wrap:wrap;gap:12px}
.zoom{display:flex;gap:6px;padding:6px;background:var(--card);border:1px solid var(--rule);border-radius:8px;font:inherit;color:inherit}
.js .zoom{cursor:zoom-in}
.shot{display:block;width:64px;font-size:11.5px;line-height:1.3;color:var(--own,var(--soft))}.shot>span{display:block;margin-top:3px}
.shot img{border-radius:3px}
.asked .shot{width:230px}
.tip{display:none;position:fixed;z-index:2;left:50%;bottom:16px;transform:translateX(-50%);width:max-content;max-width:92vw;
padding:8px 14px;background:var(--card);color:var(--ink);border:1px solid var(--ink);border-radius:8px;font-size:14px}
.zoom:hover+.tip,.zoom:focus-visible+.tip{display:block}
details{margin-top:14px}summary{cursor:pointer;font-weight:600}details>*:not(summary){margin-top:12px}
dialog{width:min(1100px,94vw);max-height:92vh;padding:20px 24px;color:var(--ink);background:var(--bg);
border:1px solid var(--rule);border-radius:12px}
dialog::backdrop{background:rgb(0 0 0/.6)}
dialog form{display:flex;justify-content:space-between;gap:16px;align-items:baseline}
dialog button{font:inherit;color:var(--ink);background:var(--card);
border:1px solid var(--ink);border-radius:8px;padding:6px 16px;cursor:pointer}
dialog .shots{display:flex;flex-wrap:wrap;gap:14px;margin-top:10px}
dialog .shot{flex:1 1 150px;width:auto;max-width:440px;font-size:15px}
i.doc{white-space:normal;max-width:520px}
td>i:only-child{font-size:13px}
.line.thin{stroke-width:1.2;opacity:.7}
@media print{
main{padding:0;max-width:none}body{font-size:11pt}section{margin-bottom:24px}
figure,.card,tr,.notice,svg{break-inside:avoid}h2,h3{break-after:avoid}
.scroll{overflow:visible}table{font-size:8.5pt}th,td{padding:4px 5px;white-space:normal}td i{white-space:nowrap}
nav,dialog,.tip,details:not([open]),.sortable thead button::before{display:none!important}
.sortable thead button{text-decoration:none!important}
.zoom{border:0;padding:2px}.shot{width:52px}
img,svg,.key{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

DIALOG = (
    '<dialog aria-labelledby="enlarged"><form method="dialog"><h2 id="enlarged"></h2><button autofocus>Close</button></form>'
    '<div class="shots"></div><p class="said"></p></dialog>'
)
"""Where cards are enlarged, once on a page that has some."""
SCRIPT = """
document.documentElement.classList.add('js');
const value = cell => cell.dataset.by === undefined ? cell.textContent.trim() : Number(cell.dataset.by);
const order = (a, b) => {
  if (typeof a !== typeof b) return typeof a === 'number' ? -1 : 1;
  return typeof a === 'number' ? a - b : a.localeCompare(b, 'en', {numeric: true});
};
for (const button of document.querySelectorAll('.sortable thead button')) button.addEventListener('click', () => {
  const head = button.parentElement, at = head.cellIndex, body = head.closest('table').tBodies[0];
  const down = head.getAttribute('aria-sort') === 'ascending';
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const rows = [...body.rows].sort((a, b) => order(value(a.cells[at]), value(b.cells[at])));
  body.append(...(down ? rows.reverse() : rows));
});
const dialog = document.querySelector('dialog');
for (const button of document.querySelectorAll('.zoom')) button.addEventListener('click', () => {
  const tip = button.nextElementSibling;
  dialog.querySelector('h2').textContent = tip.querySelector('b').textContent;
  dialog.querySelector('.shots').replaceChildren(...[...button.children].map(shot => shot.cloneNode(true)));
  dialog.querySelector('.said').replaceChildren(...[...tip.childNodes].slice(1).map(node => node.cloneNode(true)));
  dialog.showModal();
});
dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
"""
