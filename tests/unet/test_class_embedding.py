"""Networks that are conditional on labels: the class embedding, its null row, stock's arithmetic, and refusals."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_hf import DDPMPaperMLP, DDPMPaperUNet
from ddpm_hf.convert import from_stock, to_stock

ROWS = {"num_class_embeds": 4, "null_class": 3}


def samples(network: Any, count: int = 4, seed: int = 0) -> Tensor:
    shape = (count, 2) if isinstance(network, DDPMPaperMLP) else (count, 3, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["unet", "mlp"])
def make(request, tiny_unet, tiny_mlp) -> Any:
    """make(**config): a tiny network of either kind with random weights."""
    return {"unet": tiny_unet, "mlp": tiny_mlp}[request.param]


@torch.no_grad()
def test_the_class_is_added_to_the_time_embedding(make):
    """As in a network without classes whose time embedding has that vector in its last bias."""
    network, plain = make(**ROWS), make()
    weights = network.state_dict()
    classes = weights.pop("class_embedding.weight")
    x, t = samples(network), torch.tensor([0, 3, 500, 999])
    for label in range(4):
        bias = weights["time_embedding.linear_2.bias"] + classes[label]
        plain.load_state_dict({**weights, "time_embedding.linear_2.bias": bias})
        torch.testing.assert_close(network(x, t, label).sample, plain(x, t).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_sample_has_its_own_label_and_without_one_the_null_row(make):
    network = make(**ROWS)
    x, labels = samples(network), torch.tensor([2, 0, 3, 1])
    together = network(x, 7, labels).sample
    for i, label in enumerate(labels.tolist()):
        torch.testing.assert_close(network(x[i : i + 1], 7, label).sample[0], together[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(network(x, 7).sample, network(x, 7, 3).sample)
    assert torch.equal(network(x, 7).sample, network(x, 7, torch.full((4,), 3, dtype=torch.int32)).sample)
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (4, "integers from 0 to 3"),
        (-1, "integers from 0 to 3"),
        (torch.tensor([0, 1, 2, 4]), "integers from 0 to 3"),
        (1.0, "integers"),
        (True, "integers"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.zeros(4, 1, dtype=torch.int64), r"shape \(4, 1\)"),
    ],
)
def test_unknown_labels_are_refused(make, labels, message):
    network = make(**ROWS)
    with pytest.raises(ValueError, match=message):
        network(samples(network), 7, labels)


def test_a_label_is_needed_without_a_null_row_and_unknown_without_classes(make):
    network = make(num_class_embeds=4)
    with pytest.raises(ValueError, match="needs class_labels"):
        network(samples(network), 7)
    network(samples(network), 7, 3)
    with pytest.raises(ValueError, match="unconditional"):
        make()(samples(network), 7, 0)


@pytest.mark.parametrize(
    "rows",
    [
        {"num_class_embeds": 0},
        {"num_class_embeds": 2.0},
        {"num_class_embeds": True},
        {"num_class_embeds": 4, "null_class": 4},
        {"num_class_embeds": 4, "null_class": -1},
        {"num_class_embeds": 4, "null_class": True},
        {"null_class": 0},
    ],
)
def test_impossible_rows_are_refused(make, rows):
    with pytest.raises(ValueError, match="num_class_embeds"):
        make(**rows)


def test_a_network_without_classes_is_what_it_was():
    """The same tensors from the same seed, none of them of classes, and stock's order of arguments."""
    torch.manual_seed(0)
    network = DDPMPaperUNet(sample_size=8, block_out_channels=(8,), norm_num_groups=4)
    assert network.class_embedding is None and "class_embedding.weight" not in network.state_dict()
    for kind in (DDPMPaperUNet, DDPMPaperMLP):
        assert list(inspect.signature(kind.forward).parameters) == list(
            inspect.signature(UNet2DModel.forward).parameters
        )


def test_it_travels_in_its_folder(make, tmp_path):
    network = make(**ROWS)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    x = samples(network)
    assert torch.equal(loaded(x, 7).sample, network(x, 7).sample)
    assert torch.equal(loaded(x, 7, 1).sample, network(x, 7, 1).sample)


def test_gradients_reach_the_rows_that_were_asked_for(make):
    network = make(**ROWS)
    network(samples(network), 7, torch.tensor([0, 0, 3, 3])).sample.square().mean().backward()
    norms = network.class_embedding.weight.grad.norm(dim=1)
    assert (norms > 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("labels", [0, torch.tensor([2, 0, 3, 1])])
def test_stock_computes_the_same(tiny_unet, labels):
    """To 1e-6 of the largest output, and back to exactly the same weights; stock has no word for the null row."""
    network = tiny_unet(**ROWS)
    stock, x = to_stock(network), samples(network)
    assert stock.config["num_class_embeds"] == 4
    expected = network(x, 7, labels).sample.detach()
    given = torch.as_tensor(labels).expand(4)
    torch.testing.assert_close(stock(x, 7, given).sample, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    back = from_stock(stock)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in back.state_dict().items())
    assert back.config["num_class_embeds"] == 4 and back.config["null_class"] is None
    assert from_stock(stock, null_class=3).config["null_class"] == 3


@pytest.mark.slow
def test_any_batch_exports_with_labels(tiny_unet):
    network, batch = tiny_unet(**ROWS), torch.export.Dim("B", min=2)
    arguments = samples(network), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3])
    exported = torch.export.export(network, arguments, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for count in (2, 5, 9):
        x, labels = samples(network, count), torch.arange(count) % 4
        t = torch.arange(count) * 100
        torch.testing.assert_close(
            exported.module()(x, t, labels).sample, network(x, t, labels).sample, rtol=1e-5, atol=1e-5
        )
