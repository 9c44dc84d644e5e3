"""Conversion of whole networks and pipelines: stock diffusers ⇄ ours, the paper's TensorFlow checkpoints → ours."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.cli import main
from ddpm_hf.convert import (
    from_stock,
    from_tf_checkpoint,
    pipeline_from_stock,
    pipeline_from_tf_checkpoint,
    pipeline_to_stock,
    to_stock,
)
from ddpm_hf.distillation import student_scheduler

CHECKPOINT = Path(__file__).parents[1] / "golden" / "tf_checkpoint"

STOCK = {  # of google/ddpm-cifar10-32, as far as it differs from UNet2DModel's defaults; and a small size
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
TINY = {
    **STOCK,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CIFAR10 = {
    **STOCK,
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SIDE_256 = {
    **STOCK,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}


def tiny_stock(**config) -> UNet2DModel:
    """A UNet2DModel for 8×8 images with weights far from their initialisation, the same every time."""
    unet = UNet2DModel(**{**TINY, **config})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


def identical(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether names, dtypes and every bit of the weights are the same."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def settings(model: DDPMPaperUNet | UNet2DModel) -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def output(unet, t: int, channels: int = 3, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return unet(x, t).sample


# ---- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 500, 937, 999])
def test_stock_in_gives_the_same_outputs(relative_error, t):
    stock = tiny_stock()
    assert relative_error(output(from_stock(stock), t), output(stock, t)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"in_channels": 1, "out_channels": 1},
        {"out_channels": 6},  # learned variance
        {"attention_resolutions": ()},
        {"attention_resolutions": (8, 4), "layers_per_block": 2, "dropout": 0.1},
        {"sample_size": (8, 12), "attention_resolutions": (12,)},
        {"block_out_channels": (8, 16, 16), "attention_resolutions": (4,)},
    ],
    ids=str,
)
def test_stock_out_gives_the_same_outputs_and_back_in_the_same_weights(tiny_unet, relative_error, config):
    ours = tiny_unet(**config)
    stock = to_stock(ours)
    size = config.get("sample_size", (8, 8))
    channels = config.get("in_channels", 3)
    assert relative_error(output(stock, 700, channels, size), output(ours, 700, channels, size)) < 1e-5
    back = from_stock(stock)
    assert identical(back, ours) and settings(back) == settings(ours)


@pytest.mark.parametrize(
    ("config", "num_parameters"), [(CIFAR10, 35_746_307), (SIDE_256, 113_673_219)], ids=["cifar10", "256"]
)
def test_the_published_layouts_convert_in_both_directions(config, num_parameters):
    """Names and shapes, without memory for the weights."""
    with torch.device("meta"):
        stock = UNet2DModel(**config)
        attention = {32: {"dropout": 0.0}, 256: {"block_out_channels": config["block_out_channels"]}}
        ours = DDPMPaperUNet(sample_size=config["sample_size"], **attention[config["sample_size"]])
    converted = from_stock(stock)
    assert sum(parameter.numel() for parameter in converted.parameters()) == num_parameters
    assert shapes(converted) == shapes(ours) == shapes(stock)
    assert settings(converted) == settings(ours)
    back = to_stock(ours)
    assert shapes(back) == shapes(stock) and settings(back) == settings(stock)


def test_weights_are_copies_that_keep_dtype_and_mode():
    stock = tiny_stock().to(torch.bfloat16).train()
    ours = from_stock(stock)
    assert identical(ours, stock) and ours.training and ours.dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in ours.parameters())
    with torch.no_grad():
        stock.conv_in.weight.zero_()
    assert ours.conv_in.weight.abs().max() > 0


def test_conversion_draws_no_random_numbers():
    stock = tiny_stock()
    before = torch.get_rng_state()
    from_stock(stock)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "same",
    [
        {"attention_head_dim": 16},
        {"time_embedding_dim": 32},
        {"attn_norm_num_groups": 4},
        {"act_fn": "swish"},
        {"num_train_timesteps": 1000},
    ],
    ids=str,
)
def test_other_words_for_the_papers_values_are_understood(relative_error, same):
    stock = tiny_stock(**same)
    assert relative_error(output(from_stock(stock), 300), output(stock, 300)) < 1e-5


REFUSED = {
    "sample_size": None,
    "out_channels": 4,
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 64,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "mid_block_scale_factor": 2,
    "downsample_padding": 1,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "act_fn": "gelu",
    "attention_head_dim": 8,
    "attn_norm_num_groups": 2,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "add_attention": False,
    "class_embed_type": "timestep",
}


@pytest.mark.parametrize(("key", "value"), REFUSED.items(), ids=REFUSED)
def test_what_the_papers_unet_cannot_express_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key}=.*(needs|must be)"):
        from_stock(tiny_stock(**{key: value}))


def test_every_option_of_stock_is_either_carried_over_or_refused():
    """So that an option of a later diffusers does not go unnoticed."""
    carried = {
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "dropout",
        "norm_num_groups",
        "num_class_embeds",
    }
    without_effect = {"num_train_timesteps"}  # with positional embeddings
    options = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    assert options == REFUSED.keys() | carried | without_effect


def test_one_head_must_be_one_on_every_level():
    blocks = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    with pytest.raises(ValueError, match=r"attention_head_dim=8, .* every level with attention, \[8, 16\]"):
        from_stock(tiny_stock(**blocks, attention_head_dim=8))
    from_stock(tiny_stock(**blocks))
    only_on_top = {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }
    with pytest.raises(
        ValueError, match="attention_head_dim=8"
    ):  # two heads of 8 in the middle, which has 16 channels
        from_stock(tiny_stock(**only_on_top, attention_head_dim=8))


# ---- pipelines -----------------------------------------------------------------------------------------------------

PROCESSES = [
    {},
    {"variance_type": "fixed_large", "clip_sample_range": 2.0},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"beta_schedule": "quad", "prediction_type": "sample", "thresholding": True},
    {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5], "clip_sample": False},
    {"beta_schedule": "jsd", "prediction_type": "sample"},
]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_stock_out_samples_the_same(tiny_unet, tiny_scheduler, relative_error, process):
    """To 1e-5: stock's tables are in float32 (7e-7 here at most); another table or variance is far off."""
    ours = DDPMPaperPipeline(tiny_unet(), tiny_scheduler(**process))
    stock = pipeline_to_stock(ours)
    drawn = []
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        drawn.append(torch.from_numpy(pipe(generator=generator, num_inference_steps=10, output_type="np").images))
    assert relative_error(*drawn) < 1e-5
    assert drawn[0].std() > 0.1  # a picture, not a constant


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_out_and_in_again_is_the_same_pipeline(tiny_unet, tiny_scheduler, tmp_path, process):
    ours = DDPMPaperPipeline(tiny_unet(), tiny_scheduler(**process))
    pipeline_to_stock(ours).save_pretrained(tmp_path)
    DDPMPipeline.from_pretrained(tmp_path)  # nothing of ours in it: stock loads it, without a trust flag
    assert not list(tmp_path.rglob("*.py")) and "Paper" not in (tmp_path / "model_index.json").read_text()
    back = pipeline_from_stock(tmp_path)
    assert isinstance(back.scheduler, DDPMPaperScheduler) and identical(back.unet, ours.unet)
    assert np.array_equal(back.scheduler.diffusion.betas, ours.scheduler.diffusion.betas)
    config = {key: value for key, value in ours.scheduler.config.items() if not key.startswith("_")}
    assert {key: back.scheduler.config[key] for key in config} == config


@pytest.mark.parametrize(
    ("unet", "process", "message"),
    [
        ({"out_channels": 6}, {"variance_type": "learned"}, "no variance_type that means what 'learned' does here"),
        ({}, {"prediction_type": "previous_sample"}, "no prediction_type that means what 'previous_sample' does"),
        (
            {},
            {"variance_type": "fitted", "x_start_mse": [0.1] * 10},
            "no variance_type that means what 'fitted' does here",
        ),
        (
            {},
            {"variance_type": "fitted", "x_start_mse": [0.1] * 3, "inference_timesteps": [0, 4, 9]},
            "no variance_type that means what 'fitted' does here",
        ),
        ({}, {"inference_timesteps": [0, 4, 9]}, "cannot keep inference_timesteps; pass them to its set_timesteps"),
    ],
)
def test_what_stocks_scheduler_cannot_express_is_refused(tiny_unet, tiny_scheduler, unet, process, message):
    with pytest.raises(ValueError, match=message):
        pipeline_to_stock(DDPMPaperPipeline(tiny_unet(**unet), tiny_scheduler(**process)))


def test_points_cannot_become_stock(tiny_mlp, tiny_scheduler):
    with pytest.raises(ValueError, match="has a DDPMPaperMLP and a DDPMPaperScheduler; a DDPMPaperUNet and a"):
        pipeline_to_stock(DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(variance_type="learned"), "variance_type='learned' means a variance in stock"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type='learned_range' is not supported"),
        (DDPMScheduler(variance_type="fixed_large_log"), "variance_type='fixed_large_log' is not supported"),
        (DDPMScheduler(beta_schedule="laplace"), "beta_schedule='laplace' is not supported"),
        (DDIMScheduler(), "has a UNet2DModel and a DDIMScheduler; stock's UNet2DModel and DDPMScheduler can be"),
    ],
)
def test_stock_schedulers_that_mean_something_else_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        pipeline_from_stock(DDPMPipeline(tiny_stock(), scheduler))


# ---- the flat repositories of 2022 ---------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path) -> Path:
    """A folder as google/ddpm-cifar10-32: everything at the root, attention under its old names, short configs."""
    folder, modern = tmp_path / "flat", tmp_path / "modern"
    folder.mkdir()
    DDPMPipeline(tiny_stock(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(modern)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(modern / "unet" / "diffusion_pytorch_model.safetensors").items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = tensor
    assert "mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shutil.copy(modern / "unet" / "config.json", folder)
    scheduler = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "num_train_timesteps": 1000}
    scheduler |= {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
    scheduler |= {"variance_type": "fixed_large", "clip_sample": True}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_flat_repository_runs_as_it_is(flat):
    pipe = DDPMPaperPipeline.from_pretrained(flat)
    assert isinstance(pipe.unet, UNet2DModel) and isinstance(pipe.scheduler, DDPMScheduler)
    assert identical(pipe.unet, tiny_stock())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(seeds=[0], num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 8, 8, 3)


def test_a_flat_repository_becomes_ours(flat, relative_error):
    pipe = pipeline_from_stock(flat)
    assert isinstance(pipe.unet, DDPMPaperUNet) and pipe.scheduler.config["variance_type"] == "fixed_large"
    assert relative_error(output(pipe.unet, 999), output(tiny_stock(), 999)) < 1e-5


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDPMPaperPipeline])
def test_without_its_index_a_flat_folder_is_no_pipeline_to_stock_either_but_its_parts_load(flat, pipeline):
    (flat / "model_index.json").unlink()
    with pytest.raises(OSError, match="model_index.json"):
        pipeline.from_pretrained(flat)
    assert identical(from_stock(UNet2DModel.from_pretrained(flat)), tiny_stock())
    assert DDPMPaperScheduler.from_pretrained(flat).config["variance_type"] == "fixed_large"


# ---- the paper's TensorFlow checkpoints ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    with np.load(CHECKPOINT / "expected.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A copy of the checkpoint's folder that a test may damage."""
    for path in CHECKPOINT.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["", "model.ckpt-790000", "model.ckpt-790000.index"])
@pytest.mark.parametrize(("ema", "recorded"), [(True, "out_ema"), (False, "out")])
def test_a_checkpoint_of_the_papers_code_gives_its_outputs(expected, relative_error, name, ema, recorded):
    """To 2e-5, as in test_tensorflow.py; the two sets of weights differ by far more."""
    unet = from_tf_checkpoint(CHECKPOINT / name, ema=ema, sample_size=16)
    assert (unet.config["sample_size"], unet.config["attention_resolutions"]) == (16, (8,))
    with torch.no_grad():
        result = unet(expected["x"].movedim(-1, 1), expected["t"]).sample.movedim(1, -1)
    assert relative_error(result, expected[recorded]) < 2e-5
    assert relative_error(expected["out"], expected["out_ema"]) > 1e-3


def test_a_folder_that_was_moved_still_finds_its_checkpoint(damaged):
    (damaged / "checkpoint").write_text('model_checkpoint_path: "gs://bucket/logs/model.ckpt-790000"\n')
    assert identical(from_tf_checkpoint(damaged), from_tf_checkpoint(CHECKPOINT))


def test_a_folder_that_lost_its_checkpoint_says_which(damaged):
    (damaged / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-800000"\n')
    with pytest.raises(ValueError, match="names 'model.ckpt-800000', which is not in .*; give the prefix itself"):
        from_tf_checkpoint(damaged)


def test_no_checkpoint_at_all_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no TensorFlow checkpoint at .*/model.ckpt-1: give the path of its"):
        from_tf_checkpoint(tmp_path / "model.ckpt-1")


def test_missing_averages_are_said(monkeypatch):
    from ddpm_hf.convert import tensorflow as convert

    class WithoutOneAverage(convert.TensorBundle):
        def __init__(self, prefix):
            super().__init__(prefix)
            del self.entries["model/conv_out/b/ExponentialMovingAverage"]

    monkeypatch.setattr(convert, "TensorBundle", WithoutOneAverage)
    with pytest.raises(
        ValueError, match=r"no averaged copy .* of 1 of 142 variables, model/conv_out/b first; .*--raw"
    ):
        from_tf_checkpoint(CHECKPOINT)
    from_tf_checkpoint(CHECKPOINT, ema=False)


def test_damaged_weights_are_refused(damaged):
    data = damaged / "model.ckpt-790000.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1000] + bytes(1000))
    with pytest.raises(ValueError, match="is corrupt: its checksum is"):
        from_tf_checkpoint(damaged)


def test_the_process_is_the_papers():
    pipe = pipeline_from_tf_checkpoint(CHECKPOINT)
    config = pipe.scheduler.config
    assert [config[key] for key in ("num_train_timesteps", "beta_start", "beta_end")] == [1000, 1e-4, 0.02]
    assert (config["beta_schedule"], config["prediction_type"]) == ("linear", "epsilon")


@pytest.mark.parametrize(
    ("sample_size", "chosen", "variance_type"),
    [(32, None, "fixed_large"), (256, None, "fixed_small"), (32, "fixed_small", "fixed_small")],
)
def test_the_variance_is_the_papers_at_that_size_or_chosen(sample_size, chosen, variance_type):
    pipe = pipeline_from_tf_checkpoint(CHECKPOINT, sample_size=sample_size, variance_type=chosen)
    assert pipe.scheduler.config["variance_type"] == variance_type


def test_learned_variance_follows_from_the_channels(monkeypatch, tiny_unet):
    from ddpm_hf.convert import tensorflow as convert

    with pytest.raises(ValueError, match="variance_type='learned' does not fit a network of 3 channels in and 3 out"):
        pipeline_from_tf_checkpoint(CHECKPOINT, variance_type="learned")
    monkeypatch.setattr(convert, "from_tf_checkpoint", lambda *args, **kwargs: tiny_unet(out_channels=6))
    assert pipeline_from_tf_checkpoint(CHECKPOINT).scheduler.config["variance_type"] == "learned"
    with pytest.raises(ValueError, match="variance_type='fixed_large' does not fit a network of 3 channels in and 6"):
        pipeline_from_tf_checkpoint(CHECKPOINT, variance_type="fixed_large")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_converts_stock_to_ours_and_back(flat, tmp_path, capsys):
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    main(["convert", str(flat), str(ours)])
    assert "DDPMPaperPipeline" in capsys.readouterr().out
    assert isinstance(DDPMPaperPipeline.from_pretrained(ours).unet, DDPMPaperUNet)
    main(["convert", str(ours), str(stock), "--to", "stock"])
    assert identical(DDPMPipeline.from_pretrained(stock).unet, tiny_stock())


def test_the_command_makes_a_ddim_pipeline_of_a_distilled_network(tiny_unet, tmp_path, capsys):
    scheduler = student_scheduler(DDPMPaperScheduler(num_train_timesteps=10))
    DDPMPaperPipeline(tiny_unet(), scheduler, num_inference_steps=5).save_pretrained(tmp_path / "student")
    main(["convert", str(tmp_path / "student"), str(tmp_path / "stock"), "--to", "stock"])
    assert capsys.readouterr().out.endswith(", sample_size=8, DDIMScheduler\n")
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "stock"), DDIMPipeline)


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_the_command_converts_tensorflow_checkpoints(tmp_path, capsys, options):
    main(["convert", str(CHECKPOINT), str(tmp_path), "--sample_size", "16", *options])
    assert capsys.readouterr().out.endswith("sample_size=16, variance_type=fixed_large\n")
    expected = from_tf_checkpoint(CHECKPOINT, ema=not options)
    assert identical(DDPMPaperPipeline.from_pretrained(tmp_path).unet, expected)


def test_the_command_converts_tensorflow_checkpoints_to_stock(tmp_path):
    main(["convert", str(CHECKPOINT), str(tmp_path), "--to", "stock", "--variance_type", "fixed_small"])
    stock = DDPMPipeline.from_pretrained(tmp_path)
    assert identical(stock.unet, from_tf_checkpoint(CHECKPOINT))
    assert stock.scheduler.config.variance_type == "fixed_small"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "stock"], "a DDPMPaperUNet and a DDPMPaperScheduler can be converted"),
        (
            ["--raw"],
            "--raw, --sample_size and --variance_type are for TensorFlow checkpoints",
        ),
    ],
)
def test_the_command_says_what_it_cannot_do(flat, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(flat), str(tmp_path / "new"), *options])
    assert not (tmp_path / "new").exists()


def test_the_command_overwrites_nothing(flat):
    with pytest.raises(SystemExit, match="flat exists; give a new or an empty folder"):
        main(["convert", str(CHECKPOINT), str(flat)])
