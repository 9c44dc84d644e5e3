"""The checkpoints that the demo page shows, and what it says of them before anything is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..hub import load_model
from ..inference import can_speed_up, speed_up
from ..pipeline_loading import DDPMPaperPipeline
from ..runs import grids_in, options_beside
from ..scheduler import paper_scheduler

DIGITS_LEVELS = 17
ANY_CLASS = "any"
FIRST_STEPS = 100


class Model(NamedTuple):
    """A pipeline that draws images with 1 or 3 channels, and the levels of the data it was trained on.

    about: what is known of it, as a sentence or two. finished: a grid of samples that its training drew, and what
    that is; None where the checkpoint's folder has none.
    """

    pipe: DDPMPaperPipeline
    num_levels: int
    about: str = ""
    finished: tuple[Image.Image, str] | None = None

    @property
    def process(self) -> Any:
        """Its scheduler as one of ours."""
        return paper_scheduler(self.pipe.scheduler)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.process.diffusion.num_timesteps

    @property
    def default_steps(self) -> int:
        """What a network was distilled for, else its chain's steps, at most 100: more take a minute."""
        return self.pipe.config.get("num_inference_steps") or min(self.process.chain().num_timesteps, FIRST_STEPS)

    @property
    def classes(self) -> dict[str, int | None]:
        """What can be asked for: the numbers of the classes by name, "any" for no label; empty without classes."""
        names: dict[str, int | None] = {name: number for number, name in self.pipe.classes.items()}
        unlabelled = ANY_CLASS if ANY_CLASS not in names else f"{ANY_CLASS} class"
        return names if self.pipe.null_class is None else {unlabelled: None, **names}


def load(
    checkpoints: Sequence[str],
    device: str,
    *,
    fast: bool = True,
    variant: str | None = None,
    read_bin: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Model]:
    """The models by the names that the page shows: a folder's own, or a repository's; sped up where `fast`.

    `variant`, `read_bin` and `trust_remote_code` are as in `hub.load_pipeline`. Raises ValueError for a checkpoint
    that cannot be shown: of points or of other channels than 1 or 3, or with the name of another one.
    """
    models: dict[str, Model] = {}
    for checkpoint in checkpoints:
        name = checkpoint_name(checkpoint)
        if name in models:
            raise ValueError(f"two checkpoints are called {name}; rename the folder of one")
        pipe, _ = load_model(checkpoint, None, variant=variant, read_bin=read_bin, trust_remote_code=trust_remote_code)
        shape = pipe.sample_shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            kind = "points" if len(shape) == 1 else f"images of {shape[0]} channels"
            raise ValueError(f"the page shows images of 1 or 3 channels; {checkpoint} draws {kind}")
        finished, parameters = finished_samples(checkpoint), pipe.unet.num_parameters()
        pipe.to(device)
        if fast and can_speed_up(pipe):
            pipe = speed_up(pipe, release=True)
        pipe.set_progress_bar_config(disable=True)
        models[name] = Model(pipe, num_levels(checkpoint, shape), about(checkpoint, parameters, shape), finished)
    return models


def checkpoint_name(checkpoint: str) -> str:
    """A folder's own name, or a repository's whole one."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def num_levels(checkpoint: str, sample_shape: tuple[int, ...]) -> int:
    """17 for a model of the digits, else 256: by the run's options, else by the size of its images."""
    options = options_beside(checkpoint)
    is_digits = options.get("dataset_name") == "digits" if options else sample_shape == (1, 8, 8)
    return DIGITS_LEVELS if is_digits else 256


def newest_grid(checkpoint: str) -> tuple[int, Path] | None:
    """The step and the file of the newest grid that training drew with the averaged weights."""
    step = next((step for step, kinds in grids_in(Path(checkpoint)) if "ema" in kinds), None)
    return None if step is None else (step, Path(checkpoint) / "samples" / f"step-{step}-ema.png")


def about(checkpoint: str, num_parameters: int, sample_shape: tuple[int, ...]) -> str:
    """What the model draws, and on what and for how many steps it was trained where the run's records say it."""
    channels, height, width = sample_shape
    kind = "colour" if channels == 3 else "grey"
    text = f"Draws {height} × {width} images in {kind}; {num_parameters:,} parameters."
    options, grid = options_beside(checkpoint), newest_grid(checkpoint)
    data = "a folder of images" if options.get("train_data_dir") else options.get("dataset_name")
    steps = "" if grid is None else f", for {grid[0]:,} steps"
    return f"{text} Trained on {data}{steps}." if data else text


def finished_samples(checkpoint: str) -> tuple[Image.Image, str] | None:
    """The newest grid that training drew with the averaged weights, and its caption."""
    grid, options = newest_grid(checkpoint), options_beside(checkpoint)
    if grid is None:
        return None
    with Image.open(grid[1]) as opened:
        picture = opened.convert("RGB")
    seeds = f"seeds 0 to {options['num_samples'] - 1}" if "num_samples" in options else "the first seeds"
    in_turn = ", its classes in turn" if options.get("label_column") else ""
    return picture, f"Finished samples: {seeds}, not selected{in_turn}"
