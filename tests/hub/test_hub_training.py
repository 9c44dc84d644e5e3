"""Training that uploads, and a Hub that fails: the real script and its exit codes, in processes of their own."""

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fork_server import Forked
from local_hub import MODEL, TOKEN, Fault, LocalHub

from ddpm_hf.cli import main
from ddpm_hf.runs import checkpoints

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
TRAINING = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 5 --beta_end 0.5 --warmup_steps 2 --ema_decay 0.5 --checkpoint_every 3 --log_every 1 "
    "--sample_every 3 --num_samples 4 --cpu_threads 1 --push_to_hub --hub_model_id tester/tiny "
    "--hub_strategy every_save"
).split()
RECORDS = {"README.md", "options.yaml", "metrics.jsonl", "curves.png"}
IMPATIENT = (  # the script, with shorter waits between tries, and a longer one for an answer
    "import runpy, sys; from ddpm_hf.hub import retries; retries.FIRST_WAIT_S, retries.MAX_WAITED_S = 0.01, 1.0; "
    "retries.TIMEOUT_S = 600.0; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def start(folder: Path, env: dict[str, str], *options: str) -> Forked:
    script = str(ROOT / "training" / "train.py")
    words = ["-c", IMPATIENT, script, *TRAINING, "--output_dir", str(folder), *options]
    pythonpath = {"PYTHONPATH": str(ROOT)}
    return Forked(words, cwd=ROOT, env=env | pythonpath, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", pytest.param("down", marks=pytest.mark.slow)])
def test_training_ends_with_the_command_that_uploads_later(fault, server, tmp_path, capsys):
    folder = tmp_path / "a run"
    env = server.client(tmp_path / "home", TOKEN)
    if fault == "down":
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port, where nobody listens
    server.faults = dict.fromkeys(("create_repo", "commit"), Fault(503))
    process = start(folder, env, "--num_steps", "6")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 4 and "Traceback" not in output and TOKEN not in output
    assert checkpoints.newest_good(folder / "checkpoints")[0].name == "step-6"  # type: ignore[index]
    *_, last = output.strip().splitlines()
    cause, command = last.split("; to upload it later: ")
    assert "try again later" in cause and command == f"ddpm-hf publish '{folder}' tester/tiny"
    server.faults.clear()
    main(shlex.split(command)[1:])
    assert capsys.readouterr().out == f"{server.url}/tester/tiny\n"
    grids = {f"samples/step-{step}-{kind}.png" for step in (3, 6) for kind in ("raw", "ema")}
    assert set(server.files("tester/tiny")) == MODEL | RECORDS | grids


@pytest.mark.parametrize(
    ("login", "tracker"),
    [
        ("environment", "tensorboard"),
        ("file", "tensorboard"),
        ("environment", "trackio"),
    ],
)
@pytest.mark.slow
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
    outputs = [process.communicate(timeout=600)[0]]
    assert process.returncode == 4 and "Bearer [token]" in outputs[0]
    assert {"create_repo", "preupload", "commit"} == set(server.failed)
    server.faults.clear()
    main(["publish", str(folder), "tester/tiny"])
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


@pytest.mark.slow
def test_a_signal_does_not_wait_for_an_upload(tmp_path):
    """SIGTERM while the Hub does not answer to requests that are waited for ten minutes."""
    folder = tmp_path / "run"
    with LocalHub() as server:
        server.faults["lfs_put"] = Fault("stall")
        process = start(folder, server.client(tmp_path / "home", TOKEN), "--num_steps", "1000000")
        deadline = time.monotonic() + 600
        while not server.failed and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=300)  # half of the time that the upload would wait
        assert server.failed == ["lfs_put"]
    assert process.returncode == 143 and "stopped by SIGTERM" in output and TOKEN not in output
    assert "Traceback" not in output
