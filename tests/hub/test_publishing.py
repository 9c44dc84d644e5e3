"""Publishing: what is uploaded and what never is, and the model card; with the real client over HTTP."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from local_hub import LocalHub

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.hub import card, publishing as hub
from ddpm_hf.pipeline_ddpm_paper import PLAIN_CARD, files_to_upload
from ddpm_hf.runs import parse_options, weights_sha256, write_results
from training import train as train_py

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train.py"
TOKEN = "hf_canaryCANARYcanary"
SECRET = "a secret that must not leave"
MODEL = {
    *("model_index.json", "pipeline.py", "unet/config.json", "unet/unet_ddpm_paper.py"),
    *("scheduler/scheduler_config.json", "scheduler/scheduling_ddpm_paper.py"),
    "unet/diffusion_pytorch_model.safetensors",
}
RECORDS = {"README.md", "options.yaml", "metrics.jsonl", "curves.png"}
GRIDS = {f"samples/step-{step}-{kind}.png" for step in (3, 6) for kind in ("raw", "ema")}
TRAINING = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 5 --beta_end 0.5 --num_steps 6 --warmup_steps 2 --ema_decay 0.5 --checkpoint_every 3 "
    "--log_every 1 --sample_every 3 --num_samples 4 --cpu_threads 1"
).split()


RESULTS: list[dict[str, Any]] = [
    {
        "metric": "bpd",
        "name": "bits/dim",
        "value": 2.931234,
        "spread": 0.01234567,
        "parts": {"prior_bpd": 1e-5, "kl_bpd": 2.9, "decoder_bpd": 0.031224},
        "rate_distortion": {"num_reverse_steps": [1, 2], "rate_bpd": [0.1, 2.9], "rmse": [60.0, 5.0]},
        "protocol": {"num_images": 1797, "seed": 0, "num_levels": 17, "num_timesteps_subset": 20},
        "model": {"weights": "ema", "weights_sha256": "ab12", "num_inference_steps": 10},
        "data": {"name": "digits", "split": "test", "fingerprint": "cd34"},
        "environment": {"device": "cpu, x86_64", "num_processes": 1},
        "time_utc": "2026-11-20T15:00:00+00:00",
    },
    {
        "metric": "fid",
        "name": "FID-5k",
        "value": 54.32109876,
        "spread": None,
        "protocol": {"extractor": "tiny", "seeds": "0-4999", "num_reference": 1437, "num_samples": 5000},
        "model": {"weights": "ema", "weights_sha256": "ab12", "num_inference_steps": 50},
        "data": {"name": "digits", "split": "train", "fingerprint": "cd34"},
        "environment": {"device": "cpu, x86_64", "num_processes": 1},
        "time_utc": "2026-11-20T15:00:00+00:00",
    },
    {
        "metric": "is",
        "name": "IS-5k",
        "value": 7.7,
        "spread": 0.125,
        "protocol": {"extractor": "tiny", "seeds": "0-4999", "num_samples": 5000},
        "model": {"weights": "ema", "weights_sha256": "ab12", "num_inference_steps": 50},
        "data": None,
        "environment": {"device": "cpu, x86_64", "num_processes": 1},
        "time_utc": "2026-11-20T15:00:00+00:00",
    },
]


def measured_on(unet: Any) -> list[dict[str, Any]]:
    """RESULTS as if of this network's weights."""
    results = copy.deepcopy(RESULTS)
    for result in results:
        result["model"]["weights_sha256"] = weights_sha256(unet.state_dict())
    return results


def test_results_of_other_weights_are_not_in_the_card(tiny_unet, tiny_scheduler, tmp_path, caplog):
    """Of a run that went on after it was evaluated, or of its raw weights."""
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    write_results(folder / "evaluation.json", [*measured_on(tiny_unet())[:1], *RESULTS[1:]])
    card: Any = ModelCard(hub.model_card(folder, folder, "tester/x"))
    assert [found.metric_name for found in card.data.eval_results] == ["bits/dim"] and "FID" not in card.text
    assert "2 results of other weights are left out" in caplog.text


def train(folder: Path, *options: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *TRAINING, "--output_dir", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def add_canaries(folder: Path, outside: Path) -> None:
    """All kinds of things that must stay where they are."""
    outside.mkdir()
    (outside / "private.png").write_text(SECRET)
    (outside / "train").mkdir()
    (outside / "train" / "private.png").write_text(SECRET)
    for name in (
        *(".env", ".netrc", "optimizer.bin", "optimizer.safetensors", "notes.txt", "secrets.json", "token"),
        *("unet/optimizer.safetensors", "unet/diffusion_pytorch_model.bin", "unet/extra.py", "scheduler/.env"),
        *("samples/labels.csv", "samples/nested/private.png", "samples/.hidden/x.png", "logs/events.out", "x.png"),
        *("checkpoints/step-6/unet/extra.json", ".git/config", "train_state/state.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    (folder / "samples" / "link.png").symlink_to(outside / "private.png")
    (folder / "linked").symlink_to(outside / "train")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(Hub, run folder, finished process) of a small training that uploads at every save; then canaries are added."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with LocalHub() as server:
        env = server.client(tmp_path_factory.mktemp("home"), TOKEN)
        options = ["--push_to_hub", "--hub_model_id", "tester/tiny", "--hub_private_repo"]
        done = train(folder, *options, "--hub_strategy", "every_save", env=env)
        assert done.returncode == 0, done.stderr
        add_canaries(folder, tmp_path_factory.mktemp("elsewhere") / "outside")
        yield server, folder, done


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_uploads_at_every_save_and_nothing_but_the_run(trained):
    server, folder, done = trained
    repo = server.repos["tester/tiny"]
    assert repo.private
    initial, *uploads = repo.messages
    assert initial[1] == "initial commit" and {message for _, message in uploads} == {"Upload with ddpm_hf"}
    *halfway, finished = (server.files("tester/tiny", oid) for oid, _ in uploads)
    assert set(finished) == MODEL | RECORDS | GRIDS
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert finished[weights] == (folder / weights).read_bytes() and b"for 6 steps" in finished["README.md"]
    assert len(halfway) <= 1  # training may end before the upload of step 3 has begun, which then is left out
    for files_ in halfway:
        assert set(files_) == MODEL | RECORDS | {name for name in GRIDS if "step-3" in name}
        assert b"for 3 steps" in files_["README.md"] and files_[weights] != finished[weights]
    assert done.stderr.count("uploaded to ") == 1 + len(halfway) and "HTTP Request" not in done.stderr
    assert not (folder / ".uploads").exists()


def test_the_token_and_this_machine_stay_out_of_everything(trained):
    server, folder, done = trained
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    uploaded = [data for files in server.repos["tester/tiny"].commits.values() for _, _, data, _ in files.values()]
    for text in [*written, *uploaded, done.stdout.encode(), done.stderr.encode()]:
        assert TOKEN.encode() not in text
    assert not any(str(folder.parent).encode() in text for text in uploaded)


def test_the_card_of_a_run_tells_what_is_known(trained):
    server, folder, _ = trained
    card = ModelCard(server.files("tester/tiny")["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddpm", "diffusion", "arxiv:2006.11239"],
    }
    pipe = DDPMPaperPipeline.from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
    for text in (
        f"8×8 greyscale images, with {parameters:,} parameters, trained on digits for 6 steps",
        "![Samples of the seeds 0 to 3](samples/step-6-ema.png)",
        "5 reverse steps",
        'DDPMPaperPipeline.from_pretrained("tester/tiny")',
        'DiffusionPipeline.from_pretrained("tester/tiny", trust_remote_code=True)',
        "| batch | 16 |",
        "| images/s (median) |",
        "| num_train_timesteps | 1,000 | 5 |",
        "| ema_decay | 0.9999 | 0.5 |",
        "| block_out_channels | 128, 256, 256, 256 | 8 |",
        "| device | cpu",
        "| diffusers | ",
        "accelerate launch training/train.py --config options.yaml\n",
    ):
        assert text in card.text
    assert "| beta_schedule |" not in card.text  # as in the paper
    options = yaml.safe_load(server.files("tester/tiny")["options.yaml"])
    assert options["output_dir"] == "tiny" and options["num_steps"] == 6


def test_without_the_hub_training_ends_well_and_says_how_to_finish(tmp_path):
    folder = tmp_path / "run"
    with LocalHub() as server:
        server.failing = {"/api/": 403}
        options = ["--push_to_hub", "--hub_model_id", "tester/tiny", "--hub_strategy", "every_save"]
        done = train(folder, *options, env=server.client(tmp_path / "home", TOKEN))
    assert done.returncode == 4
    # at the start, at the end, and at step 3 unless training ended before its upload began
    assert done.stderr.count("the token may not write there") in (2, 3)
    finish = f"to upload it later: ddpm-hf publish {folder} tester/tiny"
    assert done.stderr.splitlines()[-1].endswith(finish)
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr
    assert len(DDPMPaperPipeline.from_pretrained(folder)(seeds=[0]).images) == 1


def training_options(*arguments: str):
    return parse_options(train_py.TrainingOptions, arguments, default_config=train_py.CONFIGS / "digits.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id user/name"),
        (["--push_to_hub", "--hub_model_id", "name"], "the repository is 'name'; give it as user/name"),
        (["--hub_strategy", "evry_save"], "did you mean every_save?"),
        (["--hub_token", "hf_x"], "unknown option --hub_token"),
    ],
)
def test_hub_options_are_checked_before_training(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        training_options(*arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


# ---- ddpm-hf publish, save_pretrained and push_to_hub ---------------------------------------------------------------

CLIENT = r"""
import contextlib, io, json, os, pathlib, shutil, sys, traceback, warnings
from huggingface_hub import HfApi, snapshot_download
from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli.commands import main

run, scratch = map(pathlib.Path, sys.argv[1:])
results = {}

def command(name, *arguments):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["publish", *arguments])
        except SystemExit as error:
            code = error.code
    results[name] = [code, out.getvalue(), err.getvalue()]

command("public", str(run), "tester/public", "--license", "apache-2.0")
command("again", str(run), "tester/public")
command("public stays public", str(run), "tester/public", "--private")
command("private", str(run), "tester/private", "--private")
command("branch", str(run), "tester/public", "--revision", "v2")
command("bad name", str(run), "just-a-name")
command("no model", str(scratch), "tester/empty")
(scratch / "unfinished").mkdir()
shutil.copytree(run / "checkpoints", scratch / "unfinished" / "checkpoints")
command("unfinished", str(scratch / "unfinished"), "tester/unfinished")
shutil.copytree(run, scratch / "own card", symlinks=True)
(scratch / "own card" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
command("own card", str(scratch / "own card"), "tester/own-card")
(scratch / "broken").mkdir()
shutil.copytree(run, scratch / "broken", symlinks=True, dirs_exist_ok=True)
(scratch / "broken" / "metrics.jsonl").write_text('{"step": 1}\n')
command("broken card", str(scratch / "broken"), "tester/broken")
shutil.copytree(run, scratch / "evaluated", symlinks=True)
(scratch / "evaluated" / "evaluation.json").write_text(os.environ["EVALUATION"])
command("evaluated", str(scratch / "evaluated"), "tester/evaluated")

pipe = DDPMPaperPipeline.from_pretrained(run)
pipe.push_to_hub("tester/pushed")
pipe.push_to_hub("tester/pushed", variant="fp16")
for name, card in (("saved", None), ("saved-with-card", "---\nlicense: mit\n---\nMine.\n")):
    folder = scratch / name
    shutil.copytree(run, folder, symlinks=True)
    if card:
        (folder / "README.md").write_text(card)
    pipe.save_pretrained(str(folder), push_to_hub=True, repo_id=f"tester/{name}", private=True, max_shard_size="8KB")
results["card after saving"] = (scratch / "saved-with-card" / "README.md").read_text()
try:
    pipe.push_to_hub("tester/pickled", safe_serialization=False)
except ValueError as error:
    results["pickled"] = str(error)

snapshot = pathlib.Path(snapshot_download("tester/private"))
results["private files"] = sorted(p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())
loaded = [DDPMPaperPipeline.from_pretrained(x) for x in (str(run), "tester/private", "tester/saved")]
loaded.append(DDPMPaperPipeline.from_pretrained("tester/public", revision="v2"))
arrays = [p(seeds=[0, 1], output_type="np").images for p in loaded]
results["equal"] = [bool((array == arrays[0]).all()) for array in arrays]
del os.environ["HF_TOKEN"]
command("without a token", str(run), "tester/never")
command("private without a token", str(run), "tester/private")
try:
    DDPMPaperPipeline.from_pretrained("tester/private", cache_dir=scratch / "other")
except OSError as error:
    results["private without a token, loading"] = type(error).__name__
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """(Hub, what the client above reported, its process), after it published the run in many ways."""
    server, folder, _ = trained
    measured = json.dumps({"results": measured_on(DDPMPaperPipeline.from_pretrained(folder).unet)})
    env = server.client(tmp_path_factory.mktemp("home"), TOKEN) | {"EVALUATION": measured}
    command = [sys.executable, "-c", CLIENT, str(folder), str(tmp_path_factory.mktemp("scratch"))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return server, json.loads(done.stdout.splitlines()[-1]), done


def test_publish_uploads_the_allowed_files_only(published):
    server, results, _ = published
    for name, repo_id in (("public", "tester/public"), ("private", "tester/private")):
        assert results[name][:2] == [0, f"{server.url}/{repo_id}\n"]
        assert set(server.files(repo_id)) == MODEL | RECORDS | GRIDS
    assert set(results["private files"]) == MODEL | RECORDS | GRIDS
    assert server.repos["tester/private"].private and not server.repos["tester/public"].private
    assert results["equal"] == [True] * 4


def test_no_repository_holds_a_secret(published):
    server, _, done = published
    for name, repo in server.repos.items():
        for tree in repo.commits.values():
            for path, (_, _, data, _) in tree.items():
                assert SECRET.encode() not in data and TOKEN.encode() not in data, (name, path)
    assert TOKEN not in done.stdout + done.stderr


def test_publishing_again_and_to_a_branch(published):
    server, results, _ = published
    assert results["again"][0] == results["branch"][0] == 0
    repo = server.repos["tester/public"]
    assert set(repo.refs) == {"main", "v2"} and len(repo.messages) == 4
    assert set(server.files("tester/public", "v2")) == MODEL | RECORDS | GRIDS
    assert b'from_pretrained("tester/public", revision="v2")' in server.files("tester/public", "v2")["README.md"]
    first = server.files("tester/public", repo.messages[1][0])
    assert ModelCard(first["README.md"].decode()).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("public stays public", 4, "tester/public was not uploaded: it exists and is public"),
        ("without a token", 4, "tester/never was not uploaded: not logged in"),
        ("private without a token", 4, "tester/private was not uploaded: not logged in"),
    ],
)
def test_what_the_hub_does_not_allow_ends_with_exit_code_4(published, name, code, message):
    server, results, _ = published
    assert results[name][0] == code and not results[name][1]
    assert message in results[name][2] and results[name][2].count("\n") == 1
    assert "tester/never" not in server.repos


def test_mistakes_are_told_before_anything_is_uploaded(published):
    server, results, _ = published
    assert results["bad name"][0].startswith("ddpm-hf: the repository is 'just-a-name'; give it as user/name")
    assert "holds no model: neither model_index.json nor a good checkpoint" in results["no model"][0]
    assert "tester/empty" not in server.repos


def test_an_unfinished_run_is_published_from_its_newest_checkpoint(published):
    server, results, _ = published
    assert results["unfinished"][0] == 0
    uploaded = server.files("tester/unfinished")
    assert set(uploaded) == MODEL | {"README.md"}
    assert b"trained on digits for 6 steps" in uploaded["README.md"]  # the manifest knows


def test_a_card_in_the_folder_is_kept(published):
    server, results, _ = published
    assert results["own card"][0] == 0
    mine = "---\nlicense: mit\n---\nMine.\n"
    assert server.files("tester/own-card")["README.md"].decode() == mine
    assert server.files("tester/saved-with-card")["README.md"].decode() == mine == results["card after saving"]


def test_an_evaluated_run_is_published_with_its_results(published):
    server, results, _ = published
    assert results["evaluated"][0] == 0
    uploaded = server.files("tester/evaluated")
    assert set(uploaded) == MODEL | RECORDS | GRIDS | {"evaluation.json"}
    names = [result["name"] for result in json.loads(uploaded["evaluation.json"])["results"]]
    assert names == [result["name"] for result in RESULTS]
    card: Any = ModelCard(uploaded["README.md"].decode())
    assert [found.metric_value for found in card.data.eval_results] == [2.9312, 54.3211, 7.7]


def test_a_card_that_cannot_be_written_does_not_stop_the_upload(published):
    server, results, _ = published
    assert results["broken card"][0] == 0
    assert server.files("tester/broken")["README.md"].decode() == PLAIN_CARD.format(repo_id="tester/broken")
    assert set(server.files("tester/broken")) == MODEL | RECORDS | GRIDS


def test_push_to_hub_and_save_pretrained_upload_the_allowed_files_only(published):
    server, results, _ = published
    variant = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert set(server.files("tester/pushed")) == MODEL | {"README.md", variant}
    assert server.files("tester/pushed")["README.md"].decode() == PLAIN_CARD.format(repo_id="tester/pushed")
    for name in ("tester/saved", "tester/saved-with-card"):
        assert server.repos[name].private
        uploaded = set(server.files(name))
        shards = {path for path in uploaded if re.search(r"-\d{5}-of-\d{5}\.safetensors$", path)}
        index = "unet/diffusion_pytorch_model.safetensors.index.json"
        assert len(shards) > 1 and uploaded == MODEL | RECORDS | GRIDS | shards | {index}
    assert "only weights in safetensors are uploaded" in results["pickled"]
    assert not server.files("tester/pickled")


def test_files_behind_symlinks_are_left_out(trained, tmp_path):
    _, folder, _ = trained
    assert set(files_to_upload(folder)) == MODEL | RECORDS - {"README.md"} | GRIDS
    for name in ("unet", "samples"):  # also where a folder on the way is one
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "README.md").symlink_to(folder / "options.yaml")
    assert files_to_upload(tmp_path) == {}
    (tmp_path / "run").symlink_to(folder)  # the folder itself may be reached through one
    assert set(files_to_upload(tmp_path / "run")) == set(files_to_upload(folder))


# ---- names and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "name",
        "a/b/c",
        "/b",
        "a/",
        "a/b\n",
        'a/b"',
        "a/b}}",
        "a b/c",
        "a/..",
        "../b",
        "a/-b",
        "a/b.",
        "ä/b",
        "a/b--c",
        "a/b.git",
        "a/" + 97 * "b",
    ],
)
def test_names_that_no_repository_has(name):
    with pytest.raises(ValueError, match="give it as user/name"):
        hub.check_names(name)


@pytest.mark.parametrize(
    ("status", "cause"), [(401, "not logged in"), (404, "may not see it"), (418, f"Refusal: {TOKEN} and more")]
)
def test_an_error_of_the_hub_is_one_line_without_the_token(status, cause, monkeypatch):
    class Refusal(Exception):
        response = SimpleNamespace(status_code=status)

    class RefusingApi:
        def create_repo(self, *args, **kwargs):
            raise Refusal(f"{TOKEN}\nand more")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "HfApi", RefusingApi)
    with pytest.raises(hub.PublishError) as error:
        hub.create("tester/x")
    assert cause.replace(TOKEN, "[token]") in str(error.value)
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)


def test_hostile_names_are_no_repositories():
    """Nor revisions; but for those words that are as good a name as any."""
    harmless = {"null", "yes", "0x1F", "1e3", "2026-01-01", "CON", "evil.com", "www.evil.com"}
    assert harmless < set(HOSTILE)
    for value in HOSTILE:
        for repo_id in (value, f"tester/{value}", f"{value}/x"):
            if repo_id not in {f"tester/{word}" for word in harmless} | {f"{word}/x" for word in harmless}:
                with pytest.raises(ValueError, match="give it as user/name"):
                    hub.check_names(repo_id)
        if value not in harmless | {"x" * 10_000, "user/name.git"}:
            with pytest.raises(ValueError, match="give the name of a branch"):
                hub.check_names("tester/x", value)


def test_names_that_repositories_have():
    for name in ("a/b", "ann/ddpm-cifar10_32.v1", "A1/0"):
        hub.check_names(name, "feature/x-1.0")
    with pytest.raises(ValueError, match="the revision is 'a\"b'"):
        hub.check_names("a/b", 'a"b')


# ---- the card ------------------------------------------------------------------------------------------------------

HOSTILE_BY_KIND = {
    "html": [
        *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</code></pre><b>", "<!--", "-->"),
        *("a<b>c&amp;d", "<a/b>/<c>", "&#60;script&#62;", "&#x3C;script&#x3E;", "&lt;script&gt;"),
        *("<svg onload=alert(1)>", "<iframe src=//evil>", "<a href='javascript:x'>y</a>"),
        *("<style>*{display:none}</style>", "</table>", "<details open ontoggle=x>", "<!DOCTYPE html>"),
        *("<![CDATA[x]]>", "<?php x ?>", "<SCRIPT/SRC=//evil>", "<\x00script>", "<scr\u200bipt>"),
        *("＜script＞", "'\"><script>", "<base href=//evil>", "<form action=//evil>"),
        *("<meta http-equiv=refresh>", "<object data=x>", "javascript:alert(1)", "data:text/html,<x>"),
    ],
    "yaml": [
        *("a\n---\nlicense: evil", "---", "\n---\n", "a: b", "- a", "x\r\n\r\n# Title"),
        *("!!python/object:os.system", "&a *a", "'\"", "null", "~", "%0a---", "\u2028---\u2028", "|", ">"),
        *("? a", "%YAML 1.2", "...", "{a: b}", "[a, b]", "a #b", "'", '"', "\t", "!!binary x", "<<: *a"),
        *("a:\n  b", "yes", "0x1F", "1e3", ".nan", "2026-01-01", "=", "\ufeff---", "\x85---\x85"),
        *("\rlicense: evil", "---\nlicense: evil\n---", "\u2029license: evil", "language:\n- evil"),
        *("model-index:\n- name: evil",),
    ],
    "jinja": [
        *("{{ 7 * 7 }}", "{% raw %}", "{% include '/etc/passwd' %}", "{# #}", "{{ card_data }}", "${x}"),
        *("}}", "%}", "{%- if x -%}", "{{ ''.__class__.__mro__ }}", "{% endraw %}", "{% set x = 1 %}"),
        *("{% for x in y %}", "{{{x}}}", "<%= x %>", "{{ x|safe }}", "{%\nif\n%}", "${{ x }}", "[[x]]"),
        *("{% autoescape false %}",),
    ],
    "markdown": [
        *("a | b | c", "`code`", "```\nfence", "~~~", "**bold**", "__x__", "_x_", "*", "# heading"),
        *("\n# heading", "[x](javascript:alert(1))", "![x](http://x/y.png)", "[x]: http://x"),
        *("<http://x>", "http://evil", "HTTPS://EVIL", "www.evil.com", "me@evil.com", "@everyone", "#1"),
        *("\\", "\\|", "$\\sum$", "1. x", "1) x", "+ x", "> quote", "    code", "a\n===", "a\n---", "***"),
        *("~~x~~", "[^1]: x", "[a][b]", "ftp://evil", "$$x$$", "\\(x\\)", ":smile:", "- [ ] x", "| --- |"),
        *("\n| a | b |\n|---|---|", "`` ` ``", "x  \ny", "![x](data:image/png;base64,AAAA)"),
        *("[![x](y)](z)", "[x](<y z>)", "//evil.com/x", "evil.com", ":::warning", "{#id .class}"),
    ],
    "text": [
        *("a\x00b\x1b[31m", "\u202egnp.exe", "\x00", "\x07\x08\x0b\x0c", "\x1b]0;title\x07", "\x1b[2J"),
        *("\x7f", "\x9b31m", "\u2066x\u2069", "\u200e\u200f", "\u200d", "\xad", "\u3000", "\U000e0041"),
        *("\ufffe", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "🏴", "é", "Z̡͡a͑", "İıſ", "ﬁ¼𝓍", "٣"),
        *("中文", "עברית", "العربية", "x" * 10000, "\n" * 1000, "<" * 1000, "{" * 1000, "👍" * 500),
        *("a " * 1000,),
    ],
    "paths": [
        *("con.", "x\ny", "a\tb", ".git/config", "user/name.git", "%00", "${HOME}", "!history"),
        *("../../etc/passwd", "..", "/etc/passwd", "~/.ssh/id_rsa", "C:\\x", "\\\\?\\C:"),
        *("file:///etc/passwd", "a/../b", "a//b", "%2e%2e%2f", "CON", "a\x00/b", "-rf", "--help", "$(id)"),
        *("; rm -rf /", "| id", "&& id", "'; DROP TABLE x", "*?", "../" * 100, "hf://x", "a b/c d"),
    ],
}
HOSTILE = [value for values in HOSTILE_BY_KIND.values() for value in values]


def write_run(folder: Path, unet, scheduler, **options) -> Path:
    DDPMPaperPipeline(unet, scheduler).save_pretrained(folder)
    (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": None, "train_data_dir": None, **options}))
    return folder


def markup(text: str) -> str:
    """What could be Markdown, HTML, YAML or Jinja in the text, in order; character references are text."""
    return re.sub(r"[\w\s\-/,×+()'.]", "", re.sub(r"&#\d+;", "", text))


def test_two_hundred_hostile_names_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    assert len(HOSTILE) == len(set(HOSTILE)) == 202
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    names = ("dataset_name", "init_from", "mixed_precision", "random_flip", "seed")

    def card(value: str) -> ModelCard:
        (folder / "options.yaml").write_text(yaml.safe_dump({**dict.fromkeys(names, value), "num_samples": 4}))
        return ModelCard(hub.model_card(folder, folder, "tester/x"))

    harmless = card("harmless")
    assert harmless.text.count("harmless") == len(names) + 1  # random_flip stands in two tables
    for value in HOSTILE:
        hostile = card(value)
        assert hostile.data.to_dict() == harmless.data.to_dict()
        pairs = zip(hostile.text.splitlines(), harmless.text.splitlines(), strict=True)
        assert all(markup(ours) == markup(theirs) for ours, theirs in pairs), value
        assert "www." not in hostile.text and len(hostile.text) < len(harmless.text) + 12_000


def test_hostile_names_of_folders_and_versions_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    (folder / "train_state").mkdir()
    harmless = None
    for value in ["harmless", *HOSTILE]:
        (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": None, "train_data_dir": value}))
        manifest = {"step": 3, "environment": {value: value}, "options": {}}
        (folder / "train_state" / "manifest.json").write_text(json.dumps(manifest))
        card = ModelCard(hub.model_card(folder, folder, "tester/x"))
        harmless = harmless or card
        pairs = zip(card.text.splitlines(), harmless.text.splitlines(), strict=True)
        assert all(markup(ours) == markup(theirs) for ours, theirs in pairs), value
        assert card.data.to_dict() == harmless.data.to_dict()


def test_absolute_paths_are_cut_to_their_last_part(tiny_unet, tiny_scheduler, tmp_path):
    private = {"train_data_dir": "/home/ann/photos", "init_from": "/mnt/disk/base"}
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler(), **private)
    text = hub.model_card(folder, folder, "tester/x")
    assert "trained on photos" in text and "Fine-tuned from base" in text and "/home" not in text
    assert "--train_data_dir YOUR_FOLDER" in text
    assert card.public_options({**private, "a": "runs/x", "b": 3}) == {
        **{"train_data_dir": "photos", "init_from": "base"},
        **{"a": "runs/x", "b": 3},
    }


def test_the_newest_good_checkpoint_is_the_model_of_a_run(trained, tmp_path):
    _, folder, _ = trained
    run = tmp_path / "run"
    shutil.copytree(folder, run, symlinks=True)
    assert hub.model_folder(run).name == "step-6"
    with (run / "checkpoints/step-6/unet/diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"damage")
    assert hub.model_folder(run).name == "step-3"
    card = hub.model_card(run, hub.model_folder(run), "tester/x")
    assert "for 3 steps" in card and "| steps | 3 |" in card  # though metrics.jsonl goes on to 6
    shutil.rmtree(run / "checkpoints")
    assert hub.model_folder(run) == run


def test_what_is_not_known_drops_its_section(tiny_mlp, tiny_scheduler, tmp_path):
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(tmp_path)
    card = ModelCard(hub.model_card(tmp_path, tmp_path, "tester/points", license="mit"))
    headings = re.findall(r"^## (.*)", card.text, flags=re.MULTILINE)
    assert headings == ["Use", "Limitations", "Citation"]
    assert "for points in 2 dimensions" in card.text and 'seeds=range(16), output_type="np")' in card.text
    assert "None" not in card.text and "![" not in card.text
    assert card.data.license == "mit" and "datasets" not in card.data.to_dict()


def test_results_stand_in_the_card_and_in_its_metadata(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    card: Any
    without: Any = ModelCard(hub.model_card(folder, folder, "tester/x"))
    assert without.data.eval_results is None and "## Evaluation" not in without.text
    write_results(folder / "evaluation.json", measured_on(tiny_unet()))
    card = ModelCard(hub.model_card(folder, folder, "tester/x"))
    for row in (
        "| bits/dim | 2.9312 ± 0.0123 | digits (test), 1,797 images, 10 steps, ema weights, "
        "estimated from 20 terms per image |",
        "| FID-5k | 54.3211 | digits (train), 5,000 samples, 50 steps, ema weights, tiny |",
        "| IS-5k | 7.7000 ± 0.1250 | 5,000 samples, 50 steps, ema weights, tiny |",
    ):
        assert row in html.unescape(card.text)
    metadata = yaml.safe_load(str(card).split("---\n")[1])
    (entry,) = metadata["model-index"]
    assert entry["name"] == "x" == card.data.model_name
    assert len(entry["results"]) == 3  # by task and data set, as the Hub has it
    found = card.data.eval_results
    assert [
        (r.metric_type, r.metric_name, r.metric_value, r.dataset_name, r.dataset_type, r.dataset_split) for r in found
    ] == [
        ("bpd", "bits/dim", 2.9312, "digits", "digits", "test"),
        ("fid", "FID-5k, 50 steps", 54.3211, "digits", "digits", "train"),
        ("is", "IS-5k, 50 steps", 7.7, "none", "none", None),
    ]
    assert {r.task_type for r in found} == {"unconditional-image-generation"}
    kept = {key: value for key, value in card.data.to_dict().items() if key != "model-index"}
    assert kept == without.data.to_dict()  # and nothing else of it changes


def test_hostile_names_in_results_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    """In the body as text; in the metadata as they are, on one line, read back character by character."""
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    harmless: Any = None
    for value in ["harmless", *HOSTILE]:
        result: Any = measured_on(tiny_unet())[1] | {"name": value}
        result["data"] |= {"name": value, "split": value}
        result["protocol"]["extractor"] = result["model"]["weights"] = value
        (folder / "evaluation.json").write_text(json.dumps({"results": [result]}), encoding="utf-8")
        card: Any = ModelCard(hub.model_card(folder, folder, "tester/x"))
        harmless = harmless or card
        pairs = zip(card.text.splitlines(), harmless.text.splitlines(), strict=True)
        assert all(markup(ours) == markup(theirs) for ours, theirs in pairs), value
        (found,) = card.data.eval_results
        line = " ".join("".join(c if c.isprintable() else " " for c in value).split())
        assert (found.dataset_name, found.dataset_split, found.metric_name) == (line, line, f"{line}, 50 steps")
        kept = {key: entry for key, entry in card.data.to_dict().items() if key != "model-index"}
        assert kept == {key: entry for key, entry in harmless.data.to_dict().items() if key != "model-index"}


def test_a_garbage_evaluation_gives_a_plain_card(tiny_unet, tiny_scheduler, tmp_path, caplog):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    (folder / "evaluation.json").write_text("garbage")
    with pytest.raises(ValueError, match="is not a list of evaluation results"):
        hub.model_card(folder, folder, "tester/x")
    assert hub.card_or_plain(folder, folder, "tester/x") == PLAIN_CARD.format(repo_id="tester/x")
    assert "evaluation.json is not a list of evaluation results" in caplog.text


def test_a_data_set_is_named_in_the_metadata_where_everyone_finds_it(tiny_unet, tiny_scheduler, tmp_path):
    program = (
        "import sys, pathlib; from ddpm_hf import card; run = pathlib.Path(sys.argv[1])\n"
        "for name in ('ann/birds', 'ann/secret', 'ann/nothing', 'digits', 'unet/config.json'):\n"
        "    print(name, card.is_public_dataset(name))\n"
        "print(card.model_card(run, run, 'tester/x'))\n"
    )
    folder = write_run(tmp_path / "run", tiny_unet(), tiny_scheduler(), dataset_name="ann/birds")
    with LocalHub() as server:
        server.datasets |= {"ann/birds": False, "ann/secret": True}
        command = [sys.executable, "-c", program, str(folder)]
        env = server.client(tmp_path / "home", TOKEN) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers, card = done.stdout.split("---", 1)
    expected = "ann/birds True ann/secret False ann/nothing False digits False unet/config.json False"
    assert answers.split() == expected.split()
    assert ModelCard("---" + card).data.datasets == ["ann/birds"]


@pytest.mark.parametrize("config", ["cifar10", "celebahq256", "lsun256"])
def test_the_papers_own_configurations_do_not_differ_from_the_paper(config):
    options = training_options("--config", str(ROOT / f"training/configs/{config}.yaml"), "--dataset_name", "x")
    scheduler = DDPMPaperScheduler(beta_schedule=options.beta_schedule, variance_type=options.variance_type).config
    size = 32 if config == "cifar10" else 256
    paper, deviations = card.compare_with_paper({**vars(options), **scheduler, "sample_size": size})
    assert deviations == [] and ("CIFAR-10" in paper) == (size == 32)
    changed = {**vars(options), **scheduler, "sample_size": size, "ema_decay": 0.99, "beta_schedule": "quad"}
    assert card.compare_with_paper(changed)[1] == [("beta_schedule", "linear", "quad"), ("ema_decay", 0.9999, 0.99)]


def test_the_template_is_one_text_and_belongs_to_the_package():
    ours = files("ddpm_hf").joinpath("card_template.md").read_bytes()
    assert (ROOT / "model_cards" / "template.md").read_bytes() == ours
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "card_template.md" in project["tool"]["setuptools"]["package-data"]["ddpm_hf"]


@pytest.mark.parametrize("config", ["cifar10", "celebahq256", "lsun256"])
def test_cards_of_the_papers_configurations(config):
    card = ModelCard((ROOT / "model_cards" / config / "README.md").read_text(encoding="utf-8"))
    assert card.data.library_name == "diffusers" and "arxiv:2006.11239" in card.data.tags
    assert "No weights are released" in card.text and "published" in card.text
    assert f"accelerate launch training/train.py --config training/configs/{config}.yaml" in card.text
