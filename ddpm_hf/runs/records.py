"""The records of a run or a checkpoint: options, metrics.jsonl, evaluation.json, environment."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .. import __version__

# ---- its records ----------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, for a checkpoint's manifest: only the process that trains can know them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    hardware = {"device": f"{device.type}, {name}", "python": platform.python_version()}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers", "accelerate")}
    return {**hardware, "ddpm_hf": __version__, **versions}


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with absolute paths cut to their last part: where things lie on this machine is private."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in options.items()
    }


def read_options(path: Path) -> dict[str, Any]:
    """Options, each a plain value or a flat list: references to references would become longer than memory."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = content.values() if isinstance(content, dict) else [{}]
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if any(isinstance(part, list | dict) for part in parts):
        raise ValueError(f"{path} is not a list of options, each a plain value or a flat list")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """What the file says; {} where there is none. Raises ValueError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def on_one_line(text: str) -> str:
    """Without control characters, what reverses the direction of text, and breaks of whatever kind."""
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(visible.split())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that was cut off or damaged; [] where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


RESULTS = "evaluation.json"
KEYS = ("metric", "name", "value", "spread", "protocol", "model", "data")  # of every result


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in an evaluation.json; [] where there is none. Raises ValueError for another file."""
    if not path.is_file():
        return []
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if missing := [key for result in results for key in KEYS if key not in result]:
            raise ValueError(f"a result has no {missing[0]}")
        for result in results:
            if not isinstance(result["value"], int | float) or not isinstance(result["spread"], int | float | None):
                raise ValueError(f"value {result['value']!r} and spread {result['spread']!r} must be numbers")
        return list(results)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a list of evaluation results: {error!r}") from None


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Identifies a network's weights: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shown_value(result: Mapping[str, Any]) -> str:
    """A result's value, with its spread where it has one: 2.9645 ± 0.0162."""
    spread = "" if result["spread"] is None else f" ± {result['spread']:.4f}"
    return f"{result['value']:.4f}{spread}"


def _what(result: Mapping[str, Any]) -> dict[str, Any]:
    """All that tells two measurements of a checkpoint apart; not its weights, which training may have changed."""
    same = {key: result[key] for key in ("metric", "name", "data", "protocol")}
    return {**same, "model": {key: value for key, value in result["model"].items() if key != "weights_sha256"}}


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Add results to an evaluation.json, in place of earlier ones of the same protocol."""
    kept = [old for old in read_results(path) if all(_what(old) != _what(new) for new in results)]
    temporary = path.with_name(f".{path.name}.incomplete")
    lines = ",\n".join(json.dumps(result) for result in kept + results)  # one line each: curves are long
    temporary.write_text(f'{{"results": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(path)
