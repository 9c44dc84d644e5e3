"""report.html: what a training run came to so far, as one page that a double click opens.

It needs nothing but the pictures beside it: no script, no server, nothing from the network. Whatever comes from the
run, names above all, is escaped.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from .records import RESULTS, read_results, shown_value

REPORT = "report.html"
Table = Sequence[Sequence[object]]  # rows of values; the first names the columns, by "" where they need no name

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #606060; --bar: #2a6fb0; --page: #fff; --ink: #1a1a1a }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #a8a8a8; --bar: #6aa9e0; --page: #181818; --ink: #e6e6e6 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 64rem; margin: 0 auto; padding: 1rem }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line) }
progress { width: 100%; height: 1rem; accent-color: var(--bar) }
table { border-collapse: collapse; max-width: 100% }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
th { font-weight: normal; color: var(--soft) }
tr + tr > * { border-top: 1px solid var(--line) }
td { font-variant-numeric: tabular-nums; min-width: 5rem; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; background: #fff }
.wide { overflow-x: auto }
.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem }
.steps h3 { margin: 0 0 .3rem; font-size: 1rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem }
figure { margin: 0 }
figcaption { color: var(--soft); font-size: .9rem }
"""


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
    tables: Mapping[str, Table] | None = None,
) -> None:
    """Write report.html into a run's folder, about the curves, samples and evaluation.json that are there.

    Args:
        folder: the run's, whose name is the title.
        metrics: the lines of metrics.jsonl.
        step, num_steps: how far it is, and how far it goes.
        seconds_left: until then; NaN where nobody knows.
        tables: what else to show, by heading.
    """
    parts = [
        _state(metrics, step, num_steps, seconds_left),
        _curves(folder),
        _samples_over_time(folder, num_steps),
        _evaluation(folder),
        *(_section(heading, _table(rows[1:], columns=rows[0])) for heading, rows in (tables or {}).items()),
        _grids(folder),  # last, being many
    ]
    title = _text(folder.resolve().name)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{"".join(parts)}</body>
</html>
"""
    temporary = folder / f".{REPORT}.incomplete"  # a browser may be reading the old one
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(folder / REPORT)


# ---- sections ------------------------------------------------------------------------------------------------------


def _state(metrics: Sequence[Mapping[str, Any]], step: int, num_steps: int, seconds_left: float) -> str:
    rows: list[Sequence[object]] = [("step", f"{step:,} of {num_steps:,}")]
    if step < num_steps and math.isfinite(seconds_left):
        rows.append(("time left", f"about {duration(seconds_left)}, when this was written"))
    if metrics:
        names = {"epoch": "epoch", "loss": "loss", "grad_norm": "gradient norm, before clipping"}
        names |= {"learning_rate": "learning rate", "images_per_s": "images/s"}
        last = metrics[-1]
        rows += [(label, _rounded(last[name])) for name, label in names.items() if name in last]
        rows.append(("trained", f"{_time(metrics[0])} to {_time(last)}"))
    rows.append(("written", _time({"time_utc": datetime.now(UTC).isoformat(timespec="seconds")})))
    state = "finished" if step >= num_steps else f"{math.floor(100 * step / num_steps)} % done"
    bar = f'<progress max="{num_steps}" value="{step}">{state}</progress>\n'
    return f"<p>{state[0].upper()}{state[1:]}.</p>\n{bar}{_table(rows)}"


def _curves(folder: Path) -> str:
    if not (folder / "curves.png").is_file():
        return _section("Curves", "<p>None yet: metrics.jsonl has no line.</p>\n")
    return _section("Curves", _image("curves.png", "loss and gradient norm over steps"))


def _samples_over_time(folder: Path, num_steps: int) -> str:
    if not (folder / "samples_over_time.png").is_file():
        return _section("Samples over time", "<p>None yet.</p>\n")
    picture = _image("samples_over_time.png", "samples of the averaged weights, from the first grid to the last")
    told = f"<p>Averaged (EMA) weights, from the first grid to the last.{_lag(folder, num_steps)}</p>\n"
    return _section("Samples over time", picture + told)


def _lag(folder: Path, num_steps: int) -> str:
    """That averaged weights cannot follow in so few steps, where options.yaml says so."""
    try:
        decay = yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))["ema_decay"]
        if num_steps * (1 - decay) >= 5:
            return ""
    except (yaml.YAMLError, ValueError, KeyError, TypeError, OSError, RecursionError):  # training does not end for it
        return ""
    return (
        f" {num_steps:,} steps are too short for ema_decay {_text(decay)}: the averaged weights, which are saved, lag "
        "behind the raw ones, whose grids are at the end of this page; ema_decay "
        f"{max(0.0, 1 - 5 / num_steps):.4g} or less would fit."
    )


def _grids(folder: Path) -> str:
    """Every samples/step-N-ema.png and -raw.png, the newest first."""
    found: dict[int, list[str]] = {}
    for path in folder.glob("samples/step-*.png"):
        if (match := re.fullmatch(r"step-(0|[1-9]\d*)-(ema|raw)\.png", path.name, re.ASCII)) and path.is_file():
            found.setdefault(int(match[1]), []).append(match[2])
    if not found:
        return ""
    steps = "".join(_samples_of(step, sorted(kinds)) for step, kinds in sorted(found.items(), reverse=True))
    return _section("Every grid, the newest first", f'<div class="steps">\n{steps}</div>\n')


def _samples_of(step: int, kinds: Iterable[str]) -> str:
    figures = "".join(
        f"<figure>{_image(f'samples/step-{step}-{kind}.png', f'{kind} weights, step {step}')}"
        f"<figcaption>{'averaged (EMA)' if kind == 'ema' else 'raw'} weights</figcaption></figure>\n"
        for kind in kinds
    )
    return f'<section>\n<h3>Step {step:,}</h3>\n<div class="pair">\n{figures}</div>\n</section>\n'


def _evaluation(folder: Path) -> str:
    """The results in evaluation.json, in the order of their measurement; nothing where there is no such file."""
    try:
        rows = [_result_row(result) for result in read_results(folder / RESULTS)]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # training does not end for it
        return _section("Evaluation", f"<p>evaluation.json cannot be read: {_text(error)}</p>\n")
    if not rows:
        return ""
    columns = ("measure", "value", "data", "reverse steps", "weights", "measured")
    return _section("Evaluation", _table(rows, columns=columns))


def _result_row(result: Mapping[str, Any]) -> Sequence[object]:
    model, data = result["model"], result["data"]
    place = f"{data['name']} ({data['split']})" if data else ""
    weights = f"{model['weights']}, sha256 {str(model['weights_sha256'])[:8]}"
    return result["name"], shown_value(result), place, model["num_inference_steps"], weights, _time(result)


# ---- HTML ----------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Any value as text of a page: escaped, without line breaks, control characters and what turns the direction."""
    if value is None or isinstance(value, bool):
        value = {None: "none", True: "true", False: "false"}[value]
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape("".join(c if c.isprintable() else " " for c in shown))


def _rounded(value: object) -> object:
    """A measured number with three digits; other values as they are."""
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _time(record: Mapping[str, Any]) -> str:
    """2026-11-20 21:04 UTC, from ISO time in UTC."""
    match = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", str(record.get("time_utc", "")), re.ASCII)
    return f"{match[1]} {match[2]} UTC" if match else "unknown"


def _section(heading: str, content: str) -> str:
    return f"<h2>{_text(heading)}</h2>\n{content}"


def _image(name: str, alt: str) -> str:
    """A picture of this folder, by a name that needs no escape; it opens in full by a click."""
    return f'<a href="{name}"><img src="{name}" alt="{_text(alt)}" loading="lazy"></a>\n'


def _table(rows: Table, *, columns: Sequence[object] = ()) -> str:
    """Rows that are named by their first cell, under the names of their columns if those are given."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    lines = [f"<tr>{head}</tr>\n"] if any(columns) else []
    for first, *others in rows:
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>\n')
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>\n'
