"""The tables and the plot of fashion_quality.py, head_to_head.py and `ddpm-hf evaluate`, from their results alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import markdown, origin

FRECHET, NEAREST = "Fréchet distance", "near a training image"
SCHEDULERS = {
    "ddpm": "ours",
    "distilled": "distilled",
    "ddim": "stock's DDIM",
    "ddim_clipped": "the same with `use_clipped_model_output`",
    "dpmsolver++": "stock's DPM-Solver++",
    "unipc": "stock's UniPC",
}
WAYS = {"ours": "#2a6f97", "stock": "#888888", "stock, better rate": "#d1495b"}


def cell(measures: Mapping[str, list[float]], name: str) -> str:
    if name not in measures:
        return "–"
    value, error = measures[name]
    return f"{value:.2f} ± {error:.2f}" if name == FRECHET else f"{100 * value:.1f} ± {100 * error:.1f} %"


def quality_table(results: Mapping[str, Any], only: str | None = None) -> str:
    """Each way of drawing beside real images; `only` "sizes": the distance of real images by their number."""
    if only == "sizes":
        rows = [
            [f"{int(size):,}", f"{value:.2f} ± {error:.2f}"] for size, (value, error) in results["by_size"].items()
        ]
        return markdown(("real training images", "their Fréchet distance from the test images"), rows)
    real = results["real"]
    names = [*dict.fromkeys(name for row in results["rows"] for name in row["measures"])]
    lines = []
    for row in results["rows"]:
        about = [SCHEDULERS.get(row["scheduler"], row["scheduler"]), f"{row['steps']:,}", f"{row['guidance']:g}"]
        count = f"{row['ranges']} × {row['num_samples']}"
        lines.append([*about, count, *(cell(row["measures"], name) for name in names)])
    count = f"{real['ranges']} × {real['num_samples']}"
    lines.append(["real training images", "", "", count, *(cell(real["measures"], name) for name in names)])
    table = markdown(("scheduler", "steps", "guidance", "pictures", *names), lines)
    right = " and ".join(f"{accuracy:.1%}" for accuracy in results["accuracy"].values())
    return f"{table}\n\n(The classifiers are right about {right} of the test images; {origin(dict(results))})"


def bits_table(results: Mapping[str, Any], only: str | None = None) -> str:
    """The bounds of an evaluation.json in their parts."""
    rows = []
    for found in results["results"]:
        parts = [f"{found['parts'][f'{part}_bpd']:.4f}" for part in ("prior", "kl", "decoder")]
        measured = f"{found['value']:.4f} ± {found['spread']:.4f}"
        rows.append([found["name"], f"{found['model']['num_inference_steps']:,}", measured, *parts])
    protocol, data = results["results"][0]["protocol"], results["results"][0]["data"]
    header = ("", "steps", "bits/dim, at most", "prior", "reverse steps", "decoder")
    return f"{markdown(header, rows)}\n\n({protocol['num_images']:,} images of {data['name']}, {data['split']}.)"


def head_to_head_table(results: Mapping[str, Any], only: str | None = None) -> str:
    """The Fréchet distance by minutes, the ratio of the last, and the other measures at the end."""
    rows, minutes = results["rows"], sorted({row["minutes"] for row in results["rows"]})
    by_place = {(row["way"], row["minutes"]): row for row in rows}
    names = [name for name in rows[0]["measures"] if name != NEAREST]
    lines = []
    for way in WAYS:
        cells = [cell(by_place[way, each]["measures"], FRECHET) for each in minutes]
        last = by_place[way, minutes[-1]]
        steps = " / ".join(f"{each:,}" for each in last["steps"])
        lines.append([way, steps, *cells, *(cell(last["measures"], name) for name in names if name != FRECHET)])
    real = results["real"]
    others = [name for name in names if name != FRECHET]
    blank = ["–"] * (len(minutes) - 1)
    lines.append(["real training images", "–", *blank, cell(real, FRECHET), *(cell(real, name) for name in others)])
    header = ("", "steps, by seed", *(f"distance at {each:g} min" for each in minutes), *others)
    ours, best = (by_place[way, minutes[-1]]["measures"][FRECHET][0] for way in ("ours", better_stock(results)))
    says = f"Ours ends at {ours / best:.2f} times the distance of the better stock run, and reaches that run's last "
    first = next((each for each in minutes if by_place["ours", each]["measures"][FRECHET][0] <= best), None)
    says += f"distance by minute {first:g}." if first is not None else "distance at none of these times."
    rate = f"batch {results['batch']}, learning rate {results['rate']:g}, the better of {results['rates']} by seed 0"
    return f"{markdown(header, lines)}\n\n{says}\n\n(stock, better rate: {rate}; {origin(dict(results))})"


def better_stock(results: Mapping[str, Any]) -> str:
    """The way of stock whose last distance is the smaller."""
    last = max(row["minutes"] for row in results["rows"])
    stock = [row for row in results["rows"] if row["way"] != "ours" and row["minutes"] == last]
    return min(stock, key=lambda row: row["measures"][FRECHET][0])["way"]


def head_to_head_plot(results: Mapping[str, Any], path: Path) -> None:
    """The Fréchet distance over minutes, with standard errors, and real images as a line. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for way, colour in WAYS.items():
        own = [(row["minutes"], *row["measures"][FRECHET]) for row in results["rows"] if row["way"] == way]
        minutes, values, errors = zip(*own, strict=True)
        axes.errorbar(minutes, values, yerr=errors, color=colour, marker="o", capsize=3, label=way)
    axes.axhline(results["real"][FRECHET][0], color="black", linewidth=1, linestyle=":", label="real images")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["minutes"] for row in results["rows"]}))
    axes.set_xlabel("minutes of training on one core")
    axes.set_ylabel("Fréchet distance (lower is better)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
