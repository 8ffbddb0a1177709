"""What docs/results.md shows of finished experiments.

    python benchmarks/experiments.py collect artifacts/experiments --on "one H100"    # after vapi experiment NAME --seeds 0,1,2
    python benchmarks/experiments.py collect artifacts/experiments --on "two cores" --rows CCA    # into a table of another machine
    python benchmarks/experiments.py write                                            # the tables and the chart, from what was collected

``collect`` puts the complete ones among benchmarks/results/experiments.json, each with date and machine; ``write`` puts tables between
the page's marks (``<!-- table4 -->``, ``<!-- end -->``) and draws docs/results.png and docs/reward-curves.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from vapi import config, curves, grids, recipes
from vapi.config import Config
from vapi.experiment import Table, number

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks/results/experiments.json"
PAGE, CHART, CURVES = (ROOT / "docs" / name for name in ("results.md", "results.png", "reward-curves.png"))
MARKED = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CHARTED = ("table4", "figure4", "credit", "objectives", "policy-dropout", "group-size", "updates", "reward-weights")
MORE = ("kid", "fid_random", "class_accuracy", "geneval_second")
UNREAD = ("cca_beta", "cca_weight", "clip_model")
"""Fields of ``tune`` that VA-pi does not read and recipes have changed since. What is kept says what was; captions leave them out."""
LIMITS = -0.75, 0.35  # of the chart
Found = dict[str, Any]


def collect(folder: Path, machine: str, some: Sequence[str]) -> None:
    """Take over every experiment of which all rows are finished; with ``some``, these rows of what is kept are replaced, and bear the
    base that they were made with."""
    kept: Found = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for path in sorted(folder.glob("*/results.json")):
        found = json.loads(path.read_text())
        if found["experiment"] == path.parent.name and all(row["state"] in ("done", "not run here") for row in found["rows"]):
            when = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat()
            rows = [_with_more(row, found["experiment"], folder) for row in found["rows"]]
            if missing := set(some) - {row["name"] for row in rows}:
                raise SystemExit(
                    f"{found['experiment']} has no row {', '.join(sorted(missing))}; put it into a folder without other experiments"
                )
            if some:
                rows = _replaced(kept[found["experiment"]]["rows"], rows, some, {"date": when, "machine": machine})
                kept[found["experiment"]]["rows"] = rows
            else:
                kept[found["experiment"]] = {**found, "rows": rows, "date": when, "machine": machine}
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _replaced(before: Sequence[Found], after: Sequence[Found], some: Sequence[str], where: Found) -> list[Found]:
    """Rows of which some were made elsewhere."""
    made, (base, *_) = {row["name"]: row for row in after}, after
    return [made[row["name"]] | {"elsewhere": {**where, "base": base["ours"]}} if row["name"] in some else row for row in before]


def _with_more(row: Found, name: str, folder: Path) -> Found:
    """A row without the names of its runs, with what they hold beside the table's metrics, by seed."""
    sides = {point.name: point.side for point in grids.grid(name).points}
    results = [json.loads((folder / Path(run).relative_to("artifacts/experiments") / "metrics.json").read_text()) for run in row["runs"]]
    more = {metric: [number(one, sides[row["name"]], metric) for one in results] for metric in MORE}
    also = {metric: values for metric, values in more.items() if values and None not in values}
    return {key: value for key, value in row.items() if key != "runs"} | {"also": also}


def table(found: Found) -> str:
    """As ``vapi experiment`` prints it, without its heading, and where and when."""
    base = _recorded(found["config"])
    text = Table(found["experiment"], base, found["seeds"], Path(), {}, set()).markdown(found["rows"])
    about, _, lines = text.partition("\n\n")[2].partition("\n\n")
    where = [f"On {found['machine']}, {found['date']}."]
    where += [
        f"{row['name']}: on {row['elsewhere']['machine']}, {row['elsewhere']['date']}." for row in found["rows"] if "elsewhere" in row
    ]
    return f"{lines}\n*{about} {' '.join(where)}*\n"


def _recorded(values: Found) -> Config:
    """The configuration of a run, for its caption: the recipe's in fields that came later, and in those of ``UNREAD``."""
    now = config.plain(recipes.recipe(recipes.closest(values)))
    whole = {section: {**fields, **values.get(section, {})} for section, fields in now.items()}
    whole["tune"] |= {name: now["tune"][name] for name in UNREAD}
    made: Config = config.build(Config, whole)
    return made


def difference(row: Found, base: Found, metric: str) -> tuple[float, float]:
    """Mean over seeds of a row less the base with the same seed (made on the same machine), and half of its 95 % interval."""
    before = row["elsewhere"]["base"] if "elsewhere" in row else base["ours"]
    pairs = zip(row["ours"][metric]["values"], before[metric]["values"], strict=True)
    gaps = [ours - before for ours, before in pairs]
    return statistics.fmean(gaps), float(student.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5


def page(text: str, kept: Found) -> str:
    """The page with its tables made anew. Raises KeyError for one that was not collected."""
    return MARKED.sub(lambda found: f"{found[1]}{table(kept[found[2]])}{found[3]}", text)


def draw(kept: Found) -> None:
    """FID of each row less the base's of the same seed, a panel for each experiment."""
    import matplotlib.pyplot as plt

    shown = [(name, [row for row in kept[name]["rows"][1:] if "fid" in row["ours"]]) for name in CHARTED]
    figure, axes = plt.subplots(len(shown), 1, sharex=True, figsize=(8, 10), height_ratios=[len(rows) + 0.6 for _, rows in shown])
    for axis, (name, rows) in zip(axes, shown, strict=True):
        base = kept[name]["rows"][0]
        for n, row in enumerate(rows):
            mean, half = difference(row, base, "fid")
            if mean > LIMITS[1]:
                axis.text(LIMITS[1] - 0.02, n, f"{mean:+.1f} →", va="center", ha="right", fontsize=8)
                continue
            axis.errorbar(mean, n, xerr=half, fmt="o", color="tab:green" if mean + half < 0 else "tab:gray", ms=5, capsize=2)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(*LIMITS)
    axes[-1].set_xlabel("FID less the base's of the same seed: mean of three seeds, 95 % interval (lower is better)", fontsize=9)
    figure.tight_layout()
    figure.savefig(CHART, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    taken = commands.add_parser("collect")
    taken.add_argument("folder", type=Path)
    taken.add_argument("--on", required=True)
    taken.add_argument("--rows", nargs="*", default=[])
    commands.add_parser("write")
    given = parser.parse_args()
    if given.command == "collect":
        collect(given.folder, given.on, given.rows)
        return
    kept = json.loads(KEPT.read_text())
    config.write_text(PAGE, page(PAGE.read_text(), kept))
    draw(kept)
    curved = {name: {row["name"]: row["curve"] for row in kept[name]["rows"] if "curve" in row} for name in grids.GRIDS}
    curves.write(CURVES, [(grids.grid(name).recipe, drawn) for name, drawn in curved.items() if drawn], "held-out reward")


if __name__ == "__main__":
    main()
