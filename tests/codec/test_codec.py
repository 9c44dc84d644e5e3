"""The codec: what goes in comes out, bit for bit, elsewhere too; nothing else does; and its length is the bound."""

import copy
import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.special import ndtr

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.cli.commands import main
from ddpm_hf.codec import CodingChain, CodingError, Stack, batch_sizes, bits_back, compress, decompress, files as codec
from ddpm_hf.codec.files import HASH_BYTES, MAGIC
from ddpm_hf.data import load_samples
from ddpm_hf.likelihood import discretized_log_likelihood_nats

CARD = Path(__file__).parents[2] / "model_cards" / "ddpm-digits"
NUM_DIGITS, NUM_STEPS = 30, 25


def tiny_pipe(channels: int = 1, side: int = 8, seed: int = 0, **scheduler) -> DDPMPaperPipeline:
    """Random weights, four steps."""
    torch.manual_seed(seed)
    unet = DDPMPaperUNet(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        attention_resolutions=(side // 2,),
        norm_num_groups=2,
    )
    with torch.no_grad():  # the paper's initialisation leaves its output almost 0
        for parameter in unet.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    config = {"num_train_timesteps": 4, "beta_start": 0.02, "beta_end": 0.9, **scheduler}
    return DDPMPaperPipeline(unet, DDPMPaperScheduler(**config))


def noise_levels(num: int, pipe: DDPMPaperPipeline, num_levels: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_levels, (num, *pipe.sample_shape))


@pytest.fixture(scope="module")
def digits_pipe() -> DDPMPaperPipeline:
    return DDPMPaperPipeline.from_pretrained(CARD)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_samples("digits", split="test").array[:NUM_DIGITS]


@pytest.fixture(scope="module")
def chain(digits_pipe, digits) -> dict:
    """Of few images and steps, where the variances need not be good."""
    return codec.fit_chain(digits_pipe, digits[:1], NUM_STEPS, num_levels=17)


@pytest.fixture(scope="module")
def encoded(digits_pipe, digits, chain) -> codec.Encoded:
    return compress(digits_pipe, digits, num_levels=17, chain=chain)


# ---- what goes in comes out ----------------------------------------------------------------------------------------

CONTENTS = {
    "black": lambda rng, shape, num_levels: np.zeros(shape, np.int64),
    "white": lambda rng, shape, num_levels: np.full(shape, num_levels - 1),
    "noise": lambda rng, shape, num_levels: rng.integers(0, num_levels, shape),
    "black and white": lambda rng, shape, num_levels: rng.integers(0, 2, shape) * (num_levels - 1),
    "flat": lambda rng, shape, num_levels: np.broadcast_to(rng.integers(0, num_levels, shape[:2] + (1, 1)), shape),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    content=st.sampled_from(sorted(CONTENTS)),
    num_images=st.integers(1, 12),
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [{}, {"clip_sample": False}, {"thresholding": True}], ids=lambda clip: str([*clip]))
def test_every_kind_of_chain_comes_back(prediction_type, variance_type, clip):
    pipe = tiny_pipe(prediction_type=prediction_type, variance_type=variance_type, **clip)
    levels = noise_levels(3, pipe)
    assert np.array_equal(decompress(pipe, compress(pipe, levels).data).levels.numpy(), levels)


def test_images_one_by_one_come_back_too(digits_pipe, digits, chain):
    alone = compress(digits_pipe, digits[:9], num_levels=17, chain=chain, max_batch=1)
    assert np.array_equal(decompress(digits_pipe, alone.data, micro_batch=7).levels.numpy(), digits[:9])


def test_a_shortened_checkpoint_brings_its_own_chain(digits_pipe, digits, chain, encoded):
    """Nothing of the chain is in the file then; what is coded is the same."""
    shortened = DDPMPaperPipeline(digits_pipe.unet, codec.coding_scheduler(digits_pipe, chain))
    own = compress(shortened, digits, num_levels=17)
    assert own.net_bits == encoded.net_bits and own.header_bits < encoded.header_bits - 500
    assert np.array_equal(decompress(shortened, own.data).levels.numpy(), digits)
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


def test_files_are_decoded_elsewhere(digits_pipe, digits, chain, tmp_path):
    """In a new process with other threads, micro-batches and kernels than those that coded."""
    few = digits[:4]
    (tmp_path / "digits.ddpm").write_bytes(compress(digits_pipe, few, num_levels=17, chain=chain).data)
    words = [CARD, tmp_path / "digits.ddpm", tmp_path / "levels.npy", json.dumps(ELSEWHERE)]
    patient = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads that spin take minutes where others work too
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *map(str, words)], check=True, env=patient)
    found = np.load(tmp_path / "levels.npy")
    assert len(found) == len(ELSEWHERE) and all(np.array_equal(levels, few) for levels in found)


def test_that_takes_float64_and_rounding(digits_pipe):
    """In float32 other micro-batches give other numbers, rounded or not; in float64 only the rounded ones agree."""
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype, error in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        unet = copy.deepcopy(digits_pipe.unet).to(dtype).eval()
        with torch.no_grad():
            whole = unet(x.to(dtype), 500).sample
            parts = torch.cat([unet(part.to(dtype), 500).sample for part in x.split(1)])
        assert 0 < float((whole - parts).abs().max()) < error
        rounded = [torch.round(output / bits_back.OUTPUT_STEP) for output in (whole, parts)]
        assert torch.equal(*rounded) or dtype == torch.float32


def test_a_float64_network_embeds_t_in_float64():
    """In float32 the angles of t = 999 are off by up to 6e-5, by other amounts where another exp is used."""
    from ddpm_hf.unet.unet_ddpm_paper import TimeEmbedding, sinusoidal_embedding

    t = torch.tensor([999])
    exact = sinusoidal_embedding(t, 128, torch.float64)
    assert 1e-6 < float((sinusoidal_embedding(t, 128).double() - exact).abs().max()) < 1e-4
    embedding = TimeEmbedding(128).double()
    expected = embedding.linear_2(torch.nn.functional.silu(embedding.linear_1(exact)))
    assert torch.equal(embedding(999, torch.zeros(1, dtype=torch.float64)), expected)


# ---- its length ----------------------------------------------------------------------------------------------------


def test_the_length_is_the_bound(digits_pipe, digits, chain, encoded):
    """At most 1 % above the bound at the latents that were coded; some per cent below are possible.

    The bound has densities where the coder has bins one standard deviation wide, whose divergence is smaller. Its mean
    over latents is that of Eq. 5's bound, whose terms are integrals: here within 3 standard errors.
    """
    assert 0.96 < encoded.net_bits / encoded.bound_bits < 1.01
    terms = codec.bound(digits_pipe, digits, num_levels=17, chain=chain)
    standard_error = float(terms.total_b.std()) / len(digits) ** 0.5
    assert encoded.bound_bits / encoded.dims == pytest.approx(float(terms.total_b.mean()), abs=3 * standard_error)


def bin_bits(symbols, low, high, mean, std) -> float:
    """−log₂ of the probabilities of bins of width 1, the outer ones open, summed."""
    below = np.where(symbols == low, -np.inf, (symbols - 0.5 - mean) / std)
    above = np.where(symbols == high, np.inf, (symbols + 0.5 - mean) / std)
    flip = below > 0  # into the lower tail, where the distribution function keeps its digits
    low_end, high_end = np.where(flip, -above, below), np.where(flip, -below, above)
    return float(-np.log2(np.maximum(ndtr(high_end) - ndtr(low_end), 2.0**-24)).sum())


def test_the_coder_wastes_nothing(digits_pipe, digits, chain, monkeypatch):
    """Within 0.2 % and a word of what the bins' probabilities say, push by push and pop by pop."""
    ideal = []
    pop, push = Stack.pop, Stack.push

    def counted_pop(self, low, high, mean, std):
        symbols = pop(self, low, high, mean, std)
        ideal.append(-bin_bits(symbols, low, high, mean, std))
        return symbols

    def counted_push(self, symbols, low, high, mean, std):
        push(self, symbols, low, high, mean, std)
        ideal.append(bin_bits(symbols, low, high, mean, std))

    monkeypatch.setattr(Stack, "pop", counted_pop)
    monkeypatch.setattr(Stack, "push", counted_push)
    encoded = compress(digits_pipe, digits[:12], num_levels=17, chain=chain)
    assert len(ideal) == 2 * NUM_STEPS * len(batch_sizes(12, 64)) + len(batch_sizes(12, 64))
    assert encoded.net_bits == pytest.approx(sum(ideal), rel=0.002, abs=32)


def test_every_bit_is_accounted_for(encoded):
    assert encoded.net_bits + encoded.initial_bits + encoded.header_bits == 8 * len(encoded.data)
    assert encoded.file_bpd == 8 * len(encoded.data) / encoded.dims
    assert encoded.header_bits < 8 * 450


def test_only_the_first_image_needs_bits_to_begin_with(digits_pipe, digits, chain, encoded):
    """Batches grow with what lies on the stack: 30 images need what one does, give or take a word, not 30 times."""
    first = compress(digits_pipe, digits[:1], num_levels=17, chain=chain)
    assert 2 * first.dims < first.initial_bits < 10 * first.dims
    assert encoded.initial_bits <= first.initial_bits + 32


def test_a_finer_grid_gains_nothing_and_needs_more_to_begin_with(digits_pipe, digits, chain, encoded, monkeypatch):
    """A quarter of the step: no shorter by more than chance, and a bit more at least for each of the first latents."""
    initialise = CodingChain.__init__

    def finer(self, *args):
        initialise(self, *args)
        self.grid = [step / 4 for step in self.grid]

    monkeypatch.setattr(CodingChain, "__init__", finer)
    fine = compress(digits_pipe, digits, num_levels=17, chain=chain)
    assert fine.net_bits > 0.97 * encoded.net_bits
    assert fine.initial_bits > encoded.initial_bits + 64


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_batches_grow_with_what_was_coded(num_images, max_batch):
    sizes = batch_sizes(num_images, max_batch)
    before = np.append(0, np.cumsum(sizes)[:-1])
    assert sum(sizes) == num_images and 1 <= min(sizes) and max(sizes) <= max_batch
    assert all(size <= max(1, done // 3) for size, done in zip(sizes, before.tolist(), strict=True))


# ---- the stack -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.floats(0.3, 50), st.sampled_from([1.0, 30.0, 1e3, 1e6, 5e8]))
def test_latents_come_back_however_far_from_their_mean(seed, std, spread):
    rng = np.random.default_rng(seed)
    mean, values = rng.normal(0, 100, (3, 20)), np.rint(rng.normal(0, spread, (3, 20))).astype(np.int64)
    stack = Stack(np.arange(1, 9, dtype=np.uint32))
    stack.push_latent(values, mean, std)
    assert np.array_equal(stack.pop_latent(mean, std), values)
    assert np.array_equal(stack.coder.get_compressed(), np.arange(1, 9))


def test_values_beyond_all_reason_are_refused():
    with pytest.raises(CodingError, match="far from anything"):
        Stack().push_latent(np.array([2**33]), np.array([0.0]), 1.0)


def test_drawing_takes_bits_that_returning_gives_back():
    """A sender draws from the endless supply; what was never read is not sent."""
    stack = Stack()
    mean = np.random.default_rng(0).normal(0, 10, 1000)
    values = stack.draw_latent(mean, 2.0)
    offsets = (values - mean) / 2
    assert abs(offsets.mean()) < 0.1 and abs(offsets.std() - 1) < 0.1  # 3 standard errors of 1,000 draws
    receiver = Stack(stack.words())
    assert len(stack.words()) < 20 and stack.num_unread > 500
    receiver.return_latent(values, mean, 2.0)
    assert receiver.is_back_at_the_start() and not Stack(np.arange(1, 9, dtype=np.uint32)).is_back_at_the_start()


@pytest.mark.parametrize("std", [0.02, 0.5, 3.0])
@pytest.mark.parametrize("mean", [-1.0, -0.4, 0.99])
def test_the_coder_s_intervals_are_those_of_the_paper_s_decoder(mean, std):
    """constriction's outer bins are open, as Eq. 13 has them: checked by the length of a thousand symbols each."""
    for level in (0, 8, 16):
        x = torch.tensor([level / 8 - 1.0], dtype=torch.float64)
        nats = -discretized_log_likelihood_nats(x, torch.full_like(x, mean), 2 * np.log(std), num_levels=17)
        bits = float(nats) / np.log(2)
        stack = Stack(np.arange(1, 9, dtype=np.uint32))
        before = stack.coder.num_valid_bits()
        stack.push(np.full(1000, level), 0, 16, np.full(1000, (mean + 1) * 8), std * 8)
        length = (stack.coder.num_valid_bits() - before) / 1000
        assert length == pytest.approx(min(bits, 24), rel=0.01, abs=0.002)  # 24 bits are the longest code there is


# ---- nothing else comes out ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[DDPMPaperPipeline, np.ndarray, bytes]:
    pipe = tiny_pipe()
    levels = noise_levels(4, pipe, 17)
    return pipe, levels, compress(pipe, levels, num_levels=17, names=["a.png", "b.png", "c.jpg", "d/e.png"]).data


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


def test_a_wrong_stack_under_a_right_hash_is_found(small):
    """What the hash cannot see, a machine that computes otherwise: the checksums of the images do."""
    pipe, _, data = small
    header, body = codec.read_header(data)
    rng, start = np.random.default_rng(0), len(data) - len(body)
    for place in rng.choice(8 * len(body), 60, replace=False).tolist():
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
    packed = zlib.compress(bytes(2**28))
    with pytest.raises(CodingError, match="too large"):
        decompress(pipe, resigned(MAGIC + bytes(HASH_BYTES) + struct.pack("<I", len(packed)) + packed))


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
    told = capsys.readouterr().out
    assert ": 3 images, " in told and "net" in told and "initial" in told
    main(["decompress", tiny_checkpoint, str(tmp_path / "x" / "file"), "-o", str(tmp_path / "back")])
    assert capsys.readouterr().out == f"3 images in {tmp_path / 'back'}; every batch has its checksum\n"
    found = {path.relative_to(tmp_path / "back").as_posix(): path for path in (tmp_path / "back").rglob("*.*")}
    assert set(found) == {"b.png", "a.webp.png", "sub/c.png"}
    for name, image in pixels.items():
        with Image.open(found[name if name.endswith("png") else f"{name}.png"]) as opened:
            assert np.array_equal(np.asarray(opened), image)


def test_a_data_set_comes_back_as_levels_or_pictures(digits_pipe, tmp_path, capsys, monkeypatch):
    """Of the digits few, and for the chain one, to be quick."""
    few = load_samples("digits", split="test").array[:5]
    monkeypatch.setattr(codec, "read_images", lambda images, split, skip: (few, 17, None))
    file = str(tmp_path / "digits.ddpm")
    main(["compress", str(CARD), "digits", "-o", file, "--fit_images", "1"])
    capsys.readouterr()
    main(["decompress", str(CARD), file, "-o", str(tmp_path / "levels.npy"), "--micro_batch", "2"])
    assert np.array_equal(np.load(tmp_path / "levels.npy"), few)
    main(["decompress", str(CARD), file, "-o", str(tmp_path / "pictures")])
    with Image.open(tmp_path / "pictures" / "00003.png") as picture:
        assert np.array_equal(np.rint(np.asarray(picture) / 255 * 16), few[3, 0])


def test_images_of_a_data_set_are_its_levels():
    levels, num_levels, names = codec.read_images("digits")
    assert levels.shape == (360, 1, 8, 8) and num_levels == 17 and names is None and levels.max() == 16
    with pytest.raises(CodingError, match="points"):
        codec.read_images("moons")


def test_one_image_is_told_as_one(tiny_checkpoint, tmp_path, capsys):
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
    told = capsys.readouterr().out
    main([*with_output, "--dry_run"])
    assert capsys.readouterr().out == told and sorted(tmp_path.rglob("*")) == before
    main(with_output)
    net = float(capsys.readouterr().out.split("net ")[1].split()[0])
    assert net == pytest.approx(float(told.split()[0]), rel=0.05)  # 3 images of 192 values, and other noise
    main([*with_output, "--dry_run"])
    assert capsys.readouterr().out == told


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
    told = refused(capsys, "compress", tiny_checkpoint, photos, *words, file, "--skip_bad_images", 1)
    assert "2 bad images: a.png: " in told and "; z.png: " in told and "skip_bad_images=1 allows no more" in told
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
    monkeypatch.setattr(codec, "load_samples", lambda name, **options: load_samples(table, **options))
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
    """It was shortened for its own; the message of before spoke of x_start_mse."""
    pipe = DDPMPaperPipeline.from_pretrained(tiny_checkpoint)
    chain = codec.fit_chain(pipe, noise_levels(2, pipe), 5)
    DDPMPaperPipeline(pipe.unet, codec.coding_scheduler(pipe, chain)).save_pretrained(tmp_path / "short")
    write_photos(tmp_path)
    told = refused(capsys, "compress", tmp_path / "short", tmp_path / "b.png", "--dry_run", "--steps", 3)
    assert "--steps 3: " in told and "shortened before" in told and "leave out --steps" in told


def test_digits_without_scikit_learn_ask_for_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(CodingError, match=r"digits needs scikit-learn: pip install 'ddpm_hf\[codec\]'"):
        codec.read_images("digits")


def test_without_datasets_a_missing_folder_is_told_as_missing(monkeypatch, tmp_path):
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
    told = refused(capsys, "compress", CARD, photos, "-o", tmp_path / "f")
    assert "a.webp is 8×8 in colour; this model is for 8×8 grey, and nothing is cropped" in told
    Image.new("L", (9, 7)).save(photos / "z.png")
    told = refused(capsys, "compress", tiny_checkpoint, photos, "-o", tmp_path / "f")
    assert "z.png is 9×7 grey and a.webp 8×8 in colour; all must be alike" in told
    Image.new("RGB", (500, 300)).save(tmp_path / "wide.png")
    told = refused(capsys, "compress", tiny_checkpoint, tmp_path / "wide.png", "-o", tmp_path / "f")
    assert "wide.png is 500×300 in colour; this model is for 8×8 in colour" in told
    (photos / "z.png").write_bytes(b"\x89PNG")
    assert "z.png: " in refused(capsys, "compress", tiny_checkpoint, photos, "-o", tmp_path / "f")
    for option, value in (("--steps", 0), ("--steps", 21), ("--max_batch", 0), ("--fit_images", 0)):
        assert refused(capsys, "compress", tiny_checkpoint, photos / "b.png", "-o", tmp_path / "f", option, value)
    assert refused(capsys, "decompress", tiny_checkpoint, file, "-o", tmp_path / "new", "--micro_batch", 0)
    assert not (tmp_path / "new").exists() and not (tmp_path / "f").exists()
