"""Two classifiers of Fashion-MNIST, trained here on its 60,000 training images, of different networks.

    python benchmarks/fashion/classifiers.py            # trains what is not kept yet: about ten minutes on two cores

`first` gives the features of the Fréchet distance, of precision and of recall too. Both are kept in the cache, by a
hash of what this file says of network and training and of PyTorch's version: a change of either trains them again. A
training is the same on the same machine and number of threads; on another, features differ by rounding that grew, and
distances by their scale: compare distances of one classifier alone, never with published ones.
"""

import hashlib
import inspect
import math
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ddpm_hf.data import Samples, default_cache_dir, load_samples

EPOCHS, BATCH, PEAK_RATE, SMOOTHING, LARGEST_SHIFT = 8, 128, 3e-3, 0.05, 1
NUM_CLASSES, BLOCK = 10, 500


class First(nn.Module):
    """Three convolutions with pooling between them, and a layer of 128 features."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if after < 128 else []
        hidden = [nn.Flatten(), nn.Linear(128 * 7 * 7, 128, bias=False), nn.BatchNorm1d(128), nn.GELU()]
        self.body = nn.Sequential(*layers, *hidden)
        self.head = nn.Linear(128, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """[B, 128] of images [B, 1, 28, 28] in [−1, 1]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Second(nn.Module):
    """Patches of 4 × 4 pixels as 64 channels, then three residual blocks with group normalization at 7 × 7."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(3)
        )  # fmt: skip
        self.head = nn.Sequential(nn.LayerNorm(7 * 7 * width), nn.Linear(7 * 7 * width, NUM_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.flatten(1))


class Classifier(NamedTuple):
    """A trained one, with its accuracy on the 10,000 test images."""

    name: str
    network: Any
    accuracy: float

    @torch.inference_mode()
    def classes(self, images: np.ndarray) -> np.ndarray:
        """The likeliest class of each image, uint8 [N, 28, 28] → int64 [N]."""
        return torch.cat([self.network(block).argmax(1) for block in in_blocks(images)]).numpy()

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Tensor:
        """float64 [N, 128] of images uint8 [N, 28, 28]; of `first` only."""
        return torch.cat([self.network.features(block) for block in in_blocks(images)]).double()


def in_blocks(images: np.ndarray) -> Iterator[Tensor]:
    for first in range(0, len(images), BLOCK):
        yield to_input(torch.tensor(images[first : first + BLOCK]))


def to_input(images: Tensor) -> Tensor:
    """uint8 [B, 28, 28] → float32 [B, 1, 28, 28] in [−1, 1]."""
    return images[:, None].float() / 127.5 - 1


@lru_cache
def fashion(split: str) -> Samples:
    """The 60,000 images of "train", or the 10,000 of "test", with their labels."""
    return load_samples("fashion_mnist", split=split, label_column="label")


@lru_cache
def real_images(split: str) -> np.ndarray:
    """uint8 [N, 28, 28]."""
    return fashion(split).array[:, 0]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, and the whole batch moved by up to a pixel each way."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, [LARGEST_SHIFT] * 4, value=-1.0)
    top, left = torch.randint(2 * LARGEST_SHIFT + 1, (2,), generator=generator).tolist()
    return padded[:, :, top : top + 28, left : left + 28]


def trained(network: nn.Module, name: str) -> Any:
    """The network, trained on the training split: AdamW, one cycle of its learning rate, smoothed labels."""
    images, truth = torch.tensor(real_images("train")), torch.tensor(fashion("train").labels)
    generator, steps = torch.Generator().manual_seed(0), len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * steps)
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    with tqdm(total=EPOCHS * steps, desc=f"training the {name} classifier", disable=None) as bar:
        for _ in range(EPOCHS):
            order = torch.randperm(len(images), generator=generator)
            for rows in order[: steps * BATCH].view(steps, BATCH):
                outputs = network(shifted(to_input(images[rows]), generator))
                loss = F.cross_entropy(outputs, truth[rows], label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return network.eval().requires_grad_(False)


def made(kind: type[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind()


@lru_cache
def classifiers() -> tuple[Classifier, Classifier]:
    """`first` and `second`, trained unless they are kept."""
    return kept_or_trained("first", made(First, 1)), kept_or_trained("second", made(Second, 2))


def kept_or_trained(name: str, network: nn.Module) -> Classifier:
    recipe = [inspect.getsource(part) for part in (type(network), trained, shifted, to_input)]
    recipe += [repr((EPOCHS, BATCH, PEAK_RATE, SMOOTHING, LARGEST_SHIFT)), torch.__version__]
    source = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    file = default_cache_dir() / "benchmarks" / f"fashion-{name}-{source}.safetensors"
    if not file.is_file():
        found = Classifier(name, trained(network, name), math.nan)
        accuracy = float((found.classes(real_images("test")) == fashion("test").labels).mean())
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, file, {"accuracy": repr(accuracy)})
    with safe_open(file, "pt") as opened:
        network.load_state_dict({key: opened.get_tensor(key) for key in opened.keys()})
        accuracy = float(opened.metadata()["accuracy"])
    return Classifier(name, network.eval().requires_grad_(False), accuracy)


def main() -> int:
    for classifier in classifiers():
        print(f"{classifier.name}: {classifier.accuracy:.4f} of the test images right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
