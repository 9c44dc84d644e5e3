"""Hostile checkpoints, repositories and data: no code of theirs runs, nothing outside is read, and the error says why.

All cases of hostile_cases.py run in one process of their own, under an audit hook that sees every file opened, module
imported, process started, connection made and object unpickled, and under a limit of memory and time. There, a canary
folder would be made by any payload that runs, and a secret lies outside the checkpoint for any path that leads out of
it.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import yaml
from hostile_cases import CASES, NO_ERROR, PYTHON_TAGS, SECRET, changed_code, payload

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 12 * 2**30  # of address space: torch alone takes several
LIMIT_S = 3  # of computing, for each case; all take under 1 s, and twice that beside other work


# ---- the process in which they run ---------------------------------------------------------------------------------

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
FORBIDDEN += ("socket.connect", "socket.getaddrinfo")


class TooLong(BaseException):
    pass


def run_all(place: Path) -> None:
    """Every case, in a folder `place`/cases/checkpoint of its own; results.json says how each ended."""
    import resource
    import signal
    import warnings

    import datasets.arrow_dataset  # noqa: F401  # here and below: what takes long to import is no part of a case
    import diffusers
    import torch

    import ddpm_hf.cli.commands  # noqa: F401
    from ddpm_hf import DDPMPaperPipeline  # noqa: F401
    from training import train  # noqa: F401

    warnings.simplefilter("ignore")
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seen: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event == "open" and isinstance(arguments[0], str | bytes) and "outside" in os.fsdecode(arguments[0]):
            seen.append(f"open {os.fsdecode(arguments[0])}")
        elif event == "import" and str(arguments[0]).split(".")[0] in ("evil", "pipeline", "unet_ddpm_paper"):
            seen.append(f"import {arguments[0]}")
        elif event == "exec" and str(place) in (ran := str(getattr(arguments[0], "co_filename", ""))):
            seen.append(f"exec {ran}")
        elif event in FORBIDDEN:
            seen.append(f"{event} {str(arguments)[:80]}")

    def too_long(*_: Any) -> None:
        raise TooLong

    sys.addaudithook(hook)
    signal.signal(signal.SIGVTALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    results = {}
    canary = Path(os.environ["CANARY"])
    cases = place / "cases"
    for name, (action, _) in CASES.items():
        shutil.rmtree(cases, ignore_errors=True)
        shutil.copytree(place / "good", cases / "checkpoint")
        shutil.copytree(place / "secrets", cases / "outside")
        for where in (".", "checkpoint", "checkpoint/unet", "checkpoint/scheduler"):  # code of the names they ask for
            (cases / where / "evil.py").write_text(
                "import os\nos.mkdir(os.environ['CANARY'])\nEvil = DDPMPaperUNet = int\n"
            )
        os.chdir(cases)
        seen.clear()
        errors = cases / "stderr"
        ended: dict[str, Any] = {"type": None, "bases": [], "message": ""}
        with errors.open("w+") as stream, contextlib.redirect_stderr(stream):
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
            watching = True
            try:
                action(cases / "checkpoint")
            except BaseException as error:
                bases = [base.__name__ for base in type(error).__mro__]
                ended = {"type": type(error).__name__, "bases": bases, "message": str(error)}
            watching = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            stream.seek(0)
            ended["printed"] = stream.read()
        results[name] = {**ended, "seen": list(seen), "canary": canary.exists()}
        if canary.exists():
            canary.rmdir()
    (place / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_unet, tiny_scheduler) -> dict[str, dict[str, Any]]:
    from safetensors.numpy import save_file

    from ddpm_hf import DDPMPaperPipeline

    place = tmp_path_factory.mktemp("hostile")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(place / "good")
    (place / "secrets").mkdir()
    save_file({"conv_in.weight": np.zeros((8, 3, 3, 3), np.float32)}, place / "secrets" / "secret.safetensors")
    for name in ("secret.png", "secret.text", "evil.py"):
        (place / "secrets" / name).write_text(SECRET)
    environment = {
        **os.environ,
        "CANARY": str(place / "canary"),
        "DDPM_HF_CACHE": str(place / "cache"),
        "HF_HOME": str(place / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, ROOT / "tests", ROOT])),
    }
    code = "import sys, pathlib, test_hostile_files as t; t.run_all(pathlib.Path(sys.argv[1]))"
    done = fork_server.run(["-c", code, place], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "results.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_nothing_runs_nothing_outside_is_read_and_the_error_says_why(results, name):
    ended, message = results[name], CASES[name][1]
    assert not ended["canary"], "its code ran"
    assert not [event for event in ended["seen"] if not is_expected(name, event)], ended
    assert SECRET not in ended["message"] + ended["printed"] and secret_hash() not in ended["message"]
    if message == NO_ERROR:
        assert ended["type"] is None, ended
    else:
        assert ended["type"] == "SystemExit" or {"ValueError", "OSError"} & set(ended["bases"]), ended
        assert message in ended["message"] + ended["printed"], ended


def is_expected(name: str, event: str) -> bool:
    """Pictures that the user links to, or whose rows name them, are read; what they hold is not told."""
    return event.startswith("open ") and name in ("photos-linked-from-outside", "rows-that-name-files-outside")


def secret_hash() -> str:
    return hashlib.sha256(SECRET.encode()).hexdigest()


def test_the_watch_is_awake(tmp_path, monkeypatch):
    """The payloads used above do run, where they are let: the canary would be there."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    pickle.loads(payload())
    (tmp_path / "canary").rmdir()
    changed_code(made(tmp_path / "code"))
    exec((tmp_path / "code" / "pipeline.py").read_text(), {})
    (tmp_path / "canary").rmdir()
    yaml.unsafe_load(PYTHON_TAGS["apply"].format(canary=tmp_path / "canary"))
    assert (tmp_path / "canary").is_dir()


def made(folder: Path) -> Path:
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    return folder
