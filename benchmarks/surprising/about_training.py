"""The sections on training."""

from collections.abc import Mapping
from typing import Any

from .words import Surprise, clear, of, percent, pm, require, table

FIRST, SECOND = "first", "second"
Found = Mapping[str, Any]


def chaos(found: Found) -> Surprise:
    own = found["chaos"]
    weights = own["weights"]
    last = weights["300"]
    require(last["value"] > 100 * weights["25"]["value"], "the distance of the weights grows by orders of magnitude")
    require(own["loss"]["value"] < 0.1 * last["value"], "the losses differ far less than the weights")
    rows = [(step, f"{distance['value']:.1e} ± {distance['error']:.0e}") for step, distance in weights.items()]
    return Surprise(
        "Training is chaotic, and it does not matter",
        "Two runs that differ by rounding stay close, or else end with different models",
        f"weights {percent(last['value'], 1)} apart after 300 steps, losses {percent(own['loss']['value'], 3)}",
        (
            f"""Two runs from one seed that add up the same gradients in another order (128 images in one part, or
            in two of 64), three seeds. The distance of their weights over the weights' length grows tenfold every
            {pm(own["tenfold_every"], 0)} steps between steps 50 and 200:""",
            table(("step", "relative distance of the weights"), rows),
            f"""After 300 steps the held-out losses of the two differ by {pm(own["loss"], 3, 100)} %, and their
            samples from the same seeds by {pm(own["samples"], 3)} root mean square on [−1, 1].""",
        ),
        """A step of Adam divides by the gradient's own size, so that even the rounding error of a tiny gradient
        moves a weight by a good part of the learning rate, and the next gradients carry it on. The loss is flat
        in nearly all of the directions in which the two runs part, so the function stays the same.""",
        """Three seeds agree. That rounding is amplified is general for training by Adam; the rate is of this
        network and learning rate.""",
        """Compare runs by their losses on the same t and ε and by their samples, not by their weights. Where
        weights must be equal, every sum must be taken in the same order: that is how a resumed run ends with the
        same bits ([resuming](training.md#resuming)).""",
        ("chaos",),
    )


def memorising(found: Found) -> Surprise:
    own = found["memorising"]
    sets = [own["from_0"], own["from_16"]]
    usual = own["usual"]
    bound_gap = [s["others"]["bound"]["value"] / s["own"]["bound"]["value"] for s in sets]
    against = [s["others"]["l_simple"]["value"] / usual["l_simple"]["value"] for s in sets]
    for one in sets:
        gap = one["others"]["bound"]["value"] - usual["bound"]["value"]
        require(gap > 2, "the held-out bound of a memorising network is bits above that of the usual one")
    rows = [
        (name, *(pm(row[kind][what], 2 if what == "bound" else 4) for what in ("bound", "l_simple")))
        for name, row, kind in (
            ("the first sixteen, their own", sets[0], "own"),
            ("the first sixteen, held-out", sets[0], "others"),
            ("the next sixteen, their own", sets[1], "own"),
            ("the next sixteen, held-out", sets[1], "others"),
        )
    ]
    rows.append(("1,437 digits, held-out", pm(usual["bound"]), pm(usual["l_simple"], 4)))
    return Surprise(
        "The loss hides memorising, the bound shows it",
        "A network that knows sixteen images by heart has a hopeless loss on all others",
        f"held-out loss {against[0]:.1f} times that of a good network; held-out bound "
        f"{pm(sets[0]['others']['bound'], 1)} bits/dim in place of {pm(usual['bound'], 1)}",
        (
            """Two networks, each trained on sixteen digits for 2000 steps of all sixteen, on these and on 64
            held-out digits; and the first network, which saw 1,437:""",
            table(("trained on, measured on", "bound", "L_simple"), rows),
            f"""Held-out digits have {bound_gap[0]:.1f} and {bound_gap[1]:.1f} times the bound of memorised ones,
            and {against[0]:.1f} and {against[1]:.1f} times the loss of the good network.""",
        ),
        """At most t the noise hides the image, and any network that knows the statistics of the noise has a small
        loss there. The bound weighs the errors at small t, where a memorised image is drawn in place of the one
        that is there, up to thousands of times more.""",
        """It is general, since it follows from the weights of the two sums. How far they part depends on the data
        and on how long the network is trained.""",
        """Watch the held-out bound (`--held_out_every`, `--eval_every`): it turns where memorising begins
        ([held-out data](training.md#held-out-data)).""",
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
        [chaos](#6-training-is-chaotic-and-it-does-not-matter) before you worry about it. With two parts you may,
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
        "Gradients a thousand times too small train as well",
        "A limit far below the gradient's norm stops training",
        f"clipped at 1e-3: {pm(thousandth, 3)} times the loss; at 1e-6: {pm(millionth, 2)} times",
        (
            f"""300 steps with the gradient's norm clipped at 1e-3 or 1e-6 in place of 1, three seeds. The
            held-out loss of the averaged weights (decay 0.98) is {pm(thousandth, 3)} times that with a limit of 1
            for 1e-3, and {pm(millionth, 2)} times for 1e-6, where a weight's gradient is {per_weight:.0e} on
            average, below Adam's ε of 1e-8.""",
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
    require(norms["clipped_after"] == 0 and norms["short_clipped_after"] == 0, "clipping at 1 does not act after the warm-up")
    require(own["loss_0.9999"]["value"] > 0.9, "0.9999 is still the initial network")
    after = norms["steps_of_whole_run"] - 100
    return Surprise(
        "Clipping at 1 never acts, and a good average depends on the length of the run",
        "The paper's clipping at 1 and its decay of 0.9999 matter in small runs too",
        f"clipped in {norms['clipped_after']} of {after} steps; decay 0.98: {pm(good, 2)} times the raw loss, 0.9999: "
        f"{pm(slow, 1)} times",
        (
            f"""In the second training the norm of the gradient was above 1 in {norms["clipped_in_warmup"]} of the
            100 steps of the warm-up and in {norms["clipped_after"]} of the {after} after it, where its median is
            {norms["median_after"]:.2f} and its largest value {norms["largest_after"]:.2f}.""",
            f"""After 300 steps, three seeds, the held-out loss of averaged weights over that of the raw ones:
            decay 0.98 {pm(good, 3)}, 0.995 {pm(recipe, 3)}, 0.9999 {pm(slow, 1)}. The last has a loss of
            {pm(own["loss_0.9999"], 2)} and has moved {percent(own["moved_0.9999"]["value"], 1)} of the way that
            the weights went.""",
        ),
        """The recipe's loss is a mean over 128 images and falls from 1 to 0.1 within the warm-up, so its
        gradients are short from then on. An average with decay d looks back over 1/(1 − d) steps: 50 steps for
        0.98, a sixth of this run; 10,000 for 0.9999, thirty times it.""",
        """The two horizons are general. That clipping never acts is a matter of the model and of its loss: large
        networks have had spikes.""",
        """Choose a decay whose horizon is a tenth of the run; the script warns of one that is too long. Keep the
        limit of 1, which costs nothing, for the spike that you have not seen.""",
        ("gradient_clipping", "averaging"),
    )
