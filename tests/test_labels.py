"""Pipelines with labels: names and numbers, guidance, every scheduler, checkpoints, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from test_pipeline import KARRAS, quiet
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.codec import compress, decompress, fit_chain
from ddpm_hf.convert import given_class, pipeline_from_stock, pipeline_to_stock, to_stock
from ddpm_hf.inference import speed_up
from ddpm_hf.sampling import reverse_process, sample_together

NAMES = {0: "cat", 1: "3", 2: "dog, wolf"}
ROWS = {"num_class_embeds": 4, "null_class": 3}


@pytest.fixture
def pipe(tiny_unet, tiny_scheduler) -> DDPMPaperPipeline:
    return quiet(DDPMPaperPipeline(tiny_unet(**ROWS), tiny_scheduler(), id2label=NAMES))


def drawn(pipe: Any, count: int = 4, **options: Any) -> Tensor:
    options = {"seeds": range(count), "output_type": "latent", **options}
    return pipe(**options).images


class Counting(torch.nn.Module):
    """A network, and the sizes of the batches it was asked about."""

    def __init__(self, network: Any):
        super().__init__()
        self.network, self.sizes, self.config = network, [], network.config
        self.dtype, self.device = network.dtype, network.device

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sizes.append(len(sample))
        return self.network(sample, *args, **kwargs)


# ---- which labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ("cat", [0, 0, 0, 0]),
        (2, [2, 2, 2, 2]),
        (["dog, wolf", "3", 0, None], [2, 1, 0, 3]),
        (np.array([1, 0, 2, 2]), [1, 0, 2, 2]),
        (np.array(["cat", "3", "cat", "3"]), [0, 1, 0, 1]),
        (torch.tensor([1, 0, 2, 3]), [1, 0, 2, 3]),
        (torch.tensor(1), [1, 1, 1, 1]),
        (np.int64(2), [2, 2, 2, 2]),
        (range(4), [0, 1, 2, 3]),
        (torch.tensor([1, 0, 2, 3], dtype=torch.uint8), [1, 0, 2, 3]),
        (torch.tensor([1, 0, 2, 3], dtype=torch.int32), [1, 0, 2, 3]),
        (None, [3, 3, 3, 3]),
    ],
    ids=str,
)
def test_labels_are_names_or_numbers(pipe, labels, numbers):
    expected = drawn(pipe, class_labels=torch.tensor(numbers))
    assert torch.equal(drawn(pipe, class_labels=labels), expected)


def test_a_name_is_looked_up_before_it_is_a_number(pipe):
    assert torch.equal(drawn(pipe, class_labels="3"), drawn(pipe, class_labels=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "wolf"}, "'wolf' is none of the classes: cat, 3, dog, wolf"),
        ({"class_labels": 4}, "4 is no number from 0 to 3"),
        ({"class_labels": -1}, "-1 is no number"),
        ({"class_labels": 1.0}, "1.0 is no number"),
        ({"class_labels": True}, "True is no number"),
        ({"class_labels": torch.tensor([0, 1, 2, 9])}, "9 is no number from 0 to 3"),
        ({"class_labels": torch.tensor([0.5, 1.0, 2.0, 3.0])}, "0.5 is no number from 0 to 3"),
        ({"class_labels": torch.tensor([True] * 4)}, "True is no number from 0 to 3"),
        ({"class_labels": b"\0\1\0\1"}, "is no number from 0 to 3"),
        ({"class_labels": [0, 1]}, "must agree"),
        ({"class_labels": []}, "at least one sample"),
        ({"guidance_scale": 2}, "needs class_labels"),
        ({"class_labels": 0, "guidance_scale": float("inf")}, "finite"),
        ({"class_labels": 0, "guidance_scale": "2"}, "finite"),
        ({"class_labels": 0, "guidance_scale": True}, "finite"),
    ],
    ids=str,
)
def test_impossible_labels_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        drawn(pipe, **options)


@pytest.mark.parametrize("labels", [torch.tensor([0, 9]), torch.tensor([0, -1]), torch.tensor([0.5, 1.0])], ids=str)
def test_no_network_is_asked_for_a_class_that_it_does_not_have(pipe, labels):
    """Whoever's network it is: some would take −1 for the last class, or a class and a half for none."""

    class Trusting(Counting):
        def forward(self, sample: Tensor, t: Any, class_labels: Any = None) -> Any:
            self.sizes.append(len(sample))
            return self.network(sample, t)

    pipe.unet = trusting = Trusting(pipe.unet)
    x = torch.zeros(2, 3, 8, 8)
    for asked in (
        lambda: drawn(pipe, 2, class_labels=labels),
        lambda: pipe.reverse_step(x, 5, class_labels=labels),
        lambda: pipe.model_output(x, 5, labels, 2.0),
    ):
        with pytest.raises(ValueError, match="is no number from 0 to 3"):
            asked()
    assert trusting.sizes == []


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_a_network_takes_integers_of_every_width(pipe, kind):
    """Data sets keep labels in one byte."""
    x, labels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 2, 3])
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, 5, labels.to(kind)).sample, pipe.unet(x, 5, labels).sample)
    with pytest.raises(ValueError, match="'cat' must be integers from 0 to 3"):
        pipe.unet(x, 5, "cat")


def test_a_scale_may_be_numpys(pipe):
    expected = drawn(pipe, class_labels="cat", guidance_scale=2)
    for scale in (np.float32(2), np.int64(2)):
        assert torch.equal(drawn(pipe, class_labels="cat", guidance_scale=scale), expected)


def test_labels_say_how_many(pipe):
    assert pipe(class_labels=["cat"] * 3, output_type="np").images.shape == (3, 8, 8, 3)
    assert pipe(class_labels="cat", output_type="np").images.shape == (1, 8, 8, 3)


def test_without_a_null_row_every_sample_needs_a_label(tiny_unet, tiny_scheduler):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(num_class_embeds=3), tiny_scheduler(), id2label=NAMES))
    drawn(pipe, class_labels="cat")
    for options, message in (
        ({}, "needs class_labels"),
        ({"class_labels": ["cat", None, 1, 1]}, "no null_class"),
        ({"class_labels": "cat", "guidance_scale": 2}, "needs a network with a null_class"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(pipe, **options)


def test_unconditional_networks_take_no_labels(tiny_unet, tiny_scheduler):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), tiny_scheduler()))
    for options in ({"class_labels": 0}, {"class_labels": "cat", "guidance_scale": 2}):
        with pytest.raises(ValueError, match="unconditional|null_class"):
            drawn(pipe, **options)
    with pytest.raises(ValueError, match="needs class_labels"):
        drawn(pipe, guidance_scale=2)
    with pytest.raises(ValueError, match="none of the 0 classes"):
        DDPMPaperPipeline(pipe.unet, pipe.scheduler, id2label=NAMES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({3: "none"}, "3 is none of the 3 classes"),
        ({"x": "cat"}, "'x' is none of the 3 classes"),
        ({0: "cat", 1: "cat"}, "two classes have the same name"),
        ({0: 1}, "must be text"),
        (["cat"], "must map"),
    ],
)
def test_impossible_names_are_refused(tiny_unet, tiny_scheduler, names, message):
    with pytest.raises(ValueError, match=message):
        DDPMPaperPipeline(tiny_unet(**ROWS), tiny_scheduler(), id2label=names)


def test_single_steps_refuse_the_same(pipe, tiny_unet, tiny_scheduler):
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="needs class_labels"):
        pipe.reverse_step(x, 5, guidance_scale=2)
    with pytest.raises(ValueError, match="9 is no number"):
        pipe.reverse_step(x, 5, class_labels=[0, 9])
    rowless = quiet(DDPMPaperPipeline(tiny_unet(num_class_embeds=3), tiny_scheduler()))
    for options, message in (({"class_labels": 0, "guidance_scale": 2}, "null_class"), ({}, "needs class_labels")):
        with pytest.raises(ValueError, match=message):
            rowless.reverse_step(x, 5, **options)
        with pytest.raises(ValueError, match=message):
            next(rowless.reverse_process(x, **options))


# ---- guidance ------------------------------------------------------------------------------------------------------


def test_evaluations_of_the_network(pipe):
    """One a step; guided it has both halves; at scale 1, and without labels, none more."""
    pipe.unet = counting = Counting(pipe.unet)
    for options, size in (({"class_labels": "cat", "guidance_scale": 3.0}, 8), ({"class_labels": "cat"}, 4), ({}, 4)):
        counting.sizes.clear()
        drawn(pipe, **options)
        assert counting.sizes == [size] * 10


def test_guidance_goes_from_one_network_to_the_other(pipe):
    """f_∅ + s (f_y − f_∅) at each step: 0 is without a label, 1 the class, and it is linear in s."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        at = {s: pipe.model_output(x, 5, "cat", s) for s in (0, 1, 2.5)}
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(at[0], pipe.model_output(x, 5, None), **close)
        torch.testing.assert_close(at[1], pipe.model_output(x, 5, 0), **close)
        torch.testing.assert_close(at[2.5], at[0] + 2.5 * (at[1] - at[0]), **close)


def test_a_learned_variance_is_the_classs(tiny_unet, tiny_scheduler):
    scheduler = tiny_scheduler(variance_type="learned")
    pipe = quiet(DDPMPaperPipeline(tiny_unet(out_channels=6, **ROWS), scheduler, id2label=NAMES))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        guided, plain = pipe.model_output(x, 5, "cat", 3), pipe.model_output(x, 5, "cat")
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:], rtol=0, atol=1e-5)
    assert (guided[:, :3] - plain[:, :3]).abs().max() > 0.01
    assert torch.isfinite(drawn(pipe, class_labels="cat", guidance_scale=3)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", KARRAS)
def test_every_scheduler_draws_the_class(pipe, name):
    """As from a network that knows nothing else: the class's vector is in its weights."""
    import diffusers

    own_noise = {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **own_noise)
    plain = quiet(DDPMPaperPipeline(given_class(pipe.unet, 2), pipe.scheduler))
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5}
    expected = plain(2, output_type="latent", **options).images
    options["generator"] = torch.Generator().manual_seed(0)
    images = pipe(2, class_labels="dog, wolf", output_type="latent", **options).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("labels", ["cat", ["cat", "3", None, "3"]])
def test_a_fast_network_draws_the_same(pipe, labels, scale):
    fast = speed_up(pipe)
    assert fast.id2label == NAMES
    options = {"class_labels": labels, "guidance_scale": scale}
    torch.testing.assert_close(drawn(fast, **options), drawn(pipe, **options), rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn(fast), drawn(pipe), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="integers from 0 to 3"):
        fast.unet(torch.zeros(4, 3, 8, 8), 5, 4)


def test_a_fast_network_without_classes_takes_no_labels(tiny_unet, tiny_scheduler):
    fast = speed_up(quiet(DDPMPaperPipeline(tiny_unet(), tiny_scheduler())))
    with pytest.raises(ValueError, match="unconditional"):
        fast.unet(torch.zeros(4, 3, 8, 8), 5, 0)


def test_steps_one_by_one_are_the_pipelines(pipe):
    """`reverse_process` of `sampling`, and `sample_together`, with labels and guidance."""
    from accelerate import Accelerator

    from ddpm_hf.pipeline_ddpm_paper import seeded_generators

    labels = ["cat", "3", "dog, wolf", None]
    generators = seeded_generators(range(4))
    x_t = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators])
    steps = list(reverse_process(pipe, x_t, generators=generators, class_labels=labels, guidance_scale=2.0))
    assert torch.equal(steps[-1].x, drawn(pipe, class_labels=labels, guidance_scale=2.0))
    together = sample_together(Accelerator(cpu=True), pipe, 4, class_labels=labels, batch_size=3)
    expected = drawn(pipe, class_labels=labels, output_type="pt")
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_it_travels_with_its_names(pipe, tmp_path):
    """By our class, and by the code that it carries, without this package's."""
    pipe.save_pretrained(tmp_path)
    expected = drawn(pipe, class_labels=["cat", 1, None, 2], guidance_scale=2)
    for loaded in (
        DDPMPaperPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert loaded.id2label == NAMES and loaded.null_class == 3
        images = drawn(quiet(loaded), class_labels=["cat", 1, None, 2], guidance_scale=2)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_many_names_keep_their_order(tiny_unet, tiny_scheduler, tmp_path):
    names = {i: f"class of {i}" for i in range(12)}
    DDPMPaperPipeline(tiny_unet(num_class_embeds=12), tiny_scheduler(), id2label=names).save_pretrained(tmp_path)
    assert list(DDPMPaperPipeline.from_pretrained(tmp_path).id2label.items()) == list(names.items())


def test_an_unnamed_pipeline_says_nothing_of_names(tiny_unet, tiny_scheduler, tmp_path):
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(tmp_path)
    assert "id2label" not in (tmp_path / "model_index.json").read_text()


def test_stocks_network_with_classes_draws(tiny_scheduler):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    stock = UNet2DModel(8, 3, 3, layers_per_block=1, norm_num_groups=4, num_class_embeds=3, **blocks)
    pipe = quiet(DDPMPaperPipeline(stock.eval(), tiny_scheduler(), id2label=NAMES))
    assert not torch.equal(drawn(pipe, class_labels="cat"), drawn(pipe, class_labels="3"))
    with pytest.raises(ValueError, match="needs class_labels"):
        drawn(pipe)


def test_stocks_other_class_embeddings_are_refused_by_name(tiny_scheduler):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    stock = UNet2DModel(8, 3, 3, layers_per_block=1, norm_num_groups=4, class_embed_type="timestep", **blocks)
    pipe = quiet(DDPMPaperPipeline(stock.eval(), tiny_scheduler()))
    for options in ({}, {"class_labels": 1}, {"class_labels": torch.tensor([1] * 4)}):
        with pytest.raises(ValueError, match="class_embed_type='timestep'"):
            drawn(pipe, **options)


@pytest.mark.parametrize("label", [None, "dog, wolf", 0])
def test_stocks_pipeline_gets_one_class(pipe, label):
    stock = pipeline_to_stock(pipe, label)
    assert type(stock) is DDPMPipeline and stock.unet.config["num_class_embeds"] is None
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 5
    with torch.no_grad():
        expected = pipe.model_output(x, t, [label] * 2)
        torch.testing.assert_close(stock.unet(x, t).sample, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="unconditional"):
        pipeline_to_stock(DDPMPaperPipeline(given_class(pipe.unet, 0), pipe.scheduler), "cat")


def test_names_outlive_a_conversion_from_stock(pipe, tiny_scheduler):
    stock = DDPMScheduler.from_config(pipe.scheduler.config)
    ours = pipeline_from_stock(DDPMPaperPipeline(to_stock(pipe.unet), stock, NAMES))
    assert ours.id2label == NAMES


def test_one_class_is_taken_from_networks_that_have_some(tiny_unet, tiny_mlp, tiny_scheduler):
    with pytest.raises(ValueError, match="unet is a DDPMPaperMLP"):
        given_class(tiny_mlp(num_class_embeds=3), 0)
    with pytest.raises(ValueError, match="name one class"):
        pipeline_to_stock(DDPMPaperPipeline(tiny_unet(num_class_embeds=3), tiny_scheduler()))


@pytest.mark.parametrize("labels", ["cat", ["cat"], [0, 1, 2], ()], ids=str)
def test_samples_drawn_together_have_a_label_each(pipe, labels):
    from accelerate import Accelerator

    with pytest.raises(ValueError, match="one for each of 2 samples"):
        sample_together(Accelerator(cpu=True), pipe, 2, class_labels=labels)
    expected = sample_together(Accelerator(cpu=True), pipe, 2, class_labels=[1, 0])
    assert torch.equal(sample_together(Accelerator(cpu=True), pipe, 2, class_labels=torch.tensor([1, 0])), expected)


def test_files_are_coded_without_labels(pipe):
    """The codec asks the network without a label."""
    levels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pipe.unet.double()
    chain = fit_chain(pipe, levels, 3, num_levels=256)
    encoded = compress(pipe, levels, num_levels=256, chain=chain)
    assert torch.equal(decompress(pipe, encoded.data).levels, levels)
