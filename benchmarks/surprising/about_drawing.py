"""The sections on drawing."""

from collections.abc import Mapping
from typing import Any

from .words import Surprise, clear, pm, require, signed, table

FIRST, SECOND, YOUNG, ORACLE = "first", "second", "young", "oracle"
Found = Mapping[str, Any]


def clipping(found: Found) -> Surprise:
    own = found["clipping"]
    first, second, young = own[FIRST], own[SECOND], own[YOUNG]
    for one in (first, second):
        clear(one["bound"], 1, "not clipping raises the bound")
    rows = []
    for steps in (10, 50, 250):
        networks = [one for one in (first, second, young) if f"clipped_{steps}" in one]
        for one in networks:
            require(one[f"spread_clipped_{steps}"]["value"] < 1, "clipped samples vary less than real digits")
            clear(one[f"spread_free_less_clipped_{steps}"], 1, "unclipped samples vary more than clipped ones")
            clear(one[f"free_less_clipped_{steps}"], -1, "not clipping lowers the distance")
        for label, name, digits in (
            ("Fréchet distance", "", 1),
            ("variance over that of real digits", "spread_", 3),
            ("share that a classifier is sure of", "sure_", 3),
        ):
            columns = [
                f"{pm(one[f'{name}clipped_{steps}'], digits)}; "
                f"{signed(one[f'{name}free_less_clipped_{steps}'], digits)}"
                for one in networks
            ]
            rows.append((str(steps), label, *columns, *["–"] * (3 - len(columns))))
    return Surprise(
        "Not clipping is worse for the bound and better for the samples",
        "Clipping x̂_0 to [−1, 1] can only help, as no image lies outside",
        f"unclipped: {signed(first['bound'])} bits/dim, Fréchet distance {signed(first['free_less_clipped_50'], 1)} "
        "in 50 steps",
        (
            f"""Without clipping the bound is {pm(first["bound"])} bits/dim higher (second:
            {pm(second["bound"])}). The table has samples in 10, 50 and 250 steps: their values with clipping and,
            after the semicolon, what not clipping adds on the same seeds. Young is a network after
            {own["young_steps"]} steps of training, without averaging:""",
            table(("steps", "", FIRST, SECOND, YOUNG), rows),
        ),
        """x_0 lies in [−1, 1], so clipping x̂_0 can only bring it nearer, and the bound is measured by that
        distance. But it also pulls inwards what the network expects, at every step: samples vary less than the
        data, and clipped ones even less.""",
        """The first half is general, being geometry. The second holds for three networks, one of them hardly
        trained, and from 10 to 250 steps; but for digits only, of whose pixels half lie at the end of the range.""",
        """Draw with `DDPMPaperScheduler.from_config(pipe.scheduler.config, clip_sample=False)` beside the
        default, in few steps above all, and look. The default clips, as the paper's code does, and for the bound
        it should.""",
        ("clipping",),
    )


def widths(found: Found) -> Surprise:
    own = found["widths"]
    first, second, both = own[FIRST], own[SECOND], own["both"]
    for number in (5, 10, 20, 40):
        clear(both["10"][str(number)], -1, "fixed_small is better in 10 steps, by any number of components")
    for number, sign in ((5, -1), (10, -1), (20, 1)):
        clear(both["50"][str(number)], sign, "in 50 steps the sign depends on the number of components")
    rows = [
        (
            steps,
            number,
            *(signed(one[steps][f"small_less_large_{number}"], 1) for one in (first, second)),
            signed(gap, 1),
        )
        for steps in ("10", "50")
        for number, gap in both[steps].items()
    ]
    spreads = [
        (steps, f"`{kind}`", *(signed(first[steps][kind][last]) for last in first[steps][kind]))
        for steps in ("10", "50")
        for kind in ("fixed_small", "fixed_large")
    ]
    for steps in ("10", "50"):
        small, large = (first[steps][kind] for kind in ("fixed_small", "fixed_large"))
        require(large["5"]["value"] < small["5"]["value"] < 0, "fixed_large takes more from the first components")
        require(large["40"]["value"] > 0 > small["40"]["value"], "fixed_large leaves noise in the last components")
    return Surprise(
        "Which width draws better depends on the steps, and on what is compared",
        "One of the paper's two widths is the better one",
        f"`fixed_small` less `fixed_large`, distance: {signed(both['10']['20'], 1)} in 10 steps, "
        f"{signed(both['50']['20'], 1)} in 50",
        (
            """The Fréchet distance with `fixed_small` less that with `fixed_large`, on the same seeds, by the
            number of principal components that are compared; “both” has the six ranges of both networks:""",
            table(("steps", "components", "first", "second", "both"), rows),
            """In 50 steps `fixed_small` is better by 5 or 10 components and `fixed_large` by 20, if by little.
            How much too widely the first network's samples spread in groups of components, on the scale 0 … 16:""",
            table(("steps", "width", "1 to 5", "6 to 10", "11 to 20", "21 to 40"), spreads),
        ),
        """The paper names the data for which each width is right: β_t for N(0, I), β̃_t for a single image, and
        digits are neither. The wide one leaves noise in the components where digits hardly vary and takes
        variance from those where they vary most; the narrow one takes a little from all, and a distance adds up
        what it looks at.""",
        """The signs agree for both trainings. That the widths part as steps grow longer is general: in 1000 steps
        β̃_t and β_t are nearly equal at all but the smallest t.""",
        """In 10 steps take `fixed_small`, or widths that are fitted to the network ([fewer
        steps](evaluation.md#fewer-steps)). Name the number of components or the extractor with every distance,
        and trust no order of two models that only one of them shows.""",
        ("widths",),
    )


def errors(found: Found) -> Surprise:
    own, twins, rounded = found["contraction"], found["twins"], found["rounded_state"]
    ways = {
        "ancestral_50": "this process, 50 steps",
        "ddim_50": "DDIM, 50 steps",
        "ancestral_1000": "this process, 1000",
    }
    for name in (FIRST, SECOND, ORACLE):
        ancestral, ddim = own[name]["ancestral_50"], own[name]["ddim_50"]
        require(ancestral["980"]["value"] < 0.1 * ancestral["20"]["value"], "an early error leaves least")
        middle = max(ancestral, key=lambda t: ancestral[t]["error"])
        require(middle in ("740", "500", "260"), "what an error leaves differs most between images in the middle")
        require(ddim["980"]["value"] > 10 * ancestral["980"]["value"], "DDIM keeps an early error")
    for which in ("same_10", "same_50", "same_ddim_50"):
        require(twins[which]["value"] > 0.9, "two networks draw nearly the same images from the same noise")
    require(abs(twins["different_50"]["value"]) < 0.2, "images of different seeds have little in common")
    for one in (rounded[FIRST], rounded[SECOND]):
        require(max(e["value"] for e in one.values()) < 0.1, "a state in bfloat16 moves samples by less than 0.1")
    longest = rounded[FIRST]["1000"]
    grown = longest["value"] / rounded[FIRST]["10"]["value"]
    require(grown < 30, "the error of rounding grows far more slowly than the number of steps")
    times = list(own[FIRST]["ancestral_50"])
    rows = [
        (ways[way], name, *(pm(gains[t], 3) for t in times))
        for way in ways
        for name in (FIRST, SECOND, ORACLE)
        if (gains := own[name].get(way))
    ]
    states = [(f"{steps} steps", *(pm(rounded[n][steps], 4) if steps in rounded[n] else "–" for n in (FIRST, SECOND)))
              for steps in rounded[FIRST]]  # fmt: skip
    return Surprise(
        "Sampling forgets its errors, and two networks draw the same images",
        "An error at the beginning of a chain of 1000 steps is the worst, since all later steps carry it on",
        f"an error of 1 at t = 980 leaves {pm(own[FIRST]['ancestral_1000']['980'], 3)} in x_0; in DDIM "
        f"{pm(own[FIRST]['ddim_50']['980'], 1)}",
        (
            """x_t of held-out digits is pushed by length 1 in a random direction (0.125 in each pixel, root mean
            square), and drawn to the end with the noise of the same seeds. The length of the difference in x_0,
            by the t of the push, and beside the networks that of an exact one, of ten Gaussians fitted to the
            digits' classes ([oracle](oracle.md)):""",
            table(("process", "network", *(f"t = {t}" for t in times)), rows),
            f"""Two networks from different initial weights and batches draw nearly the same images from the same
            noise: the correlation of their pixels, beyond the mean digit, is {pm(twins["same_50"], 3)} in 50
            steps of this process, {pm(twins["same_10"], 3)} in 10 and {pm(twins["same_ddim_50"], 3)} by DDIM in
            50, for different seeds {pm(twins["different_50"], 3)}. Young, below them, has made a tenth of the
            steps of training:""",
            "![Digits that three networks draw of the same twelve seeds](pictures/twins.png)",
            """Where x_t is rounded to bfloat16 after every step, x_0 is off by so much, root mean square on [−1,
            1]:""",
            table(("", FIRST, SECOND), states),
            f"""A hundred times as many steps make {grown:.0f} times the error, and the distance of two grey
            levels is 0.125.""",
        ),
        """A step keeps only a part of x_t and draws the rest anew, so that what is left of an early error is a
        product of factors below 1; DDIM draws nothing and keeps the error. The images agree because both networks
        are near the same function, the exact ε of the data, and the noise decides the rest.""",
        """It is general: the exact network does the same, and the factors follow from the schedule. What an error
        in the middle leaves depends on the image most, so that its ± is largest there.""",
        """Spend precision and steps on small t. A state in bfloat16 would do, though this package keeps float32.
        To compare two networks, draw from the same seeds: the difference is theirs and not the noise's.""",
        ("contraction", "twins", "rounded_state"),
    )


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
        require(own[name]["10"]["flat"]["value"] < 0.5 * own[name]["10"]["others"]["value"], "flat pixels give least")
    return Surprise(
        "DDIM encodes images to less than noise",
        "An image that DDIM encodes becomes standard Gaussian noise",
        f"root mean square {pm(own[FIRST]['10']['all'])} in 10 steps, {pm(own[FIRST]['50']['all'])} in 50",
        (
            f"""64 held-out digits, encoded by DDIM backwards: the root mean square of x at the highest t of the
            chain, of all pixels, of the {own["num_flat"]} that hardly ever change (flat) and of the others.
            Beside the networks stands an exact one, of ten Gaussians fitted to the classes of the digits
            ([oracle](oracle.md)):""",
            table(("network", "pixels", *(f"{n} steps" for n in steps)), rows),
        ),
        """Encoding takes the middle of the data to the middle of the noise, and a pixel that never changes lies
        in the middle of the narrow distribution that the network has for it, so it becomes nearly 0. A coarse
        chain adds to that: its first step leaves t = 0 by the network's answer about an image without noise, and
        stretches too little.""",
        """It is general: the exact network does the same to flat pixels, and its other pixels come near 1 only as
        the number of steps grows. How far below 1 the whole image stays depends on how many of its pixels are
        flat.""",
        """Do not expect an encoded image to look like noise to a test, and do not scale it to 1, which would make
        it another x_T. `ddpm-hf draw interpolate` does not encode by DDIM; it adds noise, as the paper does.""",
        ("encoding",),
    )
