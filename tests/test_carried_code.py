"""A checkpoint carries its code: who runs it, who does not, and from where; locally and from a Hub.

The loads happen in two processes, since the client of the Hub reads its address when it is imported: one with the
package, one that cannot import it.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from local_hub import LocalHub

from ddpm_hf import DDPMPaperPipeline

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
CARRIED = {
    "pipeline.py": "ddpm_hf/pipeline_ddpm_paper.py",
    "unet/unet_ddpm_paper.py": "ddpm_hf/unet/unet_ddpm_paper.py",
    "scheduler/scheduling_ddpm_paper.py": "ddpm_hf/scheduler/scheduling_ddpm_paper.py",
}
NAMES = ("images", "points")

# What both processes share: `digest(pipe)` identifies its samples, bit for bit.
HEAD = r"""
import hashlib, json, pathlib, sys
import torch
from diffusers import DiffusionPipeline

here = pathlib.Path(sys.argv[1])
torch.set_num_threads(1)
results = {}

def digest(pipe):
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(seeds=[0, 1], output_type="np").images
    return hashlib.sha256(samples.tobytes()).hexdigest()

def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"

def source(x):  # of one checkpoint: a folder, and a repository
    return {"local": str(here / x), "hub": f"tester/{x}"}
"""

# With the package: uploads everything, then loads it with our class.
WITH_PACKAGE = r"""
from huggingface_hub import HfApi
from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet

for name in ("images", "points"):
    pipe = DDPMPaperPipeline.from_pretrained(here / name)
    pipe.push_to_hub(f"tester/{name}")
    pipe.push_to_hub(f"tester/{name}", variant="fp16")
first = HfApi().model_info("tester/images").sha
for name in ("tampered", "second"):
    HfApi().create_repo(f"tester/{name}")
    HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=here / name)
HfApi().upload_folder(repo_id="tester/images", folder_path=here / "second")  # the same name, another commit
results["first"] = first

load = DDPMPaperPipeline.from_pretrained
for place, x in source("images").items():
    pipe = load(x)
    results[f"{place} plain"] = digest(pipe)
    half = load(x, variant="fp16", dtype=torch.float16)
    results[f"{place} half"] = [str(half.unet.dtype), half.unet.config.sample_size]
    results[f"{place} variant"] = digest(load(x, variant="fp16"))
    unet = DDPMPaperUNet.from_pretrained(x, subfolder="unet")
    scheduler = DDPMPaperScheduler.from_pretrained(x, subfolder="scheduler")
    results[f"{place} parts"] = digest(DDPMPaperPipeline(unet, scheduler))
    overridden = load(x, unet=unet, scheduler=scheduler)
    assert overridden.unet is unet and overridden.scheduler is scheduler
    results[f"{place} overridden"] = digest(overridden)
    again = DDPMPaperPipeline.from_pipe(pipe)
    assert again.unet is pipe.unet
    results[f"{place} from_pipe"] = digest(again)
    pipe.save_pretrained(here / f"once {place}")
    load(here / f"once {place}").save_pretrained(here / f"twice {place}")
    results[f"{place} saved twice"] = digest(load(here / f"twice {place}"))
    results[f"{place} local_files_only"] = digest(load(x, local_files_only=True))
results["hub revision"] = digest(load("tester/images", revision=first))
results["hub branch"] = digest(load("tester/images", revision="main"))
for place, x in source("points").items():
    results[f"{place} points"] = digest(load(x))
for place, x in source("tampered").items():
    results[f"{place} tampered"] = digest(load(x))
    pipe = load(x, unet=DDPMPaperUNet.from_pretrained(x, subfolder="unet"))
    results[f"{place} tampered parts"] = digest(pipe)
for place, x in source("second").items():  # code of another version: ours runs, for both
    results[f"{place} second"] = digest(load(x))
    results[f"{place} first again"] = digest(load(source("images")[place]))
results["carried modules"] = [name for name in sys.modules if "diffusers_modules" in name]
print(json.dumps(results))
"""

# Without the package: diffusers and the code in the checkpoint.
WITHOUT_PACKAGE = r"""
import importlib.abc

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ddpm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
for name in [name for name in sys.modules if name.partition(".")[0] == "ddpm_hf"]:
    del sys.modules[name]
assert refusal(__import__, "ddpm_hf").startswith("ModuleNotFoundError")
first = sys.argv[2]

def load(x, **kwargs):
    return DiffusionPipeline.from_pretrained(x, trust_remote_code=True, **kwargs)

def version(pipe):
    parts = (pipe, pipe.unet, pipe.scheduler)
    return [getattr(type(part), "VERSION", 1) for part in parts]

for place, x in source("images").items():
    results[f"{place} refused"] = refusal(DiffusionPipeline.from_pretrained, x)
    revision = {"revision": first} if place == "hub" else {}
    pipe = load(x, **revision)
    results[f"{place} plain"] = digest(pipe)
    half = load(x, variant="fp16", dtype=torch.float16, **revision)
    results[f"{place} half"] = [str(half.unet.dtype), half.unet.config.sample_size]
    results[f"{place} variant"] = digest(load(x, variant="fp16", **revision))
    results[f"{place} local_files_only"] = digest(load(x, local_files_only=True, **revision))
    pipe.save_pretrained(here / f"once without {place}")
    load(here / f"once without {place}").save_pretrained(here / f"twice without {place}")
    results[f"{place} saved twice"] = digest(load(here / f"twice without {place}"))
for place, x in source("points").items():
    results[f"{place} points"] = digest(load(x))
results["sequence"] = []
for x, revision in (("images", first), ("images", "main"), ("second", None), ("images", first)):
    pipe = load(f"tester/{x}", revision=revision)
    results["sequence"].append([version(pipe), digest(pipe)])
print(json.dumps(results))
"""


def results_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# After each file's own code: every class in it says that it is of another version, which takes seeds in another way.
SECOND_VERSION = """
for _class in list(globals().values()):
    if isinstance(_class, type) and _class.__module__ == __name__:
        _class.VERSION = 2

def seeded_generators(seeds):
    return [torch.Generator("cpu").manual_seed(seed + 100) for seed in seeds]
"""


def append_to_carried(folder: Path, code: str) -> None:
    for name in CARRIED:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(code)


# Without the package: a fork that forgets it, and in the slow tier an interpreter that never had it.
@pytest.fixture(scope="module", params=["fork", pytest.param("interpreter", marks=pytest.mark.slow)])
def loaded(request, tiny_unet, tiny_mlp, tiny_scheduler, tmp_path_factory):
    """(folder of checkpoints, results with the package, results without it)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, network in (("images", tiny_unet()), ("points", tiny_mlp())):
        pipe = DDPMPaperPipeline(network, tiny_scheduler(clip_sample=name == "images"))
        pipe.save_pretrained(folder / name)
        pipe.save_pretrained(folder / name, variant="fp16")
    shutil.copytree(folder / "images", folder / "tampered")
    append_to_carried(folder / "tampered", f"\nopen({str(folder / 'canary')!r}, 'w').close()\nraise SystemExit(1)\n")
    shutil.copytree(folder / "images", folder / "second")
    append_to_carried(folder / "second", SECOND_VERSION)
    home = tmp_path_factory.mktemp("home")
    with LocalHub() as server:
        streams: Any = {"capture_output": True, "text": True}
        env = server.client(home / "with", "hf_x")
        with_package = results_of(fork_server.run(["-c", HEAD + WITH_PACKAGE, folder], cwd=ROOT, env=env, **streams))
        words = ["-c", HEAD + WITHOUT_PACKAGE, str(folder), with_package["first"]]
        streams |= {"cwd": folder, "env": server.client(home / "without")}
        if request.param == "fork":
            without = results_of(fork_server.run(words, **streams))
        else:
            without = results_of(subprocess.run([sys.executable, *words], **streams))
    return folder, with_package, without


@pytest.mark.parametrize("place", ["local", "hub"])
def test_our_class_loads_it_in_every_way(loaded, place):
    _, results, _ = loaded
    ways = ("variant", "parts", "overridden", "from_pipe", "saved twice", "local_files_only")
    assert {way: results[f"{place} {way}"] for way in ways} == dict.fromkeys(ways, results["local plain"])
    assert results[f"{place} plain"] == results["hub revision"] == results["hub branch"] == results["local plain"]
    assert results[f"{place} half"] == ["torch.float16", 8]
    assert results["local points"] == results["hub points"] != results["local plain"]


@pytest.mark.parametrize("place", ["local", "hub"])
def test_our_class_never_runs_the_carried_code(loaded, place):
    folder, results, _ = loaded
    assert results[f"{place} tampered"] == results[f"{place} tampered parts"] == results["local plain"]
    assert not (folder / "canary").exists()
    assert results["carried modules"] == []


def test_the_tampered_code_would_have_shown(loaded):
    """The canary above is a real one: run as diffusers would run it, each of the files leaves its trace."""
    folder, _, _ = loaded
    for name in CARRIED:
        lines = (folder / "tampered" / name).read_text(encoding="utf-8").splitlines()[-2:]
        with pytest.raises(SystemExit):
            exec("\n".join(lines), {})
        (folder / "canary").unlink()


@pytest.mark.parametrize("place", ["local", "hub"])
def test_our_class_loads_two_versions_in_one_process(loaded, place):
    _, results, _ = loaded
    assert results[f"{place} second"] == results[f"{place} first again"] == results["local plain"]


@pytest.mark.parametrize("place", ["local", "hub"])
def test_without_the_package_the_samples_are_the_same(loaded, place):
    _, ours, results = loaded
    for way in ("plain", "variant", "saved twice", "local_files_only"):
        assert results[f"{place} {way}"] == ours["local plain"]
    assert results[f"{place} half"] == ["torch.float16", 8]
    assert results[f"{place} points"] == ours["local points"]


@pytest.mark.parametrize("place", ["local", "hub"])
def test_without_the_package_and_without_trust_diffusers_refuses(loaded, place):
    _, _, results = loaded
    assert results[f"{place} refused"].startswith("ValueError") and "trust_remote_code" in results[f"{place} refused"]


def test_without_the_package_versions_from_the_hub_follow_each_other(loaded):
    """Each load runs the code of its own revision; diffusers has no room for two of them side by side."""
    _, ours, results = loaded
    versions, digests = zip(*results["sequence"], strict=True)
    assert versions == ([1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 1, 1])
    assert digests[0] == digests[3] == ours["local plain"]
    assert digests[1] == digests[2] != ours["local plain"]


def test_the_carried_files_are_the_package_files_however_often_saved(loaded):
    folder, _, _ = loaded
    saved = [folder / f"{times} {place}" for times in ("once", "twice") for place in ("local", "hub")]
    saved += [folder / f"{times} without {place}" for times in ("once", "twice") for place in ("local", "hub")]
    for checkpoint in [folder / "images", folder / "points", *saved]:
        for name, original in CARRIED.items():
            digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (checkpoint / name, ROOT / original)}
            assert len(digests) == 1, checkpoint / name


def test_what_was_saved_without_the_package_loads_with_it(loaded):
    folder, _, _ = loaded
    expected, actual = (
        DDPMPaperPipeline.from_pretrained(folder / name)(seeds=[0], output_type="np").images
        for name in ("images", "twice without hub")
    )
    np.testing.assert_array_equal(actual, expected)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('canary').touch()\nclass Evil: pass\nDDPMPaperUNet = Evil\n"


def with_evil(images: Path, tmp_path: Path, key: str, value: object) -> Path:
    """A copy of the checkpoint whose index says so, with code of that name wherever it might be looked for."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(images, checkpoint)
    for place in (tmp_path, checkpoint, checkpoint / "unet", checkpoint / "scheduler"):
        (place / "evil.py").write_text(EVIL)
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, key: value}))
    return checkpoint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unet", ["evil", "Evil"]),
        ("unet", ["evil", "DDPMPaperUNet"]),
        ("unet", ["unet_ddpm_paper", "Evil"]),
        ("unet", ["scheduling_ddpm_paper", "DDPMPaperUNet"]),
        ("unet", ["../evil", "DDPMPaperUNet"]),
        ("scheduler", ["evil", "Evil"]),
        ("scheduler", ["os", "system"]),
        ("scheduler", ["unet_ddpm_paper", "DDPMPaperScheduler"]),
        ("_class_name", ["evil", "Evil"]),
        ("_class_name", ["evil", "DDPMPaperPipeline"]),
    ],
)
def test_an_index_that_names_other_code_is_refused_and_nothing_imported(loaded, tmp_path, monkeypatch, key, value):
    checkpoint = with_evil(loaded[0] / "images", tmp_path, key, value)
    monkeypatch.syspath_prepend(tmp_path)
    message = "contains custom code" if key == "_class_name" else f"model_index.json: {key} is .*; known are diffusers"
    with pytest.raises(ValueError, match=message):
        DDPMPaperPipeline.from_pretrained(checkpoint)
    assert "evil" not in sys.modules and not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize(("key", "value"), [("extra", ["evil", "Evil"]), ("_class_name", "Evil")])
def test_an_index_that_names_more_than_we_need_imports_none_of_it(loaded, tmp_path, monkeypatch, key, value):
    checkpoint = with_evil(loaded[0] / "images", tmp_path, key, value)
    monkeypatch.syspath_prepend(tmp_path)
    assert type(DDPMPaperPipeline.from_pretrained(checkpoint)) is DDPMPaperPipeline
    assert "evil" not in sys.modules and not list(tmp_path.rglob("canary"))
