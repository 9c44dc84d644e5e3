"""The demo page, in Gradio: what visitors see, type and drop; `demo_tasks` computes. Needs the extra `demo`."""

import base64
import html
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure  # the object interface: no window system, no global state
from PIL import Image
from torch import Tensor

from .. import figures
from ..data import to_model_range
from .models import Model
from .tasks import (
    BACKGROUNDS,
    MAX_FILE_BYTES,
    NUM_FRAMES,
    WEIGHTS,
    Bound,
    Frame,
    Report,
    bound,
    chosen_class,
    enlarged,
    fitted,
    interpolate,
    is_animated,
    noise_and_back,
    number,
    sample,
    seeds_in,
    whole,
)

MAX_SEEDS = {"samples": 64, "reconstructions": 16}  # a page is for several people
MAX_GUIDANCE = 8
MAX_WAITING = 20  # visitors in the queue; the next are turned away
KEEP_FILES_S = 3600  # what visitors dropped, and pictures they were shown
MAX_PICTURE_SIDE = 512
ONE_IN = {"all": 1, "1 in 4": 4, "1 in 10": 10, "1 in 40": 40}  # terms of the bound that are computed
PAPER = "https://arxiv.org/abs/2006.11239"

# ---- results as HTML, which wraps on narrow screens ----------------------------------------------------------------


def picture_html(picture: Image.Image, caption: str) -> str:
    """A figure that holds its own picture: nothing is asked of the server again."""
    if picture.width > MAX_PICTURE_SIDE or picture.height > MAX_PICTURE_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    kind = "webp" if picture.width > 320 else "png"  # noise takes much room without loss
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=80)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    text = html.escape(caption)
    return f'<figure><img class="{kind}" src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def row_html(*figures_html: str, title: str = "", kind: str = "") -> str:
    """Figures side by side, as many as there is room for; of the kind `nine`, nine in a row or three."""
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f'{heading}<div class="pictures {kind}">{"".join(figures_html)}</div>'


def opening_html(model: Model) -> str:
    """What a checkpoint is, and samples that its training drew."""
    about = f"<p>{html.escape(model.about)}</p>" if model.about else ""
    return about + (row_html(picture_html(*model.finished)) if model.finished else "")


def frames_html(frames: Sequence[Frame], shown: int) -> str:
    """All frames, of which SHOW_FRAME shows the one that the slider counts, from 1; at first that of `shown`."""
    parts = []
    for i, frame in enumerate(frames, start=1):
        hidden = "" if i == shown else " hidden"
        pair = (
            picture_html(frame.x_t, f"x_t at t = {frame.t}"),
            picture_html(frame.x_start, f"x̂_0 as seen from t = {frame.t}"),
        )
        parts.append(f'<div data-t="{frame.t}"{hidden}>{row_html(*pair)}</div>')
    return f'<div id="frames" aria-live="polite">{"".join(parts)}</div>'


def bound_html(model: Model, levels: Tensor, result: Bound, one_in: str) -> str:
    """What the network was given, the parts of the bound, and its terms over t."""
    seen = figures.unit_range(to_model_range(levels, model.num_levels))
    rows = (
        ("total", result.total),
        ("L_T, the prior", result.prior),
        (f"L_1 to L_{len(result.terms) - 1}, the reverse steps", result.kl),
        ("L_0, the decoder", result.decoder),
    )
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{value:.2f}</td></tr>' for name, value in rows)
    table = f'<table><thead><tr><th scope="col">part</th><th scope="col">bits/dim</th></tr></thead>{cells}</table>'
    sure = "every term" if one_in == "all" else f"{one_in} of the terms"
    note = f"An estimate: from {sure}, with one draw of x_t for each, on {model.num_levels} levels per pixel."
    pictures_row = row_html(
        picture_html(enlarged(seen[None])[0], "x_0, as the network is given it"),
        picture_html(bound_plot(result), "Bits/dim of each term over t, both axes logarithmic"),
    )
    return f"<p>{note}</p>{table}{pictures_row}"


def bound_plot(result: Bound) -> Image.Image:
    """The terms L_{t−1} over t on logarithmic axes; those that were not drawn are left out."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    t = np.arange(1, len(result.terms) + 1)
    axes.plot(t, np.where(result.terms > 0, result.terms, np.nan), ".", markersize=3)
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel="bits/dim of $L_{t-1}$")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


# ---- the page ------------------------------------------------------------------------------------------------------

CSS = """
.pictures { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.pictures figure { margin: 0; max-width: 100%; text-align: center; }
.pictures img { max-width: 100%; height: auto; margin: 0 auto; }
.pictures img.png, #opening img, #samples img, .dropped img[data-look=small] { image-rendering: pixelated; }
.pictures.nine { display: grid; grid-template-columns: repeat(9, minmax(0, max-content)); }
.pictures.nine img { image-rendering: auto; }
#samples img { max-height: 480px; padding: 36px 0 8px; }
.dropped img[data-look=small] { width: 100%; height: 100%; object-fit: contain; }
.dropped img[data-look=broken] { display: none; }
.dropped :has(> img[data-look=broken]) { display: flex; align-items: center; height: 100%; }
.dropped :has(> img[data-look=broken])::after { content: "The browser cannot show this file."; }
.pictures figcaption { font-size: 0.875rem; }
@media (max-width: 1000px) { .pictures.nine { grid-template-columns: repeat(3, minmax(0, max-content)); } }
@media (max-width: 480px) { [role=tablist] button, .tab-container button { padding: 0 6px; } }
"""
SHOW_FRAME = """(shown) => {
  const frames = [...document.querySelectorAll("#frames [data-t]")];
  frames.forEach((frame, i) => { frame.hidden = i + 1 !== shown; });
  return [];
}"""
LOOK_AT_IMAGES = """() => {
  const look = (event) => {
    const image = event.target;
    if (image.tagName !== "IMG") return;
    const small = Math.max(image.naturalWidth, image.naturalHeight) <= 96;
    image.dataset.look = event.type === "error" ? "broken" : small ? "small" : "large";
  };
  for (const type of ["load", "error"]) document.addEventListener(type, look, true);
}"""


class _Stopped(Exception):
    """The visitor stopped the work, or left."""


class Page:
    """The page's parts that all tabs share."""

    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        parse_seeds: Callable[[str], list[int]],
        schedulers: Mapping[str, tuple[str | None, Mapping[str, Any]]],
        max_seconds: float,
    ):
        self.models, self.parse_seeds, self.max_seconds = models, parse_seeds, max_seconds
        self.schedulers = schedulers  # a class of diffusers or None, and options of a call, by the name in the menu
        self.running: dict[str | None, threading.Event] = {}  # by session: set to stop its work
        self.alone = threading.Lock()  # gradio starts the next work while a stopped one is still at its last step
        self._steps: list[Any] = []
        self._times: list[tuple[Any, bool, float]] = []
        self._classes: list[Any] = []

    def build(self) -> Any:
        """The page, a gradio.Blocks."""
        first = next(iter(self.models))
        with gr.Blocks(title="DDPM demo", analytics_enabled=False, delete_cache=(KEEP_FILES_S, KEEP_FILES_S)) as page:
            gr.Markdown(
                "# Denoising diffusion, step by step\n\n"
                f"What the models of a DDPM ([Ho, Jain, Abbeel 2020]({PAPER})) do to noise and to images. "
                "t counts diffusion steps: t = 0 is an image, t = T noise."
            )
            self.checkpoint = gr.Dropdown(list(self.models), value=first, label="Checkpoint", filterable=False)
            opening = gr.HTML(opening_html(self.models[first]), elem_id="opening", js_on_load=None)
            for title, tab in (
                ("Sample", self._sample_tab),
                ("Interpolate", self._interpolate_tab),
                ("Noise", self._noise_tab),
                ("Bits", self._bits_tab),
            ):
                with gr.Tab(title):
                    tab()
            sliders = [*self._steps, *(slider for slider, *_ in self._times), *self._classes]
            self.checkpoint.change(
                lambda name: opening_html(self.models[name]), self.checkpoint, opening, queue=False,
                api_visibility="private",
            )  # fmt: skip
            self.checkpoint.change(self._limits, self.checkpoint, sliders, queue=False, api_visibility="private")
            page.unload(self._stop_function())
        page.queue(max_size=MAX_WAITING, api_open=False)
        return page

    # ---- parts of tabs ---------------------------------------------------------------------------------------------

    def _step_slider(self) -> Any:
        slider = gr.Slider(step=1, label="Steps", info="reverse steps", **self._steps_of(self._first()))
        self._steps.append(slider)
        return slider

    def _time_slider(self, info: str, *, from_zero: bool, share: float) -> Any:
        """A slider over t, from 0 or from one step of the slider, at first at this share of T."""
        slider = gr.Slider(label="t", info=info, **self._times_of(self._first(), from_zero, share))
        self._times.append((slider, from_zero, share))
        return slider

    def _first(self) -> Model:
        return next(iter(self.models.values()))

    @staticmethod
    def _steps_of(model: Model) -> dict[str, Any]:
        return {"minimum": 1, "maximum": model.num_timesteps, "value": model.default_steps}

    @staticmethod
    def _times_of(model: Model, from_zero: bool, share: float) -> dict[str, Any]:
        total = model.num_timesteps
        step = max(1, total // 50)
        value = max(1, round(share * total / step)) * step
        return {"minimum": 0 if from_zero else step, "maximum": total, "value": value, "step": step}

    def _limits(self, name: str) -> list[Any]:
        """The sliders for another checkpoint."""
        model = self.models[name]
        steps = [gr.update(**self._steps_of(model)) for _ in self._steps]
        times = [gr.update(**self._times_of(model, zero, share)) for _, zero, share in self._times]
        return [*steps, *times, gr.update(**self._classes_of(model)), gr.update(visible=bool(model.classes))]

    @staticmethod
    def _classes_of(model: Model) -> dict[str, Any]:
        names = list(model.classes)
        return {"choices": names, "value": names[0] if names else None, "visible": bool(names)}

    def _class_fields(self) -> tuple[Any, Any]:
        """Which class is drawn, and how strongly it is guided towards; there only where the model has classes."""
        label = gr.Dropdown(label="Class", info="what to draw", filterable=False, **self._classes_of(self._first()))
        guidance = gr.Slider(
            0, MAX_GUIDANCE, 1, step=0.5, label="Guidance", info="1 is the class alone; more is more typical",
            visible=bool(self._first().classes),
        )  # fmt: skip
        self._classes += [label, guidance]
        return label, guidance

    def _image_field(self) -> tuple[Any, Any]:
        """Where an image is dropped, and what is put behind a transparent one."""
        image: Any = gr.Image(label="Image", sources=["upload", "clipboard"], height=240, elem_classes="dropped")
        # the file as it came: only `decode_image` opens what visitors send (a subclass would make gradio write a .pyi)
        image.preprocess = lambda payload: payload and payload.path
        background = gr.Radio(list(BACKGROUNDS), value="white", label="Behind transparent images")
        return image, background

    def _fitted(self, model: Model, path: str | None, background: str) -> Tensor:
        levels = fitted(model, path, background)
        if path and is_animated(path):
            gr.Info("Of the animation, the first frame is taken.")
        return levels

    def _start(self, label: str) -> tuple[Any, Any]:
        """A button for the work of a tab, and one that stops it."""
        with gr.Row():
            return gr.Button(label, variant="primary"), gr.Button("Stop")

    def _runs(self, buttons: tuple[Any, Any], work: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """The first button, or Enter in a text field, calls work(report, model, *inputs); the second stops it."""
        start, stop = buttons
        triggers = [start.click, *(field.submit for field in inputs if isinstance(field, gr.Textbox))]

        def answer(request: gr.Request, progress=gr.Progress(), *values: Any) -> Any:  # noqa: B008
            return self._answer(work, values, request.session_hash, progress)

        event = gr.on(
            triggers,
            answer,
            [self.checkpoint, *inputs],
            outputs,
            show_progress_on=outputs[:1],
            concurrency_limit=1,
            concurrency_id="model",
            api_visibility="private",
        )
        stop.click(self._stop_function(), cancels=[event], queue=False, api_visibility="private")

    def _answer(self, work: Callable[..., Any], values: tuple, session: str | None, progress: Any) -> Any:
        """What `work` returns; what a visitor asked wrongly becomes a message."""
        name, *inputs = values
        with self.alone:
            stop = self.running[session] = threading.Event()
            deadline = time.monotonic() + self.max_seconds

            def report(done: float) -> None:
                if stop.is_set():
                    raise _Stopped
                if time.monotonic() > deadline:
                    raise ValueError(f"Stopped after {self.max_seconds:g} seconds: ask for fewer seeds or steps")
                progress(done)

            try:
                return work(report, self.models[name], *inputs)
            except _Stopped:
                raise gr.Error("Stopped", visible=False, print_exception=False) from None
            except ValueError as error:
                raise self._message(str(error)) from None
            except (MemoryError, torch.OutOfMemoryError):
                raise self._message("There is not enough memory here for so much: ask for fewer seeds") from None
            finally:
                del self.running[session]

    def _message(self, text: str) -> Exception:
        return gr.Error(html.escape(text), duration=None, print_exception=False)

    def _stop_function(self) -> Callable[..., None]:
        def stop(request: gr.Request) -> None:
            if found := self.running.get(request.session_hash):
                found.set()

        return stop

    # ---- tabs ------------------------------------------------------------------------------------------------------

    def _sample_tab(self) -> None:
        gr.Markdown(
            f"From noise to images by Algorithm 2 ([Sections 2 and 3]({PAPER})), or by another sampler of the same "
            "process: one image per seed."
        )
        with gr.Row():
            seeds = gr.Textbox("0-15", label="Seeds", info=f"such as 0-15,20; at most {MAX_SEEDS['samples']}")
            steps = self._step_slider()
            scheduler = gr.Dropdown(
                list(self.schedulers), value="ddpm", label="Scheduler", info="ddpm: the paper's", filterable=False
            )
        with gr.Row():
            label, guidance = self._class_fields()
        start = self._start("Draw samples")
        with gr.Row():
            grid = gr.Image(
                label="Samples", alt_text="One sample per seed, in the order of the seeds", elem_id="samples",
                type="pil", format="png", interactive=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Column():
                moment = gr.Slider(
                    1, NUM_FRAMES + 1, NUM_FRAMES // 2 + 1, step=1, label="Moment",
                    info="from the noise, left, to the samples, right",
                )  # fmt: skip
                frames = gr.HTML("<p>Draw samples, then choose a moment.</p>", js_on_load=None)
        moment.change(None, moment, None, js=SHOW_FRAME, queue=False, api_visibility="private")

        def work(
            report: Report, model: Model, text: str, steps: Any, scheduler: str, label: Any, scale: Any, moment: Any
        ) -> tuple:
            shown = whole("Moment", moment, 1, NUM_FRAMES + 1)
            scheduler_class, options = self.schedulers[scheduler]
            drawn = sample(
                model,
                seeds=seeds_in(text, self.parse_seeds, MAX_SEEDS["samples"]),
                steps=whole("Steps", steps, 1, model.num_timesteps),
                scheduler=scheduler_class,
                scheduler_options=options,
                label=chosen_class(model, label),
                guidance=number("Guidance", scale, 0, MAX_GUIDANCE),
                report=report,
            )
            last = len(drawn.frames)
            shown = min(shown, last)
            return drawn.grid, frames_html(drawn.frames, shown), gr.update(maximum=last, value=shown)

        self._runs(start, work, [seeds, steps, scheduler, label, guidance, moment], [grid, frames, moment])

    def _interpolate_tab(self) -> None:
        gr.Markdown(
            f"The samples of two seeds are diffused to t, blended with nine weights and denoised ([Fig. 8]({PAPER})): "
            "the larger t, the less is left of both."
        )
        with gr.Row():
            ends = gr.Textbox("0,1", label="Two seeds", info="the samples to go between")
            noise_seed = gr.Textbox("2", label="Seed of the noise", info="one for all nine weights")
            steps = self._step_slider()
            t = self._time_slider("0 blends the pixels", from_zero=True, share=0.25)
        start = self._start("Interpolate")
        result = gr.HTML(label="Interpolation", js_on_load=None)

        def work(report: Report, model: Model, ends: str, noise_seed: str, steps: Any, t: Any) -> str:
            pair = seeds_in(ends, self.parse_seeds, 2)
            if len(pair) != 2:
                raise ValueError("Two seeds: give two, such as 0,1")
            (noise,) = seeds_in(noise_seed, self.parse_seeds, 1)
            if noise in pair:
                raise ValueError(f"Seed of the noise: give another than {noise}, whose noise made a sample already")
            t_taken, sources, between = interpolate(
                model,
                ends=(pair[0], pair[1]),
                t=whole("t", t, 0, model.num_timesteps),
                steps=whole("Steps", steps, 1, model.num_timesteps),
                noise_seed=noise,
                report=report,
            )
            samples = [picture_html(image, f"seed {seed}") for seed, image in zip(pair, sources, strict=True)]
            blends = [picture_html(image, f"λ = {w:g}") for w, image in zip(WEIGHTS, between, strict=True)]
            return row_html(*samples, title="The two samples") + row_html(
                *blends, title=f"Between them, t = {t_taken}", kind="nine"
            )

        self._runs(start, work, [ends, noise_seed, steps, t], [result])

    def _noise_tab(self) -> None:
        gr.Markdown(
            f"An image is diffused to t in one step ([Eq. 4]({PAPER})) and denoised from there, once per seed: what "
            "comes back keeps what x_t still tells of it."
        )
        with gr.Row():
            with gr.Column():
                image, background = self._image_field()
            with gr.Column():
                seeds = gr.Textbox(
                    "0-3", label="Seeds", info=f"one result each; at most {MAX_SEEDS['reconstructions']}"
                )
                steps = self._step_slider()
                t = self._time_slider("how far the image is diffused", from_zero=False, share=0.25)
        start = self._start("Diffuse and denoise")
        result = gr.HTML(label="Noise and back", js_on_load=None)

        def work(report: Report, model: Model, path: Any, background: str, text: str, steps: Any, t: Any) -> str:
            levels = self._fitted(model, path, background)
            chosen = seeds_in(text, self.parse_seeds, MAX_SEEDS["reconstructions"])
            made = noise_and_back(
                model,
                levels,
                t=whole("t", t, 1, model.num_timesteps),
                steps=whole("Steps", steps, 1, model.num_timesteps),
                seeds=chosen,
                report=report,
            )
            captions = [f"seed {seed}" for seed in chosen]
            noisy, back = (map(picture_html, images, captions) for images in (made.x_t, made.denoised))
            return (
                row_html(picture_html(made.original, "as the network is given it"), title="x_0")
                + row_html(*noisy, title=f"x_t, t = {made.t}")
                + row_html(*back, title="Denoised from there")
            )

        self._runs(start, work, [image, background, seeds, steps, t], [result])

    def _bits_tab(self) -> None:
        gr.Markdown(
            f"How many bits per dimension the model needs for an image, term by term ([Eq. 5]({PAPER})): the "
            "variational bound on −log₂ p(x_0), per pixel and channel."
        )
        with gr.Row():
            with gr.Column():
                image, background = self._image_field()
            with gr.Column():
                one_in = gr.Radio(list(ONE_IN), value="1 in 10", label="Terms to compute", info="fewer are quicker")
                seed = gr.Textbox("0", label="Seed of the noise", info="another one gives another estimate")
        start = self._start("Measure")
        result = gr.HTML(label="Bits per dimension", js_on_load=None)

        def work(report: Report, model: Model, path: Any, background: str, one_in: str, seed: str) -> str:
            levels = self._fitted(model, path, background)
            (chosen,) = seeds_in(seed, self.parse_seeds, 1)
            measured = bound(model, levels, one_in=ONE_IN[one_in], seed=chosen, report=report)
            return bound_html(model, levels, measured, one_in)

        self._runs(start, work, [image, background, one_in, seed], [result])


def theme() -> gr.themes.Base:
    """Gradio's, with fonts of the visitor's system, none from elsewhere, and small print dark enough to read."""
    own = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    small_print = {"block_info_text_color": "*neutral_600", "body_text_color_subdued": "*neutral_600"}
    on_dark = {f"{name}_dark": "*neutral_300" for name in small_print}
    return own.set(**small_print, **on_dark)


def launch(page: Any, *, host: str, port: int) -> str:
    """Serve the page, without waiting for its end; its address. Raises OSError where the port is taken."""
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=MAX_FILE_BYTES,
            css=CSS,
            js=LOOK_AT_IMAGES,
            theme=theme(),
        )
    except OSError:
        raise OSError(f"port {port} of {host} is taken or not to be had here; give another --port") from None
    return url
