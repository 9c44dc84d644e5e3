"""Checkpoints of old versions, of diffusers' scripts, with weights in other files: read, or refused with remedy."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from local_hub import LocalHub

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.cli import main
from ddpm_hf.convert import pipeline_from_stock
from ddpm_hf.hub import load_model, load_pipeline

ROOT = Path(__file__).parents[2]
TINY = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
STOCK = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
STOCK |= {"attention_head_dim": None, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
STOCK |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def stock_pipeline(**config: Any) -> DDPMPipeline:
    torch.manual_seed(0)
    return DDPMPipeline(UNet2DModel(**{**TINY, **STOCK, **config}), DDPMScheduler(num_train_timesteps=10))


def our_pipeline() -> DDPMPaperPipeline:
    torch.manual_seed(0)
    return DDPMPaperPipeline(DDPMPaperUNet(**TINY, attention_resolutions=(4,)), DDPMPaperScheduler(10, 0.1, 0.5))


KINDS: dict[str, Callable[[], Any]] = {"stock": stock_pipeline, "ours": our_pipeline}


def flatten(folder: Path) -> None:
    """Bring what lies in unet/ and scheduler/ to the root, as old repositories have it."""
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()


def change(file: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove}
    file.write_text(json.dumps({**content, **values}))


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(one == other and torch.equal(x, y) for (one, x), (other, y) in pairs)


def refusal(*words: Any) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as info:
        main([str(word) for word in words])
    message = info.value.code
    assert isinstance(message, str) and message.startswith("ddpm-hf: ") and "\n" not in message
    return message


# ---- weights in other files: variants, pickles, shards -------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "shards"),
    [
        pytest.param(False, False, id="nested"),
        pytest.param(False, True, id="nested shards"),
        pytest.param(True, False, id="flat"),
        pytest.param(True, True, id="flat shards", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16", pytest.param("non_ema", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_under_every_name(tmp_path, capsys, kind, variant, safe, flat, shards):
    """They are read with the right options, bit for bit; without these the file is named, and what reads it."""
    pipe, folder = KINDS[kind](), tmp_path / "checkpoint"
    size = {"max_shard_size": "20KB"} if shards else {}
    pipe.save_pretrained(folder, variant=variant, safe_serialization=safe, **size)
    if flat:
        flatten(folder)
    name = next(path.name for path in sorted(folder.rglob("diffusion_pytorch_model*")) if path.suffix != ".json")
    assert ("-of-" in name) == shards
    options = {"variant": variant, "use_safetensors": safe}
    loaded = DDPMPaperPipeline.from_pretrained(folder, **options)
    assert equal(loaded.unet, pipe.unet)
    assert equal(load_pipeline(folder, variant=variant, read_bin=not safe).unet, pipe.unet)
    network: Any = type(pipe.unet)
    assert equal(network.from_pretrained(folder, subfolder=None if flat else "unet", **options), pipe.unet)
    if variant is None and safe:
        return
    needed = [f'variant="{variant}" (ddpm-hf --variant {variant})'] * (variant is not None)
    needed += ["use_safetensors=False (ddpm-hf --allow_pickle)"] * (not safe)
    with pytest.raises(OSError) as info:
        DDPMPaperPipeline.from_pretrained(folder)
    message = str(info.value)
    assert name in message and f"is read with {' and '.join(needed)}" in message
    assert ("pickle, which can run code" in message) == ("then writes safetensors" in message) == (not safe)
    assert refusal("sample", folder, "-o", tmp_path / "x.png") == f"ddpm-hf: {message}"
    right = [*(["--variant", variant] if variant else []), *(["--allow_pickle"] if not safe else [])]
    main(["convert", str(folder), str(tmp_path / "new"), *right])
    converted = DDPMPaperPipeline.from_pretrained(tmp_path / "new").unet
    assert all(torch.equal(x, pipe.unet.get_parameter(n)) for n, x in converted.named_parameters())
    assert {path.suffix for path in (tmp_path / "new" / "unet").glob("diffusion*")} == {".safetensors"}
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new'}: DDPMPaperPipeline")


@pytest.mark.parametrize("kind", KINDS)
def test_another_variant_than_is_there_is_named(tmp_path, kind):
    KINDS[kind]().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError, match=r'diffusion_pytorch_model.fp16.safetensors is read with variant="fp16"'):
        DDPMPaperPipeline.from_pretrained(tmp_path, variant="bf16")
    assert "--variant fp16" in refusal("convert", tmp_path, tmp_path / "new", "--variant", "bf16")
    KINDS[kind]().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"is read with neither variant nor use_safetensors"):
        DDPMPaperPipeline.from_pretrained(tmp_path, variant="bf16")


def test_the_variant_is_part_of_what_is_said_of_the_weights(tmp_path):
    stock_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert load_model(str(tmp_path), None, variant="fp16")[1] == "as saved, fp16"


def test_allow_pickle_still_prefers_safetensors(tmp_path):
    """Where both lie there, the pickle is not opened: this one is none."""
    pipe = stock_pipeline()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no weights")
    assert equal(load_pipeline(tmp_path, read_bin=True).unet, pipe.unet)


ON_THE_HUB = """
import sys
from ddpm_hf.hub import load_pipeline

for repository, options in (
    ("tester/fp16", {}), ("tester/fp16", {"variant": "fp16"}), ("tester/bin", {}), ("tester/bin", {"read_bin": True})
):
    try:
        print(float(load_pipeline(repository, **options).unet.conv_in.weight.sum()))
    except OSError as error:
        print(error)
"""


@pytest.mark.integration
def test_the_same_holds_on_the_hub(tmp_path):
    pipe = stock_pipeline()
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    pipe.save_pretrained(tmp_path / "bin", safe_serialization=False)
    upload = "from huggingface_hub import HfApi\n" + "".join(
        f"HfApi().create_repo('tester/{name}')\n"
        f"HfApi().upload_folder(repo_id='tester/{name}', folder_path={str(tmp_path / name)!r})\n"
        for name in ("fp16", "bin")
    )
    with LocalHub() as hub:
        environment = {**hub.client(tmp_path / "home", "hf_abc"), "PYTHONPATH": str(ROOT)}
        fork_server.run(["-c", upload], env=environment, check=True, capture_output=True)
        done = fork_server.run(
            ["-c", ON_THE_HUB], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    value = str(float(pipe.unet.conv_in.weight.sum()))
    fp16, first, pickled, second = done.stdout.splitlines()
    assert (first, second) == (value, value)
    assert "unet/diffusion_pytorch_model.fp16.safetensors; " in fp16 and 'with variant="fp16"' in fp16
    assert (
        "unet/diffusion_pytorch_model.bin; " in pickled and "use_safetensors=False (ddpm-hf --allow_pickle)" in pickled
    )


# ---- a network alone -----------------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path) -> Path:
    """checkpoint-500 of diffusers' training script, whose averaged weights are 1 more than the others."""
    network = stock_pipeline().unet
    network.save_pretrained(tmp_path / "run" / "checkpoint-500" / "unet")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    network.save_pretrained(tmp_path / "run" / "checkpoint-500" / "unet_ema")
    change(tmp_path / "run" / "checkpoint-500" / "unet_ema" / "config.json", decay=0.9999, optimization_step=500)
    return tmp_path / "run" / "checkpoint-500"


@pytest.mark.parametrize("part", ["", "unet_ema", "unet"])
def test_a_network_without_a_scheduler_is_refused_with_the_remedy(training, tmp_path, part):
    named = training / (part or "unet_ema")
    how = f"DDPMPaperPipeline(UNet2DModel.from_pretrained({str(named)!r}), DDPMScheduler(…))"
    expected = f"has no model_index.json; {named} is a network without a scheduler"
    for load in (DDPMPaperPipeline.from_pretrained, load_pipeline, lambda path: load_model(str(path), None)):
        with pytest.raises(OSError) as info:
            load(training / part)
        assert expected in str(info.value) and how in str(info.value)
    assert expected in refusal("sample", training / part)
    assert expected in refusal("convert", training / part, tmp_path / "new")
    assert DDPMPaperPipeline(UNet2DModel.from_pretrained(named), DDPMScheduler()).sample_shape == (3, 8, 8)


@pytest.mark.parametrize(("part", "offset"), [("", 1), ("unet_ema", 1), ("unet", 0)])
def test_beside_the_finished_model_it_is_taken_with_its_process(training, tmp_path, capsys, part, offset):
    finished = stock_pipeline()
    finished.scheduler = DDPMScheduler(7, prediction_type="v_prediction")
    finished.save_pretrained(training.parent)
    for pipe in (load_pipeline(training / part), load_model(str(training / part), None)[0]):
        config = pipe.scheduler.config
        assert (config["num_train_timesteps"], config["prediction_type"]) == (7, "v_prediction")
        expected = finished.unet.conv_in.weight + offset
        assert torch.equal(pipe.unet.conv_in.weight, expected)
    main(["convert", str(training / part), str(tmp_path / "new")])
    ignored = "unknown here and without effect: decay, optimization_step\n"
    assert capsys.readouterr().out.endswith(ignored) == bool(offset)
    assert torch.equal(DDPMPaperPipeline.from_pretrained(tmp_path / "new").unet.conv_in.weight, expected)


def test_beside_the_finished_model_another_variant_is_named(training, tmp_path):
    DDPMPipeline(UNet2DModel.from_pretrained(training / "unet"), DDPMScheduler(20)).save_pretrained(tmp_path / "run")
    network = UNet2DModel.from_pretrained(training / "unet")
    (training / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(training / "unet", variant="fp16")
    with pytest.raises(OSError, match=r"is read with variant=\"fp16\" \(ddpm-hf --variant fp16\)"):
        load_pipeline(training / "unet")
    assert load_pipeline(training / "unet", variant="fp16").unet.config["sample_size"] == 8


def test_ours_alone_is_taken_with_the_process_above_it(tmp_path):
    pipe = our_pipeline()
    pipe.save_pretrained(tmp_path)
    assert equal(load_pipeline(tmp_path / "unet").unet, pipe.unet)
    assert load_pipeline(tmp_path / "unet").scheduler.config["num_train_timesteps"] == 10


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sized(tmp_path) -> Callable[..., Path]:
    def make(remove: tuple[str, ...] = (), **values: Any) -> Path:
        stock_pipeline().save_pretrained(tmp_path / "sized")
        change(tmp_path / "sized" / "unet" / "config.json", remove, **values)
        return tmp_path / "sized"

    return make


NO_SIZE = "the network states no sample_size: pipe.unet.register_to_config(sample_size=…)"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"sample_size": None}, NO_SIZE),
        ({"remove": ("sample_size",)}, NO_SIZE),
        ({"sample_size": 15}, "a size of 15 must be a multiple of 2"),
        ({"sample_size": [8, 9]}, r"a size of [8, 9] must be a multiple of 2"),
        ({"sample_size": "16"}, "a size of '16' must be a multiple of 2, as one integer or as (height, width)"),
        ({"sample_size": 0}, "a size of 0 must be a multiple of 2"),
        ({"sample_size": 8.0}, "a size of 8.0 must be"),
        ({"sample_size": True}, "a size of True must be"),
        ({"sample_size": [8, 8, 8]}, "a size of [8, 8, 8] must be"),
    ],
    ids=str,
)
def test_a_size_that_is_none_is_refused_with_the_remedy(sized, tmp_path, edit, message):
    folder = sized(**edit)
    pipe = DDPMPaperPipeline.from_pretrained(folder)
    for output_type in ("pil", "np"):
        with pytest.raises(ValueError) as info:
            pipe(seeds=[0], output_type=output_type)
        assert message in str(info.value)
    assert message in refusal("sample", folder, "-o", tmp_path / "x.png")
    assert "sample_size" in refusal("convert", folder, tmp_path / "new")
    pipe.unet.register_to_config(sample_size=8)
    assert pipe(seeds=[0], output_type="np", num_inference_steps=2).images.shape == (1, 8, 8, 3)


def test_without_a_size_that_of_the_latents_is_drawn(sized):
    pipe = DDPMPaperPipeline.from_pretrained(sized(sample_size=None))
    latents = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    images = pipe(latents=latents, num_inference_steps=2, output_type="np", seeds=[0, 1]).images
    assert images.shape == (2, 8, 12, 3)
    pipe.unet.register_to_config(sample_size=(8, 12))
    again = pipe(latents=latents, num_inference_steps=2, output_type="np", seeds=[0, 1]).images
    assert (images == again).all()
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match=r"a size of .*8, 9.* must be a multiple of 2"):
        pipe(latents=torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="latents have shape"):
        pipe(latents=torch.zeros(1, 4, 8, 8))


def test_the_command_gives_a_size_to_a_network_without_one(sized, tmp_path):
    folder = sized(sample_size=None)
    assert "ddpm-hf convert --sample_size 32" in refusal("convert", folder, tmp_path / "new")
    main(["convert", str(folder), str(tmp_path / "new"), "--sample_size", "16"])
    config = DDPMPaperPipeline.from_pretrained(tmp_path / "new").unet.config
    assert (config["sample_size"], config["attention_resolutions"]) == (16, [8])
    change(folder / "unet" / "config.json", sample_size=8)
    assert "this one has sample_size=8" in refusal("convert", folder, tmp_path / "other", "--sample_size", "16")


# ---- schedulers of diffusers before 0.9 ----------------------------------------------------------------------------


def old_scheduler(folder: Path, predict_epsilon: Any, **values: Any) -> Path:
    stock_pipeline().save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    change(file, ("prediction_type",), _diffusers_version="0.8.0", predict_epsilon=predict_epsilon, **values)
    return folder


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(("old", "new"), [(False, "sample"), (True, "epsilon")])
@pytest.mark.parametrize("stated", [False, True])
def test_predict_epsilon_becomes_the_prediction_type(tmp_path, old, new, stated, kind):
    folder = old_scheduler(tmp_path / "old", old, **({"prediction_type": new} if stated else {}))
    change(folder / "model_index.json", scheduler=["diffusers", kind])
    change(folder / "scheduler" / "scheduler_config.json", ("variance_type",), _class_name=kind)
    pipe = DDPMPaperPipeline.from_pretrained(folder)
    assert type(pipe.scheduler).__name__ == kind
    for scheduler in (pipe.scheduler, DDPMPaperScheduler.from_pretrained(folder, subfolder="scheduler")):
        assert scheduler.config.prediction_type == new and "predict_epsilon" not in scheduler.config
        assert DDIMScheduler.from_config(scheduler.config).config.prediction_type == new
    assert DDPMPaperScheduler.from_config({"predict_epsilon": old}).config.prediction_type == new
    direct = DDPMPaperPipeline(pipe.unet, DDIMScheduler.from_config({"predict_epsilon": old}))
    assert direct.scheduler.config.prediction_type == new
    pipe.save_pretrained(tmp_path / "new")
    assert DDPMPaperPipeline.from_pretrained(tmp_path / "new").scheduler.config.prediction_type == new


def test_it_draws_what_the_same_network_draws_of_samples(tmp_path):
    pipe = DDPMPaperPipeline.from_pretrained(old_scheduler(tmp_path, False))
    x = [torch.from_numpy(pipe(seeds=[0], output_type="np").images)]
    for prediction_type in ("sample", "epsilon"):
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
        x.append(torch.from_numpy(pipe(seeds=[0], output_type="np").images))
    assert torch.equal(x[0], x[1]) and not torch.allclose(x[0], x[2])


@pytest.mark.parametrize(
    ("old", "stated"),
    [(False, "epsilon"), (True, "sample"), (True, "v_prediction"), (False, "v_prediction"), ("false", "epsilon")],
)
def test_a_contradiction_is_refused_with_both_keys(tmp_path, old, stated):
    folder = old_scheduler(tmp_path / "old", old, prediction_type=stated)
    for load in (
        lambda: DDPMPaperPipeline.from_pretrained(folder),
        lambda: DDPMPaperScheduler.from_pretrained(folder, subfolder="scheduler"),
        lambda: pipeline_from_stock(DDPMPipeline.from_pretrained(folder)),
    ):
        with pytest.raises(ValueError) as info:
            load()
        assert f"predict_epsilon={old!r}" in str(info.value) and f"prediction_type={stated!r}" in str(info.value)
    assert "contradict each other" in refusal("convert", folder, tmp_path / "new")


def test_what_is_neither_true_nor_false_is_refused(tmp_path):
    with pytest.raises(ValueError, match="predict_epsilon=None .* contradict each other"):
        DDPMPaperPipeline.from_pretrained(old_scheduler(tmp_path, None))


def test_convert_writes_the_meaning_and_names_unknown_keys(tmp_path, capsys):
    folder = old_scheduler(tmp_path / "old", False, set_alpha_to_one=True, tensor_format="pt", zebra=3)
    change(folder / "unet" / "config.json", yak=1)
    main(["convert", str(folder), str(tmp_path / "new")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("; of its configurations, unknown here and without effect: tensor_format, zebra, yak")
    config = json.loads((tmp_path / "new" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "sample" and "predict_epsilon" not in config


# ---- networks that ours is not -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scheduler", "message"),
    [
        ({"class_embed_type": "timestep"}, {}, "class_embed_type='timestep'"),
        ({"class_embed_type": "identity"}, {}, "class_embed_type='identity'"),
        ({"time_embedding_type": "fourier"}, {}, "time_embedding_type='fourier'"),
        ({"resnet_time_scale_shift": "scale_shift"}, {}, "resnet_time_scale_shift='scale_shift'"),
        ({"attention_head_dim": 8}, {}, "attention_head_dim=8"),
        ({"out_channels": 6}, {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"out_channels": 6}, {"variance_type": "learned"}, "variance_type='learned'"),
        ({"out_channels": 6}, {}, "6 channels for 3"),
        ({"out_channels": 4}, {}, "4 channels for 3"),
    ],
    ids=str,
)
def test_convert_names_what_ours_has_not(tmp_path, config, scheduler, message):
    pipe = stock_pipeline(**config)
    pipe.scheduler = DDPMScheduler(10, **scheduler)
    pipe.save_pretrained(tmp_path / "old")
    assert message in refusal("convert", tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"num_class_embeds": 3}, "this network needs class_labels"),
        ({"out_channels": 6}, "DDPMScheduler needs 3 channels, and the network puts out 6"),
    ],
    ids=str,
)
def test_sampling_names_what_it_cannot_use(tmp_path, config, message):
    pipe = DDPMPaperPipeline(stock_pipeline(**config).unet, DDPMScheduler(10))
    with pytest.raises(ValueError, match=message):
        pipe(seeds=[0])


def test_stocks_learned_variances_still_run_as_they_are():
    pipe = DDPMPaperPipeline(stock_pipeline(out_channels=6).unet, DDPMScheduler(10, variance_type="learned_range"))
    assert pipe(seeds=[0], output_type="np").images.shape == (1, 8, 8, 3)


def test_another_pipeline_with_such_parts_is_refused(tmp_path):
    """Latent diffusion would draw its latents, and call them images."""
    stock_pipeline().save_pretrained(tmp_path)
    change(tmp_path / "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match=r"is no DDPM: vqvae \(VQModel\)"):
        load_pipeline(tmp_path)
    change(tmp_path / "model_index.json", vqvae=[None, None])
    assert load_pipeline(tmp_path).sample_shape == (3, 8, 8)


def test_shards_without_their_index_are_no_traceback(tmp_path):
    stock_pipeline().save_pretrained(tmp_path / "a", max_shard_size="20KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    next((tmp_path / "a" / "unet").glob("*-00002-of-*")).unlink()
    assert "-00002-of-" in refusal("sample", tmp_path / "a")
    (tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "diffusion_pytorch_model.safetensors" in refusal("sample", tmp_path / "b")
