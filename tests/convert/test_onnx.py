"""Networks as ONNX files: the same outputs in onnxruntime for any batch, drawn by, and refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from custom_nets import OwnNet
from torch import nn

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import main
from ddpm_hf.convert import OnnxNetwork, export_onnx, onnx as onnx_files, to_stock
from ddpm_hf.likelihood import bits_per_dim

pytestmark = pytest.mark.slow  # an export takes seconds
BATCHES = (1, 2, 63, 64, 140)


NETWORKS: dict[str, Any] = {
    "images": lambda unet, mlp: unet(),
    "rectangles": lambda unet, mlp: unet(sample_size=(4, 8), out_channels=6),
    "classes": lambda unet, mlp: unet(num_class_embeds=4, null_class=3),
    "every label needed": lambda unet, mlp: unet(num_class_embeds=3),
    "points": lambda unet, mlp: mlp(),
    "stock": lambda unet, mlp: to_stock(unet()),
    "own": lambda unet, mlp: OwnNet().eval(),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tiny_unet, tiny_mlp, tmp_path_factory) -> tuple[Any, Path, Any]:
    """A network, its file, and the difference that the export measured."""
    torch.manual_seed(0)
    unet, path = NETWORKS[request.param](tiny_unet, tiny_mlp), tmp_path_factory.mktemp("onnx") / "model.onnx"
    return unet, path, export_onnx(unet, path)


def inputs_for(session: Any, size: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(size)
    shape = next(given.shape for given in session.get_inputs() if given.name == "sample")
    inputs = {"sample": draw.standard_normal((size, *shape[1:]), dtype=np.float32)}
    inputs["timestep"] = draw.integers(0, 1000, size)
    if any(given.name == "class_labels" for given in session.get_inputs()):
        inputs["class_labels"] = draw.integers(0, 3, size)
    return inputs


def asked(unet: nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors["timestep"] = tensors["timestep"].expand(len(tensors["sample"]))
    with torch.no_grad():
        return unet(**tensors).sample.numpy()


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("one_t", [False, True])
def test_any_batch_is_as_in_pytorch(exported, size, one_t):
    """By onnxruntime alone, as a program without this package would ask it."""
    unet, path, difference = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = inputs_for(session, size)
    if one_t:
        inputs["timestep"] = inputs["timestep"][:1]
    (output,) = session.run(None, inputs)
    expected = asked(unet, inputs)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert 0 <= difference.largest < 1e-5 * max(1, difference.output)


def test_other_numbers_of_timesteps_are_refused_by_the_runtime(exported):
    _, path, _ = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = inputs_for(session, 3)
    with pytest.raises(Exception, match="Expand|dimension"):
        session.run(None, {**inputs, "timestep": inputs["timestep"][:2]})


def test_nothing_of_this_machine_is_in_the_file(exported):
    unet, path, _ = exported
    content = path.read_bytes()
    assert not [
        word
        for word in (b".py", b"site-packages", str(Path.home()).encode(), str(Path.cwd()).encode())
        if word in content
    ]
    model = onnx.load(path)
    metadata = {each.key: each.value for each in model.metadata_props}
    config = json.loads(metadata["ddpm_hf.config"])
    assert config["in_channels"] == unet.config["in_channels"]
    assert config["num_class_embeds"] == unet.config.get("num_class_embeds")


def test_the_network_of_a_file_goes_into_pipeline_and_bound(exported, tiny_scheduler):
    unet, path, _ = exported
    learned = unet.config.get("out_channels") == 2 * unet.config["in_channels"]
    network, scheduler = OnnxNetwork(path), tiny_scheduler(variance_type="learned" if learned else "fixed_large")
    pipe, plain = DDPMPaperPipeline(network, scheduler), DDPMPaperPipeline(unet, scheduler)
    labels: Any = {"class_labels": [0, 2]} if plain.classes else {}
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    options = {"seeds": [0, 1], "output_type": "latent", **labels}
    torch.testing.assert_close(pipe(**options).images, plain(**options).images, atol=1e-4, rtol=0)
    x = torch.rand(2, *plain.sample_shape) * 2 - 1
    bounds = [bits_per_dim(each, scheduler, x, seed=0, **labels).total_b for each in (network, unet)]
    torch.testing.assert_close(*bounds, rtol=1e-3, atol=0)


def test_labels_of_a_file(exported):
    unet, path, _ = exported
    network, x = OnnxNetwork(path), torch.zeros(2, *DDPMPaperPipeline(unet, None).sample_shape)
    count, null_class = unet.config.get("num_class_embeds"), unet.config.get("null_class")
    if not count:
        with pytest.raises(ValueError, match="this network is unconditional"):
            network(x, 3, class_labels=0)
        return
    with pytest.raises(ValueError, match="class_labels=.* must be integers from 0 to"):
        network(x, 3, class_labels=count)
    if null_class is None:
        with pytest.raises(ValueError, match="this network needs class_labels"):
            network(x, 3)
    else:
        assert torch.equal(network(x, 3).sample, network(x, 3, class_labels=null_class).sample)


# ---- what is refused, and leaves no file ---------------------------------------------------------------------------


class Alternating(OwnNet):
    """A network that treats batches of 64 and more in another way, as stock's upsampling does."""

    def forward(self, sample, timestep):
        output = super().forward(sample, timestep)
        return output if sample.shape[0] >= 64 else super().forward(sample * 2, timestep)


def test_code_that_looks_at_the_batch_is_refused(tmp_path):
    """PyTorch exports the one way that its example took, and only the comparison notices."""
    with pytest.raises(ValueError, match="onnxruntime computes something else, by "):
        export_onnx(Alternating(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Counting(OwnNet):
    """To PyTorch's exporter `len` is a number."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep.expand(len(sample)))


def test_code_that_asks_for_len_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not run in batches of 1: .* asks for len\(x\).* write x.shape\[0\]"):
        export_onnx(Counting(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_refused(tiny_mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(
        onnx_files.OnnxNetwork,
        "forward",
        lambda self, sample, timestep: onnx_files.UNet2DOutput(sample=sample * 0 + 3),
    )
    with pytest.raises(ValueError, match="onnxruntime computes something else, by "):
        export_onnx(tiny_mlp(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(name, tiny_mlp, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=rf"{name}.*pip install 'ddpm_hf\[export\]'"):
        export_onnx(tiny_mlp(), tmp_path / "model.onnx")


def test_other_files_are_no_networks(tmp_path):
    (tmp_path / "text.onnx").write_text("no ONNX")
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([identity], "g", values[:1], values[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "other.onnx")
    for name in ("text.onnx", "other.onnx", "absent.onnx"):
        with pytest.raises(ValueError, match=f"{name} is no network that ddpm-hf export wrote"):
            OnnxNetwork(tmp_path / name)


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The file of the digits that come with the repository."""
    path = tmp_path_factory.mktemp("digits") / "new" / "digits.onnx"
    main(["export", "model_cards/ddpm-digits", str(path), "--batches", "1", "64"])
    return path


@pytest.fixture(scope="module")
def colour(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws 8×8 images in colour."""
    folder = tmp_path_factory.mktemp("colour")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


class Looping(OwnNet):
    """A network whose code asks for the numbers in a tensor."""

    def forward(self, sample, timestep):
        return super().forward(sample * (2 if float(timestep[0]) > 5 else 1), timestep)


def test_code_that_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Looping cannot be exported for any batch: "):
        export_onnx(Looping(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_states_the_difference(tiny_mlp, tiny_scheduler, tmp_path, capsys):
    points = str(tmp_path / "points")
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(points)
    main(["export", points, str(tmp_path / "points.onnx"), "--batches", "3"])
    first, second = capsys.readouterr().out.splitlines()
    size = (tmp_path / "points.onnx").stat().st_size
    assert first == f"{tmp_path / 'points.onnx'}: {size:,} bytes, for any batch and t of [1] or [B]"
    assert second.startswith("in onnxruntime at most ") and second.endswith("(batches of 3)")
    assert float(second.split()[4]) < 1e-5


def test_the_weights_that_were_asked_for_are_exported(tiny_mlp, tiny_scheduler, tmp_path):
    points, network = tmp_path / "points", tiny_mlp()
    DDPMPaperPipeline(network, tiny_scheduler()).save_pretrained(points)
    other = tiny_mlp()
    for parameter in other.parameters():
        parameter.data.add_(0.1)
    other.save_pretrained(points / "unet", variant="other")
    main(["export", str(points), str(tmp_path / "x.onnx"), "--batches", "3", "--variant", "other"])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found, expected, plain = (each(x, torch.tensor([5])).sample for each in
                              (OnnxNetwork(tmp_path / "x.onnx"), other, network))  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 0.01


def test_digits_drawn_in_onnxruntime(digits, tmp_path):
    words = ["sample", "model_cards/ddpm-digits", "--seeds", "0-3", "--scheduler", "ddim", "--steps", "20"]
    main([*words, "-o", str(tmp_path / "plain.npy")])
    main([*words, "--onnx", str(digits), "-o", str(tmp_path / "onnx.npy")])
    plain, drawn = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "onnx"))
    assert plain.std() > 0.2
    np.testing.assert_allclose(drawn, plain, atol=1e-4)


def test_timesteps_between_two_are_refused(digits):
    network, x = OnnxNetwork(digits), torch.zeros(2, 1, 8, 8)
    assert torch.equal(network(x, torch.tensor([3.0, 3.0])).sample, network(x, 3).sample)
    with pytest.raises(ValueError, match="timestep 3.5: the file knows whole ones; take another scheduler, or steps"):
        network(x, torch.tensor(3.5))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "{images}", "--onnx", "{digits}"], "has in_channels=1, "),
        (
            ["sample", "model_cards/ddpm-digits", "--onnx", "{digits}", "--fast"],
            "leave out --fast, --size and --dtype",
        ),
        (["sample", "model_cards/ddpm-digits", "--onnx", "{digits}", "--size", "16"], "leave out --fast, --size"),
        (["sample", "model_cards/ddpm-digits", "--onnx", "absent.onnx"], "absent.onnx is no network"),
        (["export", "{images}", "model.bin"], "give the name of a .onnx file"),
        (["export", "{images}", "{digits}"], "digits.onnx exists; give another name"),
        (["export", "{images}", "{tmp}/a.onnx", "--batches", "0"], "--batches 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(words, message, digits, colour, tmp_path):
    places = {"images": colour, "digits": digits, "tmp": tmp_path}
    given = [word.format(**places) for word in words]
    if given[0] == "sample":
        given += ["-o", str(tmp_path / "a.npy")]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert message in str(ended.value.code)


# ---- torch.export --------------------------------------------------------------------------------------------------


def test_torch_export_keeps_the_batch_dynamic(tiny_unet):
    unet, batch = tiny_unet(), torch.export.Dim("batch", min=1)
    example = (torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64))
    program = torch.export.export(unet, example, dynamic_shapes={"sample": {0: batch}, "timestep": {0: batch}})
    for size in BATCHES:
        x, t = torch.randn(size, 3, 8, 8), torch.arange(size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x, t).sample, unet(x, t).sample, atol=1e-5, rtol=0)
