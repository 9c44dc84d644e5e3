"""`--classes` and `--guidance` of `ddpm-hf sample`, and `draw classes` and `draw guidance`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPaperPipeline, figures, pictures
from ddpm_hf.cli import main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.likelihood import bits_per_dim

NAMES = {0: "cat", 1: "7", 2: "dog, wolf"}


@pytest.fixture(scope="module")
def labelled(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws 8×8 images in colour, of three classes, in ten steps."""
    folder = tmp_path_factory.mktemp("labelled")
    unet = tiny_unet(num_class_embeds=4, null_class=3)
    DDPMPaperPipeline(unet, tiny_scheduler(), id2label=NAMES).save_pretrained(folder)
    return str(folder)


def pipeline(checkpoint: str) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(folder: Path, *arguments: str) -> np.ndarray:
    main(["sample", *arguments, "-o", str(folder / "x.npy")])
    return np.load(folder / "x.npy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["cat"], [0, 0, 0, 0, 0]),
        (["7", "cat"], [1, 0, 1, 0, 1]),
        (["2", "dog, wolf", "3"], [2, 2, 3, 2, 2]),
        (["all"], [0, 1, 2, 0, 1]),
    ],
)
def test_seeds_take_the_classes_in_turn(labelled, tmp_path, words, labels):
    """Names before numbers, and in batches of two."""
    options = ["--seeds", "0-4", "--batch_size", "2", "--guidance", "2"]
    images = sampled(tmp_path, labelled, *options, "--classes", *words)
    expected = pipeline(labelled)(seeds=range(5), class_labels=labels, guidance_scale=2, output_type="np").images
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)


def test_without_classes_samples_have_no_label(labelled, tmp_path):
    images = sampled(tmp_path, labelled, "--seeds", "0-2")
    expected = pipeline(labelled)(seeds=range(3), output_type="np").images
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "wolf"], "'wolf' is none of the classes: cat, 7, dog, wolf"),
        (["--classes", "9"], "9 is no number from 0 to 3"),
        (["--guidance", "2"], "needs class_labels"),
        (["--classes", "cat", "--guidance", "inf"], "finite"),
    ],
)
def test_impossible_classes_are_refused_in_one_line(labelled, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        sampled(tmp_path, labelled, *arguments)
    assert error.value.code == 1 or message in str(error.value.code)
    assert message in capsys.readouterr().err + str(error.value.code)


def test_a_checkpoint_without_classes_says_so(colour, tmp_path, capsys):
    for command in (["sample", colour], ["draw", "classes", colour], ["draw", "guidance", colour]):
        with pytest.raises(SystemExit) as error:
            main([*command, "--classes", "cat", "-o", str(tmp_path / "x.png")])
        assert "has no classes; it was trained without labels" in capsys.readouterr().err + str(error.value.code)


def drawn(tmp_path: Path, *arguments: str) -> np.ndarray:
    output = tmp_path / "x.png"
    main(["draw", *arguments, "-o", str(output)])
    with Image.open(output) as picture:
        return np.asarray(picture.convert("RGB"))


def grid(rows: torch.Tensor, row_labels: list[str], column_labels: list[str]) -> np.ndarray:
    cells = [pictures.as_pictures(row) for row in rows]
    return np.asarray(pictures.labelled_grid(cells, row_labels=row_labels, column_labels=column_labels))


def test_stocks_pipeline_is_said_to_draw_without_labels(labelled, tmp_path, capsys):
    main(["convert", labelled, str(tmp_path / "stock"), "--to", "stock"])
    assert "stock's DDPMPipeline takes no labels: this one draws as without" in capsys.readouterr().out


def test_draw_classes_has_a_row_for_each_class(labelled, tmp_path):
    picture = drawn(tmp_path, "classes", labelled, "--seeds", "4,5", "--guidance", "3")
    rows = figures.by_class(pipeline(labelled), [0, 1, 2], seeds=[4, 5], guidance_scale=3)
    pipe = pipeline(labelled)
    expected = pipe(seeds=[4, 5], class_labels="7", guidance_scale=3, output_type="pt").images
    torch.testing.assert_close(rows[1], expected, rtol=0, atol=1e-5)
    assert np.array_equal(picture, grid(rows, ["cat", "7", "dog, wolf"], ["seed 4", "seed 5"]))


def test_draw_classes_moves_from_the_noise_to_the_samples(labelled, tmp_path):
    main(["draw", "classes", labelled, "--seeds", "4,5", "--guidance", "3", "-o", str(tmp_path / "x.gif")])
    pipe, options = pipeline(labelled), {"seeds": [4, 5], "guidance_scale": 3}
    frames = dict(figures.process_by_class(pipe, [0, 1, 2], num_frames=50, **options))
    assert list(frames) == list(range(11)) and frames[0].shape == (3, 2, 3, 8, 8)
    torch.testing.assert_close(frames[0][0], frames[0][2], rtol=0, atol=0)  # columns share their noise
    torch.testing.assert_close(frames[10], figures.by_class(pipe, [0, 1, 2], **options), rtol=0, atol=1e-5)
    assert list(dict(figures.process_by_class(pipe, [0, 1], num_frames=3, **options))) == [0, 5, 10]
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 11 and animation.width > animation.height  # three classes beside each other


def test_draw_guidance_has_a_column_for_each_scale(labelled, tmp_path):
    """Scale 0 is the sample without a label, whatever the class."""
    picture = drawn(tmp_path, "guidance", labelled, "--classes", "7", "cat", "--scales", "0", "1.5", "--seed", "4")
    columns = [figures.by_class(pipeline(labelled), [1, 0], seeds=[4], guidance_scale=scale) for scale in (0.0, 1.5)]
    assert np.array_equal(picture, grid(torch.cat(columns, dim=1), ["7", "cat"], ["s = 0", "s = 1.5"]))
    without = pipeline(labelled)(seeds=[4], output_type="pt").images
    for row in columns[0]:
        torch.testing.assert_close(row, without, rtol=0, atol=1e-4)


def test_a_picture_of_no_class_is_refused(labelled):
    with pytest.raises(ValueError, match="names no class"):
        figures.by_class(pipeline(labelled), [], seeds=[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "{}", "-o", "x.png"], "--classes is missing"),
        (["draw", "progressive", "{}", "-o", "x.png"], "draw progressive"),
        (["convert", "{}", "stock", "--to", "stock"], "--to stock"),
        (["evaluate", "{}", "--dataset", "digits", "-o", "x.json"], "--label_column is missing"),
        (["shorten", "{}", "short", "--dataset", "digits", "--steps", "3"], "--label_column is missing"),
        (["compress", "{}", "digits", "-o", "x.bb"], "compress"),
    ],
    ids=lambda words: words[0],
)
def test_where_every_sample_needs_a_class_commands_without_one_say_so(
    tiny_unet, tiny_scheduler, tmp_path, monkeypatch, capsys, words, message
):
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=3)
    DDPMPaperPipeline(unet, tiny_scheduler(), {0: "cat", 1: "7", 2: "dog"}).save_pretrained(tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main([word.format("given") for word in words])
    said = capsys.readouterr().err + str(error.value.code)
    assert message in said and "every sample of this checkpoint needs a class" in said and "Traceback" not in said


def test_shorten_by_the_labels_of_the_data_fits_what_the_bound_given_them_has(tiny_unet, tiny_scheduler, tmp_path):
    """Of a network that needs a class. Without them, or with others, the error would be another."""
    torch.manual_seed(0)
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    names = {number: str(number) for number in range(10)}
    DDPMPaperPipeline(unet, tiny_scheduler(), names).save_pretrained(tmp_path / "given")
    digits = load_samples("digits", label_column="label")
    words = ["--dataset", "digits", "--label_column", "label", "--num_images", "6", "--seed", "1"]
    main(["shorten", str(tmp_path / "given"), str(tmp_path / "short"), *words, "--work_dir", str(tmp_path / "work")])
    pipe, fitted = pipeline(str(tmp_path / "given")), pipeline(str(tmp_path / "short"))
    x_start = to_model_range(digits.batch(range(6)), digits.num_levels)

    def mse(labels: torch.Tensor) -> list[float]:
        given = {"seed": 1, "num_levels": digits.num_levels, "class_labels": labels}
        return bits_per_dim(pipe.unet, pipe.scheduler, x_start, **given).x_start_mse_bt.mean(dim=0).tolist()

    labels = torch.from_numpy(digits.labels[:6])
    assert fitted.scheduler.config["x_start_mse"] == pytest.approx(mse(labels), rel=1e-4)
    assert fitted.scheduler.config["x_start_mse"] != pytest.approx(mse((labels + 1) % 10), rel=1e-2)
