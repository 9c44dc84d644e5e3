"""A network whose layers compute with our kernels is the network it was: outputs, gradients, names, dropout."""

import copy

import pytest
import torch

from ddpm_hf.machine.native import ops
from ddpm_hf.unet import use_native_kernels

pytestmark = pytest.mark.skipif(not ops.has_kernels(), reason="no compiler")
CONFIGS = {
    "digits": {"block_out_channels": (32, 64), "norm_num_groups": 8, "in_channels": 1, "out_channels": 1},
    "three levels, not square": {
        "block_out_channels": (32, 32, 96),
        "norm_num_groups": 16,
        "layers_per_block": 2,
        "sample_size": (8, 12),
        "attention_resolutions": (),
        "dropout": 0.3,
    },
    "classes": {"block_out_channels": (32, 64), "num_class_embeds": 4, "null_class": 3},
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(unet, x, t, target):
    torch.manual_seed(5)  # of dropout
    unet.zero_grad()
    y = unet(x, t).sample
    ((y - target) ** 2).mean().backward()
    return y.detach(), {name: weight.grad.clone() for name, weight in unet.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients(tiny_unet, relative_error, config, checkpointing):
    plain = tiny_unet(**config).train()
    native = copy.deepcopy(plain)
    if checkpointing:
        native.enable_gradient_checkpointing()
    assert use_native_kernels(native)
    size = plain.config["sample_size"]
    x = normal(3, plain.config["in_channels"], *((size, size) if isinstance(size, int) else size))
    t, target = torch.tensor([0, 500, 999]), normal(*x.shape, seed=1)
    (y, found), (expected, exact) = (gradients(unet, x, t, target) for unet in (native, plain))
    assert relative_error(y, expected) < 1e-5
    whole = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    for name, gradient in exact.items():  # a bias of the keys has no gradient but rounding
        assert (found[name] - gradient).norm() < 1e-5 * whole, name
    again = gradients(native, x, t, target)
    assert torch.equal(again[0], y) and all(torch.equal(again[1][name], found[name]) for name in found)


def test_it_stays_the_network_it_was(tiny_unet, tmp_path):
    plain = tiny_unet(**CONFIGS["digits"])
    native = copy.deepcopy(plain)
    use_native_kernels(native)
    assert type(native) is type(plain) and list(native.state_dict()) == list(plain.state_dict())
    native.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in plain.state_dict().items())
    other = copy.deepcopy(native)  # a copy computes with its own weights
    torch.nn.init.zeros_(other.conv_out.weight)
    x = normal(1, 1, 8, 8)
    assert torch.equal(other(x, 3).sample.flatten(), other.conv_out.bias.expand(64))
    assert not torch.equal(native(x, 3).sample, other(x, 3).sample)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_computed_by_pytorch(tiny_unet, dtype):
    plain = tiny_unet(**CONFIGS["digits"])
    native = copy.deepcopy(plain)
    use_native_kernels(native)
    x = normal(2, 1, 8, 8).to(dtype)
    assert torch.equal(native.to(dtype)(x, 3).sample, plain.to(dtype)(x, 3).sample)


def test_other_widths_are_left_alone(tiny_unet, tiny_mlp):
    for network in (tiny_unet(), tiny_unet(block_out_channels=(32, 48)), tiny_mlp()):
        before = [type(module) for module in network.modules()]
        panel = ops._kernels()["panel"]
        native = panel == 16 and network.config.get("block_out_channels") == (32, 48)
        assert use_native_kernels(network) is native
        assert native or [type(module) for module in network.modules()] == before
