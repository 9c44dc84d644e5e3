"""A network as an ONNX file, for runtimes without PyTorch; and such a file as a network.

The file takes `sample` [B, C, H, W] or [B, d] in float32 and `timestep` int64, [B] or [1], for a network with classes
also `class_labels` int64 [B]; it gives `output` [B, C_out, …], for any B. Its metadata hold the configuration.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..machine import replaced
from ..unet import evaluation_mode
from ..unet.unet_ddpm_paper import class_rows
from .stock import from_stock

OPSET = 18
CONFIG = "ddpm_hf.config"  # the key of the metadata
PUBLIC = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "null_class", "_class_name")
LARGEST_DIFFERENCE = 1e-3  # of the largest output: what is more is no rounding


class Difference(NamedTuple):
    """max |ONNX − PyTorch| over all outputs that were compared, and the largest of these outputs."""

    largest: float
    output: float


def export_onnx(unet: Any, path: str | Path, *, batches: Sequence[int] = (1, 2, 63, 64, 140)) -> Difference:
    """Write the network as an ONNX file, and compare it in onnxruntime with itself: noise, in batches of these sizes.

    `unet` computes in float32 on the CPU; one of stock is made ours first, since stock's code treats batches of 64 and
    more in another way. Raises ValueError where packages are missing, where the code cannot be exported for any batch,
    and where the file computes something else; then there is no file.
    """
    onnx, _ = _package("onnx"), _package("onnxscript")
    _package("onnxruntime")
    if isinstance(unet, UNet2DModel):
        unet = from_stock(unet)
    with replaced(Path(path)) as temporary, evaluation_mode(unet):
        model = _exported(unet, onnx)
        temporary.write_bytes(model.SerializeToString())
        difference = _difference(unet, OnnxNetwork(temporary), batches)
        if not difference.largest <= LARGEST_DIFFERENCE * difference.output:
            raise ValueError(
                f"{path}: onnxruntime computes something else, by {difference.largest:.2g} where outputs reach "
                f"{difference.output:.2g}"
            )
    return difference


class OnnxNetwork(nn.Module):
    """ε_θ(x_t, t) by onnxruntime on the CPU, from a file of `export_onnx`; in a pipeline it takes the network's place.

    Raises ValueError for another file, and where onnxruntime is missing.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, path: str | Path):
        super().__init__()
        runtime = _package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.config = FrozenDict(json.loads(self.session.get_modelmeta().custom_metadata_map[CONFIG]))
        except Exception as error:  # onnxruntime's have no base in common
            raise ValueError(f"{path} is no network that ddpm-hf export wrote: {error}") from error

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None) -> UNet2DOutput:
        """`sample` [B, …] and `timestep`, one or [B] → `.sample`, as of the network that was exported.

        Raises ValueError for timesteps that are not whole, which some solvers ask for.
        """
        t = torch.as_tensor(timestep).reshape(-1)
        if not torch.equal(t, t.round()):
            raise ValueError(f"timestep {float(t[0]):g}: the file knows whole ones; take another scheduler, or steps")
        inputs = {"sample": sample.numpy(), "timestep": t.to(torch.int64).numpy()}
        if self.config["num_class_embeds"] is not None:
            labels = self.config["null_class"] if class_labels is None else class_labels
            if labels is None:
                raise ValueError("this network needs class_labels: it has no null_class, for samples without a label")
            rows = class_rows(labels, self.config["num_class_embeds"], len(sample), self.device)
            inputs["class_labels"] = rows.numpy()
        elif class_labels is not None:
            raise ValueError("class_labels: this network is unconditional (num_class_embeds is None)")
        return UNet2DOutput(sample=torch.from_numpy(self.session.run(None, inputs)[0]))


class _Positional(nn.Module):
    """The network as a function of tensors alone."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        conditions = {} if class_labels is None else {"class_labels": class_labels}
        return self.unet(sample, timestep, **conditions).sample


def _exported(unet: Any, onnx: Any) -> Any:
    """The graph for any batch and `timestep` [B] or [1], with the configuration, and without paths of this machine."""
    inputs = _inputs(unet, 3, seed=0)
    batch, log = torch.export.Dim("batch", min=1), logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it warns of packages that nothing here needs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of dimensions
            program = torch.onnx.export(
                _Positional(unet),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                input_names=list(inputs),
                output_names=["output"],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # of the exporter, which has many
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ValueError(
            f"{type(unet).__name__} cannot be exported for any batch: {reason[0] if reason else type(error).__name__}"
        ) from error
    finally:
        log.setLevel(level)
    model = program.model_proto  # pyright: ignore[reportOptionalMemberAccess]
    for node in model.graph.node:
        node.ClearField("metadata_props")  # where in which file of this machine it came from
        node.ClearField("doc_string")
    _let_one_timestep_stand_for_all(model.graph, onnx.helper)
    config = {name: unet.config[name] for name in PUBLIC if name in unet.config}
    config = {"num_class_embeds": None, "null_class": None, "_class_name": type(unet).__name__, **config}
    onnx.helper.set_model_props(model, {CONFIG: json.dumps(config)})
    onnx.checker.check_model(model)
    return model


def _let_one_timestep_stand_for_all(graph: Any, helper: Any) -> None:
    """Begin the graph by expanding `timestep`, [1] or [B], to [B]; PyTorch's exporter knows one size of an input."""
    given = next(value for value in graph.input if value.name == "timestep")
    for node in graph.node:
        node.input[:] = ["timestep_of_each" if name == "timestep" else name for name in node.input]
    given.type.tensor_type.shape.dim[0].dim_param = "one_or_batch"
    first = [
        helper.make_node("Shape", ["sample"], ["batch_size"], start=0, end=1),
        helper.make_node("Expand", ["timestep", "batch_size"], ["timestep_of_each"]),
    ]
    nodes = [*first, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _inputs(unet: Any, size: int, seed: int) -> dict[str, Tensor]:
    """Noise, timesteps and, for a network with classes, labels, as the file takes them."""
    generator, config = torch.Generator().manual_seed(seed), unet.config
    side = config.get("sample_size") or ()
    shape = (config["in_channels"], *((side, side) if isinstance(side, int) else side))
    inputs = {
        "sample": torch.randn(size, *shape, generator=generator),
        "timestep": torch.randint(0, 1000, (size,), generator=generator),
    }
    if count := config.get("num_class_embeds"):
        inputs["class_labels"] = torch.randint(0, count, (size,), generator=generator)
    return inputs


@torch.no_grad()
def _difference(unet: Any, network: OnnxNetwork, batches: Sequence[int]) -> Difference:
    """Over batches of these sizes with a timestep for each sample, and with one for all of them."""
    largest = output = 0.0
    for seed, size in enumerate(batches):
        inputs = _inputs(unet, size, seed)
        for t in (inputs["timestep"], inputs["timestep"][:1]):
            asked = {**inputs, "timestep": t}
            expected = _Positional(unet)(**{**asked, "timestep": t.expand(size)})
            largest = max(largest, float((_found(network, asked) - expected).abs().max()))
            output = max(output, float(expected.abs().max()))
    return Difference(largest, output)


def _found(network: OnnxNetwork, inputs: dict[str, Tensor]) -> Tensor:
    try:
        return network(**inputs).sample
    except Exception as error:  # onnxruntime's have no base in common
        size = len(inputs["sample"])
        raise ValueError(
            f"the file does not run in batches of {size}: where the network's code asks for len(x), which is a number "
            f"to PyTorch's exporter, write x.shape[0] ({str(error).splitlines()[0]})"
        ) from error


def _package(name: str) -> Any:
    """A package that only an extra brings. Raises ValueError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"ONNX files need more packages ({error}): pip install 'ddpm_hf[export]'") from error
