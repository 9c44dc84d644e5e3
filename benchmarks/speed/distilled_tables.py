"""The tables of distilled.py, from its results alone."""

from collections.abc import Mapping
from typing import Any

from .report import NOT_YET, markdown, origin


def table(results: Mapping[str, Any], only: str | None = None) -> str:
    """The tables of what was measured, "digits" and "points", or one of them, each with its own surroundings."""
    makers = {"digits": of_digits, "points": of_points}
    chosen = [name for name in makers if name in results] if only is None else [only]
    parts = [
        f"{makers[name](results[name])}\n\n({origin(dict(results[name]))})" if name in results else NOT_YET
        for name in chosen
    ]
    return "\n\n".join(parts)


def of_digits(found: Mapping[str, Any]) -> str:
    """Fréchet distances by number of steps, the solvers' best in bold, and what the time of 64 digits is."""
    rows, teacher = found["rows"], found["teacher"]
    best = {
        steps: min(
            row["frechet_distance"]["value"] for row in rows if row["steps"] == steps and row["sampler"] != "student"
        )
        for steps in {row["steps"] for row in rows if row["sampler"] != "student"}
    }

    def line(row: Mapping[str, Any]) -> list[str]:
        distance, gap = row["frechet_distance"], row.get("minus_teacher")
        is_best = row["sampler"] != "student" and best.get(row["steps"]) == distance["value"]
        shown = f"{distance['value']:.2f} ± {distance['error']:.2f}"
        ratio = f"{distance['value'] / teacher['frechet_distance']['value']:.2f}"
        difference = "" if gap is None else f"{gap['value']:+.2f} ± {gap['error']:.2f}"
        sure = [f"{row[name]['value']:.3f}" for name in ("confident", "confident_c10")]
        return [row["sampler"], str(row["steps"]), f"**{shown}**" if is_best else shown, ratio, difference, *sure]

    head = (
        "",
        "steps",
        "Fréchet distance",
        "to the teacher's",
        "less the teacher's, same seeds",
        "sure",
        "sure, C = 10",
    )
    text = markdown(head, [line(row) for row in (teacher, *rows)])
    real = found["real"]
    about = (
        f"Real digits against other real digits: {real['value']:.2f} ± {real['error']:.2f}. In bold the best solver. "
    )
    about += f"Means over {found['num_ranges']} ranges of {found['num_samples']} seeds ± standard error."
    times = found["times"]
    took = f"64 digits on {times['threads']} thread(s), start-up excluded: {times['teacher_s']:.3g} s in "
    took += f"{times['teacher_steps']} steps; " + ", ".join(
        f"{each['s'] * 1e3:.3g} ms in {each['steps']}, 1/{times['teacher_s'] / each['s']:.0f}"
        for each in times["students"]
    )
    return f"{text}\n\n{about} {took}."


def of_points(found: Mapping[str, Any]) -> str:
    """Energy distances to the exact law, by sampler and number of steps."""
    steps = sorted({row["steps"] for row in found["rows"]}, reverse=True)
    by_place = {(row["sampler"], row["steps"]): row for row in found["rows"]}
    names = list(dict.fromkeys(row["sampler"] for row in found["rows"]))

    def cell(name: str, num_steps: int) -> str:
        row = by_place.get((name, num_steps))
        return "" if row is None else "refused" if row["deviations"] is None else f"{row['deviations']:.1f}"

    lines = [[name, *(cell(name, n) for n in steps)] for name in names]
    text = markdown(("", *(f"{n} step{'s' if n > 1 else ''}" for n in steps)), lines)
    about = (
        f"Energy distance of {found['num_points']:,} samples to the exact mixture, less that of as many exact draws, "
    )
    about += f"in standard deviations of the latter, {found['chance']:.2g}. What lies between −3 and 3 cannot be told "
    about += "from the truth."
    return f"{text}\n\n{about}"
