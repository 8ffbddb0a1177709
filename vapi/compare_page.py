"""Runs beside each other as one HTML page (``vapi report``): what a reader asks, in that order.

Is it better, can I see it, in which numbers, did it pass, what did it cost, what was set differently, where did it come from. The page
is made of what runs have kept (``compare.py``) and says so where they have kept nothing; no number is computed that a stage has not
measured.

A run has a letter and a colour. Hollow is before tuning, filled is after. What is the same in several runs (the base that they all
started from) is shown once. Small scripts sort tables and enlarge pictures; both work from the keyboard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vapi import compare, config, markup, report, report_prompts
from vapi.compare import Run
from vapi.config import STAGES
from vapi.markup import Cell, Dot, Line, Point, Shot, card, esc, lanes

log = logging.getLogger("vapi.report")

Scores = Mapping[str, Any]

BUDGET = 1_900_000
"""Bytes of all pictures on a page together; as text they take a third more, and the page stays below 3 MB."""
MISSING = "not recorded"


def page(runs: Sequence[Run]) -> str:
    """The whole page. The first run is the one that others are compared with."""
    how = markup.encoding(list(_pictures(runs)), BUDGET)
    sections = [
        ("seeds", "The same seeds, before and after", _seeds(runs, how)),
        ("heldout", "Held-out images, redrawn", _heldout(runs, how)),
        ("numbers", "The numbers", _each(runs, _numbers)),
        ("gates", "Gates", _gates(runs)),
        ("sampling", "Temperature and guidance", _each(runs, _sweeps)),
        ("prompts", "What was asked for, and what came", _each(runs, partial(_prompts, how=how))),
        ("classes", "By class", _each(runs, _classes)),
        ("curves", "While tuning", _curves(runs)),
        ("tokens", "Tokens in use", _tokens(runs)),
        ("cost", "Cost", _cost(runs)),
        ("config", "What was set differently", _configuration(runs)),
        ("lineage", "Where it comes from", _lineage(runs)),
        ("protocol", "How it was measured", _each(runs, _protocol)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{esc(title)}</a>' for name, title, _ in shown)
    parts = [_header(runs), f'<nav aria-label="On this page">{links}</nav>']
    parts += [f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in shown]
    return markup.document(_title(runs), [*parts, markup.DIALOG], markup.SCRIPT)


def evaluated(evaluate: Path, tune: Path) -> str:
    """The page of a run whose evaluation has just ended. Where it cannot be made, a warning and the smaller page that the stage wrote:
    hours of measuring are not lost for a picture."""
    try:
        return page([compare.of(evaluate, tune)])
    except Exception as error:
        log.warning("the page of %s was not made (%s: %s); the evaluation is whole", evaluate, type(error).__name__, error, exc_info=True)
        return (evaluate / "report.html").read_text()


# --- the head ----------------------------------------------------------------------------------


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return report.verdict(runs[0].results).partition(". ")[0] + "." if runs[0].results else "A run that is not evaluated"
    return _against(runs[0], runs[1]) if len(runs) == 2 else f"{len(runs)} runs beside each other"


def _against(first: Run, other: Run) -> str:
    """What one run is worth beside the first, in a sentence; nothing is said of numbers that do not compare."""
    lacking = [run.name for run in (first, other) if not run.results]
    if lacking:
        return f"{other.name} beside {first.name}: {' and '.join(lacking)} not evaluated"
    if first.protocol != other.protocol:
        return f"{other.name} beside {first.name}: measured by different protocols, which do not compare"
    before, after = first.results["tuned"], other.results["tuned"]
    words = {1: "lower than", 0: "not told apart by more than chance from", -1: "higher than"}[report.direction(before, after, "fid")]
    return f"{other.name}, tuned: FID {markup.distance(after['fid'])}, {words} {first.name}'s {markup.distance(before['fid'])}"


def _header(runs: Sequence[Run]) -> str:
    if len(runs) == 1 and runs[0].results:
        said = [esc(report.verdict(runs[0].results).partition(". ")[2]), esc(" ".join(report.caveats(runs[0].results)))]
    else:
        said = [f"{_letter(run)} {esc(report.verdict(run.results))}" for run in runs if run.results]
        said += [esc(f"{_against(runs[0], run)}.") for run in runs[1:] if len(runs) > 2]
    warned = "".join(f"<li>{esc(words)}</li>" for words in compare.warnings(runs))
    return (
        f'<header><p class="eyebrow">vapi · report of {len(runs)} run{"s" * (len(runs) > 1)}</p><h1>{esc(_title(runs))}</h1>'
        + "".join(f'<p class="verdict">{words}</p>' for words in said)
        + (f'<div class="notice" role="note"><b>Mind</b><ul>{warned}</ul></div>' if warned else "")
        + f"{_who(runs)}</header>"
    )


def _who(runs: Sequence[Run]) -> str:
    items = "".join(f"<li>{_letter(run) if len(runs) > 1 else ''} <span>{esc(run.place)}</span></li>" for run in runs if run.place)
    return f'<ul class="who">{items}</ul><p class="small">Hollow, or dashed: before tuning. Filled: after.</p>'


def _colour(run: Run) -> str:
    return f"run{ord(run.name) - ord('A')}"


def _letter(run: Run) -> str:
    return f'<b class="letter {_colour(run)}">{esc(run.name)}</b>'


def _each(runs: Sequence[Run], section: Callable[[Sequence[Run]], str]) -> str:
    """A section for each group of runs that share a protocol, so that no number stands beside one that it does not compare with."""
    return _apart("Protocol", compare.by_protocol(runs), section)


def _apart(what: str, groups: Sequence[Sequence[Run]], section: Callable[[Sequence[Run]], str]) -> str:
    """A section for each group of runs, under their letters where there are several."""
    bodies = [section(group) for group in groups]
    if len(groups) == 1:
        return bodies[0]
    titles = [f"{what} of {', '.join(run.name for run in group)}" for group in groups]
    return "".join(f"<h3>{esc(title)}</h3>{body}" for title, body in zip(titles, bodies) if body)


# --- one thing, seen once ----------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Something of one run, or the same of several."""

    runs: Sequence[Run]
    model: str  # base or tuned, or a row of the table
    value: Any
    shared: bool  # by all that are compared

    @property
    def words(self) -> str:
        """The model and how it was sampled."""
        model, _, how = self.model.partition("_")
        return f"{model}{' at its best' if how == 'best' else f' {how}' if how else ''}"

    @property
    def title(self) -> str:
        """The same, with the letters of the runs, unless it is of all of them."""
        return self.words if self.shared else f"{','.join(run.name for run in self.runs)} {self.words}"

    @property
    def kind(self) -> str:
        """Its CSS class: a run's colour, or grey."""
        return "base" if self.shared and self.before else _colour(self.runs[0])

    @property
    def before(self) -> bool:
        """Whether it is of a model that was not tuned."""
        return self.model.startswith("base")


def _once(runs: Sequence[Run], model: str, values: Sequence[Any], same: Callable[[Any, Any], bool]) -> list[Seen]:
    """What runs have, equal things together; None, which is nothing, left out."""
    groups: list[tuple[list[Run], Any]] = []
    for run, value in ((run, value) for run, value in zip(runs, values, strict=True) if value is not None):
        own = next((own for own, other in groups if same(value, other)), None)
        if own is None:
            groups.append(([run], value))
        else:
            own.append(run)
    return [Seen(own, model, value, len(own) == len(runs)) for own, value in groups]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def _both(runs: Sequence[Run], get: Callable[[Run, str], Any], same: Callable[[Any, Any], bool] = _equal) -> list[Seen]:
    """What runs have of base, then of tuned, by run and model."""
    return [one for model in ("base", "tuned") for one in _once(runs, model, [get(run, model) for run in runs], same)]


# --- pictures ----------------------------------------------------------------------------------


def _pictures(runs: Sequence[Run]) -> Iterable[np.ndarray]:
    """All pictures that the page shows, to find out how small they must be."""
    for group in compare.by_subjects(runs):
        for setting in compare.SIDES:
            yield from (one for seen in _sampled(group, setting) for one in seen.value)
    for group in compare.by_images(runs):
        sets = [*_originals(group), *(seen.value.pictures["draw"] for seen in _drawn(group))]
        yield from (one for pictures in sets for one in pictures)
    for group in compare.by_protocol(runs):
        yield from (one for seen in _answered(group) for strip in seen.value for one in strip)


def _sampled(runs: Sequence[Run], setting: str) -> list[Seen]:
    """Samples of some seeds, uint8 (N, H, W, 3), as many as all have."""
    sheets = [run.samples(setting) for run in runs]
    count = min((len(pictures) for sheet in sheets for pictures in sheet.values()), default=0)
    by_run = {run.name: sheet for run, sheet in zip(runs, sheets, strict=True) if sheet}
    drawn = [run for run in runs if run.name in by_run]
    return _both(drawn, lambda run, model: by_run[run.name][model][:count], np.array_equal)


def _originals(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images and the tokenizer's reconstructions of them, uint8 (B, H, W, 3): the same in all of these runs."""
    pictures = runs[0].looks[0].pictures
    return pictures["real"], pictures["reconstruction"]


def _drawn(runs: Sequence[Run]) -> list[Seen]:
    """What is drawn of the held-out images before tuning and after."""
    when = {"base": 0, "tuned": 1}
    return _both(runs, lambda run, model: run.looks[when[model]], compare.Looked.draws_like)


def _answered(runs: Sequence[Run]) -> list[Seen]:
    """Pictures for prompts, uint8 (K, I, H, W, 3)."""
    return _both([run for run in runs if run.answers], lambda run, model: run.answers[model], np.array_equal)


def _seeds(runs: Sequence[Run], how: tuple[int, int]) -> str:
    groups = compare.by_subjects(runs)
    if not groups:
        return ""
    plain, best = (_apart("Samples", groups, partial(_grid, setting=setting, how=how)) for setting in compare.SIDES)
    note = (
        "The same random numbers and subjects side by side, nothing selected. Press a picture to enlarge it. These are drawn freely: there "
    )
    note += "is no image to hold them against, hence no reward."
    more = f"<details><summary>The same, each model at its best temperature and guidance</summary>{best}</details>" if best else ""
    return f"{plain}<p class='small'>{note}</p>{more}"


def _grid(runs: Sequence[Run], setting: str, how: tuple[int, int]) -> str:
    seen = _sampled(runs, setting)
    if not seen:
        return ""
    first, cards = seen[0].runs[0], []
    seed = first.made["evaluate"]["sections"]["evaluate"]["seeds"][0]
    for n in range(len(seen[0].value)):
        shots = [Shot(one.value[n], one.title, one.kind) for one in seen]
        cards.append(card(shots, f"seed {seed}, image {n}{_class_of(first, n)}", "", f"{setting}-{first.name}-{n}", how))
    return f'<div class="cards">{"".join(cards)}</div>'


def _class_of(run: Run, number: int) -> str:
    """Which class an image shows, where that follows from its number."""
    balanced = run.made["evaluate"]["sections"]["evaluate"]["labels"] == "balanced"
    return f", class {number % len(run.classes)}" if balanced and run.classes else ""


def _heldout(runs: Sequence[Run], how: tuple[int, int]) -> str:
    grids = _apart("Images", compare.by_images(runs), partial(_redrawn, how=how))
    if not grids:
        return ""
    note = "Images that were kept out of tuning, drawn anew code by code, each from the true codes before it, with the same random numbers "
    note += "before and after. Their rewards, in all and by part, show on hover and focus: nearer to 0 is better."
    return f"{grids}<p class='small'>{note}</p>"


def _redrawn(runs: Sequence[Run], how: tuple[int, int]) -> str:
    real, reconstruction = _originals(runs)
    seen, cards = _drawn(runs), []
    for i, key in enumerate(runs[0].looks[0].keys):
        shots = [Shot(real[i], "real"), Shot(reconstruction[i], "tokenizer's")]
        shots += [Shot(one.value.pictures["draw"][i], one.title, one.kind) for one in seen]
        rows = [f"{esc(one.title)}, step {one.value.step}: {_reward(one, i)}" for one in seen]
        cards.append(card(shots, key, "".join(f"<br>{row}" for row in rows), f"heldout-{runs[0].name}-{i}", how))
    return f'<div class="cards">{"".join(cards)}</div>'


def _reward(one: Seen, image: int) -> str:
    """The reward of a draw as the sum that it is."""
    values = {name: of[image] for name, of in one.value.rewards.items()}
    weights = one.value.weights
    parts = " + ".join(f"{weights[name]:g} × {name} {_short(value)}" for name, value in values.items() if name != "reward")
    return f"reward {_short(values['reward'])} = {esc(parts)}"


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


# --- numbers -----------------------------------------------------------------------------------


def _rows(runs: Sequence[Run]) -> list[Seen]:
    """Every model and setting that was measured: base, tuned, then guided, then at their best."""
    return [one for name in report.COMPARED for one in _once(runs, name, [run.results.get(name) for run in runs], _equal)]


def _numbers(runs: Sequence[Run]) -> str:
    results = [run.results for run in runs]
    columns = list({column.key: column for found in results for column in report.columns_of(found)}.values())
    head = ["model", *(f"{esc(column.title)}&nbsp;{report.arrow(column)}" for column in columns)]
    rows = [(_row_title(one), [_number_cell(one, column) for column in columns]) for one in _rows(runs)]
    for anchor, title in (("reconstruction", "tokenizer reconstructions"), ("real", "real images")):
        for one in _once(runs, anchor, [found["anchors"][anchor] for found in results], _equal):
            rows.append((esc(title), [Cell(report.html_cell(one.value, column), one.value.get(column.key)) for column in columns]))
    note = report.table_note(results[0])
    charts = f'<div class="two"><figure>{_spread(runs, "fid", "FID, lower is better")}</figure>'
    charts += f"<figure>{_spread(runs, 'inception_score', 'Inception Score, higher is better')}</figure></div>"
    plane = f"<figure>{_plane(runs)}</figure>"
    gaps = f"<figure>{_exposure(runs)}</figure>"
    return (
        f"{markup.table('Metrics of every model and setting', head, rows)}<p class='small'>{esc(note)}</p>"
        f"<h3>FID and Inception Score, with the standard deviation over seeds</h3>{charts}"
        f'<div class="two"><div><h3>Precision against recall</h3>{plane}</div>'
        f"<div><h3>Exposure bias: FID on true codes, and running free</h3>{gaps}</div></div>"
    )


def _row_title(one: Seen) -> str:
    setting = ""
    if "temperature" in one.value:
        setting = f"temperature {one.value['temperature']:g}"
        setting += f", guidance {one.value['guidance']:g}" if one.value["guidance"] != 1 else ""
    letters = "" if one.shared else "".join(_letter(run) for run in one.runs)
    return f"{letters}{esc(one.words)}" + (f"<i>{esc(setting)}</i>" if setting else "")


def _number_cell(one: Seen, column: report.Column) -> Cell:
    base = one.runs[0].results.get(one.model.replace("tuned", "base", 1))
    better = not one.before and report.better(one.value, base, column)
    return Cell(report.html_cell(one.value, column), one.value.get(column.key), "win" if better else "")


def _spread(runs: Sequence[Run], key: str, name: str) -> str:
    rows = []
    for one in _rows(runs):
        value, spread = one.value[key], one.value.get(f"{key}_std")
        words = f"{value:.4g}" + (f" ± {spread:.2g}" if spread else "")
        rows.append((one.title, [Dot(value, words, one.kind, one.before, spread or 0.0)]))
    return lanes(name, rows)


def _exposure(runs: Sequence[Run]) -> str:
    rows = []
    for one in _both(runs, lambda run, model: run.results["exposure"][model]):
        forced, free = one.value["fid_teacher_forced"], one.value["fid_free_running"]
        dots = [Dot(forced, f"on true codes {markup.distance(forced)}", one.kind, True)]
        rows.append((one.title, [*dots, Dot(free, f"running free {markup.distance(free)}", one.kind)]))
    return lanes("FID against the validation images; hollow: codes drawn from true contexts, filled: running free", rows)


def _plane(runs: Sequence[Run]) -> str:
    points = []
    for one in _rows(runs):
        for run in one.runs:  # a base that several share is drawn for each, since each has a path of its own from there
            off = (one.value.get("recall_std") or 0.0, one.value.get("precision_std") or 0.0)
            path = f"{run.name}{one.model.partition('_')[2]}"
            place = (one.value["recall"], one.value["precision"])
            points.append(Point(one.title, *place, one.kind, one.before, "_" in one.model, off, path))
    keys = {point.title: f"{point.kind} {'ring' if point.hollow else 'disc'}" for point in points if not point.small}
    return markup.plane(points, "recall", "precision") + markup.legend([*keys.items(), ("small: at their best", "none")])


# --- gates -------------------------------------------------------------------------------------


def _gates(runs: Sequence[Run]) -> str:
    """What the stage register decided about each run that it saw, gate by gate."""
    parts = "".join(_judged(run, _letter(run) if len(runs) > 1 else "") for run in runs if run.registration)
    note = "Limit: where a gate shuts. Margin: how far inside of it the tuned model is; below 0 the gate is shut."
    return f"{parts}<p class='small'>{note}</p>" if parts else ""


def _judged(run: Run, letter: str) -> str:
    judged, tables = run.registration, []
    for alias, against in judged["against"].items():
        rows = [(esc(gate["metric"]), _gate_cells(gate)) for gate in against["gates"]]
        table = markup.table(f"Gates of {run.name}, {alias}", ["metric", *report.GATE.values(), "passed"], rows)
        tables.append(f"<h3>{letter}{esc(report.gate_title(judged, alias))}</h3>{table}")
    made = (
        f"Registered as version {judged['version']} of {judged['name']}, {' and '.join(judged['aliases'])}." if "version" in judged else ""
    )
    said = f"<p>{letter}{esc(made or 'Not registered.')} {esc(judged['note'])}</p>"
    return said + "".join(tables)


def _gate_cells(gate: Scores) -> list[Cell]:
    numbers = zip(report.gate_numbers(gate), (gate[name] for name in report.GATE), strict=True)
    cells = [Cell(esc(words.replace("-", "−")), value) for words, value in numbers]
    return [*cells, Cell("yes", 1) if gate["passed"] else Cell("<b>no</b>", 0)]


# --- sweeps ------------------------------------------------------------------------------------


def _points(run: Run, model: str) -> list[Scores]:
    return [{name: value for name, value in point.items() if name != "model"} for point in run.results["sweep"] if point["model"] == model]


def _sweeps(runs: Sequence[Run]) -> str:
    seen = _both(runs, _points)
    guidances, temperatures = (sorted({point[name] for one in seen for point in one.value}) for name in ("guidance", "temperature"))
    charts = [_swept(seen, "temperature", f"temperature, at guidance {value:g}", value) for value in guidances]
    if len(guidances) > 1:
        at = "each at its best temperature" if len(temperatures) > 1 else f"at temperature {temperatures[0]:g}"
        charts.append(_swept(seen, "guidance", f"guidance, {at}"))
    head = ["model", "temperature", "guidance", "FID", "Inception Score", "precision", "recall"]
    keys = ("temperature", "guidance", "fid", "inception_score", "precision", "recall")
    rows = [(esc(one.title), [Cell(f"{point[key]:.4g}", point[key]) for key in keys]) for one in seen for point in one.value]
    samples = runs[0].results["protocol"]["sweep"]["samples"]
    note = f"{samples:,} samples per point against the validation images, so numbers differ from the table's; the best were chosen here."
    table = f"<details><summary>All {len(rows)} points</summary>{markup.table('Sweep', head, rows)}</details>"
    return f'<div class="two">{"".join(charts)}</div><p class="small">{note}</p>{table}'


def _swept(seen: Sequence[Seen], over: str, title: str, guidance: float | None = None) -> str:
    """FID over temperature at one guidance, or over guidance."""
    lines = []
    for one in seen:
        best: dict[float, float] = {}
        for point in one.value:
            if guidance in (None, point["guidance"]):
                best[point[over]] = min(point["fid"], best.get(point[over], point["fid"]))
        if best:
            lines.append(Line(one.title, sorted(best.items()), f"{one.kind} {'dash1' * one.before}"))
    return f"<figure>{markup.chart(lines, title, 'FID, validation (log)', log=True)}</figure>"


# --- prompts -----------------------------------------------------------------------------------


def _prompts(runs: Sequence[Run], how: tuple[int, int]) -> str:
    asked = [run for run in runs if "prompts" in run.results]
    if not asked:
        return ""
    detectors = asked[0].results["prompts"]["detectors"]
    notes = "".join(f"{_letter(run) if len(asked) > 1 else ''}{report_prompts.notes(run.results['prompts'])}" for run in asked)
    return "".join(_tasks(asked, name) for name in detectors) + notes + _answers(asked, how)


def _tasks(runs: Sequence[Run], detector: str) -> str:
    judged = [run.results["prompts"]["detectors"][detector] for run in runs]
    seen = _both(runs, lambda run, model: run.results["prompts"]["detectors"][detector][model])
    tasks = [task for task in report_prompts.TITLES if task == "overall" or task in judged[0]["base"]["tasks"]]
    lane_rows, rows = [], []
    for task in tasks:
        scores = [_task(one.value, task) for one in seen]
        dots = [_task_dot(one, *score) for one, score in zip(seen, scores, strict=True)]
        lane_rows.append((report_prompts.TITLES[task], dots))
        cells = [_task_cell(*score) for score in scores]
        for found in judged:
            row = found["difference"]["tuned"][task]
            text = f"<span>{row['difference']:+.3f}</span><i>{row['low']:+.3f} to {row['high']:+.3f}</i>".replace("-", "−")
            cells.append(Cell(text, row["difference"], "win" if row["low"] > 0 else ""))
        rows.append((esc(report_prompts.TITLES[task]), cells))
    head = ["task", *(esc(one.title) for one in seen), *(_head(runs, run, "tuned − base, 95 %") for run in runs)]
    title = judged[0]["base"]["title"]
    partial = "; ".join(judged[0]["base"]["partial"])
    chart = lanes("Share of pictures that are as asked, with the standard error", lane_rows, (0.0, 1.0))
    return (
        f"<h3>{esc(title)} by task{f' (PARTIAL: {esc(partial)})' if partial else ''}</h3>"
        f"<figure>{chart}{_keys(seen)}</figure>{markup.table(f'{title} by task', head, rows)}"
    )


def _task(found: Scores, task: str) -> tuple[float, float | None]:
    """A score and its standard error; None where a task has one prompt, of which no spread is known."""
    if task == "overall":
        return found["overall"], found["standard_error"]
    return found["tasks"][task]["score"], found["tasks"][task]["standard_error"]


def _task_cell(value: float, error: float | None) -> Cell:
    return Cell(f"<span>{value:.3f}</span>" + ("" if error is None else f"<i>S.E. {error:.3f}</i>"), value)


def _task_dot(one: Seen, value: float, error: float | None) -> Dot:
    return Dot(value, f"{one.title} {value:.3f}" + (f" ± {error:.3f}" if error else ""), one.kind, one.before, error or 0.0)


def _keys(seen: Iterable[Seen]) -> str:
    return markup.legend((one.title, f"{one.kind} {'ring' if one.before else 'disc'}") for one in seen)


def _answers(runs: Sequence[Run], how: tuple[int, int]) -> str:
    seen = _answered(runs)
    if not seen:
        return ""
    first, cards = seen[0].runs[0], []
    for n, asked in enumerate(first.prompts):
        shots = [Shot(np.concatenate(list(one.value[n]), axis=1), one.title, one.kind) for one in seen]
        shares = [f"{esc(one.title)}: {_share(one, n)}" for one in seen]
        tip = "".join(f"<br>{words}" for words in shares)
        cards.append(card(shots, asked["prompt"], tip, f"prompt-{first.name}-{n}", (len(seen[0].value[n]) * how[0], how[1])))
    note = "The first prompts of each task, nothing selected; the same random numbers everywhere. Numbers: the first judge's, of all seeds."
    return f'<h3>Some prompts</h3><div class="cards asked">{"".join(cards)}</div><p class="small">{note}</p>'


def _share(one: Seen, prompt: int) -> str:
    """What the first judge says of a prompt's pictures."""
    judged = one.runs[0].results["prompts"]
    first = next(iter({**judged["detectors"], **judged["metrics"]}))
    value = float(one.runs[0].prompts[prompt][f"{one.model}/{first}"])
    return f"{value:.0%} right" if first in judged["detectors"] else f"{esc(first)} {value:.3f}"


# --- classes -----------------------------------------------------------------------------------


def _classes(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.classes]
    if not known:
        return ""
    seen = _both(known, lambda run, model: {row["class"]: row[model] for row in run.classes})
    names = [int(row["class"]) for row in known[0].classes]
    head = ["class", "samples", *(esc(one.title) for one in seen), *(_head(known, run, "change") for run in known)]
    rows = []
    for n, name in enumerate(names):
        counts = known[0].classes[n]["samples"]
        cells = [Cell(f"{counts:,.0f}", counts), *(Cell(f"{one.value[name]:.1%}", one.value[name]) for one in seen)]
        for run in known:
            change = run.classes[n]["tuned"] - run.classes[n]["base"]
            cells.append(Cell(f"{100 * change:+.1f}".replace("-", "−"), change))
        rows.append((str(name), cells))
    chart = ""
    if len(names) <= 20:
        dots = [(f"class {name}", [_class_dot(one, one.value[name]) for one in seen]) for name in names]
        chart = f"<figure>{lanes('Share of samples that the metric network takes for their class', dots, left=70)}{_keys(seen)}</figure>"
    note = "Share of each class's samples that the metric network takes for it, plain comparison, all seeds; changes in percentage points."
    table = markup.table("Recognised samples by class", head, rows)
    both = f'<div class="two">{chart}<div>{table}</div></div>' if len(known) == 1 else f'{chart}<div class="below">{table}</div>'
    return f'{both}<p class="small">{note}</p>'


def _class_dot(one: Seen, share: float) -> Dot:
    return Dot(share, f"{one.title} {share:.1%}", one.kind, one.before)


def _head(runs: Sequence[Run], run: Run, title: str) -> str:
    """The head of a column about one run."""
    return f"{run.name}: {title}" if len(runs) > 1 else title


# --- while tuning ------------------------------------------------------------------------------

CURVES = report.CURVES | {"kl": "KL from the base, nats per code", "perplexity": "codes in use (perplexity)"}


def _curves(runs: Sequence[Run]) -> str:
    parts = sorted({name.partition("/")[2] for run in runs for row in run.curves for name in row if "/reward_" in name} - {"reward_std"})
    titles = CURVES | {part: f"{part.removeprefix('reward_')}, unweighted" for part in parts}
    figures = "".join(f"<figure>{chart}</figure>" for chart in (_curve(runs, key, title) for key, title in titles.items()) if chart)
    return f'<div class="three">{figures}</div><p class="small">Thin: the batches. Dots: the held-out images.</p>' if figures else ""


def _curve(runs: Sequence[Run], key: str, title: str) -> str:
    lines = []
    for run in runs:
        for prefix, name, kind in (("tune", "batches", "faint "), ("holdout", "held out", "")):
            points = [(row["step"], row[f"{prefix}/{key}"]) for row in run.curves if f"{prefix}/{key}" in row]
            if points:
                lines.append(
                    Line(f"{run.name} {name}" if len(runs) > 1 else name, points, f"{kind}{_colour(run)}", dots=prefix == "holdout")
                )
    return markup.chart(lines, "step", title, width=380, height=250) if lines else ""


# --- tables whose columns are runs -------------------------------------------------------------


def _columns(name: str, runs: Sequence[Run], rows: Mapping[str, Sequence[Cell]], first: str, kind: str = "", same: bool = False) -> str:
    """A table with a column for each run; ``same``: and one that says whether they agree."""
    agree = same and len(runs) > 1
    head = [first, *(map(_letter, runs) if len(runs) > 1 else ["this run"]), *(["same"] if agree else [])]
    body = [(title, [*cells, *([_agreement(cells)] if agree else [])]) for title, cells in rows.items()]
    return markup.table(name, head, body, kind)


def _agreement(cells: Sequence[Cell]) -> Cell:
    known = [cell.shown for cell in cells]
    if any(MISSING in text for text in known):
        return Cell("–", 2)
    return Cell("yes", 1) if len(set(known)) == 1 else Cell("<b>no</b>", 0)


def _missing(value: Any, show: Callable[[Any], str]) -> Cell:
    """A number as a cell, or the words that there is none."""
    return Cell(f"<i>{MISSING}</i>") if value is None else Cell(esc(show(value)), value if isinstance(value, (int, float)) else None)


def _tokens(runs: Sequence[Run]) -> str:
    if not any(run.tokens or run.summary for run in runs):
        return ""

    def held(run: Run, when: str, name: str) -> Any:
        return run.summary.get("holdout", {}).get(when, {}).get(f"holdout/{name}")

    sources: dict[str, tuple[Callable[[Run], Any], Callable[[Any], str]]] = {
        "codebook": (lambda run: run.tokens.get("vocab"), lambda v: f"{v:,} codes"),
        "codes per image": (lambda run: run.tokens.get("codes"), lambda v: f"{v:,}"),
        "real images: share of the codebook in use": (lambda run: run.tokens.get("codebook_usage"), lambda v: f"{v:.1%}"),
        "real images: perplexity of the codes": (lambda run: run.tokens.get("perplexity"), lambda v: f"{v:,.0f}"),
        "held-out draws before: share in use": (lambda run: held(run, "first", "codes_used"), lambda v: f"{v:.1%}"),
        "held-out draws after: share in use": (lambda run: held(run, "last", "codes_used"), lambda v: f"{v:.1%}"),
        "held-out draws before: perplexity": (lambda run: held(run, "first", "perplexity"), lambda v: f"{v:,.0f}"),
        "held-out draws after: perplexity": (lambda run: held(run, "last", "perplexity"), lambda v: f"{v:,.0f}"),
        "tokenizer's reconstructions": (lambda run: run.tokens.get("psnr"), lambda v: f"{v:.1f} dB"),
        "captions longer than the generator reads": (lambda run: run.summary.get("captions_cut"), lambda v: f"{v:,}"),
    }
    rows = {title: [_missing(get(run), show) for run in runs] for title, (get, show) in sources.items()}
    note = "Perplexity is how many codes would be in use if all were used alike; one that falls while tuning is a model that narrows. "
    note += "Held-out draws are fewer than the real images, so hold before against after, not against these."
    return f'{_columns("Tokens in use", runs, rows, "tokens")}<p class="small">{note}</p>'


def _cost(runs: Sequence[Run]) -> str:
    stages = [stage for stage in STAGES if any(run.told.get(stage) for run in runs)]
    if not stages:
        return ""

    def told(stage: str, name: str) -> Callable[[Run], Any]:
        return lambda run: run.told.get(stage, {}).get(name)

    def per_second(run: Run) -> float | None:
        seconds, images = told("tune", "seconds_per_step")(run), run.settings.get("tune.images_per_step")
        return images / seconds if seconds and images else None

    def of_steps(run: Run) -> float | None:
        steps, whole = told("tune", "seconds_in_own_steps")(run), told("tune", "seconds")(run)
        return steps / whole if steps is not None and whole else None

    def card_seconds(run: Run) -> float | None:
        spent = [run.told.get(stage, {}) for stage in ("tune", "evaluate")]
        if not all("device" in one for one in spent):
            return None
        return sum(one["seconds"] * one["processes"] for one in spent if one["device"] != "cpu")

    sources: dict[str, tuple[Callable[[Run], Any], Callable[[Any], str]]] = {
        "device": (told("tune", "device"), str),
        "processes": (told("tune", "processes"), lambda v: f"{v:,}"),
        "GPU-seconds, tune and evaluate": (card_seconds, lambda v: f"{v:,.0f}" if v else "0 (no GPU)"),
        "seconds per step (median)": (told("tune", "seconds_per_step"), lambda v: f"{v:.3g}"),
        "images per second while tuning": (per_second, lambda v: f"{v:.3g}"),
        "share of tune's time that steps took": (of_steps, lambda v: f"{v:.0%}"),
        **{f"{stage}: seconds": (told(stage, "seconds"), lambda v: f"{v:,.1f}") for stage in stages},
    }
    rows = {title: [_missing(get(run), show) for run in runs] for title, (get, show) in sources.items()}
    note = "Seconds are those of the process that ended the stage; what was cached or resumed from before is not in them."
    return f'{_columns("Cost", runs, rows, "measure")}<p class="small">{note}</p>'


def _configuration(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    known = [run.settings for run in runs]
    shared = set.intersection(*({name.partition(".")[0] for name in settings} for settings in known))
    names = [name for name in dict.fromkeys(name for settings in known for name in settings) if name.partition(".")[0] in shared]
    found = {name: [_setting(settings, name) for settings in known] for name in names}
    told = {name: [value for value in values if value is not None] for name, values in found.items()}
    differ = {name: values for name, values in found.items() if any(value != told[name][0] for value in told[name])}
    untold = [name for name, values in found.items() if name not in differ and None in values]
    docs = _docs()
    rows = {
        f"{esc(name)}<i class='doc'>{esc(docs.get('.'.join(name.split('.')[:2]), ''))}</i>": [_setting_cell(value) for value in values]
        for name, values in differ.items()
    }
    body = _columns("Configuration", runs, rows, "field", "words") if rows else "<p>Nothing, as far as it was written down.</p>"
    note = f"{len(found) - len(differ) - len(untold)} other fields are the same, of the sections that all runs have come to "
    note += f"({', '.join(sorted(shared))})."
    note += f" Not recorded by every run, which may be of another version: {', '.join(untold)}." if untold else ""
    return f'{body}<p class="small">{esc(note)}</p>'


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    """What a run has for a field, or for an entry of a field that holds several: empty where it was left so, None where the run does not
    say, because its version did not have the field."""
    if name in settings:
        return "" if settings[name] in ("", [], {}) else settings[name]
    field = ".".join(name.split(".")[:2])
    return "" if any(f"{other}.".startswith(f"{field}.") for other in settings) else None


def _setting_cell(value: Any) -> Cell:
    if value is None:
        return Cell(f"<i>{MISSING}</i>")
    return Cell(esc(config.scalar(value)), value if _is_number(value) else None) if value != "" else Cell("<i>not set</i>")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _docs() -> dict[str, str]:
    """What config.py says of each field."""
    whole = config.Config()
    docs = {section: config.field_docs(type(getattr(whole, section))) for section in config.plain(whole)}
    return {f"{section}.{name}": doc for section, fields in docs.items() for name, doc in fields.items()}


def _lineage(runs: Sequence[Run]) -> str:
    columns = [_lineage_of(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {esc(name): [_digest_cell(column.get(name)) for column in columns] for name in names}
    return _columns("Lineage", runs, rows, "what", "words", same=True) if rows else ""


def _lineage_of(run: Run) -> dict[str, str]:
    """Digests of data, weights and code, by what they are of."""
    stages = [stage for stage in STAGES if stage in run.folders]
    found = {f"{stage}: {name}": digest for stage in stages for name, digest in run.made[stage].get("inputs", {}).items() if digest}
    found |= {f"weights: {name}": value for name, value in run.results.get("weights", {}).items()}
    codes = {stage: run.told[stage]["code"] for stage in stages if "code" in run.told[stage]}
    alike = len({str(code) for code in codes.values()}) == 1
    for stage, code in codes.items():
        found |= {f"code{'' if alike else f' of {stage}'}: {name}": value for name, value in code.items()}
    return found


def _digest_cell(value: str | None) -> Cell:
    return Cell(f"<i>{MISSING}</i>" if value is None else markup.digest(value))


def _protocol(runs: Sequence[Run]) -> str:
    return markup.facts(runs[0].results["protocol"])
