"""`ddpm-hf train` and `distill`: the scripts of training/, found and run as it would run by itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fork_server
import pytest

from ddpm_hf.cli import build_parser, main, train as command
from ddpm_hf.runs import TrainingOptions, parse_options

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train.py"
TINY = "--num_train_timesteps 5 --beta_end 0.5 --global_batch_size 8 --num_samples 1 --sample_every 0 --cpu_threads 1"


def run(*command: str | Path, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of Python with these words."""
    variables = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# ---- the words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["--config", "a.yaml", "-o", "x"], ["x", "--", "--y"], ["--version"], ["-1", ""]]
)
@pytest.mark.parametrize("name", ["train", "distill"])
def test_every_word_is_passed_on(name, words):
    assert build_parser().parse_args([name, *words]).words == words


@pytest.mark.parametrize("name", ["train", "distill"])
def test_the_script_of_a_wheel_comes_before_what_lies_beside_it(tmp_path, monkeypatch, capsys, name):
    """In site-packages, what lies beside the package is of somebody else."""
    places = [tmp_path / "ddpm_hf" / "training", tmp_path / "training"]
    monkeypatch.setattr(command, "PLACES", places)
    monkeypatch.setattr(sys, "argv", [])
    for place in reversed(places):
        place.mkdir(parents=True)
        (place / f"{name}.py").write_text("import sys; print(__name__, *sys.argv, sep='|')")
        main([name, "--num_steps", "3"])
        assert capsys.readouterr().out == f"__main__|{place / name}.py|--num_steps|3\n"


@pytest.mark.parametrize("name", ["train", "distill"])
def test_without_a_script_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(command, "PLACES", [tmp_path])
    with pytest.raises(SystemExit, match=rf"^ddpm-hf: training/{name}.py is not .*pip install 'ddpm_hf\[train\]'$"):
        main([name])


@pytest.mark.parametrize("given", ["training/configs/points.yaml", "points.yaml"])
def test_a_config_of_the_script_is_found_from_everywhere(given, tmp_path, monkeypatch, capsys):
    """In a wheel the configs lie beside the script. A file that is here comes first."""
    monkeypatch.chdir(tmp_path)
    default = SCRIPT.parent / "configs" / "digits.yaml"
    expected = parse_options(TrainingOptions, ["--config", str(default.with_name("points.yaml"))])
    assert parse_options(TrainingOptions, ["--config", given], default_config=default) == expected
    (tmp_path / given).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / given).write_text("dataset_name: moons\nnum_steps: 7\n")
    assert parse_options(TrainingOptions, ["--config", given], default_config=default).num_steps == 7
    for missing in ("other/points.yaml", "pionts.yaml"):
        with pytest.raises(SystemExit):
            parse_options(TrainingOptions, ["--config", missing], default_config=default)
        assert f"--config {missing}: [Errno 2]" in capsys.readouterr().err


# ---- the script, from another folder -------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("words", ["--help", "--num_stesp 3", "--num_steps ten"])
def test_help_and_mistakes_are_the_scripts_own(words, tmp_path):
    ours = run("-m", "ddpm_hf.cli", "train", *words.split(), cwd=tmp_path)
    assert ours == run(SCRIPT, *words.split(), cwd=tmp_path)
    assert "Traceback" not in ours[2] and ours[0] == (0 if words == "--help" else 2)


@pytest.mark.integration
def test_data_that_are_not_there_end_it_as_the_script(tmp_path):
    words = ["--dataset_name", "none", "--train_data_dir", "nowhere"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["-m", "ddpm_hf.cli", "train", *words]
    done = fork_server.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True)
    errors = done.stderr
    assert done.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("train.py: ") and "nowhere" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(lambda words, **options: fork_server.run(words, **options), marks=pytest.mark.integration),
        pytest.param(
            lambda words, **options: subprocess.run([sys.executable, *words], **options), marks=pytest.mark.slow
        ),
    ],
    ids=["fork", "interpreter"],
)
def test_it_trains_with_processes_that_decode(tmp_path, start):
    """Processes that a script starts import it again: they find it where it is."""
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(sorted((ROOT / "docs").rglob("*.png"))[:3]):
        shutil.copy(image, tmp_path / "photos" / f"{i}.png")
    words = f"{TINY} --train_data_dir photos --dataset_name none --resolution 8 --num_workers 2 --num_steps 2"
    words = words.replace("--global_batch_size 8", "--global_batch_size 3")
    command = ["-m", "ddpm_hf.cli", "train", *words.split(), "--output_dir", "run"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = start(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model_index.json").is_file()


@pytest.mark.slow
def test_ctrl_c_ends_it_as_the_script(tmp_path):
    words = ["train", *TINY.split(), "--num_steps", "1000000", "--log_every", "1", "--output_dir", "run"]
    process = fork_server.Forked(
        ["-m", "ddpm_hf.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "stopped by SIGINT after step" in errors.splitlines()[-1]
