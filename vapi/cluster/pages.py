"""What the run's graph shows of a step: pages, summaries and numbers, made from the folder that its stage wrote.

Kubeflow shows HTML in a frame of its own and lets no file beside it be read, so a page is whole: pictures are data
URIs. Markdown is shown as text. Numbers are scalars; one that is not finite is left out, since Kubeflow cannot keep it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vapi import card, compare_page, data, images, markup, report

WIDTH = 1120
"""Pixels of a sheet on a page, at most."""


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among some values."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


# --- tokens ------------------------------------------------------------------------------------


def tokens(folder: Path) -> str:
    """Markdown: what the frozen tokenizer made of the subset, and what it keeps of a picture."""
    summary, made = data.read_json(folder / "summary.json"), data.read_json(folder / "provenance.json")
    rows = {
        "images": f"{summary['images']:,}",
        "encoded in this run": f"{made['encoded']:,}; the token cache had {summary['images'] - made['encoded']:,}",
        "codes per image": f"{summary['codes']}",
        "codebook": f"{summary['vocab']:,} codes, {summary['codebook_usage']:.1%} of them in use, perplexity {summary['perplexity']:.0f}",
        "reconstruction": f"{summary['psnr']:.1f} dB, {summary['psnr_lowest']:.1f} dB at worst, of {summary['psnr_images']} images",
        "image size, crop": f"{summary['image_size']} pixels, {summary['crop']}",
        "tokenizer": f"`{summary['tokenizer'][:16]}`",
        "seconds": f"{made['seconds']:.1f}",
    }
    return markdown_table("The subset as tokens", ("", ""), [[name, value] for name, value in rows.items()])


def markdown_table(title: str, head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown page with one table."""
    return f"# {title}\n\n{card.table(head, rows)}\n"


# --- tune --------------------------------------------------------------------------------------


def tuning(folder: Path) -> str:
    """HTML: reward, cross-entropy and entropy over the steps, and the sample sheets from the first to the last."""
    summary, made = data.read_json(folder / "summary.json"), data.read_json(folder / "config.json")
    first, last = summary["holdout"]["first"], summary["holdout"]["last"]
    title = f"{summary['steps']} steps: held-out reward {first['holdout/reward']:.4g} → {last['holdout/reward']:.4g}".replace("-", "−")
    lead = f"Cross-entropy on the true codes {first['holdout/ce']:.4g} → {last['holdout/ce']:.4g} nats, "
    lead += f"entropy {first['holdout/entropy']:.4g} → {last['holdout/entropy']:.4g}; "
    lead += f"{summary['images_seen']:,} images seen, {summary['parameters']:,} parameters."
    sheets = sorted((folder / "sheets").glob("step-*.png"))
    return markup.document(
        title,
        [
            f'<header><p class="eyebrow">vapi · tuning</p><h1>{markup.esc(title)}</h1><p class="lead">{markup.esc(lead)}</p></header>',
            f"<section><h2>While tuning</h2>{report.curve_charts(report.read_curves(folder / 'metrics.jsonl'))}</section>",
            f"<section><h2>Samples</h2>{''.join(map(_sheet, sheets))}<p class='small'>Rows: held-out images, the tokenizer's "
            "reconstructions, draws on real contexts, free-running samples; the same images and random numbers at each step.</p></section>",
            f"<section><h2>Configuration</h2>{markup.facts(made['sections']['tune'])}</section>",
        ],
    )


def _sheet(path: Path) -> str:
    step = int(path.stem.removeprefix("step-"))
    with Image.open(path) as sheet:
        picture = sheet.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    uri = images.data_uri(images.png_bytes(picture))
    return markup.figure(f'<img src="{uri}" alt="samples after step {step}">', f"After step {step}")


def tuning_metrics(folder: Path) -> dict[str, float]:
    """What the held-out images showed before the first step and after the last, and the seconds of a step."""
    holdout, made = data.read_json(folder / "summary.json")["holdout"], data.read_json(folder / "provenance.json")
    named = {
        f"{when}_{name.removeprefix('holdout/')}": value
        for when, look in (("first", holdout["first"]), ("last", holdout["last"]))
        for name, value in look.items()
        if name != "step"
    }
    return scalars(named | {name: made[name] for name in ("seconds_per_step", "seconds", "processes")})


# --- evaluate ----------------------------------------------------------------------------------


def evaluation(folder: Path, tune: str) -> str:
    """HTML: base and tuned on one page, as ``vapi report`` shows a run. ``tune``: the artifact of that stage."""
    return compare_page.evaluated(folder, Path(tune))


def evaluation_metrics(folder: Path) -> dict[str, float]:
    """Base and tuned, and each at its best, by metric: base_fid, tuned_fid, tuned_best_fid."""
    results = data.read_json(folder / "metrics.json")
    return scalars(
        {
            f"{name}_{metric}": value
            for name in report.COMPARED
            for metric, value in results.get(name, {}).items()
            if not metric.endswith("_std")
        }
    )


# --- register ----------------------------------------------------------------------------------


def registration(folder: Path) -> str:
    """Markdown: whether the model entered the registry and where it is, and what each gate said."""
    made = data.read_json(folder / "registration.json")
    return f"{_registered(made)}\n\n{card.gates(made)}\n"


def _registered(made: Mapping[str, Any]) -> str:
    if "version" in made:
        name = f"{made['name']} version {made['version']}"
        if made["registry"].startswith("http"):
            name = f"[{name}]({made['registry'].rstrip('/')}/#/models/{made['name']}/versions/{made['version']})"
        return f"Registered: {name}, {' and '.join(made['aliases'])}."
    if made["passed"]["challenger"]:
        return "Not registered: the gates are passed, but there is no MLflow server (track_uri is empty or off)."
    return "Not promoted: a gate is shut."
