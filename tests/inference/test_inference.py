"""The rewritten network computes what the plain one does: kernel by kernel, and whole pipelines."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline
from ddpm_hf.inference import FastUNet, cpu, kernels, pipelines, speed_up
from ddpm_hf.inference.cpu import UpsampleConvolution
from ddpm_hf.inference.kernels import Convolution, NativeConvolution, Normalization, Product, RowWinograd
from ddpm_hf.machine.native import ops as native_ops
from ddpm_hf.unet.unet_ddpm_paper import Upsample

DIGITS = Path(__file__).parents[2] / "model_cards" / "ddpm-digits"
needs_kernels = pytest.mark.skipif(not native_ops.has_kernels(), reason="no compiler")
onednn = pytest.mark.skipif(not kernels.has_onednn(torch.float32), reason="this PyTorch has no oneDNN")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[pytest.param("native", marks=needs_kernels), pytest.param("oneDNN", marks=onednn), "plain"])
def either_way(request, monkeypatch):
    if request.param != "native":
        monkeypatch.setattr(native_ops, "_kernels", dict)
    if request.param == "plain":
        monkeypatch.setattr(kernels, "has_onednn", lambda dtype: False)
    return request.param


# ---- kernels, against PyTorch's in float64 -------------------------------------------------------------------------
# Float32 rounds sums of some thousand terms to about 1e-6 of the largest result; Winograd's larger factors to 1e-5.


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 32)])
@pytest.mark.parametrize("batch", [1, 3])
def test_row_winograd_is_the_convolution(either_way, relative_error, batch, height, width):
    x, weight, bias = normal(batch, 24, height, width), normal(40, 24, 3, 3, seed=1), normal(40, seed=2)
    other, residual = normal(40, seed=3), normal(batch, 40, height, width, seed=4)
    convolution = RowWinograd(weight, bias, (2, 24, height, width))
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    for given, expected in ((None, bias), (other, other)):
        y = convolution(channels_last(x), given)
        assert relative_error(y, exact + expected.double()[:, None, None]) < 1e-5
    y = convolution(channels_last(x), residual=channels_last(residual))
    assert relative_error(y, exact + bias.double()[:, None, None] + residual.double()) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 6), (7, 3)])
def test_upsampling_and_convolution_in_one(either_way, relative_error, height, width):
    layer = Upsample(8)
    nn.init.normal_(layer.conv.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.conv.bias, generator=torch.Generator().manual_seed(1))
    x = normal(2, 8, height, width)
    with torch.no_grad():
        y = UpsampleConvolution(layer, (2, height, width), torch.float32)(channels_last(x))
        assert relative_error(y, layer.double()(x.double())) < 1e-6


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (1, 1, 0)])
def test_convolution(either_way, relative_error, kernel, stride, padding):
    x, weight, bias = normal(3, 6, 9, 9), normal(10, 6, kernel, kernel, seed=1), normal(10, seed=2)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    convolution = Convolution(weight, bias, (2, 6, 9, 9), stride=stride, padding=padding)
    assert relative_error(convolution(channels_last(x)), exact) < 1e-6
    residual = normal(*exact.shape, seed=3)
    y = convolution(channels_last(x), residual=channels_last(residual))
    assert relative_error(y, exact + residual.double()) < 1e-6


def test_product(either_way, relative_error):
    x, weight, bias, residual = normal(2, 5, 12), normal(7, 12, seed=1), normal(7, seed=2), normal(2, 5, 7, seed=3)
    product, exact = Product(weight, bias, 10), F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(product(x), exact) < 1e-6
    assert relative_error(product(x, residual.clone()), exact + residual.double()) < 1e-6


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("num_groups", "mean"), [(4, 0.0), (4, 3.0), (16, 0.0), (16, 300.0)])
def test_normalization(relative_error, num_groups, silu, mean):
    norm = nn.GroupNorm(num_groups, 16, eps=1e-6)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    x = normal(3, 16, 6, 6) + mean
    y = Normalization(norm, torch.float32, silu=silu)(channels_last(x))
    exact = norm.double()(x.double()).detach()
    # around 300 float32 itself resolves 3e-5, so the normalized values have no more digits
    assert relative_error(y, F.silu(exact) if silu else exact) < (1e-4 if mean == 300 else 2e-6)


# ---- the network ---------------------------------------------------------------------------------------------------

NETWORKS = {
    "small": {},
    "groups of one channel": {"block_out_channels": (8, 16), "norm_num_groups": 8},
    "wide": {"sample_size": 16, "block_out_channels": (128,), "norm_num_groups": 32, "attention_resolutions": ()},
    "not square": {"sample_size": (8, 12), "block_out_channels": (8, 16, 16), "layers_per_block": 2},
    "grey, learned variance": {"in_channels": 1, "out_channels": 2},
    "of widths for our kernels": {
        "block_out_channels": (32, 64, 96),
        "norm_num_groups": 16,
        "attention_resolutions": (4,),
    },
    "one level": {"block_out_channels": (8,), "attention_resolutions": (8,)},
}


def fast_of(unet, num_timesteps=20, compute_dtype=torch.float32):
    return FastUNet(unet, compute_dtype=compute_dtype, num_timesteps=num_timesteps)


def input_of(unet, batch):
    size = unet.config["sample_size"]
    return normal(batch, unet.config["in_channels"], *((size, size) if isinstance(size, int) else size))


@pytest.mark.slow
@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_network(either_way, tiny_unet, relative_error, config, monkeypatch):
    unet = tiny_unet(**config)
    x = input_of(unet, 5)
    monkeypatch.setattr(cpu, "BYTES_PER_PART", 2 * 4 * unet.conv_in.out_channels * x[0, 0].numel())
    fast = fast_of(unet)
    assert fast.rows_per_part == 2  # so five rows make parts of two, two and one
    same, mixed = torch.full((5,), 7), torch.tensor([0, 19, 3, 3, 7])
    for t in (same, mixed, 4, torch.tensor(4), torch.tensor([4])):
        assert relative_error(fast(x, t).sample, unet(x, t).sample) < 1e-5
    for t in (torch.tensor([0.5]), torch.tensor([20]), torch.linspace(0, 999, 5)):  # of other schedulers
        assert relative_error(fast(x, t).sample, unet(x, t).sample) < 1e-5
    assert torch.equal(fast(x, 4, return_dict=False)[0], fast(x, 4).sample)


@onednn
def test_wide_rows_go_by_winograd(tiny_unet, monkeypatch):
    wide, narrow = fast_of(tiny_unet(**NETWORKS["wide"])), fast_of(tiny_unet())
    if native_ops.has_kernels():
        assert isinstance(wide._down[0][0][0][0].conv2, NativeConvolution)
        monkeypatch.setattr(native_ops, "_kernels", dict)
        wide = fast_of(tiny_unet(**NETWORKS["wide"]))
    assert isinstance(wide._down[0][0][0][0].conv2, RowWinograd)
    assert isinstance(narrow._down[0][0][0][0].conv2, Convolution)
    half = fast_of(tiny_unet(**NETWORKS["wide"]), compute_dtype=torch.bfloat16)
    assert isinstance(half._down[0][0][0][0].conv2, Convolution)


@torch.no_grad()
def test_bfloat16_is_close(tiny_unet):
    unet = tiny_unet(**NETWORKS["wide"])
    x = input_of(unet, 2)
    y, expected = fast_of(unet, compute_dtype=torch.bfloat16)(x, 3).sample, unet(x, 3).sample
    assert y.dtype == torch.float32
    # 8 bits: 0.004 per rounding, of which some ten follow each other
    assert (y - expected).norm() < 0.03 * expected.norm()
    assert not torch.equal(y, expected)


@torch.no_grad()
def test_rows_do_not_depend_on_their_neighbours(tiny_unet):
    unet = tiny_unet()
    fast, x = fast_of(unet), input_of(unet, 6)
    torch.testing.assert_close(fast(x[:3], 5).sample, fast(x, 5).sample[:3], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_keeps_the_weights_it_was_made_from(tiny_unet):
    unet = tiny_unet()
    fast, x = fast_of(unet), input_of(unet, 2)
    before, plain = fast(x, 5).sample, unet(x, 5).sample
    for parameter in unet.parameters():
        parameter.add_(0.1)
    assert torch.equal(fast(x, 5).sample, before)
    assert not torch.allclose(unet(x, 5).sample, plain)


def test_refused_inputs(tiny_unet):
    fast = fast_of(tiny_unet())
    with pytest.raises(ValueError, match=r"sample has shape \(2, 3, 4, 4\); expected \[B, \(3, 8, 8\)\]"):
        fast(torch.zeros(2, 3, 4, 4), 0)
    with pytest.raises(ValueError, match=r"timestep has shape \(3,\); expected one, or one per sample, \(2,\)"):
        fast(torch.zeros(2, 3, 8, 8), torch.zeros(3))
    with pytest.raises(ValueError, match="sped up for cpu, and sample is on meta"):
        fast(torch.zeros(2, 3, 8, 8, device="meta"), 0)


# ---- pipelines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tiny_unet, tiny_scheduler):
    pipe = DDPMPaperPipeline(tiny_unet(), tiny_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_same_images(pipe):
    fast = speed_up(pipe)
    fast.set_progress_bar_config(disable=True)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    for kwargs in ({"seeds": range(3)}, {"seeds": [5], "num_inference_steps": 4}):
        images, expected = (p(**kwargs, output_type="pt").images for p in (fast, pipe))
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_same_digits():
    """On trained weights, which keep the chain near the data."""
    pipe = DDPMPaperPipeline.from_pretrained(DIGITS)
    results = []
    for p in (pipe, speed_up(pipe)):
        p.set_progress_bar_config(disable=True)
        results.append(p(seeds=range(3), num_inference_steps=40, output_type="pt").images)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    assert not torch.equal(*results)  # another order of the sums


def test_released_weights(pipe, tiny_unet):
    """The pipeline they came from draws with the new network; nothing of the large tensors is left in the old one."""
    plain = DDPMPaperPipeline(tiny_unet(), pipe.scheduler)
    old = pipe.unet
    fast = speed_up(pipe, release=True)
    assert pipe.unet is fast.unet and isinstance(fast.unet, FastUNet)
    left = sum(weight.numel() for weight in old.parameters())
    assert left < 0.25 * sum(weight.numel() for weight in plain.unet.parameters())
    for p in (pipe, fast, plain):
        p.set_progress_bar_config(disable=True)
    images, again, expected = (p(seeds=range(2), output_type="pt").images for p in (fast, pipe, plain))
    assert torch.equal(images, again)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_automatic_precision_is_the_instructions(pipe, tiny_unet, tiny_scheduler, monkeypatch):
    """A network of 128 channels and more in bfloat16 where there is AMX, everything else in float32."""
    wide = DDPMPaperPipeline(tiny_unet(**NETWORKS["wide"]), tiny_scheduler())
    monkeypatch.setattr(pipelines, "has_onednn", lambda dtype: True)
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        assert pipelines.fastest_dtype(wide.unet) == (torch.bfloat16 if amx else torch.float32)
        assert speed_up(pipe, "auto").unet.compute_dtype == torch.float32


def test_what_cannot_be_sped_up(pipe, tiny_scheduler, tmp_path):
    with pytest.raises(ValueError, match="only a DDPMPaperUNet can be sped up, not DDPMPaperMLP"):
        speed_up(DDPMPaperPipeline(DDPMPaperMLP(hidden_size=8, num_layers=1), tiny_scheduler()))
    with pytest.raises(ValueError, match="dtype=torch.float16 is not supported; choose"):
        speed_up(pipe, torch.float16)
    fast = speed_up(pipe)
    with pytest.raises(ValueError, match="only a DDPMPaperUNet can be sped up, not FastUNet"):
        speed_up(fast)
    with pytest.raises(ValueError, match="save the pipeline it was made from"):
        fast.save_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_the_plain_network_compiles_as_one_graph(tiny_unet, relative_error):
    """`speed_up` relies on it on a GPU; here it is tried on the CPU."""
    unet = tiny_unet()
    x, t = input_of(unet, 2), torch.tensor([3, 3])
    expected = unet(x, t).sample
    unet.to(memory_format=torch.channels_last).compile(fullgraph=True)
    assert relative_error(unet(x, t).sample, expected) < 1e-5
