"""Evaluating a checkpoint: bits/dim, and distances between many samples and real images, with the whole protocol.

Work is cut into pieces that do not depend on how many processes share it: 16 images of the bound, or one micro-batch
of seeds (the last one filled up, and cut afterwards). A run that was killed goes on where it was; see `pieces`.
Statistics are computed by the main process from the pieces in their order.
"""

import contextlib
import difflib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoints, hub, metrics
from .card import environment, on_one_line, read_json, read_options
from .data import BUILT_IN, Samples, default_cache_dir, is_image_folder, load_samples, to_model_range
from .inference import speed_up
from .likelihood import BoundTerms, bits_per_dim, paper_scheduler, rate_distortion
from .pieces import Pieces
from .pipeline_ddpm_paper import DDPMPaperPipeline
from .results import weights_sha256
from .unet.unet_ddpm_paper import DDPMPaperUNet

logger = logging.getLogger(__name__)

METRICS = ("bpd", "fid", "is", "kid", "fd_dinov2")
OF_SAMPLES = {"fid": "FID", "is": "IS", "kid": "KID", "fd_dinov2": "FD-DINOv2"}
# KID draws subsets of 1000, IS makes ten splits.
LEAST_SAMPLES = {"bpd": 1, "fid": 2, "is": 100, "kid": 1000, "fd_dinov2": 2}
IMAGES_PER_PIECE = 16


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how. The fields are the options of `ddpm-hf evaluate`.

    dataset: a name that `data.load_samples` takes, or a folder of images.
    split: of the data set; None: "test" for bits/dim and "train" for the other metrics, as the paper's FID.
    num_samples: how many are drawn for FID, IS, KID and FD-DINOv2, of the seeds `seed`, `seed` + 1, ….
    num_images: how many images, from the first, for bits/dim; None: all.
    num_timesteps_subset: terms of the bound per image; None: all, else an unbiased estimate.
    num_inference_steps: reverse steps; None: the checkpoint's own chain.
    weights: "ema" or "raw" of a training run's checkpoint; None: what the pipeline has.
    extractor: of FID, IS and KID: "inception", or module:factory (see `metrics.load_extractor`).
    skip_bad_images: how many of a folder's or a table's may be left out. What is measured follows from those that
        were, which the data's fingerprint and `num_skipped` of a result tell, and not from how many might have been.
    """

    dataset: str | None
    metrics: tuple[str, ...] = ("bpd",)
    split: str | None = None
    num_samples: int = 50_000
    num_images: int | None = None
    num_timesteps_subset: int | None = None
    num_inference_steps: int | None = None
    seed: int = 0
    batch_size: int = 64
    weights: str | None = None
    extractor: str = "inception"
    skip_bad_images: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"metrics {sorted(unknown)} are unknown; choose among {', '.join(METRICS)}")
        for name in ("num_samples", "num_images", "num_timesteps_subset", "num_inference_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for metric in set(self.metrics) - {"bpd"}:
            if self.num_samples < LEAST_SAMPLES[metric]:
                raise ValueError(f"num_samples={self.num_samples}: {metric} needs at least {LEAST_SAMPLES[metric]}")
        if not 0 <= self.seed <= 2**32 - self.num_samples - self.batch_size:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32) with room for {self.num_samples} samples")
        if self.dataset is None and set(self.metrics) != {"is"}:
            raise ValueError("dataset is missing: every metric but `is` compares with real images")

    def split_for(self, metric: str) -> str:
        assert self.dataset is not None
        if is_image_folder(self.dataset):
            if self.split not in (None, "train"):
                raise ValueError(f"split={self.split!r}: the folder {self.dataset} has none; give another folder")
            return "train"
        return self.split or ("test" if metric == "bpd" else "train")


# ---- the model and the data ----------------------------------------------------------------------------------------


def load_pipeline(checkpoint: str | Path, dtype: torch.dtype | None = None) -> DDPMPaperPipeline:
    """The pipeline in a folder, or of a repository on the Hub, its network in `dtype`; None: as it was saved.

    `runs/digitz` is not looked for on the Hub where a folder `runs` is here: it is a slip, more likely than not, and
    must not load what somebody else has under that name. Raises ValueError where there is neither, in one line with
    what is like it here and what the Hub answered; what `from_pretrained` raises where there is one.
    """
    if os.path.isdir(checkpoint):
        return DDPMPaperPipeline.from_pretrained(checkpoint, dtype=dtype)
    name, parent = str(checkpoint), os.path.dirname(checkpoint)
    if os.path.exists(name):
        raise ValueError(f"{name} is a file; give the folder of a checkpoint")
    try:
        validate_repo_id(name)
    except HFValidationError:  # no repository can be called so
        raise ValueError(_not_here(name)) from None
    if os.path.isdir(parent):
        more = f"; a repository of that name on the Hub is looked for only where there is no folder {parent}"
        raise ValueError(_not_here(name, more))
    return _from_the_hub(name, dtype)


def _not_here(name: str, more: str = "") -> str:
    """That there is no such folder, and which one with a similar name there is."""
    path = Path(os.path.expanduser(name))
    near = _nearest_folder(path)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    return f"there is no folder {name}{where}{more}{f'; did you mean {near}?' if near else ''}"


def _nearest_folder(path: Path) -> Path | None:
    """The folder that is there and whose path differs from this one by slips in its names, or None."""
    if os.path.isdir(path):
        return path
    parent = _nearest_folder(path.parent) if path.parent != path else None
    if parent is None:
        return None
    _, names, _ = next(os.walk(parent), ("", [], []))  # none where it cannot be read
    close = difflib.get_close_matches(path.name, sorted(names), n=1)  # a name that is there is closest to itself
    return parent / close[0] if close else None


def _from_the_hub(name: str, dtype: torch.dtype | None) -> DDPMPaperPipeline:
    """A repository's pipeline. Raises ValueError with what the Hub answered, where that is why there is none."""
    held: list[logging.LogRecord] = []  # diffusers says at once that it could not ask, before it looks into the cache
    source = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    source.addFilter(hold)
    try:
        pipe = DDPMPaperPipeline.from_pretrained(name, dtype=dtype)
    except Exception as error:  # the client's, its HTTP library's and diffusers' have no base in common
        cause = _cause_at_the_hub(error)
        if cause is None:
            raise
        raise ValueError(_not_here(name, f", and {cause}")) from error
    finally:
        source.removeFilter(hold)
    for record in held:
        source.handle(record)
    return pipe


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
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):  # of httpx, or of httpx2
            return f"the Hub cannot be reached ({on_one_line(str(error)) or type(error).__name__})"
        error = error.__cause__
    return None


def load_model(checkpoint: str, weights: str | None) -> tuple[DDPMPaperPipeline, str]:
    """The pipeline of a run, a checkpoint or a repository, and which weights it has: "ema", "raw" or "as saved".

    Raises ValueError where raw weights are asked for and there are none.
    """
    folder = hub.model_folder(Path(checkpoint)) if Path(checkpoint).is_dir() else None
    pipe = load_pipeline(folder or checkpoint)
    if folder is None or not checkpoints.has(folder, "model"):
        is_run = folder is not None and (folder / "options.yaml").is_file()  # finished: its averaged weights are left
        if weights == "raw" or (weights == "ema" and not is_run):
            raise ValueError(
                f"weights={weights!r}: {checkpoint} is no training checkpoint and has one kind of weights"
            )
        return pipe, "ema" if is_run else "as saved"
    if weights == "raw":
        pipe.unet.load_state_dict(checkpoints.read(folder, "model"))
    return pipe, weights or "ema"


def real_samples(dataset: str, split: str, sample_shape: tuple[int, ...], *, skip_bad_images: int = 0) -> Samples:
    """The data, images cropped and scaled to the model's size. Raises ValueError where they do not fit the model."""
    resolution = None if dataset in BUILT_IN else sample_shape[-1]
    name, folder = (None, dataset) if is_image_folder(dataset) else (dataset, None)
    samples = load_samples(
        name, train_data_dir=folder, split=split, resolution=resolution, skip_bad_images=skip_bad_images
    )
    if samples.sample_shape != sample_shape:
        raise ValueError(f"the model draws samples {sample_shape}, {samples.name} has {samples.sample_shape}")
    return samples


def is_training_data(checkpoint: str | Path, dataset: str, split: str, fingerprint: str) -> bool:
    """Whether this split of a data set is known to be what the network in the folder `checkpoint` was trained on.

    By the fingerprint in a training checkpoint's manifest, or by the names in the options, which a finished run has
    beside its model. False where neither is known, or can be read.
    """
    try:
        manifest = read_json(Path(checkpoint) / checkpoints.MANIFEST)
        file = Path(checkpoint) / "options.yaml"
        options = manifest["options"] if manifest else read_options(file) if file.is_file() else {}
        if manifest and manifest["dataset"]["fingerprint"] == fingerprint:
            return True
        if is_image_folder(dataset):  # a relative path was one from wherever training was started
            return Path(options.get("train_data_dir") or "") == Path(dataset).resolve()
        names = [options.get(f"dataset_{key}") for key in ("name", "split", "config")]
        return names == [dataset, split, None]
    except Exception:  # whatever is wrong with files that the model does not need
        return False


@contextlib.contextmanager
def _counted(network: nn.Module, total: int, *, disable: bool) -> Iterator[None]:
    """Inside, a progress bar counts the samples that the network is asked about, to `total`; then it is gone."""
    with tqdm(total=total, desc="bits/dim", unit="term", leave=False, disable=disable) as bar:

        def count(_: nn.Module, inputs: tuple[Tensor, Any], output: Any) -> None:
            bar.update(len(inputs[0]))

        hook = network.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def default_work_dir() -> Path:
    return default_cache_dir() / "evaluation"


# ---- one evaluation ------------------------------------------------------------------------------------------------


class Evaluator:
    """A model under a protocol, on this process's device; all processes of a run make the same one."""

    def __init__(self, accelerator: Accelerator, checkpoint: str, protocol: Protocol, *, work_dir: Path | None = None):
        self.accelerator, self.protocol = accelerator, protocol
        self.work_dir = work_dir or default_work_dir()
        self.pipe, self.weights = load_model(checkpoint, protocol.weights)
        self.pipe.to(accelerator.device)
        quiet = not accelerator.is_main_process
        self.pipe.set_progress_bar_config(desc="reverse steps", leave=False, disable=quiet)
        self.environment: dict[str, str] = broadcast_object_list([environment(accelerator.device)])[0]
        self.model_identity = {
            "weights": weights_sha256(self.pipe.unet.state_dict()),
            "scheduler": {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")},
            "scheduler_class": type(self.pipe.scheduler).__name__,
            "num_inference_steps": protocol.num_inference_steps,
        }
        self._data: dict[str, Samples] = {}
        self._extractors: dict[str, Any] = {}
        self._check()

    def _check(self) -> None:
        """What may turn out not to fit, before hours of work: data, sizes, packages. Raises ValueError."""
        for metric in self.protocol.metrics:
            if metric != "bpd":
                if len(self.pipe.sample_shape) != 3:
                    raise ValueError(f"{metric} is for images, and the model draws points {self.pipe.sample_shape}")
                metrics.require_packages()
            if self.protocol.dataset is not None:
                self.protocol.split_for(metric)
            if metric != "is" and len(self.data(metric)) < LEAST_SAMPLES[metric]:
                name, size = self.data(metric).name, len(self.data(metric))
                raise ValueError(f"{metric} needs {LEAST_SAMPLES[metric]} real images; {name} has {size}")

    def run(self) -> Iterator[dict[str, Any]]:
        """The result of each metric as it is there, on the main process; gone through by all processes."""
        for metric in self.protocol.metrics:
            if metric == "bpd":
                self._tell_of_training_data()
                measured = _bound_result(self.bound_terms(), self.bound_settings())
            else:
                measured = self.of_samples(metric)
            if self.accelerator.is_main_process:
                yield {"metric": metric, **measured, **self._about(metric)}
            self.accelerator.wait_for_everyone()

    def data(self, metric: str) -> Samples:
        split = self.protocol.split_for(metric)
        if split not in self._data:
            assert self.protocol.dataset is not None
            with self.accelerator.main_process_first():  # the first decodes, the others read what it cached
                self._data[split] = real_samples(
                    self.protocol.dataset,
                    split,
                    self.pipe.sample_shape,
                    skip_bad_images=self.protocol.skip_bad_images,
                )
        return self._data[split]

    def _pieces(self, kind: str, count: int, **identity: Any) -> Pieces:
        return Pieces(self.work_dir, kind, {**identity, "environment": self.environment}, count)

    # ---- bits/dim --------------------------------------------------------------------------------------------------

    def _tell_of_training_data(self) -> None:
        """A warning where the bound is of what the network was trained on; other metrics use that by convention."""
        samples, split, dataset = self.data("bpd"), self.protocol.split_for("bpd"), self.protocol.dataset
        assert dataset is not None
        if self.accelerator.is_main_process and is_training_data(
            self.pipe.name_or_path, dataset, split, samples.fingerprint
        ):
            remedy = "on a folder of held-out images" if is_image_folder(dataset) else "with --split test"
            logger.warning(
                "bits/dim of %s, split %s: the network was trained on these data, and new ones would have more; "
                "measure it %s", samples.name, split, remedy)  # fmt: skip

    def bound_settings(self) -> dict[str, Any]:
        """The arguments of `bits_per_dim`."""
        return {
            "seed": self.protocol.seed,
            "clip_denoised": paper_scheduler(self.pipe.scheduler).clip_denoised(),
            "num_levels": self.data("bpd").num_levels,
            "num_inference_steps": self.protocol.num_inference_steps,
            "num_timesteps_subset": self.protocol.num_timesteps_subset,
            "batch_size": 4 * self.protocol.batch_size,  # no gradients: more than in training fits
        }

    def bound_terms(self) -> BoundTerms:
        """The bound of the data set's first `num_images` images; called by all processes, who all get it."""
        samples, settings = self.data("bpd"), self.bound_settings()
        num_images = min(self.protocol.num_images or len(samples), len(samples))
        chain = paper_scheduler(self.pipe.scheduler).chain(self.protocol.num_inference_steps)
        terms_per_image = self.protocol.num_timesteps_subset or chain.num_timesteps

        def compute(piece: int) -> dict[str, Tensor]:
            first = piece * IMAGES_PER_PIECE
            indices = range(first, min(first + IMAGES_PER_PIECE, num_images))
            x_start = to_model_range(samples.batch(list(indices)), samples.num_levels)
            quiet = not self.accelerator.is_main_process
            with _counted(self.pipe.unet, len(indices) * terms_per_image, disable=quiet):
                terms = bits_per_dim(self.pipe.unet, self.pipe.scheduler, x_start, first_index=first, **settings)
            return terms._asdict()

        pieces = self._pieces(
            "bpd",
            math.ceil(num_images / IMAGES_PER_PIECE),
            model=self.model_identity,
            data=samples.fingerprint,
            num_images=num_images,
            **{name: value for name, value in settings.items() if name != "clip_denoised"},  # in the scheduler's
        )
        pieces.complete(self.accelerator, compute)
        parts = list(pieces)
        return BoundTerms(**{name: torch.cat([part[name] for part in parts]) for name in BoundTerms._fields})

    # ---- metrics of samples ----------------------------------------------------------------------------------------

    def of_samples(self, metric: str) -> dict[str, Any]:
        """FID, IS, KID or FD-DINOv2 of samples of the model."""
        protocol = self.protocol
        extractor = self._extractor("dinov2" if metric == "fd_dinov2" else protocol.extractor)
        if metric == "is" and "logits" not in extractor(self._blank_image()):
            raise ValueError(f"is needs the logits of a classifier; {extractor.name} gives none")
        details: dict[str, Any] = {"extractor": extractor.name, "seeds": self._seeds()}
        reference = None
        if metric != "is":
            samples = self.data(metric)
            reference = self._features(extractor, None, len(samples), samples=samples)
            details["num_reference"] = len(samples)
        drawn = self._features(extractor, self._sample_pieces(), protocol.num_samples)
        if not self.accelerator.is_main_process:
            return {}
        value, spread = self._statistic(metric, drawn, reference)
        name = metrics.metric_name(OF_SAMPLES[metric], protocol.num_samples)
        details["num_samples"] = protocol.num_samples
        return {"name": name, "value": value, "spread": spread, "protocol": details}

    def _extractor(self, name: str) -> Any:
        if name not in self._extractors:
            with self.accelerator.main_process_first():  # the first may download its weights
                self._extractors[name] = metrics.load_extractor(name).eval().to(self.accelerator.device)
        return self._extractors[name]

    def _blank_image(self) -> Tensor:
        return torch.zeros(1, *self.pipe.sample_shape, dtype=torch.uint8, device=self.accelerator.device)

    def _statistic(self, metric: str, drawn: Pieces, reference: Pieces | None) -> tuple[float, float | None]:
        def stream(pieces: Pieces, name: str) -> Iterator[Tensor]:
            return (piece[name] for piece in pieces)

        if metric == "is":
            return metrics.inception_score(stream(drawn, "logits"), seed=self.protocol.seed)
        assert reference is not None
        both = stream(drawn, "features"), stream(reference, "features")
        if metric == "kid":
            return metrics.kernel_distance(*both, seed=self.protocol.seed)
        return metrics.frechet_distance(*both), None

    def _seeds(self) -> str:
        return f"{self.protocol.seed}-{self.protocol.seed + self.protocol.num_samples - 1}"

    def _sample_pieces(self) -> Pieces:
        """uint8 images of one micro-batch of seeds each; the last is filled up with further seeds."""
        size, first_seed, pipe = self.protocol.batch_size, self.protocol.seed, self.pipe
        if isinstance(pipe.unet, DDPMPaperUNet) and pipe.device.type == "cuda":
            pipe = speed_up(pipe)  # the same network in the same precision; on a CPU it would be another sum

        def compute(piece: int) -> dict[str, Tensor]:
            seeds = range(first_seed + piece * size, first_seed + (piece + 1) * size)
            steps = self.protocol.num_inference_steps
            images = pipe(seeds=seeds, num_inference_steps=steps, output_type="pt", return_dict=False)[0]
            return {"images": (255 * images).round().to(torch.uint8)}

        count = math.ceil(self.protocol.num_samples / size)
        pieces = self._pieces("samples", count, model=self.model_identity, first_seed=first_seed, batch_size=size)
        pieces.complete(self.accelerator, compute)
        return pieces

    def _features(
        self, extractor: Any, images: Pieces | None, count: int, *, samples: Samples | None = None
    ) -> Pieces:
        """What `extractor` says about the first `count` images, of pieces of them or of a data set."""
        size = self.protocol.batch_size

        def compute(piece: int) -> dict[str, Tensor]:
            rows = range(piece * size, min((piece + 1) * size, count))
            if images is not None:
                batch = images.read(piece)["images"][: len(rows)]
            else:
                assert samples is not None and samples.num_levels is not None
                batch = samples.batch(list(rows))
                if samples.num_levels != 256:
                    batch = (batch * (255 / (samples.num_levels - 1))).round().to(torch.uint8)
            with torch.no_grad():
                return extractor(batch.to(self.accelerator.device))

        source = images.text if images is not None else samples.fingerprint if samples is not None else None
        pieces = self._pieces(
            "features", math.ceil(count / size), source=source, num_images=count, extractor=extractor.name, size=size
        )
        pieces.complete(self.accelerator, compute)
        return pieces

    @staticmethod
    def _about_data(data: Samples, split: str) -> dict[str, Any]:
        """Which data were measured; how many images were left out only where some were."""
        skipped = {"num_skipped": len(data.skipped)} if data.skipped else {}
        return {"name": data.name, "split": split, "fingerprint": data.fingerprint, **skipped}

    def _about(self, metric: str) -> dict[str, Any]:
        """What every result says about itself."""
        data = None if metric == "is" else self.data(metric)
        scheduler = self.pipe.scheduler
        own_chain = paper_scheduler(scheduler).chain().num_timesteps
        return {
            "model": {
                "weights": self.weights,
                "weights_sha256": self.model_identity["weights"],
                "scheduler": type(scheduler).__name__,
                "variance_type": scheduler.config.get("variance_type"),
                "num_inference_steps": self.protocol.num_inference_steps or own_chain,
            },
            "data": None if data is None else self._about_data(data, self.protocol.split_for(metric)),
            "environment": {**self.environment, "num_processes": self.accelerator.num_processes},
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _curve(terms: BoundTerms) -> dict[str, list[float]]:
    steps, rate, rmse = rate_distortion(terms)
    rounded = [[float(f"{x:.6g}") for x in values] for values in (rate, rmse)]
    return {"num_reverse_steps": steps.tolist(), "rate_bpd": rounded[0], "rmse": rounded[1]}


def _bound_result(terms: BoundTerms, settings: Mapping[str, Any]) -> dict[str, Any]:
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
        "protocol": {
            "num_images": len(total),
            **{name: value for name, value in settings.items() if name != "batch_size"},
            "clip_denoised": bool(settings["clip_denoised"]),
        },
    }
