"""Publishing: what is uploaded and what never is; the real script and the real client, over HTTP."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fork_server
import pytest
import yaml
from evaluation_results import RESULTS, measured_on
from huggingface_hub import ModelCard
from local_hub import MODEL, TOKEN, LocalHub

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.hub import files_to_upload, model_card, publishing
from ddpm_hf.pipeline_loading import PLAIN_CARD
from ddpm_hf.runs import model_folder

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train.py"
SECRET = "a secret that must not leave"
RECORDS = {"README.md", "options.yaml", "metrics.jsonl", "curves.png"}
GRIDS = {f"samples/step-{step}-{kind}.png" for step in (3, 6) for kind in ("raw", "ema")}
TRAINING = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 5 --beta_end 0.5 --num_steps 6 --warmup_steps 2 --ema_decay 0.5 --checkpoint_every 3 "
    "--log_every 1 --sample_every 3 --num_samples 4 --cpu_threads 1"
).split()


def train(folder: Path, *options: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    words = [SCRIPT, *TRAINING, "--output_dir", folder, *options]
    return fork_server.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


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


@pytest.mark.slow
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
        "python training/train.py --config options.yaml\n",
    ):
        assert text in card.text
    assert "| beta_schedule |" not in card.text  # as in the paper
    options = yaml.safe_load(server.files("tester/tiny")["options.yaml"])
    assert options["output_dir"] == "tiny" and options["num_steps"] == 6


@pytest.mark.slow
def test_without_the_hub_training_says_how_to_finish(tmp_path):
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


# ---- ddpm-hf publish, save_pretrained and push_to_hub ---------------------------------------------------------------

CLIENT = r"""
import contextlib, io, json, os, pathlib, shutil, sys, traceback, warnings
from huggingface_hub import HfApi, snapshot_download
from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import main

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
(scratch / "broken" / "metrics.jsonl").write_text('{"step": 1, "loss": "?"}\n')
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
    words = ["-c", CLIENT, folder, tmp_path_factory.mktemp("scratch")]
    done = fork_server.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
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


def test_an_unfinished_run_is_published_from_a_checkpoint(published):
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


def test_push_to_hub_uploads_the_allowed_files_only(published):
    server, results, _ = published
    variant = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert set(server.files("tester/pushed")) == MODEL | {"README.md", variant}
    assert server.files("tester/pushed")["README.md"].decode() == PLAIN_CARD.format(repo_id="tester/pushed")
    for name in ("tester/saved", "tester/saved-with-card"):
        assert server.repos[name].private
        uploaded = set(server.files(name))
        shards = {path for path in uploaded if re.search(r"-\d{5}-of-\d{5}\.safetensors$", path)}
        index = "unet/diffusion_pytorch_model.safetensors.index.json"
        assert len(shards) > 1 and uploaded == MODEL | {"README.md"} | shards | {index}
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


def test_where_a_model_lay_is_not_uploaded(trained, tmp_path):
    """Stock's save_pretrained writes it into the index and the network's configuration."""
    _, folder, _ = trained
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / name)
    names = ("model_index.json", "unet/config.json")
    configs = {name: json.loads((tmp_path / name).read_text()) for name in names}
    for name, config in configs.items():
        (tmp_path / name).write_text(json.dumps({**config, "_name_or_path": "/home/ann/secret"}))
    uploaded = publishing._contents(tmp_path, tmp_path)
    assert {name: json.loads(uploaded[name]) for name in names} == configs


def test_the_newest_good_checkpoint_is_the_model_of_a_run(trained, tmp_path):
    _, folder, _ = trained
    run = tmp_path / "run"
    shutil.copytree(folder, run, symlinks=True)
    assert model_folder(run).name == "step-6"
    with (run / "checkpoints/step-6/unet/diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"damage")
    assert model_folder(run).name == "step-3"
    card = model_card(run, model_folder(run), "tester/x")
    assert "for 3 steps" in card and "| steps | 3 |" in card  # though metrics.jsonl goes on to 6
    shutil.rmtree(run / "checkpoints")
    assert model_folder(run) == run
