"""How long are the codec's files, beside the bound and beside PNG, WebP, bz2 and others?

    python benchmarks/codec.py --output benchmarks/results/codec.json       # five minutes of one core's time
    python benchmarks/codec.py --num_images 16                              # some of it
    python benchmarks/codec.py --table benchmarks/results/codec.json        # print the tables, renew docs/codec.md

For the digits network and the 360 held-out digits, as their 17 levels and as ordinary PNGs would hold them (256
levels, of which 17 occur), in 25 and 50 steps: the bound, the parts of the file, and CPU time on one thread. Chains
are fitted to 64 of the images, as `ddpm-hf compress` does. Every file is decoded and compared. Then what one image
costs alone, and from how many images on the network's weights would be paid for. Needs the extras `train` and `codec`.
"""

import argparse
import bz2
import importlib.metadata
import io
import lzma
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed import report

from ddpm_hf import DDPMPaperPipeline, codec
from ddpm_hf.data import load_samples
from ddpm_hf.short_chains import choose_timesteps

CHECKPOINT = report.ROOT / "model_cards" / "ddpm-digits"
DOCUMENT = report.ROOT / "docs" / "codec.md"
BLOCK = re.compile(r"(<!-- codec: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
STEPS = (25, 50)
NUM_FITTED_ON = 64
BEST = "bz2, all in one"  # of the classical formats, on these images


def data_sets(num_images: int) -> dict[int, np.ndarray]:
    """The same held-out digits, by number of levels: uint8 [N, 1, 8, 8]."""
    levels = load_samples("digits", split="test").array[:num_images]
    return {17: levels, 256: np.rint(levels * (255 / 16)).astype(np.uint8)}


# ---- the codec -----------------------------------------------------------------------------------------------------


def chains(pipe: DDPMPaperPipeline, levels: np.ndarray, num_levels: int) -> dict[tuple[int, str], dict[str, list]]:
    """By number of steps: those of `codec.fit_chain`, and the sampler's evenly spaced ones with variances as good."""
    some = levels[np.linspace(0, len(levels) - 1, min(len(levels), NUM_FITTED_ON)).astype(int)]
    mse = codec.bound(pipe, some, num_levels=num_levels).x_start_mse_bt.mean(dim=0).numpy()
    scheduler = codec.coding_scheduler(pipe, None)
    found = {}
    for steps in STEPS:
        for name, timesteps in {
            "chosen": choose_timesteps(scheduler.diffusion, mse, steps, num_levels=num_levels),
            "even": scheduler.chain(steps).timesteps,
        }.items():
            errors = [float(f"{value:.3g}") for value in mse[timesteps]]
            found[steps, name] = {"inference_timesteps": timesteps.tolist(), "x_start_mse": errors}
    return found


def parts(encoded: codec.Encoded) -> dict[str, float]:
    """Where the bits of a file went, in bits/dim."""
    bits = {name: getattr(encoded, f"{name}_bits") / encoded.dims for name in ("bound", "net", "initial", "header")}
    return {f"{name}_bpd": value for name, value in bits.items()} | {
        "file_bpd": encoded.file_bpd,
        "file_bytes": len(encoded.data),
    }


def coded(pipe: DDPMPaperPipeline, levels: np.ndarray, num_levels: int, chain: Any) -> dict[str, float]:
    """Parts of the file, and CPU seconds per image. Raises AssertionError unless the images come back."""
    began = time.process_time()
    encoded = codec.compress(pipe, levels, num_levels=num_levels, chain=chain)
    between = time.process_time()
    decoded = codec.decompress(pipe, encoded.data)
    ended = time.process_time()
    if not np.array_equal(decoded.levels.numpy(), levels):
        raise AssertionError("the images did not come back")
    seconds = {"encode_s": (between - began) / len(levels), "decode_s": (ended - between) / len(levels)}
    return parts(encoded) | seconds


def bound(pipe: DDPMPaperPipeline, levels: np.ndarray, num_levels: int, chain: Any) -> dict[str, float]:
    """What `ddpm-hf compress --dry_run` says, and how much of it is L_0."""
    terms = codec.bound(pipe, levels, num_levels=num_levels, chain=chain)
    return {"bpd": terms.total_b.mean().item(), "decoder_bpd": terms.terms_bt[:, 0].mean().item()}


def measure(pipe: DDPMPaperPipeline, levels: np.ndarray, num_levels: int) -> list[dict[str, Any]]:
    """One row for each number of steps."""
    rows, found = [], chains(pipe, levels, num_levels)
    for steps in STEPS:
        chain = found[steps, "chosen"]
        row = {"num_levels": num_levels, "steps": steps, "chain": chain}
        row |= {name: bound(pipe, levels, num_levels, found[steps, name]) for name in ("chosen", "even")}
        row |= coded(pipe, levels, num_levels, chain)
        print(
            f"{num_levels} levels, {steps} steps: bound {row['bound_bpd']:.3f}, net {row['net_bpd']:.3f}, "
            f"file {row['file_bpd']:.3f} bits/dim; {row['encode_s']:.3f} and {row['decode_s']:.3f} s per image",
            flush=True,
        )
        rows.append(row)
    return rows


def alone(pipe: DDPMPaperPipeline, row: Mapping[str, Any], levels: np.ndarray) -> list[dict[str, Any]]:
    """The first image in a file of its own; its chain in the file, and in a checkpoint that was shortened before."""
    shortened = DDPMPaperPipeline(pipe.unet, codec.coding_scheduler(pipe, row["chain"]))
    return [
        {"where": where, **parts(codec.compress(own, levels[:1], num_levels=row["num_levels"], chain=chain))}
        for where, own, chain in (("file", pipe, row["chain"]), ("checkpoint", shortened, None))
    ]


# ---- other formats -------------------------------------------------------------------------------------------------


def saved(pixels: np.ndarray, format: str) -> bytes:
    """An image [H, W] as Pillow's smallest lossless file."""
    stream = io.BytesIO()
    options: dict[str, Any] = {
        "PNG": {"optimize": True},
        "WEBP": {"lossless": True, "quality": 100, "method": 6},
    }[format]
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def mosaic(levels: np.ndarray) -> np.ndarray:
    """All images [N, 1, H, W] as one, in rows that are as many as they are long, as nearly as N allows."""
    num, _, height, width = levels.shape
    rows = max(d for d in range(1, math.isqrt(num) + 1) if num % d == 0)
    tiles = levels.reshape(rows, num // rows, height, width)
    return tiles.transpose(0, 2, 1, 3).reshape(rows * height, -1)


def formats(levels: np.ndarray, num_levels: int) -> dict[str, float]:
    """Bits/dim of what needs no network. Levels are the bytes, or the grey values, as they are."""
    shares = np.bincount(levels.ravel(), minlength=num_levels) / levels.size
    raw = levels.tobytes()
    lengths = {
        "zlib, all in one": len(zlib.compress(raw, 9)),
        BEST: len(bz2.compress(raw, 9)),
        "xz, all in one": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }
    for name, format in (("PNG", "PNG"), ("WebP, lossless", "WEBP")):
        lengths[f"{name}, a file each"] = sum(len(saved(image[0], format)) for image in levels)
        lengths[f"{name}, one mosaic"] = len(saved(mosaic(levels), format))
    return {
        f"all levels alike: log₂ {num_levels}": math.log2(num_levels),
        "entropy of their histogram": float(-sum(share * math.log2(share) for share in shares if share)),
        **{name: 8 * length / levels.size for name, length in lengths.items()},
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def formats_table(results: Mapping[str, Any]) -> str:
    """The codec's files and all others, by their length for 17 levels."""
    lines = {
        name.split(":")[0]: [own, other]
        for (name, own), other in zip(
            results["formats"]["17"].items(), results["formats"]["256"].values(), strict=True
        )
    }
    for steps in STEPS:
        lines[f"**this codec, {steps} steps**"] = [row["file_bpd"] for row in results["rows"] if row["steps"] == steps]
    shown = [[name, *(f"{bpd:.2f}" for bpd in lines[name])] for name in sorted(lines, key=lambda name: lines[name][0])]
    return report.markdown(("bits/dim of the file", "17 levels", "256 levels"), shown)


def parts_table(results: Mapping[str, Any]) -> str:
    header = ("levels", "steps", "predicted", "bound at the coded latents", "net", "initial", "header", "**file**")
    lines = []
    for row in results["rows"]:
        bpd = [row["chosen"]["bpd"], *(row[f"{name}_bpd"] for name in ("bound", "net", "initial", "header", "file"))]
        times = [f"{row[key] * 1e3:.0f} ms" for key in ("encode_s", "decode_s")]
        lines.append([str(row["num_levels"]), str(row["steps"]), *(f"{value:.3f}" for value in bpd), *times])
    return report.markdown((*header, "code an image", "decode"), lines)


def chains_table(results: Mapping[str, Any]) -> str:
    header = ("levels", "steps", "chosen", "of it L_0", "evenly spaced", "of it L_0")
    lines = [
        [str(row["num_levels"]), str(row["steps"])]
        + [f"{row[name][key]:.2f}" for name in ("chosen", "even") for key in ("bpd", "decoder_bpd")]
        for row in results["rows"]
    ]
    return report.markdown(header, lines)


def overheads_table(results: Mapping[str, Any]) -> str:
    names = {"file": "one image alone", "checkpoint": "one image alone, chain in the checkpoint"}
    rows = [{"where": "", **results["rows"][0]}, *results["alone"]]
    lines = [
        [names.get(row["where"], f"all {results['num_images']}"), f"{row['file_bytes']:,}"]
        + [f"{row[f'{part}_bpd']:.2f}" for part in ("file", "net", "initial", "header")]
        for row in rows
    ]
    dims = results["num_images"] * results["dims_per_image"]
    for what, num in (
        (f"in the header of all: checksums of {results['num_batches']} batches", 4 * results["num_batches"]),
        (f"not in any file: {results['num_parameters']:,} weights in float32", 4 * results["num_parameters"]),
    ):
        lines.append([what, f"{num:,}", f"{8 * num / dims:.3g}", "", "", ""])
    return report.markdown(("17 levels, 25 steps", "bytes", "bits/dim", "net", "initial", "header"), lines)


def images_to_pay_for(weight_bits: int, saved_bits: float) -> str:
    """From how many images on weights are less than what they save, in two digits."""
    if saved_bits <= 0:
        return "never"
    return f"{float(f'{weight_bits / saved_bits:.2g}'):,.0f} images"


def weights_table(results: Mapping[str, Any]) -> str:
    """As if more images cost as many bits/dim: net, without what is paid once, against the best of the others."""
    lines, weight_bits = [], 32 * results["num_parameters"]
    for row in results["rows"]:
        other = results["formats"][str(row["num_levels"])][BEST]
        saved_bits = (other - row["net_bpd"]) * results["dims_per_image"]
        lines.append(
            [str(row["num_levels"]), str(row["steps"]), f"{row['net_bpd']:.2f}", f"{other:.2f}"]
            + [f"{saved_bits:.0f}".replace("-", "−"), images_to_pay_for(weight_bits, saved_bits)]
        )
    header = ("levels", "steps", "net", BEST, "bits saved per image", "weights are paid for from")
    return report.markdown(header, lines)


def origin(results: Mapping[str, Any]) -> str:
    load, cores = results["load"], results["machine"]["cores"]
    state = f"{'busy with other work' if load > cores else 'not busy'}, load {load:.1f}"
    return f"(Times are of the CPU, on one thread; the machine was {state}; {report.origin(dict(results))})"


TABLES = {
    "formats": formats_table,
    "parts": parts_table,
    "chains": chains_table,
    "overheads": overheads_table,
    "weights": weights_table,
    "origin": origin,
}


def with_tables(text: str, results: Mapping[str, Any]) -> str:
    """The document with every block `<!-- codec: NAME -->` … `<!-- end -->` made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}", text)


# ---- the script ----------------------------------------------------------------------------------------------------


def measure_all(pipe: DDPMPaperPipeline, num_images: int) -> dict[str, Any]:
    sets, began = data_sets(num_images), report.surroundings()
    began["versions"]["constriction"] = importlib.metadata.version("constriction")
    rows = [row for num_levels, levels in sets.items() for row in measure(pipe, levels, num_levels)]
    return {
        "kind": "codec",
        **began,
        "load": round(os.getloadavg()[2], 1),  # of the last 15 minutes
        "num_images": len(sets[17]),
        "dims_per_image": sets[17][0].size,
        "num_batches": len(codec.batch_sizes(len(sets[17]), codec.MAX_BATCH)),
        "num_parameters": sum(parameter.numel() for parameter in pipe.unet.parameters()),
        "rows": rows,
        "alone": alone(pipe, rows[0], sets[17]),
        "formats": {str(num_levels): formats(levels, num_levels) for num_levels, levels in sets.items()},
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=360, help="the first ones; default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.table:
        results = report.read_json(args.table)
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    else:
        torch.set_num_threads(1)
        results = measure_all(DDPMPaperPipeline.from_pretrained(CHECKPOINT), args.num_images)
        if args.output:
            report.write_json(args.output, results)
    print("\n\n".join(table(results) for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
