"""Networks of other people's in the pipeline: drawn with, saved, loaded, uploaded, or refused with the reason."""

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_nets import BareTensor, OwnNet, OwnUNet, Plain
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperUNet
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.pipeline_ddpm_paper import PIPELINE_FILES, files_matching

SMALL: Any = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "norm_num_groups": 4,
}
NETWORKS = {
    "own": lambda: OwnNet(width=6),
    "subclass": lambda: OwnUNet(sample_size=8, in_channels=1, out_channels=1, **SMALL),
}


def drawn(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(seeds=[0, 1], output_type="latent").images


def same(first: Tensor, second: Tensor) -> None:
    """Weights in a file lie less well in memory, which shows in the rounding of sums; ours are copied first."""
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.fixture(params=NETWORKS)
def saved(request, tiny_scheduler, tmp_path, caplog, carried_code) -> tuple[DDPMPaperPipeline, Path]:
    """A pipeline of an own network, and the folder it was saved in without a word."""
    torch.manual_seed(0)
    pipe = DDPMPaperPipeline(NETWORKS[request.param](), tiny_scheduler())
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path / "saved")
    assert not caplog.records
    return pipe, tmp_path / "saved"


def test_own_networks_load_when_they_are_given(saved, monkeypatch):
    pipe, folder = saved
    monkeypatch.setitem(sys.modules, "own_custom_nets", None)  # an import of what the index names would fail
    unet = type(pipe.unet).from_pretrained(folder / "unet")
    loaded = DDPMPaperPipeline.from_pretrained(folder, unet=unet)
    assert loaded.unet is unet
    same(drawn(loaded), drawn(pipe))


@pytest.mark.parametrize("pipeline_class", [DDPMPaperPipeline, DiffusionPipeline])
def test_own_networks_load_by_trust_and_are_saved_again(saved, pipeline_class, tmp_path):
    pipe, folder = saved
    loaded = pipeline_class.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded.unet) is not type(pipe.unet)  # it came from the file in the checkpoint
    same(drawn(loaded), drawn(pipe))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["unet"][0] == "own_custom_nets"
    same(drawn(pipeline_class.from_pretrained(tmp_path / "again", trust_remote_code=True)), drawn(pipe))


def test_own_code_runs_only_by_trust(saved, tmp_path):
    _, folder = saved
    carried = folder / "unet" / "own_custom_nets.py"
    carried.write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n" + carried.read_text())
    message = (
        "unet is .*own_custom_nets.*; pass unet=MyNetwork.from_pretrained.*, or trust_remote_code=True, which runs"
    )
    with pytest.raises(ValueError, match=message):
        DDPMPaperPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)
    assert not (tmp_path / "canary").exists()
    DDPMPaperPipeline.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "canary").exists()


def test_trust_does_not_reach_other_modules(saved):
    _, folder = saved
    index = json.loads((folder / "model_index.json").read_text())
    for library in ("json", "own_nets/../x", "own_nets.more"):
        (folder / "model_index.json").write_text(json.dumps({**index, "unet": [library, "OwnNet"]}))
        with pytest.raises(ValueError, match="known are diffusers"):
            DDPMPaperPipeline.from_pretrained(folder, trust_remote_code=True)


def test_what_is_given_is_for_one_call_only(saved):
    pipe, folder = saved
    with pytest.raises(ValueError, match="scheduler"):
        DDPMPaperPipeline.from_pretrained(folder, unet=pipe.unet, scheduler=pipe.unet)
    with pytest.raises(ValueError, match="known are diffusers"):
        DDPMPaperPipeline.from_pretrained(folder)


def test_the_code_is_uploaded_with_the_network(saved):
    _, folder = saved
    (folder / "unet" / "notes.py").write_text("no code of the network's")
    names = files_matching(PIPELINE_FILES, folder)
    assert {name for name in names if name.endswith(".py")} == {
        *("pipeline.py", "scheduler/scheduling_ddpm_paper.py"),
        *("unet/unet_ddpm_paper.py", "unet/own_custom_nets.py"),
    }


def relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A network in a module that imports from its own package, and so cannot be run alone."""
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "parts.py").write_text("from custom_nets import OwnNet\n")
    (tmp_path / "own_package" / "nets.py").write_text(
        "from .parts import OwnNet\n\n\nclass Whole(OwnNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from own_package.nets import Whole  # pyright: ignore[reportMissingImports]

    return Whole


def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A network in a file that imports another one from its folder."""
    (tmp_path / "own_blocks_beside.py").write_text("from custom_nets import OwnNet\n")
    (tmp_path / "nets_beside.py").write_text(
        "from own_blocks_beside import OwnNet\n\n\nclass Beside(OwnNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from nets_beside import Beside  # pyright: ignore[reportMissingImports]

    return Beside


def nested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    class Inner(OwnNet):
        pass

    return Inner


def of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    return type("Scripted", (OwnNet,), {"__module__": "__main__"})


@pytest.mark.parametrize("make", [relative, beside, nested, of_a_script])
def test_saving_says_what_cannot_be_loaded_again(make, tiny_scheduler, tmp_path, monkeypatch, caplog):
    network_class: Any = make(tmp_path, monkeypatch)
    pipe = DDPMPaperPipeline(network_class(), tiny_scheduler())
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path / "saved")
    name = network_class.__name__
    assert f"the code of {name} ({network_class.__module__}) is not saved with it" in caplog.text
    assert f"unet={name}.from_pretrained(…, subfolder='unet')" in caplog.text
    assert not list((tmp_path / "saved" / "unet").glob("own_*"))
    with pytest.raises(ValueError, match="pass unet=MyNetwork.from_pretrained"):
        DDPMPaperPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    given = {"unet": network_class.from_pretrained(tmp_path / "saved", subfolder="unet")}
    same(drawn(DDPMPaperPipeline.from_pretrained(tmp_path / "saved", **given)), drawn(pipe))


def module_with(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def test_a_subclass_of_the_same_name_is_not_taken_for_ours(tiny_scheduler, tmp_path, monkeypatch, carried_code):
    code = """import ddpm_hf
from diffusers.models.unets.unet_2d import UNet2DOutput


class DDPMPaperUNet(ddpm_hf.DDPMPaperUNet):
    def forward(self, *args, **kwargs):
        return UNet2DOutput(sample=super().forward(*args, **kwargs).sample / 2)
"""
    made = module_with(code, tmp_path, monkeypatch, "same_name_unet")
    pipe = DDPMPaperPipeline(
        made.DDPMPaperUNet(sample_size=8, in_channels=1, out_channels=1, **SMALL), tiny_scheduler()
    )
    pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code=True, which runs unet/own_same_name_unet.py"):
        DDPMPaperPipeline.from_pretrained(tmp_path / "saved")
    same(drawn(DDPMPaperPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)), drawn(pipe))


@pytest.mark.parametrize("name", ["OwnScheduler", "DDPMPaperScheduler"])
def test_own_schedulers_are_named_when_saved_and_load_when_given(name, tiny_unet, tmp_path, monkeypatch, caplog):
    code = f"import ddpm_hf\n\n\nclass {name}(ddpm_hf.DDPMPaperScheduler):\n    pass\n"
    own: Any = getattr(module_with(code, tmp_path, monkeypatch, f"own_scheduler_{name.lower()}"), name)
    pipe = DDPMPaperPipeline(tiny_unet(), own(100))
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path / "saved")
    assert f"the code of {name} (own_scheduler_{name.lower()}) is not saved with it" in caplog.text
    with pytest.raises(ValueError, match=rf"scheduler is .*; pass scheduler={name}.from_pretrained"):
        DDPMPaperPipeline.from_pretrained(tmp_path / "saved")
    scheduler = own.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    loaded = DDPMPaperPipeline.from_pretrained(tmp_path / "saved", scheduler=scheduler)
    assert type(loaded.scheduler) is own
    same(drawn(loaded), drawn(pipe))


@pytest.mark.parametrize("name", ["OwnPipeline", "DDPMPaperPipeline"])
def test_an_own_pipeline_is_loaded_by_its_class(name, tiny_unet, tiny_scheduler, tmp_path, monkeypatch, caplog):
    code = f"import ddpm_hf\n\n\nclass {name}(ddpm_hf.DDPMPaperPipeline):\n    pass\n"
    own: Any = getattr(module_with(code, tmp_path, monkeypatch, f"own_pipeline_{name.lower()}"), name)
    pipe = own(tiny_unet(), tiny_scheduler())
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path / "saved")
    assert f"is not saved with it: load it by {name}.from_pretrained(…)" in caplog.text
    assert not (tmp_path / "saved" / "pipeline.py").exists()
    for pipeline_class in (own, DDPMPaperPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path / "saved")
        assert type(loaded) is pipeline_class
        same(drawn(loaded), drawn(pipe))


class Unstated(OwnNet):
    """Its channels have another name."""

    @register_to_config
    def __init__(self, channels: int = 1):
        super().__init__(in_channels=channels)
        self._internal_dict = FrozenDict({"channels": channels, "sample_size": 8})


class Prompted(OwnNet):
    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Any:
        return super().forward(sample, timestep)


def test_an_answer_without_sample_is_refused_by_name(tiny_scheduler):
    pipe = DDPMPaperPipeline(BareTensor(), tiny_scheduler())
    with pytest.raises(ValueError, match="a BareTensor returns a Tensor, and must give something with .sample"):
        drawn(pipe)


def test_a_network_of_images_that_states_no_size_draws_latents_of_any(tiny_scheduler):
    network: Any = OwnNet()
    network._internal_dict = FrozenDict({key: value for key, value in network.config.items() if key != "sample_size"})
    pipe: Any = DDPMPaperPipeline(network, tiny_scheduler())
    with pytest.raises(ValueError, match="the network states no sample_size: pipe.unet.register_to_config"):
        drawn(pipe)
    assert pipe(latents=torch.zeros(2, 1, 6, 10), output_type="pt").images.shape == (2, 1, 6, 10)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Unstated(), r"an? Unstated states no in_channels: register_to_config\(in_channels=…\)"),
        (Prompted(), "forward of a Prompted needs prompt beside x_t and t"),
        (Plain(), "a Plain has no config, device, dtype; derive its class from diffusers' ModelMixin and ConfigMixin"),
        (torch.nn.DataParallel(Plain()), "a DataParallel has no .*; take its .module, and start one process per GPU"),
        (torch.tanh, "has no config, device, dtype"),
    ],
)
def test_what_cannot_be_asked_is_refused_when_it_is_set(network, message, tiny_unet, tiny_scheduler):
    with pytest.raises(ValueError, match=message):
        DDPMPaperPipeline(network, tiny_scheduler())
    pipe = DDPMPaperPipeline(tiny_unet(), tiny_scheduler())
    unet = pipe.unet
    with pytest.raises(ValueError, match=message):
        pipe.unet = network
    assert pipe.unet is unet


def test_any_function_has_a_bound(tiny_unet, tiny_scheduler):
    unet, scheduler = tiny_unet(), tiny_scheduler()
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = bits_per_dim(unet, scheduler, x, seed=0)
    for function in (lambda x, t: unet(x, t), lambda x, t: unet(x, t).sample):
        assert torch.equal(bits_per_dim(function, scheduler, x, seed=0).terms_bt, expected.terms_bt)
    plain = Plain().train()
    as_function = bits_per_dim(lambda x, t: torch.tanh(x), scheduler, x, seed=0)
    assert torch.equal(bits_per_dim(plain, scheduler, x, seed=0).terms_bt, as_function.terms_bt)
    assert plain.training


class Half(torch.nn.Module):
    """A plain module with weights, in half precision, that looks at what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def forward(self, x, t):
        assert x.dtype == torch.bfloat16
        return x * self.weight


def test_plain_modules_compute_in_their_own_precision(tiny_scheduler):
    assert bits_per_dim(Half(), tiny_scheduler(), torch.zeros(2, 1, 4, 4), seed=0).total_b.isfinite().all()


# ---- other sizes ---------------------------------------------------------------------------------------------------


def levels_with_attention(unet: Any) -> list[int]:
    return [level for level, block in enumerate(unet.down_blocks) if len(block.attentions)]


@pytest.mark.parametrize("size", [16, 4, (12, 16), [16, 8]])
def test_a_resized_network_is_loaded_as_it_was(size, tiny_unet, tiny_scheduler, tmp_path):
    pipe = DDPMPaperPipeline(tiny_unet(), tiny_scheduler())
    pipe.unet.register_to_config(sample_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    images = drawn(pipe)
    assert images.shape == (2, 3, height, width)
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPaperPipeline.from_pretrained(tmp_path)
    assert levels_with_attention(loaded.unet) == [1]
    assert torch.equal(drawn(loaded), images)


def test_a_size_and_back_is_the_same_configuration(tiny_unet):
    unet = tiny_unet(attention_resolutions=(4, 8))
    before = dict(unet.config)
    unet.register_to_config(sample_size=16)
    assert unet.config["attention_resolutions"] == (16, 8)
    unet.register_to_config(sample_size=8)
    after = {name: value for name, value in unet.config.items() if name != "attention_resolutions"}
    assert after == {name: value for name, value in before.items() if name != "attention_resolutions"}
    assert set(unet.config["attention_resolutions"]) == {4, 8}


def test_the_same_size_changes_nothing(tiny_unet):
    unet = tiny_unet(attention_resolutions=(4, 32))
    unet.register_to_config(sample_size=8)
    assert unet.config["attention_resolutions"] == (4, 32)


@pytest.mark.parametrize("size", [15, "16", (8, 9), 0])
def test_sizes_that_the_network_cannot_have_are_refused(size, tiny_unet):
    unet = tiny_unet()
    with pytest.raises(ValueError, match="sample_size=.* divisible by 2"):
        unet.register_to_config(sample_size=size)
    assert unet.config["sample_size"] == 8


def test_latents_may_have_another_size(tiny_unet, tiny_scheduler):
    pipe = DDPMPaperPipeline(tiny_unet(), tiny_scheduler())
    noise = torch.randn(2, 3, 12, 6, generator=torch.Generator().manual_seed(0))
    images = pipe(latents=noise, seeds=[0, 1], output_type="latent").images
    assert images.shape == noise.shape
    resized = DDPMPaperUNet.from_config({**pipe.unet.config, "sample_size": (12, 6), "attention_resolutions": (6,)})
    resized.load_state_dict(pipe.unet.state_dict())
    other = DDPMPaperPipeline(resized, tiny_scheduler())
    assert torch.equal(other(latents=noise, seeds=[0, 1], output_type="latent").images, images)
    with pytest.raises(ValueError, match=r"height and width \(12, 5\) must be divisible by 2"):
        pipe(latents=noise[..., :5])
