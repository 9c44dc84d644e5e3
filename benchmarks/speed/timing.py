"""Paired timing: the same work done by several contestants, one of them the baseline, in one process.

Nothing is timed before all contestants are seen to compute the same. Then, in every round, each does the work once,
in an order that is reversed from round to round; a ratio is that of two times of one round, so that what slows the
machine down for a while slows both. Reported are medians and quartiles over the rounds.
"""

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from .machine import NO_AMX, NO_GPU, has_amx

STOCK = "stock"
Row = dict[str, Any]


class Mismatch(Exception):
    """The contestants do not compute the same, so their times say nothing."""


class Difference(NamedTuple):
    """By how much two results differ, and by how much they may."""

    what: str
    largest: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.largest <= self.allowed  # false for a NaN


@dataclass
class Work:
    """What `Timed.build` makes: callables that each do all of the work once.

    Attributes:
        contestants: by name; one is the `Timed`'s baseline, unless there is nothing to compare with.
        differences: runs every contestant, so that nothing is done for the first time in a timed round.
        units: how many of `unit` one call does.
        flop: floating-point operations of a unit, where they are most of the work.
    """

    contestants: Mapping[str, Callable[[], object]]
    differences: Callable[[], Sequence[Difference]]
    units: float = 1.0
    unit: str = "call"
    flop: float | None = None
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timed:
    """One row for each contestant but the baseline.

    Attributes:
        build: `build(quick)`; imports and allocates what it needs, so that what is not run costs nothing.
        targets: by contestant, how many times faster than the baseline at least, and what to reach for.
        rounds: in the whole benchmark, and in the quick one; 0: left out of it.
        all_cores: time it with all cores as well, but not in the quick benchmark.
        baseline: the contestant that the others are compared with.
        targets_amx: those that only a CPU with AMX has; on others they are listed as unmeasured.
        obstacle: why it cannot be measured here; None where it can.
    """

    case: str
    name: str
    build: Callable[[bool], Work]
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rounds: tuple[int, int] = (11, 3)
    all_cores: bool = False
    device: str = "cpu"
    baseline: str = STOCK
    targets_amx: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    obstacle: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Read:
    """Rows of numbers that processes of their own report: peak memory, images/s, bytes on the disk.

    Attributes:
        read: `read(quick)` gives a value for each contestant; raises Mismatch like the check of a `Work`.
        unit: of the values.
        targets: by contestant, how many times better than stock; with `at_most` how many times stock's value at most.
        more_is_better: for images/s.
        at_most: for memory.
        in_quick: whether the quick benchmark has it.
    """

    case: str
    name: str
    read: Callable[[bool], Mapping[str, float]]
    unit: str
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    more_is_better: bool = False
    at_most: bool = False
    in_quick: bool = True
    device: str = "cpu"


class Times(NamedTuple):
    cpu_s: float
    wall_s: float


def cpu_clock_s() -> float:
    """CPU time of this process, all its threads, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(work: Callable[[], object], synchronize: Callable[[], object]) -> Times:
    synchronize()
    cpu_s, wall_s = cpu_clock_s(), time.perf_counter()
    work()
    synchronize()
    return Times(cpu_clock_s() - cpu_s, time.perf_counter() - wall_s)


def paired_times(
    contestants: Mapping[str, Callable[[], object]], rounds: int, *, synchronize: Callable[[], object] = lambda: None
) -> dict[str, list[Times]]:
    """The times of every contestant in each of the rounds; every second round in reversed order."""
    times: dict[str, list[Times]] = {name: [] for name in contestants}
    for i in range(rounds):
        names = list(contestants)
        for name in names if i % 2 == 0 else reversed(names):
            gc.collect()
            times[name].append(timed(contestants[name], synchronize))
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """q1, median and q3 of values, interpolated between them as NumPy does."""
    if len(values) == 1:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def ratios(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Quartiles of the baseline's time over ours, round by round: how many times faster ours is."""
    return quartiles([a / b for a, b in zip(baseline, ours, strict=True)])


def verdict(ratio: float, target: Sequence[float] | None) -> str | None:
    """`reached` what was reached for, at `least` the target, `missed`; None where there is no target."""
    if target is None:
        return None
    return "reached" if ratio >= target[1] else "least" if ratio >= target[0] else "missed"


def require_same(name: str, differences: Sequence[Difference]) -> None:
    """Raises Mismatch where results differ by more than they may, or where nothing was compared."""
    bad = [d for d in differences if not d.holds]
    if bad or not differences:
        found = "; ".join(f"{d.what} differs by {d.largest:.3g}, allowed is {d.allowed:.3g}" for d in bad)
        raise Mismatch(f"{name}: {found or 'nothing was compared'}")


def measure(spec: Timed | Read, *, quick: bool, cores: int) -> list[Row]:
    """The rows of one `Timed` or `Read`, without numbers where it cannot be measured here. Raises Mismatch."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        return unmeasured(spec, NO_GPU)
    if isinstance(spec, Read):
        return _measure_values(spec, quick)
    obstacle = spec.obstacle()
    if obstacle is not None:
        return unmeasured(spec, obstacle)
    rows = _measure_times(spec, quick, cores)
    if has_amx():
        return rows
    lacking = [_unmeasured_row(spec, name, target, NO_AMX) for name, target in spec.targets_amx.items()]
    return rows + [row | {"name": f"{spec.name}, with AMX"} for row in lacking]


def unmeasured(spec: Timed | Read, reason: str) -> list[Row]:
    """Its rows without numbers, and why."""
    targets = {**spec.targets, **(spec.targets_amx if isinstance(spec, Timed) else {})}
    names = list(targets) or ["–"]
    return [_unmeasured_row(spec, name, targets.get(name), reason) for name in names]


def _unmeasured_row(spec: Timed | Read, contestant: str, target: tuple[float, float] | None, reason: str) -> Row:
    return _head(spec, contestant, target) | {"measured": False, "verdict": None, "reason": reason}


def _head(spec: Timed | Read, contestant: str, target: tuple[float, float] | None) -> Row:
    return {
        "case": spec.case,
        "name": spec.name,
        "contestant": contestant,
        "device": spec.device,
        "baseline": spec.baseline if isinstance(spec, Timed) else STOCK,
        "target": list(target) if target else None,
    }


def _measure_times(spec: Timed, quick: bool, cores: int) -> list[Row]:
    rounds = spec.rounds[1 if quick else 0]
    on_gpu = spec.device == "cuda"
    synchronize: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    torch.set_num_threads(1)
    work = spec.build(quick)
    try:
        differences = list(work.differences())
        require_same(f"{spec.case}: {spec.name}", differences)
        times = paired_times(work.contestants, rounds, synchronize=synchronize)
        wide = None
        if spec.all_cores and cores > 1 and not quick:
            torch.set_num_threads(cores)
            wide = paired_times(work.contestants, max(1, rounds // 2), synchronize=synchronize)
    finally:
        torch.set_num_threads(1)
        work.close()
    rows, targets = [], {**spec.targets, **(spec.targets_amx if has_amx() else {})}
    for name in [name for name in times if name != spec.baseline]:
        row = _head(spec, name, targets.get(name)) | {"measured": True, "rounds": rounds, "unit": work.unit}
        row["differences"] = [d._asdict() for d in differences]
        for clock in Times._fields:
            row[clock] = _per_unit(times, name, spec.baseline, clock, work.units)
        if wide is not None:
            row["all_cores_wall_s"] = _per_unit(wide, name, spec.baseline, "wall_s", work.units) | {"threads": cores}
        # what a GPU does takes no CPU time
        row["decided_by"] = "wall_s" if on_gpu else "cpu_s"
        decisive = row[row["decided_by"]]
        if work.flop is not None:
            row["flop_per_s"] = work.flop / decisive["ours"]["median"]
            row["matmul_flop_per_s"] = matmul_flop_per_s() if on_gpu else None
        ratio = decisive.get("ratio", {}).get("median", math.nan)
        rows.append(row | {"verdict": verdict(ratio, row["target"])})
    return rows


@cache
def matmul_flop_per_s(device: str = "cuda", size: int = 8192, calls: int = 20) -> float:
    """The roof: what products of large bfloat16 matrices reach, the best of three tries."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)  # zeros and ones go faster

    def work() -> None:
        for _ in range(calls):
            torch.mm(a, a)

    return 2 * size**3 * calls / min(timed(work, synchronize).wall_s for _ in range(3))


def _per_unit(times: Mapping[str, list[Times]], name: str, baseline: str, clock: str, units: float) -> dict[str, Any]:
    """Seconds per unit of a contestant, and of the baseline under its name, and their ratio, as quartiles."""
    own = [getattr(t, clock) for t in times[name]]
    found: dict[str, Any] = {"ours": quartiles([s / units for s in own])}
    if baseline in times:
        theirs = [getattr(t, clock) for t in times[baseline]]
        found |= {baseline: quartiles([s / units for s in theirs]), "ratio": ratios(theirs, own)}
    return found


def _measure_values(spec: Read, quick: bool) -> list[Row]:
    values = dict(spec.read(quick))
    stock = values.pop(STOCK, None)
    rows = []
    for name, value in values.items():
        target = spec.targets.get(name)
        row = _head(spec, name, target) | {"measured": True, "unit": spec.unit, "ours": value, "stock": stock}
        row |= {"ratio": None, "at_most": spec.at_most}
        if stock is not None:
            row["ratio"] = value / stock if spec.more_is_better else stock / value
        least = [1 / times for times in target] if target and spec.at_most else target
        rows.append(row | {"verdict": verdict(row["ratio"] or math.nan, least)})
    return rows


def chosen(
    specs: Sequence[Timed | Read], cases: Sequence[str] | None, *, quick: bool, device: str | None = None
) -> Iterator[Timed | Read]:
    """Those of the named cases and device, and in the quick benchmark those that it has."""
    for spec in specs:
        in_quick = spec.rounds[1] > 0 if isinstance(spec, Timed) else spec.in_quick
        wanted = (cases is None or spec.case in cases) and device in (None, spec.device)
        if wanted and (in_quick or not quick):
            yield spec
