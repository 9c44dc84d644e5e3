"""What good guesses get wrong about DDPM: measure it, and write docs/surprises.md of what was measured.

    python benchmarks/surprises.py                          # what is not measured yet, then the page
    python benchmarks/surprises.py --only chains rounding   # these two, measured already or not
    python benchmarks/surprises.py --page                   # the page alone
    python benchmarks/surprises.py --picture                # its picture, of samples in the folder of work

Measurements stand in benchmarks/results/surprises.json, by name, each with its time and commit; what is there is not
measured again unless --only names it. Networks, samples and answers that several of them need are kept in a folder of
work, by default runs/surprises, so that a run that was stopped goes on where it was; delete it to begin anew. The
page's sentences are checked against the numbers: where a number contradicts one, the page is not written, and the
exit code is 1. Needs the extra `train`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import report
from surprising import bound, drawing, page, training
from surprising.lab import Lab

RESULTS = report.ROOT / "benchmarks" / "results" / "surprises.json"
WORK = report.ROOT / "runs" / "surprises"
PAGE = report.ROOT / "docs" / "surprises.md"
PICTURE = report.ROOT / "docs" / "pictures" / "twins.png"
MEASUREMENTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "chains": bound.chains,
    "rounding": bound.rounding,
    "clipping": drawing.clipping,
    "widths": drawing.widths,
    "contraction": drawing.contraction,
    "twins": drawing.twins,
    "rounded_state": drawing.rounded_state,
    "chaos": training.chaos,
    "encoding": drawing.encoding,
    "memorising": training.memorising,
    "dealing_out": training.dealing_out,
    "gradient_clipping": training.gradient_clipping,
    "averaging": training.averaging,
    "loss_by_t": bound.loss_by_t,
    "half_precision": bound.half_precision,
}


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kind": "surprises", "measured": {}}


def add(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put one measurement into the file, which another run of this program may have changed meanwhile."""
    results = read_results(path)
    results["measured"][name] = found
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(path)


def measure(path: Path, work: Path, only: list[str] | None) -> None:
    lab = Lab(work)
    for name, function in MEASUREMENTS.items():
        if name in only if only else name not in read_results(path)["measured"]:
            began, cpu = time.monotonic(), sum(os.times()[:4])  # of child processes too
            found = function(lab)
            seconds = {"wall_s": round(time.monotonic() - began, 1), "cpu_s": round(sum(os.times()[:4]) - cpu, 1)}
            print(f"{name}: {seconds['wall_s']:.0f} s", flush=True)
            before = read_results(path)["measured"].get(name, {})  # with what it left in `work` it is quick now
            seconds = {key: max(value, before.get(key, 0)) for key, value in seconds.items()}
            add(path, name, {"found": found, **seconds, **report.surroundings()})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--picture", action="store_true", help="draw what the networks make of the same seeds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the measurements; default: %(default)s")
    parser.add_argument("--work", type=Path, default=WORK, help="networks and samples; default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.picture:
        drawing.twins_picture(Lab(args.work)).save(PICTURE)
    elif not args.page:
        measure(args.results, args.work, args.only)
    measured = read_results(args.results)["measured"]
    missing = [name for name in MEASUREMENTS if name not in measured]
    if missing:
        print(f"no page yet; not measured: {', '.join(missing)}")
        return 0
    try:
        text = page.text_of(measured)
    except page.Contradiction as error:
        print(f"surprises.py: the page says what was not measured: {error}", file=sys.stderr)
        return 1
    if args.results == RESULTS:
        PAGE.write_text(text, encoding="utf-8")
        print(f"written: {PAGE.relative_to(report.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
