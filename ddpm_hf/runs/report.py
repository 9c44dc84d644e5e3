"""report.html: what a training run came to so far, as one page that a double click opens.

It needs nothing but the pictures beside it: no script, no server, nothing from the network. The page is
report_template.html; Jinja2 escapes whatever comes from the run, names above all.
"""

import functools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ..machine import replaced
from .options import averaging_lags
from .records import RESULTS, evaluations, grids_in, lowest_bound, read_results, shown_value

REPORT = "report.html"
CLEAR_RISE = 3  # in standard errors: one in a hundred by chance, with the eight groups that there are
Rows = Sequence[Sequence[object]]  # of a table; the first names the columns, by "" where they need no name


def duration(seconds: float) -> str:
    """A time that need not be known exactly: 45 s, 12 min, 5.2 h, 3.4 days. `seconds` must be finite."""
    for limit_s, unit_s, text in ((90, 1, "{:.0f} s"), (5400, 60, "{:.0f} min"), (172_800, 3600, "{:.1f} h")):
        if seconds < limit_s:
            return text.format(seconds / unit_s)
    return f"{seconds / 86_400:.1f} days"


def write_report(
    folder: Path,
    *,
    metrics: Sequence[Mapping[str, Any]],
    step: int,
    num_steps: int,
    seconds_left: float = math.nan,
    tables: Mapping[str, Rows] | None = None,
) -> None:
    """Write report.html into a run's folder, about the curves, samples and evaluation.json that are there.

    Args:
        folder: the run's, whose name is the title.
        metrics: the lines of metrics.jsonl.
        step, num_steps: how far it is, and how far it goes.
        seconds_left: until then; NaN if unknown.
        tables: what else to show, by heading.
    """
    results, error = _results(folder)
    page = _template().render(
        title=folder.resolve().name,
        step=step,
        num_steps=num_steps,
        state="finished" if step >= num_steps else f"{math.floor(100 * step / num_steps)} % done",
        progress=[*_progress(metrics, step, num_steps, seconds_left), *_held_out_rows(metrics)],
        memorising=memorising(metrics),
        has_curves=(folder / "curves.png").is_file(),
        has_samples_over_time=(folder / "samples_over_time.png").is_file(),
        lag=_lag(folder, num_steps),
        results=results,
        results_error=error,
        tables=tables or {},
        grids=grids_in(folder),
    )
    with replaced(folder / REPORT) as temporary:  # a browser may be reading the old one
        temporary.write_text(page, encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, finalize=_as_text, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))


def _as_text(value: object) -> str:
    """Any value as text without line breaks, control characters and what reverses its direction; not yet escaped."""
    if isinstance(value, Markup):  # of the template's own
        return value
    if value is None or isinstance(value, bool):
        value = {None: "none", True: "true", False: "false"}[value]
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else " " for c in text)


def _progress(metrics: Sequence[Mapping[str, Any]], step: int, num_steps: int, seconds_left: float) -> Rows:
    rows: list[Sequence[object]] = [("step", f"{step:,} of {num_steps:,}")]
    if step < num_steps and math.isfinite(seconds_left):
        rows.append(("time left", f"about {duration(seconds_left)}, when this was written"))
    if training := [line for line in metrics if "held_out_bpd" not in line]:
        names = {"epoch": "epoch", "loss": "loss", "grad_norm": "gradient norm, before clipping"}
        names |= {"learning_rate": "learning rate", "images_per_s": "images/s"}
        last = training[-1]
        rows += [(label, _rounded(last[name])) for name, label in names.items() if name in last]
        rows.append(("trained", f"{_time(training[0])} to {_time(last)}"))
    rows.append(("written", _time({"time_utc": datetime.now(UTC).isoformat(timespec="seconds")})))
    return rows


def _held_out_rows(metrics: Sequence[Mapping[str, Any]]) -> Rows:
    """The evaluation with the lowest held-out bound, and the last one."""
    evaluated = evaluations(metrics)
    lowest = lowest_bound(evaluated)
    if lowest is None:
        return []
    named = [("lowest held-out bound", lowest), ("held-out bound now", evaluated[-1])]
    return [
        (
            label,
            f"{each['held_out_bpd']:.4g} bits/dim at step {each['step']:,}; training samples {each['train_bpd']:.4g}",
        )
        for label, each in named
    ]


def memorising(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where the held-out bound has risen clearly since it was lowest; otherwise nothing.

    Clearly: by more than three standard errors, found from the same groups of held-out samples at both steps.
    """
    evaluated = evaluations(metrics)
    lowest = lowest_bound(evaluated)
    if lowest is None:
        return ""
    last = evaluated[-1]
    before, now = (line.get("held_out_bpd_groups") for line in (lowest, last))
    try:
        rises = [float(b) - float(a) for a, b in zip(before, now, strict=True)]  # type: ignore[arg-type]
        uncertainty = statistics.stdev(rises) / math.sqrt(len(rises))
    except (TypeError, ValueError):  # a line that was changed by hand, or a single group, which says nothing of chance
        return ""
    rise, train = last["held_out_bpd"] - lowest["held_out_bpd"], last["train_bpd"] - lowest["train_bpd"]
    if not rise > CLEAR_RISE * uncertainty:
        return ""
    since, by = f"Since step {lowest['step']:,}", f"{rise:.3g} ± {uncertainty:.2g} bits/dim"
    while_training = (
        f"while that of training samples has fallen by {-train:.3g}: the network memorises what it is trained on"
        if train < 0
        else f"and that of training samples by {train:.3g}: the network gets worse at both"
    )
    return f"{since} the bound of held-out samples has risen by {by}, {while_training}."


def _lag(folder: Path, num_steps: int) -> str:
    """A sentence for runs too short for their ema_decay, which options.yaml has; otherwise nothing."""
    try:
        decay = float(yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))["ema_decay"])
        advice = averaging_lags(num_steps, decay)
    # training does not end for it
    except (yaml.YAMLError, ValueError, KeyError, TypeError, OSError, RecursionError, OverflowError):
        return ""
    if advice is None:
        return ""
    return (
        f" {num_steps:,} steps are too short for ema_decay {decay:.6g}: the averaged weights, which are saved, lag "
        f"behind the raw ones, whose grids are at the end of this page; {advice}."
    )


def _results(folder: Path) -> tuple[Rows, str]:
    """The results in evaluation.json, in the order of their measurement; and the error if it cannot be read."""
    try:
        return [_result_row(result) for result in read_results(folder / RESULTS)], ""
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # training does not end for it
        return [], str(error) or repr(error)


def _result_row(result: Mapping[str, Any]) -> Sequence[object]:
    model, data = result["model"], result["data"]
    place = f"{data['name']} ({data['split']})" if data else ""
    weights = f"{model['weights']}, sha256 {str(model['weights_sha256'])[:8]}"
    return result["name"], shown_value(result), place, model["num_inference_steps"], weights, _time(result)


def _rounded(value: object) -> object:
    """A measured number with three digits; other values unchanged."""
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _time(record: Mapping[str, Any]) -> str:
    """2026-11-20 21:04 UTC, from ISO time in UTC."""
    match = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", str(record.get("time_utc", "")), re.ASCII)
    return f"{match[1]} {match[2]} UTC" if match else "unknown"
