"""Crash-safe training checkpoints: write, verify, find, prune, export.

A checkpoint `checkpoints/step-N/` is a pipeline that `from_pretrained` loads (EMA weights), plus `train_state/`:

    model.safetensors, ema.safetensors, optimizer.safetensors    tensors by parameter name
    state.json                                                   what else training needs to go on
    manifest.json                                                step, options, data, and the sha256 of every file,
                                                                 its own, without that line, included

It is written into a temporary folder beside its place, flushed to disk, and appears under its name by one rename;
older ones are deleted only after that. So at every moment, also after a power cut, the newest `step-N` is whole.
Nothing here is ever pickled. Only one process may write.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..machine import TEMPORARY, put_in_place, replaced
from .options import SHAPES

logger = logging.getLogger(__name__)

STATE = "train_state"
MANIFEST = f"{STATE}/manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is not what was written; the message names the file."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(_json(content), encoding="utf-8")


def _manifest_sha256(text: str, stated: str) -> str:
    """The sha256 of a manifest's text without the entry in which it states its own, `stated`."""
    return hashlib.sha256(text.replace(f'"{MANIFEST}": "{stated}"', "").encode()).hexdigest()


def _delete(path: Path) -> None:
    """Delete the file, link or folder of this name, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Inside, no other run can enter the folder `run`. Raises ValueError naming the process that is in it.

    The kernel keeps the lock and releases it however a process ends, so nothing is left to clean up after a crash.
    A file system without locks gives a warning instead.
    """
    import fcntl  # POSIX only, and who samples or converts elsewhere does not need it

    with (run / ".in_use").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{run} is in use by {file.read()}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:  # some network file systems
            logger.warning("%s cannot be locked (%s): see to it that no other run enters it", run, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def write(
    folder: Path,
    step: int,
    *,
    save_pipeline: Callable[[Path], None],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> Path:
    """Write `folder/step-N` so that it is either whole or absent, and return it.

    `save_pipeline(path)` writes the pipeline; `tensors` maps file names (without suffix) to tensors; `state` and
    `manifest` are JSON. A `step-N` that is there already is replaced. Raises OSError, with the bytes needed and free,
    where it cannot be written, most often because the disk is full; earlier checkpoints are as they were.
    """
    target, temporary = folder / f"step-{step}", folder / f"{TEMPORARY}step-{step}"
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    needed += sum(tensor.nbytes for tensor in tensors.get("ema", {}).values())  # which the pipeline has too
    try:
        _delete(temporary)
        (temporary / STATE).mkdir(parents=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_files(temporary, step, save_pipeline, tensors, state, manifest)
        put_in_place(temporary, target, durable=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise OSError(
            f"{target} cannot be written ({error}): it needs {needed:,} bytes, and {free:,} are free. Earlier "
            "checkpoints are untouched; make room, then the same command goes on from the newest"
        ) from error
    return target


def _write_files(
    temporary: Path,
    step: int,
    save_pipeline: Callable[[Path], None],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """All files of a checkpoint, the manifest last."""
    save_pipeline(temporary)
    for name, group in tensors.items():
        contiguous = {key: tensor.detach().contiguous() for key, tensor in group.items()}
        save_file(contiguous, temporary / STATE / f"{name}.safetensors")
    _write_json(temporary / STATE / "state.json", state)
    files = {name: _sha256(temporary / name) for name in _files(temporary)}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {**manifest, "step": step, "created_utc": created, "files": {**files, MANIFEST: ""}}
    content["files"][MANIFEST] = _manifest_sha256(_json(content), "")
    _write_json(temporary / MANIFEST, content)


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(f"{path} is corrupt: sha256 {found}, its manifest says {expected}")


def verify(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's manifest, after comparing every file with it; CheckpointError names the first that differs."""
    path = checkpoint / MANIFEST
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        files = manifest["files"] = dict(manifest["files"])
        if not files:
            raise ValueError("it lists no files")
        int(manifest["step"])
        present = set(_files(checkpoint))
        own = files.pop(MANIFEST, None)  # older checkpoints have none
        if own is not None:
            _compare(path, _manifest_sha256(text, own), own)
        for name, expected in files.items():
            path = checkpoint / name
            if name not in present:
                raise CheckpointError(f"{path} is missing")
            _compare(path, _sha256(path), expected)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return manifest


def found_in(folder: Path, *, quiet: bool = False) -> list[tuple[int, Path]]:
    """(step, path) of every `step-N` in the folder, newest step first. Others are left alone, with a warning."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
        elif quiet:
            continue
        elif path.name.startswith(TEMPORARY):
            logger.warning("ignoring incomplete %s", path)
        else:
            logger.warning("ignoring %s: not a checkpoint", path)
    return sorted(found, reverse=True)


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest, or None. A warning names each that does not."""
    for _, path in found_in(folder):
        try:
            return path, verify(path)
        except CheckpointError as error:
            logger.warning("ignoring %s: %s", path, error)
    return None


def changes(
    then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str], defaults: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """How two manifests differ, as readable lines: by option, and by `num_processes`, `data` and `labels`.

    Those named in `free` are left out. An option that did not exist when the older one was written, and is off or has
    its default value, is no difference.
    """
    known, defaults = then["options"], defaults or {}
    off = {name: (False, defaults.get(name)) for name in now["options"].keys() - known.keys()}
    options = {name: value for name, value in now["options"].items() if value not in off.get(name, ())}
    pairs = {name: (name, then["options"].get(name), value) for name, value in options.items()}
    pairs["num_processes"] = "number of processes", then["world_size"], now["world_size"]
    pairs["data"] = "data (sha256)", then["dataset"]["fingerprint"], now["dataset"]["fingerprint"]
    pairs["labels"] = "labels (sha256)", then["dataset"].get("labels"), now["dataset"].get("labels")
    return {
        name: f"{called} was {before!r}, is {after!r}"
        for name, (called, before, after) in pairs.items()
        if before != after and name not in free
    }


def to_resume(
    folder: Path,
    resume: str,
    manifest: Mapping[str, Any],
    *,
    free: Collection[str],
    allow_changes: bool | Collection[str],
    changed_data: Callable[[Path], str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    `resume` is "latest" (the newest good one), "never", or a checkpoint's path. Raises ValueError where it was written
    by a run whose mathematics differ from `manifest`, unless `allow_changes` says True or names all that differs,
    which warns instead; CheckpointError where a path given does not verify. `changed_data(run)` may tell how the data
    differ from those of a run's folder; `defaults` are those of all options.
    """
    if resume == "never":
        return None
    if resume == "latest":
        found = newest_good(folder)
        if found is None:
            return None
        path, then = found
    else:
        path = Path(resume)
        then = verify(path)
    differences = changes(then, manifest, free, defaults)
    if changed_data is not None and "data" in differences:
        phrase = changed_data(path.parent.parent)
        differences["data"] += f"; of the files {phrase}" if phrase else ""
    allowed = differences if allow_changes is True else allow_changes or ()
    refused = [line for name, line in differences.items() if name not in allowed]
    if refused:
        if not differences.keys().isdisjoint(SHAPES):
            raise ValueError(
                f"{path} was written by another run: {'; '.join(refused)}. Give the old values or another "
                "--output_dir; another network cannot go on from these weights"
            )
        raise ValueError(
            f"{path} was written by another run: {'; '.join(refused)}. Give the old values or another "
            f"--output_dir, or pass --allow_changes {','.join(differences)} to go on all the same"
        )
    for difference in differences.values():
        logger.warning("resuming although %s", difference)
    return path


def move_aside(folder: Path, step: int) -> None:
    """Move the checkpoints after `step`, which a run that starts there will not continue, to `folder.1`, `.2`, …

    They are damaged, or of another run; left in place, they would be taken for the newest.
    """
    newer = [path for found, path in found_in(folder, quiet=True) if found > step]
    if newer:
        place = _free_name(folder)
        place.mkdir()
        for path in newer:
            path.rename(place / path.name)
        logger.warning("%d checkpoints after step %d are now in %s", len(newer), max(step, 0), place)


def move_away(folder: Path) -> None:
    """Move a folder of another run to a free name beside it, if it is there."""
    if folder.is_dir():
        place = folder.rename(_free_name(folder))
        logger.warning("%s of an earlier run is now %s", folder.name, place)


def _free_name(folder: Path) -> Path:
    return next(p for n in itertools.count(1) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())


def read(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors written as `name`, on the CPU. Raises CheckpointError."""
    path = checkpoint / STATE / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def has(checkpoint: Path, name: str) -> bool:
    """Whether there are tensors written as `name`."""
    return (checkpoint / STATE / f"{name}.safetensors").is_file()


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE / "state.json").read_text(encoding="utf-8"))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` (at least 2), and what interrupted saves left. Call it after `write`.

    What cannot be deleted is named in a warning, and left to the next call: no reason to stop training.
    """
    leftovers = [(path, path) for path in folder.glob(f"{TEMPORARY}*")]
    # Renamed first: a checkpoint that is being deleted must not be taken for one that is whole.
    superseded = [
        (path, path.with_name(f"{TEMPORARY}{path.name}")) for _, path in found_in(folder, quiet=True)[max(2, keep) :]
    ]
    for path, hidden in leftovers + superseded:
        try:
            if path != hidden:
                path.rename(hidden)
            _delete(hidden)
        except OSError as error:
            logger.warning("%s cannot be deleted (%s); it will be tried again after the next save", path, error)


def export_pipeline(checkpoint: Path, run: Path) -> None:
    """Copy the checkpoint's pipeline to the run's root; `model_index.json` comes last and says that it is whole.

    Raises OSError, with both paths, where that fails; the checkpoint is as it was.
    """
    names = [name for name in _files(checkpoint) if not name.startswith(f"{STATE}/")]
    try:
        for name in sorted(names, key=lambda name: name == "model_index.json"):
            target = run / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced(target, durable=True) as temporary:
                shutil.copyfile(checkpoint / name, temporary)
    except OSError as error:
        free = shutil.disk_usage(run).free
        raise OSError(
            f"{checkpoint} cannot be copied to {run} ({error}), where {free:,} bytes are free. The checkpoint is "
            "untouched; make room, then the same command copies it"
        ) from error


def model_folder(run: Path) -> Path:
    """Where the run's newest model lies: in its newest good checkpoint, or where none is left in its root."""
    found = newest_good(run / "checkpoints")
    if found is not None:
        return found[0]
    if not (run / "model_index.json").is_file():
        raise ValueError(f"{run} holds no model: neither model_index.json nor a good checkpoint in checkpoints/")
    return run
