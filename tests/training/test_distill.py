"""training/distill.py: runs in processes of the tests' own, so small that they teach nothing but where things go."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from fork_server import pair_variables
from PIL import Image
from tiny_runs import finish_pair, start, train

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.convert import pipeline_to_stock
from ddpm_hf.evaluation import Protocol
from ddpm_hf.hub.card import model_card
from ddpm_hf.runs import Updates, checkpoints, read_metrics, weights_sha256
from training import distill as distill_py

TINY = {
    "dataset_name": "digits",
    "stages": [20, 4, 2, 1],
    "num_steps": [4, 3, 3, 2],
    "global_batch_size": 16,
    "ema_decay": 0.5,
    "checkpoint_every": 2,
    "log_every": 1,
    "num_samples": 0,
    "cpu_threads": 1,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A tiny run of training/train.py, 20 timesteps."""
    return train(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def by_class(tmp_path_factory) -> Path:
    """The same with labels."""
    return train(tmp_path_factory.mktemp("by_class"), label_column="label")


def words(folder: Path, teacher: Path, **options: Any) -> list[str]:
    given = {"output_dir": folder, "teacher": teacher, **TINY, **options}
    lists = {name: value for name, value in given.items() if isinstance(value, list)}
    plain = [f"--{name}={value}" for name, value in given.items() if name not in lists]
    return [*plain, *itertools.chain(*([f"--{name}", *map(str, value)] for name, value in lists.items()))]


def distil(folder: Path, teacher: Path, **options: Any) -> Path:
    """Run main() as in a process of its own, with a blank for curves.png."""
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_hf.runs.log.training_curves", lambda *lines, **marks: Image.new("L", (8, 8)))
        distill_py.main(words(folder, teacher, **options))
    return folder


def refusal(folder: Path, teacher: Path, **options: Any) -> str:
    """The line with which main() exits instead of distilling."""
    with pytest.raises(SystemExit) as exit_info:
        distil(folder, teacher, **options)
    message = exit_info.value.code
    assert isinstance(message, str), f"exit code {message}"
    assert message.startswith("distill.py: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory) -> Path:
    return distil(tmp_path_factory.mktemp("finished"), teacher)


def hashes(folder: Path, step: int = 12) -> dict[str, str]:
    """Of everything that training goes on from."""
    state = folder / "checkpoints" / f"step-{step}" / "train_state"
    return {path.name: path.read_bytes().hex() for path in sorted(state.glob("*.safetensors"))}


# ---- what it makes -------------------------------------------------------------------------------------------------


def test_the_result_is_a_checkpoint_that_states_its_steps(finished):
    index = json.loads((finished / "model_index.json").read_text())
    assert index["num_inference_steps"] == 1 and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    scheduler = json.loads((finished / "scheduler" / "scheduler_config.json").read_text())
    expected = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    assert scheduler.items() >= {**expected, "set_alpha_to_one": True, "num_train_timesteps": 20}.items()
    assert {path.name for path in finished.iterdir()} >= {"pipeline.py", "unet", "options.yaml", "report.html"}


@pytest.mark.parametrize("num_steps", [20, 4, 2, 1])
def test_the_student_of_each_stage_draws_in_its_own_number_of_steps(finished, num_steps):
    pipe = DDPMPaperPipeline.from_pretrained(finished / "stages" / f"{num_steps}-steps")
    drawn = pipe(seeds=range(3), output_type="np").images
    assert pipe.num_timesteps == num_steps
    stated = pipe(seeds=range(3), output_type="np", num_inference_steps=num_steps).images
    assert (drawn == stated).all()  # type: ignore[union-attr]
    pipe(seeds=[0], num_inference_steps=10)
    assert pipe.num_timesteps == 10


def test_other_steps_than_its_own_are_warned_about(finished, caplog):
    pipe = DDPMPaperPipeline.from_pretrained(finished / "stages" / "4-steps")
    pipe(seeds=[0])
    assert not caplog.records
    pipe(seeds=[0], num_inference_steps=5)
    assert "this model was distilled for 4 steps; of the timesteps of 5 it knows few or none" in caplog.text


def test_the_last_student_is_the_model(finished):
    last, model = (DDPMPaperPipeline.from_pretrained(f) for f in (finished / "stages" / "1-steps", finished))
    assert weights_sha256(last.unet.state_dict()) == weights_sha256(model.unet.state_dict())


def test_stock_draws_the_same_images(finished, tmp_path):
    """By the code that the checkpoint carries it is told nothing; converted, it is told the number of steps."""
    folder = finished / "stages" / "4-steps"
    ours = DDPMPaperPipeline.from_pretrained(folder)
    images = ours(seeds=range(4), output_type="np").images
    pipeline_to_stock(ours).save_pretrained(tmp_path / "stock")
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "stock")
    assert type(stock) is diffusers.DDIMPipeline
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    theirs = stock(batch_size=4, generator=generators, num_inference_steps=4, output_type="np").images
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(images), rtol=0, atol=1e-4)


def test_its_card_says_how_to_draw_and_how_it_was_made(finished, teacher):
    card = model_card(finished, finished / "checkpoints" / "step-12", "me/few")
    assert "into 1 reverse steps" in card and "Compared with" not in card
    assert "where it is told `num_inference_steps=1`" in card
    assert "python training/distill.py --config options.yaml" in card
    losses = {line["step"]: line["loss"] for line in read_metrics(finished / "metrics.jsonl")}
    for steps, end in ((20, 4), (4, 7), (2, 10), (1, 12)):
        assert f"| {steps} | {end} | {losses[end]:g} |" in card


def test_the_bound_of_a_student_is_refused(finished):
    """Its network was taught at one timestep; of samples the protocol says how many steps they took."""
    pipe = DDPMPaperPipeline.from_pretrained(finished)
    with pytest.raises(ValueError, match="distilled for those of 1 steps"):
        Protocol(dataset="digits").of_model(pipe)
    assert Protocol(dataset="digits", metrics=("fid",)).of_model(pipe).num_inference_steps == 1
    assert Protocol(dataset="digits", metrics=("fid",), num_inference_steps=4).of_model(pipe).num_inference_steps == 4


def test_the_first_stage_has_the_teachers_weights_to_begin_with(teacher, tmp_path):
    """And each other stage the averaged weights of the one before, with an optimizer that remembers nothing."""
    distil(tmp_path, teacher, num_steps=[2, 2, 2, 2], learning_rate=1e-30)
    model = DDPMPaperPipeline.from_pretrained(teacher).unet.state_dict()
    for stage in tmp_path.glob("stages/*"):
        student = DDPMPaperPipeline.from_pretrained(stage).unet.state_dict()
        torch.testing.assert_close(student, model, rtol=0, atol=1e-7)


def test_the_learning_rate_falls_to_0_in_every_stage(finished):
    rates = [line["learning_rate"] for line in read_metrics(finished / "metrics.jsonl")]
    expected = [2e-4 * (1 - made / count) for count in TINY["num_steps"] for made in range(count)]
    assert rates == pytest.approx([1e-3 / 2e-4 * rate for rate in expected])  # of distill_digits.yaml


def test_grids_are_drawn_of_few_steps(teacher, tmp_path):
    distil(tmp_path, teacher, num_samples=2, stages=[20, 1], num_steps=[2])
    names = {path.name for path in tmp_path.glob("samples/*")}
    assert names == {f"step-{step}-{kind}.png" for step in (2, 4) for kind in ("raw", "ema")}


def test_guidance_is_distilled(by_class, tmp_path):
    """The student's classes are the teacher's, and what it learns without a learning rate is not what it has."""
    losses = []
    for scale in (1.0, 5.0):
        options = {"label_column": "label", "stages": [20], "num_steps": [2], "guidance_scale": scale}
        distil(tmp_path / str(scale), by_class, learning_rate=1e-30, **options)
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(scale) / "metrics.jsonl")])
    pipe = DDPMPaperPipeline.from_pretrained(tmp_path / "5.0")
    assert pipe.classes == DDPMPaperPipeline.from_pretrained(by_class).classes and pipe.null_class == 10
    assert losses[0] != losses[1]
    guided, plain = (
        model_card(tmp_path / scale, tmp_path / scale / "checkpoints" / "step-2", "me/few") for scale in ("5.0", "1.0")
    )
    assert "guidance_scale=2.0" in plain and "guidance_scale=" not in guided
    assert "Leave `guidance_scale` at 1: the guidance is learned" in guided


def test_points_are_distilled(tmp_path):
    """By a network of another kind, whose samples are not clipped."""
    points = {"dataset_name": "swiss_roll", "hidden_size": 8, "num_layers": 1}
    teacher = train(tmp_path / "teacher", **points)
    few = distil(tmp_path / "few", teacher, dataset_name="swiss_roll", stages=[20, 2], num_steps=[2])
    assert DDPMPaperPipeline.from_pretrained(few)(seeds=range(3), output_type="np").images.shape == (3, 2)  # type: ignore[union-attr]


def test_a_learned_variance_is_left_out(tmp_path):
    """Its half of the channels has no place in a student."""
    options = {"objective": "vlb", "variance_type": "learned"}
    student = distil(tmp_path / "few", train(tmp_path / "teacher", **options), num_steps=[1])
    assert DDPMPaperPipeline.from_pretrained(student).unet.config["out_channels"] == 1


def test_a_teacher_that_predicts_v_needs_no_first_stage(finished, teacher, tmp_path):
    """A student is such a teacher."""
    student = distil(tmp_path / "first", finished / "stages" / "20-steps", stages=[4], num_steps=[2])
    assert DDPMPaperPipeline.from_pretrained(student).config["num_inference_steps"] == 4
    assert "must begin with 20" in refusal(tmp_path / "other", teacher, stages=[4], num_steps=[2])


def test_a_student_as_a_teacher_takes_its_own_steps(finished, tmp_path, monkeypatch):
    """It was taught those timesteps alone, and is asked at no others."""
    asked = set()
    plain = DDPMPaperPipeline.model_output

    def recorded(self: Any, x_t: Any, t: Any, *rest: Any, **more: Any) -> Any:
        asked.update(t.tolist())
        return plain(self, x_t, t, *rest, **more)

    monkeypatch.setattr(DDPMPaperPipeline, "model_output", recorded)
    four = finished / "stages" / "4-steps"
    student = distil(tmp_path / "two", four, stages=[2], num_steps=[3])
    assert asked == {4, 9, 14, 19}
    assert DDPMPaperPipeline.from_pretrained(student).config["num_inference_steps"] == 2
    message = refusal(tmp_path / "three", four, stages=[3], num_steps=[2])
    assert message == "distill.py: --stages: 3 does not divide the teacher's 4 steps, for which it was distilled"


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(monkeypatch) -> Callable[..., None]:
    """killed(folder, teacher, at): a run that is gone before its update `at`, or as stage `at` is to be kept."""

    def run(folder: Path, teacher: Path, at: int | str, **options: Any) -> None:
        begin, keep = Updates.begin, distill_py.runs.keep_student

        def begins(updates: Updates) -> None:
            if updates.state.step == at:
                raise KeyboardInterrupt
            begin(updates)

        def keeps(stage: Any, *rest: Any, **others: Any) -> None:
            if stage.name == at:
                raise KeyboardInterrupt
            keep(stage, *rest, **others)

        with monkeypatch.context() as patch:
            patch.setattr(Updates, "begin", begins)
            patch.setattr(distill_py.runs, "keep_student", keeps)
            with pytest.raises(KeyboardInterrupt):
                distil(folder, teacher, **options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 5, 6, 9, 11, "stages/20-steps", "stages/4-steps", "stages/1-steps"])
def test_a_killed_run_ends_with_the_bits_of_one_left_alone(finished, teacher, tmp_path, killed, at):
    """In the middle of the first stage and of others, and between two, before and after the student is kept."""
    killed(tmp_path, teacher, at)
    distil(tmp_path, teacher)
    assert hashes(tmp_path) == hashes(finished)
    for stage in finished.glob("stages/*"):
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "stages" / stage.name / weights).read_bytes() == (stage / weights).read_bytes()
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 13))


def test_the_same_command_again_changes_nothing(finished, teacher, tmp_path):
    before = hashes(finished)
    distil(finished, teacher)
    assert hashes(finished) == before


def test_another_teacher_or_other_stages_are_refused(finished, teacher, by_class, tmp_path):
    other = train(tmp_path / "other", seed=1)
    assert "teacher_sha256 was" in refusal(finished, other)
    assert "stages was" in refusal(finished, teacher, stages=[20, 4, 1], num_steps=[4, 3, 3])
    assert "num_steps was" in refusal(finished, teacher, num_steps=[3])


def test_another_teacher_may_be_allowed_by_the_name_that_the_refusal_gives(teacher, tmp_path):
    other = train(tmp_path / "other", seed=1)
    run = distil(tmp_path / "run", teacher, stages=[20], num_steps=[2])
    message = refusal(run, other, stages=[20], num_steps=[2])
    assert "pass --allow_changes teacher_sha256 to go on" in message
    distil(run, other, stages=[20], num_steps=[2], allow_changes="teacher_sha256")


def test_the_teachers_process_is_compared_too(teacher, tmp_path):
    run = distil(tmp_path / "run", teacher, stages=[20], num_steps=[2])
    copied = shutil.copytree(teacher, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((copied / "scheduler" / "scheduler_config.json").read_text())
    config["beta_schedule"] = "squaredcos_cap_v2"
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert "teacher_process was" in refusal(run, copied, stages=[20], num_steps=[2])


def test_one_number_of_steps_is_that_of_each_stage(teacher, tmp_path):
    run = distil(tmp_path / "run", teacher, stages=[20, 4], num_steps=[2])
    before = hashes(run, 4)
    distil(run, teacher, stages=[20, 4], num_steps=[2, 2])
    assert hashes(run, 4) == before


def test_a_new_run_in_the_same_folder_has_its_own_pictures_and_stages(teacher, tmp_path):
    options = {"stages": [20, 4], "num_steps": [2], "num_samples": 4}
    first = distil(tmp_path, teacher, **options)
    old = {path.name: path.read_bytes() for path in (first / "samples").iterdir()}
    distil(tmp_path, teacher, **{**options, "stages": [20, 2]}, seed=5, resume="never")
    new = {path.name: path.read_bytes() for path in (first / "samples").iterdir()}
    assert new.keys() == old.keys() and all(new[name] != old[name] for name in old)
    assert {path.name for path in (first / "stages").iterdir()} == {"20-steps", "2-steps"}
    assert {path.name for path in (first / "stages.1").iterdir()} == {"20-steps", "4-steps"}


def test_the_teachers_weights_are_part_of_a_checkpoint(finished):
    """Where the first stage is over, for the checkpoint of the original may be gone."""
    checkpoint = finished / "checkpoints" / "step-12"
    assert checkpoints.has(checkpoint, "teacher")
    student = DDPMPaperPipeline.from_pretrained(finished / "stages" / "2-steps").unet.state_dict()
    torch.testing.assert_close(checkpoints.read(checkpoint, "teacher"), student, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_do_what_one_does(finished, teacher, tmp_path):
    command = [distill_py.__file__, *words(tmp_path, teacher)]
    finish_pair([start(tmp_path, variables=variables, command=command) for variables in pair_variables()])
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (finished, tmp_path))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in mine], abs=1e-4)
    one, two = (DDPMPaperPipeline.from_pretrained(folder).unet.state_dict() for folder in (finished, tmp_path))
    torch.testing.assert_close(two, one, rtol=0, atol=2e-3)  # Adam's first steps turn roundings of 1e-7 into signs


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [40, 20], "num_steps": [1]}, "--stages must begin with 20"),
        ({"label_column": "label"}, "the teacher has no classes"),
        ({"label_column": "label", "guidance_scale": 2.0}, "the teacher has no classes"),
        ({"dataset_name": "swiss_roll"}, "(1, 8, 8), the data are (2,); give the data that it was trained on"),
        ({"dataset_name": "custom_nets:in_colour"}, "--in_channels 1 --convert_channels converts images"),
        ({"in_channels": 3}, "the model expects 3 channels (--in_channels), the data has 1"),
        ({"dataset_name": "moons", "random_flip": True}, "--random_flip mirrors images, and the data are points"),
        ({"global_batch_size": 10_000}, "fewer than global_batch_size"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(teacher, tmp_path, options, message):
    assert message in refusal(tmp_path / "run", teacher, **options)


def test_labels_are_not_dropped_for_a_teacher_that_needs_them(tmp_path):
    needing = train(tmp_path / "teacher", label_column="label", label_dropout=0)
    options = {"label_column": "label", "stages": [20], "num_steps": [1]}
    distil(tmp_path / "run", needing, **options)  # the default is for those that have a null_class
    message = refusal(tmp_path / "other", needing, **options, label_dropout=0.3)
    assert "--label_dropout 0.3 needs a teacher with a null_class" in message


def test_a_teacher_with_classes_needs_labels(by_class, tmp_path):
    assert "the data have none" in refusal(tmp_path / "run", by_class)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [20, 3]}, "3 must be less than 20 and divide it"),
        ({"stages": [4, 4]}, "4 must be less than 4 and divide it"),
        ({"stages": [20, 0]}, "must each lie in [1, 1000000]"),
        ({"num_steps": [1, 2]}, "are 2 numbers for 4 --stages"),
        ({"guidance_scale": 2.0}, "needs labels; --label_column"),
        ({"guidance_scale": -1.0}, "--guidance_scale=-1.0"),
        ({"teacher": ""}, "--teacher is missing"),
        ({"teacher": "runs/x", "output_dir": "runs/../runs/x"}, "is the teacher's folder, whose model would be lost"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0 must be positive"),
    ],
)
def test_options_that_cannot_be_are_refused(capsys, tmp_path, options, message):
    with pytest.raises(SystemExit) as exit_info:
        distill_py.parse(words(tmp_path, **{"teacher": tmp_path / "teacher", **options}))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_options_that_may_change_are_options():
    of_distillation = distill_py.DistillationOptions.__dataclass_fields__.keys()
    of_training = distill_py.runs.TrainingOptions.__dataclass_fields__.keys()
    assert distill_py.runs.FREE_IN_DISTILLATION - {"num_processes"} <= of_distillation | of_training
    assert not distill_py.runs.FREE_IN_DISTILLATION & {"num_steps", "stages", "learning_rate", "guidance_scale"}
    assert os.environ.get("RANK") is None
