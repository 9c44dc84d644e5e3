"""The paper's TensorFlow checkpoints → our network and pipeline."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..pipeline_loading import DDPMPaperPipeline
from ..scheduler import DDPMPaperScheduler
from ..unet.unet_ddpm_paper import DDPMPaperUNet
from .tensor_bundle import TensorBundle

_EMA = "/ExponentialMovingAverage"
_NOT_WEIGHTS = re.compile(r"(?:.*/)?(?:Adam(?:_\d+)?|beta[12]_power|global_step)")  # state of the optimizer


def pipeline_from_tf_checkpoint(
    path: str | Path, *, ema: bool = True, sample_size: int | None = None, variance_type: str | None = None
) -> DDPMPaperPipeline:
    """`from_tf_checkpoint` with the paper's process: T = 1000, β linear from 1e-4 to 0.02, the network predicts ε.

    A checkpoint does not contain the reverse variance. The default is the paper's: `fixed_large` up to 32×32, as for
    CIFAR-10, and `fixed_small` above, as at 256×256; `learned` where the network has the channels for it.
    Raises as `from_tf_checkpoint`, and ValueError for a variance that the network's channels do not fit.
    """
    return paper_pipeline(from_tf_checkpoint(path, ema=ema, sample_size=sample_size), variance_type)


def paper_pipeline(unet: DDPMPaperUNet, variance_type: str | None) -> DDPMPaperPipeline:
    """A network of the paper with the paper's process; `variance_type` is as in `pipeline_from_tf_checkpoint`."""
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


def from_tf_checkpoint(path: str | Path, *, ema: bool = True, sample_size: int | None = None) -> DDPMPaperUNet:
    """The network of a TF-1 checkpoint of the paper's code, with the averaged weights that the paper samples with.

    `path` is a prefix (`folder/model.ckpt-790000`) or a folder with a `checkpoint` file. `ema=False` takes the raw
    weights. `sample_size` is as in `from_tf_variables`. TensorFlow is not needed.

    Raises FileNotFoundError where there is no checkpoint, ValueError for files that are truncated or corrupt, for
    variables that are not the paper's UNet, and for those that lack averages.
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


def tf_checkpoint_prefix(path: str | Path) -> str | None:
    """The checkpoint at `path` as TensorFlow names it, `folder/model.ckpt-790000` without a suffix, or None.

    `path` is that name, its `.index` file, or a folder, for the latest checkpoint: the file `checkpoint` in the folder
    names it. Raises ValueError if the checkpoint that it names does not exist.
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
    # Training may have recorded an absolute path, or a bucket: only the file's name is still right.
    latest = path / match[1].replace("\\", "/").rsplit("/", 1)[-1] if match else None
    if latest is None or not Path(f"{latest}.index").is_file():
        raise ValueError(
            f"{path / 'checkpoint'} names {match[1] if match else 'nothing'!r}, which is not in {path}; "
            f"give the prefix itself, e.g. {path / 'model.ckpt-790000'}"
        )
    return str(latest)


# ---- variables of the paper's code → weights -----------------------------------------------------------------------

_LAYERS = {  # the paper code's names of layers → ours, which are stock diffusers'
    "temb/dense0": "time_embedding.linear_1",
    "temb/dense1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
_RESNET["nin_shortcut"] = "conv_shortcut"
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def from_tf_variables(variables: Mapping[str, np.ndarray], *, sample_size: int | None = None) -> DDPMPaperUNet:
    """A `DDPMPaperUNet` with the weights of the paper's code; its configuration is read off names and shapes.

    `variables` maps names such as `model/down_0/block_0/conv1/W` (a leading scope is ignored) to arrays in
    TensorFlow's layout. The weights do not determine the image size: where a level has attention, `sample_size` is
    chosen so that this level is at 16×16, as in all of the paper's models; otherwise it is 32. Pass it for a network
    of your own.

    Dropout, which the weights do not show either, is 0. Raises ValueError naming what is missing, unexpected,
    misshapen, duplicated or not finite.
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
    """The configuration of the `DDPMPaperUNet` with these variables, from their names and shapes."""
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
