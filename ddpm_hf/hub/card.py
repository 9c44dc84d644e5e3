"""What a run says about itself: its model card, and the records that the card is made of."""

import contextlib
import itertools
import logging
import re
import statistics
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file

from ..machine import PRECISIONS
from ..paper import compare_with_paper
from ..runs import (
    MANIFEST,
    RESULTS,
    on_one_line,
    options_beside,
    public_options,
    read_json,
    read_metrics,
    read_results,
    relevant_options,
    shown_value,
    steps_of_stages,
    weights_sha256,
)
from .retries import limited_requests
from .uploaded import files_to_upload

logger = logging.getLogger(__name__)

MOST_SHOWN, MAX_CLASSES = 30, 2**16  # classes: in the table, and at all
TAGS = ["ddpm", "diffusion", "arxiv:2006.11239"]


def _num_parameters(model: Path) -> int:
    total = 0
    for path in (model / "unet").glob("*.safetensors"):
        if re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors", path.name):  # no variants
            with safe_open(path, "pt") as weights:
                names = [
                    name for name in weights.keys() if not re.search(r"(^|\.)(running_\w+|num_batches_\w+)$", name)
                ]
                total += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in names)
    return total


# ---- the card ------------------------------------------------------------------------------------------------------


def model_card(
    run: Path, model: Path, repo_id: str, *, revision: str | None = None, license: str | None = None
) -> str:
    """The README.md of a run whose model lies in `model`; what is not known drops its section.

    Everything that comes from the run is escaped on its way into the template, so that no name can become Markdown,
    HTML, YAML or Jinja. Raises whatever unreadable files raise.
    """
    manifest, metrics = read_json(model / MANIFEST), read_metrics(run / "metrics.jsonl")
    written = options_beside(run)
    options = {**written, **manifest.get("options", {})}  # the manifest's are those that ran
    options = public_options(relevant_options(options))
    unet, scheduler = (read_json(model / name) for name in ("unet/config.json", "scheduler/scheduler_config.json"))
    index = read_json(model / "model_index.json")
    own = _own_network(index)
    dataset = str(options.get("dataset_name") or options.get("train_data_dir") or "")
    is_points = "sample_size" not in unet
    paper, deviations = compare_with_paper({**options, **unet, **scheduler}, is_points=is_points)
    step = manifest.get("step") or max((line["step"] for line in metrics), default=None)
    # a run that was killed got further than its model; lines without a loss are about held-out samples
    metrics = [line for line in metrics if line["step"] <= step and "loss" in line]
    world_size = int(manifest.get("world_size", 1))
    results = _results_of(run, model)
    facts = {
        "title": repo_id.split("/")[1],
        "what": _what(unet),
        "num_parameters": _num_parameters(model) or None,
        "dataset": dataset or None,
        "step": step,
        "init_from": options.get("init_from"),
        "distilled": _distilled(options, index, metrics),
        "grid": _grid(run, options, index.get("num_inference_steps") or scheduler.get("num_train_timesteps")),
        "training": _training_rows(options, metrics, world_size) if options else [],
        "paper": paper if options and "teacher" not in options else None,
        "deviations": deviations,
        "evaluation": [_evaluation_row(result) for result in results],
        "environment": list(manifest.get("environment", {}).items()),
        **_classes(unet, index, manifest),
        "network": options.get("network"),
        "own_class": unet.get("_class_name") if own == "ModelMixin" else None,
    }
    code = {  # inside code, where an escape would show: made of checked names and constants
        "repo_id": repo_id,
        "revision_argument": f', revision="{revision}"' if revision else "",
        "output_argument": ', output_type="np"' if is_points else "",
        **_labels_argument(unet),
        **_network_arguments(own, repo_id),
        "command": _command(options, manifest, written),
    }
    chain = len(scheduler.get("inference_timesteps") or ())
    own_steps = index.get("num_inference_steps") or chain or scheduler.get("num_train_timesteps")
    data = ModelCardData(
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=[_eval_result(result, own_steps) for result in results] or None,
        library_name="diffusers",
        pipeline_tag=None if _numbers(unet) else "unconditional-image-generation",
        tags=list(TAGS),
        datasets=[dataset] if is_public_dataset(dataset) else None,
        license=license,
    )
    template = files("ddpm_hf.hub").joinpath("card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **_shown_all(facts), **code)
    return str(card)


def _numbers(unet: Mapping[str, Any]) -> list[int]:
    """The numbers of a network's classes; none where its configuration is not what a network has."""
    rows, null_class = unet.get("num_class_embeds"), unet.get("null_class")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows > MAX_CLASSES:  # the file may be anybody's
        return []
    return [number for number in range(rows) if number != null_class]


def _classes(unet: Mapping[str, Any], index: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The first classes as rows, with what they are called and how many samples each had, and how many others are."""
    names, counts = index.get("id2label") or {}, manifest.get("dataset", {}).get("classes", {})
    rows = [(n, names.get(str(n), ""), counts.get(names.get(str(n)), "")) for n in _numbers(unet)]
    return {"classes": rows[:MOST_SHOWN], "more_classes": len(rows[MOST_SHOWN:]) or None}


def _labels_argument(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that draw by class, by number: names are somebody's text, and this stands inside code."""
    numbers = _numbers(unet)[:4]
    labels = [numbers[i % len(numbers)] for i in range(16)] if numbers else []
    return {
        "needs_labels": bool(numbers) and unet.get("null_class") is None,
        "labels_argument": f"class_labels={labels}" if labels else "",
    }


def _own_network(index: Mapping[str, Any]) -> str | None:
    """Of a network of its own class the module beside the weights, "ModelMixin" where its code is not there."""
    library, name = index.get("unet") or (None, None)
    if isinstance(library, str) and re.fullmatch(r"own_\w+", library, re.ASCII):
        return library
    return "ModelMixin" if (library, name) == ("diffusers", "ModelMixin") else None


def _network_arguments(own: str | None, repo_id: str) -> dict[str, str]:
    """Arguments that load a network of its own class, and the file that holds its code."""
    unet = f', unet=MyNetwork.from_pretrained("{repo_id}", subfolder="unet")' if own == "ModelMixin" else ""
    is_carried = own is not None and not unet
    return {
        "own_file": f"{own}.py" if is_carried else "",
        "network_argument": ", trust_remote_code=True" if is_carried else unet,
        "unet_argument": unet,
    }


def is_public_dataset(name: str) -> bool:
    """Whether `name` is owner/name of a data set on the Hub that everyone can see; no token is sent to find out."""
    part = r"[A-Za-z0-9][\w.-]*"
    if not re.fullmatch(f"{part}/{part}", name, re.ASCII) or Path(name).exists():
        return False
    # a card without the link is better than none
    with contextlib.suppress(HfHubHTTPError, ValueError, OSError), limited_requests(name, max_waited_s=0):
        return HfApi().repo_exists(name, repo_type="dataset", token=False)
    return False


def _what(unet: Mapping[str, Any]) -> str:
    if "sample_size" not in unet:
        return f"points in {unet.get('in_channels', '?')} dimensions"
    size = unet["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    kind = {1: "greyscale", 3: "RGB"}.get(unet.get("in_channels", 0), f"{unet.get('in_channels')}-channel")
    return f"{height}×{width} {kind} images"


def _distilled(
    options: Mapping[str, Any], index: Mapping[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """From what and into how many steps, and a row for each stage that is over; None for another model."""
    if "teacher" not in options:
        return None
    stages = options["stages"]
    ends = itertools.accumulate(steps_of_stages(stages, options["num_steps"]))
    losses = {line["step"]: line["loss"] for line in metrics}
    rows = [(steps, end, losses[end]) for steps, end in zip(stages, ends, strict=False) if end in losses]
    scale = options.get("guidance_scale", 1)
    return {
        "teacher": options["teacher"],
        "steps": index.get("num_inference_steps"),
        "guidance": None if scale == 1 else scale,
        "stages": rows,
    }


def _grid(run: Path, options: Mapping[str, Any], own_steps: int | None) -> dict[str, Any] | None:
    """The newest grid drawn with the averaged weights."""
    uploaded = (re.fullmatch(r"samples/step-(\d+)-ema\.png", name) for name in files_to_upload(run))
    steps = [int(match[1]) for match in uploaded if match]
    if not steps or "num_samples" not in options:
        return None
    reverse_steps = options.get("sample_steps") or own_steps
    # the step as text: it is part of a file's name
    return {"step": str(max(steps)), "last_seed": options["num_samples"] - 1, "reverse_steps": reverse_steps}


def _training_rows(
    options: Mapping[str, Any], metrics: list[dict[str, Any]], world_size: int
) -> list[tuple[str, Any]]:
    labels = {
        "global_batch_size": "batch",
        "learning_rate": "learning rate",
        "warmup_steps": "warm-up steps",
        "ema_decay": "EMA decay",
        "dropout": "dropout",
        "random_flip": "random flips",
        "mixed_precision": "mixed precision",
        "seed": "seed",
    }
    rows = [(label, options[name]) for name, label in labels.items() if name in options]
    rows.append(("processes", world_size))
    if metrics:
        rows += [("steps", metrics[-1]["step"]), ("last loss", metrics[-1]["loss"])]
        rows.append(("images/s (median)", statistics.median(line["images_per_s"] for line in metrics)))
    return rows


def _results_of(run: Path, model: Path) -> list[dict[str, Any]]:
    """The results that were measured with the weights in `model`; those of raw or earlier weights are left out.

    However weights are stored, they are loaded in float32, and measured so.
    """
    results = read_results(run / RESULTS)
    if not results:
        return []
    state: dict[str, Any] = {}
    for path in (model / "unet").glob("diffusion_pytorch_model*.safetensors"):
        state |= load_file(path)
    own = weights_sha256({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    kept = [result for result in results if result["model"]["weights_sha256"] == own]
    if len(kept) < len(results):
        logger.warning("%s: %d results of other weights are left out", run / RESULTS, len(results) - len(kept))
    return kept


def _eval_result(result: Mapping[str, Any], num_steps: int | None) -> EvalResult:
    """A result for the card's model-index; `num_steps` are those of the model's own chain."""
    steps = result["model"]["num_inference_steps"]
    data = result["data"] or {"name": "none", "split": None}
    name = on_one_line(data["name"])  # YAML would change the line breaks of Unicode
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=name,
        dataset_name=name,
        dataset_split=data["split"] and on_one_line(data["split"]),
        metric_type=result["metric"],
        metric_name=on_one_line(result["name"]) + ("" if steps == num_steps else f", {steps} steps"),
        metric_value=round(result["value"], 4),
    )


def _evaluation_row(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """What was measured, its value, and how."""
    how, data, model = result["protocol"], result["data"], result["model"]
    parts = [f"{data['name']} ({data['split']})"] if data else []
    parts += [f"{how[f'num_{what}']:,} {what}" for what in ("samples", "images") if f"num_{what}" in how]
    parts += [f"{model['num_inference_steps']} steps", f"{model['weights']} weights"]
    parts += [how["extractor"]] if "extractor" in how else []
    if how.get("num_timesteps_subset"):
        parts.append(f"estimated from {how['num_timesteps_subset']} terms per image")
    return result["name"], shown_value(result), ", ".join(parts)


def _command(options: Mapping[str, Any], manifest: Mapping[str, Any], written: Mapping[str, Any]) -> str:
    """What trains this run again: `options` are those that ran, `written` those that options.yaml has.

    One process is started by python, since a launcher's own configuration may ask for more of them.
    """
    world_size = int(manifest.get("world_size", 1))
    words = ["python"]
    if world_size > 1:
        words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(world_size)]
        if str(manifest.get("environment", {}).get("device")).startswith("cpu"):
            words.insert(0, "ACCELERATE_USE_CPU=true")
    words += [f"training/{'distill' if 'teacher' in options else 'train'}.py", "--config", "options.yaml"]
    precision = options.get("mixed_precision")
    if written.get("mixed_precision") is None and precision in PRECISIONS:  # as older runs wrote it
        words += ["--mixed_precision", precision]
    return " ".join([*words, *(["--train_data_dir", "YOUR_FOLDER"] if options.get("train_data_dir") else [])])


def _shown_all(value: Any) -> Any:
    """Lists and mappings with every value in them as text that is safe in Markdown; None, and what is empty, stay."""
    if isinstance(value, Mapping):
        return {name: _shown_all(item) for name, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, tuple) for item in value):
        return [tuple(_escaped(_shown(item)) for item in row) for row in value]
    return value if value is None or value == [] else _escaped(_shown(value))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)


def _escaped(text: str) -> str:
    """On one line, of at most 200 characters; whatever could be markup as a numeric character reference."""
    short = on_one_line(text)[:200]
    # a dot stays only between digits and an underscore inside a word: elsewhere they make links and emphasis
    return re.sub(
        r"[^\w\-/, ×+()'.]|\b_|_\b|_(?=_)|(?<=_)_|(?<!\d)\.|\.(?!\d)", lambda match: f"&#{ord(match[0])};", short
    )
