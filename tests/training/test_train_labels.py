"""Training with labels: which rows, which batches, exact resumption, fine-tuning, and what the run says of classes."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import build, column, final_hashes, finish_pair, pixels, refusal, start_pair, stream_of, train

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import load_samples
from ddpm_hf.runs import checkpoints, read_metrics
from training import train as train_py

LABELLED = {"label_column": "label"}


def shown(folder: Path, classes: dict[str, int]) -> Path:
    """A folder with a sub-folder of 8×8 pictures for each class."""
    random = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


# ---- the batches and the step --------------------------------------------------------------------------------------


def test_labels_are_the_samples_and_a_tenth_is_dropped(tmp_path):
    run = build(tmp_path, global_batch_size=500, **LABELLED)
    truth, dropped = load_samples("digits", label_column="label").labels, []
    for step in range(20):
        batch = run.batches.rows(step, range(500))
        kept = batch.labels.numpy() != 10
        assert (batch.labels.numpy()[kept] == truth[batch.indices][kept]).all()
        dropped.append(500 - kept.sum())
    mean = np.mean(dropped) / 500
    assert abs(mean - 0.1) < 5 * (0.09 / 10_000) ** 0.5  # five standard errors
    whole, parts = run.batches.rows(3, range(500)), [run.batches.rows(3, rows) for rows in (range(7), range(7, 500))]
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_labels_change_no_other_draw(tmp_path):
    plain, labelled = build(tmp_path / "plain"), build(tmp_path / "labelled", **LABELLED)
    one, other = (run.batches.rows(5, range(16)) for run in (plain, labelled))
    assert torch.equal(one.x_start, other.x_start) and torch.equal(one.t, other.t)
    assert torch.equal(one.noise, other.noise) and one.labels is None


@pytest.mark.parametrize(("dropout", "rows", "null_class"), [(0.1, 11, 10), (0.0, 10, None)])
def test_the_last_row_is_for_no_label(tmp_path, dropout, rows, null_class):
    config = build(tmp_path, label_dropout=dropout, **LABELLED).state.unet.config
    assert (config["num_class_embeds"], config["null_class"]) == (rows, null_class)


@pytest.mark.parametrize("objective", ["simple", "vlb"])
def test_the_network_is_given_the_labels(tmp_path, objective):
    """The first update is the one by hand, with the labels of the batch."""
    twin = build(tmp_path, objective=objective, **LABELLED)
    run = build(tmp_path, objective=objective, **LABELLED)
    batch = run.batches.rows(0, range(16))
    losses = train_py.losses_of(twin, batch.x_start, batch.t, batch.noise, batch.labels)
    losses.mean().backward()
    expected = twin.state.unet.class_embedding.weight.grad
    run.updates.begin()
    run.updates.add_gradient(batch)
    gradient = run.state.unet.class_embedding.weight.grad
    assert torch.equal(gradient, expected)
    train_py.training_step(run, stream_of(run))
    seen = {int(label) for label in batch.labels}
    assert {int(row) for row in gradient.norm(dim=1).nonzero().flatten()} == seen


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory) -> Path:
    options = {"sample_every": 6, "num_samples": 20, "eval_every": 3, "held_out_every": 10, "eval_samples": 16}
    return train(tmp_path_factory.mktemp("labelled"), **options, **LABELLED)


def test_a_run_leaves_a_model_that_knows_its_classes(labelled_run):
    pipe = DDPMPaperPipeline.from_pretrained(labelled_run)
    assert pipe.id2label == {i: str(i) for i in range(10)} and pipe.null_class == 10
    assert pipe(class_labels=["3", "7"], guidance_scale=2, output_type="np").images.shape == (2, 8, 8, 1)
    manifest = checkpoints.verify(labelled_run / "checkpoints" / "step-6")
    assert manifest["dataset"]["classes"]["0"] > 100 and len(manifest["dataset"]["labels"]) == 64
    page = (labelled_run / "report.html").read_text(encoding="utf-8")
    assert "classes" in page


def test_grids_have_a_column_for_each_class(labelled_run):
    height, width, _ = pixels(labelled_run / "samples" / "step-6-ema.png").shape
    assert width == 5 * height  # ten columns, two rows


def test_held_out_samples_are_evaluated_given_their_labels(labelled_run, tmp_path):
    """The bound given the label is another number than the one without."""
    lines = [line for line in read_metrics(labelled_run / "metrics.jsonl") if "held_out_bpd" in line]
    assert [line["step"] for line in lines] == [3, 6]
    run = build(tmp_path, held_out_every=10, eval_every=3, eval_samples=16, **LABELLED)
    run.state.restore(labelled_run / "checkpoints" / "step-6")
    from ddpm_hf.runs import evaluate, numbers_of

    values = evaluate(run.accelerator, run.state, run.scheduler, run.held_out.parts, batch_size=16)
    numbers = numbers_of(values, run.held_out.identity)
    assert numbers["held_out_bpd"] == pytest.approx(lines[-1]["held_out_bpd"], rel=1e-6)
    for part in run.held_out.parts.values():
        object.__setattr__(part.samples, "labels", None)
    without = evaluate(run.accelerator, run.state, run.scheduler, run.held_out.parts, batch_size=16)
    assert not torch.equal(without["held_out"], values["held_out"])


@pytest.mark.slow
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, interrupted):
    options = {"num_steps": 8, "global_batch_size": 500, "gradient_accumulation_steps": 4, **LABELLED}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole, **options)
    interrupted(parted, after=4, **options)
    train(parted, **options)
    assert final_hashes(parted, 8) == final_hashes(whole, 8)
    assert column(parted, "loss") == column(whole, "loss")


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    options = {"num_steps": 10, "checkpoint_every": 10, "sample_every": 10, "num_samples": 12, **LABELLED}
    processes = start_pair(tmp_path / "two", **options)
    alone = train(tmp_path / "one", **options)
    finish_pair(processes)
    assert column(tmp_path / "two", "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)
    name = "samples/step-10-ema.png"
    assert np.abs(pixels(tmp_path / "two" / name) - pixels(alone / name)).max() <= 2


# ---- what may change -----------------------------------------------------------------------------------------------


def test_other_labels_are_another_run(tmp_path, labelled_run):
    options = {"held_out_every": 10, "eval_every": 3, "eval_samples": 16, "sample_every": 6, "num_samples": 20}
    assert "label_column was 'label', is None" in refusal(labelled_run, num_steps=7, **options)
    message = refusal(labelled_run, num_steps=7, label_dropout=0.2, **options, **LABELLED)
    assert "label_dropout was 0.1, is 0.2" in message
    folder = shown(tmp_path / "pets", {"cat": 12, "dog": 12})
    own = {"dataset_name": "none", "train_data_dir": folder, "num_steps": 3, **LABELLED}
    run = train(tmp_path / "run", **own)
    (folder / "dog" / "3.png").rename(folder / "cat" / "new.png")
    assert "labels (sha256) was" in refusal(run, **{**own, "num_steps": 4})


def test_a_run_from_before_labels_goes_on(tmp_path, finished, caplog):
    """Its manifest knows of no label_dropout: the default is no change."""
    path = finished / "checkpoints" / "step-6" / checkpoints.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["options"]["label_dropout"], manifest["files"][checkpoints.MANIFEST]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    caplog.set_level(logging.INFO)
    train(finished, num_steps=7)
    assert "resuming at step 6" in caplog.text


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def test_a_network_without_classes_gets_them_and_begins_as_it_was(tmp_path, finished_run):
    run = build(tmp_path, init_from=finished_run, **LABELLED)
    source, x = DDPMPaperPipeline.from_pretrained(finished_run).unet, torch.randn(3, 1, 8, 8)
    assert torch.equal(run.state.unet.eval()(x, 5, torch.tensor([0, 4, 10])).sample, source(x, 5).sample)
    assert run.state.unet.class_embedding.weight.abs().max() == 0


def test_classes_must_be_those_of_init_from(tmp_path, labelled_run):
    run = build(tmp_path / "same", init_from=labelled_run, **LABELLED)
    source = DDPMPaperPipeline.from_pretrained(labelled_run).unet
    assert torch.equal(run.state.unet.class_embedding.weight, source.class_embedding.weight)
    for options in ({}, {"label_dropout": 0.0, **LABELLED}):
        message = refusal(tmp_path / "other", init_from=labelled_run, **options)
        assert "has 11 rows for the classes 0, 1, 2" in message and "--label_column" in message


# ---- what it says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_the_dry_run_names_the_classes(tmp_path, capsys, dropout):
    """Also of a network that cannot do without labels."""
    folder = shown(tmp_path / "pets", {"cat": 20, "dog": 12})
    own = {"dataset_name": "none", "train_data_dir": folder, "label_dropout": dropout, **LABELLED}
    train(tmp_path / "run", dry_run=True, **own)
    said = capsys.readouterr().out
    assert "cat 20, dog 12" in said and "s a step" in said


def test_labels_of_held_out_folders_may_lie_elsewhere(tmp_path):
    """Sub-folders where the data have a column of metadata.csv. What they lack is said with the option for it."""
    folder, other = shown(tmp_path / "pets", {"cat": 20, "dog": 12}), shown(tmp_path / "more", {"cat": 3, "dog": 3})
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]) + "\n")
    options = {"dataset_name": "none", "train_data_dir": folder, "eval_data_dir": other, "eval_every": 3}
    options |= {"label_column": "kind", "num_steps": 3}
    message = refusal(tmp_path / "run", **options)
    assert f"{other} has no such column of labels" in message and "--eval_label_column says where" in message
    run = train(tmp_path / "run", **options, eval_label_column="label")
    (line,) = [line for line in read_metrics(run / "metrics.jsonl") if "held_out_bpd" in line]
    assert line["held_out_bpd"] > 0
    with pytest.raises(SystemExit):
        train(tmp_path / "none", eval_label_column="label")


def test_refusals_name_few_of_many_classes(tmp_path):
    """And those in which two sets differ."""
    many = {f"kind {i:03}": 1 for i in range(60)}
    folder = shown(tmp_path / "pets", many)
    other = shown(tmp_path / "more", {**dict(list(many.items())[1:]), "z\u202ebra": 1})
    options = {"dataset_name": "none", "train_data_dir": folder, "eval_data_dir": other, "eval_every": 3, **LABELLED}
    message = refusal(tmp_path / "run", **options)
    assert "trained on, kind 000, kind 001, " in message and message.count(" and 52 more") == 2
    assert message.endswith(", and differ in kind 000, z bra") and "kind 020" not in message


def test_held_out_folders_need_the_same_classes(tmp_path):
    folder, other = shown(tmp_path / "pets", {"cat": 20, "dog": 12}), shown(tmp_path / "more", {"cat": 3, "fox": 3})
    options = {"dataset_name": "none", "train_data_dir": folder, "eval_data_dir": other, "eval_every": 3, **LABELLED}
    assert "have the classes cat, fox, those of pets, which are trained on, cat, dog" in refusal(
        tmp_path / "run", **options
    )
