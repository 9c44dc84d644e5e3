"""Our own kernels beside PyTorch's in float64: values and gradients, shapes of every kind; without a compiler too.

Sums of a thousand terms in float32 are off by 2e-7 of their size if they are taken in blocks, by 6e-7 if one term
after the other, and Winograd's by 1e-6 (root mean square).
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ddpm_hf.machine.native import Convolve, Normalize, build, ops

needs_kernels = pytest.mark.skipif(not ops.has_kernels(), reason="no compiler")
SHAPES = [  # batch, inputs, outputs, height, width
    (3, 64, 32, 7, 8),
    (2, 128, 64, 14, 15),
    (5, 32, 32, 8, 8),
    (1, 32, 64, 1, 1),
    (1, 64, 128, 2, 9),
    (30, 32, 96, 3, 5),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(*tensors, dtype=None):
    return [tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_and_its_gradients(relative_error, shape):
    batch, inputs, outputs, height, width = shape
    x, weight = normal(batch, inputs, height, width), normal(outputs, inputs, 3, 3, seed=1) / (3 * inputs**0.5)
    shared, own = normal(outputs, seed=2), normal(batch, outputs, seed=3)
    residual, dy = normal(batch, outputs, height, width, seed=4), normal(batch, outputs, height, width, seed=5)
    for bias in (shared, own):
        exact = leaves(x, weight, bias, residual, dtype=torch.float64)
        expected = F.conv2d(exact[0], exact[1], padding=1) + exact[2].reshape(-1, outputs, 1, 1) + exact[3]
        expected.backward(dy.double())
        found = leaves(x, weight, bias, residual)
        y = Convolve.apply(*found)
        y.backward(dy)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y.detach(), expected.detach()) < 5e-6
        for ours, theirs in zip(found, exact, strict=True):
            assert relative_error(ours.grad, theirs.grad) < 5e-6


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_convolution_of_an_enlarged_image(relative_error, shape):
    batch, inputs, outputs, height, width = shape
    x, weight, bias = (
        normal(batch, inputs, height, width),
        normal(outputs, inputs, 3, 3, seed=1),
        normal(outputs, seed=2),
    )
    y = ops.convolve(x, ops.winograd_filters(weight), outputs, bias, scale=2)
    large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    assert relative_error(y, F.conv2d(large, weight.double(), bias.double(), padding=1)) < 5e-6


@needs_kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("channels", "groups", "side", "mean"), [
    (32, 8, 1, 0), (32, 32, 8, 0), (64, 16, 7, 3), (96, 32, 20, 30), (128, 1, 3, 0),
])  # fmt: skip
def test_norm_and_its_gradients(relative_error, channels, groups, side, mean, silu):
    x = normal(3, channels, side, side + 1) * 2 + mean * normal(1, channels, 1, 1, seed=1)
    weight, bias = normal(channels, seed=2), normal(channels, seed=3)
    dy = normal(*x.shape, seed=4)
    exact, found = leaves(x, weight, bias, dtype=torch.float64), leaves(x, weight, bias)
    expected = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-6)
    expected = F.silu(expected) if silu else expected
    expected.backward(dy.double())
    y = Normalize.apply(*found, groups, 1e-6, silu)
    y.backward(dy)
    assert relative_error(y.detach(), expected.detach()) < 5e-6
    for ours, theirs in zip(found, exact, strict=True):
        assert (
            relative_error(ours.grad, theirs.grad) < 2e-5
        )  # x̂ of a mean 30 standard deviations away has fewer digits


@needs_kernels
def test_silu_far_out():
    x = torch.linspace(-120, 120, 32 * 64).reshape(1, 32, 8, 8)
    one, zero = torch.ones(32), torch.zeros(32)
    scale = x.std(correction=0)
    y = ops.normalize(x, one * scale, one * x.mean(), 1, 1e-12, silu=True)
    assert torch.isfinite(y).all() and torch.allclose(y, F.silu(x), atol=2e-5, rtol=2e-6)
    assert torch.isnan(ops.normalize(x * torch.nan, one, zero, 1, 1e-6, silu=True)).all()


@needs_kernels
def test_bfloat16_is_rounded_once():
    x, weight, bias = normal(2, 64, 9, 9).bfloat16(), normal(64, seed=1), normal(64, seed=2)
    y = ops.normalize(x, weight, bias, 16, 1e-6, silu=True)
    exact = F.silu(F.group_norm(x.double(), 16, weight.double(), bias.double(), 1e-6))
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-8  # half a unit in the last of 8 digits


@needs_kernels
def test_results_do_not_depend_on_threads():
    x, weight, dy = normal(5, 64, 13, 9), normal(96, 64, 3, 3, seed=1), normal(5, 96, 13, 9, seed=2)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = leaves(x, weight, normal(96, seed=3), normal(64, seed=4), normal(64, seed=5))
        y = Convolve.apply(Normalize.apply(found[0], *found[3:], 16, 1e-6, True), found[1], found[2], None)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in found)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_weights_in_another_order_of_memory():
    weight = normal(64, 32, 3, 3)
    other = weight.contiguous(memory_format=torch.channels_last)
    for turned in (False, True):
        assert torch.equal(*(ops.winograd_filters(each, turned=turned) for each in (weight, other)))


@needs_kernels
def test_other_tensors_are_refused_before_their_memory_is_read():
    x, weight, bias = normal(1, 32, 4, 4), normal(32, 32, 3, 3), normal(32)
    filters = ops.winograd_filters(weight)
    with pytest.raises(TypeError, match="float32 on the CPU"):
        ops.winograd_filters(weight.double())
    for given in ((x.double(), filters, 32, bias), (x, filters.half(), 32, bias), (x, filters, 32, bias.bfloat16())):
        with pytest.raises(TypeError, match="float32 on the CPU"):
            ops.convolve(*given)
    with pytest.raises(TypeError, match="float32 on the CPU"):
        ops.normalize(x, bias.double(), bias, 8, 1e-6, silu=True)
    with pytest.raises(TypeError, match="float32 on the CPU"):
        ops.normalize(x.half(), bias, bias, 8, 1e-6, silu=True)


@needs_kernels
def test_number_of_channels():
    panel = ops._kernels()["panel"]
    assert ops.takes_channels(panel, 4 * panel) and not ops.takes_channels(panel, panel + 8)


# ---- where there is none -------------------------------------------------------------------------------------------

PRINT = "from ddpm_hf.machine.native import has_kernels, takes_channels; print(has_kernels(), takes_channels(32))"


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"DDPM_HF_NATIVE": "0"}, {"CXX": "false"}, {"PATH": "", "CXX": ""}])
def test_without_a_compiler(environment, tmp_path, monkeypatch):
    for name, value in {**environment, "XDG_CACHE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@needs_kernels
def test_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = build.library.__wrapped__()
    (path,) = tmp_path.rglob("*.so")
    made = path.stat().st_mtime_ns
    again = build.library.__wrapped__()
    assert found.panel() == again.panel() and path.stat().st_mtime_ns == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left
