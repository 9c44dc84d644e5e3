"""The codec: what goes in comes out, bit for bit, elsewhere too; nothing else does; and its length is the bound."""

import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import fork_server
import numpy as np
import pytest
import torch
from coded_models import noise_levels, tiny_pipe
from hypothesis import given, settings, strategies as st

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, codec
from ddpm_hf.codec import CodingError, batch_sizes, bits_back, compress, decompress
from ddpm_hf.codec.files import HASH_BYTES, MAGIC

CARD = Path(__file__).parents[2] / "model_cards" / "ddpm-digits"


# ---- what goes in comes out ----------------------------------------------------------------------------------------

CONTENTS = {
    "black": lambda rng, shape, num_levels: np.zeros(shape, np.int64),
    "white": lambda rng, shape, num_levels: np.full(shape, num_levels - 1),
    "noise": lambda rng, shape, num_levels: rng.integers(0, num_levels, shape),
    "black and white": lambda rng, shape, num_levels: rng.integers(0, 2, shape) * (num_levels - 1),
    "flat": lambda rng, shape, num_levels: np.broadcast_to(rng.integers(0, num_levels, shape[:2] + (1, 1)), shape),
}


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    content=st.sampled_from(sorted(CONTENTS)),
    num_images=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([2, 4, 8]),
    num_levels=st.sampled_from([2, 17, 256]),
    max_batch=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_any_images_come_back(content, num_images, channels, side, num_levels, max_batch, seed):
    pipe = tiny_pipe(channels, side, seed)
    shape = (num_images, channels, side, side)
    levels = CONTENTS[content](np.random.default_rng(seed), shape, num_levels)
    encoded = compress(pipe, levels, num_levels=num_levels, max_batch=max_batch)
    decoded = decompress(pipe, encoded.data)
    assert decoded.levels.dtype == torch.uint8 and decoded.num_levels == num_levels and decoded.names is None
    assert np.array_equal(decoded.levels.numpy(), levels)


PREDICTIONS, VARIANCES = ("epsilon", "sample", "v_prediction"), ("fixed_small", "fixed_large")
CLIPS = ({}, {"clip_sample": False}, {"thresholding": True})
PAIRS = {(0, 0, 0), (0, 1, 1), (0, 0, 2), (1, 1, 0), (1, 0, 1), (1, 1, 2), (2, 0, 0), (2, 1, 1), (2, 1, 2)}  # each two


@pytest.mark.parametrize(
    ("prediction_type", "variance_type", "clip"),
    [
        pytest.param(PREDICTIONS[i], VARIANCES[j], CLIPS[k], marks=[] if (i, j, k) in PAIRS else [pytest.mark.slow])
        for i in range(3)
        for j in range(2)
        for k in range(3)
    ],
)
def test_every_kind_of_chain_comes_back(prediction_type, variance_type, clip):
    pipe = tiny_pipe(prediction_type=prediction_type, variance_type=variance_type, **clip)
    levels = noise_levels(3, pipe)
    assert np.array_equal(decompress(pipe, compress(pipe, levels).data).levels.numpy(), levels)


@pytest.mark.slow
def test_images_one_by_one_come_back_too(digits_pipe, digits, chain):
    alone = compress(digits_pipe, digits[:5], num_levels=17, chain=chain, max_batch=1)
    assert np.array_equal(decompress(digits_pipe, alone.data, micro_batch=7).levels.numpy(), digits[:5])


@pytest.mark.slow
def test_a_shortened_checkpoint_brings_its_own_chain(digits_pipe, digits, chain):
    """Nothing of the chain is in the file then; what is coded is the same."""
    few = digits[:3]
    encoded = compress(digits_pipe, few, num_levels=17, chain=chain)
    shortened = DDPMPaperPipeline(digits_pipe.unet, codec.coding_scheduler(digits_pipe, chain))
    own = compress(shortened, few, num_levels=17)
    assert own.net_bits == encoded.net_bits and own.header_bits < encoded.header_bits - 500
    assert np.array_equal(decompress(shortened, own.data).levels.numpy(), few)
    with pytest.raises(CodingError, match="another model"):
        decompress(digits_pipe, own.data)


IN_ANOTHER_PROCESS = """
import json, sys
import numpy as np, torch
from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.codec import decompress
checkpoint, file, output, settings = sys.argv[1:]
pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
with open(file, "rb") as stream:
    data = stream.read()
found = []
for threads, micro_batch, torch.backends.mkldnn.enabled in json.loads(settings):
    torch.set_num_threads(threads)
    found.append(decompress(pipe, data, micro_batch=micro_batch).levels.numpy())
np.save(output, found)
"""
ELSEWHERE = [(2, None, True), (1, 1, True), (2, 3, True), (1, None, False), (2, 2, False)]


@pytest.mark.slow
def test_files_are_decoded_elsewhere(digits_pipe, digits, chain, tmp_path):
    """In a new process with other threads, micro-batches and kernels than those that coded."""
    few = digits[:2]
    (tmp_path / "digits.ddpm").write_bytes(compress(digits_pipe, few, num_levels=17, chain=chain).data)
    words = [CARD, tmp_path / "digits.ddpm", tmp_path / "levels.npy", json.dumps(ELSEWHERE)]
    fork_server.run(["-c", IN_ANOTHER_PROCESS, *words], check=True)
    found = np.load(tmp_path / "levels.npy")
    assert len(found) == len(ELSEWHERE) and all(np.array_equal(levels, few) for levels in found)


# ---- its length ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_length_is_the_bound(digits_pipe, digits, chain, encoded):
    """At most 1 % above the bound at the latents that were coded; some per cent below are possible.

    The bound has densities where the coder has bins one standard deviation wide, whose divergence is smaller. Its mean
    over latents is that of Eq. 5's bound, whose terms are integrals: here within 3 standard errors.
    """
    assert 0.96 < encoded.net_bits / encoded.bound_bits < 1.01
    terms = codec.bound(digits_pipe, digits, num_levels=17, chain=chain)
    standard_error = float(terms.total_b.std()) / len(digits) ** 0.5
    assert encoded.bound_bits / encoded.dims == pytest.approx(float(terms.total_b.mean()), abs=3 * standard_error)


@pytest.mark.integration
def test_every_bit_is_accounted_for(encoded):
    assert encoded.net_bits + encoded.initial_bits + encoded.header_bits == 8 * len(encoded.data)
    assert encoded.file_bpd == 8 * len(encoded.data) / encoded.dims
    assert encoded.header_bits < 8 * 450


@pytest.mark.integration
def test_only_the_first_image_needs_bits_to_begin_with(digits_pipe, digits, chain, encoded):
    """Batches grow with what lies on the stack: 30 images need what one does, give or take a word, not 30 times."""
    first = compress(digits_pipe, digits[:1], num_levels=17, chain=chain)
    assert 2 * first.dims < first.initial_bits < 10 * first.dims
    assert encoded.initial_bits <= first.initial_bits + 32


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_batches_grow_with_what_was_coded(num_images, max_batch):
    sizes = batch_sizes(num_images, max_batch)
    before = np.append(0, np.cumsum(sizes)[:-1])
    assert sum(sizes) == num_images and 1 <= min(sizes) and max(sizes) <= max_batch
    assert all(size <= max(1, done // 3) for size, done in zip(sizes, before.tolist(), strict=True))


# ---- nothing else comes out ----------------------------------------------------------------------------------------


def resigned(data: bytes) -> bytes:
    """With the hash of what it holds, as if it had been written so."""
    rest = data[len(MAGIC) + HASH_BYTES :]
    return MAGIC + hashlib.sha256(rest).digest()[:HASH_BYTES] + rest


def with_header(data: bytes, **changes) -> bytes:
    header, body = codec.read_header(data)
    packed = zlib.compress(json.dumps({**header, **changes}).encode())
    return resigned(MAGIC + bytes(HASH_BYTES) + struct.pack("<I", len(packed)) + packed + body)


def test_every_flipped_bit_is_found(small):
    pipe, levels, data = small
    assert np.array_equal(decompress(pipe, data).levels.numpy(), levels)
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(CodingError, match="damaged|no file of|format"):
            decompress(pipe, bytes(damaged))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 24, 27, 100, -4, -1])
def test_a_file_cut_off_is_found(small, length):
    pipe, _, data = small
    with pytest.raises(CodingError):
        decompress(pipe, data[:length])


@pytest.mark.slow
def test_a_wrong_stack_under_a_right_hash_is_found(small):
    """The hash cannot see a machine that computes other numbers; the checksums of the images can."""
    pipe, _, data = small
    header, body = codec.read_header(data)
    rng, start = np.random.default_rng(0), len(data) - len(body)
    for place in rng.choice(8 * len(body), 8, replace=False).tolist():
        damaged = bytearray(data)
        damaged[start + place // 8] ^= 1 << place % 8
        with pytest.raises(CodingError, match="checksums|cannot be read"):
            decompress(pipe, resigned(bytes(damaged)))


def test_a_network_that_computes_otherwise_is_found(small, monkeypatch):
    pipe, _, data = small
    monkeypatch.setattr(bits_back, "OUTPUT_STEP", 2.0**-9)
    with pytest.raises(CodingError, match="computes the network otherwise"):
        decompress(pipe, data)


def test_another_model_is_refused(small):
    pipe, _, data = small
    others = [tiny_pipe(seed=1), tiny_pipe(variance_type="fixed_large"), tiny_pipe(channels=3)]
    for other in others:
        with pytest.raises(CodingError, match="another model"):
            decompress(other, data)


HOSTILE = [
    {"num_images": 10**12},
    {"num_images": 0},
    {"num_images": 2.0},
    {"num_images": True},
    {"num_images": 2**30},
    {"max_batch": 10**9},
    {"num_levels": 1},
    {"num_levels": 300},
    {"model": 7},
    {"names": ["a.png"]},
    {"names": [1, 2, 3, 4]},
    {"names": 5},
    {"chain": []},
    {"chain": {"inference_timesteps": [0]}},
    {"chain": {"inference_timesteps": [0, 0, 3], "x_start_mse": [1, 1, 1]}},
    {"chain": {"inference_timesteps": [0, 3], "x_start_mse": [1]}},
    {"chain": {"inference_timesteps": [0, 9999], "x_start_mse": [1, 1]}},
    {"chain": {"inference_timesteps": [0, 3], "x_start_mse": ["x", None]}},
    {"chain": {"inference_timesteps": [0, 3], "x_start_mse": [1, 1], "clip_sample": False}},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_hostile_headers_are_errors(small, changes):
    pipe, _, data = small
    with pytest.raises(ValueError):
        decompress(pipe, with_header(data, **changes))


def test_a_header_that_would_take_all_memory_is_refused(small):
    pipe, _, _ = small
    packed = zlib.compress(bytes(2**26 + 1), 1)
    with pytest.raises(CodingError, match="too large"):
        decompress(pipe, resigned(MAGIC + bytes(HASH_BYTES) + struct.pack("<I", len(packed)) + packed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 1, "num_levels=17"),
        (lambda x: x - 17, "num_levels=17"),
        (lambda x: x[0], r"integers \[N"),
        (lambda x: x[:0], r"integers \[N"),
        (lambda x: x / 2.0, r"integers \[N"),
        (lambda x: x[..., :4], "^images are 4×8 grey; this model is for 8×8 grey, and nothing is cropped or resized$"),
    ],
)
def test_other_images_are_refused(small, change, message):
    pipe, levels, _ = small
    levels = np.maximum(levels, 16 * (np.arange(levels.size).reshape(levels.shape) == 0))  # one of the highest level
    with pytest.raises(CodingError, match=message):
        compress(pipe, change(levels), num_levels=17)


def test_other_models_are_refused(tiny_mlp):
    for config in ({"prediction_type": "previous_sample"}, {"variance_type": "learned"}):
        pipe = tiny_pipe(**config)
        with pytest.raises(CodingError, match="cannot be coded"):
            compress(pipe, noise_levels(1, pipe))
    points = DDPMPaperPipeline(tiny_mlp(), DDPMPaperScheduler())
    with pytest.raises(CodingError, match="points"):
        compress(points, np.zeros((1, 2), np.int64))


def test_a_network_gone_wrong_is_refused():
    pipe = tiny_pipe()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(CodingError, match="not finite"):
        compress(pipe, noise_levels(1, pipe))


def test_without_constriction_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    pipe = tiny_pipe()
    with pytest.raises(CodingError, match=r"pip install 'ddpm_hf\[codec\]'"):
        compress(pipe, noise_levels(1, pipe))
