"""The benchmark's own arithmetic, and that it refuses to time what is not the same. Nothing is timed here."""

import copy
import io
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from matplotlib.axes import Axes
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import codec as codec_files  # type: ignore  # noqa: E402
import cost_model  # type: ignore  # noqa: E402
import few_steps  # type: ignore  # noqa: E402
import flow  # type: ignore  # noqa: E402
import run as benchmark  # type: ignore  # noqa: E402
from speed import (  # type: ignore  # noqa: E402
    checkpoint,
    commands,
    cost_tables,
    data,
    documents,
    few_steps_tables,
    flow_tables,
    machine,
    peers,
    report,
    sampling,
    timing,
    training,
)
from speed.timing import STOCK, Difference, Mismatch, Read, Timed, Times, Work  # type: ignore  # noqa: E402

from ddpm_hf import DDPMPaperPipeline, codec  # noqa: E402

TINY: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "attention_resolutions": (4,)}
TINY |= {"layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate allows one precision in a process; other tests choose their own."""
    yield
    AcceleratorState._reset_state(True)


# ---- the same numbers, or no times -------------------------------------------------------------------------------


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("something was timed")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([Difference("ε", 2e-4, 1e-4)], "ε differs by 0.0002, allowed is 0.0001"),
        ([Difference("loss", 0.0, 1e-4), Difference("weights", math.nan, 1e-4)], "weights differs by nan"),
        ([], "nothing was compared"),
    ],
    ids=["too far", "not a number", "nothing"],
)
def test_a_difference_ends_the_benchmark_before_anything_is_timed(monkeypatch, capsys, found, message):
    """Exit code 1, the reason in one line; and the contestant's resources are let go of."""
    closed = []
    work = Work({STOCK: forbidden, "ours": forbidden}, lambda: found, close=lambda: closed.append(True))
    monkeypatch.setattr(benchmark, "catalogue", lambda: [Timed("sampling", "tiny", lambda quick: work)])
    monkeypatch.setattr(timing, "timed", forbidden)
    monkeypatch.setattr(benchmark, "quieten", lambda: None)  # for the tests that come after
    monkeypatch.setattr(report, "commit", lambda: None)  # it starts git
    assert benchmark.main(["--quick"]) == 1
    assert message in capsys.readouterr().err
    assert closed == [True]


def broken_unet(pipe: Any, dtype: torch.dtype, **options: bool) -> Any:
    """What speed_up might return with a fault: one bias of 64 off by a thousandth."""
    pipe = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-3
    return pipe


def build_tiny_sampling(names: tuple[str, ...] = (sampling.PLAIN, sampling.FAST, sampling.FAST_BF16)) -> Work:
    return sampling.build_sampling(True, config=TINY, batch=2, names=names, steps=(2, 2))


def build_tiny_auto() -> Work:
    names, baseline = (sampling.AUTO,), sampling.FAST
    return sampling.build_sampling(True, config=TINY, batch=2, names=names, steps=(2, 2), baseline=baseline)


@pytest.fixture(scope="module")
def tiny_network() -> Iterator[None]:
    """A network of three channels for `peers`, without the CIFAR-10 UNet's cost; it is exported once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peers, "CIFAR10", {**TINY, "sample_size": 32})
        peers.exported.cache_clear()
        yield
    peers.exported.cache_clear()


def build_tiny_peer(*names: str) -> Work:
    return peers.build_beside(True, names=names, batch=2, steps=(2, 2))


def build_tiny_training() -> Work:
    return training.build_training(True, batch=(4, 4), config=TINY)


def changed_run(**recipe: Any) -> Any:
    """build_ours of another recipe than stock's."""
    original = training.build_ours

    def build(*args: Any, **settings: Any) -> Any:
        run = original(*args, **settings)
        for name, value in recipe.items():
            setattr(run.updates, name, value)
        return run

    return build


def forgetful_run(*args: Any, **settings: Any) -> Any:
    """build_ours whose averages follow the weights too fast."""
    run = ORIGINAL_BUILD(*args, **settings)
    run.state.ema.decay = run.state.ema.min_decay = 0.999
    return run


def one_level_off(table: Any) -> Any:
    """load_samples with a wrong pixel."""
    samples = ORIGINAL_LOAD(table)
    array = samples.array.copy()
    array[7, 1, 2, 3] ^= 1
    return data.Samples(samples.name, array, 256, "")


ORIGINAL_BUILD, ORIGINAL_LOAD = training.build_ours, data.load_samples
other_schedule = SimpleNamespace(from_config=lambda config: DDPMScheduler(beta_end=0.0201))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        build_tiny_sampling,
        build_tiny_auto,
        partial(sampling.build_step, True),
        build_tiny_training,
        partial(data.build_input, True, with_draws=False),
    ],
    ids=["sampling", "auto", "scheduler", "training", "data"],
)
def test_the_contestants_compute_the_same(build):
    """Those of the benchmark, on tiny networks; and every one of them is compared."""
    work = build()
    try:
        timing.require_same("", work.differences())
    finally:
        work.close()
    baseline = sampling.FAST if build is build_tiny_auto else STOCK
    assert baseline in work.contestants and len(work.contestants) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "stand_in", "build"),
    [
        (sampling, "speed_up", broken_unet, build_tiny_sampling),
        (sampling, "DDPMScheduler", other_schedule, partial(sampling.build_step, True)),
        (training, "build_ours", changed_run(max_grad_norm=1e9), build_tiny_training),
        (training, "build_ours", changed_run(learning_rate_of=lambda num_updates: 2.01e-4), build_tiny_training),
        (training, "build_ours", forgetful_run, build_tiny_training),
        (data, "load_samples", one_level_off, partial(data.build_input, True, with_draws=False)),
    ],
    ids=["weight", "schedule", "clipping", "learning rate", "averages", "pixel"],
)
def test_a_faulty_stand_in_is_noticed(monkeypatch, owner, name, stand_in, build):
    monkeypatch.setattr(owner, name, stand_in)
    work = build()
    try:
        with pytest.raises(Mismatch):
            timing.require_same("", work.differences())
    finally:
        work.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [peers.ONNX_RUNTIME, peers.OPENVINO, STOCK])
def test_engines_compute_the_same_network(monkeypatch, tiny_network, engine):
    """Their images too, which the loop of our pipeline makes; and a network that is a little off is noticed."""
    if engine != STOCK and peers.missing(engine):
        pytest.skip(str(peers.missing(engine)))
    work = build_tiny_peer(engine, sampling.FAST)
    found = list(work.differences())
    timing.require_same("", found)
    assert {d.what.split(":")[0] for d in found} == {engine, sampling.FAST} and {d.allowed for d in found} == {1e-5}
    images = [call() for call in work.contestants.values()]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=0)  # float32, two steps
    original = peers.engine_of
    monkeypatch.setattr(peers, "engine_of", lambda *args: lambda x_t, t: 1.0001 * original(*args)(x_t, t))
    with pytest.raises(Mismatch, match=engine):
        timing.require_same("", build_tiny_peer(engine).differences())


@pytest.mark.parametrize("build", [commands.build_digits_training, commands.build_digits_sampling])
def test_commands_differ_in_kernels_and_the_fast_network(monkeypatch, build):
    started = []

    def run(*arguments: str, settings: Any = MappingProxyType({})) -> str:
        started.append((arguments, settings.get("DDPM_HF_NATIVE")))
        return ""

    monkeypatch.setattr(commands, "run", run)
    monkeypatch.setattr(commands, "read_metrics", lambda path: [{"loss": 0.5}])
    work = build(True)
    try:
        for call in work.contestants.values():
            call()
    finally:
        work.close()
    assert list(work.contestants) == [commands.BEFORE, commands.OURS]
    (before, none), (ours, kernels) = started
    assert (none, kernels) == ("0", None)
    outputs = [{part for part in side if not part.startswith("--output=")} for side in (ours, before)]
    assert outputs[1] - outputs[0] <= {"--no-fast"} and outputs[0] <= outputs[1]
    assert ("--no-fast" in before) == ("sample" in before)


@pytest.mark.parametrize(
    ("ours", "before"),
    [([0.9, 0.5], [0.9, 0.5001]), ([0.9001, 0.5], [0.9, 0.5]), ([0.9, math.nan], [0.9, 0.5]), ([], [])],
    ids=["last", "first", "not a number", "nothing"],
)
def test_another_training_is_noticed(monkeypatch, ours, before):
    """By each loss that it logs."""
    losses = {True: ours, False: before}
    monkeypatch.setattr(commands, "train_digits", lambda folder, steps, *, kernels: losses[kernels])
    work = commands.build_digits_training(True)
    try:
        with pytest.raises(Mismatch, match="loss|nothing was compared"):
            timing.require_same("", work.differences())
    finally:
        work.close()


@pytest.mark.slow
def test_openvino_computes_in_the_precision_that_it_is_asked_for(monkeypatch, tiny_network):
    """Its default is bfloat16 where the CPU has that, which is off by far more than float32."""
    if peers.missing(peers.OPENVINO):
        pytest.skip(str(peers.missing(peers.OPENVINO)))
    asked = []
    from openvino import Core

    def compile_model(self: Any, *args: Any, **options: Any) -> Any:
        model = COMPILE_MODEL(self, *args, **options)
        asked.append((model.get_property("INFERENCE_PRECISION_HINT").to_string(), args[2]["INFERENCE_NUM_THREADS"]))
        return model

    COMPILE_MODEL = Core.compile_model
    monkeypatch.setattr(Core, "compile_model", compile_model)
    build_tiny_peer(peers.OPENVINO)
    assert asked == [("f32", 1)]


@pytest.mark.slow
def test_a_lost_average_is_noticed(monkeypatch):
    """Of checkpoints: what is read back must be the averages of the weights, to the bit."""
    saving = checkpoint.Saving(TINY)
    try:
        timing.require_same("", [*saving.differences, *saving.same_files()])
        shadow = saving.run.state.ema.shadow_params[3]
        original = saving.ours

        def late() -> Path:
            folder = original()
            shadow.flatten()[0] += 1e-6
            return folder

        monkeypatch.setattr(saving, "ours", late)
        with pytest.raises(Mismatch, match="averages"):
            timing.require_same("", saving.same_files())
    finally:
        saving.folder.cleanup()


# ---- times -------------------------------------------------------------------------------------------------------


def test_contestants_take_turns_and_change_order(monkeypatch):
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # between the turns; here it would look through all of pytest
    order = []
    times = timing.paired_times({name: partial(order.append, name) for name in "abc"}, 3)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_quartiles_are_numpys():
    values = np.random.default_rng(0).random(12).tolist()
    expected = np.percentile(values, [25, 50, 75])
    np.testing.assert_allclose(list(timing.quartiles(values).values()), expected, rtol=1e-12)
    assert timing.quartiles([3.0]) == {"q1": 3.0, "median": 3.0, "q3": 3.0}


def test_a_ratio_is_of_one_round():
    """The machine is three times slower in the second round: the ratio is 2 all the same, unlike that of the means."""
    assert timing.ratios([2.0, 9.0, 2.0], [1.0, 3.0, 1.0]) == {"q1": 2.0, "median": 2.0, "q3": 2.5}


def made_up(monkeypatch, *, baseline: str = STOCK, **options: Any) -> list[timing.Row]:
    """Rows of a work of 4 units with CPU times 8 s (the baseline) and 4, 5, 2 s (ours); wall times of a quarter."""
    cpu = {baseline: [8.0, 8.0, 8.0], "ours": [4.0, 5.0, 2.0]}
    times = {name: [Times(s, s / 4) for s in seconds] for name, seconds in cpu.items()}
    monkeypatch.setattr(timing, "paired_times", lambda *args, **kwargs: times)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    work = Work(dict.fromkeys(cpu, forbidden), lambda: [Difference("x", 0.0, 0.0)], units=4, unit="image")
    options = {"rounds": (3, 1), "all_cores": True, "baseline": baseline, **options}
    return timing.measure(Timed("sampling", "tiny", lambda quick: work, **options), quick=False, cores=2)


@pytest.mark.parametrize(
    ("target", "verdict"), [((1.5, 1.9), "reached"), ((1.5, 2.5), "least"), ((2.1, 2.5), "missed"), (None, None)]
)
def test_a_row_has_seconds_per_unit_ratios_and_a_verdict(monkeypatch, target, verdict):
    [row] = made_up(monkeypatch, targets={"ours": target} if target else {})
    assert row["cpu_s"]["ours"] == {"q1": 0.75, "median": 1.0, "q3": 1.125}
    assert row["cpu_s"]["stock"]["median"] == 2.0 and row["wall_s"]["stock"]["median"] == 0.5
    assert row["cpu_s"]["ratio"] == pytest.approx({"q1": 1.8, "median": 2.0, "q3": 3.0})
    assert row["all_cores_wall_s"]["threads"] == 2
    assert (row["verdict"], row["decided_by"], row["rounds"], row["unit"]) == (verdict, "cpu_s", 3, "image")


def test_a_row_beside_another_names_it(monkeypatch, results, tmp_path):
    """In its numbers, in the table's cell; and it is no bar of a plot that is beside stock."""
    [row] = made_up(monkeypatch, baseline="a peer")
    assert row["baseline"] == "a peer" and row["cpu_s"]["a peer"]["median"] == 2.0 and "stock" not in row["cpu_s"]
    assert row["all_cores_wall_s"]["ratio"]["median"] == 2.0
    assert report.cells(row)[:5] == ["tiny", "ours", "2 s (a peer)", "1 s", "2.00× (1.80–3.00)"]
    with pytest.raises(ValueError, match="no ratios"):
        report.plot({**results, "rows": [row]}, tmp_path / "speed.png")


def test_a_gpu_is_judged_by_wall_time(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    [row] = made_up(monkeypatch, device="cuda", targets={"ours": (1.0, 1.0)})
    assert row["decided_by"] == "wall_s" and row["verdict"] == "reached"


@pytest.mark.parametrize(("more_is_better", "ratio", "verdict"), [(False, 0.5, "missed"), (True, 2.0, "reached")])
def test_values_are_compared_the_right_way_round(more_is_better, ratio, verdict):
    """200 beside stock's 100: twice the images/s, or twice the memory."""
    spec = Read(
        "memory",
        "x",
        lambda quick: {STOCK: 100.0, "ours": 200.0},
        "bytes",
        {"ours": (1.0, 1.0)},
        more_is_better=more_is_better,
    )
    [row] = timing.measure(spec, quick=True, cores=1)
    assert (row["ratio"], row["verdict"]) == (ratio, verdict)


@pytest.mark.parametrize(
    ("target", "verdict", "shown", "says"),
    [
        ((1.0, 1.0), "missed", "1×", "+20 MB"),
        ((1.1, 1.0), "missed", "at most 1.1×, better 1×", "**missed**: 1.20 times stock's"),
        ((1.4, 1.2), "reached", "at most 1.4×, better 1.2×", "met, and the better one: 1.20 times stock's"),
        ((1.4, 1.1), "least", "at most 1.4×, better 1.1×", "met: 1.20 times stock's"),
    ],
)
def test_memory_has_a_target_from_above(target, verdict, shown, says):
    values = {STOCK: 1e8, "ours": 1.2e8}
    spec = Read("memory", "x", lambda quick: values, "bytes", {"ours": target}, at_most=True)
    [row] = timing.measure(spec, quick=True, cores=1)
    assert row["verdict"] == verdict
    assert report.cells(row)[4:] == ["0.83×", "–", shown, says]


@pytest.mark.slow
def test_peak_memory_is_the_processes_own():
    """Not what the parent has, whose peak a child's ru_maxrss begins with on Linux."""
    mine = np.ones(400 * 2**20, dtype=np.uint8)
    code = "from speed.alone import peak_bytes; a = b'x' * 100_000_000; print(peak_bytes())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, check=True)
    assert 100e6 < int(found.stdout) < 300e6
    assert mine[-1] == 1


# ---- what is measured --------------------------------------------------------------------------------------------

TARGETS = {  # of the issue: (case, name, contestant, device) → at least, reach for
    ("sampling", "CIFAR-10 UNet, batch 1", "sped up", "cpu"): (1.9, 2.5),
    ("sampling", "CIFAR-10 UNet, batch 16", "sped up", "cpu"): (1.6, 2.2),
    ("sampling", "CIFAR-10 UNet, batch 1, beside our float32", "sped up, auto", "cpu"): (0.98, 1.0),
    ("sampling", "CIFAR-10 UNet, batch 16, beside our float32", "sped up, auto", "cpu"): (0.98, 1.0),
    ("sampling", "small UNet, batch 1", "sped up", "cpu"): (1.7, 2.2),
    ("sampling", "small UNet, batch 64", "sped up", "cpu"): (1.15, 1.35),
    ("scheduler", "step, 1×3×32×32", "ours", "cpu"): (5.0, 8.0),
    ("training", "CIFAR-10 UNet, float32 stock", "ours", "cpu"): (1.2, 1.4),
    ("training", "28×28 UNet, batch 128 (quick: 16), float32 stock", "ours", "cpu"): (1.2, 1.4),
    ("commands", "training the digits of the demo, 1000 steps (quick: 60), beside DDPM_HF_NATIVE=0", "ours", "cpu"): (
        1.6,
        2.5,
    ),
    (
        "commands",
        "16 digits, 1000 steps, `ddpm-hf sample`, beside --no-fast and DDPM_HF_NATIVE=0",
        "ours",
        "cpu",
    ): (1.8, 2.5),
    ("data", "images, 32×32", "ours", "cpu"): (15.0, 30.0),
}
for peer in ("ONNX Runtime", "OpenVINO"):
    for batch in (1, 16):
        TARGETS["peers", f"CIFAR-10 UNet, batch {batch}, beside {peer}", "sped up", "cpu"] = (1.25, 1.6)
AMX_TARGETS = {
    ("sampling", "CIFAR-10 UNet, batch 1", "sped up, bf16"): (5.5, 8.0),
    ("sampling", "CIFAR-10 UNet, batch 16", "sped up, bf16"): (6.5, 9.0),
    ("training", "CIFAR-10 UNet, float32 stock", "ours, bf16"): (3.0, 3.8),
    ("training", "28×28 UNet, batch 128 (quick: 16), float32 stock", "ours, bf16"): (3.0, 3.8),
}
for batch, target in ((1, (1.3, 1.8)), (16, (1.4, 1.8))):  # what OpenVINO does without AMX is no peer of ours
    TARGETS["peers", f"CIFAR-10 UNet, batch {batch}, beside OpenVINO, bf16", "sped up, bf16", "cpu"] = target
GPU_TARGETS = {  # by case and name; for each of the settings that one may choose there
    ("training", "CIFAR-10 UNet, batch 128, bf16 stock"): (1.5, ("ours, bf16", "ours, bf16, compiled")),
    ("training", "CIFAR-10 UNet, batch 128, default precision stock"): (2.5, ("ours, bf16", "ours, bf16, compiled")),
    ("sampling", "CIFAR-10 UNet, batch 1"): (5.0, ("sped up", "sped up, bf16", "sped up, bf16, compiled")),
    ("sampling", "CIFAR-10 UNet, batch 64"): (2.5, ("sped up", "sped up, bf16", "sped up, bf16, compiled")),
}
for work, (target, settings) in GPU_TARGETS.items():
    TARGETS |= {(*work, setting, "cuda"): (target, target) for setting in settings}


def test_the_catalogue_has_every_target_and_every_case():
    specs = benchmark.catalogue()
    found = {
        (s.case, s.name, contestant, s.device): target
        for s in specs
        for contestant, target in s.targets.items()
        if s.case != "memory"
    }
    assert found == TARGETS
    timed = [s for s in specs if isinstance(s, Timed)]
    assert {(s.case, s.name, name): target for s in timed for name, target in s.targets_amx.items()} == AMX_TARGETS
    for spec in timed:  # what is no comparison with stock says so where it is read
        assert spec.baseline == STOCK or " beside " in spec.name
    memory = [s for s in specs if s.case == "memory"]
    assert all(s.at_most for s in memory)
    assert memory[0].targets["ours"] == (1.0, 1.0) and memory[0].targets["sped up, bf16"] == (1.1, 1.0)
    assert {s.case for s in specs} == set(report.CASES)
    assert len({(s.case, s.name, s.device) for s in specs}) == len(specs)
    quick = list(timing.chosen(specs, None, quick=True))
    assert {s.case for s in quick} == set(report.CASES) and len(quick) < len(specs)
    assert {s.case for s in timing.chosen(specs, ["data"], quick=False)} == {"data"}
    assert list(timing.chosen(specs, None, quick=False, device="cuda")) == [s for s in specs if s.device == "cuda"]


def test_gpu_rows_are_listed_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "commit", lambda: None)  # it starts git
    monkeypatch.setattr(report, "has_kernels", lambda: True)  # it may start a compiler
    gpu = [spec for spec in benchmark.catalogue() if spec.device == "cuda"]
    results = benchmark.run(gpu, quick=True)
    assert [row["measured"] for row in results["rows"]] == [False] * 10
    assert report.speed_table(results).count("| unmeasured | –") == 10
    assert report.speed_table(results).count(machine.NO_GPU) == 10
    assert results["machine"]["gpu"] is None and results["date_utc"].endswith("+00:00")
    there = ", ".join(name for name, here in results["machine"]["instructions"].items() if here)
    assert f" with {there}, kernels of our own compiled, GPU: none; " in report.origin(results)


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads Linux's list of flags"
)
def test_the_instructions_are_those_that_the_system_names():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[1].splitlines()[0].split()
    assert list(machine.instructions()) == ["amx", "avx512_bf16", "avx512", "avx2"]
    assert [machine.instructions()[name] for name in ("avx512_bf16", "avx2")] == [
        name in flags for name in ("avx512_bf16", "avx2")
    ]


@pytest.mark.parametrize("amx", [True, False])
def test_what_needs_amx_is_measured_or_listed(monkeypatch, amx):
    """With it the bfloat16 row has its target; without, the row has none, and another says that it is unmeasured."""
    monkeypatch.setattr(timing, "has_amx", lambda: amx)
    rows = made_up(monkeypatch, targets_amx={"ours": (1.9, 3.0)})
    assert (rows[0]["name"], rows[0]["measured"]) == ("tiny", True)
    if amx:
        [row] = rows
        assert (row["target"], row["verdict"]) == ([1.9, 3.0], "least")
    else:
        row, listed = rows
        assert (row["target"], row["verdict"]) == (None, None)
        assert (listed["name"], listed["measured"], listed["target"]) == ("tiny, with AMX", False, [1.9, 3.0])
        assert report.cells(listed) == [
            "tiny, with AMX", "ours", "–", "–", "unmeasured", "–", "1.9×, better 3×", machine.NO_AMX
        ]  # fmt: skip


def test_an_obstacle_is_the_reason_of_rows_that_are_not_measured():
    """And nothing is built for them."""
    spec = Timed("peers", "x", forbidden, {"sped up": (1.0, 2.0)}, obstacle=lambda: "y not installed")
    [row] = timing.measure(spec, quick=True, cores=1)
    assert (row["measured"], row["target"], row["reason"]) == (False, [1.0, 2.0], "y not installed")
    assert report.cells(row)[4:] == ["unmeasured", "–", "1×, better 2×", "y not installed"]


def test_peers_say_what_is_not_installed(monkeypatch):
    absent = {"onnxscript", "openvino"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name in absent else object())
    assert peers.missing(peers.ONNX_RUNTIME) == "onnxscript not installed (the extra `bench`)"
    assert peers.missing(peers.OPENVINO) == "onnxscript and openvino not installed (the extra `bench`)"
    absent.clear()
    monkeypatch.setattr(machine, "has_amx", lambda: False)
    assert peers.missing(peers.OPENVINO) is None and peers.missing(peers.OPENVINO_BF16) == machine.NO_AMX
    monkeypatch.setattr(machine, "has_amx", lambda: True)
    assert peers.missing(peers.OPENVINO_BF16) is None


# ---- tables and plots --------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> dict[str, Any]:
    """A small file of results, as run.py writes them."""
    q = {"q1": 0.001, "median": 0.0015, "q3": 0.002}
    head = {"device": "cpu", "measured": True, "target": None, "verdict": None}
    times = {"ours": q, "stock": {**q, "median": 0.003}, "ratio": {"q1": 1.9, "median": 2.0, "q3": 2.1}}
    row = {**head, "case": "sampling", "name": "A", "contestant": "sped up", "decided_by": "cpu_s", "cpu_s": times}
    row |= {"target": [1.5, 2.5], "verdict": "least", "all_cores_wall_s": {"ratio": {"median": 1.7}}}
    memory = {**head, "case": "memory", "name": "B", "contestant": "ours", "unit": "bytes", "ratio": 0.5}
    memory |= {"ours": 2e8, "stock": 1e8, "target": [1.0, 1.0], "verdict": "missed"}
    alone = {**head, "case": "processes", "name": "C", "contestant": "one", "unit": "images/s", "ratio": None}
    alone |= {"ours": 1234.5, "stock": None}
    gpu = {**head, "case": "training", "name": "D", "contestant": "ours", "device": "cuda", "measured": False}
    return {
        "kind": "speed",
        "quick": True,
        "date_utc": "2020-06-19T00:00:00+00:00",
        "commit": "abc1234+",
        "machine": {"cpu": "Abacus", "cores": 2, "threads": 1, "capability": "AVX2", "gpu": None},
        "versions": {"torch": "2.13.0"},
        "rows": [row, memory, alone, {**gpu, "target": [1.5, 1.5]}],
    }


def test_the_table_says_what_the_json_says(results):
    table = documents.table_of(results)
    assert table.splitlines()[2:5] == [
        "| work | contestant | stock | ours | stock / ours (quartiles) | all cores, wall | target |  |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| A | sped up | 3 ms | 1.5 ms | 2.00× (1.90–2.10) | 1.70× | 1.5×, better 2.5× | met |",
    ]
    assert "| D (GPU) | ours | – | – | unmeasured | – | 1.5× |  |" in table
    assert "| B | ours | 100 MB | 200 MB | 0.50× | – | 1× | +100 MB |" in table
    assert "| C | one | – | 1,234 images/s | – | – |  |  |" in table
    origin = "(the quick benchmark, 2020-06-19T00:00:00+00:00, commit abc1234+, Abacus, 2 cores (AVX2), GPU: none; "
    assert table.splitlines()[-1] == origin + "torch 2.13.0)"
    targets = documents.table_of(results, "targets").splitlines()[2:]
    cases, lines = zip(*(line.removeprefix("| ").split(": ", 1) for line in targets), strict=True)
    assert [line[:2] for line in lines] == ["A ", "B ", "D "] and {f"| {line}" for line in lines} <= set(
        table.splitlines()
    )
    assert cases == tuple(row["case"] for row in results["rows"] if row["target"])
    assert "| A" in documents.table_of(results, "sampling") and "| B" not in documents.table_of(results, "sampling")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(12.34, "12.3 s"), (0.01234, "12.3 ms"), (1.234e-5, "12.3 µs"), (1.0, "1 s")]
)
def test_times_have_three_digits(seconds, shown):
    assert report.shown_s(seconds) == shown


def test_the_plot_has_a_bar_for_every_ratio(results, tmp_path, monkeypatch):
    """From 1 to the ratio, here 2; values that are not times have none."""
    drawn: list[Any] = []
    original = Axes.barh

    def barh(self: Axes, y: Any, width: Any, **options: Any) -> Any:
        drawn.append((options["left"], width))
        return original(self, y, width, **options)

    monkeypatch.setattr(Axes, "barh", barh)
    path = tmp_path / "speed.png"
    report.plot(results, path)
    assert drawn == [(1, [1.0])]
    assert np.asarray(Image.open(path).convert("L")).std() > 10  # something is on it
    with pytest.raises(ValueError, match="no ratios"):
        report.plot({**results, "rows": results["rows"][1:]}, path)


def test_documents_are_filled_from_results(results, tmp_path):
    """Once, and then the same; and what is not measured says so."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    page = tmp_path / "docs" / "speed.md"
    blocks = "<!-- benchmarks/results/x.json: sampling -->\nold\n<!-- end -->\n"
    page.write_text(f"Before\n{blocks}between\n<!-- benchmarks/results/absent.json -->\n<!-- end -->\nafter\n")
    report.write_json(tmp_path / "benchmarks" / "results" / "x.json", results)
    assert documents.rewrite_documents(tmp_path) == [page]
    text = page.read_text()
    assert documents.table_of(results, "sampling") in text and "old" not in text
    assert text.count(documents.NOT_YET) == 1 and text.startswith("Before\n") and text.endswith("\nafter\n")
    assert documents.rewrite_documents(tmp_path) == []


def test_no_document_and_no_card_lags_behind_its_results():
    pages = list(documents.documents())
    assert {ROOT / "docs" / "fashion.md", ROOT / "model_cards" / "ddpm-fashion" / "README.md"} <= {*pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert documents.with_tables(text) == text, page


@pytest.mark.parametrize("name", ["speed.md", "scaling.md", "cases.md", "distillation.md"])
def test_the_tables_in_the_documents_are_those_of_the_results(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert len(documents.BLOCK.findall(text)) == text.count("<!-- benchmarks/results/") >= 2
    assert documents.with_tables(text) == text, "python benchmarks/run.py --table FILE renews them"


# ---- few steps ---------------------------------------------------------------------------------------------------


def step_rows(**distances: list[float]) -> list[dict[str, Any]]:
    common = {"frechet_distance_real": 1.0, "confident": 0.5, "confident_real": 0.6}
    common |= {"frechet_distance_error": 0.5, "frechet_distance_real_error": 0.1}
    return [
        {"scheduler": name, "steps": steps, "frechet_distance": distance, "cpu_s_per_image": steps * 0.001, **common}
        for name, own in distances.items()
        for steps, distance in zip((10, 100, 1000), own, strict=True)
    ]


def test_the_least_number_of_steps_within_a_tenth(results):
    """Of our 1000 steps: 11 is allowed where that has 10; a better one on the way does not move the bar."""
    rows = step_rows(
        **{few_steps_tables.OURS: [30.0, 9.0, 10.0], "stock DDIM": [11.0, 10.5, 12.0], "stock X": [20.0] * 3}
    )
    least = few_steps_tables.least_steps(rows)
    assert {name: row and row["steps"] for name, row in least.items()} == {
        few_steps_tables.OURS: 100,
        "stock DDIM": 10,
        "stock X": None,
    }
    table = few_steps_tables.table({**results, "kind": "few steps", "num_samples": 256, "rows": rows})
    assert "| stock DDIM | 10 | 10 ms | 99% |" in table and "| stock X | none of these | – | – |" in table
    assert f"| {few_steps_tables.OURS} | 30.0 ± 0.5 (50%) | 9.0 ± 0.5 (50%) | 10.0 ± 0.5 (50%) |" in table
    later = {
        **results,
        "kind": "few steps",
        "num_samples": 256,
        "rows": rows,
        "later": [{**results, "of": ["stock DDIM"]}],
    }
    table = few_steps_tables.table(later)
    assert "| stock DDIM | 10 | – | – |" in table and " Measured later: stock DDIM: " in table


def test_renewed_rows_stand_in_place_of_the_old_with_their_source():
    ours, ddim, clipped = few_steps_tables.OURS, few_steps.DDIM, few_steps.DDIM_CLIPPED
    old = {"kind": "few steps", "commit": "a", "rows": [{"scheduler": ours, "v": 1}, {"scheduler": ddim, "v": 1}]}
    new = {"kind": "few steps", "num_samples": 4, "commit": "b", "rows": [{"scheduler": clipped, "v": 2}]}
    added = few_steps.renewed(old, new, [clipped])
    assert [row["scheduler"] for row in added["rows"]] == [ours, ddim, clipped] and added["commit"] == "a"
    both = {**new, "commit": "c", "rows": [{"scheduler": name, "v": 3} for name in (clipped, ddim)]}
    again = few_steps.renewed(added, both, [ddim, clipped])
    assert [(row["scheduler"], row["v"]) for row in again["rows"]] == [(ours, 1), (ddim, 3), (clipped, 3)]
    assert again["later"] == [{"commit": "c", "of": [ddim, clipped]}]  # the older source is of no row any more


def test_the_schedulers_mean_our_process():
    """Each samples the digits' β, from our configuration, with one network."""
    pipes = few_steps.pipelines(few_steps.CHECKPOINT)
    assert [*pipes] == [*few_steps.NAMES]
    alphas = pipes[few_steps_tables.OURS].scheduler.diffusion.alphas_cumprod
    for name in few_steps.STOCK:
        found = pipes[name].scheduler.alphas_cumprod.numpy()
        np.testing.assert_allclose(found[:900], alphas[:900], rtol=2e-4)  # stock's are float32
        assert pipes[name].unet is pipes[few_steps_tables.OURS].unet


# ---- files of the codec ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_pipe() -> DDPMPaperPipeline:
    return DDPMPaperPipeline.from_pretrained(codec_files.CHECKPOINT)


def test_the_same_digits_with_17_and_with_256_levels():
    sets = codec_files.data_sets(360)
    assert {levels.shape for levels in sets.values()} == {(360, 1, 8, 8)}
    assert sets[17].max() == 16 and sets[256].max() == 255
    np.testing.assert_array_equal(np.rint(sets[256] / 255 * 16), sets[17])


def test_the_other_formats_are_lossless_and_all_bits_are_counted():
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 2, (6, 1, 8, 8), dtype=np.uint8) * 16
    mosaic = codec_files.mosaic(levels)
    assert mosaic.shape == (16, 24)
    for place, image in enumerate(levels):
        row, column = divmod(place, 3)
        np.testing.assert_array_equal(mosaic[8 * row : 8 * row + 8, 8 * column : 8 * column + 8], image[0])
    for format in ("PNG", "WEBP"):
        with Image.open(io.BytesIO(codec_files.saved(mosaic, format))) as opened:
            np.testing.assert_array_equal(np.asarray(opened.convert("L")), mosaic)
    found = codec_files.formats(levels, 17)
    share = (levels > 0).mean()
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert found["all levels alike: log₂ 17"] == math.log2(17)
    assert found["entropy of their histogram"] == pytest.approx(entropy)
    assert found["PNG, one mosaic"] == 8 * len(codec_files.saved(mosaic, "PNG")) / levels.size
    files = [len(codec_files.saved(image[0], "PNG")) for image in levels]
    assert found["PNG, a file each"] == 8 * sum(files) / levels.size
    assert len(found) == 9 and all(bpd > 0.9 * entropy for bpd in found.values())  # nothing beats random bits


@pytest.mark.slow
def test_the_chains_are_those_of_the_command_and_of_the_sampler(monkeypatch, digits_pipe):
    monkeypatch.setattr(codec_files, "STEPS", (5,))
    levels = codec_files.data_sets(2)[17]
    found = codec_files.chains(digits_pipe, levels, 17)
    assert found[5, "chosen"] == codec.fit_chain(digits_pipe, levels, 5, num_levels=17)
    assert found[5, "even"]["inference_timesteps"] == sorted(digits_pipe.scheduler.chain(5).timesteps.tolist())
    bounds = {name: codec_files.bound(digits_pipe, levels, 17, chain)["bpd"] for (_, name), chain in found.items()}
    assert bounds["chosen"] < bounds["even"]


def test_a_file_is_the_sum_of_its_parts_and_is_decoded(monkeypatch, digits_pipe):
    levels = codec_files.data_sets(2)[17]
    chain = {"inference_timesteps": [10, 100, 999], "x_start_mse": [0.001, 0.02, 1.0]}
    row = codec_files.coded(digits_pipe, levels, 17, chain)
    parts = row["net_bpd"] + row["initial_bpd"] + row["header_bpd"]
    assert row["file_bpd"] == pytest.approx(parts) and row["file_bpd"] == 8 * row["file_bytes"] / levels.size
    alone = codec_files.alone(digits_pipe, {"chain": chain, "num_levels": 17}, levels)
    assert alone[1]["net_bpd"] == alone[0]["net_bpd"] and alone[1]["header_bpd"] < alone[0]["header_bpd"]
    other = codec.Decoded(torch.zeros(levels.shape, dtype=torch.uint8), 17, None)
    monkeypatch.setattr(codec, "decompress", lambda *args: other)
    with pytest.raises(AssertionError, match="come back"):
        codec_files.coded(digits_pipe, levels, 17, chain)


def test_weights_are_paid_for_by_what_they_save():
    assert codec_files.images_to_pay_for(32_000_000, 50.0) == "640,000 images"
    assert codec_files.images_to_pay_for(32_000_000, -1.0) == "never"


def test_the_codec_s_tables_are_those_of_its_results():
    text = codec_files.DOCUMENT.read_text(encoding="utf-8")
    assert {name for _, name, _ in codec_files.BLOCK.findall(text)} == set(codec_files.TABLES)
    results = report.read_json(report.ROOT / "benchmarks" / "results" / "codec.json")
    again = "python benchmarks/codec.py --table benchmarks/results/codec.json renews them"
    assert codec_files.with_tables(text, results) == text, again
    for row in results["rows"]:
        assert row["net_bpd"] <= 1.01 * row["bound_bpd"]  # the issue's own limit


# ---- the flow ----------------------------------------------------------------------------------------------------


def test_the_flow_s_tables_are_those_of_its_results():
    text = (ROOT / "docs" / "flow.md").read_text(encoding="utf-8")
    assert {name for _, _, name, _ in documents.BLOCK.findall(text)} == set(flow_tables.TABLES)
    assert flow.MEASUREMENTS.keys() == flow_tables.TABLES.keys()
    again = "python benchmarks/flow.py --table benchmarks/results/flow.json renews them"
    assert documents.with_tables(text) == text, again


def test_standard_noise_has_the_statistics_of_standard_noise():
    """Within 5 of their standard errors; and what is constant has no variance and counts in no correlation."""
    noise = torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = flow.statistics_of(noise)
    assert found["radius2"] == pytest.approx(1, abs=5 * math.sqrt(2 / 16 / 4000))
    assert found["radius2_deviation"] == pytest.approx(math.sqrt(2 / 16), rel=0.1)
    assert 0.88 < found["lowest_variance"] < found["median_variance"] < found["highest_variance"] < 1.12
    assert found["rms_correlation"] == pytest.approx(1 / math.sqrt(4000), rel=0.3)
    assert found["kurtosis"] == pytest.approx(3, abs=0.1)
    noise[:, :, 0] = 0.5
    constant = flow.statistics_of(noise)
    assert constant["lowest_variance"] == 0 and constant["rms_correlation"] == pytest.approx(1 / 64, rel=0.4)


# ---- cost model --------------------------------------------------------------------------------------------------


def round_machine(**values: Any) -> cost_model.Machine:
    """One TFLOP/s, t_0 of 3 ms, links of 1 and 0.1 GB/s, memory of 10, a disk of 1."""
    numbers = {"peak_flop_per_s": 2e12, "share_of_peak": 0.5, "launch_s": 1e-5, "kernels_forward": 100}
    numbers |= {"memory_bytes_per_s": 1e10, "link_bytes_per_s": 1e9, "network_bytes_per_s": 1e8}
    return cost_model.Machine(**{**numbers, "disk_bytes_per_s": 1e9, **values})


WORK = cost_model.Workload("x", num_parameters=10**6, forward_flop=1e9, global_batch_size=64, num_steps=1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "gflop"), [("cifar10", 35_746_307, 12.4), ("lsun256", 113_673_219, 497)]
)
def test_parameters_and_operations_are_counted(name, parameters, gflop):
    """The paper's own counts of parameters; 12.4 GFLOP were known before, for the other the counter is the source."""
    work = cost_model.workload(cost_model.CONFIGS[name])
    assert work.num_parameters == parameters
    assert work.forward_flop / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_cost_of_a_step_is_the_sum_of_its_parts():
    """By hand, on 1, 8 and 64 devices: 3 ms an image; 52 MB of update; 8 MB · (N − 1)/N of gradients."""
    machine = round_machine()
    assert cost_model.step_s(WORK, machine, 1) == pytest.approx(0.192 + 0.0052)
    eight = cost_model.step_parts_s(WORK, machine, 8)
    assert eight == pytest.approx({"compute": 0.024, "update": 0.0052, "exchange": 0.007, "waiting": 0.0})
    many = cost_model.step_parts_s(WORK, machine, 64)  # one image each, 7.875 MB over 0.1 GB/s beside 2 ms of it
    assert many == pytest.approx({"compute": 0.003, "update": 0.0052, "exchange": 0.07875, "waiting": 0.07675})
    assert cost_model.step_s(WORK, machine, 64) == pytest.approx(0.003 + 0.0052 + 0.07675)
    costs = cost_model.costs(WORK, machine, 64)
    assert costs["efficiency"] == pytest.approx(0.1972 / (64 * 0.08495))
    assert costs["training_s"] == pytest.approx(84.95) and costs["checkpoint_s"] == pytest.approx(0.02)


def test_no_step_is_shorter_than_its_launches():
    machine = round_machine(launch_s=1e-3)
    assert cost_model.compute_s(WORK, machine, 1) == pytest.approx(0.3)
    assert cost_model.compute_s(WORK, machine, 200) == pytest.approx(0.6)


def test_more_devices_help_down_to_these_batches():
    """Where 3 ms an image make up for launches, and 2 ms of them for 7 and 78.75 ms of exchange."""
    found = cost_model.least_batches(WORK, round_machine(launch_s=1e-3))
    assert found == pytest.approx({"launches": 100, "exchange of 8": 3.5, "exchange of 64": 39.375})


def test_sampling_is_shared_out_by_whole_batches():
    """782 batches of 64: 64 ms a step; 13 rounds of 64 devices, the last one not full."""
    machine = round_machine()
    assert cost_model.sampling_s(WORK, machine, 1) == pytest.approx(782 * 1000 * 0.064)
    assert cost_model.sampling_s(WORK, machine, 64) == pytest.approx(13 * 1000 * 0.064)


def test_a_checkpoint_has_the_bytes_of_the_model():
    """20 a parameter; the rest, of names, code and manifest, is under 100 kB."""
    saving = checkpoint.Saving(TINY)
    try:
        num_parameters = sum(parameter.numel() for parameter in saving.run.state.unet.parameters())
        found = checkpoint.folder_bytes(saving.ours())
        code = sum(path.stat().st_size for path in saving.root.rglob("*.py"))
    finally:
        saving.folder.cleanup()
    predicted = cost_model.checkpoint_bytes(num_parameters)
    assert predicted < found - code < predicted + 100_000


def measured_rows() -> list[dict[str, Any]]:
    """Sweeps that follow the model: 10 ms and 2 ms for each image; two processes 1.6 times as fast as one."""
    head = {"measured": True, "contestant": "ours"}
    seconds = {1: 0.012, 4: 0.0045, 8: 0.00325}
    rows = [
        {**head, "case": "batch", "name": f"small UNet, batch {b}", "cpu_s": {"ours": {"median": s}}}
        for b, s in seconds.items()
    ]
    for name, speed in (("one process", 100.0), ("two processes", 160.0)):
        rows.append({**head, "case": "processes", "contestant": name, "name": "x", "ours": speed})
    return rows


def test_sweeps_are_fitted_at_their_ends():
    found = {c["sweep"]: c for c in cost_model.checks({"rows": measured_rows()})}
    assert cost_model.line_through([1, 4, 8], [0.012, 0.018, 0.026]) == pytest.approx((0.010, 0.002))
    middle = found["s per step, batch 4"]
    assert (middle["measured"], middle["predicted"]) == pytest.approx((0.018, 0.018)) and not middle["fitted"]
    assert found["s per step, batch 1"]["fitted"] and found["s per step, batch 8"]["fitted"]
    assert found["images/s, two processes"]["predicted"] == 200.0


def test_the_cost_tables_are_made_of_the_results(results):
    """Measured and assumed in columns of their own, and a dash for what was not measured."""
    costs = cost_model.results_of({**results, "rows": measured_rows()})
    table = cost_tables.table(costs)
    assert "| images/s, two processes | 160 | 200 | +25% |" in table
    assert "|  | measured here, on the CPU | assumed, of a GPU |" in table
    assert "| R, reached in training | – | 93.6 TFLOP/s |" in table
    assert len(cost_tables.table(costs, "counted").splitlines()) == 4
    assert [row["world"] for row in costs["rows"]] == [1, 8, 64, 1, 8, 64]
