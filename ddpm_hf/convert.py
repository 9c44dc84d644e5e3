"""Weights from elsewhere → ours: the variables of the paper's TensorFlow code."""

import re
from collections.abc import Mapping

import numpy as np
import torch

from .unet.unet_ddpm_paper import DDPMPaperUNet

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

    Dropout, which leaves no trace in the weights either, is 0. Raises ValueError naming what is missing, unexpected or
    misshapen.
    """
    layers: dict[tuple[str, str], np.ndarray] = {}
    for name, value in variables.items():
        match = re.fullmatch(
            r"(?:.*?/)??((?:temb|conv_in|conv_out|norm_out|mid|down_\d+|up_\d+)(?:/.+)?)/(W|b|gamma|beta)", name
        )
        if match is None:
            raise ValueError(f"{name!r} is not a variable of the paper's UNet")
        layers[match[1], match[2]] = np.asarray(value)
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
