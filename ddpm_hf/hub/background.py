"""Uploads beside training: the newest checkpoint, by one thread that training never waits for.

Training deletes checkpoints while they are being uploaded. So each is first kept as a snapshot, in `.uploads/` of the
run: hard links to its files, which nobody changes, and copies of the run's few records, which are written on.
"""

import logging
import os
import shlex
import shutil
import threading
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from ..runs import MANIFEST
from . import publishing
from .uploaded import files_to_upload

logger = logging.getLogger(__name__)

SNAPSHOTS = ".uploads"


def take_snapshot(run: Path, checkpoint: Path, target: Path) -> None:
    """Write into the folder `target` what `hub.publish` uploads of this run and this checkpoint. Raises OSError."""
    for name, path in files_to_upload(run).items():
        if not name.startswith(publishing.MODEL_PARTS):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    # the manifest stays here: the card is made from it
    for name, path in {**files_to_upload(checkpoint), MANIFEST: checkpoint / MANIFEST}.items():
        if name.startswith((*publishing.MODEL_PARTS, MANIFEST)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target / name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, target / name)


class BackgroundUploads:
    """Uploads of a run while it trains, by a daemon thread: it dies with the process, and no signal waits for it.

    The repository is made at once, so that a missing login shows now and not after days. Whatever goes wrong is logged
    in one line and never raised into training, which the Hub can neither stop nor slow down.

    Args:
        run: the run's folder, which no other process may train in.
        repo_id, private: as for `hub.publish`.
    """

    def __init__(self, run: Path, repo_id: str, *, private: bool = False):
        self.run, self.repo_id, self.private = run, repo_id, private
        self._waiting: Path | None = None
        self._finishing = False
        self._changed = threading.Condition()
        shutil.rmtree(run / SNAPSHOTS, ignore_errors=True)  # of a run that was killed
        disable_progress_bars()  # they would tear the one of training
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Path) -> None:
        """Have this checkpoint uploaded, in place of one that still waits; returns at once."""
        snapshot = self.run / SNAPSHOTS / checkpoint.name
        try:
            take_snapshot(self.run, checkpoint, snapshot)
        except OSError as error:
            logger.error("%s is not uploaded: %s; training goes on", checkpoint, error)
            shutil.rmtree(snapshot, ignore_errors=True)
            return
        with self._changed:
            overtaken, self._waiting = self._waiting, snapshot
            self._changed.notify()
        if overtaken is not None:
            shutil.rmtree(overtaken, ignore_errors=True)

    def finish(self) -> str:
        """Wait for what is under way, then upload the finished run and return its page's address.

        Raises ValueError and PublishError as `hub.publish` does, in bounded time.
        """
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._thread.join()
        shutil.rmtree(self.run / SNAPSHOTS, ignore_errors=True)
        return publishing.publish(self.run, self.repo_id, private=self.private)

    def finish_in_one_line(self) -> bool:
        """`finish`, with one line of what became of it; False where it failed, with the command that finishes it."""
        private = " --private" if self.private else ""
        try:
            url = self.finish()
        except (ValueError, OSError) as error:
            command = f"ddpm-hf publish {shlex.quote(str(self.run))} {self.repo_id}{private}"
            logger.error("%s; to upload it later: %s", error, command)
            return False
        logger.info("uploaded to %s", url)
        return True

    def _work(self) -> None:
        try:
            publishing.create(self.repo_id, private=self.private, keep_trying=self._is_newest)
        except publishing.PublishError as error:
            logger.warning("%s; training goes on, and an upload will try again", error)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._finishing)
                snapshot, self._waiting = self._waiting, None
            if snapshot is None or self._finishing:
                return
            self._upload(snapshot)
            shutil.rmtree(snapshot, ignore_errors=True)

    def _upload(self, snapshot: Path) -> None:
        try:
            url = publishing.publish(
                snapshot, self.repo_id, private=self.private, checkpoint=snapshot, keep_trying=self._is_newest
            )
        except (ValueError, OSError) as error:
            logger.error("%s: %s; training goes on", snapshot.name, error)
        else:
            logger.info("%s is uploaded to %s", snapshot.name, url)

    def _is_newest(self) -> bool:
        """Whether nothing newer is to be uploaded: asked after a wait, never during one that the Hub asked for."""
        return self._waiting is None and not self._finishing
