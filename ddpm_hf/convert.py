"""Networks and pipelines from elsewhere: the paper's TensorFlow checkpoints → ours, stock diffusers ⇄ ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from torch import nn

from .pipeline_ddpm_paper import DDPMPaperPipeline
from .scheduler.scheduling_ddpm_paper import DDPMPaperScheduler
from .tensor_bundle import TensorBundle
from .unet.unet_ddpm_paper import DDPMPaperUNet

# ---- variables of the paper's code ----------------------------------------------------------------------------------

_LAYERS = {  # the paper code's layer names → ours (which are stock diffusers')
    "temb/dense0": "time_embedding.linear_1",
    "temb/dense1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
_RESNET["nin_shortcut"] = "conv_shortcut"
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _our_name(layer: str, num_levels: int) -> str | None:
    """'down_1/block_0/conv1' → 'down_blocks.1.resnets.0.conv1'; None for a name the paper's UNet does not have."""
    if layer in _LAYERS:
        return _LAYERS[layer]
    match = re.fullmatch(
        r"mid/(block|attn)_(\d)/(\w+)|(down|up)_(\d+)/(?:(block|attn)_(\d+)/(\w+)|(down|up)sample/conv)", layer
    )
    if match is None:
        return None
    mid_kind, mid_index, mid_part, way, level, kind, index, part, sampler = match.groups()
    if mid_kind:
        block, kind, index, part = "mid_block", mid_kind, int(mid_index) - 1, mid_part  # mid counts from 1
    else:  # the paper's code counts levels from the finest on both ways, diffusers in order of use
        block = f"{way}_blocks.{int(level) if way == 'down' else num_levels - 1 - int(level)}"
    if sampler:
        return f"{block}.{sampler}samplers.0.conv" if sampler == way else None
    names, parts = ("resnets", _RESNET) if kind == "block" else ("attentions", _ATTENTION)
    return f"{block}.{names}.{index}.{parts[part]}" if part in parts else None


def _our_tensor(layer: str, part: str, value: np.ndarray) -> torch.Tensor:
    """TensorFlow's layout → torch's: convolutions HWIO → OIHW, dense and 1×1 'nin' [in, out] → [out, in]."""
    tensor = torch.tensor(np.asarray(value, dtype=np.float32))
    if part != "W":
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    tensor = tensor.T.contiguous()
    return tensor[:, :, None, None] if layer.endswith("nin_shortcut") else tensor


def from_tf_variables(variables: Mapping[str, np.ndarray], *, sample_size: int | None = None) -> DDPMPaperUNet:
    """A `DDPMPaperUNet` with the weights of the paper's code; its configuration is read off names and shapes.

    `variables` maps names such as `model/down_0/block_0/conv1/W` (a leading scope is ignored) to arrays in
    TensorFlow's layout. The weights do not tell the image size: where a level has attention, `sample_size` is chosen
    so that this level is at 16×16, as in all of the paper's models; without one it is 32. Pass it for a network of
    your own.

    Dropout, which leaves no trace in the weights either, is 0. Raises ValueError naming what is missing, unexpected,
    misshapen, there twice or not finite.
    """
    if sample_size is not None and (not isinstance(sample_size, int) or sample_size < 1):
        raise ValueError(f"sample_size={sample_size!r} must be an integer, 1 or more, or None")
    layers: dict[tuple[str, str], np.ndarray] = {}
    for name, value in variables.items():
        match = re.fullmatch(
            r"(?:.*?/)??((?:temb|conv_in|conv_out|norm_out|mid|down_\d+|up_\d+)(?:/.+)?)/(W|b|gamma|beta)", str(name)
        )
        if match is None:
            raise ValueError(f"{name!r} is not a variable of the paper's UNet")
        layer, value = (match[1], match[2]), np.asarray(value)
        if layer in layers:
            raise ValueError(f"{name!r}: there are several of {'/'.join(layer)}; give the variables of one network")
        if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise ValueError(f"{name!r} is not finite, or of no numbers at all ({value.dtype}): it is damaged")
        layers[layer] = value
    config = _config_of(layers, sample_size)
    state = {}
    for (layer, part), value in layers.items():
        ours = _our_name(layer, len(config["block_out_channels"]))
        if ours is None:
            raise ValueError(f"{layer!r} is not a layer of the paper's UNet")
        state[f"{ours}.{'weight' if part in ('W', 'gamma') else 'bias'}"] = _our_tensor(layer, part, value)
    unet = DDPMPaperUNet(**config)
    expected = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    found = {name: tuple(p.shape) for name, p in state.items()}
    if expected != found:
        missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = [
            f"{k} {found[k]} instead of {expected[k]}"
            for k in expected.keys() & found.keys()
            if expected[k] != found[k]
        ]
        raise ValueError(
            f"variables do not fit: missing {missing}, unexpected {unexpected}, misshapen {sorted(shapes)}"
        )
    unet.load_state_dict(state)
    return unet


def _config_of(layers: Mapping[tuple[str, str], np.ndarray], sample_size: int | None) -> dict:
    try:
        in_channels, out_channels = layers["conv_in", "W"].shape[2], layers["conv_out", "W"].shape[3]
        num_levels = len({layer.split("/")[0] for layer, _ in layers if layer.startswith("down_")})
        channels = [layers[f"down_{i}/block_0/conv1", "W"].shape[3] for i in range(num_levels)]
    except KeyError as error:
        raise ValueError(f"the variables lack {'/'.join(error.args[0])}, which every UNet of the paper has") from None
    except IndexError:
        raise ValueError("the variables are misshapen: a convolution's W must have four dimensions") from None
    num_blocks = sum(
        re.fullmatch(r"down_0/block_\d+/conv1", layer) is not None and part == "W" for layer, part in layers
    )
    with_attention = [i for i in range(num_levels) if (f"down_{i}/attn_0/q", "W") in layers]
    if sample_size is None:
        sample_size = 16 << with_attention[0] if with_attention else 32
    return {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": num_blocks,
        "attention_resolutions": tuple(sample_size >> i for i in with_attention),
        "norm_num_groups": 32,  # fixed in the paper's code
    }


# ---- TensorFlow checkpoints -----------------------------------------------------------------------------------------

_EMA = "/ExponentialMovingAverage"
_NOT_WEIGHTS = re.compile(r"(?:.*/)?(?:Adam(?:_\d+)?|beta[12]_power|global_step)")  # the optimizer's


def tf_checkpoint_prefix(path: str | Path) -> str | None:
    """The checkpoint at `path` as TensorFlow names it, `folder/model.ckpt-790000` without a suffix; None if none is.

    `path` is that, its `.index` file, or a folder, for the latest one: the file `checkpoint` in it names it. Raises
    ValueError if that is not there.
    """
    path = Path(path)
    prefix = str(path).removesuffix(".index")
    if Path(f"{prefix}.index").is_file():
        return prefix
    if not (path / "checkpoint").is_file():
        return None
    match = re.search(
        r'^model_checkpoint_path: "(.+)"$', (path / "checkpoint").read_text(errors="replace"), flags=re.MULTILINE
    )
    # Training may have recorded an absolute path, or a bucket: only the name still holds.
    latest = path / match[1].replace("\\", "/").rsplit("/", 1)[-1] if match else None
    if latest is None or not Path(f"{latest}.index").is_file():
        raise ValueError(
            f"{path / 'checkpoint'} names {match[1] if match else 'nothing'!r}, which is not in {path}; "
            f"give the prefix itself, e.g. {path / 'model.ckpt-790000'}"
        )
    return str(latest)


def from_tf_checkpoint(path: str | Path, *, ema: bool = True, sample_size: int | None = None) -> DDPMPaperUNet:
    """The network of a TF-1 checkpoint of the paper's code; `ema`: the averaged weights, which the paper samples with.

    `path` is a prefix (`folder/model.ckpt-790000`) or a folder with a `checkpoint` file. TensorFlow is not needed.
    `sample_size` as in `from_tf_variables`. Raises FileNotFoundError where there is no checkpoint, ValueError for
    files that are truncated or corrupt and for variables that are not the paper's UNet, or lack averages.
    """
    prefix = tf_checkpoint_prefix(path)
    if prefix is None:
        raise FileNotFoundError(
            f"no TensorFlow checkpoint at {path}: give the path of its .index file, or a folder with a file named "
            "'checkpoint'"
        )
    bundle = TensorBundle(prefix)
    averaged = {name.removesuffix(_EMA) for name in bundle.entries if name.endswith(_EMA)}
    raw = {name for name in bundle.entries if not name.endswith(_EMA) and not _NOT_WEIGHTS.fullmatch(name)}
    if ema and raw - averaged:
        lacking = sorted(raw - averaged)
        raise ValueError(
            f"{prefix} has no averaged copy (…{_EMA}) of {len(lacking)} of {len(raw)} variables, {lacking[0]} first; "
            "pass ema=False (--raw) for the raw weights"
        )
    names = averaged if ema else raw
    return from_tf_variables(
        {name: bundle.read(name + _EMA if ema else name) for name in sorted(names)}, sample_size=sample_size
    )


def pipeline_from_tf_checkpoint(
    path: str | Path, *, ema: bool = True, sample_size: int | None = None, variance_type: str | None = None
) -> DDPMPaperPipeline:
    """`from_tf_checkpoint` with the paper's process: T = 1000, β linear from 1e-4 to 0.02, the network predicts ε.

    A checkpoint does not tell the reverse variance. The default is the paper's: `fixed_large` up to 32×32, as for
    CIFAR-10, and `fixed_small` above, as at 256×256; `learned` where the network has the channels for it.
    Raises as `from_tf_checkpoint`, and ValueError for a variance that the network's channels do not fit.
    """
    unet = from_tf_checkpoint(path, ema=ema, sample_size=sample_size)
    size, in_channels, out_channels = (unet.config[key] for key in ("sample_size", "in_channels", "out_channels"))
    learned = out_channels != in_channels
    if variance_type is None:
        variance_type = "learned" if learned else "fixed_large" if size <= 32 else "fixed_small"
    if (variance_type == "learned") != learned:
        raise ValueError(
            f"variance_type={variance_type!r} does not fit a network of {in_channels} channels in and "
            f"{out_channels} out: 'learned' needs twice as many out, 'fixed_small' and 'fixed_large' as many"
        )
    return DDPMPaperPipeline(unet, DDPMPaperScheduler(variance_type=variance_type))


# ---- stock diffusers ------------------------------------------------------------------------------------------------

# What the paper's UNet has where UNet2DModel has a choice.
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
    "num_class_embeds": None,
    "time_embedding_dim": None,  # None stands for 4 · block_out_channels[0]
    "attention_head_dim": None,  # None stands for the level's channels: one head
    "attn_norm_num_groups": None,  # None stands for norm_num_groups
}
_SHARED = ("sample_size", "in_channels", "out_channels", "layers_per_block", "dropout", "norm_num_groups")
_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}  # stock's block types, and whether they have attention
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True}


Model = TypeVar("Model", DDPMPaperUNet, UNet2DModel)


def _refuse(key: str, value: Any, needed: str) -> NoReturn:
    raise ValueError(f"UNet2DModel has {key}={value!r}, which the paper's UNet cannot express; it needs {needed}")


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

    heads = {channels[-1]} | {c for c, has in zip(channels, attention, strict=True) if has}  # of the middle, of levels
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
    if size is None:
        _refuse("sample_size", None, "a side or (height, width): load the network with sample_size=32, for example")
    side = size if isinstance(size, int) else max(size)
    return {
        **{key: stock[key] for key in _SHARED},
        "block_out_channels": channels,
        "attention_resolutions": tuple(side >> level for level, has in enumerate(attention) if has),
    }


def _with_weights_of(source: nn.Module, network: type[Model], config: Mapping[str, Any]) -> Model:
    """A `network` with copies of the source's weights, on its device, in its dtype and mode. ValueError for NaNs."""
    weights = source.state_dict()
    if bad := [name for name, x in weights.items() if x.device.type != "meta" and not torch.isfinite(x).all()]:
        raise ValueError(f"the weights of the {type(source).__name__} are not finite: {', '.join(bad)}")
    with torch.device("meta"):  # without memory, or random numbers for weights that are replaced at once
        model = network(**config)
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return model.train(source.training)


def from_stock(unet: UNet2DModel) -> DDPMPaperUNet:
    """The same network as our class, outputs equal to 1e-5, e.g. of `google/ddpm-cifar10-32`.

    Weights are copied and keep their dtype and device. Raises ValueError naming the configuration's key, its value
    and what is needed, if UNet2DModel does with it what the paper's UNet does not; also where they are not finite.
    """
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"unet is a {type(unet).__name__}; a UNet2DModel can be converted")
    return _with_weights_of(unet, DDPMPaperUNet, _paper_config(unet.config))


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


def pipeline_from_stock(stock: DiffusionPipeline | str | Path) -> DDPMPaperPipeline:
    """Our pipeline for one with stock's UNet2DModel and DDPMScheduler, or for the folder or repository of such a one.

    Our `from_pretrained` runs stock's parts as they are; this makes them ours.
    Raises ValueError for what ours cannot express: see `from_stock` and `DDPMPaperScheduler`.
    """
    pipe = stock if isinstance(stock, DiffusionPipeline) else DDPMPaperPipeline.from_pretrained(stock)
    unet, scheduler = pipe.unet, pipe.scheduler
    if not isinstance(unet, UNet2DModel) or not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"the pipeline has a {type(unet).__name__} and a {type(scheduler).__name__}; stock's UNet2DModel and "
            "DDPMScheduler can be converted (DDPMScheduler.from_config makes one of another scheduler's configuration)"
        )
    if scheduler.config["variance_type"] == "learned":  # ours would accept the word, in the paper's sense
        raise ValueError(
            "variance_type='learned' means a variance in stock's DDPMScheduler and a log-variance in ours: if the "
            "network puts out the latter, build DDPMPaperPipeline(from_stock(unet), DDPMPaperScheduler(...)) yourself"
        )
    ours = DDPMPaperScheduler.from_config(scheduler.config)
    return DDPMPaperPipeline(from_stock(unet), ours)  # type: ignore[arg-type]


def pipeline_to_stock(pipe: DDPMPaperPipeline) -> DDPMPipeline:
    """Stock's DDPMPipeline with UNet2DModel and DDPMScheduler that samples what ours does, up to float32 tables.

    The paper code's own schedules travel as `trained_betas`. Raises ValueError for points, and for what stock's
    DDPMScheduler has no word for: learned log-variances, fitted variances, a chain of its own, `previous_sample`.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    if not isinstance(unet, DDPMPaperUNet) or not isinstance(scheduler, DDPMPaperScheduler):
        raise ValueError(
            f"the pipeline has a {type(unet).__name__} and a {type(scheduler).__name__}; a DDPMPaperUNet and a "
            "DDPMPaperScheduler can be converted"
        )
    unknown = (("variance_type", "learned"), ("variance_type", "fitted"), ("prediction_type", "previous_sample"))
    for key, value in unknown:
        if scheduler.config[key] == value:
            raise ValueError(f"stock's DDPMScheduler has no {key} that means what {value!r} does here")
    if "inference_timesteps" in scheduler.config:
        raise ValueError("stock's DDPMScheduler cannot keep inference_timesteps; pass them to its set_timesteps")
    stock = DDPMScheduler.from_config(scheduler.config)
    return DDPMPipeline(to_stock(unet), stock)  # type: ignore[arg-type]
