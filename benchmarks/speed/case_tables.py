"""What users do that once went wrong, as tables: at a commit, and now."""

import re
from typing import Any

from .report import markdown, origin

LONGEST = 180  # characters of a cell


def table(results: dict[str, Any], only: str | None = None) -> str:
    """All of them, or those `about` one thing, and at the end where they were measured."""
    rows = [row for row in results["rows"] if only in (None, row["about"])]
    trees = [name for name in ("before", "now") if all(name in row for row in rows)]
    names = {"before": f"at {results['against']}", "now": "now"}
    lines = [[cell(row["does"]), cell(row["expected"]), *(cell(shown(row[name])) for name in trees)] for row in rows]
    counts = [f"{sum(row[name]['right'] for row in rows)} right {names[name]}" for name in trees]
    header = ("what a user has and does", "right is", *(names[name] for name in trees))
    return f"{markdown(header, lines)}\n\n({len(rows)} uses, {', '.join(counts)}; {origin(results)})"


def shown(found: dict[str, Any]) -> str:
    return f"{'right' if found['right'] else 'WRONG'}: {found['seen']}"


def cell(text: str) -> str:
    """Words of other programs, which Markdown must not read as its own."""
    short = text if len(text) <= LONGEST else text[: LONGEST - 2] + " …"
    escaped = re.sub(r"([|*<>`_\[\]~$])", r"\\\1", short)
    return escaped.replace("\n", " ").replace("WRONG: ", "**wrong**: ")
