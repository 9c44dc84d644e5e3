"""README.md, docs/, what the course's notebooks say, and the model cards, as text; and the code within it."""

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def text_of(path: Path) -> str:
    """A page, or what a notebook says between its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join(
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
    )


PAGE_FILES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "docs" / "course" / "README.md",
    *sorted(ROOT.glob("docs/course/*.ipynb")),
    *sorted(ROOT.glob("model_cards/**/README.md")),
]
PAGES = {path.relative_to(ROOT).as_posix(): text_of(path) for path in PAGE_FILES}
SOURCES = [*sorted((ROOT / "ddpm_hf").rglob("*.py")), *sorted((ROOT / "training").glob("*.py"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
MESSAGE = re.compile(r"“`([^`\n]+)`”")  # how a page quotes the code, with … for what differs


def spans(page: str) -> list[str]:
    """Code within the lines of a page, but quoted messages."""
    return SPAN.findall(MESSAGE.sub("", BLOCK.sub("", PAGES[page])))


DIGITS = "training/configs/digits.yaml"
PROGRAMS = ("ddpm-hf", "accelerate", "torchrun", "python", "python3", "hf")


def commands_in(text: str) -> list[list[str]]:
    """The words of each command in shell lines (or in one span) that is ours to parse, from its program's name on."""
    found = []
    text = re.sub(r"\$\([^)]*\)", "HOST", text.replace("\\\n", " "))
    text = re.sub(r"--config (\.\.\.|…)", "--config " + DIGITS, text)
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        while words and (words[0] == "srun" or re.match(r"[A-Z_]+=", words[0])):
            words = words[1:]
        if len(words) > 1 and words[0] in PROGRAMS:
            found.append(words)
    return found
