"""Networks of a user's own: made by their name for the data, and asked whatever their `forward` returns."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from ..machine import object_named
from ..unet import evaluation_mode


def own_network(
    name: str,
    arguments: Mapping[str, Any],
    *,
    sample_shape: tuple[int, ...],
    out_channels: int,
    rows: Mapping[str, int | None],
) -> Any:
    """The network that the class `name`, as module:Class, makes for samples of this shape, (C, H, W) or (d,).

    It gets `sample_size`, `in_channels`, `out_channels`, and of `rows` those of its class embedding, where it takes
    them and `arguments` do not say otherwise. Raises ValueError for what cannot be made so, is no `ModelMixin`, or is
    not for these samples.
    """
    network_class, sides = object_named(name, "--network"), sample_shape[1:]
    parameters = inspect.signature(network_class).parameters
    implied: dict[str, Any] = {"in_channels": sample_shape[0], "out_channels": out_channels}
    if sides:
        implied["sample_size"] = sides[0] if len(set(sides)) == 1 else sides
    implied = {key: value for key, value in implied.items() if key in parameters}
    classes = {key: value for key, value in rows.items() if value is not None}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if unknown := [key for key in arguments if key not in parameters and not takes_all]:
        raise ValueError(f"--network_args: {name} takes no {unknown[0]}; it takes {', '.join(parameters)}")
    if missing := [key for key in classes if key not in parameters]:
        remedy = "--label_dropout 0 trains without" if missing == ["null_class"] else "leave out --label_column"
        raise ValueError(f"--label_column: {name} takes no {missing[0]}; {remedy}")
    try:
        network = network_class(**{**implied, **classes, **arguments})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--network {name}: {error}; --network_args gives its arguments") from error
    _check_network(network, name, sample_shape, out_channels, classes)
    return network


def _check_network(
    network: Any, name: str, sample_shape: tuple[int, ...], out_channels: int, classes: Mapping[str, int]
) -> None:
    """Raises ValueError unless the network can be saved, and answers (x, t) for one such sample."""
    if not isinstance(network, ModelMixin) or not isinstance(network, ConfigMixin):
        kind = type(network).__name__
        raise ValueError(f"--network {name}: a {kind} cannot be saved; derive it from ModelMixin and ConfigMixin")
    config: Any = network.config
    size = config.get("sample_size") or ()
    shape = config.get("in_channels"), *((size, size) if isinstance(size, int) else size)
    if shape != sample_shape:
        made = "in_channels and sample_size" if len(sample_shape) > 1 else "in_channels"
        raise ValueError(f"--network {name}: by {made} of its config it is for {shape}, the data are {sample_shape}")
    conditions = {"class_labels": torch.zeros(1, dtype=torch.int64)} if classes else {}
    inputs = torch.zeros(1, *sample_shape), torch.zeros(1, dtype=torch.int64)
    try:
        with torch.no_grad(), evaluation_mode(network):
            sampled = network(*inputs, **conditions)  # as the pipeline asks
    except Exception as error:  # of the user's own code
        reason = str(error).strip().splitlines() or [""]
        what = f"{type(error).__name__}: {reason[0]}"
        raise ValueError(f"--network {name}: forward fails for one sample, with {what}") from error
    if not isinstance(getattr(sampled, "sample", None), Tensor):
        kind = type(network).__name__
        raise ValueError(f"--network {name}: {kind} returns a {type(sampled).__name__}, which has no .sample")
    with torch.no_grad(), evaluation_mode(network):
        output = output_of(network, *inputs, conditions)
    expected = (1, out_channels, *sample_shape[1:])
    if tuple(output.shape) != expected:
        raise ValueError(f"--network {name}: the output for one sample is {tuple(output.shape)}, not {expected}")


def output_of(network: Any, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """What the network, wrapped by Accelerate or not, answers at (x_t, t), in float32."""
    unwrapped = getattr(network, "module", network)  # of several processes
    forward = type(unwrapped).forward if isinstance(unwrapped, nn.Module) else unwrapped
    options = {"return_dict": False} if _gives_tuples(forward) else {}
    output = network(x_t, t, **conditions, **options)
    if not isinstance(output, tuple) and not isinstance(getattr(output, "sample", None), Tensor):
        raise ValueError(f"{type(unwrapped).__name__} returns a {type(output).__name__}, which has no .sample")
    return (output[0] if isinstance(output, tuple) else output.sample).float()


@functools.cache
def _gives_tuples(forward: Callable[..., Any]) -> bool:
    return "return_dict" in inspect.signature(forward).parameters
