"""The page without a browser, the command that shows it, and the Space that it writes."""

import base64
import html
import importlib.metadata
import io
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pytest
from PIL import Image
from small_models import DIGITS, ROOT, ignored, some_levels

from ddpm_hf import demo
from ddpm_hf.cli import main
from ddpm_hf.cli.arguments import SCHEDULERS, parse_seeds
from ddpm_hf.demo import Page, tasks as demo_tasks
from ddpm_hf.demo.models import Model, load
from ddpm_hf.demo.page import ONE_IN, frames_html, opening_html, picture_html
from ddpm_hf.demo.tasks import Frame

# ---- the page without a browser ------------------------------------------------------------------------------------


def page_of(models: dict[str, Model], max_seconds: float = 60) -> Page:
    return Page(models, parse_seeds=parse_seeds, schedulers=SCHEDULERS, max_seconds=max_seconds)


def test_frames_are_all_there_and_one_is_shown():
    blank = Image.new("L", (8, 8))
    text = frames_html([Frame(t, blank, blank) for t in (10, 6, 3, 0)], shown=2)
    assert re.findall(r'data-t="(\d+)"( hidden)?>', text) == [
        ("10", " hidden"),
        ("6", ""),
        ("3", " hidden"),
        ("0", " hidden"),
    ]


def test_captions_are_escaped_and_large_pictures_made_smaller():
    text = picture_html(Image.new("RGB", (2000, 1000)), '"><script>')
    assert "<script>" not in text and html.escape('"><script>') in text and "image/webp" in text
    assert len(text) < 10_000


def test_the_page_opens_with_what_training_drew_and_on_what():
    digits = load([str(DIGITS)], "cpu")["ddpm-digits"]
    text = opening_html(digits)
    assert "8 × 8 images in grey; 701,345 parameters. Trained on digits, for 1,000 steps." in text
    assert "Finished samples: seeds 0 to 15, not selected" in text
    source = base64.b64decode(text.split("base64,")[1].split('"')[0])
    with Image.open(io.BytesIO(source)) as shown, Image.open(DIGITS / "samples" / "step-1000-ema.png") as drawn:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(drawn.convert("RGB")))


def test_without_records_the_page_says_what_the_network_is(grey):
    assert opening_html(grey).startswith("<p>Draws 8 × 8 images in grey; ") and "<img" not in opening_html(grey)
    assert "Trained" not in grey.about


def test_mistakes_become_messages_and_leave_nothing_running(grey):
    page = page_of({"grey": grey})

    def refuse(*_: Any) -> None:
        assert list(page.running) == ["visitor"]
        raise ValueError("t < 3 & 'so' on")

    def exhaust(*_: Any) -> None:
        raise MemoryError

    for work, message in ((refuse, html.escape("t < 3 & 'so' on")), (exhaust, "not enough memory")):
        with pytest.raises(gradio.Error) as refused:
            page._answer(work, ("grey",), "visitor", ignored)
        assert message in refused.value.message and not refused.value.print_exception
        assert not page.running


def test_work_ends_when_it_is_stopped_or_takes_too_long(grey):
    page = page_of({"grey": grey})

    def stopped(report: Callable[[float], None], model: Model) -> None:
        report(0.5)
        page.running["visitor"].set()
        report(0.6)
        pytest.fail("it went on")

    with pytest.raises(gradio.Error) as ended:
        page._answer(stopped, ("grey",), "visitor", ignored)
    assert not ended.value.visible and not page.running
    with pytest.raises(gradio.Error, match="Stopped after 1e-09 seconds: ask for fewer"):
        page_of({"grey": grey}, 1e-9)._answer(lambda report, _: report(0.5), ("grey",), "visitor", ignored)


def test_works_never_overlap(grey):
    """A stopped one may still be at its last step when gradio starts the next: its hook must not see that one's."""
    page, goes_on, started = page_of({"grey": grey}), threading.Event(), []

    def work(report: Callable[[float], None], model: Model, name: str) -> str:
        started.append(name)
        assert goes_on.wait(60)
        return name

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(page._answer, work, ("grey", "a"), "a", ignored)
        while not started:
            time.sleep(0.01)
        second = pool.submit(page._answer, work, ("grey", "b"), "b", ignored)
        time.sleep(0.3)
        assert started == ["a"] and list(page.running) == ["a"]
        goes_on.set()
        assert (first.result(60), second.result(60)) == ("a", "b")
    assert started == ["a", "b"] and not page.running


def test_visitors_reach_only_the_checkpoints_that_were_named(grey, colour):
    page = page_of({"grey": grey, "colour": colour}).build()
    config = page.get_config_file()
    (checkpoint,) = [c["props"] for c in config["components"] if c["props"].get("label") == "Checkpoint"]
    assert [value for _, value in checkpoint["choices"]] == ["grey", "colour"]
    assert not checkpoint["allow_custom_value"]
    assert {dependency["api_visibility"] for dependency in config["dependencies"]} == {"private"}
    heavy = [fn for fn in page.fns.values() if fn.concurrency_id == "model"]
    assert len(heavy) == 4 and {fn.concurrency_limit for fn in heavy} == {1}
    assert not page.analytics_enabled
    assert not [path for path in (ROOT / "ddpm_hf").rglob("*.pyi") if path.name != "__init__.pyi"]  # gradio's own


def test_sliders_follow_the_checkpoint(grey):
    digits = load([str(DIGITS)], "cpu")["ddpm-digits"]
    page = page_of({"digits": digits, "grey": grey})
    page.build()
    updates = page._limits("grey")
    assert [(u["minimum"], u["maximum"], u["value"]) for u in updates[:3]] == [(1, 10, 10)] * 3
    assert [(u["minimum"], u["maximum"], u["step"]) for u in updates[3:5]] == [(0, 10, 1), (1, 10, 1)]
    assert all(u["minimum"] < u["value"] < u["maximum"] for u in updates[3:5])


def test_classes_follow_the_checkpoint(grey, pets):
    """Their fields are there only where there are classes."""
    page = page_of({"grey": grey, "pets": pets})
    page.build()
    label, guidance = page._limits("pets")[5:]
    assert (label["choices"], label["value"], label["visible"]) == (["any", "cat", "dog", "class 2"], "any", True)
    assert guidance["visible"]
    label, guidance = page._limits("grey")[5:]
    assert (label["choices"], label["value"], label["visible"], guidance["visible"]) == ([], None, False, False)


def test_the_number_of_terms_is_never_none(grey):
    for one_in in ONE_IN.values():
        assert np.isfinite(demo_tasks.bound(grey, some_levels(grey), one_in=one_in, seed=0, report=ignored).total)


# ---- the command ---------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    line = ended.value.code
    assert isinstance(line, str) and line.startswith("ddpm-hf: ") and "\n" not in line
    return line


def test_refused_commands(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey = str(checkpoints / "grey")
    assert "there is no model_cards/ddpm-fashion here; name a training run" in refused()
    assert "draws points" in refused(str(checkpoints / "points"))
    assert "--port 0 must lie in [1, 65535]" in refused(grey, "--port", "0")
    assert "--max_seconds 0 must be above 0" in refused(grey, "--max_seconds", "0")
    assert "exists; give a new or an empty folder" in refused(grey, "--space", str(checkpoints))
    assert "draws points" in refused(str(checkpoints / "points"), "--space", "space")
    assert not list(tmp_path.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is taken" in refused(grey, "--port", port)


def test_a_missing_package_is_named(checkpoints, monkeypatch):
    monkeypatch.delitem(sys.modules, "ddpm_hf.demo.page")
    for name in ("page", "Page", "launch"):  # the package keeps what was asked for once
        monkeypatch.delitem(vars(demo), name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert refused(str(checkpoints / "grey")) == "ddpm-hf: gradio is not installed: pip install 'ddpm_hf[demo]'"


def test_gradio_is_loaded_by_the_page_alone():
    """The command imports the page where it runs; everything else goes without."""
    sources = {
        path.relative_to(ROOT / "ddpm_hf"): path.read_text("utf-8") for path in (ROOT / "ddpm_hf").rglob("*.py")
    }
    loading = {str(name) for name, text in sources.items() if re.search(r"^\s*(import|from) gradio", text, re.M)}
    assert loading == {"demo/page.py"}
    lines = [line for text in sources.values() for line in re.findall(r".*import.*\bPage\b.*", text)]
    assert lines == ["        from ..demo import Page, launch"]  # indented


# ---- as a Space ----------------------------------------------------------------------------------------------------


def test_a_space_holds_all_it_needs(checkpoints, tmp_path, capsys):
    space = tmp_path / "space"
    main(["demo", str(DIGITS), str(checkpoints / "colour"), "--space", str(space)])
    assert capsys.readouterr().out.startswith(f"{space} is a Space of {DIGITS} and ")
    assert {path.name for path in space.iterdir()} == {
        *("app.py", "requirements.txt", "README.md", "ddpm_hf", "checkpoints")
    }
    sources = {path.relative_to(ROOT) for kind in ("*.py", "*.pyi") for path in (ROOT / "ddpm_hf").rglob(kind)}
    for path in (*sources, Path("ddpm_hf/hub/card_template.md")):
        assert (space / path).read_bytes() == (ROOT / path).read_bytes()
    assert not list(space.rglob("__pycache__"))
    header = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert f"sdk: gradio\nsdk_version: {importlib.metadata.version('gradio')}\napp_file: app.py\n" in header
    names = [re.split(r"[<>=~]", line)[0] for line in (space / "requirements.txt").read_text().splitlines()]
    assert {"torch", "diffusers", "safetensors", "matplotlib"} <= set(names) and "gradio" not in names
    assert not {"pytest", "playwright", "ddpm_hf[train]"} & set(names) and len(names) == len(set(names))
    before = load([str(DIGITS), str(checkpoints / "colour")], "cpu")
    after = load([str(space / "checkpoints" / name) for name in before], "cpu")
    for name, model in after.items():
        assert model.num_levels == before[name].num_levels and model.about == before[name].about
        images = [m.pipe(seeds=[1], num_inference_steps=5, output_type="np").images for m in (model, before[name])]
        assert np.array_equal(*images)
    for text in ("options.yaml", "model_index.json"):
        assert str(ROOT) not in (space / "checkpoints" / "ddpm-digits" / text).read_text()
