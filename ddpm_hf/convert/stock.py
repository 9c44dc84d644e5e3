"""Networks and pipelines of stock diffusers → ours, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from torch import nn

from ..pipeline_loading import DDPMPaperPipeline
from ..scheduler import DDPMPaperScheduler
from ..unet.unet_ddpm_paper import DDPMPaperUNet

Model = TypeVar("Model", DDPMPaperUNet, UNet2DModel)

# The paper's UNet, in the options of UNet2DModel.
_PAPER_VALUES: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_eps": 1e-6,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "time_embedding_dim": None,  # None stands for 4 · block_out_channels[0]
    "attention_head_dim": None,  # None stands for the level's channels: one head
    "attn_norm_num_groups": None,  # None stands for norm_num_groups
}
_SHARED = (
    *("sample_size", "in_channels", "out_channels", "layers_per_block", "dropout", "norm_num_groups"),
    "num_class_embeds",
)
_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}  # stock's block types, and whether they have attention
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True}


def pipeline_from_stock(stock: DiffusionPipeline | str | Path) -> DDPMPaperPipeline:
    """Our pipeline for one with stock's UNet2DModel and DDPMScheduler, or for a folder or repository of one.

    Our `from_pretrained` runs stock's parts unchanged; this converts them.
    Raises ValueError for what ours cannot express: see `from_stock` and `DDPMPaperScheduler`.
    """
    pipe = stock if isinstance(stock, DiffusionPipeline) else DDPMPaperPipeline.from_pretrained(stock)
    unet, scheduler = pipe.unet, pipe.scheduler
    if not isinstance(unet, UNet2DModel) or not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"the pipeline has a {type(unet).__name__} and a {type(scheduler).__name__}; stock's UNet2DModel and "
            "DDPMScheduler can be converted (DDPMScheduler.from_config makes one of another scheduler's configuration)"
        )
    _check_variance(scheduler.config["variance_type"], unet.config["in_channels"], unet.config["out_channels"])
    ours = DDPMPaperScheduler.from_config(scheduler.config)
    names = pipe.id2label if isinstance(pipe, DDPMPaperPipeline) else {}
    return DDPMPaperPipeline(from_stock(unet), ours, names or None)  # type: ignore[arg-type]


def _check_variance(variance_type: str, in_channels: int, out_channels: int) -> None:
    """ValueError for variances of stock's DDPMScheduler that ours does not have, and for channels that none needs."""
    if variance_type == "learned_range":
        raise ValueError(
            "variance_type='learned_range' is not supported: ours has no place between the two fixed variances; "
            "DDPMPaperPipeline.from_pretrained samples with stock's scheduler as it is"
        )
    if variance_type == "learned":  # ours would accept it with the paper's meaning
        raise ValueError(
            "variance_type='learned' means a variance in stock's DDPMScheduler and a log-variance in ours: if the "
            "network puts out the latter, build DDPMPaperPipeline(from_stock(unet), DDPMPaperScheduler(...)) yourself"
        )
    if out_channels != in_channels:
        raise ValueError(
            f"the network puts out {out_channels} channels for {in_channels}, and variance_type={variance_type!r} "
            f"needs {in_channels}: if the others are log-variances, build DDPMPaperPipeline(from_stock(unet), "
            "DDPMPaperScheduler(variance_type='learned', ...)) yourself"
        )


def pipeline_to_stock(pipe: DDPMPaperPipeline, class_label: str | int | None = None) -> DDPMPipeline | DDIMPipeline:
    """Stock's DDPMPipeline with UNet2DModel and DDPMScheduler that samples what ours does, up to float32 tables.

    Of a distilled network, which has stock's DDIMScheduler, it is a DDIMPipeline with that; its number of steps, which
    stock cannot keep, is given to every call.

    Stock's pipeline has no labels: of a conditional network it gets one class, by name or number, or by default what
    is drawn without a label (`given_class`); `to_stock(pipe.unet)` keeps all of them.

    The paper code's own schedules become `trained_betas`. Raises ValueError for points, and for what stock's
    DDPMScheduler has no option for: learned log-variances, fitted variances, a chain of its own, `previous_sample`.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    if not isinstance(unet, DDPMPaperUNet) or not isinstance(scheduler, DDPMPaperScheduler | DDIMScheduler):
        raise ValueError(
            f"the pipeline has a {type(unet).__name__} and a {type(scheduler).__name__}; a DDPMPaperUNet and a "
            "DDPMPaperScheduler can be converted, and a distilled one with stock's DDIMScheduler"
        )
    unknown = (("variance_type", "learned"), ("variance_type", "fitted"), ("prediction_type", "previous_sample"))
    for key, value in unknown:
        if scheduler.config.get(key) == value:
            raise ValueError(f"stock's DDPMScheduler has no {key} that means what {value!r} does here")
    if "inference_timesteps" in scheduler.config:
        raise ValueError("stock's DDPMScheduler cannot keep inference_timesteps; pass them to its set_timesteps")
    is_ddim = isinstance(scheduler, DDIMScheduler)
    stock = (DDIMScheduler if is_ddim else DDPMScheduler).from_config(scheduler.config)
    if unet.class_embedding is not None:
        if class_label is None and pipe.needs_labels:
            raise ValueError(
                "every sample of this network needs a label, and stock's pipeline has none: name one class"
            )
        label: Any = pipe.class_numbers([class_label], 1)
        unet = given_class(unet, int(label))
    elif class_label is not None:
        raise ValueError(f"class_label={class_label!r}: the network is unconditional")
    return (DDIMPipeline if is_ddim else DDPMPipeline)(to_stock(unet), stock)  # type: ignore[arg-type]


def state_size(pipe: DiffusionPipeline, sample_size: int) -> None:
    """Write the images' size into the configuration of a network that states none. ValueError where it states one."""
    stated = pipe.unet.config.get("sample_size")
    if stated is not None:
        raise ValueError(
            f"--sample_size {sample_size} is for TensorFlow checkpoints, files of PyTorch ports and networks that "
            f"state no size; this one has sample_size={stated}"
        )
    pipe.unet.register_to_config(sample_size=sample_size)


def unknown_keys(pipe: DiffusionPipeline) -> list[str]:
    """The keys of a pipeline's configurations, network's and scheduler's, that no class of diffusers or ours knows."""
    scheduler, network = pipe.scheduler, pipe.unet
    known = {key for kind in (type(scheduler), *scheduler.compatibles) for key in kind._get_init_keys(kind)}
    unknown = scheduler.config.keys() - known, network.config.keys() - type(network)._get_init_keys(type(network))
    return [key for keys in unknown for key in sorted(keys) if not key.startswith("_")]


@torch.no_grad()
def given_class(unet: DDPMPaperUNet, class_label: int) -> DDPMPaperUNet:
    """ε_θ(x_t, t, y) for one class y as a network without classes, outputs equal to 1e-5.

    The class's vector, which is added to the time embedding, goes into its last bias. Raises ValueError for a class
    that the network does not have.
    """
    if not isinstance(unet, DDPMPaperUNet):
        raise ValueError(f"unet is a {type(unet).__name__}; a DDPMPaperUNet can be given a class")
    if unet.class_embedding is None:
        raise ValueError(f"class_label={class_label}: the network is unconditional")
    row = unet.class_embedding.rows(class_label, 1, unet.device)
    weights, config = unet.state_dict(), {**unet.config, "num_class_embeds": None, "null_class": None}
    vector = weights.pop("class_embedding.weight")[row[0]]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + vector
    return _with_weights(DDPMPaperUNet, {k: v for k, v in config.items() if not k.startswith("_")}, weights, unet)


def from_stock(unet: UNet2DModel, *, null_class: int | None = None) -> DDPMPaperUNet:
    """The same network as our class, outputs equal to 1e-5, e.g. of `google/ddpm-cifar10-32`.

    `null_class` says which row of its class embedding means "no label", which stock's configuration cannot.
    Weights are copied and keep their dtype and device. Raises ValueError naming the configuration's key, its value
    and what is needed, if UNet2DModel does with it what the paper's UNet does not; also where they are not finite.
    """
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"unet is a {type(unet).__name__}; a UNet2DModel can be converted")
    return _with_weights_of(unet, DDPMPaperUNet, {**_paper_config(unet.config), "null_class": null_class})


def to_stock(unet: DDPMPaperUNet) -> UNet2DModel:
    """The same network as diffusers' class, outputs equal to 1e-5; `from_stock` gives back exactly the same weights.

    Weights are copied and keep their dtype and device. A network with learned variance (out_channels twice
    in_channels) converts too, but not its meaning: the second half of our channels is a log-variance, as in the
    paper's code, while stock's DDPMScheduler takes its `learned` for the variance and `learned_range` for a place
    between the two fixed ones. Raises ValueError for other networks, and for weights that are not finite.
    """
    if not isinstance(unet, DDPMPaperUNet):
        raise ValueError(f"unet is a {type(unet).__name__}; a DDPMPaperUNet can be converted")
    config = unet.config
    size, levels = config["sample_size"], len(config["block_out_channels"])
    side = size if isinstance(size, int) else max(size)
    attention = [side >> level in config["attention_resolutions"] for level in range(levels)]
    block_types = {
        "down_block_types": tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
    }
    shared = {key: config[key] for key in (*_SHARED, "block_out_channels")}
    return _with_weights_of(unet, UNet2DModel, {**_PAPER_VALUES, **shared, **block_types})


def _paper_config(stock: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the `DDPMPaperUNet` that computes what UNet2DModel does with `stock`. Raises ValueError."""
    channels = tuple(stock["block_out_channels"])
    down, up = stock["down_block_types"], stock["up_block_types"]
    for key, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if not set(types) <= known.keys():
            _refuse(key, types, f"only {' and '.join(known)}")
    attention = [_DOWN[block] for block in down]
    if attention != [_UP[block] for block in reversed(up)]:
        _refuse("up_block_types", up, f"attention on the same levels as down_block_types={down}")

    # the channels of the middle, and of the levels with attention
    heads = {channels[-1]} | {c for c, has in zip(channels, attention, strict=True) if has}
    same = {  # explicit values that mean the same as the paper's
        "time_embedding_dim": stock["time_embedding_dim"] == 4 * channels[0],
        "attention_head_dim": heads == {stock["attention_head_dim"]},
        "attn_norm_num_groups": stock["attn_norm_num_groups"] == stock["norm_num_groups"],
        "act_fn": stock["act_fn"] == "swish",
    }
    needed = {
        "time_embedding_dim": f"None or {4 * channels[0]}",
        "attention_head_dim": f"one head, so None or the channels of every level with attention, {sorted(heads)}",
    }
    for key, value in _PAPER_VALUES.items():
        if stock[key] != value and not same.get(key):
            _refuse(key, stock[key], needed.get(key, repr(value)))
    size = stock["sample_size"]
    sides = size if isinstance(size, list | tuple) else [size]
    if not sides or not all(type(side) is int and side > 0 for side in sides):
        remedy = "unet.register_to_config(sample_size=32) or ddpm-hf convert --sample_size 32, for example, states it"
        _refuse("sample_size", size, f"a side or (height, width), as positive integers: {remedy}")
    side = max(sides)
    return {
        **{key: stock[key] for key in _SHARED},
        "block_out_channels": channels,
        "attention_resolutions": tuple(side >> level for level, has in enumerate(attention) if has),
    }


def _refuse(key: str, value: Any, needed: str) -> NoReturn:
    raise ValueError(f"UNet2DModel has {key}={value!r}, which the paper's UNet cannot express; it needs {needed}")


def _with_weights_of(source: nn.Module, network: type[Model], config: Mapping[str, Any]) -> Model:
    """A `network` with copies of the source's weights, on its device, in its dtype and mode. NaN is refused."""
    return _with_weights(network, config, source.state_dict(), source)


def _with_weights(
    network: type[Model], config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], source: nn.Module
) -> Model:
    """A `network` with copies of these weights, in the source's mode."""
    if bad := [name for name, x in weights.items() if x.device.type != "meta" and not torch.isfinite(x).all()]:
        raise ValueError(f"the weights of the {type(source).__name__} are not finite: {', '.join(bad)}")
    with torch.device("meta"):  # takes no memory and draws no random numbers for weights that are replaced at once
        model = network(**config)
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return model.train(source.training)
