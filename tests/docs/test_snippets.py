"""The snippets of all pages compile, and run one after the other as a reader would run them."""

import re
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT

from ddpm_hf import DDPMPaperPipeline

pytestmark = pytest.mark.docs

# by tests/test_oracle.py, test_carried_code.py, docs/test_errata.py, test_reading.py, test_guidance_page.py,
# repository/test_packaging.py
RUN_ELSEWHERE = {
    *("docs/oracle.md", "docs/errata.md", "docs/reading.md", "docs/own_loop.md", "docs/guidance.md"),
    "docs/own_parts.md",  # tests/docs/test_own_parts_page.py
    "model_cards/ddpm-digits/README.md",
    "model_cards/ddpm-digits-4steps/README.md",
    "model_cards/ddpm-digits-labels/README.md",  # tests/hub/test_card.py runs such lines
    "model_cards/ddpm-fashion/README.md",
}
SNIPPET = re.compile(r"^(<!-- not run: \S[^\n]* -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = {
    name: SNIPPET.findall(text) for name, text in PAGES.items() if "```python" in text and name.endswith(".md")
}
TO_RUN = [name for name, found in SNIPPETS.items() if name not in RUN_ELSEWHERE and not all(mark for mark, _ in found)]
# What a snippet shows 16 times, the fast test sees once.
SHORTER = {
    "README.md": {"num_inference_steps=100": "num_inference_steps=4", "range(300)": "range(2)"},
    "docs/evaluation.md": {"range(4)": "range(1)"},
    "docs/fashion.md": {"num_inference_steps=100": "num_inference_steps=4"},
    "docs/sampling.md": {
        "range(16)).images": "range(1)).images",
        "(99, 199, 299, 499)": "(9,)",
        "own_scheduler(50)": "own_scheduler(5)",
        "scheduler.chain(50)": "scheduler.chain(5)",
        "generators=generators, num_inference_steps=50": "generators=generators, num_inference_steps=5",
    },
    "docs/speed.md": {"range(16)": "range(1)"},
}


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_compile(page):
    assert len(SNIPPETS[page]) == PAGES[page].count("```python")
    for _, code in SNIPPETS[page]:
        compile(code, page, "exec")


@pytest.mark.parametrize(
    ("page", "shorter"),
    [
        *((page, True) for page in TO_RUN),
        *(pytest.param(page, False, marks=pytest.mark.long) for page in TO_RUN if page in SHORTER),
    ],
)
def test_snippets_run_one_after_the_other(page, shorter, tmp_path, monkeypatch):
    """In a folder with nothing but `model_cards`, offline."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    replaced = set()
    for mark, code in SNIPPETS[page]:
        for written, less in SHORTER.get(page, {}).items() if shorter else ():
            if written in code:
                code, replaced = code.replace(written, less), replaced | {written}
        if not mark:
            exec(compile(code, page, "exec"), namespace)
    assert replaced == (set(SHORTER.get(page, {})) if shorter else set())
    if page == "README.md":
        assert namespace["images"] and DDPMPaperPipeline.from_pretrained("my_model").sample_shape == (1, 8, 8)
        assert shorter or namespace["loss"] < 0.4  # of 1.0 for a network that knows nothing
