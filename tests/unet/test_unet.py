"""The networks: the paper's sizes, initialisation and time embedding; stock's names; and all that diffusers does."""

import math
import re

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ddpm_hf import DDPMPaperMLP, DDPMPaperUNet
from ddpm_hf.unet.unet_ddpm_paper import ResnetBlock, SelfAttention, sinusoidal_embedding

# The paper's networks; the last is very probably its 256M one.
CIFAR10 = {}
CELEBAHQ256 = {"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512)}
LARGE256 = {"sample_size": 256, "block_out_channels": (192, 192, 384, 384, 768, 768)}


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["unet", "mlp"])
def model_and_sample(request, tiny_unet, tiny_mlp):
    """(a tiny model with random weights, a batch of 3 for it)."""
    return (tiny_unet(), images(3, 3, 8, 8)) if request.param == "unet" else (tiny_mlp(), images(3, 2))


@torch.no_grad()
def output(model: nn.Module, sample: Tensor, t: int | Tensor = 7) -> Tensor:
    return model(sample, t).sample


def gradients(model: nn.Module, sample: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(sample, torch.arange(len(sample))).sample.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---- the paper's network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(CIFAR10, 35_746_307), (CELEBAHQ256, 113_673_219), (LARGE256, 255_677_955)],
    ids=["32", "256", "256 large"],
)
def test_number_of_parameters(config, parameters):
    with torch.device("meta"):
        unet = DDPMPaperUNet(**config)
    assert sum(p.numel() for p in unet.parameters()) == unet.num_parameters() == parameters


@pytest.mark.parametrize("dim", [32, 128])
def test_the_time_embedding_equals_the_papers(golden, dim):
    """To 1e-4: a rounding of the frequency by 6e-8 turns the angle by that times t, up to 999."""
    ours = sinusoidal_embedding(torch.from_numpy(golden["temb/in"]), dim)
    torch.testing.assert_close(ours, torch.from_numpy(golden[f"temb/{dim}"]), rtol=0, atol=1e-4)


def near_zero_layers(model: nn.Module) -> set[nn.Module]:
    if isinstance(model, DDPMPaperMLP):
        return {model.linear_out, *(block.linear_2 for block in model.blocks)}
    convs = {m.conv2 for m in model.modules() if isinstance(m, ResnetBlock)}
    return {model.conv_out} | convs | {m.to_out[0] for m in model.modules() if isinstance(m, SelfAttention)}


@pytest.mark.parametrize(
    "make",
    [lambda: DDPMPaperUNet(sample_size=16, block_out_channels=(32, 64), attention_resolutions=(8,)), DDPMPaperMLP],
    ids=["unet", "mlp"],
)
def test_the_initialisation_is_the_papers(make):
    """Uniform with variance scale / fan average, so bounded by √(3 · scale / fan average); biases 0."""
    torch.manual_seed(0)
    model = make()
    near_zero = near_zero_layers(model)
    assert len(near_zero) == (19 if isinstance(model, DDPMPaperUNet) else 4)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_average = (layer.weight.shape[0] + layer.weight.shape[1]) / 2 * layer.weight[0, 0].numel()
            bound = math.sqrt(3 * (1e-10 if layer in near_zero else 1) / fan_average)
            largest, rms = layer.weight.abs().max().item(), layer.weight.square().mean().sqrt().item()
            assert 0.9 * bound < largest <= bound * (1 + 1e-6), name
            # A uniform distribution's rms is bound / √3, here within 5 standard errors.
            error = 5 * 0.45 / math.sqrt(layer.weight.numel())
            assert rms * math.sqrt(3) / bound == pytest.approx(1, abs=error), name
            assert not layer.bias.any(), name
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            assert (layer.weight == 1).all() and not layer.bias.any(), name


def test_a_new_network_predicts_almost_nothing_and_every_block_is_almost_the_identity():
    torch.manual_seed(0)
    unet = DDPMPaperUNet(sample_size=8, block_out_channels=(32,), attention_resolutions=(8,))
    assert output(unet, images()).abs().max() < 1e-3
    x = images(2, 32, 8, 8)
    for block, inputs in ((unet.mid_block.resnets[0], (x, images(2, 128))), (unet.mid_block.attentions[0], (x,))):
        torch.testing.assert_close(block(*inputs), x, rtol=0, atol=1e-3)


def test_attention_is_where_the_configuration_says(tiny_unet):
    unet = tiny_unet(sample_size=16, block_out_channels=(8, 8, 8), attention_resolutions=(16, 4))
    assert [len(block.attentions) for block in unet.down_blocks] == [1, 0, 1]
    assert [len(block.attentions) for block in unet.up_blocks] == [2, 0, 2]
    assert len(unet.mid_block.attentions) == 1
    oblong = tiny_unet(sample_size=(8, 16), attention_resolutions=(16,))  # the longer side counts
    assert [len(block.attentions) for block in oblong.down_blocks] == [1, 0]
    assert not any(block.attentions for block in tiny_unet(attention_resolutions=()).down_blocks)


# ---- stock UNet2DModel ---------------------------------------------------------------------------------------------

STOCK_LAYOUT = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "act_fn": "silu",
}


@pytest.mark.parametrize(
    ("ours", "attention_level"), [(CIFAR10, 1), (CELEBAHQ256, 4)], ids=["ddpm-cifar10-32", "ddpm-celebahq-256"]
)
def test_parameters_have_stocks_names_and_shapes(ours, attention_level):
    with torch.device("meta"):
        unet = DDPMPaperUNet(**ours)
        levels = len(unet.config.block_out_channels)
        kinds = ["AttnDownBlock2D" if level == attention_level else "DownBlock2D" for level in range(levels)]
        stock = UNet2DModel(
            sample_size=unet.config.sample_size,
            block_out_channels=unet.config.block_out_channels,
            down_block_types=tuple(kinds),
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
            **STOCK_LAYOUT,
        )
    assert {k: v.shape for k, v in unet.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_with_the_same_weights_the_output_is_stocks(relative_error, tiny_unet, size):
    """To 1e-5: the same float32 sums, but attention by another kernel."""
    ours = tiny_unet(sample_size=16, attention_resolutions=(8,), layers_per_block=2)
    stock = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **STOCK_LAYOUT,
    )
    stock.load_state_dict(ours.state_dict())
    x = images(2, 3, *size)
    for t in (0, 999, torch.tensor([3, 777])):
        assert relative_error(output(ours, x, t), output(stock.eval(), x, t)) < 1e-5


# ---- shapes and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (2, 3, 8, 8)),
        ({}, (1, 3, 16, 4)),  # not square, and not the size of the configuration
        ({"sample_size": (8, 4)}, (2, 3, 8, 4)),
        ({"in_channels": 1, "out_channels": 1}, (2, 1, 8, 8)),
        ({"in_channels": 4, "out_channels": 4}, (2, 4, 8, 8)),
        ({"block_out_channels": (8,), "sample_size": 5}, (2, 3, 5, 7)),
        ({"layers_per_block": 3, "block_out_channels": (8, 12, 16)}, (2, 3, 8, 12)),
    ],
    ids=str,
)
def test_the_output_has_the_samples_shape(tiny_unet, config, shape):
    assert output(tiny_unet(**config), images(*shape)).shape == shape


def test_a_learned_variance_doubles_the_channels(tiny_unet, tiny_mlp):
    assert output(tiny_unet(out_channels=6), images()).shape == (2, 6, 8, 8)
    assert output(tiny_mlp(out_channels=4), images(5, 2)).shape == (5, 4)


def test_timesteps_and_outputs_in_all_their_forms(model_and_sample):
    model, sample = model_and_sample
    expected = model(sample, 7)
    assert isinstance(expected, UNet2DOutput)
    assert isinstance(model(sample, 7, return_dict=False), tuple)
    assert torch.equal(model(sample, 7, return_dict=False)[0], expected.sample)
    for t in (7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7]), torch.tensor([7.0, 7.0, 7.0])):
        assert torch.equal(output(model, sample, t), expected.sample)


def test_each_sample_has_its_own_time(model_and_sample):
    """One network pass for a batch equals one per sample, to 1e-5: kernels differ between batch sizes."""
    model, sample = model_and_sample
    together = output(model, sample, torch.tensor([0, 400, 999]))
    for i, t in enumerate((0, 400, 999)):
        torch.testing.assert_close(together[i : i + 1], output(model, sample[i : i + 1], t), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, output(model, sample, 0), atol=1e-3)  # time matters


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8), r"sample has shape (2, 1, 8, 8); this model expects [B, 3, H, W]"),
        ((3, 8, 8), r"sample has shape (3, 8, 8); this model expects [B, 3, H, W]"),
        ((2, 3, 7, 8), "height and width (7, 8) must be divisible by 2"),
        ((2, 3, 8, 5), "height and width (8, 5) must be divisible by 2"),
    ],
)
def test_a_sample_of_another_shape_is_refused(tiny_unet, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_unet()(images(*shape), 0)


def test_another_number_of_timesteps_is_refused(model_and_sample):
    model, sample = model_and_sample
    with pytest.raises(ValueError, match=r"timestep.*\(2,\)"):
        model(sample, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 30}, "sample_size=30 must be a side or (height, width) divisible by 8"),
        ({"sample_size": (32, 20)}, "sample_size=(32, 20) must be a side or (height, width) divisible by 8"),
        ({"sample_size": (32, 32, 32)}, "sample_size=(32, 32, 32) must be a side or (height, width)"),
        ({"sample_size": 0}, "sample_size=0 must be a side"),
        ({"norm_num_groups": 48}, "norm_num_groups=48 must divide (128, 256, 256, 256)"),
        ({"block_out_channels": (2, 4), "norm_num_groups": 1}, "block_out_channels[0]=2 must be even and at least 4"),
        ({"block_out_channels": (5, 10), "norm_num_groups": 5}, "block_out_channels[0]=5 must be even"),
        ({"out_channels": 4}, "out_channels=4 must be in_channels=3, or twice that"),
        ({"in_channels": 0, "out_channels": 0}, "in_channels=0"),
        ({"layers_per_block": 0}, "layers_per_block=0 must be an integer and at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be a number in [0, 1)"),
        ({"dropout": -0.1}, "dropout=-0.1 must be a number in [0, 1)"),
    ],
    ids=str,
)
def test_an_impossible_unet_is_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DDPMPaperUNet(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"out_channels": 3}, "out_channels=3 must be in_channels=2, or twice that"),
        ({"hidden_size": 15}, "hidden_size=15 must be even"),
        ({"num_layers": 0}, "num_layers=0 must be an integer and at least 1"),
    ],
    ids=str,
)
def test_an_impossible_mlp_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMPaperMLP(**config)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 2, 1)])
def test_points_of_another_dimension_are_refused(tiny_mlp, shape):
    with pytest.raises(ValueError, match=re.escape(f"sample has shape {shape}; this model expects [B, 2]")):
        tiny_mlp()(images(*shape), 0)


# ---- training ------------------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient(model_and_sample):
    model, sample = model_and_sample
    for name, gradient in gradients(model, sample).items():
        assert gradient is not None, name
        if not name.endswith("to_k.bias"):  # adds the same to all of a query's logits: softmax takes it away
            assert gradient.abs().max() > 1e-7, name


def test_dropout_acts_in_training_only(tiny_unet):
    unet, x = tiny_unet(dropout=0.5), images()
    assert torch.equal(output(unet, x), output(tiny_unet(), x))
    unet.train()
    assert not torch.equal(output(unet, x), output(unet, x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_of_the_unet_gives_the_same_gradients(tiny_unet, dropout):
    unet = tiny_unet(dropout=dropout).train()
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock)]
    check_gradient_checkpointing(unet, images(), blocks)


def test_gradient_checkpointing_of_the_mlp_gives_the_same_gradients(tiny_mlp):
    mlp = tiny_mlp()
    check_gradient_checkpointing(mlp, images(4, 2), list(mlp.blocks))


def check_gradient_checkpointing(model: nn.Module, sample: Tensor, blocks: list[nn.Module]) -> None:
    """Equal gradients, also under dropout's random mask, and every block is run once forward and once backward."""
    torch.manual_seed(0)
    expected = gradients(model, sample)
    model.enable_gradient_checkpointing()
    runs = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: runs.append(block))
    torch.manual_seed(0)
    for name, gradient in gradients(model, sample).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-7)
    assert all(runs.count(block) == 2 for block in blocks)


def test_channels_last_gives_the_same(relative_error, tiny_unet):
    unet, x = tiny_unet(), images()
    expected = output(unet, x)
    unet.to(memory_format=torch.channels_last)
    assert relative_error(output(unet, x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


@pytest.mark.slow
def test_torch_compile_gives_the_same(relative_error, tiny_unet):
    unet, x = tiny_unet(), images()
    compiled = torch.compile(unet, fullgraph=True)
    for t in (torch.tensor([3, 777]), torch.tensor(5)):
        assert relative_error(output(compiled, x, t), output(unet, x, t)) < 1e-5


# ---- saving and loading, as for every diffusers model --------------------------------------------------------------


def test_a_reloaded_model_is_exactly_the_same(tmp_path, model_and_sample):
    model, sample = model_and_sample
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(output(loaded, sample), output(model, sample))
    # What larger networks need for that: memory-mapped weights are unaligned, which changes the order of their sums.
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
    public = {key: value for key, value in model.config.items() if not key.startswith("_")}
    assert {key: tuple(v) if isinstance(v := loaded.config[key], list) else v for key in public} == public


def test_a_model_in_shards_is_exactly_the_same(tmp_path, model_and_sample):
    model, sample = model_and_sample
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    assert torch.equal(output(type(model).from_pretrained(tmp_path), sample), output(model, sample))


def test_loading_in_bfloat16(tmp_path, relative_error, model_and_sample):
    """To 5%: bfloat16 keeps 8 bits, and the errors of some twenty layers add up."""
    model, sample = model_and_sample
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    result = output(loaded, sample.bfloat16())
    assert result.dtype == torch.bfloat16
    assert relative_error(result, output(model, sample)) < 0.05


def test_the_fp16_variant(tmp_path, model_and_sample):
    model, sample = model_and_sample
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = type(model).from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=str)
@pytest.mark.parametrize("shards", ["4KB", "1GB"])
def test_device_map(tmp_path, model_and_sample, device_map, shards):
    model, sample = model_and_sample
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(output(loaded, sample).cpu(), output(model, sample), rtol=1e-5, atol=1e-5)


def test_no_split_modules_are_classes_of_the_model(model_and_sample):
    """What `device_map` must keep in one piece, by name: a misspelt one would be ignored."""
    model, _ = model_and_sample
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


def test_layerwise_casting_stores_in_bfloat16_and_computes_in_float32(relative_error, model_and_sample):
    model, sample = model_and_sample
    expected = output(model, sample)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    result = output(model, sample)
    assert result.dtype == torch.float32
    assert 0 < relative_error(result, expected) < 0.05
