"""A Hub that fails, in ten ways at each of the endpoints that an upload asks: over real HTTP, without real waits."""

import json
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, close_session, constants, get_session
from local_hub import Fault, LocalHub

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import commands as cli
from ddpm_hf.hub import BackgroundUploads, publishing as hub
from ddpm_hf.hub.background import SNAPSHOTS
from ddpm_hf.runs import checkpoints

ROOT = Path(__file__).parents[2]
TOKEN = "hf_canaryCANARYcanary"
MODEL = {
    *("model_index.json", "pipeline.py", "unet/config.json", "unet/unet_ddpm_paper.py"),
    *("scheduler/scheduler_config.json", "scheduler/scheduling_ddpm_paper.py"),
    "unet/diffusion_pytorch_model.safetensors",
}
ALLOWED = MODEL | {"README.md", "options.yaml", "metrics.jsonl", "curves.png", "samples/step-3-ema.png"}
ENDPOINTS = {  # what an upload to a branch of a private repository asks, in this order
    *(
        "create_repo",
        "info",
        "dataset",
        "create_branch",
        "preupload",
        "lfs_batch",
        "lfs_put",
        "validate_yaml",
        "commit",
    ),
}
FAULTS = {
    **{str(status): Fault(status) for status in (401, 403, 404, 409, 412, 500, 503)},
    "429": Fault(429, retry_after="7"),
    "reset": Fault("reset"),
    "stall": Fault("stall"),
}
CASES = [(endpoint, fault) for endpoint in sorted(ENDPOINTS) for fault in FAULTS]
PASSING = ("429", "500", "503", "reset", "stall")
REMEDIES = {
    "401": "run `hf auth login` or set HF_TOKEN (HTTP 401)",
    "403": "it needs write access to this name (HTTP 403)",
    "404": "no such repository or revision, or the token may not see it (HTTP 404)",
    "409": "the repository is being changed by someone else; try again (HTTP 409)",
    "412": "the repository was changed in the meantime; try again (HTTP 412)",
    "429": "the Hub asks for fewer requests; try again later (HTTP 429, in 7 s)",
    "500": "the Hub is in trouble; try again later (HTTP 500)",
    "503": "the Hub is in trouble; try again later (HTTP 503)",
    "reset": "the Hub cannot be reached, or does not answer; try again later",
    "stall": "the Hub cannot be reached, or does not answer; try again later (ReadTimeout)",
}


@pytest.fixture(scope="module")
def run(tiny_mlp, tiny_scheduler, tmp_path_factory) -> Path:
    """A training run with a checkpoint, and with what must stay where it is."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints.write(
        folder / "checkpoints",
        3,
        save_pipeline=DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained,
        tensors={},
        state={},
        manifest={"options": {}, "world_size": 1},
    )
    (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": "ann/birds", "num_samples": 4}))
    line = {"step": 3, "loss": 0.5, "grad_norm": 1.0, "images_per_s": 9.0, "learning_rate": 1e-3}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for name in ("curves.png", "samples/step-3-ema.png", ".env", "optimizer.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}, not really")
    return folder


@pytest.fixture
def server(monkeypatch) -> Iterator[LocalHub]:
    """A Hub whose client is this process."""
    with LocalHub() as server:
        server.datasets["ann/birds"] = False
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        close_session()
        yield server
    close_session()


def assert_one_line(text: str) -> None:
    assert "\n" not in text and TOKEN not in text and "Traceback" not in text, text


def expected_cause(endpoint: str, fault: str) -> str:
    if fault == "409" and endpoint in ("create_repo", "create_branch"):
        return REMEDIES["404"]  # there it says that it exists, and then it does not
    return REMEDIES[fault]


def impatient(monkeypatch, fault: str) -> None:
    """Where the Hub does not answer: half a second for a request, and two tries."""
    if fault == "stall":
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.5)
        monkeypatch.setattr(hub, "MAX_WAITED_S", hub.FIRST_WAIT_S)


@pytest.mark.parametrize(("endpoint", "fault"), CASES, ids=[f"{endpoint}-{fault}" for endpoint, fault in CASES])
def test_an_upload_fails_in_one_line_and_then_completes(endpoint, fault, server, run, caplog, monkeypatch):
    waits: list[float] = []
    options: dict[str, Any] = {"private": True, "revision": "v2"}
    passing = fault in PASSING and endpoint != "dataset"  # which is asked only for a link in the card
    impatient(monkeypatch, fault)
    server.faults[endpoint] = FAULTS[fault]
    if endpoint != "dataset":
        with pytest.raises(hub.PublishError) as error:
            hub.publish(run, "tester/x", **options, sleep=waits.append)
        assert str(error.value).startswith("tester/x was not uploaded: ")
        assert expected_cause(endpoint, fault) in str(error.value)
        assert_one_line(str(error.value))
        # what may pass is asked five times, what cannot once; never by huggingface_hub on its own
        expected = [7.0 if fault == "429" else 4.0, 16.0, 64.0, 256.0]
        assert waits == (expected[: 1 if fault == "stall" else 4] if passing else [])
        assert server.failed == [endpoint] * (len(waits) + 1)
        # the fault goes away: at first while we wait, then for good
        server.faults[endpoint] = FAULTS[fault]._replace(times=passing)

    def wait(seconds: float) -> None:
        waits.append(seconds)
        monkeypatch.setattr(hub, "TIMEOUT_S", 60.0)

    waits.clear()
    assert hub.publish(run, "tester/x", **options, sleep=wait) == f"{server.url}/tester/x"
    assert len(waits) == passing
    assert set(server.files("tester/x", "v2")) == ALLOWED
    assert server.files("tester/x", "v2")["curves.png"] == b"curves.png, not really"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 * passing and all("trying again for up to" in line for line in told)
    for line in told:
        assert_one_line(line)


def test_all_cases_are_there(server, run):
    """The endpoints above are those that an upload asks."""
    seen = set()
    server.next_fault = lambda endpoint: seen.add(endpoint)  # type: ignore[method-assign]
    hub.publish(run, "tester/x", private=True, revision="v2")
    assert seen == ENDPOINTS and len(CASES) == 90


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_whatever_the_hub_does(fault, server, run, tmp_path, caplog, monkeypatch):
    """The uploads beside it tell each failure in one line, and the last one ends in bounded time."""
    caplog.set_level(logging.INFO)
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    waits: list[float] = []
    impatient(monkeypatch, fault)
    server.faults = dict.fromkeys(("create_repo", "commit"), FAULTS[fault])
    uploads = BackgroundUploads(folder, "tester/x", private=True, sleep=waits.append)
    uploads.submit(folder / "checkpoints" / "step-3")
    shutil.rmtree(folder / "checkpoints" / "step-3" / "unet")  # pruned while it is uploaded
    shutil.copytree(run / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(hub.PublishError) as error:
        uploads.finish()
    assert_one_line(str(error.value))
    for record in caplog.records:
        assert_one_line(record.getMessage())
        assert record.exc_info is None
    assert sum(waits) <= 2 * hub.MAX_WAITED_S and not (folder / SNAPSHOTS).exists()
    server.faults.clear()
    monkeypatch.setattr(hub, "TIMEOUT_S", 60.0)
    uploads = BackgroundUploads(folder, "tester/x", private=True, sleep=waits.append)
    assert uploads.finish() == f"{server.url}/tester/x"
    assert set(server.files("tester/x")) == ALLOWED and server.repos["tester/x"].private


# ---- what the Hub asks for -----------------------------------------------------------------------------------------


def retry_after(server: LocalHub, run: Path, value: str) -> list[float]:
    """The waits before an upload that is asked once to wait."""
    waits: list[float] = []
    server.faults["create_repo"] = Fault(503, times=1, retry_after=value)
    hub.publish(run, "tester/x", sleep=waits.append)
    return waits


def test_the_wait_that_the_hub_asks_for_is_kept(server, run):
    assert retry_after(server, run, "123") == [123.0]
    in_two_minutes = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 120))
    (waited,) = retry_after(server, run, in_two_minutes)
    assert 60 < waited <= 120  # a date in whole seconds, on a machine that may be busy
    for meaningless in ("", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert retry_after(server, run, meaningless) == [hub.FIRST_WAIT_S]


@pytest.mark.parametrize("seconds", ["3600", "9" * 9])
def test_a_longer_wait_than_ours_is_told_not_waited(seconds, server, run):
    server.faults["commit"] = Fault(429, retry_after=seconds)
    with pytest.raises(hub.PublishError, match=f"fewer requests; try again later .HTTP 429, in {seconds} s"):
        hub.publish(run, "tester/x", sleep=lambda seconds: pytest.fail("waited"))


def test_the_hubs_own_header_for_limits_is_read(server, run):
    waits: list[float] = []
    server.faults["commit"] = Fault(429, times=1, ratelimit='"api";r=0;t=55')
    hub.publish(run, "tester/x", sleep=waits.append)
    assert waits == [55.0]


def test_a_hub_that_is_busy_for_ever_is_asked_five_times(server, run):
    """huggingface_hub asks again at once, for ever, where this conflict is named."""
    waits: list[float] = []
    text = "Cannot create repo: another conflicting operation is in progress"
    server.faults["create_repo"] = Fault(409, message=text)
    with pytest.raises(hub.PublishError, match="try again later .another operation is in progress"):
        hub.publish(run, "tester/x", sleep=waits.append)
    assert len(server.failed) == 5


def test_a_hub_that_is_down(server, run):
    server.httpd.shutdown()
    server.httpd.server_close()
    waits: list[float] = []
    with pytest.raises(hub.PublishError, match="cannot be reached, or does not answer; try again later .ConnectError"):
        hub.publish(run, "tester/x", sleep=waits.append)
    assert len(waits) == 4


def test_requests_that_are_not_uploads_are_as_huggingface_hub_makes_them(server, run):
    """Its own timeout, retries and errors, in the same process and after an upload."""
    hub.publish(run, "tester/x")
    server.faults["preupload"] = Fault(503, times=1, retry_after="0")
    api = HfApi()
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/x")  # retries by itself
    assert server.failed == ["preupload"] and "x.txt" in server.files("tester/x")
    assert get_session().timeout.read is None


def test_what_the_hub_says_is_shown_without_the_token_and_without_signatures(server, run):
    server.faults["commit"] = Fault(418, message=f"\x1b[2J\nsee https://s3/x?sig={TOKEN}&more {TOKEN}")
    with pytest.raises(hub.PublishError) as error:
        hub.publish(run, "tester/x")
    assert "see https://s3/x [token]: Bearer [token]" in str(error.value) and "\x1b" not in str(error.value)
    assert_one_line(str(error.value))


# ---- the real script -----------------------------------------------------------------------------------------------

TRAINING = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 5 --beta_end 0.5 --warmup_steps 2 --ema_decay 0.5 --checkpoint_every 3 --log_every 1 "
    "--sample_every 3 --num_samples 4 --cpu_threads 1 --push_to_hub --hub_model_id tester/tiny "
    "--hub_strategy every_save"
).split()
IMPATIENT = (  # the script, with shorter waits
    "import runpy, sys; from ddpm_hf import hub; hub.FIRST_WAIT_S, hub.MAX_WAITED_S = 0.01, 1.0; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def start(folder: Path, env: dict[str, str], *options: str) -> subprocess.Popen:
    script = str(ROOT / "training" / "train.py")
    command = [sys.executable, "-c", IMPATIENT, script, *TRAINING, "--output_dir", str(folder), *options]
    pythonpath = {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env | pythonpath, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("fault", ["503", pytest.param("down", marks=pytest.mark.slow)])
def test_training_ends_with_the_command_that_completes_the_upload(fault, server, tmp_path, capsys):
    folder = tmp_path / "a run"
    env = server.client(tmp_path / "home", TOKEN)
    if fault == "down":
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port, where nobody listens
    server.faults = dict.fromkeys(("create_repo", "commit"), Fault(503))
    process = start(folder, env, "--num_steps", "6")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 4 and "Traceback" not in output and TOKEN not in output
    assert checkpoints.newest_good(folder / "checkpoints")[0].name == "step-6"  # type: ignore[index]
    *_, last = output.strip().splitlines()
    cause, command = last.split("; to upload it later: ")
    assert "try again later" in cause and command == f"ddpm-hf publish '{folder}' tester/tiny"
    server.faults.clear()
    cli.main(shlex.split(command)[1:])
    assert capsys.readouterr().out == f"{server.url}/tester/tiny\n"
    grids = {f"samples/step-{step}-{kind}.png" for step in (3, 6) for kind in ("raw", "ema")}
    assert set(server.files("tester/tiny")) == ALLOWED - {"samples/step-3-ema.png"} | grids


@pytest.mark.parametrize(
    ("login", "tracker"),
    [
        ("environment", "tensorboard"),
        pytest.param("file", "tensorboard", marks=pytest.mark.slow),
        pytest.param("environment", "trackio", marks=pytest.mark.slow),
    ],
)
def test_the_token_is_written_nowhere(login, tracker, server, tmp_path, capsys):
    """While the Hub repeats it in its errors, warnings and headers: in no output, log, tracker, file or upload."""
    pytest.importorskip(tracker)
    folder, home = tmp_path / "run", tmp_path / "home"
    env = server.client(home, TOKEN if login == "environment" else None) | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    if login == "file":
        home.mkdir()
        (home / "token").write_text(TOKEN)
    server.faults = {"create_repo": Fault(418, times=1), "preupload": Fault(503, times=2), "commit": Fault(418)}
    process = start(folder, env, "--num_steps", "6", "--report_to", tracker)
    outputs = [process.communicate(timeout=120)[0]]
    assert process.returncode == 4 and "Bearer [token]" in outputs[0]
    assert {"create_repo", "preupload", "commit"} == set(server.failed)
    server.faults.clear()
    cli.main(["publish", str(folder), "tester/tiny"])
    outputs += capsys.readouterr()
    (home / "token").unlink(missing_ok=True)  # where it belongs
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kinds = {Path(name).name.split(".")[0] for name in written}
    assert {"manifest", "options", "metrics", "diffusion_pytorch_model"} <= kinds
    assert tracker != "tensorboard" or "events" in kinds
    commits = server.repos["tester/tiny"].commits.items()
    uploaded = {f"{oid}/{name}": file[2] for oid, tree in commits for name, file in tree.items()}
    assert any(name.endswith("README.md") for name in uploaded)
    for name, text in {**written, **uploaded, **{str(i): text.encode() for i, text in enumerate(outputs)}}.items():
        assert TOKEN.encode() not in text, name


def test_a_signal_does_not_wait_for_an_upload(tmp_path):
    """SIGTERM while the Hub does not answer, to requests that are waited for a minute."""
    folder = tmp_path / "run"
    with LocalHub() as server:
        server.faults["lfs_put"] = Fault("stall")
        process = start(folder, server.client(tmp_path / "home", TOKEN), "--num_steps", "1000000")
        deadline = time.monotonic() + 90
        while not server.failed and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)  # half of the time that the upload would wait
        assert server.failed == ["lfs_put"]
    assert process.returncode == 143 and "stopped by SIGTERM" in output and TOKEN not in output
    assert "Traceback" not in output
