"""One thing that was looked at before a run, and all of them as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was found about a field of the form or of cluster.yaml, and what to do about it."""

    field: str
    status: Literal["ok", "warning", "failed"]
    found: str


def ok(field: str, found: str) -> Check:
    """Nothing to do."""
    return Check(field, "ok", found)


def warning(field: str, found: str) -> Check:
    """It may go wrong, or could not be looked at."""
    return Check(field, "warning", found)


def failed(field: str, found: str) -> Check:
    """It will go wrong."""
    return Check(field, "failed", found)


def table(checks: Sequence[Check]) -> str:
    """All checks for a terminal, what failed last, where it is read first."""
    order = ("ok", "warning", "failed")
    width = max(len(check.field) for check in checks)
    rows = sorted(checks, key=lambda check: order.index(check.status))
    return "\n".join(f"{row.status:<8} {row.field:<{width}}  {row.found}" for row in rows)


def verdict(checks: Sequence[Check]) -> str:
    """What failed, in a sentence; nothing if all is well."""
    wrong = [check for check in checks if check.status == "failed"]
    return "; ".join(f"{check.field}: {check.found}" for check in wrong)
