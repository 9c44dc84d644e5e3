"""Training a network of the user's own, by its name: saved, resumed exactly, described, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import build, column, final_hashes, refusal, train

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.hub import files_to_upload, model_card
from ddpm_hf.runs import checkpoints
from training import train as train_py

OWN: dict[str, Any] = {"network": "custom_nets:OwnNet", "network_args": "{width: 12, dropout: 0.1}"}
STOCK: dict[str, Any] = {
    "network": "diffusers:UNet2DModel",
    "network_args": (
        "{block_out_channels: [8, 16], down_block_types: [DownBlock2D, AttnDownBlock2D], layers_per_block: 1, "
        "up_block_types: [AttnUpBlock2D, UpBlock2D], norm_num_groups: 4, dropout: 0.1}"
    ),
}


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> Path:
    """A run of six steps of an own network, with grids, and evaluated on held-out samples."""
    watched = {"sample_every": 3, "held_out_every": 5, "eval_every": 3, "eval_samples": 2}
    return train(tmp_path_factory.mktemp("own"), **OWN, **watched)


@pytest.mark.slow
@pytest.mark.parametrize("options", [OWN, STOCK], ids=["own", "stock"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(options, tmp_path, interrupted):
    """Dropout and the statistics of BatchNorm included."""
    whole = train(tmp_path / "whole", **options)
    interrupted(tmp_path / "stopped", after=4, **options)
    stopped = train(tmp_path / "stopped", **options)
    assert final_hashes(stopped, 6) == final_hashes(whole, 6)
    assert column(stopped, "loss") == column(whole, "loss")


def test_buffers_belong_to_the_state(own_run):
    model = checkpoints.read(own_run / "checkpoints" / "step-6", "model")
    assert model["norm.num_batches_tracked"] == 6
    assert model["norm.running_mean"].abs().max() > 0


def test_what_is_saved_loads_by_trust(own_run):
    pipe = DDPMPaperPipeline.from_pretrained(own_run, trust_remote_code=True)
    assert type(pipe.unet).__name__ == "OwnNet" and pipe.unet.config.width == 12
    pipe.set_progress_bar_config(disable=True)
    assert pipe(seeds=[0], output_type="latent").images.shape == (1, 1, 8, 8)


def test_stock_networks_load_without(tmp_path, caplog):
    folder = train(tmp_path, **STOCK)
    assert type(DDPMPaperPipeline.from_pretrained(folder).unet).__name__ == "UNet2DModel"
    assert json.loads((folder / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]


def test_the_last_line_says_how_to_load(own_run, caplog):
    with caplog.at_level("INFO"):
        train(own_run, **OWN, held_out_every=5)
    assert f"done: DDPMPaperPipeline.from_pretrained({str(own_run)!r}, trust_remote_code=True)" in caplog.text


def test_options_and_manifest_name_class_and_arguments(own_run, tmp_path):
    expected = {"network": "custom_nets:OwnNet", "network_args": {"width": 12, "dropout": 0.1}}
    options = yaml.safe_load((own_run / "options.yaml").read_text())
    manifest = json.loads((own_run / "checkpoints" / "step-6" / "train_state" / "manifest.json").read_text())
    for source in (options, manifest["options"]):
        assert {name: source[name] for name in expected} == expected
    read = train_py.parse([f"--config={own_run / 'options.yaml'}"])
    assert read.network_args == expected["network_args"]


def test_another_class_or_other_arguments_are_another_run(own_run):
    held_out: Any = {"held_out_every": 5}
    wider = refusal(own_run, **{**OWN, "network_args": "{width: 6, dropout: 0.1}"}, **held_out)
    assert "network_args was {'dropout': 0.1, 'width': 12}, is {'width': 6, 'dropout': 0.1}" in wider
    assert "network was 'custom_nets:OwnNet', is 'diffusers:UNet2DModel'" in refusal(own_run, **STOCK, **held_out)
    ours = refusal(own_run, **held_out)
    assert "network was 'custom_nets:OwnNet', is None" in ours


def test_the_report_shows_the_class_and_nothing_of_ours(own_run):
    report = (own_run / "report.html").read_text(encoding="utf-8")
    assert "custom_nets:OwnNet" in report and "OwnNet, 253 parameters" in report
    for name in ("block_out_channels", "layers_per_block", "attention_resolutions", "hidden_size"):
        assert name not in report


def test_the_card_says_how_to_load_and_to_train(own_run):
    step = own_run / "checkpoints" / "step-6"
    card = model_card(own_run, step, "user/name")
    assert 'DDPMPaperPipeline.from_pretrained("user/name", trust_remote_code=True)' in card
    assert "whose code is `unet/own_custom_nets.py`" in card and "its other three files are those of" in card
    assert "with 253 parameters" in card
    assert "with that file and the module of custom_nets&#58;OwnNet beside you" in card
    assert "block_out_channels" not in card
    assert {"unet/own_custom_nets.py", "pipeline.py"} <= set(files_to_upload(step))


def test_the_card_of_a_network_without_its_code(own_run, tmp_path):
    model = own_run / "checkpoints" / "step-6"
    index = json.loads((model / "model_index.json").read_text())
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
        for file in (model / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "ModelMixin"]}))
    card = model_card(tmp_path, tmp_path, "user/name")
    unet = 'unet=MyNetwork.from_pretrained("user/name", subfolder="unet")'
    assert f'DDPMPaperPipeline.from_pretrained("user/name", {unet})' in card
    assert f'from_pretrained("user/name", trust_remote_code=True, {unet})' in card
    assert "of a class of its own, OwnNet, whose code is not here" in card


def test_a_dry_run_of_an_own_network(tmp_path, capsys):
    train(tmp_path, dry_run=True, **OWN)
    printed = capsys.readouterr().out
    assert "network   OwnNet with 253 parameters" in printed
    assert "network custom_nets:OwnNet, network_args width 12; dropout 0.1" in printed
    assert "block_out_channels" not in printed


def test_learned_variances_double_the_output(tmp_path):
    run = build(tmp_path, **OWN, objective="vlb", variance_type="learned")
    assert run.state.unet.config["out_channels"] == 2


def test_labels_reach_a_network_that_takes_them(tmp_path):
    folder = train(tmp_path, **STOCK, label_column="label", label_dropout=0)
    pipe = DDPMPaperPipeline.from_pretrained(folder)
    assert pipe.id2label == {n: str(n) for n in range(10)} and pipe.needs_labels


def test_points_go_to_a_network_without_a_size(tmp_path):
    run = build(tmp_path, network="custom_nets:OwnPoints", dataset_name="moons")
    assert run.state.unet.config["in_channels"] == 2
    train(tmp_path, network="custom_nets:OwnPoints", dataset_name="moons")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "custom_nets"}, "--network 'custom_nets' must have the form package.module:name"),
        ({"network": "no_such_module:Net"}, "No module named 'no_such_module'; its folder must be on PYTHONPATH"),
        ({"network": "custom_nets:Nothing"}, "custom_nets has no callable 'Nothing'"),
        ({"network": "custom_nets:Plain"}, "a Plain cannot be saved; derive it from ModelMixin and ConfigMixin"),
        ({"network": "custom_nets:FixedSize"}, "config it is for (1, 16, 16), the data are (1, 8, 8)"),
        ({"network": "custom_nets:WrongShape"}, "the output for one sample is (1, 1, 9, 9), not (1, 1, 8, 8)"),
        ({"network": "custom_nets:BareTensor"}, "BareTensor returns a Tensor, which has no .sample"),
        ({"network": "custom_nets:Tuples"}, "Tuples returns a tuple, which has no .sample"),
        ({"network": "custom_nets:Fails"}, "forward fails for one sample, with KeyError: 'width'"),
        ({**OWN, "dataset_name": "custom_nets:by_name"}, "dataset_name='custom_nets:by_name': 'train' gives KeyError"),
        ({**OWN, "dataset_name": "custom_nets:no_split"}, "'train' gives TypeError: no_split() takes 0 positional"),
        ({**OWN, "network_args": "{widht: 3}"}, "takes no widht; it takes sample_size, in_channels, out_channels, w"),
        ({**OWN, "network_args": "{width: -3}"}, "--network custom_nets:OwnNet: "),
        ({**OWN, "label_column": "label"}, "custom_nets:OwnNet takes no num_class_embeds; leave out --label_column"),
        ({**STOCK, "label_column": "label"}, "takes no null_class; --label_dropout 0 trains without"),
        ({**OWN, "gradient_checkpointing": True}, "OwnNet does not support gradient checkpointing"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(options, message, tmp_path):
    assert message in refusal(tmp_path, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network_args", "{width: 3}"], "--network_args are of a network of your own; --network module:Class says"),
        (["--network", "a:B", "--init_from", "x"], "begins with weights of its own; leave out --init_from"),
    ],
)
def test_options_that_contradict_each_other(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train_py.parse(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_weights_begin_as_the_seed_says(tmp_path):
    first, again, other = (build(tmp_path, **OWN, seed=seed).state.unet for seed in (0, 0, 1))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_own_data_train_and_are_evaluated(tmp_path):
    folder = train(tmp_path, dataset_name="custom_nets:stripes", eval_split="test", eval_every=6, **OWN)
    manifest = json.loads((folder / "checkpoints" / "step-6" / "train_state" / "manifest.json").read_text())
    assert manifest["dataset"]["name"] == "custom_nets:stripes" and manifest["dataset"]["num_samples"] == 40
    assert "trained on custom_nets&#58;stripes" in model_card(folder, folder, "user/name")
