"""One thing in a process of its own, which then reports as a line of JSON.

    python -m speed.alone loading stock|ours FILE CACHE       seconds to the first batch and for the next; peak memory
    python -m speed.alone sampling CONTESTANT FOLDER BATCH    peak memory of two reverse steps of FOLDER's pipelines
    python -m speed.alone training CONTESTANT FOLDER BATCH    peak memory of two training steps of its network

In benchmarks/. Contestants are named as in the tables; FOLDER has pipelines `ours` and `stock`.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def peak_bytes() -> int:
    """The most physical memory that this process has had, in bytes.

    Linux counts it anew for a program that is started, under VmHWM; its ru_maxrss begins with that of the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def loading(side: str, path: str, cache: str) -> dict[str, float]:
    os.environ["HF_DATASETS_CACHE"] = cache
    import datasets

    from ddpm_hf.data import load_samples
    from speed.data import first_and_next, our_batches, our_images, stock_loader

    datasets.disable_progress_bars()

    def batches():  # a generator: nothing is read before its first batch is asked for
        if side == "ours":
            samples = load_samples(path, cache_dir=Path(cache, "decoded"))
            yield from our_images(our_batches(samples), range(1000))
        else:
            yield from stock_loader(datasets.load_dataset("parquet", data_files=path, split="train"))  # type: ignore[arg-type]

    first_s, next_s = first_and_next(batches(), time.process_time)
    return {"first_s": first_s, "next_s": next_s}


def sampling(contestant: str, folder: str, batch: str) -> dict[str, float]:
    """Only what this contestant needs is read, and of what it is made from nothing kept."""
    from diffusers import DDPMPipeline

    from ddpm_hf import DDPMPaperPipeline
    from speed import sampling

    if contestant == sampling.STOCK:
        pipe = DDPMPipeline.from_pretrained(Path(folder, "stock"))
    else:
        ours = DDPMPaperPipeline.from_pretrained(Path(folder, "ours"))
        pipe = sampling.contestant(contestant, ours, release=True)
    sampling.sample(pipe, int(batch), 2)
    return {}


def training(contestant: str, folder: str, batch: str) -> dict[str, float]:
    from speed.training import two_steps

    two_steps(contestant, int(batch), Path(folder, "stock", "unet"))
    return {}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    numbers = {"loading": loading, "sampling": sampling, "training": training}[what](*arguments)
    print(json.dumps({**numbers, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
