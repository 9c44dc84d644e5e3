"""The paper's network as PyTorch ports save it (pesser/pytorch_diffusion, ermongroup/ddim) → our network and pipeline.

Their files are pickles, read by `torch.load(weights_only=True)`, which runs nothing of what they say. This is the only
place that does so; weights in diffusers' `.bin` files are read by diffusers, the same way.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..pipeline_loading import DDPMPaperPipeline
from ..unet.unet_ddpm_paper import DDPMPaperUNet
from .tensorflow import from_tf_variables, paper_pipeline

_FIRST = ("conv_in.weight", "temb.dense.0.weight")  # the ports' network has both names
_NAME = re.compile(
    r"(?:temb\.dense\.[01]|conv_in|conv_out|norm_out|mid\.(?:block|attn)_\d+\.\w+"
    r"|(?:down|up)\.\d+\.(?:(?:block|attn)\.\d+\.\w+|(?:down|up)sample\.conv))\.(?:weight|bias)"
)
# Other networks by their tensors' names: what they are, and why their weights do not fit the paper's network.
_OTHERS = {
    r"all_modules\.\d+\.": (
        "score_sde",
        "its ddpm has attention once per level on the way up, the paper's after every block, and its other networks "
        "differ in more",
    ),
    r"(input|output)_blocks\.\d+\..*transformer_blocks\.": (
        "latent diffusion",
        "it has layers of transformers, and draws latents of an autoencoder",
    ),
    r"(?:^|\.)(encoder|decoder)\.(down|up)\.\d+\.block\.": (
        "an autoencoder of latent diffusion",
        "it is no diffusion model",
    ),
    r"(input|output)_blocks\.\d+\.": (
        "improved-diffusion or guided-diffusion",
        "its time embedding has other frequencies and the cosine first, GroupNorm an eps of 1e-5, and downsampling "
        "pads both sides",
    ),
    r"(downs|ups)\.\d+\.\d+\.": (
        "lucidrains' denoising-diffusion-pytorch",
        "it has other blocks (convolution before the norm, time as scale and shift, linear attention) and a first "
        "convolution of 7×7",
    ),
    r"(downblocks|middleblocks|upblocks)\.\d+\.": (
        "w86763777's pytorch-ddpm",
        "its time embedding has other frequencies and alternates sine and cosine, GroupNorm an eps of 1e-5, and "
        "downsampling pads both sides",
    ),
    r"(enc|dec)\.\d+x\d+_": (
        "NVlabs' EDM",
        "its time embedding, blocks and preconditioning are others, and its process is continuous",
    ),
    r"(down_blocks|up_blocks)\.\d+\.resnets\.": (
        "diffusers, or ours",
        "its configuration lies beside it: give the folder of the checkpoint, with its model_index.json",
    ),
}


def pipeline_from_pytorch_port(
    path: str | Path, *, ema: bool = True, sample_size: int | None = None, variance_type: str | None = None
) -> DDPMPaperPipeline:
    """`from_pytorch_port` with the paper's process, and the variance as in `pipeline_from_tf_checkpoint`.

    Such a file does not contain its process. One of ermongroup/ddim that was trained with another schedule needs a
    `DDPMPaperScheduler` of its own.
    """
    return paper_pipeline(from_pytorch_port(path, ema=ema, sample_size=sample_size), variance_type)


def from_pytorch_port(path: str | Path, *, ema: bool = True, sample_size: int | None = None) -> DDPMPaperUNet:
    """The network in a file of a PyTorch port of the paper's code: a state dict, alone or with others in a list.

    Of a training run of ermongroup/ddim, a list of which the last is their average, `ema` takes that one and
    `ema=False` the raw weights. `sample_size` is as in `from_tf_variables`: the weights do not determine it.

    Raises OSError for a file that cannot be opened; ValueError for one that holds more than tensors and plain values,
    for the networks of other projects, which are named with what differs, and for tensors that are missing, unknown,
    misshapen or not finite.
    """
    found = list(_state_dicts(read_tensors(path)))
    networks = [(place, tensors) for place, tensors in found if _prefix(tensors) is not None]
    if not networks:
        raise ValueError(f"{path} {_described([name for _, tensors in found for name in tensors])}")
    averaged = next((tensors for place, tensors in networks if "ema" in place.lower()), networks[-1][1])
    raw = next((tensors for _, tensors in networks if tensors is not averaged), None)
    if not ema and raw is None:
        raise ValueError(f"{path} has one kind of weights, and does not say which; leave out ema=False (--raw)")
    tensors = averaged if ema or raw is None else raw
    try:
        return from_tf_variables(paper_variables(tensors), sample_size=sample_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: str | Path) -> Any:
    """What a file of `torch.save` or of safetensors holds, on the CPU. ValueError for what only code could read."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader of a damaged or hostile file comes upon
        if not Path(path).is_file():
            raise
        beside = re.search(r"GLOBAL (\S+)", str(error))
        if beside is None:
            raise ValueError(
                f"{path} is damaged, or neither a file of torch.save nor safetensors ({type(error).__name__})"
            ) from error
        raise ValueError(
            f"{path} holds {beside[1]} beside its tensors, which only code could read: where you trust its source, "
            "load it yourself with weights_only=False, and save the network's state dict alone"
        ) from error


def paper_variables(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The ports' tensors under the names and in the layout of the paper's code. ValueError for other names.

    `down.0.block.1.conv1.weight` [out, in, H, W] is `down_0/block_1/conv1/W` [H, W, in, out] there. Of attention and
    of shortcuts, which are 1×1 convolutions in the ports, W is a matrix [in, out].
    """
    prefix = _prefix(tensors) or ""
    variables = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(prefix)
        if not full_name.startswith(prefix) or _NAME.fullmatch(name) is None:
            raise ValueError(f"{full_name!r} is not a tensor of the paper's UNet")
        layer, _, part = name.rpartition(".")
        path = re.sub(r"(down|up|block|attn)\.(\d+)", r"\1_\2", layer).replace("dense.", "dense").replace(".", "/")
        is_norm = re.search(r"(?:^|/)norm\w*$", path) is not None
        kind = {"weight": "gamma" if is_norm else "W", "bias": "beta" if is_norm else "b"}[part]
        variables[f"{path}/{kind}"] = _in_tf_layout(full_name, path, tensor)
    return variables


def _in_tf_layout(name: str, path: str, tensor: Tensor) -> np.ndarray:
    array = tensor.detach().float().numpy()
    if array.ndim > 1 and (path.endswith("/nin_shortcut") or re.search(r"/attn_\d+/", path)):
        if array.shape[2:] != (1, 1):
            raise ValueError(f"{name!r} has shape {array.shape}; a 1×1 convolution is expected")
        array = array[:, :, 0, 0]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _state_dicts(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The mappings of names to tensors in a file's content, and where they are in it."""
    if isinstance(content, Mapping):
        items = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        items = [(str(index), value) for index, value in enumerate(content)]
    else:
        return
    tensors = {name: value for name, value in items if isinstance(value, Tensor)}
    if tensors and isinstance(content, Mapping):
        yield place, tensors
    for name, value in items if depth else ():
        yield from _state_dicts(value, f"{place}/{name}", depth - 1)


def _prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before every name, such as "module."; None where these are not the ports' network."""
    name = next((name for name in tensors if re.fullmatch(rf"(?:.+\.)?{re.escape(_FIRST[0])}", name)), None)
    prefix = None if name is None else name.removesuffix(_FIRST[0])
    return prefix if prefix is not None and prefix + _FIRST[1] in tensors else None


def _described(names: list[str]) -> str:
    """What a file with tensors of these names is."""
    for pattern, (project, differs) in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return f"is a network of {project}, which cannot be converted: {differs}"
    listed = f"its first are {', '.join(names[:3])}" if names else "it has none with names"
    return f"holds no tensors of the paper's network ({listed}); conv_in and temb.dense are two of its layers"
