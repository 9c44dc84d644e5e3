"""What test_hostile_files.py tries: by name, what is done to a copy of a good checkpoint, and words of its error.

The file's imports are few, so that its cases are known quickly where only their names are needed.
"""

# pyright: reportArgumentType=false

import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SECRET = "canary-5e1f0c3a"
PIPELINE, UNET = "DDPMPaperPipeline", "DDPMPaperUNet"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

Case = Callable[[Path], Any]
CASES: dict[str, tuple[Case, str]] = {}  # what is done, and words of the error, by name


def case(name: str, message: str = "") -> Callable[[Case], Case]:
    """Registers what is done to a fresh copy of a good checkpoint. `message` None: it is accepted, with no effect."""

    def register(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = function, message
        return function

    return register


NO_ERROR = "no error"  # the hostile part is ignored


class Payload:
    """Unpickled, it makes the canary folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


def payload() -> bytes:
    return pickle.dumps(Payload())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path) -> Any:
    from ddpm_hf import DDPMPaperPipeline

    return DDPMPaperPipeline.from_pretrained(folder)


def load_unet(folder: Path) -> Any:
    from ddpm_hf import DDPMPaperUNet

    return DDPMPaperUNet.from_pretrained(folder, subfolder="unet")


LOADERS = {"pipeline": load, "unet": load_unet}


# ---- pickles in disguise -------------------------------------------------------------------------------------------


def pickle_cases() -> None:
    for place, loader in LOADERS.items():

        @case(f"pickle-as-safetensors-{place}", "safetensors")
        def _(folder: Path, loader: Case = loader) -> None:
            (folder / WEIGHTS).write_bytes(payload())
            loader(folder)

        @case(f"torch-save-as-safetensors-{place}", "safetensors")
        def _(folder: Path, loader: Case = loader) -> None:
            import torch

            torch.save({"conv_in.weight": Payload()}, folder / WEIGHTS)
            loader(folder)

        for variant in ("", ".fp16"):

            @case(f"bin{variant}-{place}", "safetensors")
            def _(folder: Path, loader: Case = loader, variant: str = variant) -> None:
                """Weights in pickle alone: a good state, and a hostile one, are refused alike unless asked for."""
                import torch
                from safetensors.torch import load_file

                state = load_file(folder / WEIGHTS) if variant else {"conv_in.weight": Payload()}
                (folder / WEIGHTS).unlink()
                torch.save(state, folder / "unet" / f"diffusion_pytorch_model{variant}.bin")
                loader(folder)

        @case(f"sharded-bin-{place}", "safetensors")
        def _(folder: Path, loader: Case = loader) -> None:
            import torch

            (folder / WEIGHTS).unlink()
            torch.save({"conv_in.weight": Payload()}, folder / "unet" / "part.bin")
            index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "part.bin"}}
            (folder / "unet" / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
            loader(folder)

    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):

        @case(f"pickle-as-{name}", "not a valid JSON file")
        def _(folder: Path, name: str = name) -> None:
            (folder / name).write_bytes(payload())
            load(folder)

    @case("pickle-as-tensorflow-index", "x.index is truncated, or not the index of a TensorFlow checkpoint")
    def _(folder: Path) -> None:
        from ddpm_hf.convert import from_tf_checkpoint

        (folder / "x.index").write_bytes(payload() + bytes(64))
        from_tf_checkpoint(folder / "x")

    @case("pickled-objects-in-the-image-cache", NO_ERROR)
    def _(folder: Path) -> None:
        from ddpm_hf.data.cache import Cache, DecodeOptions

        cache = Cache(folder, "photos", "source", DecodeOptions((255, 255, 255), None))
        np.save(cache.path.with_suffix(".npy"), np.array([Payload()], dtype=object), allow_pickle=True)
        record = {"made_from": cache.made_from, "fingerprint": "", "skipped": []}
        cache.path.with_suffix(".json").write_text(json.dumps(record))
        assert cache.read() is None

    @case("pickle-as-training-state", "model.safetensors")
    def _(folder: Path) -> None:
        from ddpm_hf.runs import checkpoints

        (folder / "train_state").mkdir()
        (folder / "train_state" / "model.safetensors").write_bytes(payload())
        checkpoints.read(folder, "model")


# ---- the index and the configurations ------------------------------------------------------------------------------


def index_cases() -> None:
    known = "model_index.json: unet is "
    for number, value in enumerate(
        (
            ["os", "system"],
            ["subprocess", "Popen"],
            ["builtins", "eval"],
            ["ddpm_hf.cli", "main"],
            ["ddpm_hf.unet.unet_ddpm_paper", "nn"],
            ["/outside/evil", "Evil"],
            ["../evil", "Evil"],
            ["evil", "Evil"],
            ["evil", "DDPMPaperUNet"],
            ["unet_ddpm_paper", "Evil"],
            ["transformers", "AutoModel"],
        )
    ):

        @case(f"index-unet-{number}-{'.'.join(value).replace('/', '|')}", known)
        def _(folder: Path, value: list[str] = value) -> None:
            edit(folder / "model_index.json", unet=value)
            load(folder)

    for value, words in (
        ("../../evil", "has no class"),
        ("os", "has no class"),
        ("DiffusionPipeline", "model_index.json"),
    ):

        @case(f"index-diffusers-{value.replace('/', '|')}", words)
        def _(folder: Path, value: str = value) -> None:
            edit(folder / "model_index.json", unet=["diffusers", value])
            load(folder)

    for name, value in (("string", "os"), ("empty", []), ("three", ["diffusers", "UNet2DModel", "x"]), ("number", 3)):

        @case(f"index-unet-{name}", "model_index.json")
        def _(folder: Path, value: Any = value) -> None:
            edit(folder / "model_index.json", unet=value)
            load(folder)

    for name, value in {"of-their-own": ["evil", "Evil"], "under-our-name": ["evil", "DDPMPaperPipeline"]}.items():

        @case(f"index-class-{name}", "custom code")
        def _(folder: Path, value: Any = value) -> None:
            edit(folder / "model_index.json", _class_name=value)
            load(folder)

    @case("index-more-components", NO_ERROR)
    def _(folder: Path) -> None:
        edit(folder / "model_index.json", extra=["os", "system"], _module="evil", _evil=["evil", "Evil"])
        load(folder)

    @case("index-is-a-list", "model_index.json")
    def _(folder: Path) -> None:
        (folder / "model_index.json").write_text("[]")
        load(folder)

    @case("index-nested-deeply", "model_index.json")
    def _(folder: Path) -> None:
        (folder / "model_index.json").write_text('{"a": ' + "[" * 100_000)
        load(folder)


def configuration_cases() -> None:
    # what the file says and what the error has to
    for name, changes, words in (
        ("other-class", {"_class_name": "os.system", "_module": "evil"}, NO_ERROR),
        ("auto-map", {"auto_map": {"AutoModel": "evil.Evil"}}, NO_ERROR),
        ("other-place", {"_name_or_path": "../../outside"}, NO_ERROR),
        ("vast-channels", {"block_out_channels": [2**20] * 4, "sample_size": 2**20, "norm_num_groups": 1}, ""),
        ("odd-size", {"sample_size": [3, -4]}, "sample_size=[3, -4]"),
        ("wrong-channels", {"in_channels": 4, "out_channels": 4}, ""),
    ):

        @case(f"unet-config-{name}", words)
        def _(folder: Path, changes: dict[str, Any] = changes) -> None:
            edit(folder / "unet" / "config.json", **changes)
            load(folder)

    @case("unet-config-endless-layers", "layers_per_block")
    def _(folder: Path) -> None:
        edit(folder / "unet" / "config.json", layers_per_block=10**12)
        load(folder)

    @case("unet-config-text-for-numbers", "block_out_channels")
    def _(folder: Path) -> None:
        edit(folder / "unet" / "config.json", block_out_channels="__import__('os').system('x')")
        load(folder)

    @case("scheduler-config-endless", "num_train_timesteps")
    def _(folder: Path) -> None:
        edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
        load(folder)

    @case("scheduler-config-other-class", NO_ERROR)
    def _(folder: Path) -> None:
        edit(folder / "scheduler" / "scheduler_config.json", _class_name="../../evil", _module="os")
        load(folder)

    @case("scheduler-config-infinite", "betas must lie inside (0, 1)")
    def _(folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text('{"num_train_timesteps": 10, "beta_end": Infinity}')
        load(folder)


# ---- weights -------------------------------------------------------------------------------------------------------


def safetensors_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any, start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HOSTILE_WEIGHTS = {
    "header-of-2^63-bytes": safetensors_of({}, length=2**63),
    "header-longer-than-the-file": safetensors_of({}, length=10**9),
    "header-of-no-json": safetensors_of(b"__import__('os')"),
    "header-nested-deeply": safetensors_of(b'{"a":' + b"[" * 100_000),
    "overlapping": safetensors_of({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, bytes(24)),
    "offsets-behind-the-file": safetensors_of({"a": tensor([4], 0, 2**40)}, bytes(16)),
    "offsets-backwards": safetensors_of({"a": tensor([4], 16, 0)}, bytes(16)),
    "negative-shape": safetensors_of({"a": tensor([-4], 0, 16)}, bytes(16)),
    "vast-shape": safetensors_of({"a": tensor([2**40, 2**40], 0, 16)}, bytes(16)),
    "overflowing-shape": safetensors_of({"a": tensor([2**63, 2], 0, 0)}),
    "unknown-type": safetensors_of({"a": {"dtype": "OBJECT", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "duplicate-names": safetensors_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "names-that-are-attributes": safetensors_of({"__class__": tensor([1], 0, 4)}, bytes(4)),
}


def weight_cases() -> None:
    for name, data in HOSTILE_WEIGHTS.items():

        @case(f"weights-{name}", "missing: conv_in.bias" if name == "names-that-are-attributes" else WEIGHTS)
        def _(folder: Path, data: bytes = data) -> None:
            (folder / WEIGHTS).write_bytes(data)
            load(folder)

    @case("weights-nan", "not finite: conv_in.weight")
    def _(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        state = load_file(folder / WEIGHTS)
        save_file({**state, "conv_in.weight": torch.full_like(state["conv_in.weight"], torch.nan)}, folder / WEIGHTS)
        load(folder)

    for name, target in (
        ("relative", "../../outside/secret.safetensors"),
        ("absolute", "{outside}/secret.safetensors"),
    ):

        @case(f"shards-{name}", "contains a path separator")
        def _(folder: Path, target: str = target) -> None:
            """An index whose shards lie outside; what they hold is of no use to a network, but it would be read."""
            target = target.format(outside=folder.parent / "outside")
            (folder / WEIGHTS).unlink()
            index = {"metadata": {"total_size": 4}, "weight_map": {"conv_in.weight": target}}
            (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
            load(folder)

    @case("a-link-in-an-upload", NO_ERROR)
    def _(folder: Path) -> None:
        from ddpm_hf.hub import files_to_upload

        (folder / "samples").symlink_to(folder.parent / "outside", target_is_directory=True)
        (folder / "curves.png").symlink_to(folder.parent / "outside" / "secret.png")
        (folder / "README.md").symlink_to("../outside/secret.png")
        names = {"model_index.json", "pipeline.py", "unet/config.json", "unet/unet_ddpm_paper.py", WEIGHTS}
        names |= {"scheduler/scheduler_config.json", "scheduler/scheduling_ddpm_paper.py"}
        assert set(files_to_upload(folder)) == names


# ---- carried code --------------------------------------------------------------------------------------------------


def changed_code(folder: Path) -> None:
    """The carried code, changed, and code of every name that an import from the checkpoint could find."""
    names = ["pipeline.py", "unet/unet_ddpm_paper.py", "scheduler/scheduling_ddpm_paper.py", "__init__.py"]
    for name in [*names, "unet/__init__.py", "unet/modeling.py", "ddpm_hf.py", "diffusers.py", "conftest.py"]:
        with (folder / name).open("a") as file:
            file.write("\nimport os\nos.mkdir(os.environ['CANARY'])\n")


def code_cases() -> None:
    for name, loader in LOADERS.items():

        @case(f"changed-code-{name}", NO_ERROR)
        def _(folder: Path, loader: Case = loader) -> None:
            changed_code(folder)
            loader(folder)

    @case("changed-code-scheduler", NO_ERROR)
    def _(folder: Path) -> None:
        from ddpm_hf import DDPMPaperScheduler

        changed_code(folder)
        DDPMPaperScheduler.from_pretrained(folder, subfolder="scheduler")

    @case("changed-code-without-trust", "trust_remote_code")
    def _(folder: Path) -> None:
        from diffusers import DiffusionPipeline

        changed_code(folder)
        DiffusionPipeline.from_pretrained(folder)

    @case("changed-code-sampled-and-saved", NO_ERROR)
    def _(folder: Path) -> None:
        changed_code(folder)
        pipe = load(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe(seeds=[0], num_inference_steps=1)
        pipe.save_pretrained(folder / "again")
        assert "CANARY" not in "".join(path.read_text() for path in (folder / "again").rglob("*.py"))


# ---- other files that are read -------------------------------------------------------------------------------------


def tensorflow_cases() -> None:
    sys.path.append(str(Path(__file__).parents[1] / "convert"))
    from test_tensor_bundle import index_with

    varint = b"\xff" * 8 + b"\x7f"  # 2⁶³ − 1
    for name, message, words in (
        ("vast-size", b"\x08\x01\x28" + varint, "truncated"),
        ("vast-offset", b"\x08\x01\x12\x04\x12\x02\x08\x02\x20" + varint + b"\x28\x08", "truncated"),
        ("vast-shape", b"\x08\x01\x12\x0c\x12\x0a\x08" + varint + b"\x28\x08", "truncated"),
        ("endless-number", b"\x08" + b"\xff" * 40, "not the index of a TensorFlow checkpoint"),
        ("cut-number", b"\x08\xff", "not the index of a TensorFlow checkpoint"),
        ("text-for-a-size", b"\x08\x01\x2a\x02ab", "not the index of a TensorFlow checkpoint"),
        ("number-for-a-shape", b"\x08\x01\x10\x05", "not the index of a TensorFlow checkpoint"),
    ):

        @case(f"tensorflow-{name}", words)
        def _(folder: Path, message: bytes = message) -> None:
            from ddpm_hf.convert.tensor_bundle import TensorBundle

            (folder / "v.index").write_bytes(index_with(message))
            (folder / "v.data-00000-of-00001").write_bytes(bytes(8))
            TensorBundle(folder / "v").read("v")

    @case("tensorflow-many-shards", "v.data-00099")
    def _(folder: Path) -> None:
        from ddpm_hf.convert.tensor_bundle import TensorBundle

        (folder / "v.index").write_bytes(index_with(b"\x08\x01\x18\x63\x28\x08"))
        TensorBundle(folder / "v").read("v")

    @case("tensorflow-latest-elsewhere", "../outside/secret")
    def _(folder: Path) -> None:
        from ddpm_hf.convert import from_tf_checkpoint

        (folder / "checkpoint").write_text('model_checkpoint_path: "../outside/secret"\n')
        from_tf_checkpoint(folder)


PYTHON_TAGS = {
    "apply": '!!python/object/apply:os.mkdir ["{canary}"]',
    "new": '!!python/object/new:os.mkdir ["{canary}"]',
    "name": "!!python/name:os.mkdir",
    "module": "!!python/module:evil",
}
LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def yaml_cases() -> None:
    def read(folder: Path, text: str) -> Any:
        from ddpm_hf.runs import parse_options
        from training import train as train_py

        (folder / "x.yaml").write_text(text)
        return parse_options(train_py.TrainingOptions, ["--config", str(folder / "x.yaml"), "--dataset_name=digits"])

    for name, tag in PYTHON_TAGS.items():
        for key, words in (
            ("num_steps", "num_steps"),
            ("output_dir", ""),
            ("block_out_channels", "block_out_channels"),
        ):
            if key == "output_dir" and name in ("name", "module"):
                continue  # the tag falls away, and what is left is an empty name

            @case(f"options-{name}-as-{key}", words)
            def _(folder: Path, key: str = key, tag: str = tag) -> None:
                read(folder, f"{key}: {tag.format(canary=os.environ['CANARY'])}\n")

        @case(f"card-of-options-{name}", NO_ERROR)
        def _(folder: Path, tag: str = tag) -> None:
            """The card of a run is then a plain one."""
            from ddpm_hf.hub import publishing as hub

            (folder / "options.yaml").write_text(f"dataset_name: {tag.format(canary=os.environ['CANARY'])}\n")
            card = hub.card_or_plain(folder, folder, "user/name", revision=None, license=None)
            assert "user/name" in card

    @case("options-billion-laughs", "unknown key 'a0'")
    def _(folder: Path) -> None:
        read(folder, LAUGHS)

    @case("options-billion-laughs-as-a-value", "must be a plain value or a flat list")
    def _(folder: Path) -> None:
        first, *rest = LAUGHS.splitlines()
        values = [
            line.replace(f"a{i}: ", f"{key}: ")
            for i, key, line in zip((1, 2), ("seed", "num_steps"), rest, strict=False)
        ]
        read(folder, "\n".join([first.replace("a0: ", "block_out_channels: "), *values]))

    @case("options-in-a-circle", "found unconstructable recursive node")
    def _(folder: Path) -> None:
        read(folder, "block_out_channels: &a [*a]\n")

    @case("options-nested-deeply", "lists within lists")
    def _(folder: Path) -> None:
        read(folder, "seed: " + "[" * 20_000)

    for name, words in (("card", NO_ERROR), ("reproduce", "options.yaml")):

        @case(f"{name}-of-a-billion-laughs", words)
        def _(folder: Path, name: str = name) -> None:
            from ddpm_hf.evaluation import paper_tables as paper_results
            from ddpm_hf.hub import publishing as hub

            text = LAUGHS + "dataset_name: *a11\nobjective: *a11\ntrain_data_dir: *a11\n"
            (folder / "options.yaml").write_text(text)
            if name == "card":
                hub.card_or_plain(folder, folder, "user/name", revision=None, license=None)
            else:
                paper_results.report("table1", checkpoint=str(folder), results=[])


def run_cases() -> None:
    def manifest(folder: Path, **changes: Any) -> None:
        (folder / "train_state").mkdir(exist_ok=True)
        content = {"step": 1, "files": {}, "options": {}, "world_size": 1, "dataset": {"fingerprint": ""}, **changes}
        (folder / "train_state" / "manifest.json").write_text(json.dumps(content))

    outside = {"files": {"../outside/secret.png": "0" * 64}}
    for name, changes, words in (
        ("path-out", outside, "secret.png is missing"),
        ("absolute-path", {"files": {"{outside}/secret.png": "0" * 64}}, "secret.png is missing"),
        ("files-are-a-list", {"files": [1, 2]}, "manifest.json cannot be read"),
        ("step-is-text", {"step": "../../x"}, "manifest.json cannot be read"),
        ("no-files", {"files": None}, "manifest.json cannot be read"),
    ):

        @case(f"manifest-{name}", words)
        def _(folder: Path, changes: dict[str, Any] = changes) -> None:
            from ddpm_hf.runs import checkpoints

            text = json.dumps(changes).replace("{outside}", str(folder.parent / "outside"))
            manifest(folder, **json.loads(text))
            checkpoints.verify(folder)

    @case("manifest-nested-deeply", "manifest.json cannot be read")
    def _(folder: Path) -> None:
        from ddpm_hf.runs import checkpoints

        manifest(folder)
        (folder / "train_state" / "manifest.json").write_text("[" * 100_000)
        checkpoints.verify(folder)

    @case("manifest-lists-less", "")
    def _(folder: Path) -> None:
        """The weights were changed, and the manifest names no files at all."""
        from ddpm_hf.runs import checkpoints

        manifest(folder)
        checkpoints.verify(folder)

    results = {"metric": "bpd", "name": "x", "value": 1, "spread": None, "protocol": {}, "model": {}, "data": {}}
    for name, content in {
        "a-number": "5",
        "numbers": '{"results": [5]}',
        "text": '{"results": "metric"}',
        "a-mapping": '{"results": {"metric": 1}}',
        "an-empty-result": '{"results": [{}]}',
        "pickle": payload_text(),
    }.items():

        @case(f"evaluation-{name}", "is not a list of evaluation results")
        def _(folder: Path, content: str = content) -> None:
            from ddpm_hf.runs import read_results

            (folder / "evaluation.json").write_text(content)
            read_results(folder / "evaluation.json")

    @case("evaluation-nested-deeply", "is not a list of evaluation results")
    def _(folder: Path) -> None:
        from ddpm_hf.runs import read_results

        (folder / "evaluation.json").write_text('{"results": ' + "[" * 100_000)
        read_results(folder / "evaluation.json")

    @case("evaluation-text-for-numbers", "evaluation")
    def _(folder: Path) -> None:
        from ddpm_hf.runs import read_results

        content = {"results": [{**results, "value": "{0.__class__}"}]}
        (folder / "evaluation.json").write_text(json.dumps(content))
        read_results(folder / "evaluation.json")

    for name, content in {"numbers": "1\n[2]\n", "no-steps": '{"loss": 1}\n', "text": '{"step": "x"}\n'}.items():

        @case(f"metrics-{name}", NO_ERROR)
        def _(folder: Path, content: str = content) -> None:
            from ddpm_hf.runs.log import cut_metrics

            (folder / "metrics.jsonl").write_text(content)
            cut_metrics(folder / "metrics.jsonl", 5)

    @case("a-run-whose-names-are-markup", NO_ERROR)
    def _(folder: Path) -> None:
        from ddpm_hf.hub import publishing as hub

        (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": "{{ 7 * 191 }} <script>"}))
        card = hub.card_or_plain(folder, folder, "user/name", revision=None, license=None)
        assert "1337" not in card and "<script>" not in card


def payload_text() -> str:
    return "cposix\nmkdir\n(S'x'\ntR."


def data_cases() -> None:
    @case("photos-linked-from-outside", "no readable image header")
    def _(folder: Path) -> None:
        """The user's own link is followed; what is no image shows nothing of itself."""
        from ddpm_hf.data import load_samples

        (folder / "photos").mkdir()
        (folder / "photos" / "a.png").symlink_to("../../outside/secret.text")
        load_samples(train_data_dir=folder / "photos")

    @case("a-data-set-that-is-a-script", "scripts are no longer supported")
    def _(folder: Path) -> None:
        from ddpm_hf.data import load_samples

        (folder / "photos").mkdir()
        (folder / "photos" / "photos.py").write_text("import os\nos.mkdir(os.environ['CANARY'])\n")
        load_samples(folder / "photos")

    @case("a-parquet-file-that-is-a-pickle", "cannot be loaded")
    def _(folder: Path) -> None:
        from ddpm_hf.data import load_samples

        (folder / "x.parquet").write_bytes(payload())
        load_samples(folder / "x.parquet")

    @case("rows-that-name-files-outside", "no readable image header")
    def _(folder: Path) -> None:
        import datasets

        from ddpm_hf.data import load_samples

        datasets.disable_progress_bars()
        rows = [{"bytes": None, "path": str(folder.parent / "outside" / "secret.text")}]
        features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
        table = datasets.Dataset.from_dict({"image": rows}, features=features)
        load_samples(table.cast_column("image", datasets.Image()))


for _add in (
    *(pickle_cases, index_cases, configuration_cases, weight_cases, code_cases),
    *(tensorflow_cases, yaml_cases, run_cases, data_cases),
):
    _add()
