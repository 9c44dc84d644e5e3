"""What the paper's runs cost on 1, 8 and 64 GPUs, by a model that is small enough to doubt.

    python benchmarks/cost_model.py benchmarks/results/cpu.json --output benchmarks/results/cost.json
    python benchmarks/cost_model.py --table benchmarks/results/cost.json      # print the tables, and renew the docs

With P parameters, F floating-point operations of one image's forward pass, a global batch of B images on N devices:

    compute(b)  = max(t_0, 3 F b / R)                 a step of b images on a GPU; backward costs twice forward; t_0 is
                                                      the time to launch its kernels, while others run
    update      = 52 P / bandwidth                    bytes moved by clipping, Adam and EMA: 13 float32 numbers each
    exchange    = 2 (N - 1)/N · 4 P / link            ring all-reduce of float32 gradients, at the slowest link
    waiting     = max(0, exchange - 2/3 compute)      DDP sends while the backward pass, two thirds of it, goes on
    step        = compute(B / N) + update + waiting
    checkpoint  = 20 P bytes                          network, averages twice (once as the model), two slots of Adam
    sampling    = batches · T · max(t_0 / 3, F b / R)    50,000 images on N devices that need nothing of each other

P and F are counted, from the configurations in training/configs. t_0, R, bandwidths and links of the GPUs are
assumed, below. The form of the model is checked against what was measured on the CPU, where a kernel is not launched
ahead, so that t_0 is added: each sweep is fitted at its two ends and predicted between them.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from speed import documents, report
from speed.cost_tables import table
from speed.networks import counted

FLOAT_BYTES = 4
UPDATE_NUMBERS = 13  # clip: read g, read and write g; Adam: read p, g, m, v, write p, m, v; EMA: read p, s, write s
CHECKPOINT_NUMBERS = 5  # network, averages for resuming, averages as the model, m and v
CONFIGS = {name: report.ROOT / "training" / "configs" / f"{name}.yaml" for name in ("cifar10", "lsun256")}
NUM_IMAGES, NUM_TIMESTEPS = 50_000, 1000
WORLDS = (1, 8, 64)


@dataclass(frozen=True)
class Workload:
    """A network and how it is trained."""

    name: str
    num_parameters: int
    forward_flop: float  # of one image
    global_batch_size: int
    num_steps: int


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and its links; an NVIDIA A100 with 80 GB by its data sheet, unless said otherwise."""

    peak_flop_per_s: float = 312e12  # bfloat16, dense
    share_of_peak: float = 0.3  # that convolutions of this size reach: a guess
    launch_s: float = 5e-6  # to launch one kernel: a guess
    kernels_forward: int = 700  # launched in one forward pass: a guess
    memory_bytes_per_s: float = 2.0e12
    link_bytes_per_s: float = 250e9  # within a machine of eight (NVLink)
    network_bytes_per_s: float = 25e9  # between machines, for each GPU (200 Gb/s)
    disk_bytes_per_s: float = 1e9  # a guess
    gpus_per_machine: int = 8

    @property
    def flop_per_s(self) -> float:
        return self.peak_flop_per_s * self.share_of_peak


def workload(config: Path) -> Workload:
    """A configuration of the paper, with P and F as counted."""
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    names, side = ("block_out_channels", "attention_resolutions"), options.get("resolution", 32)
    shape = {name: tuple(options[name]) for name in names}
    num_parameters, forward_flop = counted(
        {"sample_size": side, "layers_per_block": options["layers_per_block"], **shape}
    )
    return Workload(
        f"{options['output_dir'].removeprefix('runs/')}, {side}×{side}",
        num_parameters,
        forward_flop,
        options["global_batch_size"],
        int(options["num_steps"]),
    )


# ---- the model -----------------------------------------------------------------------------------------------------


def launching_s(machine: Machine) -> float:
    """t_0: the kernels of a forward and a backward pass, launched one after the other."""
    return 3 * machine.kernels_forward * machine.launch_s


def compute_s(work: Workload, machine: Machine, batch: float) -> float:
    """Forward and backward of `batch` images on one device. Kernels are launched while others run, hence the max."""
    return max(launching_s(machine), 3 * work.forward_flop * batch / machine.flop_per_s)


def update_bytes(work: Workload) -> float:
    return UPDATE_NUMBERS * FLOAT_BYTES * work.num_parameters


def exchange_s(work: Workload, machine: Machine, world: int) -> float:
    """Ring all-reduce of the gradients, at the speed of its slowest link."""
    link = machine.link_bytes_per_s if world <= machine.gpus_per_machine else machine.network_bytes_per_s
    return 2 * (world - 1) / world * FLOAT_BYTES * work.num_parameters / link


def checkpoint_bytes(num_parameters: int) -> int:
    return CHECKPOINT_NUMBERS * FLOAT_BYTES * num_parameters


def step_parts_s(work: Workload, machine: Machine, world: int) -> dict[str, float]:
    """Where a training step's time goes, on `world` devices."""
    compute = compute_s(work, machine, work.global_batch_size / world)
    exchange = exchange_s(work, machine, world)
    return {
        "compute": compute,
        "update": update_bytes(work) / machine.memory_bytes_per_s,
        "exchange": exchange,
        "waiting": max(0.0, exchange - 2 / 3 * compute),
    }


def step_s(work: Workload, machine: Machine, world: int) -> float:
    parts = step_parts_s(work, machine, world)
    return parts["compute"] + parts["update"] + parts["waiting"]


def sampling_s(work: Workload, machine: Machine, world: int, batch: int = 64) -> float:
    """50,000 images of 1000 steps, each device drawing its share in batches of `batch`."""
    step = max(launching_s(machine) / 3, work.forward_flop * batch / machine.flop_per_s)
    batches = -(-NUM_IMAGES // (batch * world))
    return batches * NUM_TIMESTEPS * step


def least_batches(work: Workload, machine: Machine) -> dict[str, float]:
    """Images per device below which it waits: for its kernels' launches, or for gradients from 8 and 64 devices."""
    per_image_s = 3 * work.forward_flop / machine.flop_per_s
    found = {"launches": launching_s(machine) / per_image_s}
    for world in WORLDS[1:]:
        found[f"exchange of {world}"] = 1.5 * exchange_s(work, machine, world) / per_image_s
    return found


def costs(work: Workload, machine: Machine, world: int) -> dict[str, float]:
    seconds, alone = step_s(work, machine, world), step_s(work, machine, 1)
    return {
        "batch_per_device": work.global_batch_size / world,
        "step_s": seconds,
        **{f"{name}_s": value for name, value in step_parts_s(work, machine, world).items()},
        "images_per_s": work.global_batch_size / seconds,
        "efficiency": alone / (world * seconds),
        "training_s": work.num_steps * seconds,
        "checkpoint_s": checkpoint_bytes(work.num_parameters) / machine.disk_bytes_per_s,
        "sampling_s": sampling_s(work, machine, world),
    }


# ---- against what was measured -------------------------------------------------------------------------------------


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """t_0 and slope of the line through the first and the last point."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return y[0] - slope * x[0], slope


def check_of(name: str, x: Sequence[float], y: Sequence[float]) -> list[dict[str, Any]]:
    """t = t_0 + slope · x, through the ends of a sweep; what lies between is predicted."""
    start, slope = line_through(x, y)
    return [
        {"sweep": f"{name} {a:,.4g}", "measured": b, "predicted": start + slope * a, "fitted": i in (0, len(x) - 1)}
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]


def sweep(rows: Sequence[Mapping[str, Any]], case: str, contestant: str) -> list[tuple[str, float]]:
    """Name and median CPU time per unit of the contestant's rows of a case, in their order."""
    own = [row for row in rows if row["case"] == case and row["contestant"] == contestant and row["measured"]]
    return [(row["name"], row["cpu_s"]["ours"]["median"]) for row in own]


def measured_rates(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """R of one core in training, and the speed at which checkpoints reach the disk; None for what was not measured."""
    found: dict[str, float | None] = {"flop_per_s": None, "disk_bytes_per_s": None}
    by_key = {(row["case"], row["contestant"], row.get("unit")): row for row in measured["rows"] if row["measured"]}
    step, saved = by_key.get(("training", "ours", "image")), by_key.get(("checkpoint", "ours", "checkpoint"))
    size = by_key.get(("checkpoint", "ours", "bytes"))
    if step is not None:
        found["flop_per_s"] = 3 * workload(CONFIGS["cifar10"]).forward_flop / step["cpu_s"]["ours"]["median"]
    if saved is not None and size is not None:
        found["disk_bytes_per_s"] = size["ours"] / saved["wall_s"]["ours"]["median"]
    return found


def checks(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model's forms against the CPU's sweeps: time over batch, side and T, two processes, a checkpoint's bytes."""
    rows, found = measured["rows"], []
    batch = [(float(name.split()[-1]), seconds) for name, seconds in sweep(rows, "batch", "ours")]
    if len(batch) > 2:
        x = [size for size, _ in batch]
        found += check_of("s per step, batch", x, [size * seconds for size, seconds in batch])
    side = [(float(name.split("×")[-1]) ** 2, seconds) for name, seconds in sweep(rows, "side", "ours")]
    if len(side) > 2:
        found += check_of("s per image and step, pixels", [pixels for pixels, _ in side], [s for _, s in side])
    steps = [(float(name.split()[-1]), seconds) for name, seconds in sweep(rows, "steps", "ours")]
    if len(steps) > 2:
        found += check_of("s per image, T =", [t for t, _ in steps], [t * seconds for t, seconds in steps])
    for row in rows:
        if row["case"] == "checkpoint" and row.get("unit") == "bytes":
            predicted = checkpoint_bytes(workload(CONFIGS["cifar10"]).num_parameters)
            found.append({"sweep": "bytes of a checkpoint", "measured": row["ours"], "predicted": predicted})
    speeds = {row["contestant"]: row["ours"] for row in rows if row["case"] == "processes" and row["measured"]}
    if len(speeds) == 2:  # each has half of the batch and the whole fixed part, the update included: at most twice
        one, two = speeds["one process"], speeds["two processes"]
        found.append({"sweep": "images/s, two processes", "measured": two, "predicted": 2 * one})
    return found


def results_of(measured: Mapping[str, Any]) -> dict[str, Any]:
    machine = Machine()
    workloads = [workload(config) for config in CONFIGS.values()]
    return {
        "kind": "cost",
        "measured_by": {key: measured[key] for key in ("date_utc", "commit", "machine", "versions")},
        "assumed": asdict(machine),
        "launching_s": launching_s(machine),
        "measured": measured_rates(measured),
        "counted": [
            {
                **asdict(work),
                "update_bytes": update_bytes(work),
                "checkpoint_bytes": checkpoint_bytes(work.num_parameters),
                "least_batches": least_batches(work, machine),
            }
            for work in workloads
        ],
        "rows": [
            {"name": work.name, "world": world, **costs(work, machine, world)}
            for work in workloads
            for world in WORLDS
        ],
        "checks": checks(measured),
    }


# ---- the script ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="?", help="results of run.py, for the checks")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    args = parser.parse_args(argv)
    if (args.table is None) == (args.measured is None):
        parser.error("give either the results of run.py or --table")
    if args.table:
        return documents.show(args.table)
    results = results_of(report.read_json(args.measured))
    if args.output:
        report.write_json(args.output, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
