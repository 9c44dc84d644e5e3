"""Inputs that were once handled wrongly, and others of their kinds: how many are right at a commit and now.

    python benchmarks/hard_inputs.py --against f8006bc --output benchmarks/results/hard_inputs.json     # ten minutes
    python benchmarks/hard_inputs.py --only tiff-four-bands --wrong        # this tree alone, each that is not right
    python benchmarks/hard_inputs.py --table benchmarks/results/hard_inputs.json --each    # print each, and a table

Every file is written here, and its right pixels come from how it was made, from a second decoder, or from a law such
as "equal to the same file without metadata". An input is right where the samples equal these within one level, where
it is refused in one line that names the file, what was found and what to do, or where what is special is said in one
line; `benchmarks/hard/` has for each what is accepted. `--against` takes a commit, or the folder of a checkout. Each
kind is loaded in a process of its own, and what concerns `train.py` is started as users start it. The exit code is 1
where something is not right now.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hard import KINDS, ROOT, Answer, Member, images, members_of, places, scans, tables  # noqa: F401
from speed import report
from trees import checkout

CHILD = Path(__file__).parent / "hard" / "child.py"
TINY = """--config training/configs/folder64.yaml --resolution 16 --block_out_channels 16 16 --norm_num_groups 8
    --num_steps 6 --warmup_steps 0 --ema_decay 0.1 --global_batch_size 4 --layers_per_block 1 --attention_resolutions 8
    --sample_every 0 --checkpoint_every 3 --log_every 1""".split()
SECONDS = 900  # for all inputs of a kind


# ---- one tree ------------------------------------------------------------------------------------------------------


def loaded(tree: Path, members: list[Member], place: Path) -> list[dict[str, Any]]:
    """What the package in `tree` made of each member, in a new process; `pixels` where it gave samples."""
    tasks = [
        {"folder": str(each.folder), "call": each.call, "dataset": each.dataset, "skip": bool(each.commands)}
        for each in members
    ]
    place.mkdir()
    (place / "tasks.json").write_text(json.dumps(tasks))
    words = [sys.executable, str(CHILD), str(place / "tasks.json"), str(place)]
    done = subprocess.run(words, env=environment(tree, place), capture_output=True, text=True, timeout=SECONDS)
    results = []
    for number, member in enumerate(members):
        file, pixels = place / f"{number}.json", place / f"{number}.npy"
        if member.commands:
            result = trained(tree, member, place)
        elif file.exists():
            result = json.loads(file.read_text())
        else:
            result = {"error": "no answer", "message": done.stderr[-300:], "said": []}
        result["pixels"] = np.load(pixels, allow_pickle=False) if pixels.exists() else None
        results.append(result)
    return results


def trained(tree: Path, member: Member, place: Path) -> dict[str, Any]:
    """What training/train.py of `tree` said; an error where its last start did not end with exit code 0."""
    words, done = [sys.executable, str(tree / "training" / "train.py")], None
    config = [str(tree / word) if word.endswith(".yaml") else word for word in TINY]
    for command in member.commands:
        done = subprocess.run(
            [*words, *config, *command],
            env=environment(tree, place),
            cwd=member.folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if done.returncode:
            break
    assert done is not None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return {"error": None, "message": "", "said": lines}
    return {"error": "exit", "message": lines[-1], "said": lines, "is_refusal": "Traceback" not in done.stderr}


def environment(tree: Path, place: Path) -> dict[str, str]:
    caches = {"HF_HOME": str(place / "hf"), "DDPM_HF_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    return os.environ | caches | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


# ---- what is right -------------------------------------------------------------------------------------------------


def holds(answer: Answer, result: Mapping[str, Any], page: str) -> bool:
    """Whether all that the answer demands is so; `page` is docs/data.md of the same tree."""
    said = [line for line in result["said"] if answer.said and re.search(answer.said, line)]
    checks = [
        not answer.documented or re.search(answer.documented, page),
        not answer.said or len(said) == 1,
        not answer.silent or not result["said"],
        not answer.refused or is_refused(answer.refused, result),
        answer.refused or not result["error"],
        answer.pixels is None or equal(result["pixels"], answer),
    ]
    return all(checks)


def is_refused(pattern: str, result: Mapping[str, Any]) -> bool:
    one_line = "\n" not in result["message"]
    return bool(result.get("is_refusal")) and one_line and bool(re.search(pattern, result["message"]))


def equal(found: np.ndarray | None, answer: Answer) -> bool:
    """Within one level."""
    right = answer.pixels
    if found is None or right is None or found.shape != right.shape:
        return False
    if not answer.in_order:
        found, right = (np.array(sorted(each.tolist()), float) for each in (found, right))
    return bool(np.abs(found.astype(float) - right).max() <= 1)


def judged(member: Member, result: Mapping[str, Any], page: str) -> tuple[bool, str]:
    """Whether it is right, and in a word what was seen."""
    right = next((answer for answer in member.answers if holds(answer, result, page)), None)
    if right is None:
        return False, "wrong"
    if right.refused:
        return True, "refused"
    parts = ["equal"] if right.pixels is not None else []
    return True, " and ".join(parts + (["said"] if right.said else [])) or "as documented"


# ---- all of them ---------------------------------------------------------------------------------------------------


def tried(name: str, trees: Mapping[str, Path], print_wrong: bool) -> dict[str, Any]:
    """How many members of a kind are right in each tree."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        row: dict[str, Any] = {"kind": name, "meaning": KINDS[name][0], "members": []}
        for tree_name, tree in trees.items():
            members = members_of(name, place / tree_name)
            page = (tree / "docs" / "data.md").read_text()
            results = loaded(tree, members, place / f"{tree_name}_results")
            verdicts = [judged(*pair, page) for pair in zip(members, results, strict=True)]
            row["members"] = row["members"] or [{"name": m.name, "listed": m.listed} for m in members]
            for entry, member, result, verdict in zip(row["members"], members, results, verdicts, strict=True):
                entry[tree_name] = verdict[0]
                entry[f"{tree_name}_outcome"] = outcome(member, result, page).replace(str(place / tree_name), "…")
                if tree_name == "now":
                    entry["seen"] = verdict[1]
                    if print_wrong and not verdict[0]:
                        print(f"  WRONG {member.name}: {outcome(member, result, page, 1500)}", file=sys.stderr)
    return row


def outcome(member: Member, result: Mapping[str, Any], page: str, length: int = 200) -> str:
    """In a line what came of it: the error, or how far the samples are off, and what was said last."""
    if result["error"]:
        lines = result["message"].splitlines()
        return f"{result['error']}: {lines[0] if lines else ''}"[:length] + f" (of {len(lines)} lines)" * (
            len(lines) > 1
        )
    parts, found = [], result["pixels"]
    right = next((answer.pixels for answer in member.answers if answer.pixels is not None), None)
    if found is not None:
        parts = [f"samples {found.shape}"]
        if right is not None and right.shape == found.shape and equal(found, Answer(right, in_order=False)):
            parts.append("equal")
        elif right is not None:
            alike = right.shape == found.shape
            parts.append(f"off by {np.abs(found - right).max():.0f}" if alike else f"right are {right.shape}")
    if result["said"]:
        parts.append(f"said: {result['said'][-1]}")
    if not all(re.search(answer.documented, page) for answer in member.answers):
        parts.append("docs/data.md does not say so")
    return ", ".join(parts)[:length]


# ---- the table -----------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """One line for each kind, with the listed inputs and those made beside them."""
    rows = results["rows"]
    trees = [name for name in ("before", "now") if name in rows[0]["members"][0]]
    heads = [f"right {'now' if name == 'now' else 'at ' + results['against']}" for name in trees]
    header = ("kind", "listed", *heads, "others", *heads, "seen now")
    lines = []
    for row in rows:
        columns = [f"`{row['kind']}`: {row['meaning']}"]
        for listed in (True, False):
            columns += _counts([each for each in row["members"] if each["listed"] is listed], trees)
        seen = Counter(each["seen"] for each in row["members"])
        lines.append([*columns, ", ".join(f"{word} {count}" for word, count in seen.most_common())])
    total = ["all"]
    for listed in (True, False):
        total += _counts([each for row in rows for each in row["members"] if each["listed"] is listed], trees)
    seen = Counter(each["seen"] for row in rows for each in row["members"])
    lines.append([*total, ", ".join(f"{word} {count}" for word, count in seen.most_common())])
    return report.markdown(header, lines)


def lines_of(results: dict[str, Any]) -> Iterator[str]:
    """Each input with what came of it in each tree; those that are listed are marked."""
    for row in results["rows"]:
        yield f"\n{row['kind']}: {row['meaning']}"
        for each in row["members"]:
            yield f"  {'*' if each['listed'] else '-'} {each['name']}"
            for tree in ("before", "now"):
                if tree in each:
                    name = results["against"] if tree == "before" else tree
                    yield f"      {name}, {'right' if each[tree] else 'WRONG'}: {each.get(f'{tree}_outcome', '')}"


def _counts(members: Sequence[dict[str, Any]], trees: Sequence[str]) -> list[str]:
    return [str(len(members)), *(str(sum(each[name] for each in members)) for name in trees)]


def show(results: dict[str, Any], each: bool) -> None:
    if each:
        print("\n".join(lines_of(results)), end="\n\n")
    print(table(results))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="a commit, or the folder of a checkout, to compare with")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), metavar="NAME", help="these kinds alone")
    parser.add_argument("--wrong", action="store_true", help="show what came of each input that is not right now")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results")
    parser.add_argument("--each", action="store_true", help="print each input before the table")
    args = parser.parse_args(argv)
    if args.table:
        show(report.read_json(args.table), args.each)
        return 0
    with checkout(args.against) as earlier:
        trees = {"now": ROOT} if earlier is None else {"before": earlier, "now": ROOT}
        rows = []
        for name in args.only or KINDS:
            rows.append(tried(name, trees, args.wrong))
            right = Counter(each["now"] for each in rows[-1]["members"])
            print(f"{name}: {right[True]} of {right.total()} are right", file=sys.stderr, flush=True)
    against = args.against if args.against and not Path(args.against).is_dir() else "before"
    results = {"kind": "hard inputs", "against": against, **report.surroundings(), "rows": rows}
    if args.output:
        report.write_json(args.output, results)
    show(results, args.each)
    return int(any(not each["now"] for row in rows for each in row["members"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
