"""docs/surprises.md, of measurements: every number of it is inserted, and every sentence on a direction is checked."""

from collections.abc import Callable, Mapping
from typing import Any

from . import about_bound, about_drawing, about_training
from .words import Contradiction as Contradiction, Surprise, filled

SURPRISES: tuple[Callable[[Mapping[str, Any]], Surprise], ...] = (
    about_bound.chains,
    about_bound.rounding,
    about_drawing.clipping,
    about_drawing.widths,
    about_drawing.errors,
    about_training.chaos,
    about_drawing.encoding,
    about_training.memorising,
    about_training.dealing_out,
    about_training.small_limits,
    about_bound.loss_by_t,
    about_training.averaging,
    about_bound.half_precision,
)

HEAD = """# What good guesses get wrong

Thirteen things about DDPM that we would have guessed otherwise, each measured, with its error, the reason, and
whether it holds beyond this model. Two networks were asked: *first*, the digits' checkpoint of this repository, and
*second*, trained by the same recipe from the seed 1, which has other initial weights and other batches. “General”
means that the reason does not depend on either; a second training that agrees says only that one seed did not decide.

```bash
python benchmarks/surprises.py                  # measures what is not measured yet, and writes this page
python benchmarks/surprises.py --page           # writes it from what was measured
```

All of it takes about {cpu:.0f} minutes of one core (it took {wall:.0f}, on cores that others used too). Each
section names its measurement, which `--only` repeats; they were made so, in parts, and surprises.json has the
time and commit of each, with a + where the files were not yet those of the commit.
± is a standard error: of a mean over images, over six
ranges of 256 seeds, or over three trainings, as the section says. Differences are paired, on the same images or
seeds. Bounds are those of {images} held-out digits for first and of {images_second} for second, in bits/dim,
with 17 levels where nothing else is said. The Fréchet distance is that of 20 principal components of 256
samples to all real digits; few samples make it too large, so it compares with those of this page alone.
The numbers are in [surprises.json](../benchmarks/results/surprises.json), the texts in `benchmarks/surprising`; each
sentence that claims a direction is checked against the numbers whenever this page is written.

| | a good guess | measured |
|---|---|---|
{rows}
"""


def text_of(measured: Mapping[str, Any]) -> str:
    """The page. Raises Contradiction where a number contradicts a sentence."""
    found = {name: own["found"] for name, own in measured.items()}
    surprises = [make(found) for make in SURPRISES]
    rows = "\n".join(f"| {i} | {own.guess} | {own.short} |" for i, own in enumerate(surprises, 1))
    cpu, wall = (sum(own[key] for own in measured.values()) / 60 for key in ("cpu_s", "wall_s"))
    images = found["chains"]["num_images"]
    head = HEAD.format(cpu=cpu, wall=wall, rows=rows, images=images["first"], images_second=images["second"])
    head = "\n\n".join(map(filled, head.strip().split("\n\n"))) + "\n"
    return head + "".join(f"\n{own.section(i)}" for i, own in enumerate(surprises, 1))
