"""Sampling beside other engines: ONNX Runtime and OpenVINO with the network of stock diffusers, and torch.compile.

They run in the loop of our own pipeline, so that networks alone differ: the same weights, one thread, a batch that is
fixed in the file, and a precision that is asked for by name.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.convert import to_stock

from .machine import without_amx
from .networks import CIFAR10, build_unet, counted, noise_of, relative_rms
from .sampling import FAST, FAST_BF16, contestant, sample
from .timing import STOCK, Difference, Timed, Work

ONNX_RUNTIME, OPENVINO, OPENVINO_BF16 = "ONNX Runtime", "OpenVINO", "OpenVINO, bf16"
STOCK_COMPILED = "stock, torch.compile"
PACKAGES = {ONNX_RUNTIME: "onnxruntime", OPENVINO: "openvino", OPENVINO_BF16: "openvino"}
EXPORTERS = ("onnx", "onnxscript")
FLOAT32, BF16 = 1e-5, {FAST_BF16: 0.02, OPENVINO_BF16: 0.05}  # relative RMS of a forward pass, from stock's float32

Engine = Callable[[Tensor, Tensor], Tensor]  # x_t [B, C, H, W] and t [B] → ε


class EngineNetwork(ModelMixin):
    """What `DDPMPaperPipeline` needs of a network, around one that computes elsewhere."""

    def __init__(self, config: Any, engine: Engine):
        super().__init__()
        self.config, self.engine = config, engine

    @torch.no_grad()
    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=self.engine(sample, timestep))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


# ---- the engines ---------------------------------------------------------------------------------------------------


class _Tensors(nn.Module):
    """`unet` with tensors in and out."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t, return_dict=False)[0]


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # removed when the benchmark ends


@cache
def exported(batch: int) -> Path:
    """The CIFAR-10 network as an ONNX file for this batch."""
    unet = to_stock(build_unet(**CIFAR10)).eval()
    inputs = noise_of(batch, 3, 32, 32), torch.full((batch,), 500)
    path = Path(_folder().name, f"cifar10-{batch}.onnx")
    program: Any = torch.onnx.export(_Tensors(unet).eval(), inputs, dynamo=True, verbose=False)
    program.save(path, external_data=True)
    return path


def onnx_runtime(path: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def engine(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x_t": x_t.numpy(), "t": t.numpy()})[0])

    return engine


def openvino(path: Path, precision: str) -> Engine:
    """`precision` is f32 or bf16. Without it OpenVINO takes bfloat16 where the CPU has it, and does not say so."""
    from openvino import Core

    wanted = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    model = Core().compile_model(path, "CPU", {**wanted, "PERFORMANCE_HINT": "LATENCY"})
    request = model.create_infer_request()

    def engine(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([x_t.numpy(), t.numpy()], share_inputs=True)[0])

    return engine


def engine_of(name: str, batch: int, stock: UNet2DModel) -> Engine:
    if name == ONNX_RUNTIME:
        return onnx_runtime(exported(batch))
    if name in (OPENVINO, OPENVINO_BF16):
        return openvino(exported(batch), "bf16" if name == OPENVINO_BF16 else "f32")
    return torch.compile(_Tensors(stock)) if name == STOCK_COMPILED else _Tensors(stock)


# ---- what is timed -------------------------------------------------------------------------------------------------


def build_beside(quick: bool, *, names: Sequence[str], batch: int, steps: tuple[int, int]) -> Work:
    """`names` are engines, or our own pipelines sped up; each is compared with stock's float32 before it is timed."""
    num_steps = steps[1 if quick else 0]
    ours = DDPMPaperPipeline(build_unet(**CIFAR10), DDPMPaperScheduler())
    stock: Any = to_stock(ours.unet).eval()  # type: ignore[arg-type]
    pipes: dict[str, Any] = {}
    for name in names:
        if name in (FAST, FAST_BF16):
            pipes[name] = contestant(name, ours)
        else:
            network: Any = EngineNetwork(stock.config, engine_of(name, batch, stock))
            pipes[name] = DDPMPaperPipeline(network, DDPMPaperScheduler())
            pipes[name].set_progress_bar_config(disable=True)

    def differences() -> list[Difference]:
        x_t, found = noise_of(batch, 3, 32, 32), []
        for t in (999, 500, 3):
            timestep = torch.full((batch,), t)
            with torch.no_grad():
                expected = stock(x_t, timestep).sample
                outputs = {name: pipe.unet(x_t, timestep).sample for name, pipe in pipes.items()}
            for name, output in outputs.items():
                error, allowed = relative_rms(output, expected), BF16.get(name, FLOAT32)
                found.append(Difference(f"{name}: ε at {t}, relative RMS", error, allowed))
        for pipe in pipes.values():
            sample(pipe, batch, 1)
        return found

    calls = {name: partial(sample, pipe, batch, num_steps) for name, pipe in pipes.items()}
    return Work(calls, differences, units=num_steps * batch, unit="image and step", flop=counted(CIFAR10)[1])


def missing(engine: str) -> str | None:
    """Why this engine cannot be measured here; None where it can."""
    absent = [name for name in (*EXPORTERS, PACKAGES[engine]) if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (the extra `bench`)"
    return without_amx() if engine == OPENVINO_BF16 else None


@cache
def no_compiler() -> str | None:
    """Why torch.compile does not work here; None where it does."""
    try:
        torch.compile(lambda x: x.sin() + x.cos())(torch.ones(8))
    except Exception as error:  # compilers raise many
        return f"torch.compile fails here: {type(error).__name__}"
    return None


def _beside(engine: str, ours: str, batch: int, target: tuple[float, float]) -> Timed:
    build = partial(build_beside, names=(engine, ours), batch=batch, steps=(20, 3) if batch == 1 else (20, 1))
    name = f"CIFAR-10 UNet, batch {batch}, beside {engine}"
    rounds, obstacle = (11, 3) if batch == 1 else (5, 2), partial(missing, engine)
    return Timed("peers", name, build, {ours: target}, rounds, baseline=engine, obstacle=obstacle)


PEERS: list[Timed] = [
    *(_beside(engine, FAST, batch, (1.25, 1.6)) for batch in (1, 16) for engine in (ONNX_RUNTIME, OPENVINO)),
    _beside(OPENVINO_BF16, FAST_BF16, 1, (1.3, 1.8)),
    _beside(OPENVINO_BF16, FAST_BF16, 16, (1.4, 1.8)),
    Timed(
        "peers",
        "CIFAR-10 UNet, batch 1, and stock compiled",
        partial(build_beside, names=(STOCK, STOCK_COMPILED, FAST), batch=1, steps=(20, 3)),
        rounds=(7, 0),
        obstacle=no_compiler,
    ),
]
