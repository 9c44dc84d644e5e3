"""Files and folders appear whole or not at all: after errors and kills, and in an order that outlives a power cut."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddpm_hf.machine import TEMPORARY, files, put_in_place, replaced


@pytest.fixture
def old(tmp_path) -> Path:
    """A file with content, alone in its folder."""
    path = tmp_path / "numbers.json"
    path.write_text("old", encoding="utf-8")
    return path


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Inside, no file of this process can grow beyond that: the kernel refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def alone(path: Path, content: str) -> bool:
    return os.listdir(path.parent) == [path.name] and path.read_text(encoding="utf-8") == content


# ---- one file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_the_old_content_stays_until_the_new_is_whole(old, durable):
    with replaced(old, durable=durable) as temporary:
        assert temporary.parent == old.parent and temporary.name == f"{TEMPORARY}{old.name}"
        temporary.write_text("new", encoding="utf-8")
        assert old.read_text(encoding="utf-8") == "old"
    assert alone(old, "new")


def test_a_file_that_was_not_there_appears(tmp_path):
    with replaced(tmp_path / "new") as temporary:
        temporary.write_text("text", encoding="utf-8")
        assert not (tmp_path / "new").exists()
    assert alone(tmp_path / "new", "text")


def test_the_temporary_name_can_be_chosen(old):
    with replaced(old, temporary=old.with_name("mine")) as temporary:
        assert temporary.name == "mine"
        temporary.write_text("new", encoding="utf-8")
    assert alone(old, "new")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(3)]
)
def test_an_error_inside_leaves_the_old_file_alone(old, error):
    with pytest.raises(type(error)) as raised, replaced(old) as temporary:
        temporary.write_text("ne", encoding="utf-8")
        raise error
    assert raised.value is error and alone(old, "old")


def test_a_write_that_the_kernel_refuses_leaves_it_too(old):
    with pytest.raises(OSError, match="File too large"), room_for(1000), replaced(old) as temporary:
        temporary.write_bytes(bytes(5000))
    assert alone(old, "old")


def test_a_folder_in_the_way_of_a_file_is_an_error(tmp_path):
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), replaced(tmp_path / "name") as temporary:
        temporary.touch()
    assert os.listdir(tmp_path) == ["name"] and (tmp_path / "name" / "inside").is_dir()


def test_nothing_written_is_an_error(old):
    with pytest.raises(FileNotFoundError), replaced(old):
        pass
    assert alone(old, "old")


@pytest.mark.integration
@pytest.mark.parametrize("moment", ["half written", "before the rename"])
def test_a_kill_leaves_the_old_file_and_a_known_name(old, moment):
    code = f"""
import os, signal
from pathlib import Path
from ddpm_hf.machine import replaced
path = Path({str(old)!r})
with replaced(path, durable=True) as temporary:
    with temporary.open("w") as file:
        file.write("the new")
        file.flush()
        if {moment == "half written"}:
            os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert old.read_text(encoding="utf-8") == "old"
    assert sorted(os.listdir(old.parent)) == [f"{TEMPORARY}{old.name}", old.name]
    with replaced(old) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert alone(old, "new")


# ---- folders -------------------------------------------------------------------------------------------------------


def make_folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name, encoding="utf-8")
    return path


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_takes_the_place_of_another(tmp_path, durable):
    make_folder(tmp_path / "step", "a", "of the old/b")
    put_in_place(make_folder(tmp_path / "made", "a", "of the new/c"), tmp_path / "step", durable=durable)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"step", "step/a", "step/of the new", "step/of the new/c"}


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path, old):
    made = make_folder(tmp_path / "made", "a")
    with pytest.raises(OSError):
        put_in_place(made, old)
    assert old.read_text(encoding="utf-8") == "old" and (made / "a").exists()


# ---- power cuts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def order(monkeypatch) -> list[tuple[str, Path]]:
    """What is flushed, and what renamed, in order; all of it really happens."""
    done, fsync, replace = [], files.fsync, Path.replace

    def flush(path: Path) -> None:
        done.append(("flush", path))
        fsync(path)

    def rename(self: Path, target: Path) -> Path:
        done.append(("rename", target))
        return replace(self, target)

    monkeypatch.setattr(files, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    return done


def test_a_durable_file_is_flushed_then_renamed_then_its_folder(old, order):
    with replaced(old, durable=True) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert order == [("flush", temporary), ("rename", old), ("flush", old.parent)]


def test_a_durable_folder_is_flushed_with_all_that_is_in_it(tmp_path, order):
    made = make_folder(tmp_path / "made", "a", "b/c")
    put_in_place(made, tmp_path / "step", durable=True)
    flushed = {path for what, path in order[:-2] if what == "flush"}
    assert flushed == {made, made / "a", made / "b", made / "b" / "c"}
    assert order[-2:] == [("rename", tmp_path / "step"), ("flush", tmp_path)]


def test_what_need_not_outlive_a_power_cut_is_not_flushed(old, order):
    with replaced(old) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert order == [("rename", old)]


def test_fsync_closes_what_it_opens_also_after_an_error(old, monkeypatch):
    num_open = len(os.listdir("/dev/fd"))
    files.fsync(old)
    files.fsync(old.parent)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="bad disk"):
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("bad disk")))
        files.fsync(old)
    assert len(os.listdir("/dev/fd")) == num_open
