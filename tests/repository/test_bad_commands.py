"""The commands of ddpm-hf end with one line for bad input, and nothing is written."""

# pyright: reportArgumentType=false
# (wrong arguments are what this file is about)

import json
import logging
import shutil
from pathlib import Path

import pytest
from bad_input import POINTS, SCHEDULES, Case, cases, files_in, tiny

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.cli import main

pytestmark = pytest.mark.usefixtures("place")


# ---- the command ddpm-hf -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Checkpoints for images and for points, and some that lack something."""
    folder = tmp_path_factory.mktemp("checkpoints")
    scheduler = DDPMPaperScheduler(num_train_timesteps=4, beta_end=0.5)
    DDPMPaperPipeline(tiny(in_channels=1, out_channels=1), scheduler).save_pretrained(folder / "im")
    DDPMPaperPipeline(POINTS, scheduler).save_pretrained(folder / "pt")
    (folder / "empty").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "file").write_text("in the way")
    for name in ("no_weights", "no_unet", "cut", "json", "index", "process"):
        shutil.copytree(folder / "im", folder / name)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (folder / "no_weights" / weights).unlink()
    shutil.rmtree(folder / "no_unet" / "unet")
    (folder / "cut" / weights).write_bytes((folder / "im" / weights).read_bytes()[:5000])
    (folder / "json" / "unet" / "config.json").write_text("{")
    (folder / "index" / "model_index.json").write_text("[]")
    (folder / "process" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "cosine"}))
    return folder


LOADING = [
    ("empty", "model_index.json", "empty"),
    ("no_weights", "no_weights/unet"),
    ("no_unet", "config.json", "no_unet"),
    ("cut", "cut/unet/diffusion_pytorch_model.safetensors"),
    ("json", "json/unet/config.json", "not a valid JSON"),
    ("index", "index/model_index.json"),
    ("process", "beta_schedule='cosine' is not supported", SCHEDULES),
    ("nobody/nothing", "nobody/nothing"),
    ("a/b/c", "there is no folder a/b/c in"),
    ("cut/process", "there is no folder cut/process in"),
    ("ptt", "there is no folder ptt in", "did you mean pt?"),
    ("file", "file is a file; give the folder of a checkpoint"),
]
COMMANDS = [
    *((f"sample {name}", *words) for name, *words in LOADING),
    *((f"sample im --steps {n}", f"num_inference_steps={n} must be an integer in [1, 4]") for n in (0, -1, 5)),
    ("sample im --steps 0 --scheduler ddim", "num_inference_steps=0 must be an integer in [1, 4]"),
    ("sample im --steps 5 --scheduler heun", "num_inference_steps=5 must be an integer in [1, 4]"),
    *((f"sample im --batch_size {n}", f"--batch_size {n} must be at least 1") for n in (0, -1)),
    *((f"sample im -o {name}", f"--output {name}: give a .png, a .npy") for name in ("x.jpg", "im/model_index.json")),
    ("sample im --output=", "--output '': give a .png, a .npy"),
    ("sample im -o file/x.png", "file/x.png cannot be made: file is a file"),
    ("sample im -o file", "file cannot be made: file is a file"),
    ("sample im -o folder.png", "--output folder.png is a folder; give the name of a file"),
    ("sample pt -o folder", "--output folder: give a .png, a .npy"),
    ("convert im im", "im exists; give a new or an empty folder"),
    ("convert im file", "file exists; give a new or an empty folder"),
    ("convert im file/new --to stock", "file/new cannot be made: file is a file"),
    ("convert empty new", "model_index.json", "empty"),
    ("convert im new", "DDPMPaperUNet", "stock's UNet2DModel and DDPMScheduler can be converted"),
    ("convert pt new --to stock", "DDPMPaperMLP", "a DDPMPaperUNet and a DDPMPaperScheduler can be converted"),
    ("convert im new --raw", "--raw, --sample_size and --variance_type are for TensorFlow checkpoints", "im.index"),
    ("convert im new --sample_size 8", "--sample_size", "for TensorFlow checkpoints"),
    ("evaluate im", "dataset is missing"),
    ("evaluate empty --dataset digits", "empty holds no model"),
    ("evaluate im --dataset moons", "samples of shape (1, 8, 8) are needed, moons has (2,)"),
    ("evaluate pt --dataset digits", "samples of shape (2,) are needed, digits has (1, 8, 8)"),
    ("evaluate pt --dataset moons --metrics fid", "fid is for images, and the model draws points (2,)"),
    ("evaluate im --dataset nowhere", "dataset_name='nowhere': not built in"),
    ("evaluate im --dataset empty", "'empty'", "the folder is empty"),
    ("evaluate im --dataset digits --split dev", "split='dev': digits has 'train' and 'test'"),
    ("evaluate im --dataset digits --num_images 0", "num_images=0 must be at least 1"),
    ("evaluate im --dataset digits --steps 0", "num_inference_steps=0 must be at least 1"),
    ("evaluate im --dataset digits --skip_bad_images -1", "skip_bad_images=-1: must be an integer, 0 or more"),
    ("evaluate im --dataset digits --seed -1", "seed=-1 must lie in [0, 2**32)"),
    ("evaluate im --dataset digits --num_timesteps_subset 99", "num_timesteps_subset=99", "4 at most"),
    ("evaluate im --dataset digits --metrics fid --num_samples 1", "num_samples=1: fid needs at least 2"),
    ("evaluate im --dataset digits --metrics is --num_samples 100 --extractor x:y", "extractor 'x:y'", "PYTHONPATH"),
    ("evaluate im --dataset digits --metrics is --num_samples 100 --extractor os:system", "extractor 'os:system'"),
    ("evaluate im --dataset digits --cpu_threads 0", "cpu_threads=0 must be at least 1"),
    ("evaluate im --dataset digits --weights raw", "weights='raw'", "one kind of weights"),
    ("evaluate im --dataset digits -o file", "file is not a list of evaluation results"),
    ("evaluate im --dataset digits -o file/x.json", "file"),
    ("evaluate im --dataset digits --work_dir file", "file"),
    ("shorten im file --dataset digits", "file exists; give a new or an empty folder"),
    ("shorten im im --dataset digits", "im exists; give a new or an empty folder"),
    ("shorten im new --dataset moons", "samples of shape (1, 8, 8) are needed, moons has (2,)"),
    ("shorten im new --dataset digits --steps 0", "num_steps=0 must lie in [1, 4]"),
    ("shorten im new --dataset digits --steps 5", "num_steps=5 must lie in [1, 4]"),
    ("shorten im new --dataset digits --skip_bad_images -1", "skip_bad_images=-1: must be an integer, 0 or more"),
    ("shorten im new --dataset digits --num_images 0", "num_images=0 must be at least 1"),
    *((f"compress im digits -o new --steps {n}", f"--steps {n} must lie in [1, 4]") for n in (0, -3, 5)),
    *((f"compress im digits -o new --fit_images {n}", f"--fit_images {n} must be at least 1") for n in (0, -1)),
    *((f"compress im digits -o new --max_batch {n}", f"--max_batch {n} must lie in [1, 4096]") for n in (0, 5000)),
    ("compress im digits -o new --skip_bad_images -1", "--skip_bad_images -1 must be at least 0"),
    ("compress im digits --dry_run --fit_images 0", "--fit_images 0 must be at least 1"),
    ("compress im digits", "--output is missing: name the file to write", "--dry_run"),
    ("compress im digits -o file", "file exists; give another name, or remove it"),
    ("compress im digits -o folder.png", "--output folder.png is a folder; give the name of a file"),
    ("compress im digits -o file/new", "file/new cannot be made: file is a file"),
    ("compress im nowhere -o new", "there is no image or folder nowhere in ", ", nor a data set of that name: "),
    ("compress im nowhere/x.png -o new", "there is no image or folder nowhere/x.png in ", ", nor a data set"),
    ("compress im /nowhere/x -o new", "there is no image or folder /nowhere/x, nor a data set of that name: "),
    ("compress im file -o new", "1 bad image: file: no readable image", "skip_bad_images=0 allows no more: mend or"),
    ("compress im file -o new --skip_bad_images 1", "none of the images can be read: file: no readable image"),
    ("compress im digits -o new --split dev", "split='dev': digits has 'train' and 'test'"),
    ("compress im moons -o new", "moons holds points; the codec is for images"),
    ("compress pt digits -o new", "the codec is for images, and this is a model of points"),
    ("decompress im nowhere -o new", "there is no file nowhere in "),
    ("decompress im /nowhere/x -o new", "there is no file /nowhere/x; give one that ddpm-hf compress wrote"),
    ("decompress im empty -o new", "empty is a folder; give a file that ddpm-hf compress wrote"),
    ("decompress im file -o new", "this is no file of ddpm-hf compress"),
    ("decompress im file -o file", "file exists; give a new or an empty folder"),
    ("decompress im file -o im", "im exists; give a new or an empty folder"),
    ("decompress im file -o new --micro_batch 0", "--micro_batch 0 must be at least 1"),
    ("draw progressive im -o x.jpg", "--output x.jpg: give a .png or a .gif"),
    ("draw progressive pt", "draw progressive is for images; pt draws points"),
    ("draw points im", "draw points is for points; im draws images"),
    ("draw progressive im --steps 0", "num_inference_steps=0 must be an integer in [1, 4]"),
    ("draw shared im --seeds 1", "seeds=[]"),
    ("draw interpolate im --images 0 5000", "--images [0, 5000]: digits has 0 to 359"),
    ("draw interpolate im --images -1 0", "--images [-1, 0]: digits has 0 to 359"),
    ("draw interpolate im --timestep 99", "--timestep 99 must lie in [0, 4)"),
    ("draw interpolate im --timestep -1", "-1", "[0, 4)"),
    ("draw coarse_to_fine im --seed -1", "seeds must be integers in [0, 2**32), got -1"),
    ("draw nearest im --dataset nowhere", "dataset_name='nowhere': not built in"),
    ("draw rate_distortion im --num_images 0", "--num_images 0 must be at least 1"),
    ("draw nearest im --skip_bad_images -1", "skip_bad_images=-1: must be an integer, 0 or more"),
    ("draw points pt", "--dataset is missing"),
    ("draw points pt --dataset moons --seeds 0-10000", "--seeds: got 10001; moons has 10000 points"),
    ("reproduce table1 --checkpoint nowhere", "nowhere holds no model"),
    ("reproduce table1 --checkpoint json", "json/unet/config.json"),
    ("publish nowhere a/b", "nowhere holds no model"),
    ("publish empty a/b", "empty holds no model"),
    ("publish im x", "the repository is 'x'; give it as user/name"),
    ("publish im ../a", "the repository is '../a'; give it as user/name"),
    ("publish im a/b --revision ../x", "the revision is '../x'; give the name of a branch"),
]
COMMAND_CASES = [Case(line, main, tuple(words)) for line, *words in COMMANDS]


@pytest.mark.parametrize("case", cases(COMMAND_CASES))
def test_commands(checkpoints, case, monkeypatch, capsys, caplog):
    """Exit code 1 and one line, and nothing is written."""
    monkeypatch.chdir(checkpoints)
    before = files_in(checkpoints)
    with pytest.raises(SystemExit) as info, caplog.at_level(logging.ERROR):
        case.action(case.name.split())
    line = info.value.code
    assert isinstance(line, str) and line.startswith("ddpm-hf: ") and "\n" not in line
    assert all(word in line for word in case.words), line
    assert files_in(checkpoints) == before and not capsys.readouterr().out


UNREADABLE = [
    ("", "command"),
    ("sampel im", "invalid choice: 'sampel'", "'sample'"),
    ("sample", "checkpoint"),
    ("sample im --stpes 3", "unrecognized arguments: --stpes 3; did you mean --steps?"),
    ("sample im --seed=3 --outptu x.png", "--outptu", "did you mean --output?"),
    ("draw progressive im --sedes 3", "unrecognized arguments: --sedes 3; did you mean --seeds?"),
    ("sample im more", "unrecognized arguments: more"),
    *((f"sample im --steps={x}", "argument --steps: invalid int value", repr(x)) for x in ("ten", "1.5", "")),
    *((f"sample im --seeds={x}", f"{x!r} is neither a seed nor a range") for x in ("x", "-1", "1-", "5-2", "", "1e3")),
    *((f"sample im --seeds={x}", f"{x!r}: seeds lie in [0, 2**32), at most") for x in ("4294967296", "0-1000000")),
    ("sample im --device=abacus", "argument --device: 'abacus' cannot be used here"),
    ("sample im --device=meta", "argument --device: 'meta' cannot be used here"),
    ("sample im --dtype=int8", "argument --dtype: invalid choice: 'int8'", "float32"),
    ("sample im --scheduler=dimm", "argument --scheduler: invalid choice: 'dimm'", "'ddim'"),
    ("convert im new --to=ours", "invalid choice: 'ours'", "'paper', 'stock'"),
    ("convert im", "output"),
    ("evaluate im --metrics fdi", "invalid choice: 'fdi'", "'fid'"),
    ("evaluate im --weights=both", "invalid choice: 'both'", "'ema', 'raw'"),
    ("shorten im new", "the following arguments are required: --dataset"),
    ("draw progresive im", "invalid choice: 'progresive'", "'progressive'"),
    ("draw interpolate im --images 1", "argument --images: expected 2 arguments"),
    ("decompress im file", "the following arguments are required: -o/--output"),
    ("reproduce table9", "invalid choice: 'table9'", "'table1'"),
    ("publish im", "user/name"),
]


@pytest.mark.parametrize(("line", "expected"), [(line, expected) for line, *expected in UNREADABLE])
def test_unreadable_commands(place, capsys, line, expected):
    with pytest.raises(SystemExit) as info:
        main(line.split())
    assert info.value.code == 2
    printed = capsys.readouterr()
    message = printed.err.partition("error: ")[2]
    assert all(word in message for word in expected) and not printed.out, message
    assert not list(place.iterdir())
