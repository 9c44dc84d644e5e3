"""The page in a real browser, on one server for all tests: what visitors see, type, drop and are told."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Page as Tab, expect, sync_playwright
from small_models import DIGITS, LABELLED, ROOT, saved

from ddpm_hf.cli import main
from ddpm_hf.demo import tasks as demo_tasks

pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(command: list[str], log: Path, port: int, **kwargs: Any) -> Iterator[str]:
    """The address of a page in a process of its own, which must end quietly at Ctrl-C."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(log.parent / "gradio"), **kwargs.pop("env", {})}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, env=environment, start_new_session=True, **kwargs
        )
        try:
            deadline = time.monotonic() + 180
            while "until Ctrl-C" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield url
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert not [path for path in (log.parent / "gradio").rglob("*") if path.is_file()]  # visitors' images
            raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", log.read_text(), re.MULTILINE)
            assert not [line for line in raised if not line.startswith("gradio.exceptions.")]  # its own refusals
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def address(checkpoints, tmp_path_factory) -> Iterator[str]:
    """A page with the digits, a model of colour images, and the digits by class."""
    port = free_port()
    shown = [str(folder) for folder in (DIGITS, checkpoints / "colour", LABELLED)]
    command = ["-m", "ddpm_hf.cli", "demo", *shown, "--port", str(port)]
    log = tmp_path_factory.mktemp("served") / "log"
    with served([*command, "--device", "cpu"], log, port, cwd=ROOT) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "there is no chromium: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A tab on the page. When it closes: no errors in the console, and nothing was asked of anybody else."""

    def __init__(self, browser: Any, url: str, width: int):
        self.tab: Tab = browser.new_page(viewport={"width": width, "height": 800})
        self.tab.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("websocket", lambda socket: self.requests.append(socket.url))
        self.tab.goto(url)
        expect(self.button("Draw samples")).to_be_visible(timeout=60_000)

    def button(self, name: str) -> Any:
        return self.tab.get_by_role("button", name=name, exact=True)

    def open(self, name: str) -> None:
        self.tab.get_by_role("tab", name=name, exact=True).click()
        expect(self.tab.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")

    @property
    def panel(self) -> Any:
        return self.tab.locator("[role=tabpanel]").locator("visible=true")

    def number(self, name: str, value: int) -> None:
        field = self.panel.get_by_role("spinbutton", name=f"number input for {name}")
        field.fill(str(value))
        field.press("Tab")

    def text(self, name: str, value: str) -> None:
        self.panel.get_by_role("textbox", name=name).fill(value)

    def drop(self, path: str | Path) -> None:
        self.panel.locator("input[type=file]").first.set_input_files(str(path))
        expect(self.panel.get_by_role("button", name="Remove Image")).to_be_visible()

    def figure(self, caption: str | re.Pattern[str]) -> Any:
        return self.panel.get_by_role("figure", name=caption)

    def expect_message(self, text: str) -> None:
        toast = self.tab.get_by_test_id("toast-body").filter(has_text=text)
        expect(toast).to_be_visible()
        assert "Traceback" not in toast.inner_text() and "/tmp" not in toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        expect(toast).to_be_hidden()

    def check(self) -> None:
        outside = [url for url in self.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
        assert not self.errors and not outside and len(self.requests) > 10


@pytest.fixture
def visit(browser, address) -> Iterator[Callable[..., Visit]]:
    visits = []

    def start(width: int = 1280) -> Visit:
        visits.append(Visit(browser, address, width))
        return visits[-1]

    yield start
    for visited in visits:
        visited.tab.close()
        visited.check()


@pytest.fixture
def zero(tmp_path) -> Path:
    """A photograph of a nought, white on black."""
    image = Image.new("RGB", (200, 260))
    ImageDraw.Draw(image).ellipse((50, 80, 150, 200), outline="white", width=26)
    image.save(tmp_path / "zero.png")
    return tmp_path / "zero.png"


def is_small(length: float) -> bool:
    """Too small for an image on a wide screen."""
    return length < 120


def draw_few(page: Visit) -> None:
    page.text("Seeds", "0-3")
    page.number("Steps", 40)
    page.button("Draw samples").click()
    expect(page.panel.get_by_role("img", name="One sample per seed")).to_be_visible()
    expect(page.figure(re.compile(r"x_t at t = \d+"))).to_be_visible()


def test_sampling_and_the_slider_over_t(visit):
    page = visit()
    draw_few(page)
    assert page.panel.get_by_role("figure").count() == 2  # x_t and x̂_0
    picture = page.figure(re.compile("x_t at")).get_by_role("img")
    asked = len(page.requests)
    slider = page.panel.get_by_role("slider", name="range slider for Moment")
    expect(slider).to_have_attribute("max", "26")
    slider.focus()
    slider.press("Home")
    seen, times = [], []
    for _ in range(26):  # every stop of the slider is a moment of its own
        page.tab.wait_for_timeout(100)
        assert page.panel.get_by_role("figure").count() == 2
        seen.append(picture.get_attribute("src"))
        times.append(int(str(picture.get_attribute("alt")).removeprefix("x_t at t = ")))
        slider.press("ArrowRight")
    assert len(set(seen)) == 26 and times == sorted(set(times), reverse=True) and times[-1] == 0
    assert len([url for url in page.requests[asked:] if not url.startswith("data:")]) == 0  # nothing was recomputed
    page.tab.get_by_role("combobox", name="Scheduler").click()
    page.tab.get_by_role("option", name="ddim", exact=True).click()
    page.button("Draw samples").click()
    expect(page.figure("x_t at t = 0").get_by_role("img")).not_to_have_attribute("src", str(seen[-1]))
    page.number("Steps", 5)  # fewer moments: the slider ends earlier, and stays on the last
    page.button("Draw samples").click()
    expect(slider).to_have_attribute("max", "6")
    expect(page.panel.get_by_role("spinbutton", name="number input for Moment")).to_have_value("6")
    expect(page.figure("x_t at t = 0")).to_be_visible()
    slider.press("ArrowLeft")
    expect(page.figure("x_t at t = 0")).to_be_hidden()
    expect(page.figure(re.compile("x_t at"))).to_be_visible()


def test_interpolation(visit):
    page = visit()
    page.open("Interpolate")
    page.number("Steps", 40)
    page.text("Two seeds", "3,4")
    page.button("Interpolate").click()
    expect(page.figure("λ = 0.125")).to_be_visible()
    assert page.panel.get_by_role("figure").count() == 11
    boxes = [image.bounding_box() for image in page.panel.get_by_role("figure").get_by_role("img").all()]
    assert not [box for box in boxes if is_small(box["width"]) or is_small(box["height"])]
    assert len({box["y"] for box in boxes}) == 2  # the nine in one row
    for text, message in (("3", "Two seeds: give two"), ("2,3", "Seed of the noise: give another than 2")):
        page.text("Two seeds", text)
        page.button("Interpolate").click()
        page.expect_message(message)


def test_noise_and_back(visit, zero):
    page = visit()
    page.open("Noise")
    page.drop(zero)
    page.number("Steps", 100)
    page.number("t", 100)
    page.button("Diffuse and denoise").click()
    expect(page.figure("seed 3")).to_have_count(2)
    expect(page.figure("as the network is given it")).to_be_visible()
    expect(page.panel.get_by_role("heading", name="x_t, t = 101")).to_be_visible()


def test_bits(visit, zero):
    page = visit()
    page.open("Bits")
    page.drop(zero)
    totals = []
    for terms in ("1 in 40", "all"):
        page.panel.get_by_role("radio", name=terms, exact=True).check()
        page.button("Measure").click()
        expect(page.panel.get_by_text("on 17 levels per pixel")).to_contain_text(terms.replace("all", "every term"))
        totals.append(page.panel.get_by_role("row", name="total").get_by_role("cell").inner_text())
    assert all(re.fullmatch(r"[1-9]\.\d\d", total) for total in totals) and totals[0] != totals[1]
    expect(page.figure("Bits/dim of each term over t, both axes logarithmic")).to_be_visible()


def test_a_dropped_image_is_shown_large_enough_to_see(visit, zero, tmp_path):
    page = visit()
    page.open("Noise")
    shown = page.panel.locator("img").first
    (tmp_path / "broken.png").write_text("no image")
    for path, look, rendering in (
        (Path(saved(tmp_path, Image.new("L", (8, 8)), "tiny.png")), "small", "pixelated"),
        (zero, "large", "auto"),
        (tmp_path / "broken.png", "broken", "auto"),
    ):
        page.drop(path)
        expect(page.panel.locator("img").first).to_have_attribute("data-look", look)
        assert shown.evaluate("image => getComputedStyle(image).imageRendering") == rendering
        if look == "broken":  # no icon of a broken image
            expect(shown).to_be_hidden()
        else:
            assert not is_small(shown.bounding_box()["height"])
        page.panel.get_by_role("button", name="Remove Image").click()


def test_another_checkpoint(visit, zero):
    page = visit()
    checkpoint = page.tab.get_by_role("combobox", name="Checkpoint")
    checkpoint.click()
    names = [re.compile(name) for name in ("ddpm-digits", "colour", "ddpm-digits-labels")]
    expect(page.tab.get_by_role("option")).to_have_text(names)
    page.tab.get_by_role("option", name="colour").click()
    steps = page.panel.get_by_role("slider", name="range slider for Steps")
    expect(steps).to_have_attribute("max", "10")
    page.button("Draw samples").click()
    expect(page.figure(re.compile("x_t at"))).to_be_visible()
    page.open("Bits")
    page.drop(zero)
    page.button("Measure").click()
    expect(page.panel.get_by_text("on 256 levels per pixel")).to_be_visible()


def test_classes_and_guidance(visit):
    """Their fields are there with the checkpoint that has classes; another class is another picture."""
    page = visit()
    label = page.panel.get_by_role("combobox", name="Class")
    expect(label).to_have_count(0)
    page.tab.get_by_role("combobox", name="Checkpoint").click()
    page.tab.get_by_role("option", name="ddpm-digits-labels").click()
    expect(label).to_be_visible()
    sources = []
    for name in ("7", "0"):
        label.click()
        page.tab.get_by_role("option", name=name, exact=True).click()
        page.number("Guidance", 3)
        draw_few(page)
        expect(page.button("Draw samples")).to_be_enabled()
        image = page.panel.get_by_role("img", name="One sample per seed")
        if sources:
            expect(image).not_to_have_attribute("src", sources[-1])
        sources.append(image.get_attribute("src"))
    assert len(set(sources)) == 2


def tab_to(page: Visit, role: str, name: str, *, at_most: int = 40) -> None:
    """Press Tab until the focus is there."""
    target = page.tab.get_by_role(role, name=name).locator("visible=true").first
    for _ in range(at_most):
        page.tab.keyboard.press("Tab")
        if target.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"{name} is not reached by Tab")


def test_with_the_keyboard_alone(visit, zero):
    page = visit()
    keyboard = page.tab.keyboard
    tab_to(page, "textbox", "Seeds")
    keyboard.press("Control+a")
    keyboard.type("5,6")
    tab_to(page, "slider", "range slider for Steps")
    keyboard.press("Home")
    keyboard.press("ArrowRight")
    tab_to(page, "button", "Draw samples")
    keyboard.press("Enter")
    tab_to(page, "slider", "range slider for Moment")
    expect(page.figure(re.compile("x_t at"))).to_be_visible()
    keyboard.press("End")
    expect(page.figure("x_t at t = 0")).to_be_visible()

    page = visit()
    keyboard = page.tab.keyboard
    tab_to(page, "tab", "Noise")
    keyboard.press("Enter")
    expect(page.button("Diffuse and denoise")).to_be_visible()
    tab_to(page, "button", "Drop an image file here to upload")
    choosers: list[Any] = []
    page.tab.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(20):  # on a busy machine the page may not listen yet
        keyboard.press("Enter")
        page.tab.wait_for_timeout(1000)
        if choosers:
            break
    choosers[0].set_files(str(zero))
    expect(page.panel.get_by_role("button", name="Remove Image")).to_be_visible()
    tab_to(page, "slider", "range slider for t")
    keyboard.press("Home")
    tab_to(page, "button", "Diffuse and denoise")
    keyboard.press("Space")
    expect(page.figure("seed 3")).to_have_count(2)


def test_on_a_narrow_screen(visit, zero):
    page = visit(375)

    def check_width() -> None:
        page.tab.wait_for_timeout(500)
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= 375
        for element in page.panel.locator("button, input, img, table").all():
            box = element.bounding_box()
            assert box is None or element.is_hidden() or box["x"] + box["width"] <= 376, element.inner_html()

    for name in ("Sample", "Interpolate", "Noise", "Bits"):  # none of them behind a menu
        assert page.tab.get_by_role("tab", name=name, exact=True).is_visible()
    draw_few(page)
    check_width()
    grid, box = page.tab.locator("#samples img").bounding_box(), page.tab.locator("#samples").bounding_box()
    assert grid["width"] > 280 and 0 <= box["height"] - grid["height"] < 10
    for name, button, caption in (
        ("Interpolate", "Interpolate", "λ = 1"),
        ("Noise", "Diffuse and denoise", "seed 3"),
        ("Bits", "Measure", "x_0, as the network is given it"),
    ):
        page.open(name)
        if name != "Interpolate":
            page.drop(zero)
        page.button(button).click()
        expect(page.panel.get_by_role("figure", name=caption, exact=True).first).to_be_visible()
        check_width()


def test_seeds_and_steps_that_are_refused(visit):
    page = visit()
    for text, message in (
        ("one", "Seeds: 'one' is neither a seed nor a range such as 0-15"),
        ("0-64", "Seeds: give at most 64"),
        ("", "is neither a seed"),
        ("<b>1</b>", "Seeds: '<b>1</b>' is neither a seed"),
        ("4294967296", "seeds lie in"),
    ):
        page.text("Seeds", text)
        page.button("Draw samples").click()
        page.expect_message(message)
    page.panel.get_by_role("textbox", name="Seeds").press("Enter")
    page.expect_message("seeds lie in")
    draw_few(page)


def test_files_that_are_no_images_get_a_message(visit, zero, tmp_path):
    page = visit()
    page.open("Noise")
    page.button("Diffuse and denoise").click()
    page.expect_message("Drop an image first")
    (tmp_path / "text.png").write_text("no image")
    saved(tmp_path, Image.effect_noise((200, 200), 50), "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    saved(tmp_path, Image.new("1", (9000, 9000)), "huge.png")
    (tmp_path / "x.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>")
    for name, message in (
        ("text.png", "no readable image header"),
        ("cut.png", "cannot be decoded"),
        ("huge.png", "9000 x 9000 is more than 50,000,000 pixels"),
        ("x.svg", "no readable image header"),
    ):
        page.drop(tmp_path / name)
        page.button("Diffuse and denoise").click()
        page.expect_message(message)
        page.panel.get_by_role("button", name="Remove Image").click()
    (tmp_path / "notes.txt").write_text("no image")
    page.panel.locator("input[type=file]").first.set_input_files(str(tmp_path / "notes.txt"))
    page.expect_message("Invalid file type: notes.txt")
    assert not page.errors
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(demo_tasks.MAX_FILE_BYTES + 1)
    page.panel.locator("input[type=file]").first.set_input_files(str(tmp_path / "large.png"))
    page.expect_message('exceed the maximum allowed size of 20.0 Mb: "large.png"')
    page.errors.clear()  # the browser's own, about the upload that was refused
    page.number("Steps", 20)
    frames = [Image.new("L", (30, 30), shade) for shade in (0, 255)]
    page.drop(saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:]))
    page.button("Diffuse and denoise").click()
    page.expect_message("the first frame is taken")
    expect(page.figure("seed 3")).to_have_count(2)


def test_stop_frees_the_page_for_the_next(visit):
    page, other = visit(), visit()
    page.text("Seeds", "0-63")
    page.button("Draw samples").click()
    page.tab.wait_for_timeout(1500)
    expect(page.panel.get_by_text(re.compile(r"\d+\.\d%"))).to_be_visible()  # progress
    other.text("Seeds", "0")
    other.number("Steps", 20)
    other.button("Draw samples").click()
    page.button("Stop").click()
    expect(other.figure(re.compile("x_t at"))).to_be_visible()
    assert page.panel.get_by_role("img", name="One sample per seed").count() == 0
    page.number("Steps", 20)
    page.button("Draw samples").click()
    expect(page.figure(re.compile("x_t at"))).to_be_visible()


def asked(address: str, function: int, data: list[Any]) -> dict[str, Any]:
    """What the server answers to a request that no page of ours would make."""
    session = os.urandom(6).hex()
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/queue/join?", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        for line in events:
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


def test_no_other_checkpoints_or_files_can_be_asked_for(address, checkpoints):
    with urllib.request.urlopen(f"{address}/config", timeout=60) as response:
        config = json.load(response)
    labels = {component["id"]: component["props"].get("label") for component in config["components"]}
    functions = [
        (function["id"], [labels.get(i) for i in function["inputs"]])
        for function in config["dependencies"]
        if function["backend_fn"]
    ]
    (draw,) = (i for i, inputs in functions if "Scheduler" in inputs)
    (noise,) = (i for i, inputs in functions if "Image" in inputs and "Steps" in inputs)
    assert asked(address, draw, ["ddpm-digits", "0", 5, "ddpm", None, 1, 1])["success"]
    for name in (str(checkpoints / "grey"), "google/ddpm-cifar10-32", "../colour"):
        answer = asked(address, draw, [name, "0", 5, "ddpm", None, 1, 1])
        assert not answer["success"] and "not in the list of choices" in answer["output"]["error"]
    assert not asked(address, draw, ["ddpm-digits", "0", 10**9, "ddpm", None, 1, 1])["success"]
    path = str(ROOT / "docs" / "pictures" / "digits.png")
    for image in ({"path": path}, {"path": path, "url": f"file://{path}"}, {"url": "http://127.0.0.1:9/x.png"}):
        image["meta"] = {"_type": "gradio.FileData"}
        answer = asked(address, noise, ["ddpm-digits", image, "white", "0", 5, 100])
        assert not answer["success"]
    assert asked(address, draw, ["ddpm-digits", "0", 5, "ddpm", None, 1, 1])["success"]


def test_a_space_runs_on_its_own_copy_of_the_package(tmp_path, browser):
    space = tmp_path / "space"
    main(["demo", str(DIGITS), "--space", str(space)])
    log, port = tmp_path / "log", free_port()
    env = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with served(["-v", str(space / "app.py")], log, port, cwd=tmp_path, env=env) as url:
        page = Visit(browser, url, 1280)
        draw_few(page)
        page.tab.close()
        page.check()
    imported = log.read_text()
    assert f"{space}/ddpm_hf/demo/__pycache__/page." in imported or f"{space}/ddpm_hf/demo/page.py" in imported
    assert f"{ROOT}/ddpm_hf/" not in imported
