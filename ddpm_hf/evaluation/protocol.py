"""What is measured, and how: the options of `ddpm-hf evaluate`."""

from dataclasses import dataclass, replace
from typing import Any

from .. import data, scheduler  # lazily: the command line's parser reads METRICS, before numpy and torch are imported

METRICS = ("bpd", "flow", "classify", "fid", "is", "kid", "fd_dinov2")
OF_IMAGES = ("bpd", "flow", "classify")  # and no samples
OF_SAMPLES = {"fid": "FID", "is": "IS", "kid": "KID", "fd_dinov2": "FD-DINOv2"}
# What stands behind the ± of a result.
SPREAD = {
    "fid": "standard error, by 50 random halves of the samples",
    "is": "deviation over ten splits, as published",
    "kid": "standard error, by 50 random halves of the samples",
    "fd_dinov2": "standard error, by 50 random halves of the samples",
}
# KID draws subsets of 1000, IS makes ten splits.
LEAST_SAMPLES = {"bpd": 1, "flow": 1, "classify": 1, "fid": 2, "is": 100, "kid": 1000, "fd_dinov2": 2}


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how. The fields are the options of `ddpm-hf evaluate`.

    dataset: a name that `data.load_samples` takes, or a folder of images.
    split: of the data set; None: "test" for what is measured of images, "train" for samples, as the paper's FID.
    num_samples: how many are drawn for FID, IS, KID and FD-DINOv2, of the seeds `seed`, `seed` + 1, ….
    num_images: how many images, from the first, for bits/dim, by the flow too, and to classify; None: all.
    num_timesteps_subset: terms of the bound per image, an unbiased estimate; None: all, and 50 to classify.
    num_inference_steps: reverse steps; None: the checkpoint's own chain.
    weights: "ema" or "raw" of a training run's checkpoint; None: what the pipeline has.
    extractor: of FID, IS and KID: "inception", or module:factory (see `metrics.load_extractor`).
    skip_bad_images: how many of a folder's or a table's may be left out. What is measured follows from those that
        were, which the data's fingerprint and `num_skipped` of a result tell, and not from how many might have been.
    label_column: where the data's labels are, for a conditional model; None: it is evaluated without labels.
    guidance_scale: of the samples, which have the labels of the data, from the first.
    tolerance, num_probes, num_dequantizations: of `flow.flow_bits_per_dim`.
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
    label_column: str | None = None
    guidance_scale: float = 1.0
    tolerance: float = 1e-4
    num_probes: int | None = None
    num_dequantizations: int = 1

    def __post_init__(self) -> None:
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"metrics {sorted(unknown)} are unknown; choose among {', '.join(METRICS)}")
        for name in (
            "num_samples",
            "num_images",
            "num_timesteps_subset",
            "num_inference_steps",
            "batch_size",
            "num_dequantizations",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 1e-12 <= self.tolerance <= 1:
            raise ValueError(f"tolerance={self.tolerance} must lie in [1e-12, 1]")
        if self.num_probes is not None and self.num_probes < 0:
            raise ValueError(f"num_probes={self.num_probes} must be 0, for the exact divergence, or more")
        for metric in set(self.metrics) - set(OF_IMAGES):
            if self.num_samples < LEAST_SAMPLES[metric]:
                raise ValueError(f"num_samples={self.num_samples}: {metric} needs at least {LEAST_SAMPLES[metric]}")
        if not 0 <= self.seed <= 2**32 - self.num_samples - self.batch_size:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32) with room for {self.num_samples} samples")
        if self.dataset is None and set(self.metrics) != {"is"}:
            raise ValueError("dataset is missing: every metric but `is` compares with real images")
        if self.label_column is None and ("classify" in self.metrics or self.guidance_scale != 1):
            what = "classify" if "classify" in self.metrics else f"guidance_scale={self.guidance_scale}"
            raise ValueError(f"{what} needs the labels of the data: --label_column says where they are")
        if self.label_column is not None and self.dataset is None:
            raise ValueError("label_column needs a dataset, whose labels samples get")

    def of_model(self, pipe: Any) -> "Protocol":
        """With the number of steps that a distilled model states. Raises ValueError where it has no bound.

        It knows only the timesteps of its few steps, and the bound asks the network at all of them.
        """
        stated = scheduler.distilled_steps(pipe)
        if stated is None:
            return self
        if asked := [metric for metric in self.metrics if metric in OF_IMAGES]:
            raise ValueError(
                f"{asked[0]} asks the network at every timestep, and this model was distilled for those of {stated} "
                "steps; measure the one that it was distilled from"
            )
        return self if self.num_inference_steps else replace(self, num_inference_steps=stated)

    def split_for(self, metric: str) -> str:
        assert self.dataset is not None
        if data.is_image_folder(self.dataset):
            if self.split not in (None, "train"):
                raise ValueError(f"split={self.split!r}: the folder {self.dataset} has none; give another folder")
            return "train"
        return self.split or ("test" if metric in OF_IMAGES else "train")
