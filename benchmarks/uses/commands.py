"""The command `ddpm-hf`."""

from __future__ import annotations

from . import Seen, use
from .running import Runner

COMMANDS = "commands"
LONGEST = 1.5  # seconds of CPU time for help and for mistakes


@use(
    "one-step",
    COMMANDS,
    "ddpm-hf sample model_cards/ddpm-digits --steps 1, with the spacing leading",
    "digits, or said or refused with another spacing: one step at t = 0 returns the noise",
)
def _(runner: Runner) -> Seen:
    done = runner.command("sample", runner.digits, "--steps", "1", "-o", "out.png")
    said = done.said("trailing")
    return Seen(said or done.last, said is not None and "Traceback" not in done.output)


@use("home-in-the-output", COMMANDS, "ddpm-hf sample … --output=~/s.png", "the file is in the home folder")
def _(runner: Runner) -> Seen:
    home = runner.place / "home"
    home.mkdir()
    done = runner.command("sample", runner.digits, "--steps", "2", "--output=~/s.png", HOME=str(home))
    is_there = (home / "s.png").exists()
    return Seen("written to the home folder" if is_there else done.last, is_there)


@use(
    "step-between-two",
    COMMANDS,
    "ddpm-hf draw interpolate … --timestep 249 --steps 50",
    "drawn from the nearest step, which is named",
)
def _(runner: Runner) -> Seen:
    words = ("--timestep", "249", "--steps", "50", "--seeds", "0", "-o", "out.png")
    done = runner.command("draw", "interpolate", runner.digits, *words, "--dataset", "digits")
    if done.said("unrecognized arguments"):
        done = runner.command("draw", "interpolate", runner.digits, *words)
    named = done.said("240|24[0-9] is")
    is_drawn = done.code == 0 and (runner.place / "out.png").exists()
    return Seen(named or done.last, is_drawn and named is not None)


@use("one-sample", COMMANDS, "ddpm-hf sample --seeds 0, which draws one sample", "“1 sample”")
def _(runner: Runner) -> Seen:
    done = runner.command("sample", runner.digits, "--seeds", "0", "--steps", "2", "-o", "out.png")
    found = done.said("1 sample")
    return Seen(found or done.last, found is not None and "1 samples" not in found)


def start_use(name: str, words: tuple[str, ...], said: str, code: int) -> None:
    @use(name, COMMANDS, said, f"at most {LONGEST} s of CPU time")
    def _(runner: Runner) -> Seen:
        done = runner.start("-m", "ddpm_hf.cli", *words)
        assert done.code == code, done.output
        return Seen(f"{done.cpu_seconds:.1f} s of CPU time", done.cpu_seconds <= LONGEST)


start_use("help", ("--help",), "ddpm-hf --help", 0)
start_use("misspelt-option", ("sample", "model_cards/ddpm-digits", "--stepz", "3"), "ddpm-hf sample … --stepz 3", 2)
