"""Every file of a real checkpoint, damaged in every way: seen, named, and the checkpoint before it is used instead."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline
from ddpm_hf.objectives import LossHistory
from ddpm_hf.runs import CheckpointError, TrainingState, checkpoints
from ddpm_hf.runs.checkpoints import to_resume, verify

NUM_FLIPS = 64  # random bits of each file
FILES = [
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_ddpm_paper.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/unet_ddpm_paper.py",
    "train_state/ema.safetensors",
    "train_state/loss_history.safetensors",
    "train_state/manifest.json",
    "train_state/model.safetensors",
    "train_state/optimizer.safetensors",
    "train_state/state.json",
]
MANIFEST = {
    "world_size": 1,
    "options": {"learning_rate": 1e-3, "channels": [8, 16], "name": "β"},
    "dataset": {"name": "digits", "num_samples": 3, "fingerprint": "abc"},
}


@pytest.fixture(scope="module")
def state(tiny_mlp) -> TrainingState:
    """After one step, so that the optimizer has something to save."""
    model = tiny_mlp()
    ema = EMAModel(model.parameters(), decay=0.9, min_decay=0.9, foreach=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(torch.zeros(2, 2), torch.arange(2)).sample.square().mean().backward()
    optimizer.step()
    return TrainingState(model, ema, optimizer, loss_history=LossHistory(10))


@pytest.fixture(scope="module")
def saved(state, tiny_scheduler, tmp_path_factory) -> Path:
    """A folder with step-10 and step-20; whoever damages them mends them."""
    folder = tmp_path_factory.mktemp("corruption") / "checkpoints"
    for state.step in (10, 20):
        state.save(folder, tiny_scheduler(), MANIFEST)
    return folder


@pytest.fixture
def folder(saved) -> Iterator[Path]:
    """The same; what a test did to step-20 is undone after it."""
    copy = saved.with_name("copy")
    shutil.copytree(saved / "step-20", copy)
    yield saved
    shutil.rmtree(saved / "step-20")
    copy.rename(saved / "step-20")


def resumed(folder: Path) -> Path | None:
    return to_resume(folder, "latest", MANIFEST, free=(), allow_changes=False)


def assert_named(folder: Path, name: str, num_hashes: tuple[int, ...]) -> None:
    """`verify` names the file, with as many hashes as one of these."""
    with pytest.raises(CheckpointError) as error:
        verify(folder / "step-20")
    message = str(error.value)
    # a flip in the manifest may change the name of the file that it speaks of, or the manifest's own
    assert message.startswith(f"{folder / 'step-20'}/") and (name == checkpoints.MANIFEST or name in message)
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", message))) in num_hashes


def assert_seen(folder: Path, name: str, num_hashes: tuple[int, ...]) -> None:
    """The file is named, and the checkpoint before is resumed."""
    assert_named(folder, name, num_hashes)
    assert resumed(folder) == folder / "step-10"


def test_these_are_all_files_of_a_checkpoint(folder):
    present = {p.relative_to(folder / "step-20").as_posix() for p in (folder / "step-20").rglob("*") if p.is_file()}
    assert present == set(FILES)
    assert resumed(folder) == folder / "step-20"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_off_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[Callable[[Path], None]] = [truncate, cut_off_a_byte, empty, zero, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(folder, name, damage):
    damage(folder / "step-20" / name)
    if name == checkpoints.MANIFEST:  # without its final line break it is the same JSON, and not what was written
        assert_seen(folder, name, num_hashes=(2,) if damage is cut_off_a_byte else (0,))
    else:
        assert_seen(folder, name, num_hashes=(0,) if damage is Path.unlink else (2,))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_seen(folder, name):
    """Also in a manifest that still is JSON: a changed step or option, or the name of a file, or of the hash."""
    path = folder / "step-20" / name
    whole = path.read_bytes()
    rng = random.Random(name)
    places = rng.sample(range(8 * len(whole)), min(NUM_FLIPS, 8 * len(whole)))
    assert len(places) == NUM_FLIPS
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        # in a manifest, none where it is no JSON any more, and one where the flip hit the hash that it states
        assert_named(folder, name, num_hashes=(0, 1, 2) if name == checkpoints.MANIFEST else (2,))
    assert_seen(folder, name, num_hashes=(0, 1, 2) if name == checkpoints.MANIFEST else (2,))  # of the last flip
    path.write_bytes(whole)
    assert resumed(folder) == folder / "step-20"


@pytest.mark.slow
def test_every_single_bit_of_the_manifest_counts(folder):
    checkpoint = folder / "step-20"
    path = checkpoint / checkpoints.MANIFEST
    whole = path.read_bytes()
    num_parsed = 0
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify(checkpoint)
        try:
            json.loads(damaged)
        except ValueError:
            continue
        num_parsed += 1
    assert num_parsed > 4000  # most of them would go unseen if nothing but the files' hashes were compared


@pytest.mark.parametrize(
    "change",
    [
        {"step": 21},
        {"world_size": 2},
        {"options": {**MANIFEST["options"], "learning_rate": 2e-3}},
        {"dataset": {**MANIFEST["dataset"], "fingerprint": "abd"}},
        {"another": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_that_was_edited_is_seen(folder, change):
    path = folder / "step-20" / checkpoints.MANIFEST
    checkpoints._write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **change})
    assert_seen(folder, checkpoints.MANIFEST, num_hashes=(2,))


def test_a_manifest_without_its_own_hash_is_read(folder):
    """Checkpoints written before manifests had one are as good."""
    path = folder / "step-20" / checkpoints.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["files"][checkpoints.MANIFEST]
    checkpoints._write_json(path, manifest)
    assert verify(folder / "step-20") == manifest and resumed(folder) == folder / "step-20"


@pytest.mark.parametrize("name", ["train_state/model.safetensors", checkpoints.MANIFEST])
def test_a_file_that_cannot_be_read_is_damaged_too(folder, name, monkeypatch):
    """A bad sector is an OSError, and not the end of all resuming."""
    bad, opened = folder / "step-20" / name, Path.open

    def unreadable(path: Path, *args, **kwargs):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", unreadable)
    assert_seen(folder, name, num_hashes=(0,))


@pytest.mark.parametrize("name", ["../step-10/model_index.json", "/etc/hostname", "unet", "x" * 300])
def test_a_manifest_cannot_point_elsewhere(folder, name):
    """It is no proof of a file of this checkpoint, and must not be read: the message would show its hash."""
    path = folder / "step-20" / checkpoints.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["files"][checkpoints.MANIFEST]
    manifest["files"][name] = "0" * 64
    checkpoints._write_json(path, manifest)
    with pytest.raises(CheckpointError, match="is missing"):
        verify(folder / "step-20")


def test_pruning_deletes_leftovers_that_are_no_folders(folder, tmp_path):
    """A file, and a link whose target stays."""
    own = tmp_path / "checkpoints"
    shutil.copytree(folder, own)
    (tmp_path / "kept").mkdir()
    (own / ".incomplete-file").touch()
    (own / ".incomplete-link").symlink_to(tmp_path / "kept")
    checkpoints.prune(own, keep=2)
    assert sorted(path.name for path in own.iterdir()) == ["step-10", "step-20"] and (tmp_path / "kept").is_dir()


def test_a_file_or_link_in_the_way_of_a_save_is_replaced(state, tiny_scheduler, tmp_path):
    (tmp_path / ".incomplete-step-20").touch()
    (tmp_path / ".incomplete-step-30").symlink_to(tmp_path / "nowhere")
    for state.step in (20, 30):
        verify(state.save(tmp_path, tiny_scheduler(), MANIFEST))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20", "step-30"]


def test_order_is_by_step_whatever_the_clock_said(folder):
    for step, mtime in ((10, 4_070_908_800), (20, 0)):  # 2099 and 1970
        os.utime(folder / f"step-{step}", (mtime, mtime))
    assert resumed(folder) == folder / "step-20"


# ---- published weights ---------------------------------------------------------------------------------------------

WEIGHTS = "diffusion_pytorch_model.safetensors"


def with_tensor(name: str, value: torch.Tensor | None) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


def with_value(name: str, value: float) -> Callable[[dict], None]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize("network", ["unet", "mlp"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_tensor("time_embedding.linear_1.bias", None), ["missing: time_embedding.linear_1.bias"]),
        (with_tensor("another.weight", torch.zeros(3)), ["unexpected: another.weight"]),
        (with_tensor("time_embedding.linear_1.bias", torch.zeros(3)), ["time_embedding.linear_1.bias", "3"]),
        (with_value("time_embedding.linear_1.bias", float("nan")), ["not finite: time_embedding.linear_1.bias"]),
        (with_value("time_embedding.linear_1.bias", float("-inf")), ["not finite: time_embedding.linear_1.bias"]),
    ],
    ids=["missing", "extra", "misshapen", "nan", "inf"],
)
@pytest.mark.parametrize("by", ["network", "pipeline"])
def test_damaged_weights_are_refused_with_the_names(
    tmp_path, tiny_unet, tiny_mlp, tiny_scheduler, network, change, words, by
):
    """Stock draws missing weights at random, and shows a black image for one that is no number."""
    model = tiny_unet() if network == "unet" else tiny_mlp()
    DDPMPaperPipeline(model, tiny_scheduler()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(ValueError) as error:
        if by == "network":
            type(model).from_pretrained(tmp_path / "unet")
        else:
            DDPMPaperPipeline.from_pretrained(tmp_path)
    for word in words:
        assert word in str(error.value)
    if len(words) == 1:  # a misshapen tensor is refused by diffusers, which does not say where it is: below
        assert str(tmp_path / "unet") in str(error.value)


def test_misshapen_weights_are_refused_with_the_folder(tmp_path, tiny_mlp):
    tiny_mlp().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    with_tensor("time_embedding.linear_1.bias", torch.zeros(3))(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        DDPMPaperMLP.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_weight_file_is_no_model(tmp_path, tiny_mlp, damage):
    """Of another length, or without a header. (Flipped bits of single weights show only against a checkpoint.)"""
    tiny_mlp().save_pretrained(tmp_path)
    damage(tmp_path / WEIGHTS)
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        DDPMPaperMLP.from_pretrained(tmp_path)
