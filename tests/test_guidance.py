"""Labels and guidance against closed forms: mixtures with labels, guidance without and with a classifier.

No network is trained here. `PLANE` has three tilted ellipses, two of them of one class; `LINE` two overlapping bells.
"""

import math
from typing import Any

import pytest
import torch
from test_oracle import assert_distributed_as, assert_mean, grid, normal, seeded
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.guidance import ClassifierGuidedNetwork, classifier_guided
from ddpm_hf.likelihood import bits_per_dim, class_bounds_bpd
from ddpm_hf.oracle import GaussianMixture, OracleNetwork

PLANE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-0.6, -0.3], [0.5, 0.6], [0.6, -0.5]]),
    torch.tensor([[[0.04, 0.02], [0.02, 0.03]], [[0.02, 0.0], [0.0, 0.06]], [[0.03, -0.02], [-0.02, 0.03]]]),
    labels=torch.tensor([0, 1, 0]),
)
LINE = GaussianMixture(
    torch.tensor([0.7, 0.3]), torch.tensor([[-0.3], [0.4]]), torch.tensor([[[0.04]], [[0.09]]]), labels=[0, 1]
)
TIMES = [0, 50, 500, 999]


def pipe_of(truth: GaussianMixture, num_steps: int = 1000, **config: Any) -> DDPMPaperPipeline:
    """Of ε*, without clipping; T and β so that every chain length ends in the same noise."""
    config = {"clip_sample": False, "beta_start": 0.1 / num_steps, "beta_end": 20 / num_steps, **config}
    scheduler = DDPMPaperScheduler(num_steps, **config)
    network: Any = OracleNetwork(truth, scheduler.diffusion)
    pipe = DDPMPaperPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gradient(of: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(of(x).sum(), x)[0]


# ---- mixtures with labels ------------------------------------------------------------------------------------------


def test_classes_make_up_the_mixture():
    """p(x) = Σ_y p(y) p(x | y), and p(y | x) = p(y) p(x | y) / p(x)."""
    x = normal(1, 200, 2)
    prior = torch.stack([PLANE.weights[PLANE.labels == y].sum() for y in range(PLANE.num_classes)])
    given = torch.stack([PLANE.given(y).log_prob(x) for y in range(PLANE.num_classes)], dim=1)
    joint = prior.log() + given
    torch.testing.assert_close(joint.logsumexp(dim=1), PLANE.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(PLANE.class_log_probs(x), joint.log_softmax(dim=1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", TIMES)
def test_noising_and_conditioning_commute(t):
    diffusion, x = pipe_of(PLANE).scheduler.diffusion, normal(2, 100, 2)
    for label in range(2):
        one, other = PLANE.given(label).marginal(diffusion, t), PLANE.marginal(diffusion, t).given(label)
        torch.testing.assert_close(one.log_prob(x), other.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_conditional_eps_is_the_score_given_the_class(t):
    pipe, x = pipe_of(PLANE), normal(3, 6, 2)
    noised = PLANE.marginal(pipe.scheduler.diffusion, t)
    labels = torch.tensor([0, 1, 2, 1, 0, 2])  # 2 is the null class
    scale = math.sqrt(1 - pipe.scheduler.diffusion.alphas_cumprod[t])
    expected = torch.empty_like(x)
    for label, distribution in enumerate([noised.given(0), noised.given(1), noised]):
        rows = labels == label
        expected[rows] = -scale * gradient(distribution.log_prob, x[rows])
    torch.testing.assert_close(pipe.unet(x, t, labels).sample, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "one for each of 3"), ([0, 2, 0], "0, 1, …"), ([0.0, 1.0, 0.0], "integers"), ([-1, 0, 0], "integers")],
)
def test_impossible_labels_of_a_mixture_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(PLANE.weights, PLANE.means, PLANE.covariances, labels=labels)


def test_unknown_labels_are_refused():
    network = pipe_of(PLANE).unet
    for labels in (3, torch.tensor([0, -1]), torch.tensor([0.5, 1]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="integers from 0 to 2"):
            network(normal(0, 2, 2), 5, labels)
    for labels in (torch.tensor([0, 1, 0]), torch.tensor([[0, 1]])):
        with pytest.raises(ValueError, match="one or one per sample"):
            network(normal(0, 2, 2), 5, labels)
    for label in (2, 0.5, "a", True):
        with pytest.raises(ValueError, match="none of the mixture's 2 classes"):
            PLANE.given(label)
    with pytest.raises(ValueError, match="components have no labels"):
        PLANE.given(0).class_log_probs(normal(0, 2, 2))


# ---- classifier-free guidance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.5, 0, 1, 2.5, 8])
@pytest.mark.parametrize("t", TIMES)
def test_guided_eps_is_the_guided_score(t, scale):
    """ε = −√(1−ᾱ_t) (∇ log p(x_t) + s (∇ log p(x_t | y) − ∇ log p(x_t))), to float32's rounding of large terms."""
    pipe, x = pipe_of(PLANE), normal(4, 40, 2).float()
    noised, deviation = (
        PLANE.marginal(pipe.scheduler.diffusion, t),
        math.sqrt(1 - pipe.scheduler.diffusion.alphas_cumprod[t]),
    )
    for label in range(2):
        unconditional = gradient(noised.log_prob, x.double())
        conditional = gradient(noised.given(label).log_prob, x.double())
        expected = -deviation * (unconditional + scale * (conditional - unconditional))
        guided = pipe.model_output(x, t, label, scale)
        largest = float(torch.maximum(unconditional.abs(), conditional.abs()).max()) * deviation * (1 + abs(scale))
        torch.testing.assert_close(guided.double(), expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 1])
def test_at_scale_1_samples_have_the_distribution_of_the_class(label):
    """Beyond chance a step's variance is off by O(β_t): see test_algorithm_2_samples_the_mixture."""
    pipe = pipe_of(PLANE, variance_type="fixed_small")
    x = pipe(4000, class_labels=label, generator=seeded(9), output_type="latent").images.double()
    assert_distributed_as(PLANE.given(label), x, discretisation=0.05)


@pytest.mark.integration
def test_a_batch_may_mix_classes_and_none():
    """Each class's samples have its mean; those without a label have that of all."""
    pipe, labels = pipe_of(PLANE, 100, variance_type="fixed_small"), [0, 1, None] * 2000
    x = pipe(class_labels=labels, generator=seeded(1), output_type="latent").images.double()
    for i, distribution in enumerate([PLANE.given(0), PLANE.given(1), PLANE]):
        assert_mean(x[i::3], distribution.mean, beyond=0.01)  # a hundred steps


@pytest.mark.slow
def test_guidance_is_not_the_tilted_distribution():
    """At s = 3 samples lie further from the other class than p(x) p(y | x)^3 has them, by far more than chance."""
    points, cell = grid(1)
    pipe = pipe_of(LINE, 400, variance_type="fixed_small")
    for label, away in ((0, -1), (1, 1)):
        log_tilted = LINE.log_prob(points) + 3 * LINE.class_log_probs(points)[:, label]
        density = (log_tilted - log_tilted.logsumexp(dim=0)).exp()
        tilted_mean = float(density @ points[:, 0])
        x = pipe(4000, class_labels=label, guidance_scale=3, generator=seeded(2), output_type="latent").images
        error = float(x.std()) / math.sqrt(len(x))
        assert away * (tilted_mean - float(LINE.given(label).mean)) > 0
        assert away * (float(x.mean()) - tilted_mean) > 10 * error


# ---- classifier guidance -------------------------------------------------------------------------------------------


def exact_log_prob(truth: GaussianMixture, scheduler: DDPMPaperScheduler) -> Any:
    """log p(y | x_t), in closed form."""

    def log_prob(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        noised = truth.marginal(scheduler.diffusion, int(t[0]))
        return noised.class_log_probs(x_t)[torch.arange(len(x_t)), labels]

    return log_prob


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_an_exact_classifier_guides_as_no_classifier_does(conditional, scale):
    pipe, x = pipe_of(PLANE), normal(5, 30, 2).float()
    log_prob: Any = exact_log_prob(PLANE, pipe.scheduler)
    network, num_classes = pipe.unet, None
    if not conditional:
        unlabelled = GaussianMixture(PLANE.weights, PLANE.means, PLANE.covariances)
        network, num_classes = OracleNetwork(unlabelled, pipe.scheduler.diffusion), 2
    guided = ClassifierGuidedNetwork(network, pipe.scheduler, log_prob, guidance_scale=scale, num_classes=num_classes)
    for t in TIMES:
        for label in (0, 1):
            expected = pipe.model_output(x, t, label, scale)
            torch.testing.assert_close(guided(x, t, label).sample.float(), expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(guided(x, 7).sample, network(x, 7).sample)  # without a label as without guidance
    assert torch.equal(guided(x, 7, guided.config["null_class"]).sample, network(x, 7).sample)


@pytest.mark.integration
def test_pipelines_guided_both_ways_draw_the_same():
    pipe = pipe_of(PLANE, 50)
    unlabelled = pipe_of(GaussianMixture(PLANE.weights, PLANE.means, PLANE.covariances), 50)
    log_prob = exact_log_prob(PLANE, pipe.scheduler)
    guided = classifier_guided(unlabelled, log_prob, guidance_scale=2, id2label={0: "two", 1: "one"})
    labels, options = ["one", "two"] * 4, {"seeds": range(8), "output_type": "latent"}
    numbers = [{"one": 1, "two": 0}[label] for label in labels]
    one = guided(class_labels=labels, **options).images
    other = pipe(class_labels=numbers, guidance_scale=2, **options).images
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # 50 steps of float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "previous_sample"])
def test_guidance_moves_x_start_alike_whatever_is_predicted(prediction_type):
    """x̂_0 by γ (1−ᾱ_t)/√ᾱ_t ∇ log p(y | x_t); here ∇ log p = x_t + y."""
    scheduler = DDPMPaperScheduler(100, 1e-3, 0.2, prediction_type=prediction_type, clip_sample=False)
    diffusion, x, labels = scheduler.diffusion, normal(6, 5, 2).float(), torch.tensor([0, 1, 2, 1, 0])

    class Plain(torch.nn.Module):
        config: Any = {"in_channels": 2}

        def forward(self, sample: Tensor, timestep: Any) -> Any:
            return type("Output", (), {"sample": torch.sin(sample)})

    network: Any = Plain()
    guided = ClassifierGuidedNetwork(
        network, scheduler, lambda x_t, t, y: (0.5 * x_t.square() + y[:, None] * x_t).sum(dim=1),
        guidance_scale=1.5, num_classes=3,
    )  # fmt: skip
    for t in (1, 50, 99):
        before = diffusion.predict_x_start(network(x, t).sample, x, t)
        after = diffusion.predict_x_start(guided(x, t, labels).sample, x, t)
        alpha_cumprod = diffusion.alphas_cumprod[t]
        expected = 1.5 * (1 - alpha_cumprod) / math.sqrt(alpha_cumprod) * (x + labels[:, None])
        torch.testing.assert_close(after - before, expected.float(), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_guided_reverse_step():
    """Where the caller records them: x_{t−1} depends on x_t also by way of the classifier."""
    pipe = pipe_of(PLANE, 50)
    guided = classifier_guided(pipe, exact_log_prob(PLANE, pipe.scheduler), guidance_scale=3)
    step_of = lambda x: guided.reverse_step(x, 0, class_labels=1).x.sum()  # noqa: E731  (t = 0 adds no noise)
    x, h = normal(7, 1, 2).float() * 0.3, 1e-2
    numeric = [(step_of(x + h * e) - step_of(x - h * e)) / (2 * h) for e in torch.eye(2)]
    torch.testing.assert_close(gradient(step_of, x)[0], torch.stack(numeric), rtol=2e-2, atol=2e-2)


def test_impossible_guides_are_refused():
    pipe = pipe_of(PLANE)
    log_prob = exact_log_prob(PLANE, pipe.scheduler)
    with pytest.raises(ValueError, match="has its own classes"):
        ClassifierGuidedNetwork(pipe.unet, pipe.scheduler, log_prob, num_classes=2)
    with pytest.raises(ValueError, match="num_classes=None: missing"):
        ClassifierGuidedNetwork(
            pipe_of(GaussianMixture(PLANE.weights, PLANE.means, PLANE.covariances)).unet, pipe.scheduler, log_prob
        )
    with pytest.raises(ValueError, match="must be a finite number"):
        ClassifierGuidedNetwork(pipe.unet, pipe.scheduler, log_prob, guidance_scale=math.inf)
    guided = classifier_guided(pipe, lambda x_t, t, y: x_t, guidance_scale=2)
    with pytest.raises(ValueError, match=r"log_prob returned \(3, 2\)"):
        guided.unet(normal(0, 3, 2), 5, 1)
    with pytest.raises(ValueError, match="a guided network is not saved"):
        guided.unet.save_pretrained("anywhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": "2"}, "guidance_scale='2' must be a finite number"),
        ({"guidance_scale": None}, "guidance_scale=None must be a finite number"),
        ({"id2label": ["a", "b"]}, "must map numbers of classes to names"),
        ({"id2label": {}}, "num_classes=0 must be an integer and at least 1"),
    ],
)
def test_impossible_options_of_a_guide_are_refused(options, message):
    pipe = pipe_of(GaussianMixture(PLANE.weights, PLANE.means, PLANE.covariances))
    log_prob = exact_log_prob(PLANE, pipe.scheduler)
    with pytest.raises(ValueError, match=message):
        classifier_guided(pipe, log_prob, **{"id2label": {0: "a", 1: "b"}, **options})


@pytest.mark.parametrize("labels", [-1, 3, [0, 3], [0.5, 1.0], [True, False], [0, 1, 0]], ids=str)
def test_a_classifier_is_asked_for_its_own_classes_alone(labels):
    """−1 would be the last class, and another's number whatever the function makes of it."""
    pipe = pipe_of(PLANE)
    network = ClassifierGuidedNetwork(
        pipe.unet, pipe.scheduler, exact_log_prob(PLANE, pipe.scheduler), guidance_scale=2
    )
    with pytest.raises(ValueError, match="integers from 0 to 2, one or one per sample"):
        network(normal(0, 2, 2), 5, torch.tensor(labels))


@pytest.mark.parametrize(
    ("log_prob", "message"),
    [
        (lambda x_t, t, y: torch.zeros(len(x_t)), "does not depend on x_t"),
        (torch.no_grad()(lambda x_t, t, y: x_t.sum(dim=1)), "does not depend on x_t"),
        (lambda x_t, t, y: x_t.detach().numpy()[:, 0], "returned ndarray"),
        (lambda x_t, t, y: None, "returned NoneType"),
    ],
)
def test_a_classifier_without_a_gradient_is_refused(log_prob, message):
    guided = classifier_guided(pipe_of(PLANE), log_prob, guidance_scale=2)
    with pytest.raises(ValueError, match=message):
        guided.unet(normal(0, 3, 2), 5, 1)


def test_guidance_works_in_inference_mode():
    pipe = pipe_of(PLANE, 50)
    guided = classifier_guided(pipe, exact_log_prob(PLANE, pipe.scheduler), guidance_scale=2)
    options: Any = {"class_labels": [0, 1], "seeds": range(2), "output_type": "latent"}
    expected = guided(**options).images
    with torch.inference_mode():
        assert torch.equal(guided(**options).images, expected)


@pytest.mark.parametrize("kind", ["guided", "oracle"])
def test_a_pipeline_that_cannot_be_saved_says_so(tmp_path, kind):
    """Diffusers would leave the network out, with a line in the log."""
    pipe = pipe_of(PLANE)
    if kind == "guided":
        pipe = classifier_guided(pipe, exact_log_prob(PLANE, pipe.scheduler))
    with pytest.raises(ValueError, match="not saved"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ---- the bound given the class -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bound_given_the_class_is_above_its_nll():
    """And below the bound without: for data of the class, knowing it is worth bits. 300 points, 100 steps."""
    pipe, x = pipe_of(PLANE, 100, variance_type="fixed_small"), PLANE.given(1).sample(300, seeded(4))
    options: Any = {"seed": 0, "clip_denoised": False, "num_levels": None}
    labels = torch.ones(300, dtype=torch.int64)
    given = bits_per_dim(pipe.unet, pipe.scheduler, x, class_labels=labels, **options).total_b
    without = bits_per_dim(pipe.unet, pipe.scheduler, x, **options).total_b
    assert_mean(given - without - (PLANE.given(1).nll_bpd(x) - PLANE.nll_bpd(x)), 0.0, beyond=0.05)
    assert float((given - PLANE.given(1).nll_bpd(x)).mean()) > 0
    with pytest.raises(ValueError, match=r"class_labels has shape \(2,\)"):
        bits_per_dim(pipe.unet, pipe.scheduler, x, class_labels=labels[:2], **options)
    assert torch.equal(bits_per_dim(pipe.unet, pipe.scheduler, x, class_labels=[1] * 300, **options).total_b, given)
    assert torch.equal(bits_per_dim(pipe.unet, pipe.scheduler, x, class_labels=1, **options).total_b, given)
    for wrong in ("one", ["one"] * 300, [None] * 300, [0.5] * 300, [True] * 300):
        with pytest.raises(ValueError, match="class_labels must be integers"):
            bits_per_dim(pipe.unet, pipe.scheduler, x, class_labels=wrong, **options)


def test_bounds_for_no_class_or_a_name_are_refused():
    pipe, options = pipe_of(PLANE, 50), {"seed": 0, "clip_denoised": False, "num_levels": None}
    for classes, message in (([], "names no class"), (["one"], "must be integers"), ([0.5], "must be integers")):
        with pytest.raises(ValueError, match=message):
            class_bounds_bpd(pipe.unet, pipe.scheduler, normal(0, 2, 2), classes, **options)
