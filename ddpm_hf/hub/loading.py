"""Checkpoints by name: a folder, a training run, or a repository on the Hub → a pipeline."""

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..pipeline_loading import DDPMPaperPipeline, network_folder
from ..runs import checkpoints, model_folder, on_one_line
from ..unet.unet_ddpm_paper import WEIGHTS, DDPMPaperMLP, DDPMPaperUNet, check_weights
from .retries import is_transport_error

TRAINING_STEP = re.compile(r"checkpoint-\d+")  # a folder of these scripts, within that of the finished model
WEIGHT_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def load_pipeline(
    checkpoint: str | Path,
    dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    read_bin: bool = False,
    trust_remote_code: bool = False,
) -> DDPMPaperPipeline:
    """The pipeline in a folder, or of a repository on the Hub, its network in `dtype`; None: as it was saved.

    `variant` chooses weights such as "fp16"; with `read_bin` those in `.bin` files are read, where there are none
    in safetensors. A folder with a network alone, as diffusers' training scripts write (`checkpoint-500`, its
    `unet_ema`), is taken where the finished model, with its process, lies around it.

    `runs/digitz` is not looked for on the Hub where a folder `runs` is here: it is probably a typo, and must not load
    what somebody else has under that name. Raises ValueError where there is neither, in one line with
    what is like it here and what the Hub answered; what `from_pretrained` raises where there is one.

    `trust_remote_code` runs the code of a network of a class of its own, which lies beside its weights.
    """
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if os.path.isdir(checkpoint):
        return _from_folder(Path(checkpoint), options, read_bin)
    name, parent = str(checkpoint), os.path.dirname(checkpoint)
    if os.path.exists(name):
        of_port = Path(name).suffix in WEIGHT_FILES and not WEIGHTS.fullmatch(Path(name).name)
        single = "; ddpm-hf convert makes one of it" if of_port else ""
        raise ValueError(f"{name} is a file; give the folder of a checkpoint{single}")
    try:
        validate_repo_id(name)
    except HFValidationError:  # no repository can be called so
        raise ValueError(_not_here(name)) from None
    if os.path.isdir(parent):
        more = f"; a repository of that name on the Hub is looked for only where there is no folder {parent}"
        raise ValueError(_not_here(name, more))
    return _from_the_hub(name, options, read_bin)


def _from_folder(folder: Path, options: dict[str, Any], read_bin: bool) -> DDPMPaperPipeline:
    """A folder's pipeline, or its network with the rest of the pipeline that lies around it."""
    network = network_folder(folder)
    if network is not None and read_bin:
        try:
            check_weights(network.glob("*"), options)
        except OSError:
            options = {**options, "use_safetensors": False}
    whole = _finished_model(folder)
    if network is None or whole is None:
        _check_parts(folder)
        return DDPMPaperPipeline.from_pretrained(folder, **options)
    kinds = {"UNet2DModel": UNet2DModel, "DDPMPaperUNet": DDPMPaperUNet, "DDPMPaperMLP": DDPMPaperMLP}
    library, kind = DDPMPaperPipeline.load_config(whole)["unet"]
    if kind not in kinds or library.startswith("own_"):
        raise ValueError(f"{whole} is a pipeline of a {kind}; {', '.join(kinds)} are known")
    check_weights(network.glob("*"), options)
    options.pop("trust_remote_code")  # these classes run no code of a checkpoint
    return DDPMPaperPipeline.from_pretrained(whole, unet=kinds[kind].from_pretrained(network, **options))


def _check_parts(folder: Path) -> None:
    """ValueError for a pipeline of diffusers with more parts: of latent diffusion, latents would be drawn."""
    if _is_pipeline(folder):
        index = DDPMPaperPipeline._dict_from_json_file(folder / DDPMPaperPipeline.config_name)
        parts = [key for key, value in index.items() if isinstance(value, list) and value[:1] == ["diffusers"]]
        if others := [f"{key} ({index[key][-1]})" for key in parts if key not in ("unet", "scheduler")]:
            raise ValueError(f"{folder} has parts beside unet and scheduler, and is no DDPM: {', '.join(others)}")


def _finished_model(folder: Path) -> Path | None:
    """The pipeline around a folder that is none: above it, or above the `checkpoint-500` that it lies in."""
    above = [folder.parent, folder.parent.parent][: 1 + bool(TRAINING_STEP.fullmatch(folder.parent.name))]
    if _is_pipeline(folder):
        return None
    return next((place for place in above if _is_pipeline(place)), None)


def _is_pipeline(folder: Path) -> bool:
    return (folder / DDPMPaperPipeline.config_name).is_file()


def _not_here(name: str, more: str = "") -> str:
    """That there is no such folder, and which one with a similar name there is."""
    path = Path(os.path.expanduser(name))
    near = _nearest_folder(path)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    return f"there is no folder {name}{where}{more}{f'; did you mean {near}?' if near else ''}"


def _nearest_folder(path: Path) -> Path | None:
    """The folder that is there and whose path differs from this one by typos in its names, or None."""
    if os.path.isdir(path):
        return path
    parent = _nearest_folder(path.parent) if path.parent != path else None
    if parent is None:
        return None
    _, names, _ = next(os.walk(parent), ("", [], []))  # none where it cannot be read
    close = difflib.get_close_matches(path.name, sorted(names), n=1)  # a name that is there is closest to itself
    return parent / close[0] if close else None


def _from_the_hub(name: str, options: dict[str, Any], read_bin: bool) -> DDPMPaperPipeline:
    """A repository's pipeline. Raises ValueError with what the Hub answered, where that is why there is none."""
    # diffusers says at once that it could not ask, before it looks into the cache
    delayed: list[logging.LogRecord] = []
    source = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def hold(record: logging.LogRecord) -> bool:
        delayed.append(record)
        return False

    source.addFilter(hold)
    try:
        pipe = DDPMPaperPipeline.from_pretrained(name, **options)
    except Exception as error:  # the client's, its HTTP library's and diffusers' have no base in common
        if options["use_safetensors"] and (files := _other_weights(error)):
            if not read_bin:
                check_weights(files, options)
            return _from_the_hub(name, {**options, "use_safetensors": False}, read_bin)
        cause = _cause_at_the_hub(error)
        if cause is None:
            raise
        raise ValueError(_not_here(name, f", and {cause}")) from error
    finally:
        source.removeFilter(hold)
    for record in delayed:
        source.handle(record)
    return pipe


def _other_weights(error: Exception) -> list[Path]:
    """A repository's files, of diffusers' error that it has no safetensors; else none."""
    lacking = "necessary `safetensors` weights" in str(error)
    return [Path(name) for name in re.findall(r"'([^']+)'", str(error))] if lacking else []


def _cause_at_the_hub(error: BaseException | None) -> str | None:
    """What the Hub answered, or that it did not; None where a repository was found and something else is wrong."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, OfflineModeIsEnabled):
            return "it was not downloaded from the Hub before, which HF_HUB_OFFLINE forbids to ask"
        if isinstance(error, EntryNotFoundError) and status is not None:
            return f"the Hub's repository has no {DDPMPaperPipeline.config_name}"
        if status in (401, 404):
            return f"the Hub has no repository of that name, or not without `hf auth login` (HTTP {status})"
        if status is not None:
            what = "does not let you read it" if status == 403 else "is in trouble; try again later"
            return f"the Hub {what} (HTTP {status})"
        if is_transport_error(error):
            return f"the Hub cannot be reached ({on_one_line(str(error)) or type(error).__name__})"
        error = error.__cause__
    return None


def load_model(
    checkpoint: str,
    weights: str | None,
    *,
    variant: str | None = None,
    read_bin: bool = False,
    trust_remote_code: bool = False,
) -> tuple[DDPMPaperPipeline, str]:
    """The pipeline of a run, a checkpoint or a repository, and which weights it has: "ema", "raw" or "as saved".

    The last also names the variant. `variant` and `read_bin` are as in `load_pipeline`. Raises ValueError where raw
    weights are asked for and there are none.
    """
    place = Path(checkpoint)
    alone = not _is_pipeline(place) and not (place / "checkpoints").exists() and network_folder(place) is not None
    folder = model_folder(place) if place.is_dir() and not alone else None
    pipe = load_pipeline(folder or checkpoint, variant=variant, read_bin=read_bin, trust_remote_code=trust_remote_code)
    if folder is None or not checkpoints.has(folder, "model"):
        is_run = folder is not None and (folder / "options.yaml").is_file()  # finished: its averaged weights are left
        if weights == "raw" or (weights == "ema" and not is_run):
            raise ValueError(
                f"weights={weights!r}: {checkpoint} is no training checkpoint and has one kind of weights"
            )
        return pipe, "ema" if is_run else "as saved" if variant is None else f"as saved, {variant}"
    if weights == "raw":
        pipe.unet.load_state_dict(checkpoints.read(folder, "model"))
    return pipe, weights or "ema"
