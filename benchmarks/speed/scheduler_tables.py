"""The tables of schedulers.py, from its results alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from .report import markdown, origin

Row = Mapping[str, Any]
SHOWN = (10, 20, 50)
# How far a sampler of the same process may be off in 50 and more steps; most are by a fifth of it. With 4 timesteps
# all are crude, and only their means are comparable.
TOLERANCE = {"gaussian": {"mean": 0.02, "std": 0.06}, "mixture": {"mean": 0.05, "std": 0.08, "left": 0.05}}
CRUDE = {"gaussian": {"mean": 0.02}}


def many_steps(row: Row) -> bool:
    return row["steps"] >= 50 or row["steps"] == row["T"]


def off(row: Row, truth: Mapping[str, Any], num_samples: int) -> list[str]:
    """Which of a row's moments are further from the truth than allowed, and than four standard errors."""
    found = []
    for data, allowed in (TOLERANCE if row["T"] >= 100 else CRUDE).items():
        for name, most in allowed.items():
            chance = 0.5 if name == "left" else truth[data]["std"]
            within = max(most, 4 * chance / num_samples**0.5)
            if not abs(row[data][name] - truth[data][name]) <= within:  # NaN is off too
                found.append(f"{data} {name}")
    return found


def where(row: Row) -> str:
    kind = "v" if row["predicts"] == "v_prediction" else "ε"
    return f"T = {row['T']}, {row['steps']} steps, {row['spacing']}, {kind}"


def table(results: Mapping[str, Any], only: str | None = None) -> str:
    """What schedulers of the process draw, which rows are off, and what is refused, or one of these: `only`."""
    parts = {"drawn": drawn, "off": failures, "refused": refused}
    if only is not None:
        return parts[only](results)
    return "\n\n".join(part(results) for part in parts.values())


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["scheduler"], []).append(row)
    return found


def drawn(results: Mapping[str, Any]) -> str:
    """Standard deviations of the Gaussian with `leading`, for T = 1000 by steps, and for v, and for T = 100."""
    lines = []
    for name, rows in by_name([row for row in results["rows"] if "refused" not in row]).items():
        own = [row for row in rows if row["spacing"] == "leading" and row["steps"] >= 10]

        def cell(total: int, steps: int, predicts: str = "epsilon", own: Sequence[Row] = own) -> str:
            chosen = [row for row in own if (row["T"], row["steps"], row["predicts"]) == (total, steps, predicts)]
            return f"{chosen[0]['gaussian']['std']:.3f}" if chosen else "–"

        most = max((row["steps"] for row in own if row["T"] == 1000 and row["steps"] > 50), default=0)
        ends = f"{cell(1000, most)} ({most})" if most else "–"
        values = [*(cell(1000, steps) for steps in SHOWN), ends, cell(1000, 20, "v_prediction"), cell(100, 20)]
        if own:
            lines.append([f"`{name}`", *values])
    header = ("", *(f"{n} steps" for n in SHOWN), "most", "20 steps, of v", "20 steps, T = 100")
    about = f"Standard deviation; the data's is 0.2. {results['num_samples']} samples; {origin(dict(results))}"
    return f"{markdown(header, lines)}\n\n({about})"


def failures(results: Mapping[str, Any]) -> str:
    """By scheduler the cases of 50 and more steps, or of all T, in which a moment is off."""
    lines, truth = [], results["truth"]
    for name, rows in by_name([row for row in results["rows"] if "refused" not in row]).items():
        many = [row for row in rows if many_steps(row)]
        for total in dict.fromkeys(row["T"] for row in many):
            own = [row for row in many if row["T"] == total]
            wrong = [row for row in own if off(row, truth, results["num_samples"])]
            if wrong:
                gaussian, left = wrong[0]["gaussian"], wrong[0]["mixture"]["left"]
                shown = f"{gaussian['mean']:.2f}, {gaussian['std']:.3f}; {left:.2f}"
                lines.append([f"`{name}`", f"{len(wrong)} of {len(own)}", where(wrong[0]), shown])
    right = f"mean, deviation; weight (right: 0.30, 0.200; {truth['mixture']['left']:.2f})"
    return markdown(("", "cases that are off", "one of them", right), lines)


def refused(results: Mapping[str, Any]) -> str:
    """Schedulers that draw in no case, with the reason."""
    every = by_name(results["rows"])
    lines = [
        [f"`{name}`", rows[0]["refused"].removeprefix(f"{name} ").removeprefix(f"{name}.")]
        for name, rows in every.items()
        if all("refused" in row for row in rows)
    ]
    return markdown(("", "refused"), lines)
