"""Files of PyTorch ports of the paper's code → ours; files of other projects are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from port_files import Port, port_shapes, port_weights
from safetensors.torch import save_file

from ddpm_hf import DDPMPaperPipeline, DDPMPaperUNet
from ddpm_hf.cli import main
from ddpm_hf.convert import from_pytorch_port, pipeline_from_pytorch_port
from ddpm_hf.convert.pytorch_ports import paper_variables

TINY = port_shapes(32, (1, 2), 1, attended=[1])
THREE_LEVELS = port_shapes(32, (1, 1, 2), 2, attended=[0, 2], channels=1)
NO_ATTENTION = port_shapes(32, (1,), 3, attended=[])
CIFAR10 = port_shapes(128, (1, 2, 2, 2), 2, attended=[1])
SIDE_256 = port_shapes(128, (1, 1, 2, 2, 4, 4), 2, attended=[4])


def saved(content: Any, folder: Path, name: str = "model.ckpt") -> Path:
    torch.save(content, folder / name)
    return folder / name


@torch.no_grad()
@pytest.mark.parametrize("shapes", [TINY, THREE_LEVELS, NO_ATTENTION], ids=["tiny", "three levels", "no attention"])
def test_the_output_is_the_ports(tmp_path, shapes):
    """In float64 to 1e-12 of a value about 1: rounding in another order. A wrong layer or eps gives above 1e-6."""
    weights = port_weights(shapes)
    unet = from_pytorch_port(saved(weights, tmp_path)).double()
    channels = unet.config["in_channels"]
    x = torch.randn(2, channels, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 700])
    expected = Port({name: tensor.double() for name, tensor in weights.items()})(x, t)
    assert expected.std() > 0.1
    torch.testing.assert_close(unet(x, t).sample, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shapes", [TINY, THREE_LEVELS, NO_ATTENTION], ids=["tiny", "three levels", "no attention"])
def test_every_tensor_is_used_once(tmp_path, shapes):
    """As many values, and the same ones: each tensor holds its own number throughout."""
    weights = {name: torch.full(shape, float(i + 1)) for i, (name, shape) in enumerate(shapes.items())}
    unet = from_pytorch_port(saved(weights, tmp_path))
    found = {p.flatten()[0].item(): p.numel() for p in unet.parameters()}
    assert found == {float(i + 1): tensor.numel() for i, tensor in enumerate(weights.values())}


@pytest.mark.parametrize(
    ("shapes", "config", "parameters"),
    [
        (CIFAR10, {"sample_size": 32, "block_out_channels": (128, 256, 256, 256)}, 35_746_307),
        (SIDE_256, {"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512)}, 113_673_219),
    ],
    ids=["CIFAR-10", "256"],
)
def test_the_papers_networks_fit_by_their_shapes(monkeypatch, shapes, config, parameters):
    """Without their memory: every tensor is one number, expanded; the network that they go into has none."""
    variables = paper_variables({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})
    from ddpm_hf.convert import tensorflow

    layers = {tuple(name.rsplit("/", 1)): value for name, value in variables.items()}
    found = tensorflow._config_of(layers, None)
    assert {key: found[key] for key in config} == config and found["attention_resolutions"] == (16,)
    with torch.device("meta"):
        unet = DDPMPaperUNet(**found)
    levels = len(found["block_out_channels"])
    ours = {}
    for (layer, part), value in layers.items():
        name = f"{tensorflow._our_name(layer, levels)}.{'weight' if part in ('W', 'gamma') else 'bias'}"
        assert name not in ours
        matrix = value.ndim == 2 and layer.endswith("nin_shortcut")
        shape = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)[: value.ndim] if value.ndim == 2 else (0,)
        ours[name] = tuple(value.shape[i] for i in shape) + (1, 1) * matrix
    assert ours == {name: tuple(p.shape) for name, p in unet.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_the_process_is_the_papers(tmp_path):
    pipe = pipeline_from_pytorch_port(saved(port_weights(TINY), tmp_path), sample_size=64)
    config = {**pipe.scheduler.config, **pipe.unet.config}
    expected = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}
    expected |= {"variance_type": "fixed_small", "sample_size": 64, "attention_resolutions": (32,)}
    assert {key: config[key] for key in expected} == expected


# ---- what a file holds beside the weights --------------------------------------------------------------------------

RAW, AVERAGED = port_weights(TINY, seed=1), port_weights(TINY, seed=2)
OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}


@pytest.mark.parametrize(
    ("content", "ema", "expected"),
    [
        (RAW, True, RAW),
        ([RAW, OPTIMIZER, 7, 1000], True, RAW),
        ([RAW, OPTIMIZER, 7, 1000, AVERAGED], True, AVERAGED),
        ([RAW, OPTIMIZER, 7, 1000, AVERAGED], False, RAW),
        (({f"module.{name}": tensor for name, tensor in RAW.items()}, OPTIMIZER, 7, 1000, AVERAGED), False, RAW),
        ({"model_ema": AVERAGED, "model": RAW, "step": 3}, True, AVERAGED),
        ({"model_ema": AVERAGED, "model": RAW, "step": 3}, False, RAW),
        ({"state_dict": {f"model.{name}": tensor for name, tensor in RAW.items()}, "epoch": 2}, True, RAW),
        ({name: tensor.double() for name, tensor in RAW.items()}, True, RAW),
    ],
    ids=["alone", "first", "averaged", "raw", "parallel", "named", "named raw", "scoped", "float64"],
)
def test_which_weights_are_taken(tmp_path, content, ema, expected):
    found = from_pytorch_port(saved(content, tmp_path), ema=ema)
    other = from_pytorch_port(saved(expected, tmp_path, "expected.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), other.parameters(), strict=True))


def test_a_file_of_safetensors_is_read_too(tmp_path):
    save_file(RAW, tmp_path / "model.safetensors")
    unet = from_pytorch_port(tmp_path / "model.safetensors")
    assert torch.equal(unet.conv_in.weight, RAW["conv_in.weight"])


def test_raw_weights_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"model.ckpt has one kind of weights, and does not say which; .*--raw"):
        from_pytorch_port(saved(RAW, tmp_path), ema=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down.1.attn.0.k.weight": None}, r"missing \['down_blocks.1.attentions.0.to_k.weight'\], unexpected \[\]"),
        ({"conv_out.weight": None}, "the variables lack conv_out/W"),
        ({"label_emb.weight": torch.zeros(10, 128)}, "'label_emb.weight' is not a tensor of the paper's UNet"),
        (
            {"down.0.block.0.conv_shortcut.weight": torch.zeros(32, 32, 3, 3)},
            "'down_0/block_0/conv_shortcut' is not a",
        ),
        ({"down.0.block.1.conv1.bias": torch.zeros(32)}, "unexpected .'down_blocks.0.resnets.1.conv1.bias'"),
        (
            {"mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)},
            r"'mid.attn_1.q.weight' has shape \(64, 64, 3, 3\); a 1×1",
        ),
        (
            {"mid.attn_1.q.weight": torch.zeros(64, 32, 1, 1)},
            r"misshapen .*to_q.weight \(64, 32\) instead of \(64, 64\)",
        ),
        ({"up.0.block.0.nin_shortcut.weight": torch.zeros(32, 96)}, r"has shape \(32, 96\); a 1×1 convolution"),
        ({"mid.block_1.conv1.bias": torch.full((64,), torch.nan)}, "'mid/block_1/conv1/b' is not finite"),
        ({"temb.dense.0.bias": torch.zeros(127)}, r"misshapen .*time_embedding.linear_1.bias \(127,\) instead of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    weights = {name: tensor for name, tensor in {**RAW, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        from_pytorch_port(saved(weights, tmp_path))


# ---- files of others -----------------------------------------------------------------------------------------------

OTHERS = {
    "score_sde": ["all_modules.0.weight", "all_modules.3.GroupNorm_0.weight", "sigmas"],
    "improved-diffusion or guided-diffusion": ["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.bias"],
    "latent diffusion": ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"],
    "an autoencoder of latent diffusion": ["encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight"],
    "lucidrains' denoising-diffusion-pytorch": [
        "betas",
        "model.init_conv.weight",
        "model.downs.0.0.block1.proj.weight",
    ],
    "w86763777's pytorch-ddpm": ["time_embedding.timembedding.1.weight", "downblocks.0.block1.0.weight"],
    "NVlabs' EDM": ["model.enc.32x32_conv.weight", "model.map_layer0.weight"],
    "diffusers, or ours": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("project", OTHERS)
def test_networks_of_others_are_named_with_the_reason(tmp_path, project, nested):
    weights = {f"{'module.' * nested}{name}": torch.zeros(2) for name in OTHERS[project]}
    content = {"step": 5, "model": weights, "ema": {"decay": 0.999}} if nested else weights
    with pytest.raises(
        ValueError, match=f"model.ckpt is a network of {project}, which cannot be converted: it"
    ) as info:
        from_pytorch_port(saved(content, tmp_path))
    assert "\n" not in str(info.value)


def test_other_tensors_are_listed(tmp_path):
    file = saved({"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, tmp_path)
    with pytest.raises(ValueError, match=r"no tensors of the paper's network \(its first are fc.weight, fc.bias\)"):
        from_pytorch_port(file)
    with pytest.raises(ValueError, match=r"it has none with names"):
        from_pytorch_port(saved([1, 2], tmp_path))


class Harmless:
    """An object of a class, which a pickle can only hold by naming code."""


def test_a_file_that_needs_code_is_not_run(tmp_path):
    file = saved({"model": RAW, "args": Harmless()}, tmp_path)
    with pytest.raises(ValueError, match=r"holds \S*Harmless beside its tensors, which only code could read") as info:
        from_pytorch_port(file)
    assert "\n" not in str(info.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "photo.ckpt").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match=r"photo.ckpt is damaged, or neither a file of torch.save"):
        from_pytorch_port(tmp_path / "photo.ckpt")
    file = saved(RAW, tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.ckpt is damaged, or neither a file of torch.save"):
        from_pytorch_port(file)
    with pytest.raises(OSError):
        from_pytorch_port(tmp_path / "none.ckpt")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_converts_a_file(tmp_path, capsys):
    file = saved([RAW, OPTIMIZER, 7, 1000, AVERAGED], tmp_path)
    for options, weights in (([], AVERAGED), (["--raw"], RAW)):
        output = tmp_path / f"new{len(options)}"
        main(["convert", str(file), str(output), "--sample_size", "16", *options])
        assert capsys.readouterr().out.endswith("sample_size=16, variance_type=fixed_large\n")
        unet: Any = DDPMPaperPipeline.from_pretrained(output).unet
        assert torch.equal(unet.conv_in.weight, weights["conv_in.weight"])


def test_the_command_refuses_others_in_one_line(tmp_path):
    file = saved({"all_modules.0.weight": torch.zeros(2)}, tmp_path)
    with pytest.raises(SystemExit, match="ddpm-hf: .* is a network of score_sde") as info:
        main(["convert", str(file), str(tmp_path / "new")])
    assert "\n" not in str(info.value.code) and not (tmp_path / "new").exists()
    with pytest.raises(
        SystemExit, match="is a file; give the folder of a checkpoint; ddpm-hf convert makes one of it"
    ):
        main(["sample", str(file)])
