"""The sections on the bound and on the loss."""

from collections.abc import Mapping
from typing import Any

from .words import Surprise, clear, of, percent, pm, require, signed, table

FIRST, SECOND = "first", "second"
Found = Mapping[str, Any]


def least(bounds: Mapping[str, Mapping[str, float]]) -> str:
    """The number of steps of the least bound."""
    return min(bounds, key=lambda steps: bounds[steps]["value"])


def chains(found: Found) -> Surprise:
    own = found["chains"]
    width = own["width_fixed_large"]
    share = {name: width / of(own, name, "fixed_large", "value") for name in (FIRST, SECOND)}
    for name in (FIRST, SECOND):
        short, whole = of(own, name, "chosen_17"), of(own, name, "fixed_large")
        require(short["4"]["value"] < whole["value"], "four chosen steps have a lower bound than all 1000")
        require(least(short) in ("250", "500"), "the least bound is that of 250 or 500 steps")
        require(short["1000"]["value"] > short["500"]["value"] + 0.5, "1000 fitted steps are far worse than 500")
        wide = of(own, name, "chosen_256")
        require(least(wide) == "1000", "at 256 levels all steps have the least bound")
        require(wide["2"]["value"] < wide["4"]["value"], "at 256 levels 2 steps have less than 4")
    steps = list(of(own, FIRST, "chosen_17"))
    loss_of_100 = of(own, FIRST, "chosen_256", 100, "value") - of(own, FIRST, "chosen_256", 1000, "value")
    rows = [
        (n, *(pm(of(own, name, f"chosen_{levels}", n)) for levels in (17, 256) for name in (FIRST, SECOND)))
        for n in steps
    ]
    fixed = ("1000, fixed_large", *(pm(of(own, name, "fixed_large")) for name in (FIRST, SECOND)), "–", "–")
    first = own[FIRST]
    return Surprise(
        "Four steps have a lower bound than a thousand",
        "More reverse steps give a lower bound",
        f"4 chosen steps: {pm(of(first, 'chosen_17', 4))} bits/dim; all 1000: {pm(first['fixed_large'])}",
        (
            """The bound by the number of steps, which are chosen by dynamic programming with widths σ_t² fitted
            to the network (`ddpm-hf shorten`), with the digits' 17 levels and with bins as narrow as those of
            256:""",
            table(("steps", "first, 17", "second, 17", "first, 256", "second, 256"), [*rows, fixed]),
            f"""The last ten steps, from t = 10 to 0, cost {pm(first["last_steps_cost"], 3)} bits/dim and save
            {pm(first["last_steps_save"], 3)} of L_0 (second: {pm(of(own, SECOND, "last_steps_cost"), 3)} and
            {pm(of(own, SECOND, "last_steps_save"), 3)}). The width of `fixed_large` alone, β_t in place of β̃_t,
            costs {width:.3f} bits/dim, exactly, from the schedule: {percent(share[FIRST])} of the first network's
            bound and {percent(share[SECOND])} of the second's.""",
        ),
        """The last steps tell x_0 apart from values that lie closer together than two grey levels do, and the
        bound has to pay for that knowledge while the decoder has no use for it. The width is paid for because
        even with a perfect mean each step costs KL(N(0, β̃_t) ‖ N(0, β_t)), which is largest at the smallest t.""",
        """The cost of the width is general: it holds for every network on this schedule. That few steps win is a
        matter of the levels: with bins of 256 levels all 1000 steps are best, if by little. (There 2 steps have
        less than 4, because the choice estimates L_0 as if all pixels had middle levels, and half of the digits'
        are black.)""",
        f"""For data with few levels choose 100 to 250 steps by `ddpm-hf shorten` ([fewer
        steps](evaluation.md#fewer-steps)). With bins of 256 levels 100 chosen steps cost {loss_of_100:.3f}
        bits/dim more than all, for a tenth of the time. The paper's bound, over all steps and with its own
        widths, stays the default of `ddpm-hf evaluate`.""",
        ("chains",),
    )


def rounding(found: Found) -> Surprise:
    own = found["rounding"]
    first, second = own[FIRST], own[SECOND]
    for one in (first, second):
        clear(one["saved"], 1, "rounding lowers the bound")
        share = one["saved"]["value"] / one["plain"]["value"]
        require(0.15 < share < 0.25, "rounding lowers the bound by a fifth")
        require(one["saved_everywhere"]["value"] < one["saved"]["value"], "rounding at every t saves less")
    require(abs(own["of_rmse"] - own["paper_distortion"]) < 0.01, "the paper's distortion follows from its RMSE")
    require(own["of_rmse"] - own["of_rmse_best"] < 0.01, "no other width would give less")
    return Surprise(
        "Rounding lowers the bound by a fifth",
        "The network knows by itself that there are only 17 grey levels",
        f"rounding x̂_0 for t ≤ {first['limit']}: {pm(first['rounded'])} in place of {pm(first['plain'])} bits/dim",
        (
            f"""x̂_0 is rounded to the nearest level for t ≤ {first["limit"]}, a limit that was chosen on training
            images. The bound falls from {pm(first["plain"])} to {pm(first["rounded"])}, by {pm(first["saved"])}
            on the same noise; of the second network (t ≤ {second["limit"]}) from {pm(second["plain"])} to
            {pm(second["rounded"])}, by {pm(second["saved"])}. Rounding at every t saves
            {pm(first["saved_everywhere"])} only.""",
            f"""At 256 levels L_0 is not negligible: where x̂_0 is exactly right, at a level between the ends, the
            decoder still charges {own["floor_256"]:.3f} bits/dim, since its σ of {own["sigma"]:.2f} levels is
            about as wide as a bin. That does not make the paper's distortion of {own["paper_distortion"]}
            bits/dim a matter of its σ. Errors of the published RMSE of {own["paper_rmse"]} levels, if they are
            Gaussian, cost {own["of_rmse"]:.3f} bits/dim with this σ, and {own["of_rmse_best"]:.3f} with the best
            one.""",
        ),
        f"""At t ≤ {first["limit"]} the noise is narrower than half the distance between two levels, so that the
        right level mostly shows, but a network trained by L_simple is hardly asked about these t and answers with
        values between the levels. A small error of x̂_0 is expensive there, as the KL term divides its square by
        σ_t².""",
        """It follows from the levels, so other data with few of them should show it, but only digits were tried;
        both trainings agree. For 256 levels it says nothing, since the noise of the last step alone is wider than
        their distance.""",
        f"""For data with few levels `likelihood.bits_per_dim(…, round_below={first["limit"] + 1})` does it: a
        limit that training images choose. It is off by default, as the paper clips and does not round.""",
        ("rounding",),
    )


def loss_by_t(found: Found) -> Surprise:
    own = found["loss_by_t"]
    first, second = own[FIRST], own[SECOND]
    for one in (first, second):
        single, batch = (one[f"gradient_ratio_{size}"]["value"] for size in (1, 128))
        require(one["explained_by_t"]["value"] > 0.7, "most of the loss's variance is t's")
        require(0.5 < single / one["loss_ratio"] ** 0.5 < 2, "gradients of single images go with the root of the loss")
        require(batch < 0.7 * single, "gradients of batches differ less than those of single images")
    return Surprise(
        "Most of the loss's noise is t, and the gradient knows little of the loss's size",
        "The training loss is noisy because of the images and of ε, and large losses at small t drown the rest",
        f"{pm(first['explained_by_t'], 1, 100)} % of the variance is t's; losses at t < 10 are "
        f"{first['loss_ratio']:.0f} times those at t ≥ 900, gradients {pm(first['gradient_ratio_128'], 1)} times",
        (
            f"""Of the variance of L_simple over held-out images, t and ε, {pm(first["explained_by_t"], 1, 100)} %
            is that of its mean at t (second: {pm(second["explained_by_t"], 1, 100)} %).
            {pm(first["share_below_50"], 1, 100)} % of the loss comes from the 5 % of t below 50 (second:
            {pm(second["share_below_50"], 1, 100)} %).""",
            f"""The losses at t < 10 are {first["loss_ratio"]:.0f} times those at t ≥ 900. The gradients of single
            images there are {pm(first["gradient_ratio_1"], 1)} times as long, root mean square, and those of
            batches of 128 are {pm(first["gradient_ratio_128"], 1)} times as long (second:
            {second["loss_ratio"]:.0f}, {pm(second["gradient_ratio_1"], 1)} and
            {pm(second["gradient_ratio_128"], 1)}).""",
        ),
        f"""The loss is a square and the gradient is proportional to its root, and the root of
        {first["loss_ratio"]:.0f} is {first["loss_ratio"] ** 0.5:.0f}. At small t the gradients of different
        images point in different directions and cancel in a batch, at large t they agree.""",
        """The curve of the loss over t is general, with its height at small t, where ε can hardly be seen; how
        steep it is depends on the data. That single gradients go with the root is general; how well they agree is
        of this model.""",
        """Judge a run by its mean over many steps, or on the same t and ε each time, as `--held_out_every` and
        `--eval_every` do ([held-out data](training.md#held-out-data)). There is no need to weight t for the sake
        of the gradient's size.""",
        ("loss_by_t",),
    )


def half_precision(found: Found) -> Surprise:
    own = found["half_precision"]
    first, second = own[FIRST], own[SECOND]
    for one in (first, second):
        for way in ("autocast", "weights"):
            require(abs(one[way]["value"]) < 0.02, "bfloat16 costs less than 0.02 bits/dim")
    return Surprise(
        "bfloat16 costs next to nothing, also in the bound",
        "Three digits are too few for a bound that is summed over 1000 terms",
        f"autocast {signed(first['autocast'], 4)}, weights {signed(first['weights'], 4)} bits/dim",
        (
            f"""The network in bfloat16 less the same in float32, on the same x_t: under autocast
            {signed(first["autocast"], 4)}, with its weights and activations in bfloat16
            {signed(first["weights"], 4)} bits/dim of {first["float32"]["value"]:.2f} (second:
            {signed(second["autocast"], 4)} and {signed(second["weights"], 4)}). Everything after the network is
            in float64 in each case.""",
        ),
        """The error of rounding is independent of the network's own error, so its square adds to a square that is
        far larger. The steps are not computed in bfloat16: x_t, the posterior and the KL terms stay exact.""",
        """It is general as long as the network's own error is large beside 2⁻⁸, which the loss shows.""",
        """Sample and evaluate in bfloat16 where the hardware gains by it ([speed](speed.md)), and keep the
        scheduler in float32, as this package does.""",
        ("half_precision",),
    )
