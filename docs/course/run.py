"""Run chapters of the course in Jupyter's kernel and keep in them what they print and draw.

    python docs/course/run.py            all chapters, after a change to the package
    python docs/course/run.py 03 07      those two

What is stored is what a reader sees on the web: text and pictures, without times or counts of the machine, so that a
chapter that did not change gives no difference in git. A cell that fails, or warns, ends it, and the file stays as it
was. Needs nbclient and ipykernel, of the extra `dev` (and with JupyterLab of the extra `course`).
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def chapters(numbers: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of `numbers`, in order; all of them for none. Raises ValueError."""
    paths = sorted(FOLDER.glob("[0-9]*.ipynb"))
    for number in numbers:
        if not any(path.name.startswith(number) for path in paths):
            raise ValueError(f"there is no chapter {number!r}; there are {', '.join(path.stem for path in paths)}")
    return [path for path in paths if not numbers or path.name.startswith(tuple(numbers))]


def run(path: Path) -> None:
    """Execute a chapter in its folder, and write it back with its outputs. Raises what its cells raise."""
    notebook = nbformat.read(path, as_version=4)
    place: dict = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(
        notebook, timeout=600, resources=place, extra_arguments=["--log-level=40"], coalesce_streams=True
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = [kept(output, f"{path.name}, cell {number}") for output in cell.outputs]
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def kept(output: nbformat.NotebookNode, place: str) -> nbformat.NotebookNode:
    """Printed text as it is, and of a figure its PNG. Raises ValueError for a warning and for an unprinted value."""
    if output.output_type == "stream" and output.name == "stdout":
        return output
    if output.output_type == "display_data" and "image/png" in output.data:
        return nbformat.v4.new_output("display_data", data={"image/png": output.data["image/png"]})
    raise ValueError(f"{place} gives neither printed text nor a picture: {str(output)[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="the chapters' numbers; default: all")
    try:
        for path in chapters(parser.parse_args().numbers):
            run(path)
            print(path.name, flush=True)
    except ValueError as error:
        sys.exit(f"run.py: {error}")


if __name__ == "__main__":
    main()
