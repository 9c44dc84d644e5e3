"""docs/surprises.md is what benchmarks/surprises.py writes of its measurements. Nothing is measured here."""

import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pages import PAGES, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import surprises  # type: ignore  # noqa: E402
from surprising import bound, drawing, lab, page, words  # type: ignore  # noqa: E402

from ddpm_hf import DDPMPaperScheduler, DDPMPaperUNet  # noqa: E402
from ddpm_hf.likelihood import bits_per_dim  # noqa: E402

pytestmark = pytest.mark.docs
TINY: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "attention_resolutions": (4,)}
TINY |= {"in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads(surprises.RESULTS.read_text(encoding="utf-8"))["measured"]


def test_the_page_is_that_of_the_measurements(measured):
    assert PAGES["docs/surprises.md"] == page.text_of(measured)
    assert set(measured) == set(surprises.MEASUREMENTS)
    shown = re.findall(r"^`python benchmarks/surprises\.py --only (.+)`$", PAGES["docs/surprises.md"], re.MULTILINE)
    assert set(" ".join(shown).split()) == set(measured)


def changed(found: Any, by: Callable[[float], float]) -> Any:
    """A measurement with all its numbers changed, but the errors."""
    if isinstance(found, dict):
        return {key: value if key == "error" else changed(value, by) for key, value in found.items()}
    return by(found)


@pytest.mark.parametrize("name", surprises.MEASUREMENTS)
def test_a_sentence_that_its_numbers_contradict_is_not_written(name, measured):
    for by in (lambda x: x + 10_000, lambda x: x - 10_000, lambda x: -x):
        other = {**measured, name: {**measured[name], "found": changed(measured[name]["found"], by)}}
        try:
            page.text_of(other)
        except words.Contradiction:
            return
    pytest.fail(f"no sentence depends on {name}")


def test_what_was_measured_is_not_measured_again(monkeypatch, tmp_path, capsys):
    calls: list[str] = []
    wanted = {name: lambda lab, name=name: {"calls": calls.append(name) or len(calls)} for name in ("a", "b")}
    monkeypatch.setattr(surprises, "MEASUREMENTS", wanted)
    monkeypatch.setattr(surprises.page, "text_of", lambda measured: "")
    arguments = [f"--results={tmp_path / 'found.json'}", f"--work={tmp_path / 'work'}"]
    for only, expected in ((["--only", "b"], ["b"]), ([], ["b", "a"]), ([], ["b", "a"])):
        assert surprises.main([*arguments, *only]) == 0 and calls == expected
    assert surprises.main([*arguments, "--only", "a"]) == 0 and calls == ["b", "a", "a"]
    measured = json.loads((tmp_path / "found.json").read_text())["measured"]
    assert {name: own["found"]["calls"] for name, own in measured.items()} == {"b": 1, "a": 3}
    assert "not measured: a" in capsys.readouterr().out


def test_kept_results_are_made_once(tmp_path):
    laboratory, made = lab.Lab(tmp_path), []
    for _ in range(2):
        found = laboratory.kept("x", lambda: torch.tensor([float(made.append(1) or len(made))]))
        assert found.item() == 1 and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_kept_results_come_back_as_they_were(tmp_path):
    kept = {"weights": {"3": torch.arange(4.0), "9": torch.ones(2, 3)}, "norms": [1.5, 2.25], "start": torch.zeros(())}
    found = lab.Lab(tmp_path).kept("x", lambda: kept)
    assert found["norms"] == kept["norms"] and torch.equal(found["start"], kept["start"])
    assert found["weights"].keys() == kept["weights"].keys()
    assert all(torch.equal(found["weights"][step], own) for step, own in kept["weights"].items())
    pair = lab.Lab(tmp_path).kept("y", lambda: [torch.zeros(2), torch.ones(3)])
    assert [len(each) for each in pair] == [2, 3]


def test_answers_give_the_bound():
    """By the network's answers at every t as by `bits_per_dim`, whose noise is other noise."""
    torch.manual_seed(0)
    unet: Any = DDPMPaperUNet(**TINY).eval()
    scheduler = DDPMPaperScheduler(20, 0.005, 0.5, variance_type="fixed_large")
    x_start = torch.randint(17, (96, 1, 8, 8)).double() / 8 - 1
    answers = lab.Answers(x_start, lab.ask(unet, scheduler.diffusion, x_start))
    for chain, steps in ((scheduler.diffusion, None), (scheduler.chain(5), 5)):
        found = lab.bound(answers, chain)
        expected = bits_per_dim(unet, scheduler, x_start, seed=0, num_levels=17, num_inference_steps=steps).total_b
        difference = found - expected
        assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference)) + 1e-4
        assert difference.std() > 0


def test_the_decoder_charges_its_bin():
    z = (1 / 255) / 0.01
    inside = math.erf(z / math.sqrt(2))
    assert bound.decoder_bpd(0.0, 2 * math.log(0.01), 256) == pytest.approx(-math.log2(inside))
    errors = np.random.default_rng(0).normal(0, 0.02, 200_000)
    mass = [0.5 * (math.erf((e + 1 / 255) / 0.02) - math.erf((e - 1 / 255) / 0.02)) for e in errors[:20_000]]
    sampled = -np.log2(mass).mean()
    assert bound.decoder_bpd(0.02, 2 * math.log(0.02 / math.sqrt(2)), 256) == pytest.approx(sampled, rel=0.02)


def test_the_widths_cost_what_their_divergences_sum_to():
    diffusion = DDPMPaperScheduler(variance_type="fixed_large").diffusion
    ratio = diffusion.betas[1:] / diffusion.posterior_variance[1:]
    expected = 0.5 * (np.log(ratio) + 1 / ratio - 1).sum() / math.log(2)
    assert bound.width_mismatch_bpd(diffusion) == pytest.approx(expected)
    assert bound.width_mismatch_bpd(DDPMPaperScheduler(variance_type="fixed_small").diffusion) == 0


@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0])
def test_encoding_in_many_steps_gives_standard_noise(deviation):
    """Of Gaussian data with the exact ε; in few steps narrow data become too little."""
    diffusion = DDPMPaperScheduler().diffusion
    x = deviation * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def exact(x: torch.Tensor, t: int) -> torch.Tensor:
        kept = float(diffusion.alphas_cumprod[t])
        return math.sqrt(1 - kept) / (kept * deviation**2 + 1 - kept) * x

    ends = {steps: drawing.encode(exact, diffusion, x, steps).std().item() for steps in (10, 1000)}
    assert ends[1000] == pytest.approx(1, abs=0.1) and (deviation == 3.0 or ends[10] < ends[1000])


def test_a_mean_has_its_standard_error():
    assert lab.estimate([1.0, 3.0]) == {"value": 2.0, "error": 1.0}
    rows = np.random.default_rng(0).normal(size=400)
    found = lab.bootstrapped(lambda chosen: float(rows[chosen].mean()), len(rows))
    assert found["value"] == pytest.approx(rows.mean()) and found["error"] == pytest.approx(0.05, rel=0.2)
    assert words.pm({"value": -0.123, "error": 0.01}) == "−0.12 ± 0.01"
