"""docs/reading.md: what it names exists, and the schedulers under Runs sample from our checkpoints as it says."""

import importlib
import importlib.util
import re
from functools import reduce
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import ddpm_hf
from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.cli import build_parser
from ddpm_hf.runs import parse_options
from training import train as train_py

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)
PROSE = FENCED.sub("", TEXT)
NUMBERED, NAMED = PROSE.split("\n## Named in the course, and not above\n")
INTRODUCTION, *ENTRIES = re.split(r"^### ", NUMBERED, flags=re.MULTILINE)
SPANS = sorted(set(re.findall(r"`([^`]+)`", PROSE)))
NUM_STANDARD, NUM_ENTRIES, NUM_SPANS, NUM_RUNNING = 20, 33, 71, 13
STANDARD = (  # what the field's list holds, by the beginning of the entry's heading
    "U-Net|Stochastic gradient Langevin dynamics|Diffusion models|Noise-conditional score networks|NCSNv2|DDPM|"
    "Score-based SDEs|DDIM|Improved DDPM|Progressive distillation|Consistency models|Guided diffusion|"
    "Classifier-free guidance|Cascaded diffusion|GLIDE|Latent diffusion|DALL·E 2|Imagen|DiT|ControlNet"
).split("|")


def under(marker: str, entry: str) -> str:
    """The items of an entry that begin with a bold `marker`."""
    return "".join(re.findall(rf"^- \*\*{marker}:\*\*(.*?)(?=^\S|\Z)", entry, re.MULTILINE | re.DOTALL))


def schedulers(text: str) -> list[str]:
    return [name for name in re.findall(r"`(\w+Scheduler)`", text) if not name.startswith("DDPMPaper")]


RUNNING = [name for entry in ENTRIES for name in schedulers(under("Runs", entry))]


def test_the_whole_list_is_there_in_one_form():
    assert len(ENTRIES) == NUM_ENTRIES and len(SPANS) == NUM_SPANS
    assert len(STANDARD) == NUM_STANDARD
    for number, entry in enumerate(ENTRIES, start=1):
        heading, authors, *rest = [part.strip() for part in entry.split("\n\n")]
        assert heading.startswith(f"{number}. {STANDARD[number - 1] if number <= NUM_STANDARD else ''}")
        assert re.search(r"\*.+?\*.*(19|20)\d\d", authors, re.DOTALL), heading  # a title, and later a year
        identifiers = re.findall(r"\[arXiv:(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{4,5})\)", authors)
        assert all(shown == linked for shown, linked in identifiers)
        several = {2: 0, 23: 2, 31: 2}  # SGLD has none, DPM-Solver and ANS two papers
        assert len(identifiers) == several.get(number, 1), heading
        markers = re.findall(r"^- \*\*(.*?):\*\*", entry, re.MULTILINE)
        assert markers == [m for m in ("Built", "Runs", "Out of scope") if m in markers] and markers, heading
    assert len(set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", NUMBERED))) == NUM_ENTRIES + 1


def test_works_named_in_the_course_have_a_title_and_a_year():
    """Each row: a title, a year, and, but for the two in journals, an identifier that its link has too."""
    _, _, *rows = [line for line in NAMED.splitlines() if line.startswith("|")]
    assert len(rows) >= 8
    for row in rows:
        assert re.search(r"\*.+?\*.*(19|20)\d\d", row), row
        identifiers = re.findall(r"\[arXiv:(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{4,5})\)", row)
        assert all(shown == linked for shown, linked in identifiers)
        assert len(identifiers) == (0 if "JMLR" in row or "Neural Computation" in row else 1), row


@pytest.mark.parametrize("span", SPANS)
def test_what_is_named_exists(span):
    """Each code span is a path, a training option, a command, or a name here or in diffusers; no other kind."""
    if re.fullmatch(r"[\w/]+\.(py|md)", span):
        assert (ROOT / span).is_file()
    elif span.startswith("--"):
        name, *values = span[2:].split(" ")
        assert name in train_py.TrainingOptions.__dataclass_fields__
        if values:  # the variance of the bound's own objective, and what else an option needs
            needed = {"learned": ["--objective", "vlb"], "loss_history": ["--objective", "vlb"]}.get(values[0], [])
            needed += ["--prediction_type", "sample"] if values[0] == "jsd" else []
            options = parse_options(train_py.TrainingOptions, ["--dataset_name", "digits", *span.split(" "), *needed])
            assert getattr(options, name) == values[0]
    elif span.startswith("ddpm-hf "):
        _, command, *rest = span.split(" ")
        others = {
            "sample": ["folder"],
            "evaluate": ["folder", "--dataset", "digits"],
            "shorten": ["folder", "new", "--dataset", "digits"],
            "compress": ["folder", "images", "-o", "file"],
        }[command]
        args = build_parser().parse_args([command, *others, *rest])
        assert args.command == command
        name = {"--guidance": "guidance_scale"}.get(rest[0], rest[0][2:]) if rest else ""
        assert not rest or str(getattr(args, name)) == rest[1]
    elif match := re.fullmatch(r"(ddpm_hf\.\w+)((?:\.\w+)*)", span):
        assert reduce(getattr, match[2].split(".")[1:], importlib.import_module(match[1])) is not None
    elif re.match(r"DDPMPaperScheduler\(.*\)$", span):
        assert isinstance(eval(span, {"DDPMPaperScheduler": DDPMPaperScheduler}), DDPMPaperScheduler)
    else:
        owner: Any = diffusers if hasattr(diffusers, span) else ddpm_hf
        assert reduce(getattr, span.split("."), owner) is not None


def test_every_stock_scheduler_is_under_a_heading():
    assert len(RUNNING) == len(set(RUNNING)) == NUM_RUNNING
    elsewhere = {name for entry in ENTRIES for name in schedulers(under("Out of scope", entry))}
    assert not elsewhere & set(RUNNING)
    assert set(schedulers(PROSE)) == elsewhere | set(RUNNING)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", RUNNING)
def test_what_runs_takes_steps_with_our_checkpoints(tiny_unet, tmp_path, name):
    """The page's own lines, with a checkpoint whose betas are no scheduler's default.

    The network must be asked at as many times as the page says, and the process must be the one of training.
    """
    ours: Any = DDPMPaperScheduler(beta_start=2e-4, beta_end=0.04)
    DDPMPaperPipeline(tiny_unet(), ours).save_pretrained(tmp_path)
    pipe: Any = DDPMPaperPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    asked: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: asked.append(float(args[1][0])))
    (code,) = FENCED.findall(TEXT)
    assert code.count("DDIMScheduler") == 2
    namespace = {"pipe": pipe}
    exec(code.replace("DDIMScheduler", name), namespace)

    assert type(pipe.scheduler) is getattr(diffusers, name)
    paper: Any = DDPMPaperScheduler()  # its betas are our defaults, which another class might replace by its own
    for process, other in ((ours, pipe.scheduler), (paper, type(pipe.scheduler).from_config(paper.config))):
        torch.testing.assert_close(other.alphas_cumprod.float(), process.alphas_cumprod, rtol=1e-4, atol=0)
    # 20 distinct times from noise to data; ± 1, as schemes of two evaluations end with one, or repeat a time
    assert len(asked) >= 20 and 19 <= len(set(asked)) <= 40
    assert asked[0] == max(asked) >= 900 and min(asked) < 60
    assert len(namespace["images"]) == 4
    x = []
    pipe(
        seeds=range(4),
        num_inference_steps=20,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, tensors: x.append(tensors["latents"]),
    )
    assert len(x) == len(asked) / 2 and torch.stack(x).isfinite().all()
    assert (x[-1] - x[0]).abs().mean() > 0.1
