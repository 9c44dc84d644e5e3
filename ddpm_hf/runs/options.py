"""The options of training/train.py, each with its default, its range and its help.

Nothing imported here is slow, so that help and mistakes do not wait for torch.
"""

import importlib.util
import math
import re
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .parsing import FALSE, TRUE, check_ranges, did_you_mean, option


@dataclass
class DataOptions:
    """What is the same of every script that trains: where the run lives, its seed, and its data."""

    output_dir: str = option("runs/cifar10", "where the run lives", is_path=True)
    seed: int = option(0, "of every random draw", at_least=0)

    # data: one of dataset_name and train_data_dir
    dataset_name: str | None = option(
        None,
        "digits, swiss_roll, moons, fashion_mnist, what datasets.load_dataset takes, or module:function",
        is_path=True,
    )
    dataset_config: str | None = option(None, "configuration of a Hub dataset")
    dataset_split: str = option("train", "its split")
    image_column: str | None = option(None, "its column of images; none: the first")
    label_column: str | None = option(
        None, "the column of labels; label: the sub-folders of a folder; none: no labels are read"
    )
    label_dropout: float = option(
        0.1, "with labels: the share of samples trained without theirs, for guidance; 0: none", at_least=0, below=1
    )
    train_data_dir: str | None = option(
        None, "a folder, or zip or tar file, of images, searched through", is_path=True
    )
    resolution: int | None = option(None, "resize and centre-crop to this side; none: images as they are", at_least=1)
    background: str = option("white", "colour put behind transparent images")
    max_value: int | None = option(
        None, "the value of white where files use fewer of their bits; none: 255 or 65535", at_least=1, at_most=65_535
    )
    convert_channels: bool = option(False, "make all images grey or colour, as --in_channels 1 or 3 says")
    random_flip: bool = option(False, "mirror every other image, at random")
    skip_bad_images: int = option(0, "how many images may be left out because they cannot be read", at_least=0)
    num_workers: int = option(0, "processes that decode images, once, before training", at_least=0, at_most=1024)
    in_channels: int | None = option(None, "channels of the images; none: as the data has", at_least=1)


@dataclass
class TrainingOptions(DataOptions):
    """The defaults are the paper's CIFAR-10 run; without --config, training/configs/digits.yaml is read first.

    The upper bounds guard against typos that would allocate all memory.
    """

    # network: the paper's UNet for images, an MLP for points
    block_out_channels: list[int] = option(
        [128, 256, 256, 256], "UNet: channels per level, finest first", at_least=1, at_most=16_384
    )
    layers_per_block: int = option(2, "UNet: residual blocks per level", at_least=1, at_most=100)
    attention_resolutions: list[int] = option(
        [16], "UNet: sides of the levels that have attention", at_least=1, at_most=16_384
    )
    norm_num_groups: int = option(32, "UNet: groups of every GroupNorm", at_least=1)
    dropout: float = option(0.1, "UNet: in every residual block", at_least=0, below=1)
    hidden_size: int = option(128, "MLP: width", at_least=1, at_most=16_384)
    num_layers: int = option(3, "MLP: residual blocks", at_least=1, at_most=1000)
    network: str | None = option(
        None, "instead: the class of a network of your own, as module:Class (docs/own_parts.md)"
    )
    network_args: dict[str, Any] | None = option(
        None, "its arguments: a mapping in the YAML file, here '{name: value, …}'; none: its defaults"
    )
    init_from: str | None = option(
        None, "start from this checkpoint's weights, network and process (fine-tuning)", is_path=True
    )

    # diffusion process
    num_train_timesteps: int = option(1000, "T", at_least=1, at_most=1_000_000)
    beta_schedule: Literal[
        "linear", "quad", "const", "jsd", "warmup10", "warmup50", "scaled_linear", "squaredcos_cap_v2", "sigmoid"
    ] = option("linear", "how β runs from β_1 to β_T")
    beta_start: float = option(1e-4, "β_1", above=0, below=1)
    beta_end: float = option(0.02, "β_T", above=0, below=1)
    prediction_type: Literal["epsilon", "sample", "previous_sample", "v_prediction"] = option(
        "epsilon", "of the network"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned"] = option(
        "fixed_large", "σ_t² of the reverse process: β̃_t, β_t, or the network's, which needs --objective vlb"
    )

    # optimization
    objective: Literal["simple", "vlb"] = option("simple", "L_simple (Eq. 14), or the variational bound L (Eq. 5)")
    timestep_sampling: Literal["uniform", "loss_history"] = option(
        "uniform", "how t is drawn; for --objective vlb also by the losses seen so far, which makes it less noisy"
    )
    num_steps: int = option(800_000, "optimizer steps", at_least=1)
    global_batch_size: int = option(128, "samples per step, over all processes and accumulation steps", at_least=1)
    gradient_accumulation_steps: int = option(1, "parts in which a process computes its share of a batch", at_least=1)
    learning_rate: float = option(2e-4, "of Adam, after the warm-up", above=0, below=math.inf)
    warmup_steps: int = option(5000, "steps over which the learning rate rises linearly from 0", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0, below=math.inf)
    ema_decay: float = option(0.9999, "of the averaged weights, which are the ones saved", at_least=0, below=1)

    # machine
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "none: as accelerate is configured")
    allow_tf32: bool = option(False, "float32 matrix products and convolutions in TF32, on GPUs that have it")
    gradient_checkpointing: bool = option(False, "compute activations twice instead of keeping them")
    compile: bool = option(False, "torch.compile the network: over a minute of compiling, then faster on a GPU")
    cuda_graphs: bool = option(
        True, "on one GPU record the step and replay it, the same bits sooner; not in fp16 or gradient_checkpointing"
    )
    cpu_threads: int | None = option(
        None, "without a GPU; none: the cores, shared by this machine's processes", at_least=1, at_most=1024
    )

    # held-out data
    eval_every: int = option(
        0, "steps between evaluations on held-out samples, and one at the end; 0: none", at_least=0
    )
    held_out_every: int | None = option(
        None, "keep about one in so many samples from training, chosen by its content; none: train on all", at_least=2
    )
    eval_data_dir: str | None = option(None, "instead: a folder of images that are not trained on", is_path=True)
    eval_split: str | None = option(None, "instead: another split of dataset_name")
    eval_label_column: str | None = option(None, "where labels of held-out data are; none: by label_column")
    eval_samples: int = option(
        256, "how many held-out samples to evaluate, and as many of those trained on", at_least=1, at_most=1_000_000
    )

    # watching and saving
    max_minutes: float | None = option(
        None, "minutes of training after which to stop, with a checkpoint; none: all steps", above=0, below=math.inf
    )
    log_every: int = option(100, "steps between lines of metrics.jsonl", at_least=1)
    report_to: Literal["tensorboard", "trackio", "wandb"] | None = option(None, "tracker to log to as well")
    sample_every: int = option(20_000, "steps between grids of samples; 0: none", at_least=0)
    num_samples: int = option(64, "samples per grid, of seeds 0, 1, …", at_least=1, at_most=10_000)
    sample_steps: int | None = option(None, "reverse steps for the grids; none: all", at_least=1)
    checkpoint_every: int = option(5000, "steps between checkpoints; one is always written at the end", at_least=1)
    keep_checkpoints: int = option(2, "how many to keep, at least 2", at_least=2)
    resume: str = option(
        "latest", "latest, never (older checkpoints are moved aside), or a checkpoint's path", is_path=True
    )
    allow_changes: str = option(
        "no",
        "resume although options that change the mathematics, or the data, differ: yes, or the names of those that "
        "may, as in learning_rate,num_processes,data",
        alone="yes",
    )
    push_to_hub: bool = option(False, "upload the finished model, with a card; log in first with `hf auth login`")
    hub_model_id: str | None = option(None, "where to: user/name")
    hub_private_repo: bool = option(False, "make that repository private")
    hub_strategy: Literal["end", "every_save"] = option("end", "upload at the end, or with every checkpoint too")
    dry_run: bool = option(False, "show the data, time, memory and what the command would do, and stop")
    print_config: bool = option(False, "print all options as YAML, and stop")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_data_and_places(self)
        self._check_combinations()
        self._check_held_out()
        _ = self.allowed_changes
        if self.init_from is None:  # else the process is that of the checkpoint
            self._check_process()

    @property
    def process(self) -> dict[str, Any]:
        """The arguments of DDPMPaperScheduler among the options."""
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "variance_type")
        return {name: getattr(self, name) for name in names}

    @property
    def allowed_changes(self) -> bool | set[str]:
        """What may differ from the checkpoint that the run goes on from. Raises ValueError."""
        return changes_allowed(self)

    def _check_combinations(self) -> None:
        if self.network_args is not None and self.network is None:
            raise ValueError("--network_args are of a network of your own; --network module:Class says which")
        if self.network is not None and self.init_from is not None:
            raise ValueError(f"--network {self.network} begins with weights of its own; leave out --init_from")
        if not self.block_out_channels:
            raise ValueError("--block_out_channels=[] must hold a number of channels for every level")
        if self.sample_steps is not None and self.sample_steps > self.num_train_timesteps:
            raise ValueError(
                f"--sample_steps={self.sample_steps} exceeds --num_train_timesteps={self.num_train_timesteps}"
            )
        if self.variance_type == "learned" and self.objective == "simple":
            raise ValueError("--variance_type learned needs --objective vlb: L_simple does not train a variance")
        for name, value in (("prediction_type", "previous_sample"), ("variance_type", "learned")):
            if getattr(self, name) == value and self.sample_steps not in (None, self.num_train_timesteps):
                raise ValueError(f"--sample_steps={self.sample_steps}: with --{name} {value} all steps are needed")
        if self.timestep_sampling == "loss_history" and self.objective == "simple":
            raise ValueError("--timestep_sampling loss_history is for --objective vlb; L_simple weighs all t alike")

    def _check_held_out(self) -> None:
        given = {name: getattr(self, name) for name in ("held_out_every", "eval_data_dir", "eval_split")}
        given = [f"--{name} {value}" for name, value in given.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}: each says which samples are held out")
        if self.eval_every and not given:
            raise ValueError(
                f"--eval_every={self.eval_every} needs held-out samples: --held_out_every 10 keeps about a tenth of "
                "the data from training; or give --eval_data_dir FOLDER, or --eval_split NAME"
            )
        if not self.eval_every and (self.eval_data_dir is not None or self.eval_split is not None):
            raise ValueError(f"{given[0]} is only evaluated, and --eval_every is 0; say how often, or leave it out")
        needed = self.label_column is not None and (self.eval_data_dir is not None or self.eval_split is not None)
        if self.eval_label_column is not None and not needed:
            raise ValueError(
                f"--eval_label_column={self.eval_label_column} is for held-out data of their own, --eval_data_dir or "
                "--eval_split, of a run with --label_column"
            )
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError(
                f"--eval_split={self.eval_split}: a folder has no splits; give --eval_data_dir FOLDER or "
                "--held_out_every 10"
            )
        if self.eval_split is not None and self.eval_split == self.dataset_split:
            raise ValueError(f"--eval_split={self.eval_split} is the split that is trained on; name another")
        if self.eval_data_dir is not None and self.train_data_dir is not None:
            folder, other = Path(self.eval_data_dir).resolve(), Path(self.train_data_dir).resolve()
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                raise ValueError(
                    f"--eval_data_dir={self.eval_data_dir} and --train_data_dir={self.train_data_dir} share images, "
                    "as folders are searched through; move one out of the other, or give --held_out_every 10"
                )

    def _check_process(self) -> None:
        """That samples can be drawn by this process: last, because it takes torch and so seconds to find out."""
        from ..scheduler import DDPMPaperScheduler

        alphas_cumprod = DDPMPaperScheduler(**self.process).diffusion.alphas_cumprod
        if alphas_cumprod[-1] == 0 and self.prediction_type == "epsilon":
            raise ValueError(
                f"--beta_schedule {self.beta_schedule} ends at ᾱ = 0, where --prediction_type epsilon tells "
                "nothing of x_0: no sample could be drawn; use v_prediction or sample"
            )


# What may differ between a run and its resumption; everything else changes the mathematics. Where the data lies may
# change: its content is compared by fingerprint. `held_out_every` says what is trained on; given held-out data do not.
FREE_TO_CHANGE = {
    *("output_dir", "num_steps", "num_workers", "cpu_threads", "max_minutes"),
    *("allow_tf32", "compile", "cuda_graphs", "gradient_checkpointing"),
    *("log_every", "report_to", "sample_every", "num_samples", "sample_steps", "checkpoint_every", "keep_checkpoints"),
    *("eval_every", "eval_data_dir", "eval_split", "eval_label_column", "eval_samples"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"),
    *(
        "resume",
        "allow_changes",
        "dry_run",
        "print_config",
        "init_from",
        "dataset_name",
        "train_data_dir",
        "skip_bad_images",
    ),
}


# What decides the shapes of our own networks' weights, so that no checkpoint of others fits.
SHAPES = ("block_out_channels", "layers_per_block", "attention_resolutions", "hidden_size", "num_layers")
# What describes our own networks alone, and means nothing with `--network`.
OF_OUR_NETWORKS = (*SHAPES, "norm_num_groups", "dropout")


def option_defaults(options: Any = TrainingOptions) -> dict[str, Any]:
    """The default of every option of a script, by default those of `TrainingOptions`, the paper's for CIFAR-10."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(options)}


def changes_allowed(options: Any) -> bool | set[str]:
    """What `--allow_changes` says may differ from a run's checkpoint: True for all, else names. Raises ValueError.

    Beside options these are what else `checkpoints.changes` compares.
    """
    text = str(options.allow_changes)
    if text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    names = {name.strip().replace("-", "_") for name in text.split(",")}
    known = {each.name for each in fields(options)} | {"num_processes", "data", "labels"}
    known |= {*getattr(options, "ALSO_COMPARED", ())}
    for name in sorted(names - known):
        raise ValueError(
            f"--allow_changes={text}: {name!r} is neither an option nor num_processes, data or labels"
            f"{did_you_mean(name, known)}"
        )
    return names


def check_data_and_places(options: Any) -> None:
    """Raises ValueError unless the options of a script say which data, and a place for the run and its upload."""
    if not options.output_dir or Path(options.output_dir).is_file():
        raise ValueError(f"--output_dir={options.output_dir!r} must be a folder, or the name of a new one")
    for name in ("dataset_name", "train_data_dir", "eval_data_dir"):
        if getattr(options, name, None) == "":
            raise ValueError(f"--{name}='' is empty; name a data set, or give none")
    if (options.dataset_name is None) == (options.train_data_dir is None):
        raise ValueError(
            f"give one of --dataset_name ({options.dataset_name}) and --train_data_dir ({options.train_data_dir}); "
            "for a folder of images start from --config training/configs/folder64.yaml"
        )
    if options.convert_channels and options.in_channels not in (1, 3):
        raise ValueError(f"--convert_channels needs --in_channels 1 or 3, not {options.in_channels}")
    if options.label_column is None and options.label_dropout != DataOptions.label_dropout:
        raise ValueError(
            f"--label_dropout={options.label_dropout:g} is for training on labels; --label_column says where they are"
        )
    if options.report_to is not None and importlib.util.find_spec(options.report_to) is None:
        raise ValueError(f"--report_to {options.report_to} is not installed: pip install {options.report_to}")
    if options.push_to_hub and options.hub_model_id is None:
        raise ValueError("--push_to_hub needs --hub_model_id user/name")
    if options.hub_model_id is not None:
        check_names(options.hub_model_id)


def averaging_lags(num_steps: int, ema_decay: float) -> str | None:
    """What to do where averaged weights cannot follow in so few steps: num_steps (1 − ema_decay) < 5; else None.

    Computed in decimals as they are written: in binary 50 (1 − 0.9) is less than 5. Weights that are not averaged,
    ema_decay 0, do not lag.
    """
    if ema_decay == 0 or num_steps * (1 - Fraction(str(ema_decay))) >= 5:
        return None
    scale = 10 ** min(15, max(4, len(str(num_steps))))  # so fine that little is lost by rounding down
    fitting = max(0, (num_steps - 5) * scale // num_steps) / scale
    return f"ema_decay {fitting:.15g} or less would fit"


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
