"""Evaluating a checkpoint: bits/dim, and distances between many samples and real images, with the whole protocol.

Work is cut into pieces that do not depend on how many processes share it: 16 images of the bound, or one micro-batch
of seeds (the last one is filled up, and cut afterwards). A run that was killed goes on where it was; see `Pieces`.
Statistics are computed by the main process from the pieces in their order.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Samples, default_cache_dir, is_image_folder, real_samples, to_model_range
from ..hub import load_model
from ..inference import speed_up
from ..likelihood import BoundTerms, bits_per_dim, class_bounds_bpd
from ..runs import environment, some_names, weights_sha256
from ..scheduler import paper_scheduler
from ..unet.unet_ddpm_paper import DDPMPaperUNet
from . import errors, metrics
from .bounds import bound_result, class_result, is_training_data
from .flows import flow_result, require_flow
from .protocol import LEAST_SAMPLES, OF_IMAGES, OF_SAMPLES, SPREAD, Protocol
from .resumable import Pieces

logger = logging.getLogger(__name__)

IMAGES_PER_PIECE = 16
CLASSIFYING_TERMS = 50  # of the bound, per image and class


def default_work_dir() -> Path:
    """Where the pieces of evaluations lie unless another folder is named."""
    return default_cache_dir() / "evaluation"


class Evaluator:
    """A model under a protocol, on this process's device; all processes of a run make the same one."""

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoint: str,
        protocol: Protocol,
        *,
        work_dir: Path | None = None,
        variant: str | None = None,
        read_bin: bool = False,
        trust_remote_code: bool = False,
    ):
        self.accelerator, self.protocol = accelerator, protocol
        self.work_dir = work_dir or default_work_dir()
        self.pipe, self.weights = load_model(
            checkpoint,
            protocol.weights,
            variant=variant,
            read_bin=read_bin,
            trust_remote_code=trust_remote_code,
        )
        self.protocol = protocol = protocol.of_model(self.pipe)
        self.pipe.to(accelerator.device)
        self.pipe.set_progress_bar_config(desc="reverse steps", leave=False, disable=not accelerator.is_main_process)
        self.environment: dict[str, str] = broadcast_object_list([environment(accelerator.device)])[0]
        self.model_identity = {
            "weights": weights_sha256(self.pipe.unet.state_dict()),
            "scheduler": {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")},
            "scheduler_class": type(self.pipe.scheduler).__name__,
            "num_inference_steps": protocol.num_inference_steps,
            **({"null_class": self.pipe.null_class} if self.pipe.classes else {}),
        }
        self._data: dict[str, Samples] = {}
        self._extractors: dict[str, Any] = {}
        self._check()

    def _check(self) -> None:
        """Raises ValueError where data, sizes or packages do not fit, before hours of work."""
        for metric in self.protocol.metrics:
            if metric not in OF_IMAGES:
                if len(self.pipe.sample_shape) != 3:
                    raise ValueError(f"{metric} is for images, and the model draws points {self.pipe.sample_shape}")
                metrics.require_packages()
            if metric == "flow":
                require_flow(self.pipe)
            if self.protocol.dataset is not None:
                self.protocol.split_for(metric)
            if metric != "is" and len(self.data(metric)) < LEAST_SAMPLES[metric]:
                name, size = self.data(metric).name, len(self.data(metric))
                raise ValueError(f"{metric} needs {LEAST_SAMPLES[metric]} real images; {name} has {size}")
            if self.protocol.label_column is not None:
                self.classes(metric)

    def run(self) -> Iterator[dict[str, Any]]:
        """The result of each metric once it is known, on the main process; all processes must iterate."""
        for metric in self.protocol.metrics:
            if metric == "classify":
                measured = self.classified()
            elif metric == "bpd":
                self.warn_of_training_data()
                measured = bound_result(self.bound_terms(), self.bound_settings())
                if self.protocol.label_column is not None:
                    measured["name"] = "bits/dim given the class"
                    measured["protocol"]["label_column"] = self.protocol.label_column
            elif metric == "flow":
                measured = flow_result(self)
            else:
                measured = self.of_samples(metric)
            if self.accelerator.is_main_process:
                yield {"metric": metric, **measured, **self._about(metric)}
            self.accelerator.wait_for_everyone()

    def data(self, metric: str) -> Samples:
        """The real data of a metric, loaded once per split."""
        split = self.protocol.split_for(metric)
        if split not in self._data:
            assert self.protocol.dataset is not None
            with self.accelerator.main_process_first():  # the first decodes, the others read what it cached
                self._data[split] = real_samples(
                    self.protocol.dataset,
                    split,
                    self.pipe.sample_shape,
                    label_column=self.protocol.label_column,
                    skip_bad_images=self.protocol.skip_bad_images,
                )
        return self._data[split]

    def classes(self, metric: str) -> Tensor | None:
        """The model's number for the class of each sample of a metric's data, int64 [N]; None without labels.

        Classes agree by name where the model has names. Raises ValueError where the model lacks one.
        """
        if self.protocol.label_column is None:
            return None
        samples, names = self.data(metric), {name: number for number, name in self.pipe.id2label.items()}
        known = self.pipe.classes
        numbers = [names.get(name) if names else number for number, name in enumerate(samples.label_names)]
        missing = [name for name, number in zip(samples.label_names, numbers, strict=True) if number not in known]
        if missing:
            has = f"has the classes {some_names(names)}" if names else f"has {len(known)} classes"
            raise ValueError(f"{samples.name} has images of {some_names(missing)}, and the model {has}")
        return torch.tensor(numbers)[torch.from_numpy(samples.labels)]

    def conditions(self, metric: str) -> dict[str, Any]:
        """What identifies the labels in work that is kept; nothing without them."""
        classes = self.classes(metric)
        return {} if classes is None else {"classes": hashlib.sha256(classes.numpy().tobytes()).hexdigest()}

    def _pieces(self, kind: str, count: int, **identity: Any) -> Pieces:
        return Pieces(self.work_dir, kind, {**identity, "environment": self.environment}, count)

    # ---- bits/dim --------------------------------------------------------------------------------------------------

    def warn_of_training_data(self) -> None:
        """Warn where the bound is of the training data; other metrics use them by convention."""
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
        """The bound of the data set's first `num_images` images; called by all processes, and the same in each."""
        settings, classes = self.bound_settings(), self.classes("bpd")
        chain = paper_scheduler(self.pipe.scheduler).chain(self.protocol.num_inference_steps)
        terms_per_image = self.protocol.num_timesteps_subset or chain.num_timesteps

        def measure(x_start: Tensor, first: int) -> dict[str, Tensor]:
            labels = None if classes is None else classes[first : first + len(x_start)]
            quiet = not self.accelerator.is_main_process
            total = len(x_start) * terms_per_image
            with tqdm(total=total, desc="bits/dim", unit="term", leave=False, disable=quiet) as bar:
                model = self.pipe.unet, self.pipe.scheduler
                terms = bits_per_dim(
                    *model, x_start, class_labels=labels, first_index=first, on_progress=bar.update, **settings
                )
            return terms._asdict()

        parts = self.of_images("bpd", measure, settings, **self.conditions("bpd"))
        return BoundTerms(**{name: torch.cat([part[name] for part in parts]) for name in BoundTerms._fields})

    def classified(self) -> dict[str, Any]:
        """How many of the data set's first `num_images` images have the lowest bound given their own class."""
        settings, truth = self.bound_settings(), self.classes("classify")
        assert truth is not None
        chain = paper_scheduler(self.pipe.scheduler).chain(self.protocol.num_inference_steps)
        few = min(CLASSIFYING_TERMS, chain.num_timesteps)
        settings["num_timesteps_subset"] = self.protocol.num_timesteps_subset or few
        known = list(self.pipe.classes)

        def measure(x_start: Tensor, first: int) -> dict[str, Tensor]:
            model = self.pipe.unet, self.pipe.scheduler
            return {"bounds": class_bounds_bpd(*model, x_start, known, first_index=first, **settings)}

        bounds = torch.cat([part["bounds"] for part in self.of_images("classify", measure, settings)])
        settings["label_column"] = self.protocol.label_column
        return class_result(bounds, known, truth[: len(bounds)], settings)

    def of_images(
        self,
        metric: str,
        measure: Callable[[Tensor, int], dict[str, Tensor]],
        settings: Mapping[str, Any],
        **identity: Any,
    ) -> list[dict[str, Tensor]]:
        """`measure(x_start, index of the first)` of pieces of the data's first `num_images` images, in their order.

        All processes call this. `settings` and `identity` are what tells this work from other work.
        """
        samples = self.data(metric)
        num_images = min(self.protocol.num_images or len(samples), len(samples))

        def compute(piece: int) -> dict[str, Tensor]:
            first = piece * IMAGES_PER_PIECE
            indices = range(first, min(first + IMAGES_PER_PIECE, num_images))
            return measure(to_model_range(samples.batch(list(indices)), samples.num_levels), first)

        pieces = self._pieces(
            metric,
            math.ceil(num_images / IMAGES_PER_PIECE),
            model=self.model_identity,
            data=samples.fingerprint,
            num_images=num_images,
            **{name: value for name, value in settings.items() if name != "clip_denoised"},  # in the scheduler's
            **identity,
        )
        pieces.complete(self.accelerator, compute)
        return list(pieces)

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
        drawn = self._features(extractor, self._sample_pieces(metric), protocol.num_samples)
        if not self.accelerator.is_main_process:
            return {}
        value, spread = self._statistic(metric, drawn, reference)
        name = metrics.metric_name(OF_SAMPLES[metric], protocol.num_samples)
        details["num_samples"] = protocol.num_samples
        if protocol.label_column is not None:
            details |= {"label_column": protocol.label_column, "guidance_scale": protocol.guidance_scale}
        return {"name": name, "value": value, "spread": spread, "spread_is": SPREAD[metric], "protocol": details}

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

        def both() -> tuple[Iterator[Tensor], Iterator[Tensor]]:
            return stream(drawn, "features"), stream(reference, "features")

        seed = self.protocol.seed
        if metric == "kid":
            value, deviation = metrics.kernel_distance(*both(), seed=seed)
            return value, errors.kernel_distance_error(*both(), seed=seed, deviation=deviation)
        return metrics.frechet_distance(*both()), errors.frechet_distance_error(*both(), seed=seed)

    def _seeds(self) -> str:
        return f"{self.protocol.seed}-{self.protocol.seed + self.protocol.num_samples - 1}"

    def _sample_pieces(self, metric: str) -> Pieces:
        """uint8 images of one micro-batch of seeds each; the last is filled up with further seeds.

        With labels each seed has that of one image of the data, the first seed that of the first.
        """
        classes = self.classes(metric)
        size, first_seed, pipe = self.protocol.batch_size, self.protocol.seed, self.pipe
        if isinstance(pipe.unet, DDPMPaperUNet) and pipe.device.type == "cuda":
            pipe = speed_up(pipe)  # the same network in the same precision; on a CPU it would be another sum

        def compute(piece: int) -> dict[str, Tensor]:
            seeds = range(first_seed + piece * size, first_seed + (piece + 1) * size)
            labels = None if classes is None else classes[[(seed - first_seed) % len(classes) for seed in seeds]]
            images = pipe(
                seeds=seeds,
                class_labels=labels,
                guidance_scale=self.protocol.guidance_scale,
                num_inference_steps=self.protocol.num_inference_steps,
                output_type="pt",
                return_dict=False,
            )[0]
            return {"images": (255 * images).round().to(torch.uint8)}

        count = math.ceil(self.protocol.num_samples / size)
        guided = {} if classes is None else {"guidance_scale": self.protocol.guidance_scale, **self.conditions(metric)}
        pieces = self._pieces(
            "samples", count, model=self.model_identity, first_seed=first_seed, batch_size=size, **guided
        )
        pieces.complete(self.accelerator, compute)
        return pieces

    def _features(
        self, extractor: Any, images: Pieces | None, count: int, *, samples: Samples | None = None
    ) -> Pieces:
        """The features that `extractor` computes of the first `count` images, of drawn pieces or of a data set."""
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
        """The part of a result that does not depend on the metric's value: model, data, environment and time."""
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
