"""Wheel and sdist: what is in them, what they say of themselves, and that they work where nothing else is.

The environment they are installed into has just the packages that `pip install ddpm_hf` would bring, by links to the
files of those that are installed here: nothing is downloaded.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import yaml
from local_hub import TOKEN, LocalHub
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file

import ddpm_hf
from ddpm_hf.cli import build_parser

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
NAME = f"ddpm_hf-{ddpm_hf.__version__}"
PACKAGE = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ddpm_hf").rglob("*.py")}
TRAINING = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / "training").rglob("*.*") if path.suffix in (".py", ".yaml")
}
DATA = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ddpm_hf").rglob("*.pyi")} | {
    *("ddpm_hf/py.typed", "ddpm_hf/hub/card_template.md", "ddpm_hf/runs/report_template.html"),
    "ddpm_hf/machine/native/kernels.cpp",
}
CHECKPOINT = ROOT / "model_cards" / "ddpm-digits"


# ---- the version, in one place -------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    """ddpm_hf/__init__.py; the changelog is about it, and nothing else repeats it."""
    version = re.escape(ddpm_hf.__version__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", ddpm_hf.__version__)
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(rf"{version} \((unreleased|\d{{4}}-\d\d-\d\d)\)", headings[0])
    numbers = [tuple(map(int, heading.split()[0].split("."))) for heading in headings]
    assert numbers == sorted(set(numbers), reverse=True)
    pages = [ROOT / "README.md", ROOT / "CITATION.cff", ROOT / "CONTRIBUTING.md"]  # docs say what was measured with
    sources = [*(ROOT / "ddpm_hf").rglob("*"), *ROOT.glob("training/**/*"), ROOT / "pyproject.toml"]
    for path in [*pages, *sources]:
        if path.is_file() and path.suffix != ".pyc" and path.name != "__init__.py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(rf"(ddpm_hf|version)[^\n]{{0,12}}\b{version}\b", text), path


def test_the_citation_names_paper_and_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type"} <= citation.keys()
    assert citation["license"] == PROJECT["license"] and "version" not in citation
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Ho", "Jain", "Abbeel"]
    assert paper["year"] == 2020 and "arXiv:2006.11239" in json.dumps(paper)


# ---- the files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was made from it, beside `checkout`, the copy they were made of."""
    target = tmp_path_factory.mktemp("packaging") / "built"
    source = target.with_name("checkout")
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")

    def ignored(folder: str, names: list[str]) -> set[str]:
        return {*left_out(folder, names), *(["runs"] if Path(folder) == ROOT else [])}  # `ddpm_hf/runs` is no run

    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    (source / "runs").mkdir()
    (source / "runs" / "mine.py").touch()
    # --no-isolation: with setuptools as it is installed here, which pyproject.toml allows
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in target.iterdir()} == {f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl"}
    return target


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(contents(wheel)[f"{NAME}.dist-info/METADATA"].decode())


@pytest.mark.slow
def test_the_wheel_holds_package_and_training_script(built):
    """Nothing else, and byte for byte: checkpoints carry three of these files."""
    found = contents(built / f"{NAME}-py3-none-any.whl")
    sources = {name: name for name in PACKAGE | DATA} | {f"ddpm_hf/{name}": name for name in TRAINING}
    assert {name for name in found if not name.startswith(f"{NAME}.dist-info/")} == set(sources)
    checkout = built.with_name("checkout")
    for name, source in sources.items():
        assert found[name] == (checkout / source).read_bytes(), name
    assert found[f"{NAME}.dist-info/licenses/LICENSE"] == (checkout / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_sdist_holds_the_package_and_the_training_script(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        found = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in found if name.startswith("ddpm_hf.egg-info/"))}
    assert {"training/train.py", "training/configs/digits.yaml"} <= TRAINING
    build = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"}
    records = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "constraints.txt"}
    assert found - made == PACKAGE | DATA | TRAINING | build | records


@pytest.mark.slow
def test_pip_makes_the_same_wheel_of_the_sdist(built, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*command, tmp_path, built / f"{NAME}.tar.gz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.iterdir()
    assert contents(wheel) == contents(built / wheel.name)


@pytest.mark.slow
def test_the_metadata_are_those_of_pyproject(built):
    found = metadata(built / f"{NAME}-py3-none-any.whl")
    assert found["Name"] == "ddpm_hf" and found["Version"] == ddpm_hf.__version__
    assert found["License-Expression"] == "Apache-2.0" and found["Requires-Python"] == PROJECT["requires-python"]
    assert set(found.get_all("Provides-Extra", [])) == EXTRAS
    required = {str(Requirement(text)) for text in found.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert required == {str(Requirement(text)) for text in PROJECT["dependencies"]}
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


# ---- installed -----------------------------------------------------------------------------------------------------


def closure(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that these requirements bring, theirs included, as pip would choose them here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen, wanted = set(), [Requirement(name) for name in names]
    while wanted:
        requirement = wanted.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        if key[0] == "ddpm-hf":  # an extra that takes in another: as pyproject.toml has it now
            wanted += [Requirement(text) for extra in key[1] for text in PROJECT["optional-dependencies"][extra]]
            continue
        found[key[0]] = distribution = importlib.metadata.distribution(requirement.name)
        for text in distribution.requires or []:
            of_it = Requirement(text)
            extras = ["", *requirement.extras]
            if of_it.marker is None or any(of_it.marker.evaluate({"extra": extra}) for extra in extras):
                wanted.append(of_it)
    return found


def link_packages(site: Path, *names: str) -> set[str]:
    """Put the packages that these requirements bring into an environment's folder, but this one."""
    distributions = closure(*names)
    for distribution in distributions.values():
        for entry in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / entry).exists():
                (site / entry).symlink_to(Path(str(distribution.locate_file(entry))))
    return set(distributions)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and its dependencies, without any extra."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, built / f"{NAME}-py3-none-any.whl"], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    brought = link_packages(site, *PROJECT["dependencies"])
    assert "torch" in brought and not {"ddpm-hf", "transformers", "matplotlib", "gradio", "pytest"} & brought
    return environment


def run_in(environment: Path, program: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run a program of the environment, without what the tests' own environment says about Python."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [environment / "bin" / program, *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_installed_without_extras_it_imports_says_its_version_and_samples(installed, tmp_path):
    """From the package that was installed: no module comes from this checkout."""
    checked = run_in(installed, "python", "-m", "pip", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    script = f"""
import importlib.metadata, sys
import ddpm_hf
from ddpm_hf.cli import main
assert ddpm_hf.__version__ == importlib.metadata.version("ddpm_hf") == {ddpm_hf.__version__!r}
main(["sample", {str(CHECKPOINT)!r}, "--seeds", "0-1", "--scheduler", "ddim", "--steps", "2", "-o", "grid.png"])
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "ddpm_hf"), sep="\\n")
"""
    sampled = run_in(installed, "python", "-c", script, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    files = [Path(line) for line in sampled.stdout.splitlines() if line.endswith(".py")]
    assert len(files) > 5 and all(path.is_relative_to(installed) for path in files)
    assert (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.slow
def test_the_installed_command_helps_and_says_where_it_runs(installed, tmp_path):
    helped = run_in(installed, "ddpm-hf", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    (commands,) = (action.choices for action in build_parser()._actions if action.dest == "command")
    assert all(re.search(rf"^ +{command}\b", helped.stdout, re.MULTILINE) for command in commands or ())
    told = run_in(installed, "ddpm-hf", "env", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert f"ddpm_hf {ddpm_hf.__version__}" in told.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["evaluate", CHECKPOINT, "--metrics", "fid", "--dataset", "images"], "eval"),
        (["demo", CHECKPOINT], "demo"),
        (["compress", CHECKPOINT, "images", "-o", "x"], "codec"),
        (["compress", CHECKPOINT, "digits", "-o", "x"], "codec"),
        (["evaluate", CHECKPOINT, "--dataset", "digits"], "train"),
        (["train", "--num_steps", "3"], "train"),
    ],
    ids=["eval", "demo", "codec", "codec of digits", "digits", "train"],
)
def test_a_missing_extra_is_asked_for_by_its_name(installed, tmp_path, command, extra):
    """In one line, by what needs it; run before extras are brought below."""
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "one.png")
    asked = run_in(installed, "ddpm-hf", *command, cwd=tmp_path)
    assert asked.returncode == 1 and "Traceback" not in asked.stderr
    assert re.search(rf"pip install ['\"]ddpm_hf\[{extra}\]['\"]", asked.stderr.splitlines()[-1])


@pytest.mark.slow
def test_the_extra_codec_brings_what_its_page_runs(installed, tmp_path):
    """The commands below `pip install` in docs/codec.md, in few steps, and a folder of images; without `train`."""
    page = (ROOT / "docs" / "codec.md").read_text(encoding="utf-8")
    ((extra, block),) = re.findall(r'^pip install "ddpm_hf\[(\w+)\]"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    (site,) = installed.glob("lib/python*/site-packages")
    link_packages(site, *PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra])
    assert not any((site / name).exists() for name in ("datasets", "transformers", "matplotlib"))
    checked = run_in(installed, "python", "-m", "pip", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "images" / "one.png")
    folder = ["compress model_cards/ddpm-digits images -o one", "decompress model_cards/ddpm-digits one -o back"]
    commands = [*block.splitlines(), *(f"ddpm-hf {command}" for command in folder)]
    assert len(commands) == 4
    for command in commands:
        program, *words = shlex.split(command)
        less = ["--steps", "5", "--fit_images", "4"] if words[0] == "compress" else []
        done = run_in(installed, program, *words, *less, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "digits.npy").is_file()
    with Image.open(tmp_path / "back" / "one.png") as image:
        assert set(image.tobytes()) == {99}


TINY = "--num_steps 3 --global_batch_size 8 --num_train_timesteps 5 --beta_end 0.5 --num_samples 1 --sample_every 3"


@pytest.fixture
def trainable(installed) -> Path:
    """The environment with what the extra `train` brings."""
    (site,) = installed.glob("lib/python*/site-packages")
    link_packages(site, *PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"])
    return installed


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_folder(trainable, tmp_path):
    """By `ddpm-hf train`, with a config that it carries, and by a launcher of two processes."""
    config = ["--config", "training/configs/points.yaml"]
    trained = run_in(trainable, "ddpm-hf", "train", *config, *TINY.split(), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "points" / "report.html").is_file()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ddpm_hf.cli", "train"]
    trained = run_in(trainable, "python", *launcher, *TINY.split(), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "digits" / "report.html").is_file()
    few = "--stages 5 1 --num_steps 2 --global_batch_size 8 --num_samples 0 --output_dir runs/few"
    distilled = run_in(trainable, "ddpm-hf", "distill", "--teacher", "runs/digits", *few.split(), cwd=tmp_path)
    assert distilled.returncode == 0, distilled.stderr
    assert (tmp_path / "runs" / "few" / "stages" / "1-steps" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_sdists_script_trains_with_the_installed_package(trainable, built, tmp_path):
    """As for somebody who unpacks the sdist, and launches training/train.py from there."""
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(tmp_path / NAME / "training", tmp_path / "work" / "training")  # away from the sdist's own package
    trained = run_in(trainable, "python", "training/train.py", *TINY.split(), cwd=tmp_path / "work")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "work" / "runs" / "digits" / "report.html").is_file()


@pytest.mark.slow
def test_a_loop_of_ones_own_stops_goes_on_and_uploads(trainable, tmp_path):
    """The whole script of docs/own_loop.md, in six steps at once and in three and three, with the same weights."""
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    script, loading = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len([line for line in script.splitlines() if line]) < 70

    def run(folder: Path, num_steps: int, hub: LocalHub) -> None:
        folder.mkdir(exist_ok=True)
        short = script.replace("NUM_STEPS, SAVE_EVERY = 2000, 500", f"NUM_STEPS, SAVE_EVERY = {num_steps}, 3")
        assert short != script
        program = short.replace("step % 100", "step % 1").replace("num_inference_steps=50", "num_inference_steps=2")
        (folder / "own.py").write_text(program + loading.replace("range(16)", "range(2), num_inference_steps=2"))
        client = hub.client(folder / "home", token=TOKEN).items()
        variables = {name: value for name, value in client if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        command = [trainable / "bin" / "python", "own.py"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with LocalHub() as hub:
        run(tmp_path / "whole", 6, hub)
        run(tmp_path / "parts", 3, hub)
        run(tmp_path / "parts", 6, hub)
        uploaded = set(hub.files("user/name"))
    assert {"model_index.json", "samples/step-6-ema.png", "metrics.jsonl", "README.md"} <= uploaded
    last = Path("runs", "mine", "checkpoints", "step-6", "train_state")
    for name in ("model", "ema", "optimizer"):
        whole, parts = (load_file(tmp_path / run / last / f"{name}.safetensors") for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    with Image.open(tmp_path / "whole" / "mine.png") as image:
        assert image.size == (8, 8)
    lines = (tmp_path / "parts" / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
