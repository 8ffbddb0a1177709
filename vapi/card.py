"""What a reader must know of a registered model before using it, as Markdown: the model card.

Made from what stages wrote (configurations, digests, metrics.json) and from the gates, and from nothing else; it holds no
date, so the same results make the same text. What was not measured it says as plainly as what was.

Left out: a summary of the licences. The table names each, and who says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vapi import config, data, licences, recipes, report
from vapi.config import ModelConfig, RegisterConfig

FILE = "MODEL_CARD.md"
DESCRIPTION = 5000
"""Characters of a version's description that every store of MLflow's registry takes; PostgreSQL refuses more."""

"""The column of metrics.json in which each detector's score stands."""
OTHERS = {
    "ste": "reward straight through the draws (vapi/baselines.py)",
    "cca": "condition contrastive alignment (arXiv 2410.09347)",
    "ar_grpo": "GRPO on free draws (AR-GRPO, arXiv 2508.06924)",
    "tokenizer": "post-training of the tokenizer's decoder",
}
"""Objectives beside VA-pi, in words."""

Values = Mapping[str, Any]


def card(model: ModelConfig, register: RegisterConfig, tune: Path, evaluate: Path, verdict: Values) -> str:
    """The card of ``tune``'s weights as ``evaluate`` measured them. ``verdict``: the gates as registration.json holds them.

    Raises ValueError if one of the two folders does not say what made it.
    """
    results, summary = data.read_json(evaluate / "metrics.json"), data.read_json(tune / "summary.json")
    tuned, measured = data.read_json(tune / "config.json"), data.read_json(evaluate / "config.json")
    subset = summary.get("subset", {"source": "", "images": 0})  # weights that an earlier version tuned do not say
    sections = {
        "model": config.plain(model),
        "subset": {"source": subset["source"]},
        "tune": tuned["sections"]["tune"],
        "evaluate": measured["sections"]["evaluate"],
        "register": config.plain(register),
    }
    parts = {
        "": f"{report.verdict(results)} {' '.join(report.caveats(results))}",
        "What it is": _origin(model, sections["tune"], tuned["inputs"], summary, subset, results["weights"]["tuned"]),
        "Licences": _licences(sections, model, register, results),
        "Gates": gates(verdict),
        "Measured": _measured(results),
        "Limits": _limits(results, model),
        "Configuration": _configuration(sections),
    }
    title = f"# {register.model_name}\n\n"
    return title + "\n".join(f"## {heading}\n\n{text}\n" if heading else f"{text}\n" for heading, text in parts.items())


def description(text: str, where: str) -> str:
    """A card as a version's description: whole where it fits, else as many whole sections as do; ``where`` the whole one is."""
    if len(text) <= DESCRIPTION:
        return text
    note = f"\n(The rest is in {FILE} of {where}: a registry takes {DESCRIPTION:,} characters.)\n"
    kept = text[: DESCRIPTION - len(note)]
    return kept[: kept.rfind("\n## ")] + note


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)])


# --- its parts ---------------------------------------------------------------------------------


def _origin(model: ModelConfig, tune: Values, inputs: Values, summary: Values, subset: Values, digest: str) -> str:
    asked = "captions" if model.captions else "classes"
    tokenizer = tune.get("objective") == "tokenizer"
    rows = {
        "draws": f"{model.image_size} x {model.image_size} pixels from {asked}; "
        f"{'a tokenizer of ' * tokenizer}{summary['parameters']:,} parameters",
        "weights": f"`{digest}`" + ", a tuned tokenizer's; the generator is the base's" * tokenizer,
        "base": f"{model.generator}, `{inputs['generator']}`",
        "tokenizer": f"{'tuned from ' * tokenizer}{model.tokenizer}, `{inputs['tokenizer']}`",
        "data": f"{subset['source'] or licences.UNKNOWN}, {subset['images'] or licences.UNKNOWN} images, `{inputs['subset']}`",
        "method": f"{_method(tune)}; {summary['steps']} steps, {summary['images_seen']:,} images seen",
    }
    return table(("", ""), list(rows.items())) + "\n\nDigests are sha256. Code, runs and DVC's hashes are in the version's tags."


def _method(tune: Values) -> str:
    """The objective, or the arm of the paper's ablation that a configuration is."""
    if (objective := tune.get("objective", "va_pi")) in OTHERS:  # weights that an earlier version tuned do not say
        return OTHERS[objective]
    arm = "reward and prior" if tune["prior_weight"] else "reward alone"
    return f"VA-pi (arXiv 2512.19680), {arm if tune['policy_weight'] else 'prior alone'}"


def _licences(sections: dict[str, Any], model: ModelConfig, register: RegisterConfig, results: Values) -> str:
    unused = [] if model.captions else [*config.FOR_CAPTIONS]
    unused += [field for reward, fields in config.FOR_REWARDS.items() if not _rewarded(sections["tune"], reward) for field in fields]
    named = {field: str(name) for field, name in config.flat(sections).items() if field not in unused}
    detectors = results.get("prompts", {}).get("detectors", {})
    judges = {each: detectors[column]["base"]["detector"]["licence"] for column, each in config.JUDGES.items() if column in detectors}
    found = licences.licences(named, register.licences, judges)
    rows = [[each.input, each.role, each.name, each.licence, each.source] for each in found]
    unknown = [row[0] for row in rows if row[3] == licences.UNKNOWN]
    note = f"\n\n**Unknown: {', '.join(unknown)}.** Whoever knows says so in `register.licences`." if unknown else ""
    return table(("input", "its part", "name", "licence", "says"), rows) + note


def _rewarded(tune: Values, reward: str) -> bool:
    """Whether a reward had a say in the weights."""
    asked = tune.get("objective", "va_pi") != "cca" and tune["policy_weight"] > 0
    return asked and tune["rewards"].get(reward, 0) > 0


def gates(verdict: Values) -> str:
    """Every gate with its numbers, a table for each alias."""
    parts = []
    for alias, against in verdict["against"].items():
        rows = [[gate["metric"], *report.gate_numbers(gate), "yes" if gate["passed"] else "**no**"] for gate in against["gates"]]
        parts += [f"### {report.gate_title(verdict, alias)}", table(("", *report.GATE.values(), "passed"), rows)]
    return "\n\n".join(parts + [verdict["note"]] * bool(verdict["note"]))


def _measured(results: Values) -> str:
    columns = report.columns_of(results)
    rows = [[title, *(report.cell(scores, column) for column in columns)] for title, scores in report.rows(results).items()]
    return table(("", *(f"{column.title} {'↓' if column.lower else '↑'}" for column in columns)), rows)


def _limits(results: Values, model: ModelConfig) -> str:
    protocol, measured = results["protocol"], report.columns_of(results)
    absent = [column.title for column in report.COLUMNS if column.key not in {one.key for one in measured}]
    lines = [
        f"Measured on {protocol['samples']:,} samples per model and seed against {protocol['reference']['images']:,} real images; "
        "numbers of another protocol do not compare.",
        f"Not measured: {', '.join(absent)}." if absent else "",
        "Nor was looked at: whether training images come back, what bias the data hold, what the model can be misused for. Its pictures "
        "bear no watermark.",
        f"Meant for pictures like those it was tuned on, of {model.image_size} pixels; nothing else was tried.",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _configuration(sections: dict[str, Any]) -> str:
    """What differs from the closest recipe."""
    name = recipes.closest(sections)
    known = {f"{section}.{field}" for section, values in sections.items() for field in values} - {"register.licences"}  # in a table
    found = recipes.changes(recipes.recipe(name), sections)
    changes = {field: pair for field, pair in found.items() if ".".join(field.split(".")[:2]) in known}
    if not changes:
        return f"The recipe `{name}`."
    rows = [[f"`{field}`", *("absent" if value is None else config.scalar(value) for value in pair)] for field, pair in changes.items()]
    return f"The recipe `{name}`, but for\n\n" + table(("field", "recipe", "here"), rows)
