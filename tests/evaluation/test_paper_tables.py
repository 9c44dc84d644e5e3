"""The paper's tables: published numbers, commands that run, and measured numbers that stay apart from them."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from ddpm_hf.cli import build_parser
from ddpm_hf.evaluation.paper_tables import PROGRESSIVE, TABLES, describe, report
from ddpm_hf.runs import build_network, build_scheduler, parse_options, to_yaml

ROOT = Path(__file__).parents[2]
ROWS = [(name, i) for name, table in TABLES.items() for i in range(len(table.rows))]
DIGITS = str(ROOT / "model_cards" / "ddpm-digits")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+", text)]


@pytest.fixture(autouse=True)
def in_a_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the commands are meant to run


def options_of(script: ModuleType, table: str, row: int) -> Any:
    """What the row's command gives; a mistake in it exits."""
    launcher, *arguments = TABLES[table].rows[row].train().split(" training/train.py ")
    assert launcher == "accelerate launch" and len(arguments) == 1
    return parse_options(script.TrainingOptions, shlex.split(arguments[0]))


# ---- published -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "published"),
    [
        # IS ± its deviation, FID, NLL; FID 5.24 is against the test set
        ("table1", [[7.67, 0.13, 13.51, 3.70], [9.46, 0.11, 3.17, 5.24, 3.75]]),
        ("table2", [[7.28, 23.69], [8.06, 13.22], [], [], [7.67, 13.51], [9.46, 3.17]]),
        ("table3", [[6.36], [4.90], [7.89], [19.75]]),
        ("table4", [[1.78, 1.97]]),
    ],
)
def test_published_numbers_are_the_papers(table, published):
    assert [numbers(row.published) for row in TABLES[table].rows] == published
    assert all("blank" in row.published for row in TABLES[table].rows if not numbers(row.published))


def test_table_4_is_the_papers():
    """Reverse steps: rate in bits/dim, RMSE on [0, 255]."""
    recorded = """
        1000 1.77581 0.95136   900 0.11994 12.02277   800 0.05415 18.47482   700 0.02866 24.43656
        600 0.01507 30.80948   500 0.00716 38.03236   400 0.00282 46.12765   300 0.00081 54.18826
        200 0.00013 60.97170   100 0.00000 67.60125"""
    flat = [float(x) for x in recorded.split()]
    assert PROGRESSIVE == {int(s): (r, d) for s, r, d in zip(flat[::3], flat[1::3], flat[2::3], strict=True)}


def test_table_2_is_its_six_combinations(script):
    options = [options_of(script, "table2", i) for i in range(len(TABLES["table2"].rows))]
    assert [(x.prediction_type, x.objective, x.variance_type) for x in options] == [
        ("previous_sample", "vlb", "learned"),
        ("previous_sample", "vlb", "fixed_large"),
        ("previous_sample", "simple", "fixed_large"),
        ("epsilon", "vlb", "learned"),
        ("epsilon", "vlb", "fixed_large"),
        ("epsilon", "simple", "fixed_large"),
    ]
    labels = [row.label for row in TABLES["table2"].rows]
    assert all(("μ̃" in label) == (i < 3) and ("learned" in label) == (i in (0, 3)) for i, label in enumerate(labels))


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_training_commands_differ_as_their_rows_say(script, table, row):
    options = options_of(script, table, row)
    chosen = TABLES[table].rows[row]
    config = [
        "--config",
        chosen.config,
        *(["--train_data_dir", f"LSUN/{chosen.data_name}"] if "lsun" in chosen.config else []),
    ]
    base = parse_options(script.TrainingOptions, config)
    different = {f.name for f in fields(options) if getattr(options, f.name) != getattr(base, f.name)}
    assert different <= {*chosen.options, "output_dir"}
    for name, value in chosen.options.items():  # as it was written
        found = getattr(options, name)
        assert (" ".join(map(str, found)) if isinstance(found, list) else str(found).lower()) == str(value)
    assert options.output_dir == chosen.run


def test_runs_of_different_options_have_different_folders(script):
    """But those that several tables share, which are trained once."""
    trained: dict[str, Any] = {}
    for table, row in ROWS:
        options = options_of(script, table, row)
        assert trained.setdefault(options.output_dir, options) == options
    assert {row.run for row in (TABLES["table4"].rows[0], TABLES["table1"].rows[1])} == {"runs/cifar10"}


def test_lsun_runs_have_the_papers_lengths_flips_and_widths(script):
    found = [options_of(script, "table3", i) for i in range(4)]
    assert [(x.num_steps, x.random_flip, x.block_out_channels[0]) for x in found] == [
        (2_400_000, False, 128),  # bedroom, without flips as in Appendix B
        (1_150_000, False, 192),  # bedroom, large
        (1_200_000, True, 128),  # church
        (1_800_000, True, 128),  # cat
    ]


def test_the_large_bedroom_network_has_the_size_it_probably_had(script):
    with torch.device("meta"):
        unet = build_network(options_of(script, "table3", 1), (3, 256, 256))
    assert sum(p.numel() for p in unet.parameters()) == 255_677_955  # the paper says 256M


@pytest.mark.parametrize("table", TABLES)
def test_every_evaluation_command_can_be_read(table):
    lines = [line.split(maxsplit=1)[1] for line in report(table, checkpoint=None, results=None).splitlines()
             if line.startswith("    evaluate")]  # fmt: skip
    assert len(lines) == len(TABLES[table].rows)
    for line, row in zip(lines, TABLES[table].rows, strict=True):
        program, *arguments = shlex.split(line)
        args = build_parser().parse_args(arguments)
        assert program == "ddpm-hf" and args.checkpoint == row.run and args.num_samples == 50_000
        assert args.metrics == {"table1": ["fid", "is", "bpd"], "table2": ["fid", "is"], "table3": ["fid"]}.get(
            table, ["bpd"]
        )
        assert args.dataset == (f"LSUN/{row.data_name}" if table == "table3" else "uoft-cs/cifar10")
        assert args.split in (None, "test") and args.num_timesteps_subset is args.num_inference_steps is None


# ---- beside a checkpoint -------------------------------------------------------------------------------------------


def result(metric: str = "fid", value: float = 77.7777, **changed: Any) -> dict[str, Any]:
    """As the paper measured, on `table1`'s data; entries of its parts are named part__entry."""
    sampled = {"extractor": "inception-v3-compat", "seeds": "0-49999", "num_reference": 50_000, "num_samples": 50_000}
    bound = {"num_images": 10_000, "seed": 0, "num_timesteps_subset": None, "num_inference_steps": None}
    made = {
        "metric": metric,
        "name": {"fid": "FID", "is": "IS", "bpd": "bits/dim"}[metric],
        "value": value,
        "spread": None,
        "protocol": bound if metric == "bpd" else sampled,
        "model": {"weights": "ema", "num_inference_steps": 1000},
        "data": {"name": "uoft-cs/cifar10", "split": "test" if metric == "bpd" else "train"},
    }
    if metric == "bpd":
        made["rate_distortion"] = {
            "num_reverse_steps": list(range(1, 1001)),
            "rate_bpd": [7000 + i / 1000 for i in range(1, 1001)],
            "rmse": [8000 + i / 1000 for i in range(1, 1001)],
        }
    for path, entry in changed.items():
        part, _, name = path.partition("__")
        if name:
            made[part] = {**made[part], name: entry}
        else:
            made[part] = entry
    return made


def write_run(folder: Path, script: ModuleType, options: Any, side: int) -> str:
    """What a finished run of these options leaves, but for its weights."""
    folder.mkdir(exist_ok=True)
    (folder / "options.yaml").write_text(to_yaml(options), encoding="utf-8")
    (folder / "model_index.json").write_text("{}")
    with torch.device("meta"):
        build_network(options, (3, side, side)).save_config(folder / "unet")
    build_scheduler(options, clip_sample=True).save_config(folder / "scheduler")
    return str(folder)


@pytest.fixture(scope="module")
def cifar10(script, tmp_path_factory) -> str:
    """A run of the paper's CIFAR-10 configuration."""
    options = parse_options(script.TrainingOptions, ["--config", str(ROOT / "training" / "configs" / "cifar10.yaml")])
    return write_run(tmp_path_factory.mktemp("cifar10"), script, options, 32)


def marked(text: str) -> list[str]:
    """Labels of the rows that the report calls measured."""
    blocks = re.findall(
        r"^  (\S.*)\n    published.*\n    train.*\n    evaluate.*\n(    measured)?", text, re.MULTILINE
    )
    return [label for label, is_marked in blocks if is_marked]


@pytest.mark.slow
@pytest.mark.parametrize(("table", "row"), ROWS)
def test_a_run_of_a_rows_command_is_that_row_and_no_other(script, tmp_path, table, row):
    folder = write_run(tmp_path / "run", script, options_of(script, table, row), 256 if table == "table3" else 32)
    text = report(table, checkpoint=folder, results=[])
    assert marked(text) == [TABLES[table].rows[row].label]
    assert "which was not trained as" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"dataset_name": "digits"},
        {"dataset_name": "none", "train_data_dir": "photos"},
        {"objective": "vlb", "variance_type": "fixed_small"},
        {"prediction_type": "v_prediction"},
        {"block_out_channels": "64 128"},
    ],
    ids=str,
)
@pytest.mark.parametrize("table", ["table1", "table2", "table4"])
def test_a_run_of_other_options_is_none_of_the_rows(script, tmp_path, table, changed):
    words = [word for name, value in changed.items() for word in (f"--{name}", *value.split())]
    options = parse_options(script.TrainingOptions, ["--config", "training/configs/cifar10.yaml", *words])
    folder = write_run(tmp_path / "run", script, options, 32)
    text = report(table, checkpoint=folder, results=[result("fid"), result("bpd")])
    assert marked(text) == [] and f"on {folder}, which was not trained as any of these rows:" in text


@pytest.mark.parametrize("table", TABLES)
def test_digits_are_no_row_and_their_differences_are_listed(table):
    text = report(table, checkpoint=DIGITS, results=[])
    assert marked(text) == [] and "which was not trained as any of these rows" in text
    assert f"nothing yet; run ddpm-hf evaluate {DIGITS} --metrics {TABLES[table].metrics} --dataset" in text
    differences = text.partition("Differences from the paper's CIFAR-10 configuration:\n")[2].splitlines()
    assert "  block_out_channels: [32, 64], in the paper [128, 256, 256, 256]" in differences
    assert not any(line.startswith("  beta_schedule") for line in differences)


@pytest.mark.parametrize("table", TABLES)
def test_measured_numbers_stand_apart_from_published_ones(cifar10, table):
    """The part without a checkpoint is not touched but for the mark at a row; what was measured comes after it."""
    bare = report(table, checkpoint=None, results=None)
    assert "Measured" not in bare and "    measured" not in bare and "Published by Ho et al. 2020" in bare
    measured = [result("fid", 77.7777), result("is", 66.6666, spread=0.5555), result("bpd", 55.5555)]
    text = report(table, checkpoint=cifar10, results=measured)
    before, _, after = text.partition("\nMeasured here, on ")
    above = [line for line in before.splitlines() if not line.startswith("    measured")]
    assert above[: len(above) - 1] == bare.splitlines()[: len(above) - 1]
    values = {"fid": "77.7777", "is": "66.6666 ± 0.5555", "bpd": "55.5555"}
    for metric, value in values.items():
        assert value not in before
        assert (value in after) == (metric in TABLES[table].metrics.split())
    assert "published" not in after.replace("published rate, RMSE", "") and str(cifar10) in text
    for line in after.splitlines():
        if "published rate" not in line and table != "table4":
            assert not set(numbers(line)) & {7.67, 13.51, 3.70, 9.46, 3.17, 5.24, 3.75, 6.36, 4.90, 7.89, 19.75}


def test_a_measured_line_says_on_what(cifar10):
    measured = [result("fid"), result("is", 6.5, spread=0.25, data=None, model__weights="raw")]
    text = report("table1", checkpoint=cifar10, results=measured)
    assert "\n  FID 77.7777, uoft-cs/cifar10 train, ema weights\n  IS 6.5000 ± 0.2500, raw weights\n" in text


def test_table_4_has_a_measured_column_from_the_stored_curve(cifar10):
    text = report("table4", checkpoint=cifar10, results=[result("fid"), result("bpd")])
    lines = text.partition("reverse steps")[2].splitlines()[1:11]
    for line, (steps, published) in zip(lines, PROGRESSIVE.items(), strict=True):
        expected = [*published, 7000 + steps / 1000, 8000 + steps / 1000]
        assert line.split()[0] == str(steps) and numbers(line) == pytest.approx(expected, abs=1e-5)
    bare = report("table4", checkpoint=None, results=None)
    lines = bare.partition("reverse steps")[2].splitlines()
    assert "measured" not in lines[0]
    assert [numbers(line) for line in lines[1:]] == [list(pair) for pair in PROGRESSIVE.values()]


def test_a_shorter_curve_fills_the_rows_it_has(cifar10):
    short = {"num_reverse_steps": [100, 150, 200], "rate_bpd": [0.25, 0.5, 0.75], "rmse": [60.5, 50.5, 40.5]}
    text = report("table4", checkpoint=cifar10, results=[result("bpd", rate_distortion=short)])
    lines = text.partition("reverse steps")[2].splitlines()[1:11]
    assert [len(numbers(line)) for line in lines] == [2] * 8 + [4, 4]
    assert numbers(lines[8])[2:] == [0.75, 40.5] and numbers(lines[9])[2:] == [0.25, 60.5]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({}, "FID: none but the choice of checkpoint"),
        ({"name": "FID-5k", "protocol__num_samples": 5000}, "FID-5k: 5,000 samples instead of 50,000"),
        ({"protocol__extractor": "tiny"}, "FID: features of tiny"),
        ({"model__num_inference_steps": 50}, "FID: 50 reverse steps"),
        ({"model__weights": "raw"}, "FID: raw weights"),
        ({"data__name": "photos"}, "FID: data photos (train)"),
        (
            {"model__weights": "as saved", "protocol__num_samples": 10, "name": "FID-10"},
            "FID-10: 10 samples instead of 50,000; as saved weights",
        ),
    ],
    ids=str,
)
def test_differences_of_protocol_are_listed(cifar10, changed, difference):
    text = report("table1", checkpoint=cifar10, results=[result("fid", **changed)])
    listed = text.partition("Differences of protocol:\n")[2].splitlines()
    assert listed[0] == f"  {difference}"
    assert listed[1:] == ["Differences from the paper's CIFAR-10 configuration:", "  none"]


def test_differences_of_the_bound_are_listed(cifar10):
    measured = [result("bpd", protocol__num_timesteps_subset=20, protocol__num_images=64)]
    text = report("table1", checkpoint=cifar10, results=measured)
    (line,) = (line for line in text.splitlines() if line.startswith("  bits/dim: "))
    for difference in ("an estimate from 20 terms per image", "exact decoder", "64 images"):
        assert difference in line


def test_the_folder_wins_over_the_options_it_began_with(script, cifar10, tmp_path):
    """The configurations beside the weights are what runs."""
    described = describe(cifar10)
    options = yaml.safe_load((Path(cifar10) / "options.yaml").read_text(encoding="utf-8"))
    assert described["num_steps"] == 800_000 and described["sample_size"] == 32 and described["clip_sample"] is True
    changed = script.TrainingOptions(**{**options, "variance_type": "fixed_small"})
    folder = Path(write_run(tmp_path / "run", script, changed, 32))
    (folder / "options.yaml").write_text(to_yaml(script.TrainingOptions(**options)), encoding="utf-8")
    assert describe(str(folder))["variance_type"] == "fixed_small"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        report("table1", checkpoint=str(tmp_path), results=[])


# What counts as a difference.


@pytest.mark.parametrize(("table", "row"), [("table1", 0), ("table2", 0), ("table2", 2), ("table3", 1)])
def test_what_a_row_is_made_of_is_no_difference(script, tmp_path, table, row):
    folder = write_run(tmp_path / "run", script, options_of(script, table, row), 256 if table == "table3" else 32)
    text = report(table, checkpoint=folder, results=[])
    assert text.splitlines()[-1] == "  none"


@pytest.mark.parametrize(("metric", "split"), [("fid", "test"), ("bpd", "train")])
def test_another_split_of_the_same_data_is_a_difference(cifar10, metric, split):
    text = report("table1", checkpoint=cifar10, results=[result(metric, data__split=split)])
    assert f"the {split} split" in text.partition("Differences of protocol:\n")[2]


def test_another_data_set_is_none_of_the_lsun_rows(script, tmp_path):
    config = ["--config", "training/configs/lsun256.yaml", "--train_data_dir", "my_holiday_photos"]
    folder = write_run(tmp_path / "run", script, parse_options(script.TrainingOptions, config), 256)
    assert marked(report("table3", checkpoint=folder, results=[])) == []


def test_the_measured_column_is_of_the_averaged_weights(cifar10):
    raw = {"num_reverse_steps": [1000], "rate_bpd": [0.25], "rmse": [9.5]}
    measured = [result("bpd", model__weights="raw", rate_distortion=raw), result("bpd")]
    text = report("table4", checkpoint=cifar10, results=measured)
    (line,) = (line for line in text.splitlines() if line.startswith("           1000 "))
    assert numbers(line)[2:] == [7001.0, 8001.0]


def test_a_converted_checkpoint_shows_no_other_training(script, tmp_path):
    """Of the paper's authors, say: no options say how it was trained."""
    folder = write_run(tmp_path / "run", script, options_of(script, "table1", 1), 32)
    (tmp_path / "run" / "options.yaml").unlink()
    assert "was not trained as" not in report("table1", checkpoint=folder, results=[])
