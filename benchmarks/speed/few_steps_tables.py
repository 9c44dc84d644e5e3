"""The tables of few_steps.py, from its results alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from .report import markdown, origin

OURS, BF16 = "ours, respaced", "ours, bf16"
WITHIN = 1.1  # of the distance at 1000 steps


def least_steps(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any] | None]:
    """For each scheduler its row of fewest steps within 10 % of our distance at the most steps, if there is one."""
    ours = [row for row in rows if row["scheduler"] == OURS]
    allowed = WITHIN * max(ours, key=lambda row: row["steps"])["frechet_distance"]
    found: dict[str, Mapping[str, Any] | None] = {}
    for name in dict.fromkeys(row["scheduler"] for row in rows):
        good = [row for row in rows if row["scheduler"] == name and row["frechet_distance"] <= allowed]
        found[name] = min(good, key=lambda row: row["steps"], default=None)
    return found


def table(results: Mapping[str, Any], only: str | None = None) -> str:
    """Distances by scheduler and steps, then the fewest steps that will do."""
    rows = results["rows"]
    steps = sorted({row["steps"] for row in rows})
    by_place = {(row["scheduler"], row["steps"]): row for row in rows}
    names = list(dict.fromkeys(row["scheduler"] for row in rows))
    allowed = least_steps(rows)

    def cell(name: str, num_steps: int) -> str:
        row = by_place.get((name, num_steps))
        if row is None:
            return ""
        return f"{row['frechet_distance']:.1f} ± {row['frechet_distance_error']:.1f} ({row['confident']:.0%})"

    lines = [[name, *(cell(name, num_steps) for num_steps in steps)] for name in names]
    distances = markdown(("Fréchet distance (sure)", *(f"{n} steps" for n in steps)), lines)
    reference = by_place[OURS, steps[-1]]
    later_names = {name for each in results.get("later", []) for name in each["of"]}
    verdicts = []
    for name in names:
        row = allowed[name]
        if row is None:
            verdicts.append([name, "none of these", "–", "–"])
        else:
            saved = 1 - row["cpu_s_per_image"] / reference["cpu_s_per_image"]
            times = [f"{row['cpu_s_per_image'] * 1e3:.3g} ms", f"{saved:.0%}"]
            if name in later_names:  # times of two runs are not to be compared
                times = ["–", "–"]
            verdicts.append([name, str(row["steps"]), *times])
    least = markdown(("", f"fewest steps within 10 % of {steps[-1]}", "CPU time per image", "saved"), verdicts)
    real = f"{reference['frechet_distance_real']:.1f} ± {reference['frechet_distance_real_error']:.1f}"
    about = f"Real digits against other real digits: {real} ({reference['confident_real']:.0%}). Means over ranges of "
    about += f"{results['num_samples']} seeds ± standard error"
    later = "; ".join(f"{', '.join(each['of'])}: {origin(each)}" for each in results.get("later", []))
    later = f" Measured later: {later}." if later else ""
    return f"{distances}\n\n{least}\n\n({about}; {origin(dict(results))}){later}"
