"""Tables of results that stand in the documents, the cards among them, between two comments that name their file."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import (
    case_tables,
    cost_tables,
    decoding_tables,
    distilled_tables,
    fashion_tables,
    few_steps_tables,
    flow_tables,
    memorised_tables,
    scheduler_tables,
)
from .networks import ROOT
from .report import NOT_YET, read_json, speed_table

BLOCK = re.compile(r"(<!-- (benchmarks/results/[\w.-]+\.json)(?:: ([\w -]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[dict[str, Any], str | None], str]] = {  # by the `kind` that results name
    "speed": speed_table,
    "few steps": few_steps_tables.table,
    "schedulers": scheduler_tables.table,
    "cost": cost_tables.table,
    "decoding": decoding_tables.table,
    "fashion": fashion_tables.quality_table,
    "head to head": fashion_tables.head_to_head_table,
    "cases": case_tables.table,
    "distilled": distilled_tables.table,
    "flow": flow_tables.table,
    "memorised": memorised_tables.table,
    "evaluation": fashion_tables.bits_table,  # of `ddpm-hf evaluate`, whose files name no kind
}


def table_of(results: dict[str, Any], only: str | None = None) -> str:
    return TABLES[results.get("kind", "evaluation")](results, only)


def with_tables(text: str, root: Path = ROOT) -> str:
    """The document with every block `<!-- benchmarks/results/X.json[: what] -->` … `<!-- end -->` made anew.

    Where the file is not there, the block says that nothing was measured yet.
    """

    def fill(match: re.Match[str]) -> str:
        path = root / match[2]
        content = table_of(read_json(path), match[3]) if path.exists() else NOT_YET
        return f"{match[1]}\n{content}\n\n{match[4]}"

    return BLOCK.sub(fill, text)


def show(path: Path) -> int:
    """Print the tables of results, and bring the documents up to them. Returns 0, the exit code of --table."""
    print(table_of(read_json(path)))
    for changed in rewrite_documents():
        print(f"renewed {changed}", file=sys.stderr)
    return 0


def documents(root: Path = ROOT) -> Iterator[Path]:
    for path in (root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("model_cards/*/README.md"))):
        if path.exists() and BLOCK.search(path.read_text(encoding="utf-8")):
            yield path


def rewrite_documents(root: Path = ROOT) -> list[Path]:
    """Bring all documents up to the results that lie there, and return those that changed."""
    changed = []
    for path in documents(root):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before, root)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed
