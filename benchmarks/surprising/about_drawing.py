"""The sections on drawing."""

from collections.abc import Mapping
from typing import Any

from .words import Surprise, clear, pm, require, signed, table

FIRST, SECOND, ORACLE = "first", "second", "oracle"
Found = Mapping[str, Any]


def clipping(found: Found) -> Surprise:
    own = found["clipping"]
    first, second = own[FIRST], own[SECOND]
    for one in (first, second):
        clear(one["bound"], 1, "not clipping raises the bound")
        for steps in (10, 50):
            clear(one[f"free_less_clipped_{steps}"], -1, f"not clipping lowers the distance in {steps} steps")
    rows = []
    for steps in (10, 50):
        for what, name in (("Fréchet distance, clipped", "clipped"), ("unclipped less clipped", "free_less_clipped")):
            show = pm if name == "clipped" else signed
            rows.append((f"{steps} steps: {what}", *(show(one[f"{name}_{steps}"]) for one in (first, second))))
        spreads = [signed(one[f"spread_free_less_clipped_{steps}"], 3) for one in (first, second)]
        rows.append((f"{steps} steps: variance over that of real digits, clipped", *spread_row(first, second, steps)))
        rows.append((f"{steps} steps: the same, unclipped less clipped", *spreads))
        shares = [signed(one[f"sure_free_less_clipped_{steps}"], 3) for one in (first, second)]
        rows.append((f"{steps} steps: share a classifier is sure of, unclipped less clipped", *shares))
    return Surprise(
        "Not clipping x̂_0 is worse for the bound and better for the samples",
        "Clipping x̂_0 to [−1, 1] can only help, as no image lies outside",
        f"unclipped: {signed(first['bound'])} bits/dim, Fréchet distance {signed(first['free_less_clipped_50'], 1)} "
        "in 50 steps",
        (
            f"""Without clipping the bound is {pm(first["bound"])} bits/dim higher (second: {pm(second["bound"])}), the mean
            over images of a paired difference. The Fréchet distance falls, on the same seeds:""",
            table(("", "first", "second"), rows),
        ),
        """x_0 lies in [−1, 1], so clipping x̂_0 can only bring it nearer, and the bound is measured by that distance. But it
        also pulls inwards what the network expects, at every step: clipped samples vary too little, and unclipped ones
        reach black and white more often.""",
        """The first half is general, being geometry. The second holds for both trainings and in 10 and 50 steps, on
        digits, of whose pixels half lie at the end of the range; pictures in colour were not measured.""",
        """Try `DDPMPaperScheduler.from_config(pipe.scheduler.config, clip_sample=False)` when you draw in few steps, and
        look. The default clips, as the paper's code does, and the bound should.""",
        ("clipping",),
    )


def spread_row(first: Found, second: Found, steps: int) -> list[str]:
    for one in (first, second):
        require(one[f"spread_clipped_{steps}"]["value"] < 1, "clipped samples vary less than real digits")
        clear(one[f"spread_free_less_clipped_{steps}"], 1, "unclipped samples vary more than clipped ones")
    return [pm(one[f"spread_clipped_{steps}"], 3) for one in (first, second)]


def widths(found: Found) -> Surprise:
    own = found["widths"]
    rows = []
    for steps in ("10", "50"):
        for number in own[FIRST][steps]:
            values = [own[name][steps][number]["small_less_large"] for name in (FIRST, SECOND)]
            rows.append((steps, number, *map(signed, values)))
    for name in (FIRST, SECOND):
        clear(own[name]["10"]["20"]["small_less_large"], -1, "fixed_small is better in 10 steps, by 20 components")
    return Surprise(
        "Which σ_t² draws better depends on the steps and on what is measured",
        "One of the paper's two widths is the better one",
        f"fixed_small less fixed_large: {signed(own[FIRST]['10']['20']['small_less_large'], 1)} in 10 steps, "
        f"{signed(own[FIRST]['50']['20']['small_less_large'], 1)} in 50",
        (
            """The Fréchet distance with `fixed_small` less that with `fixed_large`, on the same seeds, by the number of
            principal components that are compared:""",
            table(("steps", "components", "first", "second"), rows),
        ),
        "",
        "",
        "",
        ("widths",),
    )


def errors(found: Found) -> Surprise:
    return Surprise("", "", "", ("",), "", "", "", ("contraction", "twins", "rounded_state"))


def encoding(found: Found) -> Surprise:
    own = found["encoding"]
    steps = list(own[FIRST])
    rows = [
        (name, kind, *(pm(own[name][n][kind]) if n in own[name] else "–" for n in steps))
        for name in (FIRST, SECOND, ORACLE)
        for kind in ("all", "flat", "others")
    ]
    for name in (FIRST, SECOND, ORACLE):
        require(own[name]["10"]["all"]["value"] < 0.8, "ten steps encode to much less than 1")
        require(own[name]["10"]["flat"]["value"] < 0.5 * own[name]["10"]["others"]["value"], "flat pixels encode to less")
    return Surprise(
        "DDIM encodes images to less than noise",
        "An image that DDIM encodes becomes standard Gaussian noise",
        f"x_T has {pm(own[FIRST]['10']['all'])} root mean square after 10 steps, {pm(own[FIRST]['50']['all'])} after 50",
        (
            f"""64 held-out digits, encoded by DDIM backwards: the root mean square of x at the highest t of the chain, of all
            pixels, of the {own["num_flat"]} that hardly ever change (flat) and of the others. Beside the networks stands an
            exact one, of ten Gaussians fitted to the classes of the digits ([oracle](oracle.md)):""",
            table(("network", "pixels", *(f"{n} steps" for n in steps)), rows),
        ),
        "",
        "",
        "",
        ("encoding",),
    )
