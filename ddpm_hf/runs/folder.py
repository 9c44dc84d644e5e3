"""The folder of a run: whose it is, where the run goes on, and what is saved in it."""

import contextlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import Samples
from ..machine import replaced
from . import checkpoints
from .data_files import DATA_FILES, changed_files, write_data_files
from .log import cut_metrics, drop_pictures
from .options import option_defaults
from .records import read_json
from .state import TrainingState

logger = logging.getLogger(__name__)


class RunFolder:
    """A run's folder, which is this run's alone while the context lasts.

        with RunFolder("runs/mine", accelerator, manifest) as folder:
            folder.resume(state)
            …
            folder.save(state, scheduler)
            folder.export()

    Args:
        path: made where it does not exist.
        accelerator: over all processes, each of which calls the same; the main one writes.
        manifest: what the run is, JSON: `world_size`, `options`, `environment` and `dataset` (`run_manifest`).
        resume: "latest", "never", or the checkpoint to go on from.
        free: names of options that may differ from those of the checkpoint.
        allow_changes: go on although others differ, with a warning: True, or the names of those that may.
        keep_checkpoints: how many to keep, at least 2.
        samples: what is trained on; a list of its files is kept, so that a refusal can name those that changed.

    On entering it decides where to go on, once for all processes: `checkpoint`, None for a new run. Raises ValueError
    where another process is in the folder, or a checkpoint belongs to another run.
    """

    def __init__(
        self,
        path: str | Path,
        accelerator: Accelerator,
        manifest: Mapping[str, Any],
        *,
        resume: str = "latest",
        free: Collection[str] = (),
        allow_changes: bool | Collection[str] = False,
        keep_checkpoints: int = 2,
        samples: Samples | None = None,
    ):
        self.path, self.accelerator, self.manifest = Path(path), accelerator, manifest
        self.resume_from, self.free, self.allow_changes = resume, free, allow_changes
        self.keep_checkpoints, self.samples = keep_checkpoints, samples
        self.checkpoint: Path | None = None
        self._held = contextlib.ExitStack()

    @property
    def checkpoints(self) -> Path:
        """The folder of `step-N` folders."""
        return self.path / "checkpoints"

    def __enter__(self) -> "RunFolder":
        decision: list[Any] = [None, None]  # checkpoint, error: made once, so that all processes do the same
        if self.accelerator.is_main_process:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(checkpoints.exclusive(self.path))
                samples = self.samples
                decision[0] = checkpoints.to_resume(
                    self.checkpoints,
                    self.resume_from,
                    self.manifest,
                    free=self.free,
                    allow_changes=self.allow_changes,
                    defaults=option_defaults(),
                    changed_data=None if samples is None else lambda run: changed_files(run, samples),
                )
            except (ValueError, OSError) as error:
                decision[1] = str(error)
        broadcast_object_list(decision)
        self.checkpoint, error = decision
        if error is not None:
            self._held.close()
            raise ValueError(error)
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def resume(self, state: TrainingState, *, options: str | None = None) -> None:
        """Bring `state` to where the checkpoint left it. What a run left after that step is moved aside or cut off.

        `options`, the text of options.yaml, is written last: a checkpoint of another network is refused before.
        """
        if self.checkpoint is not None:
            state.restore(self.checkpoint)
            logger.info("resuming at step %d, from %s", state.step, self.checkpoint)
        if self.accelerator.is_main_process:
            checkpoints.move_aside(self.checkpoints, state.step if self.checkpoint else -1)
            if self.checkpoint is None:
                checkpoints.move_away(self.path / "stages")
            cut_metrics(self.path / "metrics.jsonl", state.step)
            drop_pictures(self.path / "samples", state.step)
            if self.samples is not None and not self._has_data_files():
                write_data_files(self.path, self.samples)
            if options is not None:
                with replaced(self.path / "options.yaml") as temporary:
                    temporary.write_text(options, encoding="utf-8")

    def _has_data_files(self) -> bool:
        """Whether the list of files is there, and is that of this data."""
        if self.checkpoint is None or not (self.path / DATA_FILES).exists():
            return False
        then = read_json(self.checkpoint / checkpoints.MANIFEST)
        return then["dataset"]["fingerprint"] == self.manifest["dataset"]["fingerprint"]

    def save(self, state: TrainingState, scheduler: Any) -> None:
        """Write a checkpoint of this step, on the main process, and delete the oldest. Raises OSError."""
        if self.accelerator.is_main_process:
            self.checkpoint = state.save(self.checkpoints, scheduler, self.manifest)
            checkpoints.prune(self.checkpoints, self.keep_checkpoints)

    def export(self, into: str = "") -> None:
        """Copy the newest checkpoint's pipeline to the folder itself, or to a folder in it, on the main process.

        Raises OSError.
        """
        if self.accelerator.is_main_process and self.checkpoint is not None:
            checkpoints.export_pipeline(self.checkpoint, self.path / into)
