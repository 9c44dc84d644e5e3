"""Files and folders that appear whole or not at all, whenever the process or the machine stops.

What is written gets a temporary name in the same folder first, and its own name by one rename, before which a reader
sees the old content and after which the new. An error while writing removes the temporary file. A kill leaves it,
under a name that no reader takes for the real one and that the next attempt writes over.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".incomplete-"  # begins the name of what is not finished yet


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, path: Path, *, durable: bool = False) -> None:
    """Rename a finished file or folder to `path`, in place of a file or folder that is there.

    With `durable` this also holds after a power cut: the content is on the disk before it gets its name, and so is the
    name before this returns. A folder replaces a folder, but no file does. Raises OSError.
    """
    is_folder = temporary.is_dir()
    if durable:
        for part in sorted(temporary.rglob("*")) if is_folder else []:
            fsync(part)
        fsync(temporary)
    if is_folder and path.exists():
        shutil.rmtree(path)  # a rename replaces empty folders only
    temporary.replace(path)
    if durable:
        fsync(path.parent)


@contextlib.contextmanager
def replaced(path: Path, *, durable: bool = False, temporary: Path | None = None) -> Iterator[Path]:
    """Inside `with`, write a file to the path that this yields; at the end `put_in_place` makes it `path`.

    An error inside leaves `path` as it was. Two processes that may write the same file at once need a `temporary`
    each, a path of the same folder; by default its name is `path`'s after `TEMPORARY`.
    """
    temporary = temporary or path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        put_in_place(temporary, path, durable=durable)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that led here is the one to report
            temporary.unlink(missing_ok=True)
        raise
