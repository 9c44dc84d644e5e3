"""evaluation.json: what was measured about a checkpoint, each result with its whole protocol."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
