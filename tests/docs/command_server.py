"""Runs commands of the pages, each in a fork of one process that has imported everything.

    with CommandServer(environment) as server:
        code, output = server.run(["ddpm-hf", "sample", ...], folder)

The interpreter's start and the imports take longer than most of these commands. They, the entry point `ddpm-hf` and
the launchers are what this leaves out; tests/cli and tests/training start real ones.
"""

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path


class CommandServer:
    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def __enter__(self) -> "CommandServer":
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def run(self, words: list[str], folder: Path) -> tuple[int, str]:
        """The exit code of a command in `folder`, negative for a signal, and what it printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        log = folder / "command.log"
        self.process.stdin.write(json.dumps({"words": words, "folder": str(folder), "log": str(log)}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), log.read_text(errors="replace")


def can_run(words: list[str]) -> bool:
    """Whether it is a command of ours in one process; a launcher of several starts interpreters of its own."""
    return words[0] in ("ddpm-hf", "python", "accelerate") and "--num_processes" not in words


def serve() -> None:
    """Fork a child for each line of standard input, and answer with its exit code."""
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import ddpm_hf.cli.commands  # noqa: F401
    import ddpm_hf.cli.draw  # noqa: F401
    import ddpm_hf.evaluation.evaluator  # noqa: F401
    from ddpm_hf import DDPMPaperPipeline  # noqa: F401

    torch.set_num_threads(1)  # a child cannot use threads that only its parent has
    gc.collect()
    gc.freeze()  # at its end a child would else look through, and so copy, all that it shares with this process
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run_in_child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run_in_child(words: list[str], folder: str, log: str) -> None:
    """What the command would do from its program's first line to the interpreter's end."""
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    program, *arguments = words
    if program == "accelerate":
        arguments = arguments[next(i for i, word in enumerate(arguments) if word.endswith(".py")) :]
    try:
        if program == "ddpm-hf":
            from ddpm_hf.cli import main

            sys.argv = words
            main()
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
