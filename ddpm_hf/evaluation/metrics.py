"""FID, IS, KID and FD-DINOv2: features of images, and statistics of features (the Fréchet distance: `frechet.py`).

The two halves are apart so that no result depends on how many processes made the images. An extractor computes the
features of each image, once, wherever the image is; the statistics then come from one process that reads all features
in the order of the images. They see feature batches alone, as a stream: never an image.
"""

import importlib
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..machine import is_module_and_name, object_named
from ..randomness import keyed_seed
from .features import Stream, two_streams
from .frechet import frechet_distance as frechet_distance

FULL_NUM_SAMPLES = 50_000  # of the paper's protocol
KERNEL_SUBSETS = 100  # KID's subsets and IS's splits are those of the published values
SCORE_SPLITS = 10
DINOV2_SIDE = 224


def metric_name(metric: str, num_samples: int) -> str:
    """What to call a metric of `num_samples` samples: "FID" from 50,000 on, and below with the number.

    Whole thousands are written with a k, all other numbers out: 5,000 is "FID-5k", 500 "FID-500", 2,048 "FID-2048".
    Fewer samples give another, larger FID, so the two must not share a name. Raises ValueError below one sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if num_samples >= FULL_NUM_SAMPLES:
        return metric
    return f"{metric}-{num_samples // 1000}k" if num_samples % 1000 == 0 else f"{metric}-{num_samples}"


def _imported(module: str) -> Any:
    """The module. Raises ValueError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{module} cannot be imported ({error}): pip install "ddpm_hf[eval]"') from error


def require_packages() -> None:
    """Raises ValueError where what the statistics need is not installed."""
    for module in ("inception", "kid"):
        _imported(f"torchmetrics.image.{module}")


# ---- extractors ----------------------------------------------------------------------------------------------------


class Extractor(nn.Module):
    """Images → features. Subclasses set `name`, which goes into the protocol of a result, and define `extract`.

    Always in evaluation mode and without gradients, so that an image's features do not depend on its batch.
    """

    name: str

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """What `forward` returns, for images uint8 [B, 3, H, W]."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The float32 "features" [B, D] and, from a classifier, "logits" [B, K] of images, uint8 [B, C, H, W].

        Grey images (C = 1) are repeated to three channels. Raises ValueError for any other dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images is {images.dtype} {list(images.shape)}; it must be uint8 [B, 1 or 3, H, W]")
        return {key: value.float() for key, value in self.extract(images.expand(-1, 3, -1, -1)).items()}

    def train(self, mode: bool = True) -> "Extractor":
        return super().train(False)


class InceptionExtractor(Extractor):
    """torch-fidelity's InceptionV3, with the weights and the resizing of the TensorFlow graph of published FIDs.

    "features" are the 2048 pooled ones; "logits" the 1008 without the last bias, as the Inception Score takes them.
    The weights are downloaded on first use. Raises ValueError where torch-fidelity cannot be imported.
    """

    def __init__(self) -> None:
        super().__init__()
        fidelity = _imported("torch_fidelity")
        self.name = f"inception-v3-compat (torch-fidelity {fidelity.__version__})"
        self.network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(images)
        return {"features": features, "logits": logits}


class Dinov2Extractor(Extractor):
    """DINOv2's class token: FD-DINOv2 as Stein et al. (2023) and their code dgm-eval define it, for ViT-L/14.

    Images are resized to 224 × 224 by Pillow's bicubic filter, which averages when it shrinks and rounds to 8 bits,
    and normalised with ImageNet's mean and deviation. (Resizing floats in torch differs by up to 25 levels on noise.)

    Args:
        model: a checkpoint's name or path, or a `Dinov2Model`, which the extractor keeps and changes.

    Raises ValueError where transformers cannot be imported.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module | str = "facebook/dinov2-large") -> None:
        super().__init__()
        transformers = _imported("transformers")
        if isinstance(model, str):
            model = transformers.Dinov2Model.from_pretrained(model, dtype=torch.float32)
        self.model: Any = model
        self.name = f"{self.model.name_or_path or 'Dinov2Model'} (transformers {transformers.__version__})"
        self._fit_positions()
        for name, levels in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(levels).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def _fit_positions(self) -> None:
        """Interpolate the position embeddings to 224 × 224 as DINOv2's own code does.

        It adds 0.1 patches to the size it scales by; transformers does not, and gives other features.
        """
        table = self.model.embeddings.position_embeddings
        side, patches = math.isqrt(table.shape[1] - 1), DINOV2_SIDE // self.model.config.patch_size
        if side == patches:
            return
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, scale_factor=(patches + 0.1) / side, mode="bicubic")
        fitted = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        self.model.embeddings.position_embeddings = nn.Parameter(fitted)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        size = (DINOV2_SIDE, DINOV2_SIDE)
        arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
        resized = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in arrays])
        pixels = torch.from_numpy(resized).to(self.mean.device).permute(0, 3, 1, 2) / 255
        return {"features": self.model((pixels - self.mean) / self.std).pooler_output}


def load_extractor(name: str) -> nn.Module:
    """The extractor called "inception" or "dinov2", or what the factory "package.module:factory" returns.

    A factory takes no arguments; its module has a `name` and the `forward` of `Extractor`, its best base class.
    Raises ValueError for an unknown name, and a factory that cannot be found or returns something else.
    """
    known = {"inception": InceptionExtractor, "dinov2": Dinov2Extractor}
    if name in known:
        return known[name]()
    if not is_module_and_name(name):
        raise ValueError(f"extractor {name!r} must be one of {', '.join(known)}, or 'package.module:factory'")
    factory = object_named(name, "extractor")
    try:
        extractor = factory()
    except TypeError as error:
        raise ValueError(f"extractor {name!r} cannot be made: {error}") from error
    if not isinstance(extractor, nn.Module) or not isinstance(getattr(extractor, "name", None), str):
        raise ValueError(
            f"extractor {name!r} gave a {type(extractor).__name__}; it must be a torch module with a name"
        )
    return extractor.requires_grad_(False).eval()


# ---- statistics ----------------------------------------------------------------------------------------------------


class _AsGiven(nn.Identity):
    """The extractor to give torchmetrics, whose metrics start from images, where features exist already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _metric(module: str, class_name: str, **options: Any) -> Any:
    """A metric of torchmetrics, for this process alone: by itself it would wait for the others."""
    metric_class = getattr(_imported(f"torchmetrics.image.{module}"), class_name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        return metric_class(sync_on_compute=False, **options)


def _computed(metric: Any, seed: int, purpose: str) -> tuple[float, float]:
    """Mean and deviation; the metric draws from torch's global generator, here seeded and then as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(seed, purpose))  # torch.manual_seed would seed GPUs as well
        mean, std = metric.compute()
    return float(mean), float(std)


def kernel_distance(
    samples: Iterable[Tensor], reference: Iterable[Tensor], *, seed: int, subset_size: int = 1000
) -> tuple[float, float]:
    """KID: the squared MMD with kernel (xᵀy / D + 1)³ (Bińkowski et al. 2018), as mean and deviation over 100 subsets.

    Both are streams of batches, float [B, D], read once and kept, in float64: 0.8 GB per 50,000 of 2048 features, and
    twice that while computing. Each subset draws `subset_size` of either without replacement, by `seed` and the order
    of the stream; the estimate is unbiased, so may be negative. The deviation is that of a subset's estimate, and no
    standard error of the mean, which `kernel_distance_error` is.

    Raises ValueError for fewer samples than `subset_size`, which must be at least 2, and for features that are not
    finite or differ in D.
    """
    if subset_size < 2:
        raise ValueError(f"subset_size={subset_size} must be at least 2")
    streams = two_streams(samples, reference, minimum=subset_size)
    metric = _metric(
        "kid",
        "KernelInceptionDistance",
        feature=_AsGiven(streams[0].width),
        subsets=KERNEL_SUBSETS,
        subset_size=subset_size,
    )
    for stream in streams:
        for block in stream.rows():
            metric.update(block, real=stream.argument == "reference")
    return _computed(metric, seed, "kernel distance")


def inception_score(logits: Iterable[Tensor], *, seed: int) -> tuple[float, float]:
    """IS: exp E[KL(p(y | x) ‖ p(y))] (Salimans et al. 2016), as mean and deviation over ten splits.

    `logits` is a stream of batches, float [B, K], read once and kept, in float64. They are shuffled by `seed` and
    their order, and cut into ten splits, of which the last may be smaller. The deviation is over 10, as in
    published scores, not over 9 as torchmetrics has it.

    Raises ValueError for fewer than 100 samples, of which torchmetrics might make fewer than ten splits, and for
    logits that are not finite or differ in K.
    """
    stream = Stream(logits, "logits", minimum=SCORE_SPLITS**2)
    metric = _metric("inception", "InceptionScore", feature=_AsGiven(stream.width), splits=SCORE_SPLITS)
    for block in stream.rows():
        metric.update(block)
    mean, std = _computed(metric, seed, "inception score")
    return mean, std * math.sqrt((SCORE_SPLITS - 1) / SCORE_SPLITS)
