"""Images → one file, and back exactly: `compress` and `decompress`.

A file consists of 8 bytes of magic, the first 16 bytes of the SHA-256 of all that follows, the length of the header
(4 bytes, little-endian), the header (JSON, deflated), a CRC-32 for each batch of images, and the stack's words. A
flipped bit anywhere is an error, and so is a machine that computes other numbers than the one that wrote the file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipeline_ddpm_paper import CARRIED
from ..pipeline_loading import DDPMPaperPipeline
from .bits_back import CodingChain, CodingError, Stack
from .chains import coding_scheduler
from .images import Decoded, check_levels, not_here
from .limits import LARGEST_BATCH, MAX_BATCH

MAGIC = b"DDPMHF\x00\x01"  # the last byte is the format's version
HASH_BYTES = 16
MAX_HEADER_BYTES, MAX_IMAGES = 2**26, 2**31  # guards against hostile files that would allocate everything


@dataclass(frozen=True)
class Encoded:
    """A coded set of images, and what its bits are spent on; lengths are in bits.

    data: the file.
    dims: how many values were coded, the number of images times C·H·W.
    bound_bits: −log₂ of p(x_0 … x_T) / q(x_1 … x_T | x_0) (Eq. 3) at the very latents that were coded, of the network
        as it is rounded: what an ideal coder would need.
    net_bits: what the images added to the stack.
    initial_bits: what the stack had to contain before; decoding gives it back, but it is in the file.
    header_bits: everything else: magic, hash, header, checksums, and the unused bits of the stack's last word.
    """

    data: bytes
    dims: int
    bound_bits: float
    net_bits: int
    initial_bits: int
    header_bits: int

    @property
    def file_bpd(self) -> float:
        """Bits/dim of the whole file."""
        return 8 * len(self.data) / self.dims


def compress(
    pipe: DDPMPaperPipeline,
    levels: Tensor | np.ndarray,
    *,
    num_levels: int = 256,
    chain: Mapping[str, list] | None = None,
    names: Sequence[str] | None = None,
    max_batch: int = MAX_BATCH,
    micro_batch: int | None = None,
    progress: bool = False,
) -> Encoded:
    """A file of images, from which `decompress` with the same checkpoint restores them exactly.

    Args:
        pipe: a pipeline of images; the device of its network is used (the CPU in place of MPS, which has no float64).
        levels: integers [N, C, H, W] in [0, num_levels), with the network's size and channels.
        num_levels: 256, or 17 for the digits.
        chain: what `fit_chain` returns; by default the scheduler's own, which is costly unless it is `fitted` and
            short.
        names: one per image, stored in the file.
        max_batch: the most images that are coded together. It is stored in the file, as the receiver needs the same.
        micro_batch: how many images the network sees at once, by default all; not stored in the file.
        progress: show a progress bar.

    Raises CodingError for other images and for models that cannot be coded.
    """
    levels = np.asarray(levels)
    steps = CodingChain(pipe, coding_scheduler(pipe, chain), num_levels, micro_batch)
    check_levels(levels, steps.shape, num_levels)
    if names is not None and len(names) != len(levels):
        raise CodingError(f"names: got {len(names)} for {len(levels)} images")
    if not 1 <= max_batch <= LARGEST_BATCH:
        raise CodingError(f"max_batch={max_batch!r} must be an integer in [1, {LARGEST_BATCH}]")
    stack, bound_bits, checksums, first = Stack(), 0.0, [], 0
    with tqdm(total=len(levels), desc="compress", unit="img", disable=not progress) as bar:
        for size in batch_sizes(len(levels), max_batch):
            batch = levels[first : first + size].astype(np.int64)
            bound_bits += steps.encode(stack, batch)
            checksums.append(_checksum(batch))
            first += size
            bar.update(size)
    header = {
        "model": model_hash(pipe),
        "shape": steps.shape,
        "num_levels": num_levels,
        "num_images": len(levels),
        "max_batch": max_batch,
        "chain": None if chain is None else dict(chain),
        "names": None if names is None else list(names),
        "torch": torch.__version__,
    }
    data = _file(header, checksums, stack.words())
    net_bits = stack.coder.num_valid_bits() - 32 * stack.num_supplied
    initial_bits = 32 * (stack.num_supplied - stack.num_unread)
    return Encoded(
        data=data,
        dims=levels.size,
        bound_bits=bound_bits,
        net_bits=net_bits,
        initial_bits=initial_bits,
        header_bits=8 * len(data) - net_bits - initial_bits,
    )


def decompress(
    pipe: DDPMPaperPipeline, data: bytes, *, micro_batch: int | None = None, progress: bool = False
) -> Decoded:
    """The images of a file that `compress` made with the same checkpoint; arguments as there.

    Raises CodingError for a damaged file, for another model, and where this machine does not compute what the sender's
    did: no image comes out that was not put in.
    """
    header, body = read_header(data)
    if header["model"] != (ours := model_hash(pipe)):
        raise CodingError(
            f"the file was made with another model: it names {header['model'][:12]}…, and this is {ours[:12]}…; "
            "give the checkpoint that compressed it"
        )
    sizes = batch_sizes(header["num_images"], header["max_batch"])
    checksums = np.frombuffer(body[: 4 * len(sizes)], dtype="<u4")
    words = np.frombuffer(body[4 * len(sizes) :], dtype="<u4").astype(np.uint32)
    steps = CodingChain(pipe, coding_scheduler(pipe, header["chain"]), header["num_levels"], micro_batch)
    stack, batches = Stack(words), []
    with tqdm(total=header["num_images"], desc="decompress", unit="img", disable=not progress) as bar:
        for size, checksum in zip(reversed(sizes), reversed(checksums.tolist()), strict=True):
            try:
                batches.append(steps.decode(stack, size))
            except (KeyError, CodingError):  # symbols that no sender could have drawn, or output that is not finite
                raise CodingError(_computes_otherwise(header)) from None
            if _checksum(batches[-1]) != checksum:
                raise CodingError(_computes_otherwise(header))
            bar.update(size)
    if not stack.is_back_at_the_start():
        raise CodingError(_computes_otherwise(header))
    levels = np.concatenate(batches[::-1]).astype(np.uint8)
    return Decoded(torch.from_numpy(levels), header["num_levels"], header["names"])


def _computes_otherwise(header: Mapping[str, Any]) -> str:
    return (
        "the images do not have their checksums: this machine computes the network otherwise than the one that wrote "
        f"the file, with torch {header['torch']} (here {torch.__version__})"
    )


# ---- reading -------------------------------------------------------------------------------------------------------


def read_file(file: str) -> bytes:
    """The bytes of a file that `compress` wrote, unchecked. Raises CodingError where there is none, and OSError."""
    path = Path(file)
    if not path.exists():
        raise CodingError(f"{not_here('file', file)}; give one that ddpm-hf compress wrote")
    if path.is_dir():
        raise CodingError(f"{file} is a folder; give a file that ddpm-hf compress wrote")
    return path.read_bytes()


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header, and the bytes after it. Raises CodingError for anything but a whole, unchanged file."""
    start = len(MAGIC) + HASH_BYTES + 4
    if len(data) < start or data[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise CodingError("this is no file of ddpm-hf compress")
    if data[: len(MAGIC)] != MAGIC:
        raise CodingError(f"this file has format {data[len(MAGIC) - 1]}, and this version reads {MAGIC[-1]}")
    rest = data[len(MAGIC) + HASH_BYTES :]
    if hashlib.sha256(rest).digest()[:HASH_BYTES] != data[len(MAGIC) : len(MAGIC) + HASH_BYTES]:
        raise CodingError("the file is damaged: its contents do not have the hash that it begins with")
    try:
        (length,) = struct.unpack("<I", rest[:4])
        header = json.loads(_inflated(data[start : start + length]))
        _check_header(header)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error, zlib.error) as error:
        raise CodingError(f"the file's header cannot be read: {error}") from None
    return header, data[start + length :]


def _inflated(packed: bytes) -> bytes:
    """The header's JSON. Raises ValueError for data that are cut off, and for those that would allocate everything."""
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, MAX_HEADER_BYTES)
    if inflate.unconsumed_tail or not inflate.eof or inflate.unused_data:
        raise ValueError("it is cut off, or too large")
    return data


def _check_header(header: dict[str, Any]) -> None:
    """ValueError, KeyError or TypeError for a header that `compress` would not write."""
    limits = {"num_levels": (2, 256), "num_images": (1, MAX_IMAGES), "max_batch": (1, LARGEST_BATCH)}
    for key, (least, most) in limits.items():
        if type(header[key]) is not int or not least <= header[key] <= most:
            raise ValueError(f"{key}={header[key]!r}")
    names = header["names"]
    if names is not None and (len(names) != header["num_images"] or not all(isinstance(name, str) for name in names)):
        raise ValueError("its names are not one per image")
    for key in ("model", "torch"):
        if not isinstance(header[key], str):
            raise ValueError(f"{key}={header[key]!r}")
    chain = header["chain"]
    if chain is not None and (not isinstance(chain, dict) or chain.keys() != {"inference_timesteps", "x_start_mse"}):
        raise ValueError(f"chain={chain!r}")


# ---- parts of a file -----------------------------------------------------------------------------------------------


def batch_sizes(num_images: int, max_batch: int) -> list[int]:
    """How many images each batch has: a third of the images before it, at least 1 and at most `max_batch`.

    A batch takes its first latents from the bits that the images before it left on the stack, so that only the first
    image needs initial bits. One of the digits takes up to 7 bits/dim from the stack, and leaves 2.
    """
    sizes, done = [], 0
    while done < num_images:
        sizes.append(min(max(1, done // 3), max_batch, num_images - done))
        done += sizes[-1]
    return sizes


# The configuration of our classes when the format began. Keys that came later count only where they change something,
# so that the files from before are decoded.
FIRST_KEYS = {
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_resolutions"),
    *("dropout", "norm_num_groups", "hidden_size", "num_layers"),
    *(
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "variance_type",
        "clip_sample",
    ),
    *("prediction_type", "thresholding", "dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"),
    *("timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "inference_timesteps", "x_start_mse"),
}


def model_hash(pipe: DDPMPaperPipeline) -> str:
    """SHA-256, 64 hex digits, over the network's weights and over its and the scheduler's configuration."""
    digest = hashlib.sha256()
    for component in (pipe.unet, pipe.scheduler):
        config = {key: value for key, value in component.config.items() if not key.startswith("_")}
        if type(component).__name__ in CARRIED:  # ours
            defaults = {name: p.default for name, p in inspect.signature(type(component).__init__).parameters.items()}
            for key in config.keys() - FIRST_KEYS:
                if config[key] == defaults.get(key):
                    del config[key]
        digest.update(json.dumps([type(component).__name__, config], sort_keys=True, default=list).encode())
    for name, tensor in sorted(pipe.unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(batch: np.ndarray) -> int:
    return zlib.crc32(batch.astype(np.uint8).tobytes())


def _file(header: Mapping[str, Any], checksums: Sequence[int], words: np.ndarray) -> bytes:
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    parts = [
        struct.pack("<I", len(packed)),
        packed,
        np.array(checksums, dtype="<u4").tobytes(),
        words.astype("<u4").tobytes(),
    ]
    rest = b"".join(parts)
    return MAGIC + hashlib.sha256(rest).digest()[:HASH_BYTES] + rest
