"""The sections on training."""

import math
from collections.abc import Mapping
from typing import Any

from .words import Surprise, percent, pm, require, table

FIRST, SECOND = "first", "second"
Found = Mapping[str, Any]


def chaos(found: Found) -> Surprise:
    own = found["chaos"]
    weights = own["weights"]
    last = weights["300"]
    require(last["value"] > 100 * weights["25"]["value"], "the distance of the weights grows by orders of magnitude")
    require(own["loss"]["value"] < 0.5 * last["value"], "the losses differ less than the weights")
    rows = [(step, f"{distance['value']:.1e} ± {distance['error']:.0e}") for step, distance in weights.items()]
    return Surprise(
        "Training is chaotic, and it hardly matters",
        "Two runs that differ by rounding stay close, or else end with different models",
        f"weights {pm(last, 1, 100)} % apart after 300 steps, losses {pm(own['loss'], 2, 100)} %",
        (
            f"""Two runs from one seed that add up the same gradients in another order (128 images in one part, or
            in two of 64), three seeds. The distance of their weights over the weights' length grows tenfold every
            {pm(own["tenfold_every"], 0)} steps between steps 50 and 200:""",
            table(("step", "relative distance of the weights"), rows),
            f"""After 300 steps the held-out losses of the two differ by {pm(own["loss"], 2, 100)} %, and their
            samples from the same seeds by {pm(own["samples"], 3)} root mean square on [−1, 1].""",
        ),
        """A difference of the weights makes one of the gradients, and Adam, which divides by the gradient's own
        size, passes it on at the full learning rate however small the gradient is. The loss hardly changes in
        most of the directions in which two runs part, so the function stays closer than the weights.""",
        """That rounding is amplified follows from how Adam divides, and three seeds agree. The rate is of this
        network and learning rate, and no other was tried.""",
        """Compare runs by their losses on the same t and ε and by their samples, not by their weights. Where
        weights must be equal, every sum must be taken in the same order: that is how a resumed run ends with the
        same bits ([resuming](training.md#resuming)).""",
        ("chaos",),
    )


def memorising(found: Found) -> Surprise:
    own = found["memorising"]
    sets, usual, uniform = [own["from_0"], own["from_16"]], own["usual"], math.log2(17)
    kinds = ("own", "others")
    for one in sets:
        require(one["others"]["bound"]["value"] > 2 * uniform, "the held-out bound is more than twice log2 17")
        require(one["others"]["l_simple"]["value"] < 0.5, "the held-out loss is far below 1")
        require(one["own"]["bound"]["value"] < usual["bound"]["value"], "memorised images have a lower bound")
    names = [f"{which} sixteen, {kind}" for which in ("the first", "the next") for kind in ("these", "held-out")]
    measures = [one[kind] for one in sets for kind in kinds]
    rows = [(name, pm(row["bound"]), pm(row["l_simple"], 4)) for name, row in zip(names, measures, strict=True)]
    rows.append(("1,437 digits, held-out", pm(usual["bound"]), pm(usual["l_simple"], 4)))
    times = [[one["others"][what]["value"] / usual[what]["value"] for one in sets] for what in ("bound", "l_simple")]
    others = sets[0]["others"]
    return Surprise(
        "By its loss a network that memorised is fair, by its bound worse than no network",
        "Whoever knows sixteen digits by heart still knows something about the others",
        f"held-out loss {pm(others['l_simple'], 2)} of 1; held-out bound {pm(others['bound'], 1)} bits/dim, where "
        f"guessing takes {uniform:.2f}",
        (
            """Two networks, each trained on sixteen digits for 2000 steps of all sixteen, on these and on 64
            held-out digits; and the first network, which saw 1,437:""",
            table(("trained on, measured on", "bound", "L_simple"), rows),
            f"""A network that predicts no noise at all has a loss of 1, so by the loss these explain
            {percent(1 - sets[0]["others"]["l_simple"]["value"])} and
            {percent(1 - sets[1]["others"]["l_simple"]["value"])} of the noise of held-out digits. All 17 levels
            alike take log₂ 17 = {uniform:.2f} bits/dim, and by the bound these take more than twice as many.
            Beside the good network it is {times[1][0]:.1f} and {times[1][1]:.1f} times the loss, and
            {times[0][0]:.1f} and {times[0][1]:.1f} times the bound, so in that comparison the loss hides nothing.""",
        ),
        f"""In the bound an error of ε at t = 1 weighs {own["weight_at_1_over_500"]:.0f} times as much as one at t
        = 500, in L_simple both weigh the same. At small t the network knows exactly which image it expects and is
        wrong, and nothing limits what a Gaussian pays for that.""",
        """The weights are general, those of Eq. 12. How far above guessing the bound ends depends on the data and
        on the length of the training.""",
        """Compare a held-out loss with that of training images or of another network, never with 1. The held-out
        bound needs no comparison: above log₂ of the number of levels a model is worse than none ([held-out
        data](training.md#held-out-data)).""",
        ("memorising",),
    )


def dealing_out(found: Found) -> Surprise:
    own = found["dealing_out"]
    two, four = own["2 parts"], own["4 parts"]
    require(two["different"] == 1, "two parts give the same bits however they are dealt out")
    require(four["different"] == four["ways"], "four parts give other bits in each way")
    return Surprise(
        "Two parts of a batch give the same bits on one or two processes, four do not",
        "Another number of processes always gives slightly other weights",
        f"2 parts: {two['different']} result in {two['ways']} ways; 4 parts: {four['different']} in {four['ways']}",
        (
            f"""{own["steps"]} steps of the recipe. A batch in two parts, in one process or one in each of two:
            all {two["tensors"]} tensors of the checkpoint, weights, averages and Adam's state, are equal bit for
            bit. In four parts, in one process, in two or in four: {four["different"]} different results, whose
            weights are up to {four["largest_difference"]:.0e} apart.""",
        ),
        """Floating-point addition commutes, a + b = b + a, but is not associative. Two parts can be added in one
        way only; four can be added one after the other, in pairs, or as the processes' reduction has it, which
        rounds differently.""",
        """It is general for sums in floating point, as long as the parts are computed by the same kernels. A
        GPU's kernels may add within a part in an order that changes from run to run.""",
        """Do not expect equal bits after a change of the number of processes, and read
        [chaos](#6-training-is-chaotic-and-it-hardly-matters) before you worry about it. With two parts you may,
        which makes a good test of a cluster.""",
        ("dealing_out",),
    )


def small_limits(found: Found) -> Surprise:
    own = found["gradient_clipping"]
    thousandth, millionth = own["ratio_0.001"], own["ratio_1e-06"]
    per_weight = 1e-6 / own["parameters"] ** 0.5
    require(abs(thousandth["value"] - 1) < 0.05, "a limit of 1e-3 leaves the loss within 5 %")
    require(per_weight < 1e-8, "1e-6 is below Adam's epsilon per weight")
    require(1.02 < millionth["value"] < 2, "a limit of 1e-6 trains, and worse")
    return Surprise(
        "Gradients hundreds of times too short train as well",
        "A limit far below the gradient's norm stops training",
        f"clipped at 1e-3: {pm(thousandth, 3)} times the loss; at 1e-6: {pm(millionth, 2)} times",
        (
            f"""300 steps with the gradient's norm clipped at 1e-3 or 1e-6 in place of 1, three seeds. The
            held-out loss of the averaged weights (decay 0.98) is {pm(thousandth, 3)} times that with a limit of 1
            for 1e-3, to which a gradient is shortened {own["median_after"] / 1e-3:.0f} times by the median, and
            {pm(millionth, 2)} times for 1e-6, where a weight's gradient is {per_weight:.0e} on average, below
            Adam's ε of 1e-8.""",
        ),
        """Adam divides the mean of the gradients by the root of their mean square, which cancels any factor that
        both have in common. A limit that always acts makes all gradients equally long, and only below ε does that
        shrink the steps.""",
        """It is general for Adam without weight decay. With plain gradient descent a limit of 1e-3 would be a
        learning rate a thousand times lower.""",
        """Leave `--max_grad_norm` at 1. Do not look for a cause of slow learning there.""",
        ("gradient_clipping",),
    )


def averaging(found: Found) -> Surprise:
    own, norms = found["averaging"], found["gradient_clipping"]
    good, recipe, slow = (own[f"ratio_{decay}"] for decay in ("0.98", "0.995", "0.9999"))
    require(good["value"] + 2 * good["error"] < 1, "averaging with 0.98 is better than raw weights")
    require(
        norms["clipped_after"] == 0 and norms["short_clipped_after"] == 0,
        "clipping at 1 does not act after the warm-up",
    )
    require(own["loss_0.9999"]["value"] > 0.9, "0.9999 is still the initial network")
    after = norms["steps_of_whole_run"] - 100
    return Surprise(
        "Clipping at 1 acts in the warm-up alone, and a good average depends on the length of the run",
        "The paper's clipping at 1 and its decay of 0.9999 matter in small runs too",
        f"clipped in {norms['clipped_after']} of {after} steps; decay 0.98: {pm(good, 2)} times the raw loss, 0.9999: "
        f"{pm(slow, 1)} times",
        (
            f"""In the second training the norm of the gradient was above 1 in {norms["clipped_in_warmup"]} of the
            100 steps of the warm-up and in {norms["clipped_after"]} of the {after} after it, where its median is
            {norms["median_after"]:.2f} and its largest value {norms["largest_after"]:.2f}.""",
            f"""After 300 steps the held-out loss of averaged weights is that of the raw ones times {pm(good, 3)} for
            the decay 0.98, times {pm(recipe, 3)} for 0.995 and times {pm(slow, 1)} for 0.9999 (three seeds). The
            last average has a loss of {pm(own["loss_0.9999"], 2)} and has moved
            {percent(own["moved_0.9999"]["value"], 1)} of the way that the weights went.""",
        ),
        """The gradient is proportional to the network's error
        ([11](#11-most-of-the-losss-noise-is-t-and-the-gradient-knows-little-of-the-losss-size)), which is small
        once the warm-up is over. An average with decay d looks back over 1/(1 − d) steps: 50 steps for 0.98, a
        sixth of this run; 10,000 for 0.9999, thirty times it.""",
        """The two horizons are general. That clipping acts in the warm-up alone is of this model and its data.""",
        """Choose a decay whose horizon is a small part of the run; the script warns of one that is too long. Keep
        the limit of 1: where it does not act it changes nothing.""",
        ("gradient_clipping", "averaging"),
    )
