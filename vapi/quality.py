"""What the images of a subset must satisfy, checked with Great Expectations, reported on one page of our own.

Great Expectations does the checking; its Data Docs stay out: they need a CDN to look like anything
and carry timestamps. ``quality.json`` and ``quality.html`` hold the same verdicts, are the same to
the bit for the same images, and the page needs no other file. Everything that came with the data
(keys, captions, reasons) is escaped.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from vapi import images
from vapi.config import SubsetConfig

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

SHOWN = 10
"""Offending rows that a message or the report names."""


@dataclass(frozen=True)
class Check:
    """One expectation and what came of it."""

    about: str  # what a row is: an image, an examined image, a class
    says: str
    expectation: str
    passed: bool
    offenders: int
    shown: list[str]  # the first of them, "key: value"


# --- checks ------------------------------------------------------------------------------------


def validate(manifest: pd.DataFrame, rejected: Sequence[tuple[str, str, bool]], config: SubsetConfig) -> list[Check]:
    """Check a manifest, the entries that were rejected on the way (key, reason, readable), and the balance of classes."""
    import great_expectations as gx

    expect: Any = gx.expectations
    table = manifest.assign(short_side=manifest[["width", "height"]].min(axis=1))
    examined = pd.DataFrame(
        {
            "key": [*manifest["key"], *(key for key, _, _ in rejected)],
            "readable": [True] * len(manifest) + [readable for _, _, readable in rejected],
        }
    )
    lowest, highest = (0, config.classes - 1) if config.classes else (-1, -1)
    unique = [
        ("keys are unique", expect.ExpectColumnValuesToBeUnique(column="key")),
        ("no two images have the same bytes (sha256)", expect.ExpectColumnValuesToBeUnique(column="sha256")),
    ]
    values = [
        (
            f"labels lie in {lowest} .. {highest}" if config.classes else "there are no labels (-1)",
            expect.ExpectColumnValuesToBeBetween(column="label", min_value=lowest, max_value=highest),
        ),
        (
            f"the shorter side has at least {config.min_size} pixels",
            expect.ExpectColumnValuesToBeBetween(column="short_side", min_value=config.min_size),
        ),
    ]
    nulls = [(f"{name} is never null", expect.ExpectColumnValuesToNotBeNull(column=name)) for name in manifest.columns]
    readable = (
        f"at most {config.max_unreadable:.1%} of the examined images are unreadable",
        # a hair below: 1 - 0.01 is not quite 99 / 100
        expect.ExpectColumnValuesToBeInSet(column="readable", value_set=[True], mostly=max(0.0, 1 - config.max_unreadable - 1e-9)),
    )
    checks = [*_run("image", table, "key", [*unique, *values, *nulls]), *_run("examined image", examined, "key", [readable])]
    return [*checks, *_balance(manifest, config)] if config.classes else checks


def _balance(manifest: pd.DataFrame, config: SubsetConfig) -> list[Check]:
    import great_expectations as gx

    expect: Any = gx.expectations
    if config.max_imbalance == 0:
        return []
    counts = class_counts(manifest, config)
    least = int(max(counts) / config.max_imbalance)  # rounded down: 1,500 images of 1,000 classes are as balanced as can be
    frame = pd.DataFrame({"class": range(len(counts)), "images": counts})
    says = f"every class has at least {least} images (the largest has {max(counts)}; at most {config.max_imbalance:g} to 1)"
    return _run("class", frame, "class", [(says, expect.ExpectColumnValuesToBeBetween(column="images", min_value=least))])


def class_counts(manifest: pd.DataFrame, config: SubsetConfig) -> list[int]:
    """Images per class, from class 0 on."""
    labels = manifest["label"].to_numpy()
    return np.bincount(labels[(labels >= 0) & (labels < config.classes)], minlength=config.classes).tolist()


def _run(about: str, frame: pd.DataFrame, index: str, expectations: Sequence[tuple[str, Expectation]]) -> list[Check]:
    """Validate one frame; ``index`` is the column that names a row."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # versions before 1.24 report home
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults, ProgressBarsConfig

    stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)  # or every context leaves a folder in /tmp
    context = gx.get_context(mode="ephemeral", project_config=DataContextConfig(store_backend_defaults=stores))
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = context.data_sources.add_pandas("memory").add_dataframe_asset("frame").add_batch_definition_whole_dataframe("whole")
    suite = context.suites.add(gx.ExpectationSuite(name="suite", expectations=[expectation for _, expectation in expectations]))
    definition = gx.ValidationDefinition(name="validation", data=batch, suite=suite)
    context.validation_definitions.add(definition)
    result = definition.run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [index]},
    )
    # in the order of our list: Great Expectations groups results by column
    by_id = {found.expectation_config.id: found for found in result.results if found.expectation_config}
    return [
        _check(about, says, by_id[expectation.id], index) for (says, _), expectation in zip(expectations, suite.expectations, strict=True)
    ]


def _check(about: str, says: str, found: Any, index: str) -> Check:
    assert not found.exception_info.get("raised_exception"), found.exception_info  # our own frame: no column can be missing
    rows = found.result.get("unexpected_index_list") or []
    shown = [", ".join(f"{value}" for value in (row[index], *(v for k, v in row.items() if k != index))) for row in rows[:SHOWN]]
    return Check(about, says, found.expectation_config.type, bool(found.success), len(rows), shown)


def require(checks: Sequence[Check]) -> None:
    """Raises ValueError that names the rows of every failed check."""
    failed = [check for check in checks if not check.passed]
    if failed:
        raise ValueError("the images do not pass validation:\n" + "\n".join(f"  {_failure(check)}" for check in failed))


def _failure(check: Check) -> str:
    more = f", and {check.offenders - len(check.shown)} more" if check.offenders > len(check.shown) else ""
    return f"not true that {check.says}: {check.about} {'; '.join(check.shown)}{more}"


# --- report ------------------------------------------------------------------------------------


def report(
    manifest: pd.DataFrame, rejected: Sequence[tuple[str, str, bool]], checks: Sequence[Check], config: SubsetConfig
) -> dict[str, Any]:
    """What quality.json holds."""
    short, bytes_ = manifest[["width", "height"]].min(axis=1), manifest["bytes"]
    return {
        "passed": all(check.passed for check in checks),
        "images": len(manifest),
        "examined": len(manifest) + len(rejected),
        "quarantined": len(rejected),
        "unreadable": sum(not readable for _, _, readable in rejected),
        "classes": class_counts(manifest, config),
        "captions": int((manifest["caption"] != "").sum()),
        "modes": {str(mode): int(count) for mode, count in manifest["mode"].value_counts().sort_index().items()},
        "short_side": {"min": int(short.min()), "median": float(short.median()), "max": int(short.max())},
        "bytes": {"total": int(bytes_.sum()), "median": float(bytes_.median()), "max": int(bytes_.max())},
        "checks": [asdict(check) for check in checks],
    }


def page(
    title: str,
    summary: dict[str, Any],
    rejected: Sequence[tuple[str, str, bool]],
    samples: Sequence[tuple[str, np.ndarray]],
) -> str:
    """What quality.html holds. ``samples`` are a few images, (words, uint8 (S, S, 3)) each."""
    sizes, weight = summary["short_side"], summary["bytes"]
    cards = [
        ("images", f"{summary['images']:,}"),
        ("classes", f"{sum(count > 0 for count in summary['classes']):,}" if summary["classes"] else "none"),
        ("captions", f"{summary['captions']:,}"),
        ("shorter side", f"{sizes['min']} to {sizes['max']} px"),
        ("encoded", f"{weight['total'] / 2**20:,.1f} MiB"),
        ("quarantined", f"{summary['quarantined']:,} of {summary['examined']:,}"),
    ]
    parts = [
        f"<div class=cards>{''.join(f'<div><b>{_escape(value)}</b><span>{_escape(name)}</span></div>' for name, value in cards)}</div>",
        "<h2>Checks</h2>" + _checks(summary["checks"]),
        "<h2>Images</h2>" + _samples(samples),
    ]
    if summary["classes"]:
        parts.append("<h2>Images per class</h2>" + _bars(summary["classes"]))
    modes = [(mode, f"{count:,}") for mode, count in summary["modes"].items()]
    parts.append("<h2>Modes</h2>" + _table(("mode", "images"), modes))
    if rejected:
        rows = [(key, reason) for key, reason, _ in rejected[:200]]
        more = f"<p>{len(rejected) - 200:,} more are in quarantine.csv.</p>" if len(rejected) > 200 else ""
        parts.append("<h2>Quarantined</h2>" + _table(("key", "reason"), rows) + more)
    head, tail = _PAGE.split("{body}")
    return head.replace("{title}", _escape(title)) + "\n".join(parts) + tail


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _checks(checks: Sequence[dict[str, Any]]) -> str:
    rows = []
    for check in checks:
        mark = "<i class=ok>&#10003;</i>" if check["passed"] else "<i class=bad>&#10007;</i>"
        offenders = f"<small>{_escape('; '.join(check['shown']))}</small>" if check["shown"] else ""
        rows.append(
            f"<tr><td>{mark}</td><td>{_escape(check['says'])} {offenders}</td><td><code>{_escape(check['expectation'])}</code></td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _samples(samples: Sequence[tuple[str, np.ndarray]]) -> str:
    tiles = []
    for words, pixels in samples:
        uri = images.data_uri(images.png_bytes(Image.fromarray(pixels)))
        tiles.append(f'<figure><img src="{uri}" alt="" title="{_escape(words)}"><figcaption>{_escape(words)}</figcaption></figure>')
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _bars(counts: Sequence[int]) -> str:
    """A histogram as inline SVG; hovering over a bar names it."""
    width, height, top = 900, 120, max(max(counts), 1)
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{n * step:.2f}" y="{height - height * count / top:.2f}" width="{max(step * 0.8, 0.5):.2f}" '
        f'height="{height * count / top:.2f}"><title>class {n}: {count} images</title></rect>'
        for n, count in enumerate(counts)
    )
    labels = "".join(
        f'<text x="{(n + 0.4) * step:.2f}" y="{height + 16}">{n}</text>' for n in range(0, len(counts), max(1, -(-len(counts) // 20)))
    )
    return f'<svg viewBox="0 0 {width} {height + 22}" role=img>{bars}{labels}</svg><p>{min(counts):,} to {max(counts):,} images.</p>'


_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { --ink: #1c2330; --soft: #667085; --line: #e4e7ec; --card: #f7f8fa; --accent: #3d6fd9; --ground: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3442; --card: #1b212c; --accent: #7ea2f0; --ground: #12161d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
body { max-width: 960px; margin: 40px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 20px; } h2 { font-size: 17px; margin: 36px 0 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.cards b { display: block; font-size: 19px; } .cards span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; color: var(--soft); font-weight: 500; }
td, th { border-bottom: 1px solid var(--line); padding: 5px 8px; vertical-align: top; overflow-wrap: anywhere; }
code, small { color: var(--soft); font-size: 12px; } i { font-style: normal; } .ok { color: #2e9e5b; } .bad { color: #d6453d; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 8px; }
figure { margin: 0; } img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 6px; display: block; }
figcaption { color: var(--soft); font-size: 11px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
svg { width: 100%; height: auto; } rect { fill: var(--accent); } text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
</style>
<h1>{title}</h1>
{body}
</html>
"""
