"""Data, batches and conversions refuse what cannot be read or expressed, and name it."""

# pyright: reportArgumentType=false
# (wrong arguments are what this file is about)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from bad_input import HALVED, INF, NAN, POINTS, TINY, VARIANCES, Case, cases, files_in, refused, tiny, with_keywords
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.convert import (
    from_stock,
    from_tf_checkpoint,
    from_tf_variables,
    pipeline_from_stock,
    pipeline_from_tf_checkpoint,
    pipeline_to_stock,
    to_stock,
)
from ddpm_hf.convert.tensor_bundle import TensorBundle
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.runs import KeyedBatches, share_of

TF_CHECKPOINT = Path(__file__).parents[1] / "golden" / "tf_checkpoint"

pytestmark = pytest.mark.usefixtures("place")


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(place) -> Path:
    """The working folder with `photos`, of which two are of different sizes, and other things that hold no images."""
    for name, size in (("0.png", (4, 4)), ("1.png", (5, 4))):
        (place / "photos").mkdir(exist_ok=True)
        Image.new("RGB", size).save(place / "photos" / name)
    for name in ("empty", "numbers", "script", "texts"):
        (place / name).mkdir()
    (place / "numbers" / "a.csv").write_text("x,y\n1,2\n")
    (place / "texts" / "a.txt").write_text("no image")
    (place / "script" / "script.py").write_text("open('canary', 'w')")
    (place / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    table = datasets.Dataset.from_dict({"bytes": [b"x"], "text": ["a"]})
    datasets.disable_progress_bars()
    table.to_parquet(place / "table.parquet")
    return place


PHOTOS = {"train_data_dir": "photos"}
DATA: list[tuple[Any, ...]] = [
    ({}, "dataset_name=None and train_data_dir=None; pass exactly one of the two"),
    ({"dataset_name": "digits", **PHOTOS}, "dataset_name='digits' and train_data_dir='photos'; pass exactly one"),
    *(
        ({name: x}, f"{name}={x!r}: pass a folder's path")
        for name in ("dataset_name", "train_data_dir")
        for x in ("", 3)
    ),
    ({"dataset_name": ["digits"]}, "dataset_name=['digits']: pass a folder's path"),
    *(
        ({**PHOTOS, name: x}, f"{name}={x!r}: must be an integer, 0 or more")
        for name in ("skip_bad_images", "num_workers", "max_memory_bytes")
        for x in (-1, "1", None, 1.5, True)
    ),
    *(
        ({**PHOTOS, "resolution": x}, f"resolution={x!r}: must be an integer, 1 to 7071 pixels, or None")
        for x in (0, -4, "64", 1.5, True, 10**6)
    ),
    *(
        ({**PHOTOS, "background": x}, f"background={x!r}: pass a colour name such as 'white', or '#rrggbb'")
        for x in (None, 255, "", "whitish", "rgb(1,2)", "#ffffff80")
    ),
    (PHOTOS, "photos/0.png is 4 x 4, photos/1.png is 5 x 4; pass resolution to make them equal"),
    ({**PHOTOS, "split": "test"}, "split='test': the folder photos has no splits"),
    ({**PHOTOS, "image_column": "x"}, "image_column='x': means nothing for 'photos'; leave it out"),
    ({**PHOTOS, "dataset_config": "x"}, "dataset_config='x': means nothing for 'photos'; leave it out"),
    ({"train_data_dir": "empty"}, "train_data_dir='empty': the folder is empty; put images into it"),
    ({"train_data_dir": "texts"}, "no image among its files (1 x .txt); allowed are", ".jpeg"),
    ({"dataset_name": "digits", "split": None}, "split=None: digits has 'train' and 'test'"),
    ({"dataset_name": "digits", "resolution": 8}, "resolution=8: means nothing for 'digits'; leave it out"),
    ({"dataset_name": "photos", "split": "test"}, "dataset_name='photos' with split='test'", "['train']"),
    ({"dataset_name": "photos", "split": "train["}, "dataset_name='photos' with split='train['"),
    ({"dataset_name": "photos", "dataset_config": "x"}, "dataset_name='photos'", "dataset_config='x'", "['default']"),
    ({"dataset_name": "photos", "image_column": "x"}, "image_column='x': not a column of images", "'image' (Image)"),
    ({"dataset_name": "photos/0.png"}, "dataset_name='photos/0.png': neither a folder nor a .parquet, .npy, .npz"),
    ({"dataset_name": "empty"}, "dataset_name='empty': found, but it holds no data files"),
    ({"dataset_name": "json"}, "dataset_name='json' with split='train', dataset_config=None cannot be loaded"),
    ({"dataset_name": "numbers"}, "numbers: no column of images; its columns are 'x' (Value), 'y' (Value)"),
    ({"dataset_name": "script"}, "dataset_name='script'", "scripts are no longer supported"),
    ({"dataset_name": "damaged.parquet"}, "dataset_name='damaged.parquet'", "cannot be loaded: Parquet magic bytes"),
    ({"dataset_name": "table.parquet"}, "no column of images; its columns are 'bytes' (Value), 'text' (Value)"),
    ({"dataset_name": "table.parquet", "image_column": "text"}, "image_column='text': not a column of images"),
    (
        {"dataset_name": "table.parquet", "split": "test"},
        "dataset_name='table.parquet' with split='test'",
        "['train']",
    ),
    ({"dataset_name": "table.parquet", "dataset_config": "x"}, "dataset_config='x': means nothing"),
]
MISSING: list[tuple[Any, ...]] = [
    ({"train_data_dir": "nowhere"}, "train_data_dir='nowhere': no such folder; check the path"),
    ({"train_data_dir": "photos/0.png"}, "train_data_dir='photos/0.png': is a file; pass the folder"),
    ({"train_data_dir": "a\0b"}, "train_data_dir='a\\x00b': no such folder"),
    ({"dataset_name": "nowhere"}, "not built in (digits, swiss_roll, moons, fashion_mnist), no folder"),
    ({"dataset_name": "Digits"}, "dataset_name='Digits': not built in (digits, swiss_roll, moons, fashion_mnist)"),
    ({"dataset_name": "nobody/nothing"}, "dataset_name='nobody/nothing'", "from the Hub: "),
]


@pytest.mark.parametrize(
    "case",
    cases(
        with_keywords(load_samples, DATA)
        + [case._replace(error=OSError) for case in with_keywords(load_samples, MISSING)]
    ),
)
def test_data(folder, case):
    before = files_in(folder)
    message = refused(case)
    assert "\n" not in message and files_in(folder) == before


BATCHES = [
    *(
        Case(
            f"indices={x}",
            lambda x=x: load_samples("moons").batch(x),
            ("indices: got", "list of one or more integers"),
        )
        for x in (None, 3, "a", [0.5], [True], [[1]], [], [None], [2**70])
    ),
    *(
        Case(
            f"index={x}",
            lambda x=x: load_samples("moons").batch([x]),
            (f"got {x}..{x}; moons has 0..9999",),
            IndexError,
        )
        for x in (-1, 10_000)
    ),
    *(
        Case(
            f"flip={x}",
            lambda x=x: load_samples("digits").batch([0], flip=x),
            ("flip: got", "pass bool of shape (1,)"),
        )
        for x in (3, "a", [1], [True, False], [None])
    ),
    Case("flip-points", lambda: load_samples("moons").batch([0], flip=[True]), ("flip: moons holds points",)),
    *(
        Case(
            f"levels={x}",
            lambda x=x: to_model_range(torch.zeros(2, dtype=torch.uint8), x),
            (f"num_levels={x!r}: must be an integer, 2 or more",),
        )
        for x in (1, 0, "256", 2.5, True)
    ),
    Case("scaled", lambda: to_model_range(torch.zeros(2), 256), ("got torch.float32; pass integer levels 0..255",)),
    Case(
        "batch-size",
        lambda: KeyedBatches(
            load_samples("moons"), seed=0, global_batch_size=10_001, num_timesteps=1, random_flip=False
        ),
        ("moons has 10000 samples, fewer than global_batch_size=10001; lower",),
    ),
    Case("shares", lambda: share_of(10, 2, 0, 0, 2), ("global_batch_size=10", "2 processes", "a multiple of 4")),
]


@pytest.mark.parametrize("case", cases(BATCHES))
def test_batches(case):
    refused(case)


# ---- conversion ----------------------------------------------------------------------------------------------------

UNET = tiny()
BUNDLE = TensorBundle(TF_CHECKPOINT / "model.ckpt-790000")
_AVERAGED = "/ExponentialMovingAverage"
VARIABLES = {name.removesuffix(_AVERAGED): BUNDLE.read(name) for name in BUNDLE.entries if name.endswith(_AVERAGED)}
Q, CONV = "model/mid/attn_1/q/W", "model/conv_in/W"


def changed(name: str, value: Any) -> Callable[[], Any]:
    return lambda: from_tf_variables({**VARIABLES, name: value})


def without(name: str, **renamed: str) -> Callable[[], Any]:
    rest = {key: value for key, value in VARIABLES.items() if key != name}
    return lambda: from_tf_variables({**rest, **{new: VARIABLES[name] for new in renamed.values()}})


VARIABLE_CASES = [
    Case("none", lambda: from_tf_variables({}), ("the variables lack conv_in/W",)),
    Case("other", lambda: from_tf_variables({"x/W": np.zeros(3)}), ("'x/W' is not a variable of the paper's UNet",)),
    Case("missing-first", without(CONV), ("the variables lack conv_in/W",)),
    Case("missing", without(Q), ("missing ['mid_block.attentions.0.to_q.weight']",)),
    Case("renamed", without(Q, new="model/mid/attn_1/Q/W"), ("'mid/attn_1/Q' is not a layer of the paper's UNet",)),
    Case("renamed-end", without(Q, new="model/mid/attn_1/q/V"), ("'model/mid/attn_1/q/V' is not a variable",)),
    Case("misshapen", changed(Q, np.zeros((32, 31))), ("to_q.weight (31, 32) instead of (32, 32)",)),
    Case("misshapen-first", changed(CONV, np.zeros((3, 3, 3, 31))), ("conv_in.weight (31, 3, 3, 3) instead of (32,",)),
    Case("flat-first", changed(CONV, np.zeros(3)), ("misshapen", "four dimensions")),
    Case("scalar", changed(CONV, 1.0), ("misshapen", "four dimensions")),
    Case("text", changed(Q, np.array("abc")), (f"{Q!r} is not finite, or of no numbers at all",)),
    Case("nothing", changed(Q, None), (f"{Q!r} is not finite, or of no numbers at all (object)",)),
    Case("nan", changed(Q, np.full((32, 32), NAN)), (f"{Q!r} is not finite",)),
    Case("inf", changed(Q, np.full((32, 32), INF)), (f"{Q!r} is not finite",)),
    Case("extra", changed("model/mid/block_7/conv1/W", np.zeros((3, 3, 32, 32))), ("unexpected ['mid_block.",)),
    Case(
        "twice", lambda: from_tf_variables({**VARIABLES, f"copy/{CONV}": VARIABLES[CONV]}), ("several of conv_in/W",)
    ),
    *(
        Case(f"size={x!r}", lambda x=x: from_tf_variables(VARIABLES, sample_size=x), (f"sample_size={x!r}",))
        for x in (0, -1, 7, "8", 1.5)
    ),
    Case(
        "missing-checkpoint", lambda: from_tf_checkpoint("nowhere"), ("no TensorFlow checkpoint at nowhere",), OSError
    ),
    Case(
        "learned",
        lambda: pipeline_from_tf_checkpoint(TF_CHECKPOINT, variance_type="learned"),
        ("variance_type='learned' does not fit", "3 channels in and 3 out"),
    ),
    Case(
        "variance",
        lambda: pipeline_from_tf_checkpoint(TF_CHECKPOINT, variance_type="x"),
        ("variance_type='x' is not supported", VARIANCES),
    ),
]


@pytest.mark.parametrize("case", cases(VARIABLE_CASES))
def test_conversion_of_variables(case):
    refused(case)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "nothing"), (b'model_checkpoint_path: "../../x"', "../../x"), (b"\xff\xfe", "nothing")],
)
def test_a_file_that_names_no_checkpoint(place, content, found):
    (place / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match="give the prefix itself") as info:
        from_tf_checkpoint(place)
    assert f"{place / 'checkpoint'} names {found!r}" in str(info.value)


STOCK = {
    **{key: value for key, value in TINY.items() if key != "sample_size"},
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}


def stock(**config: Any) -> UNet2DModel:
    return UNet2DModel(**{**STOCK, **config})


def with_nan(network: Any) -> Any:
    with torch.no_grad():
        network.conv_out.bias[0] = NAN
    return network


CANNOT = "which the paper's UNet cannot express; it needs "
STOCK_TABLE = [
    ({"center_input_sample": True}, f"center_input_sample=True, {CANNOT}False"),
    ({"time_embedding_type": "fourier"}, f"time_embedding_type='fourier', {CANNOT}'positional'"),
    ({"freq_shift": 0}, f"freq_shift=0, {CANNOT}1"),
    ({"flip_sin_to_cos": True}, f"flip_sin_to_cos=True, {CANNOT}False"),
    ({"downsample_padding": 1}, f"downsample_padding=1, {CANNOT}0"),
    ({"downsample_type": "resnet"}, f"downsample_type='resnet', {CANNOT}'conv'"),
    ({"upsample_type": "resnet"}, f"upsample_type='resnet', {CANNOT}'conv'"),
    ({"act_fn": "relu"}, f"act_fn='relu', {CANNOT}'silu'"),
    ({"norm_eps": 1e-5}, f"norm_eps=1e-05, {CANNOT}1e-06"),
    ({"attention_head_dim": 4}, f"attention_head_dim=4, {CANNOT}one head"),
    ({"resnet_time_scale_shift": "scale_shift"}, f"resnet_time_scale_shift='scale_shift', {CANNOT}'default'"),
    ({"add_attention": False}, f"add_attention=False, {CANNOT}True"),
    ({"class_embed_type": "timestep"}, f"class_embed_type='timestep', {CANNOT}None"),
    ({"sample_size": None}, f"sample_size=None, {CANNOT}a side or (height, width)"),
    ({"out_channels": 5}, "out_channels=5 must be in_channels=3, or twice that"),
    ({"sample_size": 7}, "sample_size=7", HALVED),
    ({"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D")}, "ResnetDownsampleBlock2D", CANNOT),
    ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types=", "attention on the same levels"),
]


def ours(**scheduler: Any) -> DDPMPaperPipeline:
    return DDPMPaperPipeline(UNET, DDPMPaperScheduler(**scheduler))


STOCK_CASES = [
    *with_keywords(lambda **config: from_stock(stock(**config)), STOCK_TABLE),
    Case("from-linear", lambda: from_stock(torch.nn.Linear(1, 1)), ("unet is a Linear; a UNet2DModel",)),  # type: ignore[arg-type]
    Case("to-mlp", lambda: to_stock(POINTS), ("unet is a DDPMPaperMLP; a DDPMPaperUNet",)),  # type: ignore[arg-type]
    Case("from-nan", lambda: from_stock(with_nan(stock())), ("UNet2DModel are not finite: conv_out.bias",)),
    Case("to-nan", lambda: to_stock(with_nan(tiny())), ("DDPMPaperUNet are not finite: conv_out.bias",)),
    Case("from-ours", lambda: pipeline_from_stock(ours()), ("DDPMPaperUNet", "stock's UNet2DModel")),
    Case("to-learned", lambda: pipeline_to_stock(ours(variance_type="learned")), ("no variance_type", "'learned'")),
    Case(
        "to-mean",
        lambda: pipeline_to_stock(ours(prediction_type="previous_sample")),
        ("no prediction_type", "'previous_sample'"),
    ),
    Case(
        "to-chain", lambda: pipeline_to_stock(ours(inference_timesteps=[0, 5])), ("cannot keep inference_timesteps",)
    ),
    Case(
        "to-points",
        lambda: pipeline_to_stock(DDPMPaperPipeline(POINTS, DDPMPaperScheduler(num_train_timesteps=3, beta_end=0.5))),
        ("DDPMPaperMLP", "a DDPMPaperUNet and a DDPMPaperScheduler can be converted"),
    ),
    *(
        Case(
            f"from-{key}={value}",
            lambda key=key, value=value: pipeline_from_stock(DDPMPipeline(stock(), DDPMScheduler(**{key: value}))),  # type: ignore[arg-type]
            (f"{key}='{value}'",),
        )
        for key, value in (
            ("variance_type", "learned"),
            ("variance_type", "fixed_large_log"),
            ("variance_type", "learned_range"),
            ("beta_schedule", "laplace"),
        )
    ),
]


@pytest.mark.parametrize("case", cases(STOCK_CASES))
def test_conversion_from_and_to_stock(case):
    refused(case)
