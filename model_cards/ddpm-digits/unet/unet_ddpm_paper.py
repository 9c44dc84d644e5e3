"""The networks of Ho et al. 2020 (arXiv 2006.11239): the ε-UNet of Appendix B, and a small MLP for points.

Parameters carry the names of diffusers' UNet2DModel, so weights move between the two without a map.
This file is copied into checkpoints, so it depends on torch and diffusers alone.
"""

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

MAX_SIZE, MAX_LAYERS = 2**16, 1000  # a mistyped number must not allocate all memory
NORM_EPS = 1e-6  # of the paper's code; torch's default is 1e-5
# the files of a network's weights; the first group is their variant
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:-\d+-of-\d+)?(?:\.(.+?))?(?:-\d+-of-\d+)?\.(safetensors|bin)")
PICKLED = (
    "use_safetensors=False (ddpm-hf --allow_pickle) if you trust its source: a .bin is a pickle, which can run code"
)
PICKLED += "; save_pretrained, or ddpm-hf convert, then writes safetensors"
Time = int | float | Tensor
Labels = int | Tensor | None
Output = UNet2DOutput | tuple[Tensor]


def sinusoidal_embedding(timestep: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[sin(t ω_i), cos(t ω_i)] with ω_i = 10000^(−i / (dim/2 − 1)): [B] → [B, dim] in `dtype`, for even dim >= 4.

    The raw 0-based t enters, unscaled. Source: the paper code's nn.get_timestep_embedding, which is float32's; at
    t = 1000 that is 6e-5 from float64's.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=dtype, device=timestep.device) * -(math.log(1e4) / (half - 1)))
    angles = timestep.to(dtype)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """Dense(4 ch) – SiLU – Dense(4 ch) over the sinusoidal embedding of t: [B] → [B, 4 ch]."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, timestep: Time, sample: Tensor) -> Tensor:
        size = sample.shape[0]  # not `len`, of which torch.export would make a constant
        if not isinstance(timestep, Tensor):
            if not isinstance(timestep, int | float):
                raise ValueError(f"timestep={timestep!r} must be a number or a tensor")
            timestep = torch.full((size,), timestep, device=sample.device)
        if timestep.numel() not in (1, size):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; expected one, or one per sample, ({size},)")
        timestep = timestep.to(sample.device).reshape(-1).expand(size)
        dtype = torch.promote_types(sample.dtype, torch.float32)  # bfloat16 cannot tell t from t + 1
        embedding = sinusoidal_embedding(timestep, self.linear_1.in_features, dtype).to(sample.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ClassEmbedding(nn.Embedding):
    """One learned vector for each class, which is added to the time embedding: [B] → [B, 4 ch]. Not in the paper.

    Args:
        num_embeddings: rows: the classes, and one more where `null_class` is given.
        embedding_dim: of the time embedding.
        null_class: the row that stands for "no label", None where every sample needs one.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, null_class: int | None):
        super().__init__(num_embeddings, embedding_dim)
        self.null_class = null_class

    def forward(self, class_labels: Labels, temb: Tensor) -> Tensor:
        """`temb` [B, 4 ch] with the vector of each sample's class added."""
        return temb + super().forward(self.rows(class_labels, temb.shape[0], temb.device)).to(temb.dtype)

    def rows(self, class_labels: Labels, batch_size: int, device: torch.device) -> Tensor:
        """Each sample's row, integers [B]. Labels on the CPU are looked at, before they move. Raises ValueError."""
        if class_labels is None:
            missing = "this network needs class_labels: no row stands for an unlabelled sample (null_class)"
            _check(self.null_class is not None, missing)
            class_labels = self.null_class
        return class_rows(class_labels, self.num_embeddings, batch_size, device)


def class_rows(class_labels: Any, num_rows: int, batch_size: int, device: torch.device) -> Tensor:
    """Labels, one or [B], as int64 [B] on `device`; those on the CPU are looked at first. Raises ValueError."""
    expected = f"integers from 0 to {num_rows - 1}, one or one per sample, ({batch_size},)"
    if isinstance(class_labels, str):  # names are the pipeline's
        raise ValueError(f"class_labels={class_labels!r} must be {expected}")
    labels = torch.as_tensor(class_labels)
    if labels.ndim > 1 or labels.numel() not in (1, batch_size):
        raise ValueError(f"class_labels has shape {tuple(labels.shape)}; expected {expected}")
    known = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if known and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        known = all(0 <= label < num_rows for label in labels.reshape(-1).tolist())
    if not known:
        raise ValueError(f"class_labels={class_labels!r} must be {expected}")
    return labels.to(device, torch.int64).reshape(-1).expand(batch_size)


class ResnetBlock(nn.Module):
    """GroupNorm–SiLU–conv, + time, GroupNorm–SiLU–dropout–conv, + shortcut: [B, in, H, W] → [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, num_groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nn.Module):
    """One head of self-attention over the H·W positions, scale C^-½, with a residual: [B, C, H, W] → the same."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list only for the name `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H·W, C]
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """3×3 convolution of stride 2, zeros on the right and below only: [B, C, H, W] → [B, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour ×2, then a 3×3 convolution: [B, C, H, W] → [B, C, 2H, 2W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution (kwargs: theirs); the first `num_attentions` are followed by attention."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # set by enable_gradient_checkpointing

    def __init__(self, channels: Sequence[tuple[int, int]], num_attentions: int, num_groups: int, **kwargs):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(i, o, num_groups=num_groups, **kwargs) for i, o in channels])
        self.attentions = nn.ModuleList([SelfAttention(o, num_groups) for _, o in channels[:num_attentions]])

    def _layer(self, index: int, x: Tensor, temb: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(self.resnets[index], x, temb)
        else:
            x = self.resnets[index](x, temb)
        return self.attentions[index](x) if index < len(self.attentions) else x


class DownBlock(_Level):
    """(x, temb) → (x, the skip connections this level leaves, finest first)."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, downsample: bool, **kwargs):
        super().__init__(
            [(in_channels if i == 0 else out_channels, out_channels) for i in range(num_layers)], **kwargs
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        skips = ()
        for index in range(len(self.resnets)):
            x = self._layer(index, x, temb)
            skips += (x,)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips += (x,)
        return x, skips


class MidBlock(_Level):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, **kwargs):
        super().__init__([(channels, channels)] * 2, num_attentions=1, **kwargs)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self._layer(1, self._layer(0, x, temb), temb)


class UpBlock(_Level):
    """(x, skips of this level in the order they are used, temb) → x, at twice the resolution unless it is the last."""

    def __init__(self, in_channels: int, out_channels: int, skip_channels: Sequence[int], upsample: bool, **kwargs):
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        super().__init__([(i + skip, out_channels) for i, skip in zip(inputs, skip_channels, strict=True)], **kwargs)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: tuple[Tensor, ...], temb: Tensor) -> Tensor:
        for index, skip in enumerate(skips):
            x = self._layer(index, torch.cat([x, skip], dim=1), temb)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class _PaperModel(ModelMixin, ConfigMixin):
    """What both networks share: how their weights begin, and how they are loaded."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    time_embedding: TimeEmbedding
    class_embedding: ClassEmbedding | None

    def _class_embedding(self, channels: int) -> ClassEmbedding | None:
        num_class_embeds = self.config["num_class_embeds"]
        return num_class_embeds and ClassEmbedding(num_class_embeds, channels, self.config["null_class"])

    def _embedding(self, timestep: Time, class_labels: Labels, sample: Tensor) -> Tensor:
        """Of t, and of the classes where the network has some: [B, 4 ch]."""
        temb = self.time_embedding(timestep, sample)
        if self.class_embedding is not None:
            return self.class_embedding(class_labels, temb)
        _check(class_labels is None, "class_labels: this network is unconditional (num_class_embeds is None)")
        return temb

    def _init_weights(self, near_zero: set[Any]) -> None:
        """As in the paper's code: bias 0, variance scaling (fan average, uniform) by 1, by 1e-10 at branches' ends."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(1e-10) if module in near_zero else 1.0)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in diffusers, but only whole: ValueError where tensors are missing, unknown, misshapen or not finite.

        Diffusers draws missing weights at random, with a warning. Only safetensors are read unless
        `use_safetensors=False` asks for a pickled `.bin`; OSError where they are absent. Weights are copied to aligned
        memory: as mapped, they give sums that differ by 1e-6.
        """
        where, wants_info = args[0] if args else cls.__name__, kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        check_weights(Path(where, kwargs.get("subfolder") or "").glob("*"), kwargs)
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except (RuntimeError, ValueError) as error:
            # of diffusers' message the part that says what is wrong; the rest is how to ignore it
            misshapen = re.search(r"\S+ expected shape .*?\), but got .*?\)", str(error))
            if misshapen is None and isinstance(error, ValueError):
                raise
            told = misshapen[0] if misshapen else error
            raise ValueError(f"{where}: the weights are damaged or of another network; {told}") from error
        model, info = loaded
        named = [(name, x) for name, x in model.named_parameters() if x.device.type != "meta"]
        faults = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
        faults["not finite"] = [name for name, x in named if not torch.isfinite(x).all()]
        listed = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in faults.items() if names)
        _check(not listed, f"{where}: the weights are damaged or of another network; {listed}")
        for _, parameter in named:
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return (model, info) if wants_info else model


class DDPMPaperUNet(_PaperModel):
    """The paper's ε_θ(x_t, t) for images (Appendix B); the defaults are its CIFAR-10 network, 35,746,307 parameters.

    Args:
        sample_size: side of the images, or (height, width); each divisible by 2^(levels − 1).
        in_channels: channels of x_t, 1 or more.
        out_channels: channels of the output: `in_channels`, or twice as many for a learned variance.
        block_out_channels: channels per level, finest first; 256² models have (128, 128, 256, 256, 512, 512).
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: levels whose longer side is one of these have attention; the middle always has.
        dropout: before the second convolution of every residual block (0.1 for CIFAR-10, 0 at 256²).
        norm_num_groups: groups of every GroupNorm; divides every number of channels.
        num_class_embeds: rows of the class embedding, for a network that is conditional on labels; None: it is not.
        null_class: which of these rows means "no label", None if none does.
    """

    _no_split_modules = ["DownBlock", "MidBlock", "UpBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        num_class_embeds: int | None = None,
        null_class: int | None = None,
    ):
        super().__init__()
        _check_unet_config(self.config)
        base, lowest = block_out_channels[0], len(block_out_channels) - 1
        attended = [_longer(sample_size) >> level in attention_resolutions for level in range(lowest + 1)]
        common = {"time_channels": 4 * base, "num_groups": norm_num_groups, "dropout": dropout}

        self.time_embedding = TimeEmbedding(base)
        self.class_embedding = self._class_embedding(4 * base)
        self.conv_in = nn.Conv2d(in_channels, base, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels, skip_channels, layers = base, [base], layers_per_block
        for level, out in enumerate(block_out_channels):
            options = {"downsample": level < lowest, "num_attentions": layers * attended[level], **common}
            self.down_blocks.append(DownBlock(channels, out, layers, **options))
            skip_channels += [out] * (layers + options["downsample"])
            channels = out
        self.mid_block = MidBlock(channels, **common)
        self.up_blocks = nn.ModuleList()
        layers += 1  # one more on the way up
        for level, out in reversed(list(enumerate(block_out_channels))):
            skips = [skip_channels.pop() for _ in range(layers)]
            options = {"upsample": level > 0, "num_attentions": layers * attended[level], **common}
            self.up_blocks.append(UpBlock(channels, out, skips, **options))
            channels = out
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, base, NORM_EPS)
        self.conv_out = nn.Conv2d(base, out_channels, 3, padding=1)
        residual = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        residual += [m.to_out[0] for m in self.modules() if isinstance(m, SelfAttention)]
        self._init_weights(near_zero={self.conv_out, *residual})

    def register_to_config(self, **config: Any) -> None:
        """As in diffusers; with another `sample_size` attention stays at its levels. Raises ValueError."""
        side: Any = config.get("sample_size")
        if hasattr(self, "down_blocks") and side not in (None, self.config["sample_size"]):
            _check_unet_config({**self.config, **config})
            attended = [level for level, block in enumerate(self.down_blocks) if len(block.attentions)]  # type: ignore
            config["attention_resolutions"] = tuple(_longer(side) >> level for level in attended)
        super().register_to_config(**config)

    def forward(self, sample: Tensor, timestep: Time, class_labels: Labels = None, return_dict: bool = True) -> Output:
        """ε_θ(x_t, t) or ε_θ(x_t, t, y), or what else the network was trained to predict.

        `sample` [B, in_channels, H, W] in about [-1, 1] plus noise, H and W divisible by 2^(levels − 1) (those of
        `sample_size` are only what it was trained on); `timestep` 0-based, one for all or [B]; `class_labels`
        integers, one for all or [B], by default `null_class`. Returns [B, out_channels, H, W] as `.sample`, or in a
        1-tuple. Raises ValueError for other shapes, and for labels that are unknown, or missing where needed.
        """
        _check_sample(sample, self.conv_in.in_channels, "H", "W")
        factor = 2 ** (len(self.down_blocks) - 1)
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(f"height and width {tuple(sample.shape[2:])} must be divisible by {factor}")
        temb = self._embedding(timestep, class_labels, sample)
        x = self.conv_in(sample)
        skips = (x,)
        for block in self.down_blocks:
            x, left = block(x, temb)
            skips += left
        x = self.mid_block(x, temb)
        for block in self.up_blocks:
            used = self.config["layers_per_block"] + 1
            x = block(x, skips[-used:][::-1], temb)
            skips = skips[:-used]
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)


class PointBlock(nn.Module):
    """x + Dense(SiLU(Dense(SiLU(norm(x))) + time)): [B, hidden] → [B, hidden]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.time_emb_proj = nn.Linear(4 * hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.linear_1(F.silu(self.norm(x))) + self.time_emb_proj(F.silu(temb))
        return x + self.linear_2(F.silu(h))


class DDPMPaperMLP(_PaperModel):
    """ε_θ(x_t, t) for points in R^d: residual blocks with the UNet's time embedding. Not in the paper.

    Args:
        in_channels: d.
        out_channels: d, or 2 d for a learned variance.
        hidden_size: width of the residual stream, even.
        num_layers: number of residual blocks.
        num_class_embeds, null_class: as of `DDPMPaperUNet`.
    """

    _no_split_modules = ["PointBlock"]
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_class_embeds: int | None = None,
        null_class: int | None = None,
    ):
        super().__init__()
        _check_whole(num_layers=num_layers, at_most=MAX_LAYERS)
        _check_even("hidden_size", hidden_size)
        _check_shared_config(self.config)
        self.time_embedding = TimeEmbedding(hidden_size)
        self.class_embedding = self._class_embedding(4 * hidden_size)
        self.linear_in = nn.Linear(in_channels, hidden_size)
        self.blocks = nn.ModuleList([PointBlock(hidden_size) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(hidden_size)
        self.linear_out = nn.Linear(hidden_size, out_channels)
        self._init_weights(near_zero={self.linear_out, *(block.linear_2 for block in self.blocks)})

    def forward(self, sample: Tensor, timestep: Time, class_labels: Labels = None, return_dict: bool = True) -> Output:
        """`sample` [B, in_channels] → [B, out_channels], as `.sample`; the rest as of `DDPMPaperUNet.forward`."""
        _check_sample(sample, self.linear_in.in_features)
        temb = self._embedding(timestep, class_labels, sample)
        x = self.linear_in(sample)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, temb)  # pyright: ignore[reportOptionalCall]
            else:
                x = block(x, temb)
        x = self.linear_out(F.silu(self.norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)


_evaluated: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # by how many, and what they changed
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside, `network` is in eval mode; the last of the threads that are inside sets it back to what it was."""
    with _evaluated_lock:
        if network not in _evaluated:
            _evaluated[network] = [0, [module for module in network.modules() if module.training]]
        inside = _evaluated[network]
        inside[0] += 1
        for module in inside[1]:
            module.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            inside[0] -= 1
            if inside[0] == 0:
                del _evaluated[network]
                for module in inside[1]:
                    module.training = True


# ---- what is refused -----------------------------------------------------------------------------------------------


def _check(holds: Any, message: str) -> None:
    """For configurations: a message that `forward` formats would make torch.compile and export fix a shape."""
    if not holds:
        raise ValueError(message)


def check_weights(files: Iterable[Path], asked: Mapping[str, Any]) -> None:
    """OSError if there are weights, but none of this `variant` and `use_safetensors`: which, and how to read them."""
    ordered = sorted(files, key=lambda file: file.name, reverse=True)  # safetensors first
    found = {(m[1], m[2] == "safetensors"): file for file in ordered if (m := WEIGHTS.fullmatch(file.name))}
    if found and (asked.get("variant"), bool(asked["use_safetensors"])) not in found:
        (variant, safe), file = next(iter(found.items()))
        how = [f'variant="{variant}" (ddpm-hf --variant {variant})'] * bool(variant) + [PICKLED] * (not safe)
        options = " and ".join(how) or "neither variant nor use_safetensors"
        raise OSError(f"found {', '.join(map(str, found.values()))}; {file.name} is read with {options}")


def _check_whole(*, at_most: int = MAX_SIZE, **values: Any) -> None:
    """Raises ValueError unless each is an integer from 1 to `at_most`."""
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        _check(whole and value >= 1, f"{name}={value!r} must be an integer and at least 1")
        _check(value <= at_most, f"{name}={value!r} must be at most {at_most}")


def _check_even(name: str, width: Any) -> None:
    """Raises ValueError unless the sinusoidal embedding can have this width."""
    even = isinstance(width, int) and width % 2 == 0 and width >= 4
    _check(even, f"{name}={width!r} must be even and at least 4")


def _check_shared_config(config: Mapping[str, Any]) -> None:
    c = SimpleNamespace(**config)
    _check_whole(in_channels=c.in_channels)
    allowed = f"must be in_channels={c.in_channels}, or twice that (learned variance)"
    _check(c.out_channels in (c.in_channels, 2 * c.in_channels), f"out_channels={c.out_channels} {allowed}")
    if c.num_class_embeds is not None:
        _check_whole(num_class_embeds=c.num_class_embeds)
    rows = f"{c.num_class_embeds or 0} rows that num_class_embeds={c.num_class_embeds} gives"
    known = c.null_class is None or (type(c.null_class) is int and 0 <= c.null_class < (c.num_class_embeds or 0))
    _check(known, f"null_class={c.null_class!r} must be one of the {rows}, or None")


def _longer(sample_size: int | Sequence[int]) -> int:
    return sample_size if isinstance(sample_size, int) else max(sample_size)


def _check_sample(sample: Any, channels: int, *sides: str) -> None:
    """Raises ValueError unless `sample` is a tensor of floating-point numbers, [B, channels, *sides]."""
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        kind = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise ValueError(f"sample must be a tensor of floating-point numbers, got {kind}")
    if sample.ndim != 2 + len(sides) or sample.shape[1] != channels:
        expected = ", ".join(["B", str(channels), *sides])
        raise ValueError(f"sample has shape {tuple(sample.shape)}; this model expects [{expected}]")


def _check_unet_config(config: Mapping[str, Any]) -> None:
    c = SimpleNamespace(**config)
    channels, resolutions = c.block_out_channels, c.attention_resolutions
    listed = isinstance(channels, list | tuple) and channels
    _check(listed, f"block_out_channels={channels!r} must be a list of channels, one per level")
    if isinstance(channels[0], int):
        _check_even("block_out_channels[0]", channels[0])
    _check_whole(**{f"block_out_channels[{index}]": value for index, value in enumerate(channels)})
    for value in resolutions if isinstance(resolutions, list | tuple) else [None]:
        _check_whole(attention_resolutions=value)
    _check_whole(norm_num_groups=c.norm_num_groups)
    _check_whole(layers_per_block=c.layers_per_block, at_most=MAX_LAYERS)
    channels, factor = tuple(channels), 2 ** (len(channels) - 1)
    sides = tuple(c.sample_size) if isinstance(c.sample_size, list | tuple) else (c.sample_size,) * 2
    halved = len(sides) == 2 and all(isinstance(side, int) and side >= factor and side % factor == 0 for side in sides)
    _check(
        halved,
        f"sample_size={c.sample_size} must be a side or (height, width) divisible by {factor}, since "
        f"block_out_channels={channels} halves it {len(channels) - 1} times",
    )
    grouped = all(number % c.norm_num_groups == 0 for number in channels)
    _check(grouped, f"norm_num_groups={c.norm_num_groups} must divide {channels}")
    dropped = isinstance(c.dropout, int | float) and 0 <= c.dropout < 1
    _check(dropped, f"dropout={c.dropout!r} must be a number in [0, 1)")
    _check_shared_config(config)
