"""The table of benchmarks/results/hard_inputs.json."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .report import markdown


def table(results: dict[str, Any], only: str | None = None) -> str:
    """One line for each kind, with the listed inputs and those made beside them; `only` is not used."""
    rows = results["rows"]
    trees = [name for name in ("before", "now") if name in rows[0]["members"][0]]
    heads = [f"right {'now' if name == 'now' else 'at ' + results['against']}" for name in trees]
    header = ("kind", "listed", *heads, "others", *heads, "seen now")
    lines = []
    for row in rows:
        columns = [f"`{row['kind']}`: {row['meaning']}" if row["kind"] != row["meaning"] else row["meaning"]]
        for listed in (True, False):
            columns += _counts([each for each in row["members"] if each["listed"] is listed], trees)
        seen = Counter(each["seen"] for each in row["members"])
        lines.append([*columns, ", ".join(f"{word} {count}" for word, count in seen.most_common())])
    total = ["all"]
    for listed in (True, False):
        total += _counts([each for row in rows for each in row["members"] if each["listed"] is listed], trees)
    seen = Counter(each["seen"] for row in rows for each in row["members"])
    lines.append([*total, ", ".join(f"{word} {count}" for word, count in seen.most_common())])
    return markdown(header, lines)


def _counts(members: Sequence[dict[str, Any]], trees: Sequence[str]) -> list[str]:
    return [str(len(members)), *(str(sum(each[name] for each in members)) for name in trees)]
