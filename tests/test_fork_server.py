"""Forks of the tests' server end, print and are asked to stop as interpreters are, whose start they leave out."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from fork_server import DEFAULTS, NOBODYS, Forked, run

pytestmark = pytest.mark.integration


def both(words: list[str], **options: Any) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    """How a fork ends, and how an interpreter does."""
    streams: Any = {"capture_output": True, "text": True, **options}
    return run(words, **streams), subprocess.run([sys.executable, *words], **streams)


@pytest.mark.parametrize(
    "code",
    [
        "print('to the end')",
        "import sys; sys.exit(3)",
        "import sys; sys.exit()",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit('in words')",
        "1 / 0",
        "raise KeyboardInterrupt",
        "import os; print('lost', end=''); os._exit(5)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(os.getpid(), 15)",
        "import atexit; atexit.register(print, 'at exit'); print('before')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
        "import sys; sys.excepthook = lambda *error: print('its own hook'); 1 / 0",
    ],
)
def test_a_fork_ends_as_an_interpreter(code):
    fork, interpreter = both(["-c", code])
    assert fork.returncode == interpreter.returncode and fork.stdout == interpreter.stdout
    assert fork.stderr.splitlines()[-1:] == interpreter.stderr.splitlines()[-1:]


SAYS = """
import json, os, sys
here = sys.modules["__main__"]
print(json.dumps([sys.argv, sys.path, os.getcwd(), __name__, here.__dict__ is globals(), os.environ.get("OF_TEST")]))
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_program_finds_what_an_interpreter_gives_it(tmp_path, kind):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "said.py").write_text(SAYS)
    words = {"-c": ["-c", SAYS], "-m": ["-m", "said"], "script": ["place/said.py"]}[kind]
    environment = {**os.environ, "PYTHONPATH": "place:elsewhere", "OF_TEST": "given"}
    fork, interpreter = both([*words, "--a", "b c"], cwd=tmp_path, env=environment)
    said, expected = json.loads(fork.stdout), json.loads(interpreter.stdout)
    absolute = [[str(tmp_path / place) for place in found[1]] for found in (said, expected)]
    assert absolute[0] == absolute[1]
    assert said[:1] + said[2:] == expected[:1] + expected[2:]


def test_streams_are_the_callers(tmp_path):
    code = "import sys; print(input()); print('error', file=sys.stderr)"
    with (tmp_path / "both").open("w") as file:
        with Forked(["-c", code], stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, text=True) as process:
            process.communicate("given\n")
    assert process.returncode == 0 and sorted((tmp_path / "both").read_text().split()) == ["error", "given"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_a_fork_and_its_group(number):
    code = "import os, time; print(os.getpid(), os.getpgrp(), flush=True); time.sleep(100)"
    quiet: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    for new_session in (False, True):
        process = Forked(["-c", code], start_new_session=new_session, **quiet)
        assert process.stdout is not None and process.poll() is None
        pid, group = map(int, process.stdout.readline().split())
        assert pid == process.pid and (group == pid) == new_session
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        if new_session:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == process.poll() == -number


READ = """
import datasets, diffusers.utils.constants as diffusers, huggingface_hub as hub
from huggingface_hub import constants, hf_api
print(constants.HF_HOME, constants.HF_HUB_CACHE, constants.ENDPOINT, constants.HF_HUB_OFFLINE, hub.HfApi().endpoint)
print(hf_api.api.endpoint, hub.hf_hub_url("a/b", "c"), diffusers.HUGGINGFACE_CO_RESOLVE_ENDPOINT)
print(diffusers.HF_MODULES_CACHE, datasets.config.HF_ENDPOINT, datasets.config.HF_DATASETS_CACHE)
print(datasets.config.HF_HUB_OFFLINE, constants.HF_TOKEN_PATH)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{}, {"HF_HOME": "/at/home", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}], ids=str
)
def test_what_imports_read_from_the_environment_is_the_forks_own(variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    fork, interpreter = both(["-c", READ], env=kept | variables)
    assert fork.stdout == interpreter.stdout and fork.returncode == 0, fork.stderr
    assert not any(text in fork.stdout for text in NOBODYS.values())
    home = os.path.expanduser(variables.get("HF_HOME", DEFAULTS["HF_HOME"]))
    assert fork.stdout.startswith(f"{home} {home}/hub ")


def test_a_variable_that_an_import_may_read_is_refused():
    with pytest.raises(AssertionError, match="HF_HUB_ETAG_TIMEOUT.* may be read at import"):
        Forked(["-c", ""], env={**os.environ, "HF_HUB_ETAG_TIMEOUT": "1"})


def test_a_fork_has_one_thread_and_random_numbers_of_its_own():
    code = "import os, random, numpy; print(random.random(), numpy.random.rand(), len(os.listdir('/proc/self/task')))"
    one, other = (run(["-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(2))
    assert not set(one[:2]) & set(other[:2])
    assert one[2] == other[2] == "1"
