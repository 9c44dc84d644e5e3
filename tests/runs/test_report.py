"""report.html: what it shows of a run, that its links lead somewhere, and that nothing in a run becomes markup."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm_hf.hub import files_to_upload
from ddpm_hf.runs import write_report, write_results
from ddpm_hf.runs.report import duration
from training import train as train_py

VOID = {"meta", "img", "link", "br", "hr", "input"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></table></body>",
    "&lt;b&gt; &amp; &#60;",
    "a\nb\tc\rd\0e",
    "\u202egnp.exe \u2066x\u2069",
    "\ud800 not a character",
    "<!-- ",
    "]]>",
    "{{ title }} {title} %s",
    "javascript:alert(1)",
    "x" * 5000,
]
RESULT: dict[str, Any] = {
    "metric": "bpd",
    "name": "bits/dim",
    "value": 2.931234,
    "spread": 0.01234567,
    "protocol": {"num_images": 1797},
    "model": {"weights": "ema", "weights_sha256": "ab12cd34ef", "num_inference_steps": 10},
    "data": {"name": "digits", "split": "test", "fingerprint": "cd34"},
    "time_utc": "2026-11-20T15:00:00+00:00",
}


class Page(HTMLParser):
    """A page's elements, with every one closed where it must be; its text; and the rows of its tables."""

    def __init__(self, folder: Path):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.comments: list[str] = []
        self.feed((folder / "report.html").read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def row(self, first: str) -> list[str]:
        (row,) = [row[1:] for row in self.rows if row[0] == first]
        return row


def shape_of(page: Page) -> list[tuple[str, list[str]]]:
    """The elements and the names of their attributes, which no value may change."""
    return [(tag, sorted(attributes)) for tag, attributes in page.elements]


def line(step: int, **numbers: float) -> dict[str, Any]:
    time_utc = f"2026-11-20T{10 + step // 60:02}:{step % 60:02}:07+00:00"
    return {"step": step, "loss": 0.5, "grad_norm": 1.5, "learning_rate": 2e-4, "time_utc": time_utc, **numbers}


def add_grid(folder: Path, step: int, *kinds: str) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    for kind in kinds:
        Image.new("L", (8, 8)).save(folder / "samples" / f"step-{step}-{kind}.png")


def links_lead_to_files(page: Page, folder: Path) -> set[str]:
    """The files that the page shows or links to, all of them in the folder."""
    targets = {str(image["src"]) for image in page.named("img")} | {str(link["href"]) for link in page.named("a")}
    for target in targets:
        assert (folder / target).is_file() and not Path(target).is_absolute() and ".." not in target
    return targets


# ---- what it shows -------------------------------------------------------------------------------------------------


def test_an_empty_run_has_a_page(tmp_path):
    write_report(tmp_path, metrics=[], step=0, num_steps=100)
    page = Page(tmp_path)
    assert not links_lead_to_files(page, tmp_path)
    assert page.row("step") == ["0 of 100"] and "0 % done" in page.text and "None yet" in page.text
    assert "Evaluation" not in page.text and "time left" not in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_it_says_where_the_run_stands(tmp_path):
    metrics = [line(1, loss=9.0), line(61, loss=0.123456789, images_per_s=1234.5, epoch=17.8149)]
    write_report(tmp_path, metrics=metrics, step=61, num_steps=1000, seconds_left=7300.0)
    page = Page(tmp_path)
    assert page.row("step") == ["61 of 1,000"] and page.named("progress")[0]["value"] == "61"
    assert page.row("time left") == ["about 2.0 h, when this was written"]
    assert page.row("loss") == ["0.123"] and page.row("images/s") == ["1,234"] and page.row("epoch") == ["17.8"]
    assert page.row("learning rate") == ["0.0002"]
    assert page.row("trained") == ["2026-11-20 10:01 UTC to 2026-11-20 11:01 UTC"]


def test_a_run_that_is_over_has_no_time_left(tmp_path):
    write_report(tmp_path, metrics=[line(5)], step=5, num_steps=5, seconds_left=0.0)
    page = Page(tmp_path)
    assert "Finished" in page.text and "time left" not in page.text


def test_every_grid_is_shown_the_newest_first(tmp_path):
    for step in (5, 40, 100, 1200):
        add_grid(tmp_path, step, "raw", "ema")
    add_grid(tmp_path, 2000, "ema")  # killed between the two
    for name in ("step-7-other.png", "step-x-ema.png", "step-007-raw.png", "notes.png"):  # none of the run's
        Image.new("L", (8, 8)).save(tmp_path / "samples" / name)
    (tmp_path / "samples" / "step-9-ema.png").mkdir()
    for name in ("curves.png", "samples_over_time.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    write_report(tmp_path, metrics=[line(1200)], step=2000, num_steps=3000)
    page = Page(tmp_path)
    shown = links_lead_to_files(page, tmp_path)
    grids = {f"samples/step-{step}-{kind}.png" for step in (5, 40, 100, 1200) for kind in ("raw", "ema")}
    assert shown == grids | {"samples/step-2000-ema.png", "curves.png", "samples_over_time.png"}
    places = [page.text.index(f"Step {step}") for step in ("2,000", "1,200", "100", "40", "5 ")]
    assert places == sorted(places) and page.text.count("raw weights") == 4
    assert page.text.count("averaged (EMA) weights") == 5
    assert all(image["alt"] for image in page.named("img"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("ema_decay: 0.995", "200 steps are too short for ema_decay 0.995: .* ema_decay 0.975 or less would fit"),
        ("ema_decay: 0.9999", "too short for ema_decay 0.9999"),
        *((f"ema_decay: {value}", "") for value in ("0.975", "0", "<b>", "", "1/0", ".nan", "-.inf", "9" * 400)),
        *((text, "") for text in ("a: b", "[", "- " * 2000, "3", "\0", None)),
    ],
)
def test_it_says_where_averaged_weights_cannot_follow(tmp_path, options, words):
    Image.new("L", (8, 8)).save(tmp_path / "samples_over_time.png")
    if options is not None:
        (tmp_path / "options.yaml").write_text(options, encoding="utf-8")
    write_report(tmp_path, metrics=[], step=200, num_steps=200)
    text = Page(tmp_path).text
    assert re.search(words, text) if words else "too short" not in text


def test_tables_are_shown_under_their_headings(tmp_path):
    tables = {
        "Options": [
            ("option", "here", "default"),
            ("dropout", 0.0, 0.1),
            ("resume", None, "latest"),
            ("flip", True, 0),
        ],
        "Environment": [("", ""), ("torch", "2.13")],
    }
    write_report(tmp_path, metrics=[], step=0, num_steps=1, tables=tables)
    page = Page(tmp_path)
    assert page.row("option") == ["here", "default"] and page.row("dropout") == ["0", "0.1"]
    assert page.row("resume") == ["none", "latest"] and page.row("flip") == ["true", "0"]
    assert page.row("torch") == ["2.13"] and [] not in page.rows and ["", ""] not in page.rows


def test_results_of_an_evaluation_are_shown(tmp_path):
    fid = {**RESULT, "metric": "fid", "name": "FID", "value": 12.5, "spread": None, "data": None}
    write_results(tmp_path / "evaluation.json", [RESULT, fid])
    write_report(tmp_path, metrics=[], step=1, num_steps=1)
    page = Page(tmp_path)
    where = ["digits (test)", "10", "ema, sha256 ab12cd34", "2026-11-20 15:00 UTC"]
    assert page.row("bits/dim") == ["2.9312 ± 0.0123", *where]
    assert page.row("FID") == ["12.5000", "", *where[1:]]


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[]",
        '{"results": 3}',
        '{"results": [{}]}',
        json.dumps({"results": [{**RESULT, "model": "<b>"}]}),
        json.dumps({"results": [{**RESULT, "model": {}}]}),
        json.dumps({"results": [{**RESULT, "data": ["digits"]}]}),
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_an_unreadable_evaluation_is_named_and_no_error(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-8")
    write_report(tmp_path, metrics=[], step=1, num_steps=1)
    page = Page(tmp_path)
    assert "evaluation.json cannot be read" in page.text and not page.named("b")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (172_799, "48.0 h")]
    + [(172_800, "2.0 days"), (8_640_000, "100.0 days")],
)
def test_durations_are_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


# ---- what it needs -------------------------------------------------------------------------------------------------


def test_it_needs_nothing_but_its_folder(tmp_path):
    add_grid(tmp_path, 1, "raw", "ema")
    Image.new("L", (8, 8)).save(tmp_path / "curves.png")
    write_report(tmp_path, metrics=[line(1)], step=1, num_steps=2, tables={"x": [("a", "b"), ("c", "d")]})
    page, text = Page(tmp_path), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(links_lead_to_files(page, tmp_path)) == 3
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert "//" not in text and "url(" not in text and "@import" not in text
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} and "style" not in names
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert {"charset": "utf-8"} in page.named("meta") and page.named("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in text and str(tmp_path) not in text


def test_it_is_not_uploaded(tmp_path):
    """The card shows the same."""
    Image.new("L", (8, 8)).save(tmp_path / "curves.png")
    write_report(tmp_path, metrics=[], step=1, num_steps=1)
    assert set(files_to_upload(tmp_path)) == {"curves.png"}


def test_a_page_is_replaced_at_once(tmp_path, monkeypatch):
    """A disk that fills up while it is written leaves the one before."""
    write_report(tmp_path, metrics=[], step=1, num_steps=9)
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(tmp_path, metrics=[], step=2, num_steps=9, seconds_left=math.nan)
    assert Page(tmp_path).row("step") == ["1 of 9"]


# ---- hostile names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_in_a_run_becomes_markup(name, tmp_path):
    """The same elements as with harmless names, and the name as text wherever it may stand."""

    def write(folder: Path, name: str) -> Page:
        folder.mkdir()
        result = {**RESULT, "name": name, "data": {"name": name, "split": name}, "time_utc": name}
        result["model"] = {"weights": name, "weights_sha256": name, "num_inference_steps": name}
        (folder / "evaluation.json").write_text(json.dumps({"results": [result]}), encoding="utf-8")
        metrics: Any = [{"step": 1, "loss": name, "time_utc": name, "epoch": name, "grad_norm": name}]
        write_report(folder, metrics=metrics, step=1, num_steps=2, tables={name: [(name, name), (name, name)]})
        return Page(folder)

    def cells_with(page: Page, name: str) -> int:
        return sum(name in " ".join(cell.split()) for row in page.rows for cell in row)

    hostile, harmless = write(tmp_path / "hostile", name), write(tmp_path / "harmless", "a name")
    assert shape_of(hostile) == shape_of(harmless) and not hostile.comments
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert cells_with(hostile, shown) == cells_with(harmless, "a name") == 11


@pytest.mark.parametrize("name", ["<b>bold</b>", "a&amp;b", 'quote"s', "späße", "b\udcffd"])
def test_the_title_is_the_folders_name(name, tmp_path):
    folder = tmp_path / name.replace("/", "∕")
    folder.mkdir()
    write_report(folder, metrics=[], step=0, num_steps=1)
    page = Page(folder)
    assert page.text.startswith(" ".join(folder.name.replace("\udcff", " ").split())) and not page.named("b")


# ---- as training writes it -----------------------------------------------------------------------------------------

TINY = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 5 --beta_end 0.5 --warmup_steps 2 --ema_decay 0.5 --checkpoint_every 2 --log_every 1 "
    "--sample_every 2 --num_samples 4 --cpu_threads 1"
).split()


@pytest.mark.slow
def test_a_run_and_its_resumption_show_what_they_are(tmp_path):
    """Options that differ, data, network, environment; after more steps the page is about all of them."""
    folder = tmp_path / "secret place" / "my run"

    def train(num_steps: int) -> Page:
        AcceleratorState._reset_state(True)
        train_py.main([*TINY, "--output_dir", str(folder), "--num_steps", str(num_steps)])
        AcceleratorState._reset_state(True)
        return Page(folder)

    page = train(2)
    assert page.row("step") == ["2 of 2"] and len(links_lead_to_files(page, folder)) == 4
    assert page.row("option") == ["here", "default"]
    assert page.row("block_out_channels") == ["[8]", "[128, 256, 256, 256]"]
    assert page.row("dataset_name") == ["digits", "none"] and page.row("output_dir")[0] == "my run"
    options = yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))
    names = {row[0] for row in page.rows}
    assert "beta_schedule" in options and "beta_schedule" not in names  # as by default
    assert page.row("network") == ["DDPMPaperUNet, 10,593 parameters"] and {"torch", "precision"} <= names
    assert "secret place" not in (folder / "report.html").read_text(encoding="utf-8")

    page = train(4)
    assert page.row("step") == ["4 of 4"] and len(links_lead_to_files(page, folder)) == 6
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["time_utc"]
    assert page.row("trained")[0].startswith(f"{first[:10]} {first[11:16]} UTC to ")

    write_results(folder / "evaluation.json", [RESULT])
    assert train(4).row("bits/dim")[0] == "2.9312 ± 0.0123"  # the same command again
