"""How fast, beside stock diffusers in the same process.

    python benchmarks/run.py --output benchmarks/results/cpu.json      # the published numbers; over an hour
    python benchmarks/run.py --quick                                   # ten minutes on two idle cores
    python benchmarks/run.py --case sampling scheduler                 # some of it
    python benchmarks/run.py --device cuda --output benchmarks/results/gpu.json    # seven minutes on an H100
    python benchmarks/run.py --table benchmarks/results/cpu.json       # print its tables, and renew those in docs/
    python benchmarks/run.py --plot benchmarks/results/cpu.json docs/pictures/speed.png

Before anything is timed all contestants must compute the same; where they do not, the benchmark ends with exit code 1.
Then they take turns, in an order that is reversed every round. Ratios are stock's time over ours within a round, as
median and quartiles: of CPU time on one thread, which a busy machine disturbs least, and of wall time, also with all
cores where that says something. Where there is a GPU its rows are measured by wall time, synchronised. What needs a
GPU, AMX or a package that is not here is listed as unmeasured, with the reason. A missed target is printed, and is no
failure. Needs the extra `train`; the case `peers` needs `bench` too.

The contestants: `stock` is diffusers' own pipeline, network and scheduler with the same weights, and the body of its
training script; `ours` the shipped classes and training/train.py; `sped up` what ddpm_hf.inference makes of them. The
name of a row that is compared with something else than stock says `beside` what.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed import documents, report
from speed.timing import Mismatch, Read, Timed, chosen, measure


def catalogue() -> list[Timed | Read]:
    """Everything there is to measure, in the order of the tables."""
    from speed.checkpoint import CHECKPOINT
    from speed.commands import COMMANDS
    from speed.data import DATA
    from speed.peers import PEERS
    from speed.processes import PROCESSES
    from speed.sampling import GPU_SAMPLING, SAMPLING, SWEEPS
    from speed.training import GPU_TRAINING, TRAINING

    sampling, training = [*SAMPLING, *GPU_SAMPLING, *PEERS], [*TRAINING, *GPU_TRAINING]
    return [*sampling, *training, *DATA, *PROCESSES, *COMMANDS, *CHECKPOINT, *SWEEPS]


def run(specs: Sequence[Timed | Read], *, quick: bool, output: Path | None = None) -> dict[str, Any]:
    """Measure them one after the other; `output` is written after each. Raises Mismatch."""
    results = {"kind": "speed", "quick": quick, **report.surroundings(), "rows": []}
    for spec in specs:
        rows = measure(spec, quick=quick, cores=report.num_cores())
        for row in rows:
            print(" | ".join((row["case"], *report.cells(row))), flush=True)
        results["rows"] += rows
        if output is not None:
            report.write_json(output, results)
    return results


def quieten() -> None:
    """Nothing but the rows: no progress bars, and no warnings that stock's parts give."""
    import datasets
    import diffusers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--case", nargs="+", choices=tuple(report.CASES), help="only these")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only what is measured there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("FILE", "PNG"), help="draw the ratios of results")
    args = parser.parse_args(argv)
    if args.table or args.plot:
        if args.table:
            documents.show(args.table)
        if args.plot:
            report.plot(report.read_json(args.plot[0]), args.plot[1])
        return 0
    quieten()
    specs = list(chosen(catalogue(), args.case, quick=args.quick, device=args.device))
    try:
        results = run(specs, quick=args.quick, output=args.output)
    except Mismatch as error:
        print(f"run.py: not the same numbers, so nothing more is timed: {error}", file=sys.stderr)
        return 1
    print("\n" + documents.table_of(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
