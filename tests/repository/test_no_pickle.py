"""No pickle is written or read, and nothing is run that a file says: in our code by its text, in a run by watching it.

What others do: PyTorch's and `datasets`' own worker processes are started with multiprocessing, which sends its
arguments as pickles through pipes of this run (with `--num_workers`, and for a compiled network); accelerate's
`broadcast_object_list` sends the processes of one run small lists as pickles, over their own connections. Neither
comes from a file or from another machine's user. Saved files are never among them.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [*(ROOT / "ddpm_hf").rglob("*.py"), *(ROOT / "training").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
) + [ROOT / "dev.py"]

BANNED_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "load_state", "save_state"),
    *("np.fromfile", "np.savez", "np.savez_compressed", "pd.read_pickle", "read_pickle", "to_pickle"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"),
}
# file, call: why it may stay
ALLOWED = {
    ("benchmarks/speed/checkpoint.py", "self.stock.accelerator.save_state"): "the peer's own way, timed beside ours",
    ("benchmarks/uses/checkpoints.py", "torch.save"): "tensors alone: the files of others, which users bring",
    ("ddpm_hf/convert/pytorch_ports.py", "torch.load"): "tensors alone, of a file that the user named to be converted",
    ("ddpm_hf/demo/models.py", "load_model with trust_remote_code"): "the option of that name, off by default",
    ("ddpm_hf/evaluation/evaluator.py", "load_model with trust_remote_code"): "as it was asked for, off by default",
    ("ddpm_hf/hub/loading.py", "load_pipeline with trust_remote_code"): "as it was asked for, off by default",
    ("benchmarks/hard/child.py", "eval"): "tables as a user would make them, in words of that benchmark's own files",
}
MUST_BE_SAFE = {
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
SAFE_LOADERS = {"yaml.BaseLoader", "yaml.SafeLoader", "BaseLoader", "SafeLoader"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or of attributes of one; `().c` of an attribute of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '()'}.{node.attr}"
    return ""


def faults_of(source: str) -> Iterator[str]:
    """What a file does that it must not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        yield from (f"import {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        yield from (f"import {name}" for name in names if name in ("torch.load", "torch.save", "os.system"))
        if isinstance(node, ast.Call):
            yield from faults_of_call(node)


def faults_of_call(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    last = name.rpartition(".")[2]
    if name in BANNED_CALLS or last in ("load_state", "save_state", "read_pickle", "to_pickle"):
        yield name
    if name in MUST_BE_SAFE:
        argument, value = MUST_BE_SAFE[name]
        found = given.get(argument)
        if not (isinstance(found, ast.Constant) and found.value is value):
            yield f"{name} without {argument}={value}"
    if name in ("yaml.load", "yaml.load_all") and dotted(given.get("Loader", ast.Constant(None))) not in SAFE_LOADERS:
        yield f"{name} without a safe Loader"
    for argument, value in (
        ("shell", True),
        ("allow_pickle", True),
        ("weights_only", False),
        ("trust_remote_code", True),
    ):
        found = given.get(argument)
        if found is not None and not (isinstance(found, ast.Constant) and found.value is not value):
            yield f"{name} with {argument}"


def test_no_file_of_ours_pickles_or_runs_text():
    assert {path.parent.name for path in SOURCES} >= {"ddpm_hf", "unet", "scheduler", "training", "benchmarks"}
    for path in SOURCES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        assert [fault for fault in faults_of(text) if (name, fault) not in ALLOWED] == [], name


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "import pickle"),
        ("import pickle as p", "import pickle"),
        ("from pickle import loads", "import pickle"),
        ("import os, dill", "import dill"),
        ("from torch import load", "import torch.load"),
        ("torch.load('x')", "torch.load"),
        ("torch.load('x')", "torch.load without weights_only=True"),
        ("torch.load('x', weights_only=given)", "torch.load without weights_only=True"),
        ("torch.load('x', weights_only=False)", "torch.load with weights_only"),
        ("accelerator.save_state('x')", "accelerator.save_state"),
        ("self.accelerator.load_state('x')", "self.accelerator.load_state"),
        ("run().load_state('x')", "().load_state"),
        ("np.load('x')", "np.load without allow_pickle=False"),
        ("np.load('x', allow_pickle=True)", "np.load with allow_pickle"),
        ("np.load('x', allow_pickle=given)", "np.load without allow_pickle=False"),
        ("np.save('x', y)", "np.save without allow_pickle=False"),
        ("yaml.load(text)", "yaml.load without a safe Loader"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load without a safe Loader"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("os.system(text)", "os.system"),
        ("subprocess.run(text, shell=True)", "subprocess.run with shell"),
        ("subprocess.run(text, shell=given)", "subprocess.run with shell"),
        ("DiffusionPipeline.from_pretrained(x, trust_remote_code=True)", "with trust_remote_code"),
    ],
)
def test_the_scan_sees(source, fault):
    assert any(fault in found for found in faults_of(source))


@pytest.mark.parametrize(
    "source",
    [
        "module.eval()",
        "made(x).eval()",
        "network.compile()",
        "re.compile(x)",
        "np.load('x', allow_pickle=False)",
        "yaml.load(text, Loader=yaml.BaseLoader)",
        "yaml.safe_load(text)",
        "subprocess.run(words)",
        "subprocess.run(words, shell=False)",
    ],
)
def test_the_scan_lets_pass(source):
    assert list(faults_of(source)) == []


# ---- a run in which pickle is poisoned -----------------------------------------------------------------------------

# Everything is imported first: what libraries pickle while they are imported is not ours.
PROGRAM = r"""
import io, pathlib, pickle, sys

sys.path.insert(0, sys.argv[2])
import _pickle
import torch
import datasets, matplotlib.pyplot, sklearn.datasets
import diffusers, transformers
from accelerate.state import AcceleratorState
from training import train as train_py
from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.hub import publishing as hub
from ddpm_hf.cli import main

folder = pathlib.Path(sys.argv[1])
used = []

def poisoned(name):
    def fail(*args, **kwargs):
        used.append(name)
        raise AssertionError(f"{name} was used")
    return fail

for module in (pickle, _pickle):
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        setattr(module, name, type(name, (), {"__init__": poisoned(f"pickle.{name}")}))
for name in ("_Pickler", "_Unpickler"):
    setattr(pickle, name, type(name, (), {"__init__": poisoned(f"pickle.{name}")}))
torch.load, torch.save = poisoned("torch.load"), poisoned("torch.save")
file = io.BytesIO()
for use in (lambda: pickle.loads(b"N."), lambda: pickle.Pickler(file), lambda: _pickle.Unpickler(file)):
    try:  # the poison works
        use()
    except AssertionError:
        continue
    sys.exit("pickle can still be used")
assert len(used) == 3
used.clear()

words = ["--num_train_timesteps=20", "--beta_end=0.5", "--block_out_channels", "8", "--layers_per_block=1",
         "--attention_resolutions", "--norm_num_groups=4", "--global_batch_size=16", "--cpu_threads=1",
         "--checkpoint_every=2", "--log_every=1", "--sample_every=2", "--num_samples=4", "--warmup_steps=0",
         "--ema_decay=0.5", f"--output_dir={folder / 'run'}"]
for steps in (2, 4):  # the second goes on from the first
    AcceleratorState._reset_state(True)
    train_py.main([*words, f"--num_steps={steps}"])
main(["sample", str(folder / "run"), "--seeds", "0-1", "-o", str(folder / "x.png")])
main(["convert", str(folder / "run"), str(folder / "stock"), "--to", "stock"])
main(["convert", str(folder / "stock"), str(folder / "ours")])
pipe = DDPMPaperPipeline.from_pretrained(folder / "ours")
pipe.save_pretrained(folder / "saved")
card = hub.card_or_plain(folder / "run", folder / "run", "user/name", revision=None, license=None)
assert "user/name" in card
assert not used, used
print("used:", used, "steps:", sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()))
"""


@pytest.mark.slow
def test_training_resuming_sampling_converting_and_the_card_use_no_pickle(tmp_path):
    environment = {
        **os.environ,
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "huggingface"),
        "DDPM_HF_CACHE": str(tmp_path / "cache"),
        "MPLBACKEND": "agg",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "used: [] steps: ['step-2', 'step-4']" in done.stdout
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl", ".ckpt", ".pickle"}, suffixes
