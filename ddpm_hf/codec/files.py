"""The variational bound as a file: a lossless image codec. Experimental; needs the extra `codec`.

It is proof and teaching, not a practical compressor: it is slow, and for few or small images other formats win
(docs/codec.md). How it codes: `bits_back`.

A file: 8 bytes of magic, the first 16 of the SHA-256 of all the rest, the length of the header (4, little-endian), the
header (JSON, deflated), a CRC-32 for each batch of images, and the stack. A flipped bit anywhere is an error, and so
is a machine that computes otherwise than the one that wrote the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
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

from ..data import to_model_range
from ..likelihood import BoundTerms, bits_per_dim
from ..pipeline_ddpm_paper import DDPMPaperPipeline
from ..scheduler import DDPMPaperScheduler, paper_scheduler
from ..short_chains import shortened
from .bits_back import CodingChain, CodingError, Stack
from .images import Decoded, _not_here, check_levels

logger = logging.getLogger(__name__)

MAGIC = b"DDPMHF\x00\x01"  # the last byte is the format's version
HASH_BYTES = 16
MAX_BATCH, LARGEST_BATCH = 64, 4096  # images coded together
MAX_HEADER, MAX_IMAGES = 2**26, 2**31  # in bytes, and a number: more is no file of ours


@dataclass(frozen=True)
class Encoded:
    """A coded set of images, and where its bits went. Lengths in bits; dims is the number of all values coded.

    data: the file.
    dims: number of images times C·H·W.
    bound_bits: −log₂ of p(x_0 … x_T) / q(x_1 … x_T | x_0) (Eq. 3) at the very latents that were coded, of the network
        as it is rounded: what an ideal coder would need.
    net_bits: what the images added to the stack.
    initial_bits: what the stack had to hold before, which comes back when the file is decoded, but is in the file.
    header_bits: everything else: magic, hash, header, checksums, and what is unused of the stack's last word.
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


def batch_sizes(num_images: int, max_batch: int) -> list[int]:
    """How many images are coded together: a third of those before, from 1 on, but `max_batch` at most.

    A batch takes its first latents from what the images before it left on the stack, so that only the first image
    needs bits that are not there: those of the digits take 7 bits/dim at the deepest, and leave 2.
    """
    sizes, done = [], 0
    while done < num_images:
        sizes.append(min(max(1, done // 3), max_batch, num_images - done))
        done += sizes[-1]
    return sizes


def read_file(file: str) -> bytes:
    """What `compress` wrote there, not looked into. Raises CodingError where there is no file; OSError."""
    path = Path(file)
    if not path.exists():
        raise CodingError(f"{_not_here('file', file)}; give one that ddpm-hf compress wrote")
    if path.is_dir():
        raise CodingError(f"{file} is a folder; give a file that ddpm-hf compress wrote")
    return path.read_bytes()


# ---- files ---------------------------------------------------------------------------------------------------------


def model_hash(pipe: DDPMPaperPipeline) -> str:
    """64 hex digits over the network's weights and all that its and the scheduler's configuration say."""
    digest = hashlib.sha256()
    for component in (pipe.unet, pipe.scheduler):
        config = {key: value for key, value in component.config.items() if not key.startswith("_")}
        digest.update(json.dumps([type(component).__name__, config], sort_keys=True, default=list).encode())
    for name, tensor in sorted(pipe.unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fit_chain(
    pipe: DDPMPaperPipeline,
    levels: Tensor | np.ndarray,
    num_steps: int,
    *,
    num_levels: int = 256,
    progress: bool = False,
) -> dict[str, list]:
    """`num_steps` timesteps for images like these, and the variances there, for `compress` to put into the file.

    What `ddpm-hf shorten` makes of training data; here of `levels` [N, C, H, W], which go through the whole chain
    once, so some dozens must do. Numbers have three digits. Raises ValueError as `shortened` does.
    """
    terms = bound(pipe, levels, num_levels=num_levels, progress=progress)
    short = shortened(pipe.scheduler, terms.x_start_mse_bt.mean(dim=0), num_steps=num_steps, num_levels=num_levels)
    mse = [float(f"{value:.3g}") for value in short.config["x_start_mse"]]
    return {"inference_timesteps": list(short.config["inference_timesteps"]), "x_start_mse": mse}


def bound(
    pipe: DDPMPaperPipeline,
    levels: Tensor | np.ndarray,
    *,
    num_levels: int = 256,
    chain: Mapping[str, list] | None = None,
    progress: bool = False,
) -> BoundTerms:
    """The bound (Eq. 5) of images under the chain that codes them: what to expect of `compress`, much sooner."""
    scheduler = coding_scheduler(pipe, chain)
    x_start, clip = to_model_range(torch.tensor(np.asarray(levels)), num_levels), scheduler.clip_denoised()
    return bits_per_dim(
        pipe.unet, scheduler, x_start, seed=0, num_levels=num_levels, clip_denoised=clip, progress=progress
    )


def coding_scheduler(pipe: DDPMPaperPipeline, chain: Mapping[str, Any] | None) -> DDPMPaperScheduler:
    """The pipeline's scheduler, with the timesteps and variances of `chain` where there is one."""
    scheduler = paper_scheduler(pipe.scheduler)
    if chain is None:
        return scheduler
    short: Any = DDPMPaperScheduler.from_config(scheduler.config, variance_type="fitted", **chain)
    return short


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
    """Images as a file, from which `decompress` with the same checkpoint gets them back exactly.

    Args:
        pipe: a pipeline of images; the device of its network is used (the CPU in place of MPS, which has no float64).
        levels: integers [N, C, H, W] in [0, num_levels), of the size and channels that the network is for.
        num_levels: 256, or 17 for the digits.
        chain: of `fit_chain`; by default the scheduler's own, which costs much where it is not `fitted` and short.
        names: one per image, put into the file.
        max_batch: images coded together, at most. It is in the file, for the receiver needs the same.
        micro_batch: images that the network sees at once, by default all; not in the file.
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
    stack, bound, checksums, first = Stack(), 0.0, [], 0
    with tqdm(total=len(levels), desc="compress", unit="img", disable=not progress) as bar:
        for size in batch_sizes(len(levels), max_batch):
            batch = levels[first : first + size].astype(np.int64)
            bound += steps.encode(stack, batch)
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
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    words = stack.words()
    rest = b"".join(
        [
            struct.pack("<I", len(packed)),
            packed,
            np.array(checksums, dtype="<u4").tobytes(),
            words.astype("<u4").tobytes(),
        ]
    )
    data = MAGIC + hashlib.sha256(rest).digest()[:HASH_BYTES] + rest
    net_bits = stack.coder.num_valid_bits() - 32 * stack.num_supplied
    initial_bits = 32 * (stack.num_supplied - stack.num_unread)
    return Encoded(
        data=data,
        dims=levels.size,
        bound_bits=bound,
        net_bits=net_bits,
        initial_bits=initial_bits,
        header_bits=8 * len(data) - net_bits - initial_bits,
    )


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What a file says about itself, and what follows. Raises CodingError for anything but a whole, unchanged file."""
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


def decompress(
    pipe: DDPMPaperPipeline, data: bytes, *, micro_batch: int | None = None, progress: bool = False
) -> Decoded:
    """The images of a file that `compress` made with the same checkpoint; arguments as there.

    Raises CodingError for a damaged file, another model, and where this machine does not compute what the sender's
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
            except (KeyError, CodingError):  # symbols that nothing could have drawn, or a network beyond all numbers
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


def _checksum(batch: np.ndarray) -> int:
    return zlib.crc32(batch.astype(np.uint8).tobytes())


def _inflated(packed: bytes) -> bytes:
    """Raises ValueError for what would take all memory."""
    inflate = zlib.decompressobj()
    data = inflate.decompress(packed, MAX_HEADER)
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
