"""Would the tests notice a fault? Thirty small faults, one at a time, before and after the modules became packages.

    python tests/mutation/mutate.py list              the thirty places, and those that were replaced, with the reason
    python tests/mutation/mutate.py before            commit f8006bc with its tests, all but the slow ones
    python tests/mutation/mutate.py after [COMMIT]    a later commit (HEAD) with its unit and integration tests
    python tests/mutation/mutate.py check             exit code 1 where a fault lives that was caught before

The places, six in each of five files, are drawn by a seed. For each, the tests that are most likely to notice it run
first, and where none does, all others. A test counts only if it passes without the fault. Everything runs in copies
in a temporary folder. results.json is written after each fault; what it has of that commit is not run again. Five
minutes for a commit whose likely tests notice everything, on two cores that do other work too; where a fault lives, up
to an hour more. Needs a clone with f8006bc in it.
"""

import argparse
import contextlib
import fcntl
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported. No bytecode: that of another fault may have the same size and second.
os.environ["OMP_NUM_THREADS"] = "1"
sys.dont_write_bytecode = True

import accelerate  # noqa: E402, F401
import datasets  # noqa: E402, F401
import hypothesis  # noqa: E402, F401
import pytest  # noqa: E402
import sklearn.datasets  # noqa: E402, F401
import torch  # noqa: E402, F401
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402, F401
from places import Place, equivalent_places, in_random_order, mutated_source, places  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
BEFORE = "f8006bc"
SEED = 0
PER_FILE = 6
LIKELY_SECONDS, ALL_SECONDS = 300, 3600  # a fault may make an endless loop
MARKERS = {"before": "not slow", "after": "not slow and not docs and not long"}
PYTEST = ("-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0")
# Where a function of f8006bc has another name now.
RENAMED = {"publish": "export_pipeline"}
# Faults that change nothing observable, besides those that `equivalent_places` knows by their form. The next place in
# the random order takes theirs.
EQUIVALENT = {
    ("scheduler", "DDPMPaperScheduler.chain", "0", 0): "`respaced` refuses timesteps that repeat, in other words",
    (
        "likelihood",
        "_log_normal_cdf",
        "x < -1",
        0,
    ): "both branches have the value log Φ(−1) there, and the same gradient",
    ("batches", "Batch.pin_memory", "3", 0): "only a machine with a GPU pins memory; tests/test_gpu.py trains there",
    (
        "batches",
        "KeyedBatches._order",
        "1",
        0,
    ): "what is kept in memory: an order that is gone is drawn again, the same",
    ("batches", "KeyedBatches.rows", "t.copy()", 0): "a slice of an array that nothing else has serves as well",
    (
        "checkpoints",
        "_write_files",
        "tensor.detach()",
        0,
    ): "safetensors writes a tensor that has a gradient as any other",
    ("decoding", "_grey_or_rgb", "255", 0): "alpha of a new canvas, which Pillow cuts to 255",
    ("checkpoints", "write", "shutil.disk_usage(folder).free < needed", 0): (
        "files are larger than their tensors: where exactly these bytes are free, writing fails with the same error"
    ),
}


class Subject(NamedTuple):
    """A file in both trees, and the tests (glob patterns) that are likely to notice a fault in it."""

    before: str
    after: str
    tests_before: tuple[str, ...]
    tests_after: tuple[str, ...]
    carried: str | None = None  # a copy that must be equal byte for byte, or a test of that would find every fault


SUBJECTS = {
    "scheduler": Subject(
        "ddpm_hf/scheduler/scheduling_ddpm_paper.py",
        "ddpm_hf/scheduler/scheduling_ddpm_paper.py",
        ("test_diffusion.py", "test_scheduler.py", "test_pipeline.py", "test_likelihood.py", "test_short_chains.py"),
        ("scheduler", "*pipeline*", "*likelihood*", "*short_chains*"),
        "model_cards/ddpm-digits/scheduler/scheduling_ddpm_paper.py",
    ),
    "likelihood": Subject(
        "ddpm_hf/likelihood.py",
        "ddpm_hf/likelihood.py",
        ("test_likelihood.py", "test_objectives.py", "test_oracle.py", "test_short_chains.py", "test_codec.py"),
        ("*likelihood*", "*decoder*", "*objectives*", "*oracle*", "*short_chains*", "codec"),
    ),
    "batches": Subject(
        "ddpm_hf/batches.py",
        "ddpm_hf/runs/batches.py",
        ("test_batches.py", "test_train.py"),
        ("runs/test_batches*", "training/test_train*"),
    ),
    "checkpoints": Subject(
        "ddpm_hf/checkpoints.py",
        "ddpm_hf/runs/checkpoints.py",
        ("test_checkpoints.py", "test_corruption.py", "test_training_state.py", "test_train.py"),
        (
            "runs/test_checkpoints*",
            "runs/test_corruption*",
            "runs/test_state*",
            "machine/test_files*",
            "training/test_train*",
        ),
    ),
    "decoding": Subject(
        "ddpm_hf/images.py",
        "ddpm_hf/data/decoding.py",
        ("test_images.py", "test_odd_images.py", "test_data.py"),
        ("data",),
    ),
}


class Tree:
    """A commit's files in a folder of their own, in which tests run."""

    def __init__(self, folder: Path, commit: str):
        self.folder = folder
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        self.environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        (folder / "tests" / "test_where.py").write_text(
            f"import ddpm_hf\ndef test_where():\n    assert ddpm_hf.__file__.startswith({str(folder)!r})\n"
        )
        if self.pytest("tests/test_where.py", seconds=100)[0] != 0:
            raise SystemExit(f"the tests in {folder} would import another ddpm_hf")

    def pytest(self, *arguments: str, seconds: float) -> tuple[int | None, str]:
        """Exit code, None where it ran out of CPU time, and output of pytest in a process of its own.

        The process is forked, for importing torch and diffusers anew would take longer than most tests.
        """
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                self._become_pytest(output.fileno(), arguments, seconds)
            try:
                _, status = os.waitpid(child, 0)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # and what the tests left running
            output.seek(0)
            ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            return (None if ended_by == signal.SIGXCPU else ended_by or os.WEXITSTATUS(status)), output.read()

    def _become_pytest(self, output: int, arguments: tuple[str, ...], seconds: float) -> None:
        code = 99
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(output, stream)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 10))
            os.chdir(self.folder)
            os.environ.update(self.environment)
            sys.path.insert(0, str(self.folder))
            code = int(pytest.main([*PYTEST, *arguments]))
            sys.stdout.flush()
        finally:
            os._exit(code)


class Laboratory:
    """A tree with a fault, and the same tree without it to see whether a failing test fails because of it."""

    def __init__(self, folder: Path, side: str, commit: str):
        self.markers, self.commit = MARKERS[side], commit
        self.clean, self.faulty = Tree(folder / "clean", commit), Tree(folder / "faulty", commit)
        self.because_of_faults: set[str] = set()
        self.anyway: set[str] = set()

    def killer(self, tests: list[str], seconds: float) -> str | None:
        """The first of these tests that fails with the fault and passes without; None where all pass."""
        while True:
            without = [f"--deselect={test}" for test in sorted(self.anyway)]
            code, output = self.faulty.pytest("-x", "-m", self.markers, *without, *tests, seconds=seconds)
            if code is None:
                return f"out of time: {seconds} s of CPU"
            if code in (0, 5):  # 5: no test was left
                return None
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
            if failed is None:
                return f"pytest itself: {output.strip().splitlines()[-1][:100]}"
            test = failed[1]
            if test not in self.because_of_faults | self.anyway:
                collect = () if "::" in test else ("--collect-only",)
                passes = self.clean.pytest(*collect, test, seconds=seconds)[0] == 0
                (self.because_of_faults if passes else self.anyway).add(test)
            elif test in self.anyway:
                raise SystemExit(f"{test} cannot be left out")
            if test in self.because_of_faults:
                return test

    def try_fault(
        self, path: str, carried: str | None, place: Place, tests: list[str], seconds: float
    ) -> tuple[int, str | None]:
        """The line of the fault, and the test among these that killed it."""
        source = (self.clean.folder / path).read_text(encoding="utf-8")
        found = mutated_source(source, place)
        if found is None:
            raise SystemExit(f"{path} has no {place}")
        targets = [self.faulty.folder / name for name in (path, carried) if name]
        try:
            for target in targets:
                target.write_text(found[0], encoding="utf-8")
            return found[1], self.killer(tests, seconds)
        finally:
            for target in targets:
                target.write_text(source, encoding="utf-8")


# ---- which faults --------------------------------------------------------------------------------------------------


def text_at(commit: str, path: str) -> str:
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        raise SystemExit(f"{path} of {commit} cannot be read: {shown.stderr.strip()}")
    return shown.stdout


def now(place: Place) -> Place:
    """The place as it is called in the later tree."""
    return place._replace(function=RENAMED.get(place.function, place.function))


def chosen(commit: str) -> tuple[dict[str, list[Place]], list[tuple[str, Place, str]]]:
    """Six places for each subject, and those that were passed over with the reason."""
    taken: dict[str, list[Place]] = {}
    replaced = []
    for name, subject in SUBJECTS.items():
        taken[name] = []
        later = set(places(text_at(commit, subject.after)))
        source = text_at(BEFORE, subject.before)
        equivalent = equivalent_places(source)
        for place in in_random_order(places(source), random.Random(f"{SEED} {name}")):
            reason = EQUIVALENT.get((name, place.function, place.original, place.number)) or equivalent.get(place)
            if reason is None and now(place) not in later:
                reason = "this expression is no longer in the file"
            if reason is not None:
                replaced.append((name, place, reason))
            elif len(taken[name]) < PER_FILE:
                taken[name].append(place)
            if len(taken[name]) == PER_FILE:
                break
    return taken, replaced


# ---- running and keeping -------------------------------------------------------------------------------------------


def read_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"mutants": []}


def entry_of(results: dict[str, Any], name: str, place: Place) -> dict[str, Any]:
    key = {"file": name, **place._asdict()}
    for entry in results["mutants"]:
        if key.items() <= entry.items():
            return entry
    results["mutants"].append(key)
    return key


def run(side: str, commit: str, only: list[str]) -> None:
    """Every fault that has no result of this commit yet: first all with the likely tests, then those that live."""
    taken, replaced = chosen(commit)
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder), side, BEFORE if side == "before" else commit)
        for stage, seconds in (("likely", LIKELY_SECONDS), ("all", ALL_SECONDS)):
            for name in only or SUBJECTS:
                subject = SUBJECTS[name]
                path, patterns = getattr(subject, side), getattr(subject, f"tests_{side}")
                tests = laboratory.clean.folder / "tests"
                likely = [
                    str(p.relative_to(tests.parent)) for pattern in patterns for p in sorted(tests.glob(pattern))
                ]
                for place in taken[name]:
                    known = entry_of(read_results(), name, place).get(side)
                    known = known if known and known["commit"] == laboratory.commit else None
                    if known is None or (stage == "all" and known["tests"] == "likely" and not known["killer"]):
                        there = place if side == "before" else now(place)
                        chosen_tests = likely if stage == "likely" else ["tests", *(f"--ignore={t}" for t in likely)]
                        line, killer = laboratory.try_fault(path, subject.carried, there, chosen_tests, seconds)
                        result = {"commit": laboratory.commit, "line": line, "tests": stage, "killer": killer}
                        print(f"{name} {place.function}: {place.original} → {place.mutated}: {result}", flush=True)
                        keep(taken, replaced, (name, place, side), result)


def keep(
    taken: dict[str, list[Place]],
    replaced: list[tuple[str, Place, str]],
    key: tuple[str, Place, str],
    result: dict[str, Any],
) -> None:
    """Put one result into the file, which another process may be writing to as well."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read_results()
        name, place, side = key
        entry_of(results, name, place)[side] = result
        order = [(name, place) for name in taken for place in taken[name]]
        results["mutants"] = [e for n, p in order if (e := entry_of(results, n, p)).keys() & {"before", "after"}]
        results["replaced"] = [{"file": n, **p._asdict(), "reason": reason} for n, p, reason in replaced]
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".lock").unlink(missing_ok=True)


def check() -> int:
    """Print the table; 1 where a fault lives now that was caught before, or where a result is missing."""
    code = 0
    for e in read_results()["mutants"]:
        print(f"{e['file']}, {e['function']}: {e['original']} → {e['mutated']}")
        for side in ("before", "after"):
            print(f"    {side}: {(e[side]['killer'] or 'lives') if side in e else 'not run'}")
        caught = "before" in e and e["before"]["killer"]
        code |= "before" not in e or "after" not in e or bool(caught and not e["after"]["killer"])
    return int(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "before", "after", "check"))
    parser.add_argument("commit", nargs="?", default="HEAD", help="the later one; default: HEAD")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=[], help="of these files")
    arguments = parser.parse_args()
    if arguments.what == "check":
        return check()
    if arguments.what == "list":
        taken, replaced = chosen(arguments.commit)
        for name, found in taken.items():
            print(name, *found, sep="\n    ")
        print("replaced", *replaced, sep="\n    ")
        return 0
    resolve = ["git", "rev-parse", "--short", arguments.commit]
    commit = subprocess.run(resolve, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    run(arguments.what, commit, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
