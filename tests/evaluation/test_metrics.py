"""Image-set metrics: statistics against closed forms and definitions, extractors against what they promise."""

import importlib.util
import logging
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm_hf.evaluation import frechet_distance, inception_score, kernel_distance, load_extractor, metrics
from ddpm_hf.evaluation.metrics import Dinov2Extractor, Extractor, InceptionExtractor, metric_name
from ddpm_hf.randomness import keyed_seed

pytest.importorskip("torchmetrics")
transformers = pytest.importorskip("transformers")

INSTALL = r'pip install "ddpm_hf\[eval\]"'


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def gaussian(num_samples: int, mean: list[float], covariance: Tensor, seed: int) -> Tensor:
    """Samples whose own mean and covariance (over N − 1) are exactly the given ones, to rounding."""
    x = normal(num_samples, len(mean), seed=seed)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return torch.tensor(mean, dtype=torch.float64) + (torch.linalg.cholesky(covariance) @ white).T


# ---- names


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(1, "FID-1"), (500, "FID-500"), (1000, "FID-1k"), (2048, "FID-2048"), (49_000, "FID-49k")]
    + [(49_999, "FID-49999"), (50_000, "FID"), (60_001, "FID")],
)
def test_a_name_says_how_many_samples_below_50k(num_samples, expected):
    assert metric_name("FID", num_samples) == expected
    assert metric_name("FD-DINOv2", num_samples) == expected.replace("FID", "FD-DINOv2")


def test_no_samples_have_no_name():
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        metric_name("FID", 0)


# ---- Fréchet distance


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """For 2×2 matrices, tr (Σ_1 Σ_2)^½ = √(tr Σ_1 Σ_2 + 2 √(det Σ_1 Σ_2)). These two do not commute."""
    first, second = torch.tensor([[[2.0, 0.9], [0.9, 1.0]], [[0.5, -0.3], [-0.3, 3.0]]], dtype=torch.float64)
    product = first @ second
    root_trace = torch.sqrt(product.trace() + 2 * torch.sqrt(torch.linalg.det(product)))
    expected = 0.25 + 4.0 + first.trace() + second.trace() - 2 * root_trace
    samples = gaussian(40, [10.0, -3.0], first, seed=1)
    reference = gaussian(70, [10.5, -5.0], second, seed=2)
    assert frechet_distance([samples], [reference]) == pytest.approx(float(expected), rel=1e-10)  # all in float64


def test_frechet_distance_of_independent_features_adds_up():
    variance1, variance2 = torch.linspace(0.1, 4, 12, dtype=torch.float64), torch.full((12,), 1.5, dtype=torch.float64)
    samples = gaussian(100, [0.0] * 12, variance1.diag(), seed=1)
    reference = gaussian(200, [0.25] * 12, variance2.diag(), seed=2)
    expected = 12 * 0.25**2 + (variance1.sqrt() - variance2.sqrt()).square().sum()
    assert frechet_distance([samples], [reference]) == pytest.approx(float(expected), rel=1e-10)


def test_a_set_has_no_distance_from_itself(caplog):
    x = normal(300, 20).float()
    assert frechet_distance([x], [x]) == pytest.approx(0, abs=1e-10)  # against tr Σ = 20
    assert not caplog.records


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6, 1e8])
@pytest.mark.parametrize(("num_samples", "width"), [(10, 64), (64, 64), (300, 20), (2300, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_distance_from_itself_at_any_offset(num_samples, width, dtype, offset):
    """Also where the covariance is singular: never below 0, and above it by rounding in float64 alone.

    Eigenvalues of Σ² and of sums of x xᵀ gave -3.7e-6 for 10 samples of 64 features and -171 around 1e8.
    """
    x = (normal(num_samples, width) + offset).to(dtype)  # float32 has steps of 8 at 1e8: tr Σ is 6 times larger then
    assert 0 <= frechet_distance([x], [x]) <= 1e-10 * width


@pytest.mark.parametrize("offset", [1e3, -1e6, 1e8])
def test_a_common_offset_changes_no_distance(offset):
    """One of one kind for all features, or another for each. A feature near 1e8 is itself rounded by up to 7.5e-9."""
    x, y = normal(1200, 6, seed=1), 1.5 * normal(700, 6, seed=2) + 0.2
    expected = frechet_distance([x], [y])
    for each in (torch.full((6,), offset), offset * torch.linspace(-1, 1, 6)):
        assert frechet_distance([x + each.double()], [y + each.double()]) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_features_are_computed_with_a_warning(caplog):
    """Exact for singular covariances too: tr (Σ_1 Σ_2)^½ is the sum of the singular values of X Yᵀ / (N − 1)."""
    x, y = normal(8, 30, seed=1), 1.5 * normal(8, 30, seed=2)
    (mean_x, x0), (mean_y, y0) = ((z.mean(dim=0), z - z.mean(dim=0)) for z in (x, y))
    expected = (mean_x - mean_y).square().sum() + (x0.square().sum() + y0.square().sum()) / 7
    expected = float(expected - 2 * torch.linalg.svdvals(x0 @ y0.T / 7).sum())
    with caplog.at_level(logging.WARNING):
        assert frechet_distance([x], [y]) == pytest.approx(expected, rel=1e-12)
    assert "samples: with 8 samples of 30 features" in caplog.text and "reference: with 8" in caplog.text


# ---- kernel distance


def test_kernel_distance_is_the_unbiased_mmd_of_the_cubic_kernel():
    x, y = normal(30, 5, seed=1), 0.3 + normal(30, 5, seed=2)

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b) / 5 + 1) ** 3

    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(30) for j in range(30) if i != j) / (30 * 29)
    cross = sum(kernel(x[i], y[j]) for i in range(30) for j in range(30)) / 30**2
    mean, std = kernel_distance([x], [y], seed=0, subset_size=30)  # every subset is the whole set
    assert mean == pytest.approx(same - 2 * cross, rel=1e-12)
    assert std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_subsets_estimates_that_of_the_whole():
    x, y = normal(400, 5, seed=1), 0.3 + normal(400, 5, seed=2)
    whole, _ = kernel_distance([x], [y], seed=0, subset_size=400)
    mean, std = kernel_distance([x], [y], seed=0, subset_size=50)
    assert std > 0 and abs(mean - whole) < 4 * std / math.sqrt(100)  # 100 subsets: 4 standard errors


# ---- Inception Score


def test_inception_score_is_defined_on_ten_shuffled_splits():
    logits = 2 * normal(230, 7)
    order = torch.randperm(230, generator=torch.Generator().manual_seed(keyed_seed(3, "inception score")))
    scores = []
    for split in logits[order].numpy().reshape(10, 23, 7):
        p = np.exp(split) / np.exp(split).sum(axis=1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    assert inception_score([logits], seed=3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    assert inception_score([torch.ones(100, 1).expand(-1, 4)], seed=0) == pytest.approx((1, 0), abs=1e-12)
    certain = 1e3 * nn.functional.one_hot(torch.arange(40_000) % 4).float()
    assert inception_score([certain], seed=0)[0] == pytest.approx(4, rel=1e-2)  # splits are not perfectly balanced


# ---- what all statistics promise

STATISTICS = {
    "frechet_distance": lambda x: frechet_distance(x(), (2 * batch for batch in x())),
    "kernel_distance": lambda x: kernel_distance(x(), (2 * batch for batch in x()), seed=0, subset_size=100),
    "inception_score": lambda x: inception_score(x(), seed=0),
}


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_results_do_not_depend_on_how_the_stream_is_cut(statistic):
    features = normal(2300, 9).float()
    whole = statistic(lambda: iter([features.double()]))  # float32 features are computed with in float64
    for sizes in ([7] * 328 + [4], [1000, 0, 1300], [1, 2298, 1]):
        assert statistic(lambda sizes=sizes: iter(features.split(sizes))) == whole


@pytest.mark.filterwarnings("error")  # torchmetrics warns that it keeps features, which is meant
@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_no_random_state_is_touched_or_read(statistic):
    features = normal(200, 3)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(statistic(lambda: [features]))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_no_accelerator_is_seeded(device, monkeypatch):
    seeded = []
    monkeypatch.setattr(getattr(torch, device), "manual_seed", seeded.append)
    monkeypatch.setattr(getattr(torch, device), "manual_seed_all", seeded.append, raising=False)
    inception_score([normal(100, 3)], seed=0)
    assert not seeded


def test_another_seed_draws_other_subsets_and_splits():
    x = normal(200, 3)
    assert inception_score([x], seed=0) != inception_score([x], seed=1)
    results = {kernel_distance([x], [2 * x], seed=seed, subset_size=20) for seed in (0, 1)}
    assert len(results) == 2


def test_one_process_of_several_computes_without_the_others(monkeypatch):
    """In a distributed run, torchmetrics gathers from all processes; the others, elsewhere, would never answer."""
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for communication in ("barrier", "all_gather"):
        monkeypatch.setattr(distributed, communication, lambda *_, **__: pytest.fail("waits for other processes"))
    for statistic in STATISTICS.values():
        statistic(lambda: [normal(200, 3)])


FEATURES = torch.zeros(120, 3)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (lambda: frechet_distance([], [FEATURES]), "samples has 0 samples; it must have at least 2"),
        (lambda: frechet_distance([FEATURES], [FEATURES[:1]]), "reference has 1 samples; it must have at least 2"),
        (lambda: frechet_distance([FEATURES], [FEATURES[:, :2]]), "samples have 3 features and reference 2"),
        (lambda: kernel_distance([FEATURES], [FEATURES[:, :2]], seed=0, subset_size=9), "3 features and reference 2"),
        (
            lambda: kernel_distance([FEATURES], [FEATURES], seed=0),
            "samples has 120 samples; it must have at least 1000",
        ),
        (lambda: kernel_distance([FEATURES] * 9, [FEATURES], seed=0), "reference has 120 samples; .* at least 1000"),
        (lambda: kernel_distance([FEATURES], [FEATURES], seed=0, subset_size=1), "subset_size=1 must be at least 2"),
        (lambda: inception_score([FEATURES[:99]], seed=0), "logits has 99 samples; it must have at least 100"),
        (
            lambda: frechet_distance([FEATURES.int()], [FEATURES]),
            r"samples: .*int32 \[120, 3\]; .* float \[B, 3\]",
        ),
        (
            lambda: frechet_distance([FEATURES], [FEATURES[0]]),
            r"reference: .*float32 \[3\]; it must be float \[B, D\]",
        ),
        (lambda: inception_score([FEATURES, FEATURES[:, :2]], seed=0), r"logits: .*\[120, 2\]; .* float \[B, 3\]"),
        (
            lambda: frechet_distance([FEATURES, FEATURES / 0], [FEATURES]),
            "samples: NaN or infinity among 120 rows from 120",
        ),
        (lambda: inception_score([FEATURES + math.inf], seed=0), "logits: NaN or infinity among 120 rows from 0 on"),
    ],
)
def test_what_cannot_be_computed_is_refused(statistic, message):
    with pytest.raises(ValueError, match=message):
        statistic()


def test_importing_needs_no_extra_and_using_names_it(monkeypatch):
    for name in ("torchmetrics", "torchmetrics.image.inception", "torch_fidelity", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # makes an import fail
    spec = importlib.util.spec_from_file_location("ddpm_hf.evaluation.metrics_without_extra", metrics.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert frechet_distance([FEATURES], [FEATURES]) == 0  # which needs torch alone
    for use in (lambda: inception_score([FEATURES], seed=0), InceptionExtractor, Dinov2Extractor):
        with pytest.raises(ValueError, match=INSTALL):
            use()


# ---- extractors


class Tiny(Extractor):
    """Each channel's sum, through dropout, in float64."""

    name = "tiny"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        sums = images.double().sum(dim=(2, 3))
        return {"features": self.dropout(sums), "logits": self.layer(sums)}


@pytest.fixture
def tiny_dinov2():
    """DINOv2 with 37 × 37 positions, as the released ones, and two layers of width 8."""
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    return transformers.Dinov2Model(config)


class FakeInception(nn.Module):
    """What torch-fidelity 0.4's has of constructor and forward."""

    def __init__(self, name: str, features_list: list[str]):
        super().__init__()
        self.name, self.features_list = name, features_list
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        widths = {"2048": 2048, "logits_unbiased": 1008}
        return tuple(x.float().mean(dim=(1, 2, 3))[:, None].expand(-1, widths[key]) for key in self.features_list)


@pytest.fixture
def fake_fidelity(monkeypatch):
    module = types.SimpleNamespace(FeatureExtractorInceptionV3=FakeInception, __version__="1.2.3")
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)


def extractor_of(kind: str, request: pytest.FixtureRequest) -> Extractor:
    if kind == "tiny":
        return Tiny()
    if kind == "dinov2":
        return Dinov2Extractor(request.getfixturevalue("tiny_dinov2"))
    request.getfixturevalue("fake_fidelity")
    return InceptionExtractor()


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("tiny", {"features": (2, 3), "logits": (2, 4)}),
        ("dinov2", {"features": (2, 8)}),
        ("inception", {"features": (2, 2048), "logits": (2, 1008)}),
    ],
)
def test_extractors_keep_their_contract(kind, shapes, request):
    extractor = extractor_of(kind, request)
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    grey = images(2, 1, 8, 6)
    out = extractor(grey)
    assert {key: tuple(value.shape) for key, value in out.items()} == shapes
    for key, value in extractor(grey.repeat(1, 3, 1, 1)).items():
        assert value.dtype == torch.float32 and not value.requires_grad
        assert torch.equal(value, out[key])
    assert not torch.equal(out["features"][0], out["features"][1])


@pytest.mark.parametrize(
    "wrong",
    [images(2, 3, 8, 8).float(), images(2, 4, 8, 8), images(3, 3, 8)],
    ids=["float", "four channels", "no batch"],
)
def test_extractors_refuse_what_are_not_images(wrong):
    with pytest.raises(ValueError, match=r"images is torch\.\w+ \[[\d, ]+\]; it must be uint8 \[B, 1 or 3, H, W\]"):
        Tiny()(wrong)


def test_dinov2_gives_the_class_token_of_what_pillow_resizes(tiny_dinov2):
    """dgm-eval's transform: Pillow's bicubic on 8 bits, to [0, 1], ImageNet's statistics; images of any size."""
    extractor = Dinov2Extractor(tiny_dinov2)
    seen = {}
    tiny_dinov2.register_forward_hook(lambda _, args, out: seen.update(pixels=args[0], out=out))
    for size in ((32, 32), (300, 250)):
        batch = images(2, 3, *size)
        features = extractor(batch)["features"]
        for image, pixels in zip(batch, seen["pixels"], strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            levels = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float64)
            expected = (levels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-5)  # float32
        assert torch.equal(features, seen["out"].last_hidden_state[:, 0])


def test_dinov2_positions_are_interpolated_as_in_its_own_code(tiny_dinov2):
    """A table that holds its own coordinates shows where it is read: patch i of 16 at (i + ½) · 37 / 16.1 − ½.

    transformers has 16 for 16.1. Torch's cubic convolution (a = −¾) makes k + f − f (1 − f) (2f − 1) / 2 of x = k + f.
    """
    table = tiny_dinov2.embeddings.position_embeddings.data
    rows, columns = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    table[0, 1:, 0], table[0, 1:, 1] = rows.flatten(), columns.flatten()
    class_token = table[0, 0].clone()
    model = Dinov2Extractor(tiny_dinov2).model
    seen = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 8), 224, 224)[0]  # as its forward calls it
    assert torch.equal(seen[0], class_token)
    grid = seen[1:].view(16, 16, 8)[1:-1, 1:-1]  # at the border, the filter's four places are not all in the table
    x = (torch.arange(1, 15) + 0.5) * 37 / 16.1 - 0.5
    f = x.frac()
    expected = x - f * (1 - f) * (2 * f - 1) / 2
    torch.testing.assert_close(grid[..., 0], expected[:, None].expand(14, 14), atol=1e-4, rtol=0)  # float32, up to 36
    torch.testing.assert_close(grid[..., 1], expected[None, :].expand(14, 14), atol=1e-4, rtol=0)


def test_dinov2_loads_a_checkpoint_and_names_it(tiny_dinov2, tmp_path):
    tiny_dinov2.save_pretrained(tmp_path)
    loaded, given = Dinov2Extractor(str(tmp_path)), Dinov2Extractor(tiny_dinov2)
    assert loaded.name == f"{tmp_path} (transformers {transformers.__version__})"
    batch = images(2, 3, 8, 8)
    torch.testing.assert_close(loaded(batch)["features"], given(batch)["features"], rtol=1e-4, atol=1e-5)


def test_inception_asks_for_pooled_features_and_unbiased_logits(fake_fidelity):
    extractor = InceptionExtractor()
    assert extractor.name == "inception-v3-compat (torch-fidelity 1.2.3)"
    assert extractor.network.name == "inception-v3-compat"
    assert extractor.network.features_list == ["2048", "logits_unbiased"]


def test_extractors_are_loaded_by_name(fake_fidelity, tiny_dinov2, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers.Dinov2Model, "from_pretrained", lambda name, **_: asked.append(name) or tiny_dinov2
    )
    assert isinstance(load_extractor("inception"), InceptionExtractor)
    assert isinstance(load_extractor("dinov2"), Dinov2Extractor) and asked == ["facebook/dinov2-large"]

    source = "from torch import nn\nclass Mine(nn.Linear):\n    name = 'mine'\ndef make(): return Mine(2, 3)\n"
    (tmp_path / "own_extractors.py").write_text(
        source + "from pathlib import Path\ndef path(): return Path('mine')\nnameless = nn.Identity\nx = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = load_extractor("own_extractors:make")
    assert (mine.name, mine.training, mine.weight.requires_grad) == ("mine", False, False)
    for name, message in {
        "resnet": "extractor 'resnet' must be one of inception, dinov2, or 'package.module:factory'",
        "own_extractors:": "must be one of",
        "./own_extractors:make": "must be one of",
        "no_such_module:make": "No module named 'no_such_module'; its folder must be on PYTHONPATH",
        "own_extractors:missing": "own_extractors has no callable 'missing'",
        "own_extractors:x": "own_extractors has no callable 'x'",
        "own_extractors:path": r"gave a \w+Path; it must be a torch module with a name",
        "own_extractors:nameless": "gave a Identity; it must be a torch module with a name",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_extractor(name)
