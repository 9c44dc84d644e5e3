"""The tables of flow.py, from its results alone."""

from collections.abc import Callable, Mapping
from typing import Any

from .report import NOT_YET

CHOSEN_STEPS = 25  # of the short chain beside the flow


def table(results: Mapping[str, Any], only: str | None = None) -> str:
    """Of every measurement that is there, one under the other, or of one of them."""
    found = {name: row["found"] for name, row in results["measured"].items()}
    names = [name for name in TABLES if name in found] if only is None else [only]
    return "\n\n".join(TABLES[name](found) if name in found else NOT_YET for name in names)


def pm(found: Mapping[str, float], digits: int = 3) -> str:
    return f"{found['value']:.{digits}f} ± {found['error']:.{digits}f}".replace("-", "−")


def bounds_table(measured: Mapping[str, Any]) -> str:
    own = measured["bounds"]
    rows = [
        "| of the same digits, bits/dim | at most | what has at most so many |",
        "|---|---|---|",
        f"| the paper's bound, 1000 steps, `fixed_large` | {pm(own['bound'])} | Algorithm 2's P(x_0), x_0 a level |",
        f"| the bound of {CHOSEN_STEPS} chosen steps, fitted variances | {pm(own['chosen'])} | that chain's P(x_0) |",
        f"| the flow, uniform dequantization | {pm(own['flow'])} | the flow's P(bin of x_0) |",
        f"| flow less bound | {pm(own['flow less bound'])} | |",
        f"| flow less chosen chain | {pm(own['flow less chosen'])} | |",
    ]
    return "\n".join(rows)


def tolerances_table(measured: Mapping[str, Any]) -> str:
    rows = ["| tolerance | network | evaluations | bits/dim | an image's difference from the last row |"]
    rows.append("|---|---|---|---|---|")
    for key, row in measured["tolerances"].items():
        tolerance, dtype = key.split()
        evaluations = f"{row['num_evaluations']:.0f}"
        rows.append(f"| {tolerance} | {dtype} | {evaluations} | {row['bpd']:.4f} | {row['rms_difference']:.4f} |")
    return "\n".join(rows)


def trips_table(measured: Mapping[str, Any]) -> str:
    rows = ["| method | evaluations, one way | round-trip error | latents |", "|---|---|---|---|"]
    for name, row in measured["trips"].items():
        rows.append(f"| {name} | {row['num_evaluations']} | {row['error']:.2g} | {row['latents']:.3f} |")
    return "\n".join(rows)


def statistics_table(measured: Mapping[str, Any]) -> str:
    head = "what is encoded", "radius²/d", "its deviation", "pixels' variances: least, median, most", "correlations"
    rows = [f"| {' | '.join(head)} | kurtosis |", "|---|---|---|---|---|---|"]
    for name, row in measured["statistics"].items():
        if name != "flat":
            variances = ", ".join(f"{row[f'{which}_variance']:.2f}" for which in ("lowest", "median", "highest"))
            rows.append(
                f"| {name} | {row['radius2']:.3f} | {row['radius2_deviation']:.3f} | {variances} "
                f"| {row['rms_correlation']:.3f} | {row['kurtosis']:.2f} |"
            )
    flat = measured["statistics"]["flat"]
    rows.append(
        f"\nThe first row by pixels: {flat['num']} of 64 hardly change from digit to digit, and their latents have a "
        f"variance of {flat['variance']:.2f}; the others {flat['others']:.2f}."
    )
    return "\n".join(rows)


def between_table(measured: Mapping[str, Any]) -> str:
    rows = ["| t | output at t + ½ less the mean of its neighbours | neighbours' difference |", "|---|---|---|"]
    for t, row in measured["between"]["outputs"].items():
        rows.append(f"| {t} | {row['off']:.1e} | {row['apart']:.1e} |")
    difference = measured["between"]["difference"]
    return "\n".join([*rows, "", f"In bits/dim, asked there less mixed: {pm(difference, 5)}."])


def divergences_table(measured: Mapping[str, Any]) -> str:
    found = measured["divergences"]
    return (
        f"Root mean square of an image's error, in bits/dim: {found['2']:.3f} of two probes, {found['16']:.3f} of 16."
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "bounds": bounds_table,
    "tolerances": tolerances_table,
    "trips": trips_table,
    "statistics": statistics_table,
    "between": between_table,
    "divergences": divergences_table,
}
