"""Held-out data while a run trains: which samples they are, and what the averaged weights make of them.

Where the bound of held-out samples rises while that of training samples goes on falling, the network memorises.
Which samples are held out, which are evaluated, and their t and noise depend on the data alone: neither on the run's
seed nor on the step, so that runs and steps can be compared, and nothing is taken from the stream of training.
"""

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..data import Samples, to_model_range
from ..likelihood import bits_per_dim
from ..randomness import keyed_generator, normal
from ..scheduler import DDPMPaperScheduler, GaussianDiffusion
from ..unet import evaluation_mode
from .networks import output_of
from .options import TrainingOptions
from .records import some_names
from .setup import load_data
from .state import TrainingState

logger = logging.getLogger(__name__)

SEED = 0  # of everything here; not the run's
BOUND_TERMS, SIMPLE_DRAWS = 12, 4  # evaluations of the network per sample: terms of the bound, and pairs of t and ε
NUM_GROUPS = 8  # of held-out samples, whose means say how certain a change of the bound is
_SAMPLES_PER_PIECE = 16  # of which each process takes its share
_SAMPLES_PER_TASK = 1024


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of a data set, by their indices, int64."""

    samples: Samples
    indices: np.ndarray

    def labels(self, rows: slice) -> Tensor | None:
        """The classes of some of them, int64; None where samples have no labels."""
        return None if self.samples.labels is None else torch.from_numpy(self.samples.labels[self.indices[rows]])


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a run keeps from training, and what it is evaluated on.

    rows: int64, the indices of the samples to train on, ascending; None for all.
    parts: the samples to evaluate, by "held_out" and "train"; empty where nothing is evaluated.
    identity: changes with the samples in `parts`.
    """

    rows: np.ndarray | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    identity: str = ""


# ---- which samples -------------------------------------------------------------------------------------------------


def content_keys(samples: Samples, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """A hash of each sample's values, uint64 [N]: equal samples have equal keys, wherever they stand.

    Samples are read one after the other by all cores, so a memory-mapped array needs no memory.
    """
    wanted = np.arange(len(samples)) if indices is None else np.asarray(indices)

    def keys(chosen: np.ndarray) -> list[int]:
        rows = (np.ascontiguousarray(samples.array[i]).reshape(-1) for i in chosen)
        digests = (hashlib.blake2b(row.data, digest_size=8, person=b"held out") for row in rows)
        return [int.from_bytes(digest.digest(), "little") for digest in digests]

    tasks = [wanted[first : first + _SAMPLES_PER_TASK] for first in range(0, len(wanted), _SAMPLES_PER_TASK)]
    with ThreadPoolExecutor() as workers:
        return np.array([key for part in workers.map(keys, tasks) for key in part], dtype=np.uint64)


def is_held_out(samples: Samples, every: int) -> np.ndarray:
    """Which samples `held_out_every` keeps from training, bool [N]: those whose content key is a multiple of it."""
    return content_keys(samples) % np.uint64(every) == 0


def hold_out(options: TrainingOptions, accelerator: Accelerator, samples: Samples) -> HeldOut | None:
    """What is held out of `samples`, or given beside them, by the options, None for nothing; called by all processes.

    With `held_out_every` K these are the samples whose content key is a multiple of K: about one in K, equal ones all
    or none of them, and the same in every run, however many samples are added. Given ones that are also trained on are
    named in a warning. Raises ValueError where either side is left without samples, or given ones are of another
    shape, and what `load_samples` raises.
    """
    if options.held_out_every is not None:
        every = options.held_out_every
        chosen = _of_main(accelerator, lambda: is_held_out(samples, every))
        rows, held_out = np.flatnonzero(~chosen), Part(samples, np.flatnonzero(chosen))
        if not len(rows) or not len(held_out.indices):
            raise ValueError(
                f"--held_out_every={options.held_out_every} holds out {len(held_out.indices):,} of the "
                f"{len(samples):,} samples of {samples.name}; both sides need some: choose another number, or give "
                "held-out samples by --eval_data_dir or --eval_split"
            )
        logger.info("%s of %s samples are held out, %s are trained on",
                    *(f"{count:,}" for count in (len(held_out.indices), len(samples), len(rows))))  # fmt: skip
    elif options.eval_every:
        with accelerator.main_process_first():  # the others read what the first cached
            given = load_given(options)
        require_same_kind(given, samples)
        rows, held_out = None, Part(given, np.arange(len(given)))
        if overlap := _of_main(accelerator, lambda: overlap_found(given, samples)):
            logger.warning(overlap)
    else:
        return None
    if not options.eval_every:
        return HeldOut(rows)
    trained_on = np.arange(len(samples)) if rows is None else rows
    parts = {
        "held_out": Part(held_out.samples, some_of(held_out.indices, options.eval_samples)),
        "train": Part(samples, some_of(trained_on, options.eval_samples)),
    }
    keys = [content_keys(part.samples, part.indices) for part in parts.values()]
    return HeldOut(rows, parts, hashlib.sha256(b"|".join(key.tobytes() for key in keys)).hexdigest()[:8])


def some_of(indices: np.ndarray, count: int) -> np.ndarray:
    """`count` of the indices, or all where there are fewer, drawn once and for all; ascending."""
    order = keyed_generator(SEED, "samples evaluated").permutation(len(indices))
    return np.sort(indices[order[:count]])


def load_given(options: TrainingOptions) -> Samples:
    """The samples of `eval_data_dir` or `eval_split`, read as those that are trained on."""
    other = copy.copy(options)
    if options.eval_label_column is not None:
        other.label_column = options.eval_label_column
    if options.eval_data_dir is not None:
        other.dataset_name, other.train_data_dir, other.dataset_split = None, options.eval_data_dir, "train"
        other.dataset_config = other.image_column = None
    else:
        other.dataset_split = str(options.eval_split)
    try:
        return load_data(other)
    except ValueError as error:
        if options.label_column is None or "label_column" not in str(error):
            raise
        raise ValueError(f"held-out data: {error}; --eval_label_column says where theirs are") from error


def require_same_kind(held_out: Samples, samples: Samples) -> None:
    """Raises ValueError unless a network for `samples` takes the held-out ones, and their levels mean the same."""
    if held_out.label_names != samples.label_names:
        names = [some_names(each.label_names) for each in (held_out, samples)]
        differing = sorted(set(held_out.label_names) ^ set(samples.label_names))
        how = f", and differ in {some_names(differing)}" if differing else ", in one order"
        raise ValueError(
            f"the held-out samples of {held_out.name} have the classes {names[0]}, those of {samples.name}, which are "
            f"trained on, {names[1]}; both must have the same{how}"
        )
    kinds = [f"{each.sample_shape} with {each.num_levels} levels" for each in (held_out, samples)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the held-out samples of {held_out.name} are {kinds[0]}, those of {samples.name}, which are trained on, "
            f"are {kinds[1]}; both must be alike: --resolution N brings images to one size"
        )


def overlap_found(held_out: Samples, samples: Samples) -> str | None:
    """A line that says how many held-out samples have the values of one that is trained on; None where none has."""
    also_trained_on = np.flatnonzero(np.isin(content_keys(held_out), content_keys(samples)))
    if not len(also_trained_on):
        return None
    first = int(also_trained_on[0])
    name = held_out.names[first] if held_out.names else f"sample {first}"
    return (
        f"{len(also_trained_on):,} of the {len(held_out):,} held-out samples are also trained on, with equal values, "
        f"the first of them {name}: measured on them memorising looks like progress; take them out of one of the two"
    )


def _of_main(accelerator: Accelerator, compute: Any) -> Any:
    """What the main process computes, on every process: data are read once, not by each."""
    return broadcast_object_list([compute() if accelerator.is_main_process else None])[0]


# ---- what is measured ----------------------------------------------------------------------------------------------


@torch.no_grad()
def simple_losses(
    unet: Any,
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    *,
    first_index: int,
    class_labels: Tensor | None = None,
) -> Tensor:
    """L_simple (Eq. 14) of each sample, from one t of each quarter of the process: [B] float64, on the CPU.

    t and ε are keyed by the sample's index, which for x_start[0] is `first_index`. x_start [B, ...] in [−1, 1], or
    points, on the network's device. Of a network with a learned variance, which L_simple does not train, the first
    half of the output counts. `class_labels` [B] are given to a conditional network.
    """
    conditions = {} if class_labels is None else {"class_labels": class_labels}
    indices = range(first_index, first_index + len(x_start))
    quantiles = np.stack([keyed_generator(SEED, "evaluation t", 0, i).random(SIMPLE_DRAWS) for i in indices])
    t_bs = ((quantiles + np.arange(SIMPLE_DRAWS)) / SIMPLE_DRAWS * diffusion.num_timesteps).astype(np.int64)
    total = torch.zeros(len(x_start), dtype=torch.float64)
    for draw in range(SIMPLE_DRAWS):
        t = torch.from_numpy(t_bs[:, draw]).to(x_start.device)
        noise = normal(SEED, "evaluation noise", draw, indices, tuple(x_start.shape[1:])).to(x_start.device)
        x_t = diffusion.q_sample(x_start, t, noise)
        output = output_of(unet, x_t, t, conditions)[:, : x_t.shape[1]]
        total += (output - diffusion.target(x_start, x_t, t, noise)).square().flatten(1).mean(dim=1).double().cpu()
    return total / SIMPLE_DRAWS


def evaluate(
    accelerator: Accelerator,
    state: TrainingState,
    scheduler: DDPMPaperScheduler,
    parts: Mapping[str, Part],
    *,
    batch_size: int,
    num_terms: int = BOUND_TERMS,
) -> dict[str, Tensor]:
    """L_simple and the variational bound of every sample of `parts`, with the averaged weights: [2, N] float64 each.

    Called by all processes, which share the samples and all get the result. Samples with labels are evaluated given
    theirs. The bound, in bits/dim (for points of a density), is estimated without bias from `num_terms` terms
    (`likelihood.bits_per_dim`). Nothing of it depends on the step or on what was drawn before; `batch_size`, the most
    that the network sees at once, and the number of processes count for the rounding of kernels only.
    """
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    size = min(_SAMPLES_PER_PIECE, batch_size)
    pieces = [(name, first) for name, part in parts.items() for first in range(0, len(part.indices), size)]
    values = {name: torch.zeros(2, len(part.indices), dtype=torch.float64) for name, part in parts.items()}
    with state.ema_weights(), evaluation_mode(state.unet):
        for name, first in pieces[rank::world_size]:
            samples, chosen = parts[name].samples, parts[name].indices[first : first + size]
            labels = parts[name].labels(slice(first, first + size))
            x_start = to_model_range(samples.batch(chosen).to(device), samples.num_levels)
            own = values[name][:, first : first + len(chosen)]
            own[0] = simple_losses(state.unet, scheduler.diffusion, x_start, first_index=first, class_labels=labels)
            own[1] = bits_per_dim(
                state.unet,
                scheduler,
                x_start,
                seed=SEED,
                clip_denoised=scheduler.clip_denoised(),
                num_levels=samples.num_levels,
                num_timesteps_subset=min(num_terms, len(scheduler)),
                batch_size=batch_size,
                first_index=first,
                class_labels=labels,
            ).total_b
    if world_size > 1:  # each has zeros where others have values, so that the sums are exact
        gathered: Any = {name: accelerator.reduce(own.to(device), reduction="sum") for name, own in values.items()}
        values = {name: own.cpu() for name, own in gathered.items()}
    return values


def network_samples(parts: Mapping[str, Part], num_timesteps: int) -> int:
    """How many samples the network sees in one `evaluate`, each as often as it is seen."""
    return sum(len(part.indices) for part in parts.values()) * (SIMPLE_DRAWS + min(BOUND_TERMS, num_timesteps))


def numbers_of(values: Mapping[str, Tensor], identity: str) -> dict[str, Any]:
    """The means of what `evaluate` returned, as they stand in metrics.jsonl.

    `held_out_bpd_groups` has the means of eight groups of held-out samples, always the same: two evaluations differ
    by more than chance where most groups do.
    """
    means = {name: own.mean(dim=1).tolist() for name, own in values.items()}
    groups = [values["held_out"][1, i::NUM_GROUPS] for i in range(NUM_GROUPS)]
    return {
        **{f"{name}_l_simple": l_simple for name, (l_simple, _) in means.items()},
        **{f"{name}_bpd": bpd for name, (_, bpd) in means.items()},
        "held_out_bpd_groups": [round(float(group.mean()), 6) for group in groups if len(group)],
        "evaluated_on": identity,
    }
