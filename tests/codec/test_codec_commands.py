"""Images from and to the disk, and the commands `ddpm-hf compress` and `ddpm-hf decompress`."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coded_models import noise_levels, tiny_pipe
from PIL import Image

from ddpm_hf import DDPMPaperPipeline, codec
from ddpm_hf.cli import main
from ddpm_hf.codec import CodingError, images
from ddpm_hf.data import load_samples

CARD = Path(__file__).parents[2] / "model_cards" / "ddpm-digits"


# ---- images on the disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "x/../../a.png", "c:a.png", "a\\b.png", "a\n.png", "a\x1b.png"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    decoded = codec.Decoded(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), 256, ["fine.png", name])
    with pytest.raises(CodingError, match="no place"):
        codec.write_images(tmp_path / "out", decoded)
    assert not list(tmp_path.iterdir())


def test_two_images_of_one_name_are_refused(tmp_path):
    decoded = codec.Decoded(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), 256, ["a.jpg", "a.jpg.png"])
    with pytest.raises(CodingError, match="one name"):
        codec.write_images(tmp_path / "out", decoded)


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("codec") / "tiny"
    tiny_pipe(channels=3, num_train_timesteps=20, beta_end=0.4).save_pretrained(folder)
    return str(folder)


def write_photos(folder: Path, mode: str = "RGB", side: int = 8) -> dict[str, np.ndarray]:
    pixels = {}
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.webp", "sub/c.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels[name] = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels[name]).convert(mode).save(path, lossless=True)
    return pixels


def test_a_folder_of_images_comes_back(tiny_checkpoint, tmp_path, capsys):
    pixels = write_photos(tmp_path / "photos")
    main(["compress", tiny_checkpoint, str(tmp_path / "photos"), "-o", str(tmp_path / "x" / "file"), "--steps", "5"])
    said = capsys.readouterr().out
    assert ": 3 images, " in said and "net" in said and "initial" in said
    main(["decompress", tiny_checkpoint, str(tmp_path / "x" / "file"), "-o", str(tmp_path / "back")])
    assert capsys.readouterr().out == f"3 images in {tmp_path / 'back'}; every batch has its checksum\n"
    found = {path.relative_to(tmp_path / "back").as_posix(): path for path in (tmp_path / "back").rglob("*.*")}
    assert set(found) == {"b.png", "a.webp.png", "sub/c.png"}
    for name, image in pixels.items():
        with Image.open(found[name if name.endswith("png") else f"{name}.png"]) as opened:
            assert np.array_equal(np.asarray(opened), image)


@pytest.mark.slow
def test_a_data_set_comes_back_as_levels_or_pictures(tmp_path, capsys, monkeypatch):
    """With a tiny network, few of the digits, and one of them for the chain, to be quick."""
    checkpoint = str(tmp_path / "tiny")
    tiny_pipe(num_train_timesteps=20, beta_end=0.4).save_pretrained(checkpoint)
    few = load_samples("digits", split="test").array[:5]
    monkeypatch.setattr(codec, "read_images", lambda images, split, skip: (few, 17, None))
    file = str(tmp_path / "digits.ddpm")
    main(["compress", checkpoint, "digits", "-o", file, "--fit_images", "1"])
    capsys.readouterr()
    main(["decompress", checkpoint, file, "-o", str(tmp_path / "levels.npy"), "--micro_batch", "2"])
    assert np.array_equal(np.load(tmp_path / "levels.npy"), few)
    main(["decompress", checkpoint, file, "-o", str(tmp_path / "pictures")])
    with Image.open(tmp_path / "pictures" / "00003.png") as picture:
        assert np.array_equal(np.rint(np.asarray(picture) / 255 * 16), few[3, 0])


def test_images_of_a_data_set_are_its_levels():
    levels, num_levels, names = codec.read_images("digits")
    assert levels.shape == (360, 1, 8, 8) and num_levels == 17 and names is None and levels.max() == 16
    with pytest.raises(CodingError, match="points"):
        codec.read_images("moons")


def test_one_image_is_called_one_image(tiny_checkpoint, tmp_path, capsys):
    write_photos(tmp_path)
    words = ["compress", tiny_checkpoint, str(tmp_path / "b.png"), "--steps", "2"]
    main([*words, "--dry_run"])
    assert capsys.readouterr().out.endswith(" bits/dim predicted in 2 steps, for 1 image\n")
    main([*words, "-o", str(tmp_path / "file")])
    assert ": 1 image, " in capsys.readouterr().out
    main(["decompress", tiny_checkpoint, str(tmp_path / "file"), "-o", str(tmp_path / "x.npy")])
    assert capsys.readouterr().out == f"1 image in {tmp_path / 'x.npy'}; every batch has its checksum\n"


def test_a_dry_run_predicts_and_writes_nothing(tiny_checkpoint, tmp_path, capsys):
    """It needs no --output; one that is there is left alone, and the same command without --dry_run refuses it."""
    write_photos(tmp_path / "photos")
    words = ["compress", tiny_checkpoint, str(tmp_path / "photos"), "--steps", "5"]
    with_output = [*words, "-o", str(tmp_path / "file")]
    before = sorted(tmp_path.rglob("*"))
    main([*words, "--dry_run"])
    said = capsys.readouterr().out
    main([*with_output, "--dry_run"])
    assert capsys.readouterr().out == said and sorted(tmp_path.rglob("*")) == before
    main(with_output)
    net = float(capsys.readouterr().out.split("net ")[1].split()[0])
    assert net == pytest.approx(float(said.split()[0]), rel=0.05)  # 3 images of 192 values, and other noise
    main([*with_output, "--dry_run"])
    assert capsys.readouterr().out == said


def test_a_chain_has_25_steps_unless_the_checkpoint_has_fewer(tiny_checkpoint, tmp_path, capsys):
    write_photos(tmp_path)
    main(["compress", tiny_checkpoint, str(tmp_path / "b.png"), "--dry_run"])
    assert "predicted in 20 steps" in capsys.readouterr().out


def test_as_many_bad_images_are_left_out_as_is_said(tiny_checkpoint, tmp_path, capsys, caplog):
    """They are counted and named; the file is that of the same folder without them."""
    photos, file, words = tmp_path / "photos", tmp_path / "file", ["--steps", "2", "-o"]
    write_photos(photos)
    main(["compress", tiny_checkpoint, str(photos), *words, str(tmp_path / "without")])
    for name in ("a.png", "z.png"):
        (photos / name).write_bytes(b"no image")
    said = refused(capsys, "compress", tiny_checkpoint, photos, *words, file, "--skip_bad_images", 1)
    assert "2 bad images: a.png: " in said and "; z.png: " in said and "skip_bad_images=1 allows no more" in said
    assert not file.exists() and not caplog.text
    main(["compress", tiny_checkpoint, str(photos), *words, str(file), "--skip_bad_images", "2"])
    assert "photos: 2 bad images left out: a.png: " in caplog.text and "z.png: " in caplog.text
    assert ": 3 images, " in capsys.readouterr().out
    assert file.read_bytes() == (tmp_path / "without").read_bytes()


def test_bad_images_of_a_data_set_are_left_out_too(tmp_path, monkeypatch):
    """Of a table with one row that holds no image."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_photos(tmp_path / "photos")
    rows = [str(tmp_path / "photos" / "b.png"), None]
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    monkeypatch.setattr(images, "load_samples", lambda name, **options: load_samples(table, **options))
    with pytest.raises(ValueError, match="skip_bad_images=0 allows no more"):
        codec.read_images("a_table", "train")
    levels, num_levels, names = codec.read_images("a_table", "train", 1)
    assert levels.shape == (1, 3, 8, 8) and num_levels == 256 and names is None


def test_nothing_that_is_there_is_written_over(tiny_checkpoint, tmp_path, capsys):
    photos, file = tmp_path / "photos", tmp_path / "file"
    write_photos(photos)
    words = ["compress", tiny_checkpoint, str(photos), "--steps", "2", "-o"]
    main([*words, str(file)])
    for name in ("x.npy", "x.ddpm"):
        (tmp_path / name).write_text("mine")
    expected = "{} exists; give another name, or remove it"
    assert expected.format(tmp_path / "x.ddpm") in refused(capsys, *words, tmp_path / "x.ddpm")
    assert expected.format(tmp_path / "x.npy") in refused(
        capsys, "decompress", tiny_checkpoint, file, "-o", tmp_path / "x.npy"
    )
    assert {(tmp_path / name).read_text() for name in ("x.npy", "x.ddpm")} == {"mine"}
    main([*words, os.devnull])  # a device is no file to lose


def test_a_shortened_checkpoint_takes_no_other_steps(tiny_checkpoint, tmp_path, capsys):
    """The message names --steps, not the configuration's x_start_mse."""
    pipe = DDPMPaperPipeline.from_pretrained(tiny_checkpoint)
    chain = codec.fit_chain(pipe, noise_levels(2, pipe), 5)
    DDPMPaperPipeline(pipe.unet, codec.coding_scheduler(pipe, chain)).save_pretrained(tmp_path / "short")
    write_photos(tmp_path)
    said = refused(capsys, "compress", tmp_path / "short", tmp_path / "b.png", "--dry_run", "--steps", 3)
    assert "--steps 3: " in said and "shortened before" in said and "leave out --steps" in said


def test_digits_without_scikit_learn_ask_for_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(CodingError, match=r"digits needs scikit-learn: pip install 'ddpm_hf\[codec\]'"):
        codec.read_images("digits")


def test_without_datasets_a_missing_folder_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CodingError) as info:
        codec.read_images("photo")
    assert str(info.value) == (
        f"there is no image or folder photo in {tmp_path}; for a data set of that name: pip install 'ddpm_hf[train]'"
    )


def refused(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    message = str(ended.value.code)
    assert message.startswith("ddpm-hf: ") and "\n" not in message
    return message


def test_mistakes_end_in_one_line(tiny_checkpoint, tmp_path, capsys):
    photos, file = tmp_path / "photos", tmp_path / "file"
    write_photos(photos)
    main(["compress", tiny_checkpoint, str(photos), "-o", str(file), "--steps", "2"])
    assert "folder" in refused(capsys, "compress", tiny_checkpoint, photos, "-o", tmp_path)
    assert "exists" in refused(capsys, "decompress", tiny_checkpoint, file, "-o", photos)
    assert "no file of" in refused(capsys, "decompress", tiny_checkpoint, photos / "b.png", "-o", tmp_path / "new")
    assert "another model" in refused(capsys, "decompress", CARD, file, "-o", tmp_path / "new")
    said = refused(capsys, "compress", CARD, photos, "-o", tmp_path / "f")
    assert "a.webp is 8×8 in colour; this model is for 8×8 grey, and nothing is cropped" in said
    Image.new("L", (9, 7)).save(photos / "z.png")
    said = refused(capsys, "compress", tiny_checkpoint, photos, "-o", tmp_path / "f")
    assert "z.png is 9×7 grey and a.webp 8×8 in colour; all must be alike" in said
    Image.new("RGB", (500, 300)).save(tmp_path / "wide.png")
    said = refused(capsys, "compress", tiny_checkpoint, tmp_path / "wide.png", "-o", tmp_path / "f")
    assert "wide.png is 500×300 in colour; this model is for 8×8 in colour" in said
    (photos / "z.png").write_bytes(b"\x89PNG")
    assert "z.png: " in refused(capsys, "compress", tiny_checkpoint, photos, "-o", tmp_path / "f")
    for option, value in (("--steps", 0), ("--steps", 21), ("--max_batch", 0), ("--fit_images", 0)):
        assert refused(capsys, "compress", tiny_checkpoint, photos / "b.png", "-o", tmp_path / "f", option, value)
    assert refused(capsys, "decompress", tiny_checkpoint, file, "-o", tmp_path / "new", "--micro_batch", 0)
    assert not (tmp_path / "new").exists() and not (tmp_path / "f").exists()
