"""The table of memorised.py, from its results alone."""

from typing import Any

from .fashion_tables import cell
from .report import markdown, origin


def table(results: dict[str, Any], only: str | None = None) -> str:
    """The shares of pictures that are near one that was trained on, or copies; `only` is not used."""
    lines = []
    for row in results["rows"]:
        what = f"drawn in {row['steps']:,} steps, guidance {row['guidance']:g}"
        shares = [cell(row["measures"], name) for name in ("near", "copies")]
        lines.append([what, f"{row['ranges']} × {row['num_samples']}", *shares])
    held_out = [f"{100 * results['held_out'][name]:.1f} %" for name in ("near", "copies")]
    lines.append(["held out of the training", f"{results['num_held_out']:,}", *held_out])
    table = markdown(("pictures", "how many", "near one trained on", "copies"), lines)
    return f"{table}\n\n({results['num_trained_on']:,} were trained on; {origin(results)})"
