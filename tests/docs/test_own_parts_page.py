"""docs/own_parts.md: its file, its mapping, its snippets and what they leave."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import BLOCK, DIGITS, PAGES, ROOT

from ddpm_hf.cli import main
from ddpm_hf.data import load_samples
from ddpm_hf.runs import TrainingOptions, parse_options

pytestmark = pytest.mark.docs

BLOCKS = [(language, body) for language, body in BLOCK.findall(PAGES["docs/own_parts.md"])]
(FILE,) = [body for language, body in BLOCKS if language == "python" and body.startswith("# my_nets.py\n")]
SNIPPETS = [body for language, body in BLOCKS if language == "python" and body != FILE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the page's file and its export."""
    folder = tmp_path_factory.mktemp("own_parts")
    (folder / "my_nets.py").write_text(FILE, encoding="utf-8")
    main(["export", str(ROOT / "model_cards" / "ddpm-digits"), str(folder / "digits.onnx"), "--batches", "1", "64"])
    return folder


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/own_parts.md", "exec"), namespace)
    return namespace


def test_what_is_saved_is_loaded_in_both_ways(folder, monkeypatch, carried_code):
    made = run(SNIPPETS[0], folder, monkeypatch)
    assert (folder / "mine" / "unet" / "own_my_nets.py").read_text(encoding="utf-8") == FILE
    pipes = [made[name] for name in ("pipe", "given", "trusted")]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    images = [pipe(seeds=[0], num_inference_steps=2, output_type="latent").images for pipe in pipes]
    for other in images[1:]:  # weights in a file lie less well in memory, which shows in the rounding of sums
        torch.testing.assert_close(other, images[0], atol=1e-4, rtol=0)


def test_the_loop_without_pytorch_draws_digits(folder, monkeypatch):
    """Their mean and deviation are those of the data, up to chance, and no two are alike."""
    assert "torch" not in SNIPPETS[1] and "ddpm_hf" not in SNIPPETS[1]
    digits = run(SNIPPETS[1], folder, monkeypatch)["digits"]
    real = load_samples("digits").array / 16
    assert digits.shape == (16, 1, 8, 8) and 0 <= digits.min() < digits.max() <= 1
    deviation = real.mean(axis=(1, 2, 3)).std() / 4  # of the mean over 16 digits
    assert abs(digits.mean() - real.mean()) < 4 * deviation
    assert abs(digits.std() - real.std()) < 0.05
    assert min(np.abs(a - b).max() for i, a in enumerate(digits) for b in digits[:i]) > 0.2


def test_the_mapping_is_read(tmp_path):
    (text,) = [body for language, body in BLOCKS if language == "yaml"]
    (tmp_path / "my.yaml").write_text(f"dataset_name: digits\n{text}", encoding="utf-8")
    options = parse_options(TrainingOptions, ["--config", str(tmp_path / "my.yaml")], default_config=ROOT / DIGITS)
    assert options.network == "my_nets:DiT" and options.network_args == {"layers": 4, "heads": 2}


def test_the_wrapper_is_of_ten_lines_at_most():
    body = FILE[FILE.index("class DiT") : FILE.index("def bars")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 10


def test_the_quoted_difference_is_what_the_command_prints(folder, capsys):
    """The last digit depends on the processor."""
    (quoted,) = [body for language, body in BLOCKS if language == "text"]
    path = folder / "again.onnx"
    main(["export", str(ROOT / "model_cards" / "ddpm-digits"), str(path)])
    number = r"\d\.\d+e-\d+"
    printed = capsys.readouterr().out.replace(str(path), "digits.onnx")
    assert re.sub(number, "#", printed.splitlines()[1]) == re.sub(number, "#", quoted.splitlines()[1])
    assert printed.splitlines()[0] == quoted.splitlines()[0]
    for text in (printed, quoted):
        assert [float(found) < 1e-5 for found in re.findall(number, text)] == [True]
