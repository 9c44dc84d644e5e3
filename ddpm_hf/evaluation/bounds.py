"""What is measured of real images: results of their bound, and of classes by bounds; whether they were trained on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import is_image_folder
from ..likelihood import BoundTerms, rate_distortion
from ..runs import checkpoints, options_beside, read_json
from .errors import share_error


def _curve(terms: BoundTerms) -> dict[str, list[float]]:
    """The rate-distortion curve, to six digits."""
    steps, rate, rmse = rate_distortion(terms)
    rounded = [[float(f"{x:.6g}") for x in values] for values in (rate, rmse)]
    return {"num_reverse_steps": steps.tolist(), "rate_bpd": rounded[0], "rmse": rounded[1]}


def bound_result(terms: BoundTerms, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Mean bits/dim with its standard error, its parts, and the settings that it depends on."""
    total = terms.total_b
    return {
        "name": "bits/dim",
        "value": total.mean().item(),
        "spread": (total.std() / math.sqrt(len(total))).item() if len(total) > 1 else None,
        "parts": {
            "prior_bpd": terms.prior_b.mean().item(),
            "kl_bpd": terms.terms_bt[:, 1:].sum(dim=1).mean().item(),
            "decoder_bpd": terms.terms_bt[:, 0].mean().item(),
        },
        **({} if settings["num_timesteps_subset"] else {"rate_distortion": _curve(terms)}),
        "protocol": _protocol(len(total), settings),
    }


def class_result(bounds: Tensor, classes: list[int], truth: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How many images have their lowest bound given their own class, of `bounds` [N, Y] given each of `classes`."""
    guesses = torch.tensor(classes)[bounds.argmin(dim=1)]
    right, count = int((guesses == truth).sum()), len(bounds)
    return {
        "name": "accuracy of classes by their bounds",
        "value": right / count,
        "spread": share_error(right, count),
        "protocol": _protocol(count, settings),
    }


def _protocol(num_images: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of how it was measured; the size of batches counts for rounding only."""
    kept = {name: value for name, value in settings.items() if name != "batch_size"}
    return {"num_images": num_images, **kept, "clip_denoised": bool(settings["clip_denoised"])}


def is_training_data(checkpoint: str | Path, dataset: str, split: str, fingerprint: str) -> bool:
    """Whether this split of a data set is known to be what the network in the folder `checkpoint` was trained on.

    A training checkpoint's manifest holds the fingerprint; beside a finished run's model lie its options, with the
    names. False where neither is there, or readable.
    """
    try:
        manifest = read_json(Path(checkpoint) / checkpoints.MANIFEST)
        options = manifest["options"] if manifest else options_beside(checkpoint)
        if manifest and manifest["dataset"]["fingerprint"] == fingerprint:
            return True
        if is_image_folder(dataset):  # a relative path was one from wherever training was started
            return Path(options.get("train_data_dir") or "") == Path(dataset).resolve()
        names = [options.get(f"dataset_{key}") for key in ("name", "split", "config")]
        return names == [dataset, split, None]
    except Exception:  # whatever is wrong with files that the model does not need
        return False
