"""Algorithm 2 of Ho et al. 2020 (arXiv 2006.11239) as a diffusers pipeline.

First the algorithm; then the schedulers, sizes and classes it is asked with, and saving; last what is refused. This
file is copied into checkpoints, beside the two it imports.
"""

import ast
import copy
import functools
import inspect
import json
import logging
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .scheduler.scheduling_ddpm_paper import DDPMPaperScheduler, known_prediction
from .unet.unet_ddpm_paper import DDPMPaperMLP, DDPMPaperUNet, evaluation_mode

logger = logging.getLogger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Classes whose code a checkpoint carries → the file's name there.
CARRIED = {
    "DDPMPaperUNet": "unet_ddpm_paper",
    "DDPMPaperMLP": "unet_ddpm_paper",
    "DDPMPaperScheduler": "scheduling_ddpm_paper",
}
PIPELINE_MODULES = ("pipeline", "pipeline_ddpm_paper", "pipeline_loading")  # of its class, the first as carried
# The files of a saved pipeline, all that `push_to_hub` uploads; `*` stays within one folder.
PIPELINE_FILES = (
    *("README.md", "model_index.json", "pipeline.py", "unet/config.json", "unet/unet_ddpm_paper.py"),
    *("unet/diffusion_pytorch_model*.safetensors", "unet/diffusion_pytorch_model.safetensors.index*.json"),
    *("unet/own_*.py", "scheduler/scheduler_config.json", "scheduler/scheduling_ddpm_paper.py"),
)
Generators = torch.Generator | list[torch.Generator] | None
ClassLabels = str | int | Sequence[str | int | None] | Tensor | None


@dataclass
class ReverseStep:
    """One step of Algorithm 2, from x_t to x_{t−1}; tensors [B, ...] in float32, as the chain has them.

    t: the timestep at which the network was asked, 0-based (some of diffusers' solvers ask at fractions).
    x_t: what it was asked about (x in a solver's own scale where it has one).
    model_output: what it answered.
    x_start: x̂_0(x_t, t), clipped as the scheduler clips it; None from a solver that does not say.
    x: x_{t−1} (in a respaced chain, x at its next lower timestep), x_0 after the last step. The chain goes on from
        what is assigned here.
    next_t: where it goes on, None after the last step. With a `DDPMPaperScheduler` another timestep of the chain may
        be assigned, also a higher one, for an x that was noised again.
    """

    t: Any
    x_t: Tensor
    model_output: Tensor
    x_start: Any
    x: Tensor
    next_t: Any = None


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed: an image's noise then depends on its seed alone, whatever its batch or device.

    Seeds are integers in [0, 2³²): PyTorch's CPU generator looks at the low 32 bits only, so larger ones would
    silently repeat. Raises ValueError.
    """
    listed = hasattr(seeds, "__getitem__") and not isinstance(seeds, bytes | Mapping)
    _check(listed, f"seeds must be a list of integers, one per sample, got {seeds!r}")
    for seed in seeds:
        _check(_is_whole(seed, 0, 2**32 - 1), f"seeds must be integers in [0, 2**32), got {seed!r}")
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


class DDPMPaperPipeline(DiffusionPipeline):
    """Sampling from a DDPM (Algorithm 2): images, or points in R^d.

    Args:
        unet: ε_θ, a `DDPMPaperUNet`, `DDPMPaperMLP`, or a diffusers `UNet2DModel`, with or without classes; or any
            `ModelMixin` with `in_channels` and `sample_size` in its config, and `.sample` in what (x, t) gives.
        scheduler: a `DDPMPaperScheduler`, or any diffusers scheduler built from its configuration.
        id2label: the names of a conditional network's classes, by their numbers; saved in model_index.json.
        num_inference_steps: reverse steps of a call that gives no number, as of a network distilled for so many; saved
            there too.

    x_t is float32 throughout, also when the network runs in half precision.

    A saved pipeline carries its code, `pipeline.py`, `unet/unet_ddpm_paper.py` and
    `scheduler/scheduling_ddpm_paper.py`, beside the weights. `DiffusionPipeline.from_pretrained(x,
    trust_remote_code=True)` runs it where `ddpm_hf` is not installed; `ddpm_hf.DDPMPaperPipeline.from_pretrained(x)`
    runs the installed classes and never looks at it.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]
    _own_card: bytes | None = None

    def __init__(
        self,
        unet: DDPMPaperUNet | DDPMPaperMLP | UNet2DModel | ModelMixin,
        scheduler: DDPMPaperScheduler | SchedulerMixin,
        id2label: dict | None = None,
        num_inference_steps: int | None = None,
    ):
        super().__init__()
        if "predict_epsilon" in getattr(scheduler, "config", {}):
            scheduler = type(scheduler).from_config(known_prediction(scheduler.config))  # type: ignore[union-attr]
        self.register_modules(unet=unet, scheduler=scheduler)
        if id2label is not None:
            self.register_to_config(id2label=_checked_names(id2label, unet))
        if num_inference_steps is not None:
            self.register_to_config(num_inference_steps=num_inference_steps)
            self.own_scheduler()
        self._running: dict[int, list[Any]] = {}  # thread → of its call, whether it was asked to stop, and its steps
        self._last = [False, 0]

    # ---- Algorithm 2 ------------------------------------------------------------------------------------------------

    def model_output(
        self, x_t: Tensor, t: Any, class_labels: ClassLabels = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """f_θ(x_t, t), or f_θ(x_t, t, y), or guided f_∅ + s (f_y − f_∅), from one batch of both: float32 [B, C, ...].

        Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6, in which s is 1 + w. Whatever the network predicts, x_0, v or ε,
        is affine in ε, so that this guides ε. Of learned variances, the second half of the channels, y's are taken.
        """
        self._check_guidance(class_labels, guidance_scale)
        x_t = x_t.to(self.unet.dtype)
        labels: Any = self.class_numbers(class_labels, len(x_t), x_t.device)
        if guidance_scale == 1:
            conditions = {} if labels is None else {"class_labels": labels}
            return _answer(self.unet, x_t, _per_sample(t, x_t), **conditions)
        both, none = torch.cat([x_t, x_t]), torch.full_like(labels, self.null_class)
        times = _per_sample(t, x_t).repeat(2)
        outputs = _answer(self.unet, both, times, class_labels=torch.cat([labels, none]))
        conditional, unconditional = outputs.chunk(2)
        guided, channels = torch.lerp(unconditional, conditional, float(guidance_scale)), x_t.shape[1]
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def reverse_step(
        self,
        x: Tensor,
        t: Any,
        *,
        scheduler: Any = None,
        generator: Generators = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
    ) -> ReverseStep:
        """x_{t−1} = μ_θ(x_t, t) + σ_t z and x̂_0 from x_t = `x` (Algorithm 2, lines 3–4), asking the network once.

        `x` [B, *sample_shape] is float32, `t` one of the timesteps of `scheduler`, by default the pipeline's; classes
        and guidance as of a call. Where the caller records gradients, they flow back to x.
        """
        scheduler = self.scheduler if scheduler is None else scheduler
        with evaluation_mode(self.unet):
            x_t = scheduler.scale_model_input(x, t)
            model_output = self.model_output(x_t, t, class_labels, guidance_scale)
        options = {"generator": generator} if _takes(type(scheduler), "generator") else {}
        with_variances = hasattr(scheduler, "diffusion") or _draws_variances(type(scheduler))
        used = model_output if with_variances else model_output[:, : x.shape[1]]
        stepped = scheduler.step(used, t, x, **options)
        return ReverseStep(t, x_t, model_output, stepped.get("pred_original_sample"), stepped.prev_sample)

    def reverse_process(
        self,
        x_t: Tensor,
        *,
        generator: Generators = None,
        scheduler: Any = None,
        from_timestep: int | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
    ) -> Iterator[ReverseStep]:
        """Algorithm 2 from x_t down to x_0: one `ReverseStep` after the other, each computed when it is asked for.

        Args:
            x_t: where to start, [B, *sample_shape], approximately standard Gaussian at T.
            generator: from which z is drawn, or one per sample; see `seeded_generators`.
            scheduler: with the timesteps to take, as `own_scheduler` makes it; by default with the model's own.
            from_timestep: t of `x_t`, 0-based, one of these timesteps; by default their first.
            class_labels, guidance_scale: as of a call.

        Gradients are not recorded. Raises ValueError for a timestep that is not in the chain.
        """
        scheduler = self.own_scheduler() if scheduler is None else scheduler
        ours = hasattr(scheduler, "diffusion")
        timesteps = scheduler.timesteps.tolist() if ours else list(scheduler.timesteps)
        x = x_t.to(self._execution_device, torch.float32)
        labels = self.class_numbers(_plain(class_labels), len(x), x.device)
        asked: Any = {"generator": generator, "class_labels": labels, "guidance_scale": guidance_scale}
        position = 0 if from_timestep is None else _position(from_timestep, timesteps)
        with self.progress_bar(total=len(timesteps) - position) as progress:  # type: ignore[call-arg]
            while position < len(timesteps):
                with torch.no_grad():
                    step = self.reverse_step(x, timesteps[position], scheduler=scheduler, **asked)
                position += 1
                step.next_t = following = timesteps[position] if position < len(timesteps) else None
                progress.update()
                yield step
                x = step.x
                if step.next_t is not following:
                    _check(ours, f"{type(scheduler).__name__} cannot go on from another timestep than the next")
                    position = len(timesteps) if step.next_t is None else _position(step.next_t, timesteps)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        *,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        seeds: Sequence[int] | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool = False,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw samples.

        Args:
            batch_size: how many; follows from lists of seeds, labels or generators or `latents` where given, else 1.
            class_labels: what to draw, by name or number: one for all samples or a list with one for each, in which
                None stands for no label. By default no sample has one.
            guidance_scale: s of f_∅ + s (f_y − f_∅). 1 is the conditional network alone; above, samples are more
                typical of their class and less diverse, for twice the work. It is 1 + w in Ho & Salimans 2022.
            seeds: one integer in [0, 2³²) per sample, e.g. `range(16)`. Excludes `generator`. A seed's noise is
                bit-identical whatever the batch, process or device; its image is so up to the rounding of the kernels
                that batch size and number of threads select (about 1e-5). (Stock's DPMSolverSDEScheduler draws
                noise of its own; give it a `noise_sampler_seed`.)
            generator: a torch.Generator, or one per sample.
            num_inference_steps: reverse steps, from 1 to the scheduler's training timesteps; by default the pipeline's
                own number, else the scheduler's own `inference_timesteps`, else all.
            eta: η from 0 to 1, for a scheduler that has it, as DDIM's: 0 adds no noise, 1 as much as `fixed_small`.
            use_clipped_model_output: whether a step of DDIM goes on with the ε that belongs to the clipped x̂_0, as the
                paper's step does, or with the network's own. Stock's pipeline has it too; see docs/sampling.md.
            latents: x_T [B, *sample_shape], standard Gaussian, in place of the one drawn. Images may have another
                height and width, where the network takes them.
            output_type: "pil"; "np" [B, H, W, C] or "pt" [B, C, H, W], both float32 in [0, 1]; "latent": x_0 as the
                chain left it, about [-1, 1]. For points "np", "pt" and "latent" are [B, d], not rescaled.
            return_dict: an `ImagePipelineOutput`, else the 1-tuple of its images.
            callback_on_step_end: called as (pipe, step, timestep, {"latents": x_t}); may return a replacement.
            callback_on_step_end_tensor_inputs: which tensors the callback receives; `latents` is the only one.

        Raises ValueError for arguments that contradict each other or lie outside what is named here.
        """
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        _check(not unknown, f"callback_on_step_end_tensor_inputs has {unknown}; only 'latents' can be passed")
        called = callback_on_step_end is None or callable(callback_on_step_end)
        _check(called, f"callback_on_step_end={callback_on_step_end!r} must be a function")
        device = self._execution_device
        scheduler = self.own_scheduler(num_inference_steps, eta, use_clipped_model_output)
        self._check_guidance(class_labels, guidance_scale)
        given = batch_size, class_labels, seeds, generator, latents
        batch_size, generator = self._check_inputs(*given, output_type)
        asked: Any = {"generator": generator, "class_labels": class_labels, "guidance_scale": guidance_scale}
        if latents is None:
            shape = (batch_size, *self.sample_shape)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32) * scheduler.init_noise_sigma
        thread = threading.get_ident()
        outer = self._running.get(thread)  # of a callback that samples
        self._running[thread] = self._last = call = [False, len(scheduler.timesteps)]
        try:
            with evaluation_mode(self.unet):  # once for all steps
                for i, step in enumerate(self.reverse_process(x, scheduler=scheduler, **asked)):
                    if callback_on_step_end is not None:
                        returned = callback_on_step_end(self, i, step.t, {"latents": step.x})
                        step.x = returned.get("latents", step.x) if returned else step.x
                    x = step.x
                    if call[0]:
                        break
        finally:
            self._running.pop(thread)
            if outer is not None:
                self._running[thread] = outer
        images = self._to_output(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def _to_output(self, x: torch.Tensor, output_type: str):
        if output_type == "latent":
            return x
        if x.ndim == 4:
            x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        array = (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    # ---- the calls that are running ---------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """Number of reverse steps of this thread's call, or else of the last one."""
        return self._running.get(threading.get_ident(), self._last)[1]

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop; the call then returns x_t as it is.

        From a thread that is in no call it stops the calls of all threads.
        """
        return self._running.get(threading.get_ident(), self._last)[0]

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        own = self._running.get(threading.get_ident())
        for call in [*self._running.values()] if own is None else [own]:
            call[0] = value

    _interrupt = interrupt

    # ---- schedulers and sizes ---------------------------------------------------------------------------------------

    def own_scheduler(
        self, num_inference_steps: int | None = None, eta: float | None = None, use_clipped_model_output: bool = False
    ) -> Any:
        """The scheduler with so many steps, as a copy: solvers keep histories, which no other call may see.

        `eta` and `use_clipped_model_output` go to each step. Raises ValueError also where its ᾱ or σ are not those of
        the β in its configuration.
        """
        steps, total = num_inference_steps, self.scheduler.config.get("num_train_timesteps")
        _check(total, f"{type(self.scheduler).__name__} has no num_train_timesteps: it samples another process")
        own = self.config.get("num_inference_steps")
        steps = own if steps is None else steps
        allowed = steps is None or _is_whole(steps, 1, total)
        _check(allowed, f"num_inference_steps={steps!r} must be an integer in [1, {total}]")
        ours = hasattr(self.scheduler, "diffusion")  # carried code makes it another class of the same name
        if not ours and own not in (None, steps):
            _warn_once(f"this model was distilled for {own} steps; of the timesteps of {steps} it knows few or none")
        scheduler: Any = copy.copy(self.scheduler) if ours else copy.deepcopy(self.scheduler)
        if ours:  # without a copy of the timesteps on the device: a step then never waits for it
            scheduler.set_timesteps(steps)
        else:
            name, learned = type(scheduler).__name__, "learned" in str(scheduler.config.get("variance_type"))
            channels, wanted = self.unet.config.get("out_channels"), self.unet.config.in_channels * (1 + learned)
            _check(channels in (None, wanted), f"{name} needs {wanted} channels, and the network puts out {channels}")
            _set_timesteps(scheduler, total if steps is None else steps, self._execution_device)
        options: dict[str, Any] = {"use_clipped_model_output": True} if use_clipped_model_output else {}
        if eta is not None:
            _check(is_finite_number(eta) and 0 <= eta <= 1, f"eta={eta!r} must be a number from 0 to 1")
            options["eta"] = eta
        for name, value in options.items():
            _check(_takes(type(scheduler), name), f"{name}={value!r}: {type(scheduler).__name__} has none; DDIM has")
        if options:
            scheduler.step = functools.partial(scheduler.step, **options)
        first, signal = int(scheduler.timesteps[0]), scheduler.alphas_cumprod
        if signal[first] > 0.05 > signal[-1]:
            _warn_once(f"the chain begins with noise at t = {first}, and x_t is {signal[first]:.0%} image there: set "
                       "timestep_spacing='trailing', or take another number of steps")  # fmt: skip
        return scheduler

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) for images, (d,) for points. ValueError where the network does not say it."""
        if "sample_size" in self.unet.config:
            return self._shape(self.unet.config["sample_size"])
        of_images = any(
            isinstance(part, torch.nn.Conv2d) for part in self.unet.modules()
        )  # which have a size, unstated
        return self._shape(None if of_images else ())

    def _shape(self, size: Any) -> tuple[int, ...]:
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        factor = 2 ** (len(self.unet.config.get("block_out_channels") or [0]) - 1)
        whole = len(sides) in (0, 2) and all(_is_whole(side, 1, 2**16) and side % factor == 0 for side in sides)
        stated = f"a size of {size!r} must be a multiple of {factor}, as one integer or as (height, width)"
        found = "the network states no sample_size" if size is None else stated
        _check(whole, f"{found}: pipe.unet.register_to_config(sample_size=…), or write it into unet/config.json")
        return (self.unet.config.in_channels, *sides)

    # ---- classes ----------------------------------------------------------------------------------------------------

    @property
    def id2label(self) -> dict[int, str]:
        """The names of the classes by their numbers; empty where there are none, or they have no names."""
        return dict(self.config.get("id2label") or {})

    @property
    def null_class(self) -> Any:
        """The number that stands for "no label"; None where the network has none, or knows no classes."""
        return self.unet.config.get("null_class")

    @property
    def classes(self) -> dict[int, str]:
        """Each class's name by its number, "class 3" where it has none, but `null_class`; {} of unconditional ones."""
        names, null_class = self.id2label, self.null_class
        return {n: names.get(n, f"class {n}") for n in range(self._num_rows) if n != null_class}

    @property
    def needs_labels(self) -> bool:
        """Whether every sample needs a label: the network has classes, and no `null_class`."""
        return self._num_rows > 0 and self.null_class is None

    @property
    def _num_rows(self) -> int:
        """Of the class embedding; 0 where there is none."""
        return self.unet.config.get("num_class_embeds") or 0

    def class_numbers(
        self, class_labels: ClassLabels, batch_size: int, device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """Classes by name or number, None for no label → int64 [B] on `device`; None for None.

        One stands for all samples. Raises ValueError for what the network does not know.
        """
        if class_labels is None:
            return None
        if (
            isinstance(class_labels, Tensor)
            and class_labels.dtype == torch.int64
            and class_labels.shape == (batch_size,)
        ):
            # those of a GPU came this way before; a look would wait for it
            if class_labels.device.type != "cpu" or all(0 <= n < self._num_rows for n in class_labels.tolist()):
                return class_labels.to(device)
        labels = _plain(class_labels)
        several = labels if isinstance(labels, list) else [labels] * batch_size
        _check(len(several) == batch_size, f"class_labels are {len(several)}, for {batch_size} samples")
        return torch.tensor([self._class_number(label) for label in several]).to(device)

    def _class_number(self, label: Any) -> int:
        last = self._num_rows - 1
        _check(last >= 0, f"class_labels: the network is unconditional, and cannot draw {label!r}")
        if label is None:
            _check(not self.needs_labels, "class_labels: this network has no null_class; each sample needs a label")
            return self.null_class
        if isinstance(label, str):
            numbers = {name: number for number, name in self.id2label.items()}
            listed = ", ".join([*numbers][:30]) or "without names, give numbers"
            _check(label in numbers, f"class_labels: {label!r} is none of the classes: {listed}")
            return numbers[label]
        _check(_is_whole(label, 0, last), f"class_labels: {label!r} is no number from 0 to {last}")
        return int(label)

    # ---- saving: a checkpoint carries its code ----------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, which would leave a network out that it cannot save. Raises ValueError then."""
        network = getattr(self.unet, "_orig_mod", self.unet)  # of a compiled one
        kind = type(network).__name__
        saved = isinstance(network, ModelMixin)
        _check(saved, f"a {kind} is not saved; save the pipeline that it was made from, if any")
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers (which calls it last in `save_pretrained`, before an upload), and the code beside it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        for file in (folder / self.config_name, folder / "unet" / "config.json"):
            if file.is_file():  # the network's is not where the index alone is saved
                file.write_bytes(without_origin(file))
        card = folder / "README.md"
        self._own_card = card.read_bytes() if card.is_file() else None  # stock is about to write another over it
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        owners = {"unet/unet_ddpm_paper.py": DDPMPaperUNet, "scheduler/scheduling_ddpm_paper.py": DDPMPaperScheduler}
        if type(self).__name__ == "DDPMPaperPipeline" and _is_of(type(self), PIPELINE_MODULES):
            owners["pipeline.py"] = DDPMPaperPipeline
            index["_class_name"] = ["pipeline", "DDPMPaperPipeline"]
        else:
            _warn_of_code(type(self), f"load it by {type(self).__name__}.from_pretrained(…)")
        for name, owner in owners.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(inspect.getfile(owner), folder / name)
        for name in ("unet", "scheduler"):
            part = getattr(self, name)
            kind = type(getattr(part, "_orig_mod", part))  # of a compiled one
            own_name, stem = kind.__name__, CARRIED.get(kind.__name__)
            if _is_of(kind, (stem,)):
                index[name][0] = stem
            elif name == "unet" and index[name][0] != "diffusers" and (stem := _copied(kind, folder / name)):
                index[name] = [stem, own_name]
            elif index[name][0] != "diffusers":
                how = f"load it by from_pretrained(…, {name}={own_name}.from_pretrained(…, subfolder='{name}'))"
                _warn_of_code(kind, how)
                index[name] = ["diffusers", "ModelMixin"] if name == "unet" else index[name]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _upload_folder(self, working_dir: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload `PIPELINE_FILES`, with the folder's own card; stock uploads all, `.env` and optimizers too.

        Raises ValueError where there are no weights in safetensors: others are not uploaded.
        """
        if self._own_card is not None:
            Path(working_dir, "README.md").write_bytes(self._own_card)
        files = files_matching(PIPELINE_FILES, working_dir)
        weights = any(name.endswith(".safetensors") for name in files)
        _check(weights, "only weights in safetensors are uploaded; leave out safe_serialization=False")
        with tempfile.TemporaryDirectory() as clean:
            for name, path in files.items():
                Path(clean, name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, Path(clean, name))
            return super()._upload_folder(clean, repo_id, *args, **kwargs)

    # ---- what is refused --------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """As in diffusers, but ValueError for a network without what a call asks of it."""
        if name == "unet" and value is not None:
            missing = [each for each in ("config", "device", "dtype") if not hasattr(value, each)]
            remedy = "derive its class from diffusers' ModelMixin and ConfigMixin"
            if hasattr(value, "module"):  # of DataParallel and its kin
                remedy = "take its .module, and start one process per GPU, each with its own seeds"
            _check(not missing, f"unet: a {type(value).__name__} has no {', '.join(missing)}; {remedy}")
            stated, named = value.config.get("in_channels"), "register_to_config(in_channels=…)"
            _check(_is_whole(stated, 1, 2**20), f"unet: a {type(value).__name__} states no in_channels: {named}")
            _check(*_takes_x_and_t(value))
        super().__setattr__(name, value)

    def _check_guidance(self, class_labels: Any, guidance_scale: float) -> None:
        alone = "1 is the conditional network alone"
        _check(is_finite_number(guidance_scale), f"guidance_scale={guidance_scale!r} must be a finite number; {alone}")
        kind = self.unet.config.get("class_embed_type")
        _check(not kind, f"class_embed_type={kind!r} of the network is not known here; num_class_embeds is")
        if class_labels is None:
            missing = "this network needs class_labels: it has no null_class, for samples without a label"
            _check(not self.needs_labels, missing)
            _check(guidance_scale == 1, f"guidance_scale={guidance_scale} needs class_labels, towards which to guide")
        unguided = guidance_scale == 1 or self.null_class is not None
        _check(unguided, f"guidance_scale={guidance_scale} needs a network with a null_class; this one has none")

    def _check_inputs(
        self, batch_size: Any, class_labels: Any, seeds: Any, generator: Any, latents: Any, output_type: str
    ) -> tuple[int, Generators]:
        """The batch size on which the arguments agree, and the generators to draw from."""
        unsized = isinstance(latents, Tensor) and latents.ndim == 4 and not self.unet.config.get("sample_size")
        unsized = unsized and not isinstance(self.unet, DDPMPaperMLP)
        shape = self._shape((*latents.shape[2:],)) if unsized else self.sample_shape
        known = output_type in OUTPUT_TYPES
        _check(known, f"output_type={output_type!r} is not supported; choose one of {', '.join(OUTPUT_TYPES)}")
        picture = output_type != "pil" or (len(shape) == 3 and shape[0] in (1, 3))
        _check(picture, f"samples of shape {shape} are not pictures; use output_type='np', 'pt' or 'latent'")
        if seeds is not None:
            _check(generator is None, "pass seeds or generator, not both")
            generator = seeded_generators(seeds)
        generator = list(generator) if isinstance(generator, tuple) else generator
        several = generator if isinstance(generator, list) else [generator]
        drawing = all(isinstance(one, torch.Generator | None) for one in several)
        _check(drawing, f"generator must be a torch.Generator or a list of them, got {generator!r}")
        if latents is not None:
            _check(isinstance(latents, Tensor), f"latents must be a tensor, got {type(latents).__name__}")
            fits = latents.ndim == len(shape) + 1 and latents.shape[1] == shape[0]  # of another height and width, too
            _check(fits, f"latents have shape {tuple(latents.shape)}; expected [B, {shape}]")
            _check(torch.isfinite(latents).all(), "latents must be finite, and hold NaN or infinity")
        drawn_from = "generator" if seeds is None else "seeds"
        lists = {"class_labels": _plain(class_labels), drawn_from: generator, "latents": latents}
        sizes = {} if batch_size is None else {"batch_size": batch_size}
        sizes |= {name: len(value) for name, value in lists.items() if isinstance(value, list | Tensor)}
        whole = all(_is_whole(size, 1, math.inf) for size in sizes.values())
        _check(whole, f"a batch needs at least one sample, as an integer; got {sizes}")
        _check(len(set(sizes.values())) < 2, f"the batch size is given as {sizes}; these must agree")
        return next(iter(sizes.values()), 1), generator


def _takes_x_and_t(network: Any) -> tuple[bool, str]:
    """Whether `forward` needs nothing but x_t, t and, of a network with classes, labels; and what to say where not."""
    given = (None, None) if not network.config.get("num_class_embeds") else (None, None, None)
    parameters = [*inspect.signature(network.forward).parameters.values()]
    needed = [each.name for each in parameters if each.default is each.empty and each.kind in (0, 1, 3)][len(given) :]
    return not needed, f"unet: forward of a {type(network).__name__} needs {', '.join(needed)} beside x_t and t"


def _answer(network: Any, x_t: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
    answer = network(x_t, t, **conditions)
    sample = getattr(answer, "sample", None)
    if not isinstance(sample, Tensor):
        found = f"unet: a {type(network).__name__} returns a {type(answer).__name__}"
        raise ValueError(f"{found}, and must give something with .sample, as diffusers' UNet2DOutput")
    return sample.float()


def _per_sample(t: Any, x: Tensor) -> Tensor:
    """t as a tensor [B] on x's device, without waiting for the device."""
    if isinstance(t, Tensor):
        return t.to(x.device).expand(len(x))
    return torch.full((len(x),), t, device=x.device)


def _position(t: Any, timesteps: list[Any]) -> int:
    if t not in timesteps:
        nearest = min(timesteps, key=lambda other: abs(other - t))
        raise ValueError(f"timestep {t} is not one of this chain's {len(timesteps)}; the nearest of them is {nearest}")
    return timesteps.index(t)


def _plain(class_labels: Any) -> Any:
    """Labels as Python has them: a list with one for each sample, or one label, or None."""
    labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    return list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str | bytes) else labels


@functools.cache
def _takes(scheduler_class: type, argument: str) -> bool:
    """Whether `step` takes it, or hands what it does not name on to the next class, whose `step` takes it."""
    for parameters in _parameters(scheduler_class, "step"):
        if argument in parameters:
            return True
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            break
    return False


@functools.cache
def _draws_variances(scheduler_class: type) -> bool:
    """Whether it makes use of learned variances, as stock's DDPM does; to others they would be more of the image."""
    known = any("variance_type" in parameters for parameters in _parameters(scheduler_class, "__init__"))
    return known and hasattr(scheduler_class, "_get_variance")


def _parameters(kind: type, method: str) -> Iterator[Mapping[str, inspect.Parameter]]:
    """Of a class's method, and of those that it overrides."""
    return (inspect.signature(vars(each)[method]).parameters for each in kind.__mro__ if method in vars(each))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _is_of(kind: type, modules: Sequence[str | None]) -> bool:
    """Whether a class is of a module called so: that of carried code has other parents than that of this package."""
    return kind.__module__.rpartition(".")[2] in modules


def _warn_of_code(kind: type, how: str) -> None:
    logger.warning("the code of %s (%s) is not saved with it: %s", kind.__name__, kind.__module__, how)


def _copied(network: type, folder: Path) -> str | None:
    """The module in `folder` to which the file of an own network was copied; None where it could not run by itself."""
    module = sys.modules.get(network.__module__)
    source = Path(getattr(module, "__file__", None) or "")
    is_main, is_there = network.__module__ == "__main__", getattr(module, network.__name__, None) is network
    if is_main or not is_there or source.suffix != ".py" or _needs_its_neighbours(source):
        return None
    stem = f"own_{source.stem.removeprefix('own_')}"
    shutil.copyfile(source, folder / f"{stem}.py")
    return stem


def _needs_its_neighbours(source: Path) -> bool:
    """Whether a file of Python imports from the folder that it lies in, where a copy of it will not."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        places = [source.parent / name.partition(".")[0] for name in names if name]
        here = any(place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() for place in places)
        if relative or here:
            return True
    return False


def without_origin(file: Path) -> bytes:
    """A saved configuration without the folder that its part was loaded from, which is nobody else's business."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if "_name_or_path" not in config:
        return file.read_bytes()
    del config["_name_or_path"]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def files_matching(patterns: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """The files of `folder` that the patterns name, by their names in a repository; nothing behind a symlink."""
    root = Path(folder).resolve()
    found = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    return {path.relative_to(root).as_posix(): path for path in found if path.is_file() and path.resolve() == path}


# ---- what is refused ------------------------------------------------------------------------------------------------


def _set_timesteps(scheduler: Any, steps: int, device: Any) -> None:
    """Of a scheduler of diffusers. Raises ValueError unless its ᾱ follows from the configuration's β, and σ from ᾱ."""
    name, stated = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
    _check(stated is not None, f"{name} has no alphas_cumprod: it samples another process than a DDPM's")
    kind = scheduler.config.get("variance_type")
    rooted = kind in ("fixed_large_log", "learned") and _draws_variances(type(scheduler))  # the root of a logarithm
    instead = "DDPMPaperScheduler" if kind == "learned" else "fixed_large, the same variance"
    _check(not rooted, f"{name} draws NaN with {kind}; take {instead}")
    stated = torch.as_tensor(stated, dtype=torch.float64, device="cpu")
    parts = ("num_train", "beta_", "trained_betas", "rescale_betas")
    betas = {key: value for key, value in scheduler.config.items() if key.startswith(parts)}
    expected = DDPMPaperScheduler(**betas, prediction_type="sample").alphas_cumprod.double()  # ᾱ_T = 0 is for x_0
    near = 1e-3 * torch.minimum(expected, 1 - expected) + 1e-6  # float32 tables; stock's 0 is 2⁻²⁴
    same = stated.shape == expected.shape and bool(((stated - expected).abs() <= near).all())
    _check(same, f"{name} has another ᾱ than the β of its configuration make: it samples another process")
    scheduler.set_timesteps(steps, device=device)
    t, sigmas, total = scheduler.timesteps.cpu().double(), getattr(scheduler, "sigmas", None), len(expected)
    down = total > t[0] == t.max()  # NaN, where stock divides by 0, is neither
    _check(down, f"{name} goes from t = {t[0]:g} to {t[-1]:g}; sampling goes down, from {total - 1}")
    told = expected[-1] > 0 or t[0] < total - 1 or scheduler.config.get("prediction_type") != "epsilon"
    _check(told, f"{name} begins at ᾱ = 0, where an ε tells nothing of x_0; take a network that predicts v or x_0")
    around = (int(t[0]) + torch.tensor([-1, 2])).clamp(0, total - 1)  # grids need not begin at a timestep
    low, high = sorted((1 / stated[around] - 1).sqrt().tolist())
    first, last = (low, 0.0) if sigmas is None else (float(sigmas.max()), float(sigmas[-1]))
    own = low * 0.999 <= first <= high * 1.001
    _check(own, f"{name} begins with σ = {first:.4g} at t = {t[0]:g}, where a DDPM has {low:.4g} to {high:.4g}")
    _check(last < 0.2, f"{name} ends with σ = {last:.2g}: samples would keep this noise")
    # a multistep solver would divide by the length of a step that is none
    twice = hasattr(scheduler, "lower_order_nums") and sigmas is not None and len(sigmas.unique()) < len(sigmas)
    _check(not twice, f"{name} visits timesteps twice in {steps} steps; pass a smaller num_inference_steps")


def _checked_names(id2label: Any, unet: Any) -> dict[int, str]:
    """`id2label` with numbers as keys, which JSON has as text. Raises ValueError where the network lacks one."""
    _check(isinstance(id2label, Mapping), f"id2label={id2label!r} must map numbers of classes to names")
    count, null_class = unet.config.get("num_class_embeds") or 0, unet.config.get("null_class")
    names = {int(key) if str(key).isdecimal() else key: name for key, name in id2label.items()}
    for key, name in names.items():
        known = _is_whole(key, 0, count - 1) and key != null_class
        _check(known, f"id2label: {key!r} is none of the {count - (null_class is not None)} classes of the network")
        _check(isinstance(name, str), f"id2label: the name of {key} is {name!r}, and must be text")
    _check(len(set(names.values())) == len(names), "id2label: two classes have the same name")
    return dict(sorted(names.items()))  # JSON has them sorted as text


def _is_whole(value: Any, lowest: int, highest: float) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and lowest <= int(value) <= highest


def is_finite_number(value: Any) -> bool:
    """Of whatever type a number has, but a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check(holds: Any, message: str) -> None:
    if not holds:
        raise ValueError(message)
