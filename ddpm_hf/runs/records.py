"""The records of a run or a checkpoint: options, metrics.jsonl, evaluation.json, environment.

Importing this is cheap, for commands that only print help: torch is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from ..machine import replaced
from .options import OF_OUR_NETWORKS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RESULTS = "evaluation.json"
RESULT_KEYS = ("metric", "name", "value", "spread", "protocol", "model", "data")  # of every result


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, for a checkpoint's manifest: only the process that trains can know them."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    hardware = {"device": f"{device.type}, {name}", "python": platform.python_version()}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers", "accelerate")}
    return {**hardware, "ddpm_hf": __version__, **versions}


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """The sha256 of a network's weights: their names, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The file's content; {} where there is no file. Raises ValueError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def on_one_line(text: str) -> str:
    """The text without control characters, marks that reverse its direction, and line breaks of any kind."""
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(visible.split())


def some_names(names: Iterable[str], most: int = 8) -> str:
    """The first names, each on one line and of at most 40 characters, and how many there are more; "" for none."""
    given = list(names)
    shown = [on_one_line(name)[:40] for name in given[:most]]
    return ", ".join(shown) + (f" and {len(given) - most:,} more" if len(given) > most else "")


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file. Raises ValueError unless each is a plain value or a flat list, as in `network_args`.

    References to references could otherwise grow beyond all memory.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = dict(content) if isinstance(content, dict) else {"": {}}
    arguments = values.pop("network_args", None)
    listed = [*values.values(), *(arguments.values() if isinstance(arguments, dict) else [arguments])]
    parts = [part for value in listed for part in (value if isinstance(value, list) else [value])]
    if any(isinstance(part, list | dict) for part in parts):
        raise ValueError(f"{path} is not a list of options, each a plain value or a flat list")
    return content


def options_beside(folder: str | Path) -> dict[str, Any]:
    """The options.yaml of a run or a model, as `read_options` reads it; empty where there is none."""
    file = Path(folder) / "options.yaml"
    return read_options(file) if file.is_file() else {}


def grids_in(folder: Path) -> list[tuple[int, list[str]]]:
    """The step of every samples/step-N-ema.png and -raw.png of a run with its kinds, the newest first."""
    found: dict[int, list[str]] = {}
    for path in folder.glob("samples/step-*.png"):
        if (match := re.fullmatch(r"step-(0|[1-9]\d*)-(ema|raw)\.png", path.name, re.ASCII)) and path.is_file():
            found.setdefault(int(match[1]), []).append(match[2])
    return [(step, sorted(kinds)) for step, kinds in sorted(found.items(), reverse=True)]


def relevant_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those of our networks, where the network is another."""
    return {name: value for name, value in options.items() if not (options.get("network") and name in OF_OUR_NETWORKS)}


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with absolute paths cut to their last part: where things lie on this machine is private."""
    return {name: _public(value) for name, value in options.items()}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_options(value)
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that was cut off or damaged; [] where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl about held-out samples, those alone that are of the same samples as the last."""
    names = ("held_out_l_simple", "held_out_bpd", "train_l_simple", "train_bpd")
    found = [line for line in metrics if all(isinstance(line.get(name), int | float) for name in names)]
    return [line for line in found if line.get("evaluated_on") == found[-1].get("evaluated_on")]


def lowest_bound(evaluated: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first of these `evaluations` whose held-out bound is lowest; None where none has a finite one."""
    finite = [line for line in evaluated if math.isfinite(line["held_out_bpd"])]
    return min(finite, key=lambda line: line["held_out_bpd"], default=None)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in an evaluation.json; [] where there is none. Raises ValueError for another file."""
    if not path.is_file():
        return []
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if missing := [key for result in results for key in RESULT_KEYS if key not in result]:
            raise ValueError(f"a result has no {missing[0]}")
        for result in results:
            if not isinstance(result["value"], int | float) or not isinstance(result["spread"], int | float | None):
                raise ValueError(f"value {result['value']!r} and spread {result['spread']!r} must be numbers")
        return list(results)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of evaluation results: {error!r}") from None


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Add results to an evaluation.json, in place of earlier ones of the same protocol."""
    kept = [old for old in read_results(path) if all(_identity(old) != _identity(new) for new in results)]
    lines = ",\n".join(json.dumps(result) for result in kept + results)  # one line each: curves are long
    with replaced(path) as temporary:
        temporary.write_text(f'{{"results": [\n{lines}\n]}}\n', encoding="utf-8")


def _identity(result: Mapping[str, Any]) -> dict[str, Any]:
    """All that distinguishes two measurements of a checkpoint but its weights, which training may have changed."""
    same = {key: result[key] for key in ("metric", "name", "data", "protocol")}
    return {**same, "model": {key: value for key, value in result["model"].items() if key != "weights_sha256"}}


def shown_value(result: Mapping[str, Any]) -> str:
    """A result's value, with its spread where it has one: 2.9645 ± 0.0162."""
    spread = "" if result["spread"] is None else f" ± {result['spread']:.4f}"
    return f"{result['value']:.4f}{spread}"
