"""What users do that once went wrong, in a tree of f8006bc and in this one: what comes of it, and whether it is right.

    python benchmarks/cases.py --against f8006bc --output benchmarks/results/cases.json    # some minutes
    python benchmarks/cases.py --only fp16-alone two-threads                     # some, in this tree alone
    python benchmarks/cases.py --table benchmarks/results/cases.json             # print the table, renew the docs

`benchmarks/uses/` has for each what a user does and what is right. Each is done in processes of its own, which import
the package of their tree; what it needs is made here. The exit code is 1 where something is not right now. The cases
of images and folders are those of hard_inputs.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trees import checkout
from uses import ROOT, USES, checkpoints, commands, pipelines, training  # noqa: F401
from uses.running import Runner, import_libraries


def seen(name: str, tree: Path) -> dict[str, Any]:
    """What came of one use in a tree."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        found = USES[name].seen_in(Runner(tree, place))
    text = found.text.replace(str(place), "…").replace(str(tree), "…").replace(str(ROOT), "…")
    return {"seen": text[:300], "right": found.right}


def tried(name: str, trees: Mapping[str, Path]) -> dict[str, Any]:
    """One use in every tree."""
    row: dict[str, Any] = {"name": name, **{key: getattr(USES[name], key) for key in ("about", "does", "expected")}}
    for tree_name, tree in trees.items():
        row[tree_name] = seen(name, tree)
        verdict = "right" if row[tree_name]["right"] else "WRONG"
        print(f"{name}, {tree_name}, {verdict}: {row[tree_name]['seen']}", file=sys.stderr, flush=True)
    return row


def commit_of(against: str) -> str:
    """The commit, or that of the folder of a checkout."""
    place, name = (against, "HEAD") if Path(against).is_dir() else (str(ROOT), against)
    words = ["git", "-C", place, "rev-parse", "--short", name]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def keep(output: Path, against: str | None, rows: list[dict[str, Any]]) -> None:
    """Write these rows, and of an earlier file those of other uses, in the order of `USES`."""
    from speed import report  # which imports the package of this tree

    earlier = report.read_json(output)["rows"] if output.exists() else []
    found = {row["name"]: row for row in (*earlier, *rows)}
    ordered = [found[name] for name in USES if name in found]
    report.write_json(output, {"kind": "cases", "against": against, **report.surroundings(), "rows": ordered})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="a commit, or the folder of a checkout, to compare with")
    parser.add_argument("--only", nargs="+", choices=USES, metavar="NAME", help="these alone; --list names them")
    parser.add_argument("--list", action="store_true", help="print what can be done, and what is right")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the results there, with --only beside others"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{name}: {each.does} → {each.expected}" for name, each in USES.items()))
        return 0
    if args.table:
        from speed import documents

        return documents.show(args.table)
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as caches, checkout(args.against) as earlier:
            import_libraries(Path(caches))
            trees = {"now": ROOT} if earlier is None else {"before": earlier, "now": ROOT}
            for name in args.only or USES:
                rows.append(tried(name, trees))
    finally:
        if args.output and rows:
            keep(args.output, args.against and commit_of(args.against), rows)
    return int(any(not row["now"]["right"] for row in rows))


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main(sys.argv[1:]))
