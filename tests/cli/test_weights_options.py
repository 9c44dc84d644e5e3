"""--variant and --allow_pickle: every command that loads a checkpoint has them."""

import pytest
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_hf.cli import main
from ddpm_hf.demo import load


@pytest.fixture
def folder(tmp_path) -> str:
    """A small checkpoint of stock's, whose weights are a pickle of a variant, for images like the digits."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler(10))
    pipe.save_pretrained(tmp_path / "checkpoint", variant="fp16", safe_serialization=False)
    return str(tmp_path / "checkpoint")


EVALUATING = "--dataset digits --num_images 2 --work_dir work --cpu_threads 1"
COMMANDS = {
    "x.png": "sample {} -o x.png",
    "x.npy": "sample {} -o x.npy",
    "ours": "convert {} ours",
    "evaluation.json": f"evaluate {{}} {EVALUATING} -o evaluation.json",
    "short": f"shorten {{}} short {EVALUATING}",
    "drawn.png": "draw progressive {} --seeds 0 -o drawn.png",
}


@pytest.mark.parametrize("made", COMMANDS)
def test_each_names_the_file_and_then_works(folder, made, tmp_path, monkeypatch, own_process):
    monkeypatch.chdir(tmp_path)
    words = COMMANDS[made].format(folder).split()
    with pytest.raises(SystemExit, match=r"diffusion_pytorch_model.fp16.bin is read with variant=.*--allow_pickle"):
        main(words)
    AcceleratorState._reset_state(True)
    main([*words, "--variant", "fp16", "--allow_pickle"])
    assert (tmp_path / made).exists()


def test_they_are_not_of_single_files(tmp_path):
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(
        SystemExit, match="model.ckpt: --variant, --allow_pickle and --trust_remote_code are for folde"
    ):
        main(["convert", str(tmp_path / "model.ckpt"), str(tmp_path / "out"), "--variant", "fp16"])


def test_an_evaluation_is_in_float32_whatever_accelerate_is_told(folder, tmp_path, monkeypatch, own_process):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.chdir(tmp_path)
    main(f"evaluate {folder} {EVALUATING} -o evaluation.json --variant fp16 --allow_pickle".split())
    assert (tmp_path / "evaluation.json").exists()


def test_so_does_the_demo(folder):
    with pytest.raises(OSError, match="is read with variant"):
        load([folder], "cpu")
    (model,) = load([folder], "cpu", variant="fp16", read_bin=True).values()
    assert model.pipe.sample_shape == (1, 8, 8)
