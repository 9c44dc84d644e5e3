"""Results as data, as a table and as a plot."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ddpm_hf
from ddpm_hf.machine.native import has_kernels

from .machine import instructions
from .networks import ROOT
from .timing import STOCK, Row

UNMEASURED = "unmeasured"
NOT_YET = "Not measured yet."
PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "numpy", "pillow")
PEERS = ("onnx", "onnxscript", "onnxruntime", "openvino")  # the extra `bench`
CASES = {
    "sampling": "Sampling, whole pipelines; time per image and step",
    "peers": "Sampling beside other engines, in the loop of our pipeline; time per image and step",
    "scheduler": "The scheduler's step",
    "training": "Training step; time per image",
    "data": "Training input; time per image",
    "start-up": "Start-up; time per process",
    "commands": "Whole commands, with their start; time per process",
    "checkpoint": "Checkpoints",
    "memory": "Peak memory of a process",
    "batch": "Sampling as the batch grows; time per image and step",
    "side": "Sampling as images grow, batch 4; time per image and step",
    "steps": "Sampling as T grows, batch 1; time per step",
    "dataset": "Reading a data set as it grows",
    "processes": "Processes",
}


# ---- data ----------------------------------------------------------------------------------------------------------


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that lies in the working tree, with a + where files differ from it; None outside of git."""
    try:
        found = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + ("+" if found[1] else "")


def surroundings() -> dict[str, Any]:
    """When, on what and with which versions: what a number means nothing without."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": cpu_name(),
            "cores": num_cores(),
            "threads": 1,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "instructions": instructions(),
            "has_kernels": has_kernels(),
            "gpu": gpu,
        },
        "versions": {
            "ddpm_hf": ddpm_hf.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in (*PACKAGES, *installed(PEERS))},
        },
    }


def installed(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is not None]


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- tables --------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown_s(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB" if value < 1e10 else f"{value / 1e9:,.1f} GB"
    return shown_s(value) if unit == "s" else f"{value:,.0f} {unit}"


def shown_target(row: Row) -> str:
    if row["target"] is None:
        return ""
    least, reach = row["target"]
    bound = "at most " if row.get("at_most") and least > 1 else ""
    return f"{bound}{least:g}×" if least == reach else f"{bound}{least:g}×, better {reach:g}×"


def shown_verdict(row: Row) -> str:
    if row["verdict"] == "reached" and row["target"][0] == row["target"][1]:
        return "met"
    return {None: "", "missed": "**missed**", "least": "met", "reached": "met, and the better one"}[row["verdict"]]


def _value_cells(row: Row) -> list[str]:
    """Of one value each: stock, ours, ratio, with all cores, target, verdict."""
    ratio, target, says = "–", shown_target(row), shown_verdict(row)
    if row["ratio"] is not None:
        ratio = f"{row['ratio']:.2f}×"
        if target == "1×" and row["verdict"] == "missed":  # of memory, where the target is no more than stock's
            says = f"{(row['ours'] - row['stock']) / 1e6:+,.0f} MB"
        elif target.startswith("at most"):
            says = f"{says}: {row['ours'] / row['stock']:.2f} times stock's"
    return [shown(row["stock"], row["unit"]), shown(row["ours"], row["unit"]), ratio, "–", target, says]


def cells(row: Row) -> list[str]:
    """Work, contestant, stock or what else it is compared with, ours, ratio, with all cores, target, verdict."""
    head = [row["name"] + (" (GPU)" if row["device"] == "cuda" else ""), row["contestant"]]
    if not row["measured"]:
        return [*head, "–", "–", UNMEASURED, "–", shown_target(row), row.get("reason", "")]
    if "decided_by" not in row:
        return [*head, *_value_cells(row)]
    times, baseline = row[row["decided_by"]], row.get("baseline", STOCK)
    wide = row.get("all_cores_wall_s", {}).get("ratio")
    theirs, ours = (shown_s(times[side]["median"]) if side in times else "–" for side in (baseline, "ours"))
    if baseline != STOCK:
        theirs += f" ({baseline})"
    ratio, spread = times.get("ratio"), "–"
    if ratio is not None:
        spread = f"{ratio['median']:.2f}× ({ratio['q1']:.2f}–{ratio['q3']:.2f})"
    says = shown_verdict(row)
    if row.get("matmul_flop_per_s"):
        share = row["flop_per_s"] / row["matmul_flop_per_s"]
        rate = f"{row['flop_per_s'] / 1e12:.3g} TFLOP/s, {share:.1%} of the roof"
        says = f"{says}; {rate}" if says else rate
    all_cores = f"{wide['median']:.2f}×" if wide else "–"
    return [*head, theirs, ours, spread, all_cores, shown_target(row), says]


HEADER = ("work", "contestant", "stock", "ours", "stock / ours (quartiles)", "all cores, wall", "target", "")


def origin(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    quick = "the quick benchmark, " if results.get("quick") else ""
    on = f"{machine['cpu']}, {machine['cores']} cores ({machine['capability']})"
    if "instructions" in machine:  # results from before they were asked for have none
        there = [name for name, here in machine["instructions"].items() if here]
        kernels = "compiled" if machine["has_kernels"] else "not compiled"
        on += f" with {', '.join(there) or 'none of the instructions asked for'}, kernels of our own {kernels}"
    return f"{quick}{results['date_utc']}, commit {results['commit']}, {on}, GPU: {machine['gpu'] or 'none'}; {what}"


def speed_table(results: dict[str, Any], only: str | None = None) -> str:
    """All cases one below the other; with `only` those it names, or, for `targets`, one table of what has a target."""
    rows = results["rows"]
    if only == "targets":
        aimed = [(row["case"], cells(row)) for row in rows if row["target"] is not None]
        return markdown(HEADER, [[f"{case}: {work}", *others] for case, (work, *others) in aimed])
    cases = [case for case in CASES if only is None or case in only.split()]
    parts = []
    for case in cases:
        own = [cells(row) for row in rows if row["case"] == case]
        if own:
            parts.append(f"{CASES[case]}:\n\n{markdown(HEADER, own)}")
    return "\n\n".join([*parts, f"({origin(results)})"] if only is None else parts)


# ---- plot ----------------------------------------------------------------------------------------------------------

NOT_DRAWN = ("memory", "batch", "side", "steps", "dataset", "processes")


def plot(results: dict[str, Any], path: Path) -> None:
    """How many times faster than stock: bars with quartiles, and the targets as ticks. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["measured"] and row["case"] not in NOT_DRAWN]
    beside_stock = [row for row in rows if "decided_by" in row and row.get("baseline", STOCK) == STOCK]
    bars = [(row, row[row["decided_by"]]["ratio"]) for row in beside_stock][::-1]
    if not bars:
        raise ValueError("there are no ratios to draw")
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    medians = [ratio["median"] for _, ratio in bars]
    spread = [[r["median"] - r["q1"] for _, r in bars], [r["q3"] - r["median"] for _, r in bars]]
    colours = ["#888888" if row["contestant"].startswith("stock") else "#2a6f97" for row, _ in bars]
    widths = [median - 1 for median in medians]  # on a logarithmic axis bars have no zero to begin at
    axes.barh(range(len(bars)), widths, left=1, xerr=spread, color=colours, height=0.6, error_kw={"capsize": 2})
    for i, (row, _) in enumerate(bars):
        if row["target"] is not None:
            axes.plot([row["target"][0]] * 2, [i - 0.4, i + 0.4], color="#d1495b", linewidth=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= 1.5 * max(medians)]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(bars)), [f"{row['case']}: {row['name']} – {row['contestant']}" for row, _ in bars])
    axes.set_xlabel("times as fast as stock diffusers\n(bar: median and quartiles; red: at least)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
