"""A folder, a zip file or a tar file → its images, in the order of their paths; what else lies there is counted."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .decoding import EXTENSIONS, BadImage
from .samples import ARCHIVES
from .source import Labels, Source, printable, sha256_of

METADATA = ("metadata.csv", "metadata.jsonl")  # one row for each image, by its `file_name`, as `datasets` has it
MOST_NAMED = 5  # links, left out folders and files in one line


@dataclass
class Listing:
    """What lies in a folder and below it. `images` are relative paths with forward slashes, sorted.

    `stats` holds size and time of change of each image. `links` are the linked folders that were followed; `left_out`
    says of each folder that was not entered why; `others` counts the other files by their extension.
    """

    images: list[str] = field(default_factory=list)
    stats: list[tuple[int, int]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def notes(self, root: Path) -> list[str]:
        """One line for links and folders left out, one for files that are no images; none where there are none."""
        followed = f"followed {_some(self.links, 'linked folder')}" if self.links else ""
        left_out = f"left out {_some(self.left_out, 'folder')}" if self.left_out else ""
        others = _counted(self.others)
        lines = ["; ".join(filter(None, (followed, left_out)))]
        lines += [f"files that are not images are ignored: {others}"] if others else []
        place = root if root.name else root.resolve()
        return [f"{printable(place)}: {line}" for line in lines if line]


def _some(names: Sequence[str], noun: str) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    listed = ", ".join(map(printable, names[:MOST_NAMED]))
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}: {listed}{more}"


def _counted(others: Counter[str]) -> str:
    return ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common())


def image_files(root: Path) -> list[str]:
    """The images in a folder and below it, by extension, as sorted paths within it with forward slashes.

    Linked folders are followed, each real folder once. Hidden files and the folders of training runs are left out.
    Raises FileNotFoundError or NotADirectoryError for a root that is no folder, and ValueError where it holds no
    images.
    """
    return listing(root).images


def listing(root: Path, *, output_dir: Path | None = None) -> Listing:
    """Everything in a folder and below it, but for `output_dir` there; raises what `image_files` raises."""
    if not root.exists():
        raise FileNotFoundError(f"train_data_dir={str(root)!r}: no such folder; check the path")
    if not root.is_dir():
        allowed = f"the folder that holds the images, or a {' or '.join(ARCHIVES)} file of them"
        raise NotADirectoryError(f"train_data_dir={str(root)!r}: is a file; pass {allowed}")
    if output_dir is not None and output_dir.exists() and output_dir.samefile(root):
        raise ValueError(
            f"output_dir={str(output_dir)!r} is the folder of images itself: the grids that a run draws would be "
            "trained on; give it a folder of its own"
        )
    found = _walk(root, output_dir)
    _require_images(f"train_data_dir={str(root)!r}", "the folder", found.images, found.others)
    return found


def _require_images(argument: str, place: str, images: Sequence[str], others: Counter[str]) -> None:
    if not images and not others:
        raise ValueError(f"{argument}: {place} is empty; put images into it")
    if not images:
        allowed = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"{argument}: no image among its files ({_counted(others)}); allowed are {allowed}")


def _walk(root: Path, output_dir: Path | None) -> Listing:
    """Real folders before links, so that a folder that is reached by both keeps its own name."""
    found, files = Listing(), []
    seen = {_identity(os.stat(root))}
    excluded = _identity(output_dir.stat()) if output_dir is not None and output_dir.exists() else None
    pending, links = [""], []
    while pending or links:
        if not pending:
            links.sort(reverse=True)
            link = links.pop()
            if (identity := _identity(os.stat(root / link))) not in seen:
                seen.add(identity)
                found.links.append(link)
                pending.append(link)
            continue
        folder = pending.pop()
        try:
            entries = list(os.scandir(root / folder))
        except PermissionError:
            if not folder:
                raise
            found.left_out.append(f"{folder} (it cannot be read)")
            continue
        prefix = f"{folder}/" if folder else ""
        if folder and _is_run({entry.name for entry in entries}):
            found.left_out.append(f"{folder} (a run)")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _asked(entry.is_dir):
                identity = _identity(entry.stat())
                if identity == excluded:
                    found.left_out.append(f"{prefix}{entry.name} (output_dir)")
                elif entry.is_symlink():
                    links.append(prefix + entry.name)
                elif identity not in seen:
                    seen.add(identity)
                    pending.append(prefix + entry.name)
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if not _asked(entry.is_file):
                found.others["broken link" if entry.is_symlink() else "no file"] += 1
            elif suffix in EXTENSIONS:
                stat = entry.stat()
                files.append((prefix + entry.name, (stat.st_size, stat.st_mtime_ns)))
            else:
                found.others[suffix or "no extension"] += 1
    files.sort()
    found.images, found.stats = [name for name, _ in files], [stat for _, stat in files]
    found.left_out.sort()
    return found


def _asked(is_kind: Callable[[], bool]) -> bool:
    try:
        return is_kind()
    except OSError:  # a link that leads back to itself
        return False


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _is_run(names: set[str]) -> bool:
    """Whether a folder with these entries is one that training/train.py wrote."""
    return "options.yaml" in names and bool(names & {"checkpoints", "model_index.json"})


def folder_source(root: Path, *, label_column: str | None, output_dir: Path | None) -> Source:
    """The images of a folder. Labels are the names of the sub-folders, or a column of its metadata.csv."""
    found = listing(root, output_dir=output_dir)
    identity = sha256_of([(name, *stat) for name, stat in zip(found.images, found.stats, strict=True)])
    paths = [os.path.join(root, name) for name in found.images]
    files = [(printable(path), path) for path in paths]
    labels = None if label_column is None else folder_labels(root, found.images, label_column)
    return Source(root.resolve().name, files, identity, found.images, labels, tuple(found.notes(root)))


# ---- labels ---------------------------------------------------------------------------------------------------------


def folder_labels(root: Path, images: Sequence[str], column: str) -> Labels:
    """Of each image its class: by metadata.csv where it has this column, else, for "label", by sub-folder."""
    metadata = next((root / name for name in METADATA if (root / name).is_file()), None)
    rows = _read_metadata(metadata) if metadata else []
    if metadata and any(column in row for row in rows):
        values = {row.get("file_name"): row.get(column) for row in rows}
        return Labels.of([values.get(name) for name in images], images, f"{metadata.name}, column {column!r}")
    if column != "label":
        known = ", ".join(map(repr, rows[0])) if rows else "none, as there is no metadata.csv"
        raise ValueError(
            f"label_column={column!r}: {printable(root)} has no such column of labels (its columns: {known}); 'label' "
            "takes the names of sub-folders"
        )
    return sub_folder_labels(images)


def sub_folder_labels(images: Sequence[str]) -> Labels:
    """The first folder of each path. Raises ValueError where an image lies in none, or there are fewer than two."""
    outside = [name for name in images if "/" not in name]
    if outside:
        raise ValueError(
            f"label_column='label': {len(outside)} of {len(images)} images lie in no sub-folder, the first is "
            f"{printable(outside[0])}; put every image into the folder of its class"
        )
    return Labels.of([name.split("/", 1)[0] for name in images], images, "the names of the sub-folders")


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of metadata.csv or metadata.jsonl. Raises ValueError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    if not all(isinstance(row, dict) and row.get("file_name") for row in rows):
        raise ValueError(f"{printable(path)}: every row needs a file_name, the path of an image within the folder")
    return rows


# ---- archives -------------------------------------------------------------------------------------------------------


class _ZipFiles:
    """The encoded images of a zip file; each process opens it for itself."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.names = path, names
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[str, Any]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        label = f"{printable(self.path)}/{printable(self.names[index])}"
        try:
            return label, io.BytesIO(self._opened[1].read(self.names[index]))
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            return label, BadImage(f"cannot be taken out of the zip file ({error})")  # encrypted, damaged, ...

    def __getstate__(self) -> dict[str, Any]:  # for worker processes that are not forks
        return {**self.__dict__, "_opened": None}


class _TarFiles:
    """The encoded images of an uncompressed tar file, by where each lies in it."""

    def __init__(self, path: Path, names: Sequence[str], places: Sequence[tuple[int, int]]):
        self.path, self.names, self.places = path, names, places

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[str, Any]:
        offset, size = self.places[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            return f"{printable(self.path)}/{printable(self.names[index])}", io.BytesIO(file.read(size))


def archive_source(path: Path, *, label_column: str | None) -> Source:
    """The images of a zip or tar file, in the order of their paths; nothing is unpacked to disk.

    Raises ValueError where it cannot be read, is compressed as a whole (a tar file), or holds no images.
    """
    try:
        members = _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(f"train_data_dir={str(path)!r} cannot be read: {error}") from error
    visible = [m for m in members if not any(part.startswith(".") for part in PurePosixPath(m[0]).parts)]
    suffixes = [PurePosixPath(name).suffix.lower() for name, _ in visible]
    images = sorted(m for m, suffix in zip(visible, suffixes, strict=True) if suffix in EXTENSIONS)
    others = Counter(suffix or "no extension" for suffix in suffixes if suffix not in EXTENSIONS)
    names, places = [name for name, _ in images], [place for _, place in images]
    _require_images(f"train_data_dir={str(path)!r}", "the file", names, others)
    files = _ZipFiles(path, names) if path.suffix.lower() == ".zip" else _TarFiles(path, names, places)
    if label_column not in (None, "label"):
        raise ValueError(f"label_column={label_column!r}: an archive has 'label', the names of its folders")
    labels = sub_folder_labels(_below_common_folder(names)) if label_column else None
    stat = path.stat()
    identity = sha256_of([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return Source(path.resolve().name, files, identity, names, labels, tuple(Listing(others=others).notes(path)))


def _below_common_folder(names: Sequence[str]) -> list[str]:
    """The paths without the one folder that holds them all, as most archives have it."""
    first = {name.split("/", 1)[0] for name in names}
    if len(first) == 1 and all(name.count("/") > 1 for name in names):
        return [name.split("/", 1)[1] for name in names]
    return list(names)


def _zip_members(path: Path) -> Iterable[tuple[str, tuple[int, int]]]:
    with zipfile.ZipFile(path) as file:
        return [(info.filename, (0, info.file_size)) for info in file.infolist() if not info.is_dir()]


def _tar_members(path: Path) -> Iterable[tuple[str, tuple[int, int]]]:
    try:
        with tarfile.open(path, "r:") as file:
            members = [
                (m.name.removeprefix("./"), (m.offset_data, m.size)) for m in file if m.isreg() and not m.sparse
            ]
    except tarfile.ReadError as error:
        raise ValueError(
            f"train_data_dir={str(path)!r}: no uncompressed tar file ({error}); unpack it and pass the folder"
        ) from error
    return members
