"""The table of benchmarks/results/decoding.json."""

from collections.abc import Sequence
from typing import Any

from .report import markdown

MEASURES = {"wall_s": ("wall s", 2), "cpu_s": ("CPU s", 2), "memory_mib": ("MiB", 0)}


def table(results: dict[str, Any], only: str | None = None) -> str:
    """Medians with quartiles; `only` is not used."""
    header = ["sides", "files", "workers", "rounds"]
    for name, _ in MEASURES.values():
        header += [f"{name} before", "now", "ratio"]
    lines = []
    for row in results["rows"]:
        columns = [row["sides"], f"{row['files']:,}", str(row["num_workers"]), str(row["rounds"])]
        for measure, (_, digits) in MEASURES.items():
            columns += [_quartiles(row[f"{measure}_{name}"], digits) for name in ("before", "now")]
            columns.append(_quartiles(row[f"{measure}_ratio"], 2))
        lines.append(columns)
    return markdown(header, lines)


def _quartiles(values: Sequence[float], digits: int) -> str:
    low, median, high = values
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
