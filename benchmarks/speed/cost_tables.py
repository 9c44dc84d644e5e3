"""The tables of cost_model.py, each from its results alone."""

from collections.abc import Mapping
from typing import Any

from .report import markdown, shown_s


def duration(seconds: float) -> str:
    for factor, unit in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return shown_s(seconds)


def counted_table(results: Mapping[str, Any]) -> str:
    lines = [
        [
            work["name"],
            f"{work['num_parameters']:,}",
            f"{work['forward_flop'] / 1e9:,.1f}",
            f"{work['update_bytes'] / 1e9:.2f} GB",
            f"{work['checkpoint_bytes'] / 1e9:.2f} GB",
        ]
        for work in results["counted"]
    ]
    header = ("counted", "P", "F, GFLOP forward per image", "moved by an update", "checkpoint")
    return markdown(header, lines)


def assumed_table(results: Mapping[str, Any]) -> str:
    """What the predictions rest on: assumed of the GPU, and measured here of the CPU, which they do not use."""
    assumed, measured = results["assumed"], results["measured"]
    rate, reached = assumed["peak_flop_per_s"] * assumed["share_of_peak"], measured["flop_per_s"]
    speeds = (
        ("memory", "memory_bytes_per_s"),
        ("link within a machine", "link_bytes_per_s"),
        ("network, per GPU", "network_bytes_per_s"),
        ("disk", "disk_bytes_per_s"),
    )

    def per_s(value: float | None, unit: str, scale: float) -> str:
        return "–" if value is None else f"{value / scale:,.4g} {unit}"

    lines = [
        ["arithmetic peak", "–", per_s(assumed["peak_flop_per_s"], "TFLOP/s, bfloat16", 1e12)],
        ["R, reached in training", per_s(reached, "GFLOP/s, one core, float32", 1e9), per_s(rate, "TFLOP/s", 1e12)],
        ["kernels of a forward pass, and the time to launch one", "–"]
        + [f"{assumed['kernels_forward']}, {shown_s(assumed['launch_s'])}"],
        ["t_0 of a training step", "–", shown_s(results["launching_s"])],
        *([name, per_s(measured.get(key), "GB/s", 1e9), per_s(assumed[key], "GB/s", 1e9)] for name, key in speeds),
        ["GPUs per machine", "–", str(assumed["gpus_per_machine"])],
    ]
    return markdown(("", "measured here, on the CPU", "assumed, of a GPU"), lines)


def predicted_table(results: Mapping[str, Any]) -> str:
    header = ("predicted", "GPUs", "batch each", "step", "of it compute", "update", "exchange, waited for")
    header += ("images/s", "efficiency", "whole training", "checkpoint", "50,000 samples")
    lines = [
        [
            row["name"],
            str(row["world"]),
            f"{row['batch_per_device']:g}",
            *(shown_s(row[f"{part}_s"]) for part in ("step", "compute", "update")),
            f"{shown_s(row['exchange_s'])}, {shown_s(row['waiting_s'])}",
            f"{row['images_per_s']:,.0f}",
            f"{row['efficiency']:.0%}",
            *(duration(row[f"{what}_s"]) for what in ("training", "checkpoint", "sampling")),
        ]
        for row in results["rows"]
    ]
    return markdown(header, lines)


def limits_table(results: Mapping[str, Any]) -> str:
    """Batches per GPU below which more GPUs stop helping."""
    header = ("predicted", *(f"waits for {what} below" for what in results["counted"][0]["least_batches"]))
    lines = [
        [work["name"], *(f"{batch:.3g} images per GPU" for batch in work["least_batches"].values())]
        for work in results["counted"]
    ]
    return markdown(header, lines)


def checks_table(results: Mapping[str, Any]) -> str:
    lines = []
    for check in results["checks"]:
        error = "fitted here" if check.get("fitted") else f"{check['predicted'] / check['measured'] - 1:+.0%}"
        lines.append([check["sweep"], f"{check['measured']:.4g}", f"{check['predicted']:.4g}", error])
    return markdown(("sweep", "measured", "predicted", "off by"), lines)


TABLES = {
    "counted": counted_table,
    "assumed": assumed_table,
    "predicted": predicted_table,
    "limits": limits_table,
    "checks": checks_table,
}


def table(results: Mapping[str, Any], only: str | None = None) -> str:
    parts = [TABLES[name](results) for name in (only.split() if only else TABLES)]
    return "\n\n".join(parts)
