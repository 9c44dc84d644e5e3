"""All pages: links lead somewhere, names exist, messages are the code's, and results those of their files.

Pages are README.md, docs/, the course's notebooks with what they say, and the model cards. Numbers in tables are held
by the tests of what measures them, and by `test_results_are_those_of_their_files`.
"""

import argparse
import ast
import importlib
import json
import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import diffusers.utils.dynamic_modules_utils
import numpy as np
import pytest
import torch
from pages import BLOCK, MESSAGE, PAGES, ROOT, SOURCES, SPAN, commands_in, spans, text_of

import ddpm_hf
from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, DDPMPaperScheduler, GaussianDiffusion
from ddpm_hf.cli import build_parser
from ddpm_hf.cli.arguments import SCHEDULERS
from ddpm_hf.evaluation.paper_tables import TABLES
from ddpm_hf.likelihood import vb_terms_bpd
from ddpm_hf.runs import DistillationOptions
from ddpm_hf.runs.parsing import _parser
from ddpm_hf.scheduler.scheduling_ddpm_paper import make_betas

pytestmark = pytest.mark.docs

EXPLAINED = {  # every code span of theirs must mean something; how many there are at least
    "docs/paper.md": 60,
    "docs/troubleshooting.md": 60,
    "docs/sampling.md": 40,
}
QUOTING = ("docs/paper.md", "docs/troubleshooting.md")
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
WORDS = set(re.findall(r"\w+", TEXT))
ENVIRONMENT = {
    *("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    *("DDPM_HF_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "OMP_NUM_THREADS"),
}


# ---- links ---------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = SPAN.sub("", BLOCK.sub("", PAGES[page]))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://", target)]
    for target in targets:
        file, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{page}: no {target}"
        assert not anchor or anchor in anchors(text_of(linked)), f"{page}: no heading for {target}"
    assert targets or page not in ("README.md", "docs/README.md", "docs/training.md", *EXPLAINED)


def test_the_index_has_every_page():
    """docs/README.md leads to each page of docs/, the course's to each chapter, and README.md to both."""
    for index, others in {
        "docs/README.md": [path.name for path in ROOT.glob("docs/*.md")],
        "docs/course/README.md": [path.name for path in ROOT.glob("docs/course/*.ipynb")],
        "README.md": ["docs/README.md", "docs/course/README.md"],
    }.items():
        assert others and all(f"]({name})" in PAGES[index] for name in others if name != Path(index).name), index


# ---- names ---------------------------------------------------------------------------------------------------------


def is_test(name: str) -> bool:
    """Whether there is such a `test_x.py::test_y`, in any folder of the tests."""
    file, _, function = name.partition("::")
    places = (ROOT / "tests").rglob(Path(file).name)
    return any(f"\ndef {function}(" in path.read_text(encoding="utf-8") for path in places)


def is_name(name: str, script: ModuleType) -> bool | None:
    """Whether there is such a `module.thing` or `Class.thing`; None where it begins with nothing of ours."""
    first, *rest = name.split(".")
    if first == "train":
        found: Any = script
    elif hasattr(ddpm_hf, first):
        found = getattr(ddpm_hf, first)
        if found is GaussianDiffusion:
            found = found([0.5])  # whose tables are made with it
    else:
        places = [path for path in SOURCES if path.stem == first and path.parent.name != "training"]
        if not places:
            return None
        relative = places[0].relative_to(ROOT).with_suffix("")
        found = importlib.import_module(".".join(relative.parts))
    for part in rest:
        if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", {}):
            return False
        found = getattr(found, part, None)
    return True


@pytest.fixture(scope="module")
def options(script) -> dict[str, list[argparse.Action]]:
    """Every command-line option, of the script and of all subcommands."""
    parsers = [_parser(script.TrainingOptions), _parser(DistillationOptions), build_parser()]
    found: dict[str, list[argparse.Action]] = {}
    for parser in parsers:  # which grows: parsers within parsers
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += list(action.choices.values())
            for word in action.option_strings:
                found.setdefault(word, []).append(action)
    return found


def means_something(span: str, script: ModuleType, options: dict[str, list[argparse.Action]]) -> bool:
    """Whether a code span is a test, an option, a variable, a path, a name, or code that consists of known words."""
    if "::" in span:
        return is_test(span)
    if span.startswith("--"):
        word, *values = span.split()
        known = options.get(word, [])
        return bool(known) and all(any(not a.choices or v in a.choices for a in known) for v in values)
    if variable := re.fullmatch(r"\$?([A-Z_]{4,})(=\S+)?", span):
        return variable[1] in ENVIRONMENT
    if span.startswith("hf ") or commands_in(span):
        return True  # held by the test of commands
    if "/" in span and ((ROOT / span).exists() or span.endswith((".py", ".yaml"))):
        return (ROOT / span).exists()
    if re.fullmatch(r"\w+(\.\w+)*", span) and not span.endswith((".json", ".png", ".yaml")):
        if (known_name := is_name(span, script)) is not None:
            return known_name
    words = set(re.findall(r"[^\W\d]\w*", span))
    verbatim = re.search(rf"(?<!\w){re.escape(span)}(?!\w)", TEXT)
    return bool(verbatim) or (bool(words) and all(word in WORDS or hasattr(diffusers, word) for word in words))


@pytest.mark.parametrize("page", EXPLAINED)
def test_names_options_and_tests_exist(page, script, options):
    found = spans(page)
    assert len(found) > EXPLAINED[page]
    unknown = [span for span in dict.fromkeys(found) if not means_something(span, script, options)]
    assert not unknown


def test_every_part_of_the_paper_has_a_row():
    """Eqs. 1–16, Algorithms 1–4, Tables 1–4, Figs. 1–19; each with a test, or a dash where it is not computed."""
    rows = re.findall(r"^\| (.+?) \|.*\| (.+?) \|$", PAGES["docs/paper.md"], re.MULTILINE)
    named: dict[str, set[int]] = {"Eq": set(), "Algorithm": set(), "Table": set(), "Fig": set()}
    for label, test in rows:
        if found := re.match(r"(Eq|Algorithm|Table|Fig)s?\.? (\d+ and \d+|[\d–, ]+)", label):
            kind, numbers = found.groups()
            for first, last in re.findall(r"(\d+)(?:–(\d+))?", numbers):
                named[kind] |= set(range(int(first), int(last or first) + 1))
        assert is_test(test.strip("`").split("`")[0]) or test in ("–", "test", "---"), label
    assert named == {kind: set(range(1, n + 1)) for kind, n in zip(named, (16, 4, 4, 19), strict=True)}
    assert any(label.startswith("Section 4.3") for label, _ in rows) and "## Appendix B" in PAGES["docs/paper.md"]


# ---- messages ------------------------------------------------------------------------------------------------------


def templates(path: Path) -> Iterator[str]:
    """Every text of a source file, with … for each value that is put into it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield re.sub("…+", "…", "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[dgs]", "…", node.value)


def test_quoted_messages_are_those_of_the_code():
    theirs = Path(diffusers.utils.dynamic_modules_utils.__file__)  # who refuses code in a checkpoint
    known = [template for path in (*SOURCES, theirs) for template in templates(path)]
    quoted = [message for page in QUOTING for message in MESSAGE.findall(PAGES[page])]
    assert len(quoted) == sum(PAGES[page].count("“`") for page in QUOTING) > 40
    for message in quoted:
        assert len(re.findall(r"\w", message)) >= 5, f"{message!r} would match anything"
        assert any(message in template for template in known), f"no source says {message!r}"


# ---- what pages say about schedulers and results -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_schedulers_take_the_steps_of_the_table():
    """docs/sampling.md: each is asked so often in n steps, at both ends of its range, and one step beyond fails."""
    rows = re.findall(
        r"^\| `(\w+)`.*? \| (?:`(\S+)`|–) \| (\S.*?) \| (\d+) to (\d+) \|$", PAGES["docs/sampling.md"], re.M
    )
    assert len(rows) == 15
    assert {option: name for name, option, *_ in rows if option and option != "ddpm"} == {
        option: sampler.scheduler for option, sampler in SCHEDULERS.items() if sampler.scheduler
    }
    ours: Any = DDPMPaperScheduler(clip_sample=False)
    unet: Any = DDPMPaperMLP(in_channels=1, out_channels=1, hidden_size=8, num_layers=1)
    pipe = DDPMPaperPipeline(unet, ours)
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []
    unet.register_forward_pre_hook(lambda module, args: asked.append(1))

    def draw(n: int) -> torch.Tensor:
        asked.clear()
        (x_start,) = pipe(seeds=[0], num_inference_steps=n, output_type="latent", return_dict=False)
        return x_start

    for name, _, evaluations, fewest, most in rows:
        pipe.scheduler = getattr(diffusers, name, DDPMPaperScheduler).from_config(ours.config)
        assert type(pipe.scheduler).__name__ == name
        for n in (int(fewest), 10, int(most)):
            assert (
                draw(n).isfinite().all() and len(asked) == {"n": n, "n + 9": n + 9, "2n − 1": 2 * n - 1}[evaluations]
            )
        for n in {int(fewest) - 1, int(most) + 1} - {0, 1001}:
            with pytest.raises(ValueError):
                draw(n)


def test_errors_beside_the_papers_code_are_those_of_their_command():
    """To a factor of 2, which another processor's rounding may take."""
    measure = runpy.run_path(str(ROOT / "tests" / "golden" / "measure.py"))
    golden = measure["recorded"]()
    ours, stock = (measure["error_of_steps"](golden, stock=stock) for stock in (False, True))
    for page, pattern, errors in (
        ("docs/results.md", r"one reverse step, [^|]+ \| (\S+) off \| (\S+) in stock", (ours, stock)),
        ("docs/results.md", r"the UNet, beside [^|]+ \| (\S+) off", (measure["error_of_unet"](golden),)),
        ("docs/comparison.md", r"off by up to (\S+) \| float64 tables: (\S+) from", (stock, ours)),
    ):
        (written,) = re.findall(pattern, PAGES[page])
        written = [written] if isinstance(written, str) else written
        for text, error in zip(written, errors, strict=True):
            assert 0.5 < float(text) / error < 2, (page, text, error)


def test_results_are_those_of_their_files():
    """docs/results.md: what was measured is in the JSON files that it names, what was published in `reproduce`."""
    measured, published, _ = PAGES["docs/results.md"].split("\n## ")[1:]
    values = {label: value for label, value in re.findall(r"^\| (.+?) \| (.+?) \| ", measured, re.M)}
    few = json.loads((ROOT / "benchmarks" / "results" / "few_steps.json").read_text(encoding="utf-8"))["rows"]
    by_steps = {(row["scheduler"], row["steps"]): row for row in few}
    ours = by_steps["ours, respaced", 50]

    def percent(name: str) -> str:
        return f"{100 * ours[name]:.1f} ± {100 * ours[name + '_error']:.1f} %"

    for label, name in (("a classifier is sure of", "confident"), ("another classifier (C = 10)", "confident_c10")):
        assert (
            values[f"digits: {label}"].startswith(percent(name)) and f"| {percent(name + '_real')} of real" in measured
        )
    real = f"{ours['frechet_distance_real']:.1f} ± {ours['frechet_distance_real_error']:.1f}"
    assert f"| {real}, real to real |" in measured
    for label, key in (
        ("digits: Fréchet distance to real digits, 50 steps", ("ours, respaced", 50)),
        ("digits, 1000 steps of this process", ("ours, respaced", 1000)),
        ("digits, 10 steps of DPM-Solver++", ("stock DPM-Solver++", 10)),
    ):
        row, gap = by_steps[key], by_steps[key]["minus_ours_50"]
        assert values[label] == f"{row['frechet_distance']:.1f} ± {row['frechet_distance_error']:.1f}"
        less = f"{-gap['value']:.1f} ± {gap['error']:.1f} less than"
        assert row is ours or any(line.startswith(f"| {label} |") and less in line for line in measured.splitlines())
    path = ROOT / "model_cards" / "ddpm-digits" / "evaluation.json"
    (bound,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert values["digits: bits/dim, at most"] == f"{bound['value']:.4f} ± {bound['spread']:.4f}"
    path = ROOT / "benchmarks" / "results" / "surprises.json"
    chains = json.loads(path.read_text(encoding="utf-8"))["measured"]["chains"]["found"]["first"]
    bounds = (chains["chosen_17"]["25"], chains["fixed_large"])
    chosen, every = (f"{bound_of['value']:.2f} ± {bound_of['error']:.2f}" for bound_of in bounds)
    assert f"| digits: bits/dim in 25 chosen steps | {chosen} | {every} in 1000 |" in measured
    rates = bound["rate_distortion"]["rate_bpd"]
    first, *others, last = (f"{rates[steps - 1] / rates[-1]:.1%}".replace("%", " %") for steps in (500, 800, 900, 990))
    text = " ".join(PAGES["docs/evaluation.md"].split())
    assert (
        f"the first 500 take {first} of the bits, 800 take {others[0]}, 900 take {others[1]}, and the last 10" in text
    )
    assert 50 < float(last[:4]) < 55  # "nearly half" is left for the last 10
    coded = json.loads((ROOT / "benchmarks" / "results" / "codec.json").read_text(encoding="utf-8"))
    (row,) = [row for row in coded["rows"] if (row["num_levels"], row["steps"]) == (17, 25)]
    file, bz2 = row["file_bpd"], coded["formats"]["17"]["bz2, all in one"]
    assert f"| digits as a file, 25 steps: bits/dim of the file | {file:.2f} | {bz2:.2f} by bz2 |" in measured
    net, drawn, predicted = (row[key] for key in ("net_bpd", "bound_bpd", "chosen"))
    of_it = f"{net:.2f} | {drawn:.2f}, the bound of the coded latents; {predicted['bpd']:.2f}, the bound predicted"
    assert f"| of it net, without what is paid once | {of_it} |" in measured
    for label, row in {
        "sampling, CIFAR-10 network, batch 1": "sampling: CIFAR-10 UNet, batch 1 | sped up",
        "the same in bfloat16": "CIFAR-10 UNet, batch 1 | sped up, bf16",
        "a training step, float32": "training: CIFAR-10 UNet, float32 stock | ours",
        "a training step, bfloat16": "CIFAR-10 UNet, float32 stock | ours, bf16",
        "sampling on an H100, batch 64, bfloat16, compiled": (
            "sampling: CIFAR-10 UNet, batch 64 (GPU) | sped up, bf16, compiled"
        ),
        "a training step there, batch 128, compiled, both in bfloat16": (
            "training: CIFAR-10 UNet, batch 128, bf16 stock (GPU) | ours, bf16, compiled"
        ),
    }.items():
        assert re.search(
            rf"^\| {re.escape(row)} \|.*\| {values[label].split('×')[0]}× \(", PAGES["docs/speed.md"], re.M
        ), label
    rows = re.findall(r"^\| Table (\d) \| (?:CIFAR-10, )?(.+?) \| (.+?) \|$", published, re.M)
    assert len(rows) == 8
    for number, label, value in rows:
        known = {row.label.split(" (")[0]: row.published for row in TABLES[f"table{number}"].rows}
        assert value == known.get(label, f"`ddpm-hf reproduce table{number}`"), label


# ---- the formulas that no function has -----------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_equations_8_to_12_are_the_bound_as_it_is_computed(variance_type):
    """At every t ≥ 1, for any ε_θ: the KL divergence is C plus each of the paper's forms, to float64's rounding.

    Its worst place is t = T−1, where ε is recovered from x_0 through a factor of 157 and differences are squared.
    """
    q = GaussianDiffusion(make_betas("linear", 1000, 1e-4, 0.02), "epsilon", variance_type)
    t, num_dims = torch.arange(1, 1000), 6
    draw = np.random.default_rng(0).standard_normal((3, 999, num_dims))
    x_start, eps, guess = (torch.from_numpy(x) for x in draw)
    x_start = x_start.clamp(-1, 1)
    x_t = q.q_sample(x_start, t, eps)
    beta, alpha_bar = (torch.from_numpy(table[1:].copy())[:, None] for table in (q.betas, q.alphas_cumprod))
    alpha = 1 - beta
    sigma2 = beta if variance_type == "fixed_large" else torch.from_numpy(q.posterior_variance[1:].copy())[:, None]

    def mean(noise: torch.Tensor) -> torch.Tensor:  # of x_{t−1}, from x_t and noise: Eqs. 10 and 11
        return (x_t - beta / (1 - alpha_bar).sqrt() * noise) / alpha.sqrt()

    torch.testing.assert_close(
        q.p_mean_variance(guess, x_t, t, clip_denoised=False).mean, mean(guess), rtol=0, atol=1e-12
    )
    posterior = q.q_posterior_mean_variance(x_start, x_t, t).mean
    through_x_start = q.q_posterior_mean_variance((x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), x_t, t).mean
    torch.testing.assert_close(through_x_start, posterior, rtol=0, atol=1e-12)  # Eq. 9
    torch.testing.assert_close(mean(eps), posterior, rtol=0, atol=1e-12)  # Eq. 10

    constant, kl = (
        vb_terms_bpd(q, noise, x_start, x_t, t, clip_denoised=False) * num_dims * math.log(2) for noise in (eps, guess)
    )
    eq_8 = (posterior - mean(guess)).square().sum(dim=1) / (2 * sigma2[:, 0])
    eq_12 = (beta**2 / (2 * sigma2 * alpha * (1 - alpha_bar)))[:, 0] * (eps - guess).square().sum(dim=1)
    torch.testing.assert_close(kl - constant, eq_8, rtol=1e-8, atol=0)
    torch.testing.assert_close(kl - constant, eq_12, rtol=1e-8, atol=0)
