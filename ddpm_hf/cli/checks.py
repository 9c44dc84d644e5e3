"""What is refused before hours of work, in one line: numbers out of range, places where nothing can be written."""

from pathlib import Path


def check_in_range(option: str, value: int | None, least: int, most: int | None = None) -> None:
    """ValueError unless an option, where it was given, lies in [least, most]."""
    if value is not None and (value < least or (most is not None and value > most)):
        allowed = f"be at least {least}" if most is None else f"lie in [{least}, {most}]"
        raise ValueError(f"{option} {value} must {allowed}")


def check_output(output: Path, *, is_file: bool) -> None:
    """ValueError where no file, or no folder, can be made at `output`."""
    blocking = next((path for path in (output, *output.parents) if path.exists()), None)
    if is_file and blocking == output and output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file")
    if blocking is not None and blocking.is_file() and not (is_file and blocking == output):
        raise ValueError(f"{output} cannot be made: {blocking} is a file; give another name")


def check_new_file(output: Path) -> None:
    """ValueError unless a file can be made at `output`, and none is there that would be lost."""
    if output.is_file():
        raise ValueError(f"{output} exists; give another name, or remove it")
    check_output(output, is_file=True)


def check_new_folder(output: Path) -> None:
    """ValueError unless `output` is empty, or not there and can be made."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists; give a new or an empty folder")
    check_output(output, is_file=False)
