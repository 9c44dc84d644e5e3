"""What all measurements share: two trained networks, their answers at every t, samples, and how errors are estimated.

Whatever takes long is kept in a folder of work, so that a run that was stopped goes on where it was.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from digits_quality import drawn, seed_ranges
from safetensors import safe_open
from safetensors.torch import save_file
from speed.networks import DIGITS, ROOT
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, GaussianDiffusion
from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.inference import speed_up
from ddpm_hf.likelihood import prior_bpd, vb_terms_bpd
from ddpm_hf.pipeline_ddpm_paper import seeded_generators

FIRST, SECOND = "first", "second"  # trainings of the same recipe from the seeds 0 and 1
YOUNG = "young"  # one that was stopped early
NUM_RANGES, RANGE_SIZE = 6, 256  # of seeds, for samples
NUM_IMAGES = {FIRST: {"test": 360, "train": 128}, SECOND: {"test": 128, "train": 64}}  # asked about at every t
ANSWERS_SEED = 0


class Answers(NamedTuple):
    """A network's output about every image at every t, from which the bound of any chain follows without it.

    x_start: [N, C, H, W] in [−1, 1], float64. outputs: [T, N, C, H, W], float32.
    """

    x_start: Tensor
    outputs: Tensor

    def noise(self, t: int) -> Tensor:
        """The ε of x_t, the same for every network: [N, C, H, W], float64."""
        return noise_at(t, self.x_start.shape)


def noise_at(t: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * ANSWERS_SEED + t)
    return torch.randn(tuple(shape), generator=generator).double()


def ask(unet: Any, diffusion: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """The network's output at every t, with one draw of x_t for each image: [T, N, C, H, W], float32."""
    found = []
    with torch.no_grad():
        for t in range(diffusion.num_timesteps):
            x_t = diffusion.q_sample(x_start, t, noise_at(t, x_start.shape)).float()
            found.append(unet(x_t, torch.full((len(x_t),), t)).sample.float())
    return torch.stack(found)


def bound_terms(
    answers: Answers, chain: GaussianDiffusion, *, clip: bool | Callable[[Tensor], Tensor] = True, num_levels: int = 17
) -> Tensor:
    """Each image's terms of the bound of a chain, without L_T: [N, K] in bits/dim."""
    x_start, columns = answers.x_start, []
    for index, t in enumerate(chain.timesteps.tolist()):
        x_t = chain.q_sample(x_start, index, answers.noise(t))
        at = torch.full((len(x_start),), index)
        output = answers.outputs[t].double()
        columns.append(vb_terms_bpd(chain, output, x_start, x_t, at, clip_denoised=clip, num_levels=num_levels))
    return torch.stack(columns, dim=1)


def bound(
    answers: Answers, chain: GaussianDiffusion, *, clip: bool | Callable[[Tensor], Tensor] = True, num_levels: int = 17
) -> Tensor:
    """Each image's bound under a chain: [N] in bits/dim."""
    terms = bound_terms(answers, chain, clip=clip, num_levels=num_levels)
    return prior_bpd(chain, answers.x_start) + terms.sum(dim=1)


def x_start_mse(answers: Answers, diffusion: GaussianDiffusion) -> np.ndarray:
    """Mean squared error per dimension of the clipped x̂_0 at every t, by which variances are fitted: [T]."""
    found = []
    for t in range(diffusion.num_timesteps):
        x_t = diffusion.q_sample(answers.x_start, t, answers.noise(t))
        guess = diffusion.predict_x_start(answers.outputs[t].double(), x_t, t).clamp(-1, 1)
        found.append((guess - answers.x_start).square().mean().item())
    return np.array(found)


def end_of(pipe: DDPMPaperPipeline, x_t: Tensor, scheduler: Any, from_timestep: int | None = None) -> Tensor:
    """x_0 from x_t, by the noise of the seeds 0, 1, … that follows x_T."""
    generators = seeded_generators(range(len(x_t)))
    x = x_t
    for step in pipe.reverse_process(x_t, generator=generators, scheduler=scheduler, from_timestep=from_timestep):
        x = step.x
    return x


# ---- estimates -----------------------------------------------------------------------------------------------------


def estimate(values: Any) -> dict[str, float]:
    """The mean of independent values with its standard error, as it is kept in JSON."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    return {"value": float(array.mean()), "error": float(array.std(ddof=1) / math.sqrt(len(array)))}


def bootstrapped(statistic: Callable[[np.ndarray], float], num_rows: int, times: int = 200) -> dict[str, float]:
    """A statistic of all rows, and its deviation over `times` draws of as many rows with replacement."""
    rng = np.random.default_rng(0)
    again = [statistic(rng.integers(num_rows, size=num_rows)) for _ in range(times)]
    return {"value": float(statistic(np.arange(num_rows))), "error": float(np.std(again, ddof=1))}


# ---- the laboratory ------------------------------------------------------------------------------------------------


class Lab:
    """Data, networks and what they were asked, loaded or made when first needed."""

    def __init__(self, work: Path):
        self.work = work
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def splits(self) -> dict[str, Samples]:
        return {split: load_samples("digits", split=split) for split in ("train", "test")}

    def images(self, split: str, count: int | None = None) -> Tensor:
        """The first images of a split, in [−1, 1]: [N, 1, 8, 8], float64."""
        samples = self.splits[split]
        return to_model_range(samples.batch(range(count or len(samples))), samples.num_levels).double()

    @cached_property
    def first(self) -> DDPMPaperPipeline:
        return DDPMPaperPipeline.from_pretrained(DIGITS)

    @cached_property
    def pipes(self) -> dict[str, DDPMPaperPipeline]:
        """The checkpoint of the repository, and one trained alike from other initial weights and other batches."""
        second = self.work / "second"
        if not (second / "model_index.json").exists():
            train(["--seed=1", f"--output_dir={second}", "--log_every=1"], self.work / "second.log")
        found = {FIRST: self.first, SECOND: DDPMPaperPipeline.from_pretrained(second)}
        for pipe in found.values():
            pipe.set_progress_bar_config(disable=True)
            pipe.unet.eval()
        return found

    @cached_property
    def fast(self) -> dict[str, DDPMPaperPipeline]:
        return {name: speed_up(pipe) for name, pipe in self.pipes.items()}

    def add(self, name: str, unet: Any) -> None:
        """Another network, to draw `samples` with."""
        self.fast[name] = speed_up(DDPMPaperPipeline(unet, self.scheduler()))
        self.fast[name].set_progress_bar_config(disable=True)

    def diffusion(self, **changes: Any) -> GaussianDiffusion:
        return self.scheduler(**changes).diffusion

    def scheduler(self, **changes: Any) -> DDPMPaperScheduler:
        """That of both networks, with changes of its configuration."""
        found: Any = DDPMPaperScheduler.from_config(self.first.scheduler.config, **changes)
        return found

    def answers(self, name: str, split: str) -> Answers:
        x_start = self.images(split, NUM_IMAGES[name][split])
        outputs = self.kept(f"answers-{name}-{split}.safetensors", lambda: self._asked(name, x_start))
        return Answers(x_start, outputs)

    def _asked(self, name: str, x_start: Tensor) -> Tensor:
        return ask(self.fast[name].unet, self.diffusion(), x_start)

    def samples(self, name: str, steps: int, **changes: Any) -> list[np.ndarray]:
        """Samples of six ranges of seeds, [256, 64] each on the scale 0 … 16."""
        label = "-".join([name, str(steps), *(f"{key}={value}" for key, value in sorted(changes.items()))])
        kept = self.kept(f"samples-{label}.safetensors", lambda: self._drawn(name, steps, changes))
        return [images.numpy() for images in kept]

    def _drawn(self, name: str, steps: int, changes: dict[str, Any]) -> list[Tensor]:
        pipe = DDPMPaperPipeline(self.fast[name].unet, self.scheduler(**changes))
        pipe.set_progress_bar_config(disable=True)
        return [torch.from_numpy(drawn(pipe, seeds, steps)) for seeds in seed_ranges(NUM_RANGES, RANGE_SIZE)]

    def kept(self, file: str, make: Callable[[], Any]) -> Any:
        """What `file` in the folder of work holds, made first where it is not there."""
        path = self.work / file
        if not path.exists():
            partial = path.with_suffix(".partial")
            tensors: dict[str, Tensor] = {}
            tree = json.dumps(_without_tensors(make(), tensors))
            save_file(tensors, partial, {"tree": tree})
            partial.rename(path)
        with safe_open(path, "pt") as file:
            return _with_tensors(json.loads(file.metadata()["tree"]), file.get_tensor)


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Dicts, lists and numbers as JSON has them, with {"tensor": name} for each tensor, which goes to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _without_tensors(own, tensors) for key, own in value.items()}
    return [_without_tensors(own, tensors) for own in value] if isinstance(value, list) else value


def _with_tensors(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"}:
            return tensor(tree["tensor"])
        return {key: _with_tensors(own, tensor) for key, own in tree.items()}
    return [_with_tensors(own, tensor) for own in tree] if isinstance(tree, list) else tree


def train(options: Sequence[str], log: Path, launcher: Sequence[str] = ()) -> None:
    """Run training/train.py by the recipe of the digits, changed by `options`; a failure ends this program."""
    command = [sys.executable, *launcher, "training/train.py", "--cpu_threads=1", "--sample_every=0", *options]
    with log.open("w") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode
    if code:
        sys.exit(f"training failed:\n{log.read_text()[-3000:]}")
