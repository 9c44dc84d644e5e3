"""from_tf_variables: the paper code's variables give its UNet, and variables that do not fit are named."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddpm_hf.convert import from_tf_variables


@pytest.fixture(scope="module")
def variables(golden) -> dict[str, np.ndarray]:
    """The weights of the recorded UNet, made again as tests/golden/README.md says; names without `model/`."""
    rng = np.random.RandomState(int(golden["unet/weight_seed"]))
    made = {}
    for name, sizes in zip(golden["unet/names"].tolist(), golden["unet/shapes"].tolist(), strict=True):
        shape = [int(size) for size in sizes.split()]
        weight = rng.randn(*shape) * (0.05 if len(shape) > 1 else 0.1) + (1.0 if name.endswith("gamma") else 0)
        made[name.removeprefix("model/")] = weight.astype(np.float32)
    return made


@torch.no_grad()
def test_the_output_equals_the_papers(golden, relative_error, variables):
    """To 2e-5: 2e-6 is rounding, in another order than TensorFlow's; GroupNorm's eps of 1e-5 would give 7e-5."""
    unet = from_tf_variables(variables, sample_size=16)
    output = unet(golden.nchw("unet/x"), torch.from_numpy(golden["unet/t"])).sample
    assert relative_error(output, golden.nchw("unet/out")) < 2e-5


def test_the_configuration_is_read_off_the_shapes(variables):
    unet = from_tf_variables(variables, sample_size=16)
    expected = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "attention_resolutions": (8,),
        "dropout": 0.0,
        "norm_num_groups": 32,
    }
    assert {key: unet.config[key] for key in expected} == expected


def test_without_a_size_attention_is_taken_to_be_at_16(variables):
    config = from_tf_variables(variables).config
    assert (config.sample_size, config.attention_resolutions) == (32, (16,))


def test_a_leading_scope_is_ignored(variables):
    scoped = from_tf_variables({f"model/{name}": value for name, value in variables.items()})
    for name, parameter in from_tf_variables(variables).named_parameters():
        assert torch.equal(scoped.get_parameter(name), parameter), name


Change = Callable[[dict[str, np.ndarray]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.pop("down_1/block_0/conv2/b"),
            r"missing \['down_blocks.1.resnets.0.conv2.bias'\], unexpected \[\]",
        ),
        (lambda v: v.pop("mid/attn_1/q/W"), r"missing \['mid_block.attentions.0.to_q.weight'\]"),
        (lambda v: v.pop("conv_in/W"), "the variables lack conv_in/W"),
        (lambda v: v.pop("down_2/block_0/conv1/W"), "the variables lack down_2/block_0/conv1/W"),
        (
            lambda v: v.update({"down_0/attn_0/q/b": np.zeros(32)}),
            r"missing \[\], unexpected \['down_blocks.0.attentions.0.to_q.bias'\]",
        ),
        (
            lambda v: v.update({"mid/block_1/conv1/W": np.zeros((3, 3, 64, 32))}),
            r"misshapen \['mid_block.resnets.0.conv1.weight \(32, 64, 3, 3\) instead of \(64, 64, 3, 3\)'\]",
        ),
        (lambda v: v.update({"down_0/block_0/conv9/W": np.zeros(3)}), "'down_0/block_0/conv9' is not a layer of the"),
        (lambda v: v.update({"down_0/upsample/conv/b": np.zeros(3)}), "'down_0/upsample/conv' is not a layer of the"),
        (lambda v: v.update({"global_step": np.array(1)}), "'global_step' is not a variable of the paper's UNet"),
        (
            lambda v: v.update({"conv_in/W/Adam_1": np.zeros((3, 3, 3, 32))}),
            "'conv_in/W/Adam_1' is not a variable of the paper's UNet",
        ),
    ],
)
def test_variables_that_do_not_fit_are_named(variables, change: Change, message):
    changed = dict(variables)
    change(changed)
    with pytest.raises(ValueError, match=message):
        from_tf_variables(changed)
