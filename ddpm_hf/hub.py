"""Publishing a run on the Hub: its model card, and the upload.

What may leave the machine is decided in one place, `UPLOADED` in pipeline_ddpm_paper.py. The token is that of
huggingface_hub, from `hf auth login` or HF_TOKEN; nothing here takes, prints or stores it.

Left to itself, huggingface_hub waits for an answer for ever and hides five retries, with waits of any length, in each
of some requests. Here every request is made once and waited for a minute, and `publish` alone tries again.
"""

import contextlib
import email.utils
import importlib.metadata
import json
import logging
import platform
import re
import statistics
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers
from safetensors import safe_open
from safetensors.torch import load_file

from . import __version__
from .checkpoints import MANIFEST, newest_good
from .pipeline_ddpm_paper import PLAIN_CARD, files_to_upload
from .results import RESULTS, read_results, shown_value, weights_sha256
from .run_log import read_metrics

logger = logging.getLogger(__name__)

TAGS = ["ddpm", "diffusion", "arxiv:2006.11239"]
MODEL_PARTS = ("model_index.json", "pipeline.py", "unet/", "scheduler/")
NOT_LOGGED_IN = "not logged in, or the token is not valid: run `hf auth login` or set HF_TOKEN"
CAUSES = {
    401: NOT_LOGGED_IN,
    403: "the token may not write there: it needs write access to this name",
    404: "no such repository or revision, or the token may not see it",
    409: "the repository is being changed by someone else; try again",
    412: "the repository was changed in the meantime; try again",
    429: "the Hub asks for fewer requests; try again later",
}
MAY_PASS = {408, 429, 500, 502, 503, 504}  # statuses after which the same request may do better later
TIMEOUT_S = 60.0  # for a connection, and for every single wait for the Hub to take or send anything
FIRST_WAIT_S, MAX_WAITED_S = 4.0, 600.0  # between tries: four times longer each, and so long in all

# The paper's values, by the names of our options and configurations: its Appendix B, or its code where that is silent.
PAPER_PROCESS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "objective": "simple",
    "warmup_steps": 5000,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
}
PAPER_IMAGES = {
    **PAPER_PROCESS,
    "clip_sample": True,
    "layers_per_block": 2,
    "attention_resolutions": [16],
    "norm_num_groups": 32,
}
PAPER_CIFAR10 = {
    **PAPER_IMAGES,
    "variance_type": "fixed_large",
    "block_out_channels": [128, 256, 256, 256],
    "dropout": 0.1,
    "random_flip": True,
    "learning_rate": 2e-4,
    "global_batch_size": 128,
    "num_steps": 800_000,
}
PAPER_256 = {  # the number of steps and the flips depend on the data set
    **PAPER_IMAGES,
    "variance_type": "fixed_small",
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "dropout": 0.0,
    "learning_rate": 2e-5,
    "global_batch_size": 64,
}


class PublishError(OSError):
    """An upload that did not happen; the message is one line with the cause, and without the token."""

    retry_after_s: float | None = None  # what the Hub asks to wait, or 0; None: waiting alone does not help


# ---- the upload ----------------------------------------------------------------------------------------------------


def check_names(repo_id: str, revision: str | None = None) -> None:
    """Raises ValueError unless `repo_id` is user/name, as the Hub has it, and `revision` a plain branch name."""
    name = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
    is_name = re.fullmatch(f"{name}/{name}", repo_id, re.ASCII) and max(map(len, repo_id.split("/"))) <= 96
    if not is_name or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ValueError(
            f"the repository is {repo_id[:100]!r}; give it as user/name, each of at most 96 letters, digits, '-', '_' "
            "and '.'"
        )
    if revision is not None and not re.fullmatch(f"{name}(?:/{name})*", revision, re.ASCII):
        raise ValueError(f"the revision is {revision!r}; give the name of a branch, such as main or v2")


def create(repo_id: str, *, private: bool = False) -> None:
    """Make the repository unless it is there. Raises PublishError; also for a public one where `private` is asked."""
    with _one_line_errors(repo_id):
        HfApi().create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the organization has it
        # create_repo leaves one that exists as it is
        if private and not HfApi().model_info(repo_id).private:
            raise PublishError("it exists and is public; make it private in its settings, or give another name")


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    checkpoint: Path | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> str:
    """Upload a run, or any saved pipeline, with a model card, in one commit. Returns the page's address.

    Args:
        run: a training run's folder, finished or not, of which the newest good checkpoint is taken; or a pipeline's.
            A README.md that lies in it is uploaded as it is, in place of the generated card.
        repo_id: "user/name". Made where it does not exist.
        private: make it private; refused where it exists and is public.
        revision: a branch, made where it does not exist; None: main.
        license: an identifier the Hub knows, such as "apache-2.0", for the card.
        checkpoint: the one whose model is uploaded, in place of the run's own.
        sleep: waits so many seconds between tries; what it raises ends them.

    Only what `UPLOADED` names is uploaded. What may pass, such as a Hub that is down or asks to wait, is tried again
    for up to ten minutes. Raises ValueError for names that cannot be and folders without a model, PublishError where
    the Hub cannot be reached or refuses.
    """
    check_names(repo_id, revision)
    run = Path(run)
    model = checkpoint or model_folder(run)
    next_wait_s, waited_s = FIRST_WAIT_S, 0.0
    while True:
        try:
            create(repo_id, private=private)
            return _upload(run, model, repo_id, revision=revision, license=license)
        except PublishError as error:
            wait_s = max(next_wait_s, error.retry_after_s or 0)
            if error.retry_after_s is None or waited_s + wait_s > MAX_WAITED_S:
                raise
            if not waited_s:
                logger.warning("%s; trying again for up to %d minutes", error, MAX_WAITED_S // 60)
        sleep(wait_s)
        next_wait_s, waited_s = 4 * next_wait_s, waited_s + wait_s


def _upload(run: Path, model: Path, repo_id: str, *, revision: str | None, license: str | None) -> str:
    """One try of `publish`, into a repository that is there. What an earlier one brought up is not sent again."""
    with _one_line_errors(repo_id):
        contents: dict[str, Any] = {
            name: path for name, path in files_to_upload(run).items() if not name.startswith(MODEL_PARTS)
        }
        contents |= {name: path for name, path in files_to_upload(model).items() if name.startswith(MODEL_PARTS)}
        if not any(name.endswith(".safetensors") for name in contents):
            raise PublishError(f"{model} has no weights in safetensors")
        if "options.yaml" in contents:
            options = public_options(read_options(contents["options.yaml"]))
            contents["options.yaml"] = yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode()
        if "README.md" not in contents:
            contents["README.md"] = card_or_plain(run, model, repo_id, revision=revision, license=license).encode()
        api = HfApi()
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        for operation in operations:  # large files one by one: for several at once huggingface_hub takes threads, for
            if operation.path_in_repo.endswith((".safetensors", ".png")):  # which a process waits before it can exit
                api.preupload_lfs_files(repo_id, [operation], revision=revision, free_memory=False)
        api.create_commit(repo_id, operations, commit_message="Upload with ddpm_hf", revision=revision)
    return f"{api.endpoint}/{repo_id}"


def model_folder(run: Path) -> Path:
    """Where the run's newest model lies: in its newest good checkpoint, or where none is left in its root."""
    found = newest_good(run / "checkpoints")
    if found is not None:
        return found[0]
    if not (run / "model_index.json").is_file():
        raise ValueError(f"{run} holds no model: neither model_index.json nor a good checkpoint in checkpoints/")
    return run


# ---- requests, and what becomes of them ----------------------------------------------------------------------------

_uploading: ContextVar[bool] = ContextVar("_uploading", default=False)


class _Unanswered(ConnectionError):
    """A request that was lost on its way; the same one may do better later."""


class _OneTry:
    """Goes before the client class of huggingface_hub (httpx's, or httpx2's) and changes its requests in an upload:
    they end in time, and what http_backoff would repeat fails at once. All others are sent as before."""

    def send(self, request: Any, **kwargs: Any) -> Any:
        if not _uploading.get():
            return super().send(request, **kwargs)  # type: ignore[misc]
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_S)
        try:
            response = super().send(request, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if any(base.__name__ == "TransportError" for base in type(error).__mro__):
                raise _Unanswered(type(error).__name__) from error
            raise
        response.headers.pop("X-HF-Warning", None)  # would be logged as it is, whatever it says
        if response.status_code in MAY_PASS:
            response.read()
            hf_raise_for_status(response)
        if response.status_code == 409 and b"another conflicting operation is in progress" in response.read():
            raise _Unanswered("another operation is in progress")  # create_repo would ask again for ever, at once
        return response


def _prepare_client() -> None:
    """Have huggingface_hub make its requests through `_OneTry`, from now on."""
    client: Any = get_session()
    if not isinstance(client, _OneTry):
        patient: Any = type("Client", (_OneTry, type(client)), {})
        hooks = client.event_hooks
        # as huggingface_hub makes its own
        set_client_factory(lambda: patient(event_hooks=hooks, follow_redirects=True, timeout=None))


@contextlib.contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Inside, requests are made once, and every failure is a PublishError."""
    token = _uploading.set(True)
    try:
        _prepare_client()
        yield
    except Exception as error:  # the client's, its HTTP library's and the operating system's have no base in common
        raised = PublishError(f"{repo_id} was not uploaded: {_cause(error)}")
        raised.retry_after_s = _retry_after_s(error)
        raise raised from error
    finally:
        _uploading.reset(token)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that caused it; huggingface_hub hides the Hub's answer to a large file behind another."""
    while error is not None:
        yield error
        error = error.__cause__


def _response(error: Exception) -> Any:
    responses = (getattr(one, "response", None) for one in _chain(error))
    return next((response for response in responses if response is not None), None)


def _retry_after_s(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait, 0 where it says nothing; None where waiting alone does not help."""
    response = _response(error)
    if response is None:
        lost = [one for one in _chain(error) if isinstance(one, ConnectionError | TimeoutError)]
        return None if not lost or isinstance(lost[0], OfflineModeIsEnabled) else 0.0
    if response.status_code not in MAY_PASS:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):  # else it is a date
        return max(0.0, (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0


def _cause(error: Exception) -> str:
    """One line about the error, without the token, and what to do where that is known."""
    status = getattr(_response(error), "status_code", None)
    if status in CAUSES:
        asked_s = _retry_after_s(error)
        return f"{CAUSES[status]} (HTTP {status}{f', in {asked_s:.0f} s' if asked_s else ''})"
    if status in MAY_PASS:
        return f"the Hub is in trouble; try again later (HTTP {status})"
    if isinstance(error, LocalTokenNotFoundError):
        return NOT_LOGGED_IN
    lost = next((one for one in _chain(error) if isinstance(one, _Unanswered)), None)
    if lost is not None:
        return f"the Hub cannot be reached, or does not answer; try again later ({lost})"
    return _safe_to_show(str(error) if isinstance(error, PublishError) else f"{type(error).__name__}: {error}")


def _safe_to_show(text: str) -> str:
    """The start of a text of whatever origin, without the token, and without what signed addresses carry in them."""
    token = None
    with contextlib.suppress(Exception):  # it may have to be fetched
        token = get_token()
    text = text.replace(token, "[token]") if token else text
    text = re.sub(r"(?i)(bearer)\s+[\w.~+/=-]+", r"\1 [token]", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return _on_one_line(text)[:400]


# ---- what a run says about itself ----------------------------------------------------------------------------------


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


def _num_parameters(model: Path) -> int:
    total = 0
    for path in (model / "unet").glob("*.safetensors"):
        if re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors", path.name):  # no variants
            with safe_open(path, "pt") as weights:
                total += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())
    return total


# ---- the card ------------------------------------------------------------------------------------------------------


def card_or_plain(run: Path, model: Path, repo_id: str, **kwargs: Any) -> str:
    """The run's card; a plain one, with a warning, where it cannot be made: that must not stop an upload."""
    try:
        return model_card(run, model, repo_id, **kwargs)
    except Exception as error:  # whatever is wrong with a run's files
        logger.warning("a plain model card is uploaded, since the run's could not be written: %s", _cause(error))
        return PLAIN_CARD.format(repo_id=repo_id)


def model_card(
    run: Path, model: Path, repo_id: str, *, revision: str | None = None, license: str | None = None
) -> str:
    """The README.md of a run whose model lies in `model`; what is not known drops its section.

    Everything that comes from the run is escaped on its way into the template, so that no name can become Markdown,
    HTML, YAML or Jinja. Raises whatever unreadable files raise.
    """
    manifest, metrics = read_json(model / MANIFEST), read_metrics(run / "metrics.jsonl")
    options_file = run / "options.yaml"
    options = read_options(options_file) if options_file.is_file() else {}
    options = public_options({**options, **manifest.get("options", {})})  # the manifest's are those that ran
    unet, scheduler = (read_json(model / name) for name in ("unet/config.json", "scheduler/scheduler_config.json"))
    dataset = str(options.get("dataset_name") or options.get("train_data_dir") or "")
    is_points = "sample_size" not in unet
    paper, deviations = compare_with_paper({**options, **unet, **scheduler}, is_points=is_points)
    step = manifest.get("step") or max((line["step"] for line in metrics), default=None)
    metrics = [line for line in metrics if line["step"] <= step]  # a run that was killed got further than its model
    world_size = int(manifest.get("world_size", 1))
    results = _results_of(run, model)
    facts = {
        "title": repo_id.split("/")[1],
        "what": _what(unet),
        "num_parameters": _num_parameters(model) or None,
        "dataset": dataset or None,
        "step": step,
        "init_from": options.get("init_from"),
        "grid": _grid(run, options, scheduler),
        "training": _training_rows(options, metrics, world_size) if options else [],
        "paper": paper if options else None,
        "deviations": deviations,
        "evaluation": [_evaluation_row(result) for result in results],
        "environment": list(manifest.get("environment", {}).items()),
    }
    code = {  # inside code, where an escape would show: made of checked names and constants
        "repo_id": repo_id,
        "revision_argument": f', revision="{revision}"' if revision else "",
        "output_argument": ', output_type="np"' if is_points else "",
        "command": _command(options, world_size),
    }
    own_steps = len(scheduler.get("inference_timesteps") or ()) or scheduler.get("num_train_timesteps")
    data = ModelCardData(
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=[_eval_result(result, own_steps) for result in results] or None,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=list(TAGS),
        datasets=[dataset] if is_public_dataset(dataset) else None,
        license=license,
    )
    template = files("ddpm_hf").joinpath("card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **_shown_all(facts), **code)
    return str(card)


def compare_with_paper(
    config: Mapping[str, Any], *, is_points: bool = False
) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Which of the paper's configurations this one is compared with, and (name, paper's value, value) that differ.

    Names that `config` (options and configurations together) lacks are not compared.
    """
    size = config.get("sample_size") or 0
    side = max(size) if isinstance(size, list | tuple) else size
    if is_points:
        paper, values = "the paper's diffusion process and optimization (it has no points)", PAPER_PROCESS
    elif side < 128:
        paper, values = "the paper's CIFAR-10 configuration", PAPER_CIFAR10
    else:
        paper, values = "the paper's configuration for 256×256 images", PAPER_256
    pairs = [(name, theirs, config[name]) for name, theirs in values.items() if name in config]
    return paper, [(name, theirs, ours) for name, theirs, ours in pairs if ours != theirs]


def is_public_dataset(name: str) -> bool:
    """Whether `name` is owner/name of a data set on the Hub that everyone can see; no token is sent to find out."""
    part = r"[A-Za-z0-9][\w.-]*"
    if not re.fullmatch(f"{part}/{part}", name, re.ASCII) or Path(name).exists():
        return False
    with contextlib.suppress(HfHubHTTPError, ValueError, OSError):  # a card without the link is better than none
        return HfApi().repo_exists(name, repo_type="dataset", token=False)
    return False


def _what(unet: Mapping[str, Any]) -> str:
    if "sample_size" not in unet:
        return f"points in {unet.get('in_channels', '?')} dimensions"
    size = unet["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    kind = {1: "greyscale", 3: "RGB"}.get(unet.get("in_channels", 0), f"{unet.get('in_channels')}-channel")
    return f"{height}×{width} {kind} images"


def _grid(run: Path, options: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest grid drawn with the averaged weights."""
    uploaded = (re.fullmatch(r"samples/step-(\d+)-ema\.png", name) for name in files_to_upload(run))
    steps = [int(match[1]) for match in uploaded if match]
    if not steps or "num_samples" not in options:
        return None
    reverse_steps = options.get("sample_steps") or scheduler.get("num_train_timesteps")
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
    """The results that were measured with the weights in `model`; those of raw or earlier weights are left out."""
    results = read_results(run / RESULTS)
    if not results:
        return []
    state: dict[str, Any] = {}
    for path in (model / "unet").glob("diffusion_pytorch_model*.safetensors"):
        state |= load_file(path)
    own = weights_sha256(state)
    kept = [result for result in results if result["model"]["weights_sha256"] == own]
    if len(kept) < len(results):
        logger.warning("%s: %d results of other weights are left out", run / RESULTS, len(results) - len(kept))
    return kept


def _eval_result(result: Mapping[str, Any], num_steps: int | None) -> EvalResult:
    """A result for the card's model-index; `num_steps` are those of the model's own chain."""
    steps = result["model"]["num_inference_steps"]
    data = result["data"] or {"name": "none", "split": None}
    name = _on_one_line(data["name"])  # YAML would change the line breaks of Unicode
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=name,
        dataset_name=name,
        dataset_split=data["split"] and _on_one_line(data["split"]),
        metric_type=result["metric"],
        metric_name=_on_one_line(result["name"]) + ("" if steps == num_steps else f", {steps} steps"),
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


def _command(options: Mapping[str, Any], world_size: int) -> str:
    launch = f"accelerate launch --multi_gpu --num_processes {world_size}" if world_size > 1 else "accelerate launch"
    folder = " --train_data_dir YOUR_FOLDER" if options.get("train_data_dir") else ""
    return f"{launch} training/train.py --config options.yaml{folder}"


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


def _on_one_line(text: str) -> str:
    """Without control characters, what reverses the direction of text, and breaks of whatever kind."""
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(visible.split())


def _escaped(text: str) -> str:
    """On one line, of at most 200 characters; whatever could be markup as a numeric character reference."""
    short = _on_one_line(text)[:200]
    # a dot stays only between digits and an underscore inside a word: elsewhere they make links and emphasis
    return re.sub(
        r"[^\w\-/, ×+()'.]|\b_|_\b|_(?=_)|(?<=_)_|(?<!\d)\.|\.(?!\d)", lambda match: f"&#{ord(match[0])};", short
    )
