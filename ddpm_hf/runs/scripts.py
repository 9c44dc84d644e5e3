"""How a script that trains begins, is stopped, and ends; the scripts have in common what lies around their loops."""

import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..machine import Stopped, StopSignals
from .batches import share_of
from .distillation_options import DistillationOptions
from .options import TrainingOptions
from .watching import how_to_load


def launch(
    work: Callable[[contextlib.ExitStack, StopSignals], None], logger: logging.Logger, *, is_script: bool
) -> None:
    """`work(held, signals)` of a script: what `held` is given stays until then, and a signal ends it in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for client in ("httpx", "httpx2"):  # a line for every request to the Hub
        logging.getLogger(client).setLevel(logging.WARNING)
    with contextlib.ExitStack() as held, StopSignals() as signals:
        try:
            work(held, signals)
        except Stopped as stopped:
            state_of_run = getattr(stopped, "__notes__", [])
            logger.info("%s; the same command goes on", " ".join(["stopped by", stopped.name, *state_of_run]))
            if is_script:  # torch's loader, cut off while it was made, would complain when it is deleted
                sys.unraisablehook = lambda unraisable: None
            raise


def prepare(options: TrainingOptions | DistillationOptions, accelerator: Accelerator, *, make_folder: bool) -> None:
    """What is better known before hours of decoding: that the folder can be made, and that the batch can be shared.

    Raises OSError and ValueError. All processes but the main one are silent from here on.
    """
    if make_folder:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)
    share_of(options.global_batch_size, options.gradient_accumulation_steps, 0, 0, accelerator.num_processes)


def finish(
    options: TrainingOptions | DistillationOptions,
    accelerator: Accelerator,
    signals: StopSignals,
    uploads: Any,
    logger: logging.Logger,
) -> None:
    """Say how the finished model is loaded, and wait for its upload, if any; exit code 4 where only that failed."""
    if accelerator.is_main_process:
        logger.info("done: %s", how_to_load(options))
        with signals.interruptible():
            published = uploads is None or uploads.finish_in_one_line()
        if not published:
            sys.exit(4)
