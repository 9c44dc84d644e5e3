"""Many files → one array: the same content by every route, and a cache that is whole, right, or not used."""

import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ddpm_hf.data import cache as image_cache, fingerprint
from ddpm_hf.data.cache import STALE_PARTIAL_S, Cache, DecodeOptions, decode_all

OPTIONS = DecodeOptions((255, 255, 255), None)
IN_MEMORY = {"skip_bad_images": 0, "max_memory_bytes": 2**20, "num_workers": 0}
MAPPED = {**IN_MEMORY, "max_memory_bytes": 0}


@pytest.fixture
def files(tmp_path) -> list[tuple[str, Path]]:
    """Seven images of 6 x 4, grey but for the fourth."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (4, 6, 3) if i == 3 else (4, 6), dtype=np.uint8)).save(path)
    return [(path.name, path) for path in paths]


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", "name", "source", OPTIONS)


def names_in(cache: Cache) -> list[str]:
    return sorted(path.suffix for path in cache.path.parent.iterdir())


WITH_WORKERS = pytest.param(2, marks=pytest.mark.integration)


@pytest.mark.parametrize("num_workers", [0, WITH_WORKERS])
@pytest.mark.parametrize("max_memory_bytes", [0, 7 * 24, 7 * 72])  # mapped; mapped from the colour image on; in memory
def test_every_route_gives_the_same_array_and_fingerprint(files, cache, max_memory_bytes, num_workers):
    expected = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for _, path in files])
    digest = hashlib.sha256(expected.tobytes() + b"|u1 (7, 3, 4, 6) 256").hexdigest()
    decoded = decode_all(
        files, OPTIONS, cache=cache, skip_bad_images=0, max_memory_bytes=max_memory_bytes, num_workers=num_workers
    )
    np.testing.assert_array_equal(decoded.array, expected)
    assert not decoded.array.flags.writeable
    assert decoded.fingerprint == digest == fingerprint(expected, 256)
    assert isinstance(decoded.array, np.memmap) == (max_memory_bytes < 7 * 72)
    if max_memory_bytes < 7 * 72:
        assert names_in(cache) == [".json", ".npy"]
        np.testing.assert_array_equal(np.load(cache.path.with_suffix(".npy")), expected)
    else:
        assert not cache.path.parent.exists()


def test_grey_images_alone_have_one_channel(files, cache):
    assert decode_all(files[:3], OPTIONS, cache=cache, **IN_MEMORY).array.shape == (3, 1, 4, 6)


@pytest.mark.parametrize("limits", [IN_MEMORY, MAPPED])
def test_bad_images_leave_no_gap(files, cache, limits):
    files[0][1].write_bytes(b"damaged")
    files[5][1].write_bytes(b"damaged")
    decoded = decode_all(files, OPTIONS, cache=cache, **{**limits, "skip_bad_images": 2})
    kept = decode_all([files[i] for i in (1, 2, 3, 4, 6)], OPTIONS, cache=cache, **IN_MEMORY | {"skip_bad_images": 2})
    np.testing.assert_array_equal(decoded.array, kept.array)
    assert decoded.fingerprint == kept.fingerprint
    assert [line.split(":")[0] for line in decoded.skipped] == ["0.png", "5.png"]


def test_too_many_bad_images_are_named_and_leave_nothing_behind(files, cache):
    for i in (1, 4):
        files[i][1].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"2 bad images: 1\.png: no readable.*; 4\.png: no readable.*=1 allows"):
        decode_all(files, OPTIONS, cache=cache, **MAPPED | {"skip_bad_images": 1})
    assert names_in(cache) == []


def test_a_cache_made_with_more_patience_does_not_hide_its_bad_images(files, cache):
    files[1][1].write_bytes(b"damaged")
    decode_all(files, OPTIONS, cache=cache, **MAPPED | {"skip_bad_images": 1})
    with pytest.raises(ValueError, match=r"1 bad image: 1\.png"):
        decode_all(files, OPTIONS, cache=cache, **MAPPED)


def test_nothing_usable_is_an_error(files, cache):
    with pytest.raises(ValueError, match="none of the 1 images can be used: row 0: the row holds no image"):
        decode_all([("row 0", None)], OPTIONS, cache=cache, **IN_MEMORY | {"skip_bad_images": 9})


def test_two_sizes_are_named(files, cache, tmp_path):
    Image.new("L", (5, 9)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"0\.png is 6 x 4, other\.png is 5 x 9; pass resolution"):
        decode_all([*files, ("other.png", tmp_path / "other.png")], OPTIONS, cache=cache, **IN_MEMORY)


def test_a_filled_cache_is_used_without_the_files(files, cache):
    first = decode_all(files, OPTIONS, cache=cache, **MAPPED)
    for _, path in files:
        path.unlink()
    again = decode_all(files, OPTIONS, cache=cache, **IN_MEMORY)
    np.testing.assert_array_equal(again.array, first.array)
    assert again[1:] == first[1:]


def test_other_sources_and_options_never_find_it(files, cache):
    decode_all(files, OPTIONS, cache=cache, **MAPPED)
    folder = cache.path.parent
    assert Cache(folder, "name", "source", OPTIONS).read() is not None
    assert Cache(folder, "name", "changed", OPTIONS).read() is None
    assert Cache(folder, "name", "source", DecodeOptions((0, 0, 0), None)).read() is None
    assert Cache(folder, "name", "source", DecodeOptions((255, 255, 255), 4)).read() is None


@pytest.mark.parametrize("damage", ["no record", "half a record", "no array", "half an array", "another's record"])
def test_a_damaged_entry_is_made_again(files, cache, damage):
    whole = decode_all(files, OPTIONS, cache=cache, **MAPPED)
    record, array = cache.path.with_suffix(".json"), cache.path.with_suffix(".npy")
    match damage:
        case "no record":
            record.unlink()
        case "half a record":
            record.write_text(record.read_text()[:40])
        case "no array":
            array.unlink()
        case "half an array":
            array.write_bytes(array.read_bytes()[:-100])
        case "another's record":
            record.write_text(json.dumps(json.loads(record.read_text()) | {"made_from": {}}))
    assert cache.read() is None
    again = decode_all(files, OPTIONS, cache=cache, **MAPPED)
    assert again.fingerprint == whole.fingerprint
    assert cache.read() is not None


@pytest.mark.parametrize("killed_at", ["append", "commit"])
def test_a_run_that_dies_while_it_fills_leaves_no_entry(files, cache, monkeypatch, killed_at):
    """`discard` is disabled to leave what kill -9 would leave; a later run clears it away."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_cache._Store, "discard", lambda self: None)
        patch.setattr(
            *((image_cache._Store, "append", die) if killed_at == "append" else (image_cache.os, "fsync", die))
        )
        with pytest.raises(KeyboardInterrupt):
            decode_all(files[:3], OPTIONS, cache=cache, **MAPPED)
    (leftover,) = cache.path.parent.iterdir()
    assert leftover.suffix == ".partial" and cache.read() is None
    fresh = cache.create_partial(0)  # another process at work: its file and the recent leftover stay
    assert leftover.exists()
    old = time.time() - 2 * STALE_PARTIAL_S
    os.utime(leftover, (old, old))
    decode_all(files[:3], OPTIONS, cache=cache, **MAPPED)
    assert not leftover.exists() and Path(fresh.name).exists()
    fresh.close()


def test_a_full_disk_is_an_error_before_anything_is_decoded(files, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="need 168 bytes and 10 are free.*DDPM_HF_CACHE"):
        decode_all(files, OPTIONS, cache=cache, **MAPPED)
    assert names_in(cache) == []


@pytest.mark.integration
def test_decoding_leaves_the_global_generators_alone(files, cache):
    torch.manual_seed(0)
    np.random.seed(0)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    decode_all(files, OPTIONS, cache=cache, **IN_MEMORY | {"num_workers": 2})
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


# ---- what is said of the whole set ---------------------------------------------------------------------------------


def saved(folder: Path, *arrays: np.ndarray, suffix: str = "png") -> list[tuple[str, Path]]:
    folder.mkdir()
    paths = [folder / f"{i}.{suffix}" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return [(path.name, path) for path in paths]


def test_skipped_files_are_known_by_index(files, cache):
    files[0][1].write_bytes(b"damaged")
    files[5][1].write_bytes(b"damaged")
    decoded = decode_all(files, OPTIONS, cache=cache, **MAPPED | {"skip_bad_images": 2})
    assert decoded.left_out == (0, 5)
    assert decode_all(files, OPTIONS, cache=cache, **MAPPED | {"skip_bad_images": 2})[1:] == decoded[1:]


def test_the_first_in_colour_is_named_and_counted(files, cache):
    decoded = decode_all(files, OPTIONS, cache=cache, **IN_MEMORY)
    assert decoded.first_in_colour == "the first in colour is 3.png (1 of 7)"
    assert decode_all(files[:3], OPTIONS, cache=cache, **IN_MEMORY).first_in_colour == ""
    assert decode_all(files[3:4], OPTIONS, cache=cache, **IN_MEMORY).first_in_colour == ""
    one_channel = DecodeOptions((255, 255, 255), None, channels=1)
    assert decode_all(files, one_channel, cache=cache, **IN_MEMORY)[-1] == ""


CT = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("top", [189, 255, 1023, 4095, 16383])
def test_a_small_range_in_16_bits_is_noted_once(tmp_path, cache, top, suffix):
    values = (CT.astype(int) * top // 4095).astype(np.uint16)
    files = saved(tmp_path / "ct", values // 2, values, suffix=suffix)
    note = f"the largest of its 16-bit values is {top:,}: scale them to 0–65535, or give --max_value {top}"
    for _ in range(2):  # the second time from the cache
        assert decode_all(files, OPTIONS, cache=cache, **MAPPED).notes == (note,)


@pytest.mark.parametrize("top", [16384, 65535])
def test_a_usual_range_in_16_bits_is_not_noted(tmp_path, cache, top):
    files = saved(tmp_path / "ct", CT, np.full((8, 8), top, np.uint16))
    assert decode_all(files, OPTIONS, cache=cache, **IN_MEMORY).notes == ()


def test_masks_of_0_and_1_are_noted(tmp_path, cache):
    black, mask = np.zeros((2, 2), np.uint8), np.eye(2, dtype=np.uint8)
    files = saved(tmp_path / "masks", black, mask, black)
    note = "the largest of its 8-bit values is 1: scale them to 0–255, or give --max_value 1"
    assert decode_all(files, OPTIONS, cache=cache, **IN_MEMORY).notes == (note,)
    assert decode_all(files[:1], OPTIONS, cache=cache, **IN_MEMORY).notes == ()  # black pictures
    more = [*files, *saved(tmp_path / "grey", black + 2)]
    assert decode_all(more, OPTIONS, cache=cache, **IN_MEMORY).notes == ()


def test_one_bit_pictures_are_no_masks_of_0_and_1(tmp_path, cache):
    files = saved(tmp_path / "bits", np.eye(2, dtype=bool))
    assert decode_all(files, OPTIONS, cache=cache, **IN_MEMORY).notes == ()


def test_with_max_value_nothing_is_noted_and_the_range_is_full(tmp_path, cache):
    files = saved(tmp_path / "ct", CT, CT)
    decoded = decode_all(files, DecodeOptions((255,) * 3, None, 4095), cache=cache, **IN_MEMORY)
    assert decoded.notes == () and decoded.array.max() == 255
    np.testing.assert_array_equal(decoded.array[0, 0], np.rint(CT / 4095 * 255))


def test_a_value_above_max_value_names_the_file(tmp_path, cache):
    files = saved(tmp_path / "ct", CT, CT + 1)
    with pytest.raises(ValueError, match=r"1 bad image: 1\.png: its largest value is 4,096, above max_value=4095"):
        decode_all(files, DecodeOptions((255,) * 3, None, 4095), cache=cache, **IN_MEMORY)


def test_an_entry_of_the_old_format_is_not_found(files, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "CACHE_FORMAT", 1)
        decode_all(files, OPTIONS, cache=Cache(cache.path.parent, "name", "source", OPTIONS), **MAPPED)
    assert Cache(cache.path.parent, "name", "source", OPTIONS).read() is None


def test_of_16_bit_colour_the_largest_value_is_a_bound(tmp_path, cache):
    """Pillow gives high bytes alone: 15 of 4,095; max_value cannot help, so it is not offered."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.stack([CT, CT // 2, CT // 3], -1), photometric="rgb")
    path = tmp_path / "ct.tif"
    path.write_bytes(buffer.getvalue())
    note = "the largest of its 16-bit values is at most 4,095: scale them to 0–65535"
    assert decode_all([("ct.tif", path)], OPTIONS, cache=cache, **IN_MEMORY).notes == (note,)


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [None, 4, 300])
def test_workers_change_nothing(files, cache, resolution):
    """Chunks of several images and of one, with bad images among them; every fact is the same."""
    files = [(f"{i}", path) for i, (_, path) in enumerate(files * 20)]
    files[33] = ("row 33", None)
    options = DecodeOptions((255, 255, 255), resolution)
    alone, shared = (
        decode_all(
            files,
            options,
            cache=cache,
            **IN_MEMORY | {"skip_bad_images": 1, "num_workers": n, "max_memory_bytes": 2**26},
        )
        for n in (0, 2)
    )
    np.testing.assert_array_equal(alone.array, shared.array)
    assert alone[1:] == shared[1:] and alone.left_out == (33,)
