"""The paper's tables: what was published, how to train each row here, and what a checkpoint measured beside it.

Published numbers are those of Ho et al. 2020, of models that its authors trained; they are printed as such and nowhere
else. What a checkpoint measured comes from the evaluation.json that `ddpm-hf evaluate` left beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import runs  # lazily: the command line's parser reads TABLES, before numpy and torch are imported
from ..paper import PAPER_256, PAPER_CIFAR10, compare_with_paper

CIFAR10 = "training/configs/cifar10.yaml"
LSUN = "training/configs/lsun256.yaml"
BLANK = "blank (unstable to train, with poor samples)"
PAPER_PROTOCOL = "50,000 samples of the averaged (EMA) weights, 1000 steps, the checkpoint of lowest FID"


@dataclass(frozen=True)
class Row:
    """A row of a table: what the paper printed, and the options that tell its configuration from the file's."""

    label: str
    published: str
    run: str  # the folder in which its commands train it
    config: str
    options: Mapping[str, str | int] = field(default_factory=dict)
    data: str = ""  # further words of the training command
    data_name: str = "cifar10"  # part of what the data is called

    def train(self) -> str:
        words = "".join(f" --{name} {value}" for name, value in self.options.items())
        return f"accelerate launch training/train.py --config {self.config} --output_dir {self.run}{self.data}{words}"


@dataclass(frozen=True)
class Table:
    title: str
    metrics: str  # of the evaluate command
    dataset: str
    rows: tuple[Row, ...]
    note: str


def _table2_row(prediction: str, objective: str, variance: str, published: str) -> Row:
    prediction_type = {"μ̃": "previous_sample", "ε": "epsilon"}[prediction]
    label = (
        f"{prediction} prediction, "
        + {
            ("vlb", "learned"): "L, learned diagonal Σ",
            ("vlb", "fixed_large"): "L, fixed isotropic Σ",
            ("simple", "fixed_large"): f"mean squared error of {prediction}"
            + (" (L_simple)" if prediction == "ε" else ""),
        }[objective, variance]
    )
    options = {"prediction_type": prediction_type, "objective": objective, "variance_type": variance}
    run = "-".join(["runs/table2", {"μ̃": "mean", "ε": "epsilon"}[prediction], objective, variance])
    return Row(label, published, run, CIFAR10, options)


def _lsun_row(name: str, published: str, num_steps: int, random_flip: bool = True, **more: str | int) -> Row:
    options = {"num_steps": num_steps, "random_flip": str(random_flip).lower(), **more}
    folder = f"LSUN/{name.split(',')[0]}"
    run = f"runs/lsun-{name.split(' (')[0].replace(', ', '-')}"
    return Row(f"LSUN {name}", published, run, LSUN, options, f" --train_data_dir {folder}", name.split(",")[0])


# Table 4: reverse steps → (rate in bits/dim, RMSE on [0, 255])
PROGRESSIVE = {
    1000: (1.77581, 0.95136),
    900: (0.11994, 12.02277),
    800: (0.05415, 18.47482),
    700: (0.02866, 24.43656),
    600: (0.01507, 30.80948),
    500: (0.00716, 38.03236),
    400: (0.00282, 46.12765),
    300: (0.00081, 54.18826),
    200: (0.00013, 60.97170),
    100: (0.00000, 67.60125),
}
_SIMPLE = Row(
    "L_simple", "IS 9.46 ± 0.11, FID 3.17 (5.24 against the test set), NLL ≤ 3.75 bits/dim", "runs/cifar10", CIFAR10
)

TABLES = {
    "table1": Table(
        "Table 1: CIFAR-10, unconditional",
        "fid is bpd",
        "uoft-cs/cifar10",
        (
            Row(
                "L, fixed isotropic Σ",
                "IS 7.67 ± 0.13, FID 13.51, NLL ≤ 3.70 bits/dim",
                "runs/cifar10-vlb",
                CIFAR10,
                {"objective": "vlb"},
            ),
            _SIMPLE,
        ),
        "FID against the training set; NLL on the test set.",
    ),
    "table2": Table(
        "Table 2: reverse process parameterization and objective, CIFAR-10, unconditional",
        "fid is",
        "uoft-cs/cifar10",
        (
            _table2_row("μ̃", "vlb", "learned", "IS 7.28, FID 23.69"),
            _table2_row("μ̃", "vlb", "fixed_large", "IS 8.06, FID 13.22"),
            _table2_row("μ̃", "simple", "fixed_large", BLANK),
            _table2_row("ε", "vlb", "learned", BLANK),
            _table2_row("ε", "vlb", "fixed_large", "IS 7.67, FID 13.51"),
            _table2_row("ε", "simple", "fixed_large", "IS 9.46, FID 3.17"),
        ),
        "",
    ),
    "table3": Table(
        "Table 3: FID of LSUN 256×256",
        "fid",
        "FOLDER",
        (
            _lsun_row("bedroom", "FID 6.36", 2_400_000, random_flip=False),
            _lsun_row(
                "bedroom, large (very probably 192 channels)",
                "FID 4.90",
                1_150_000,
                random_flip=False,
                block_out_channels="192 192 384 384 768 768",
            ),
            _lsun_row("church", "FID 7.89", 1_200_000),
            _lsun_row("cat", "FID 19.75", 1_800_000),
        ),
        "",
    ),
    "table4": Table(
        "Table 4: progressive lossy compression, CIFAR-10 test set",
        "bpd",
        "uoft-cs/cifar10 --split test",
        (
            Row(
                "L_simple",
                "rate and distortion below; with L_0 for the rest, 1.78 + 1.97 bits/dim",
                "runs/cifar10",
                CIFAR10,
            ),
        ),
        "Rates are those of the idealised progressive code of Section 4.3.",
    ),
}


def report(table: str, *, checkpoint: str | None, results: Sequence[Mapping[str, Any]] | None) -> str:
    """The table as text: published rows with their commands, then what `checkpoint` measured, if one is given."""
    chosen = TABLES[table]
    lines = [chosen.title, f"Published by Ho et al. 2020; protocol: {PAPER_PROTOCOL}. {chosen.note}".rstrip(), ""]
    described = {} if checkpoint is None else describe(checkpoint)
    matching = [row for row in chosen.rows if _matches(row, described)] if checkpoint else []
    for row in chosen.rows:
        lines += [f"  {row.label}", f"    published  {row.published}", f"    train      {row.train()}"]
        dataset = f"LSUN/{row.data_name}" if row.config == LSUN else chosen.dataset
        lines.append(f"    evaluate   ddpm-hf evaluate {row.run} --metrics {chosen.metrics} --dataset {dataset}")
        if row in matching:
            lines.append(f"    measured   {checkpoint}: see below")
    if checkpoint is None or results is None:
        return "\n".join(lines + (_progressive({}) if table == "table4" else []))
    relevant = [result for result in results if result["metric"] in chosen.metrics.split()]
    origin = "" if matching else ", which was not trained as any of these rows"
    if "objective" not in described and "learning_rate" not in described:
        origin = ", of whose training nothing is known here"
    measured = _measured(checkpoint, relevant, origin)
    command = f"ddpm-hf evaluate {checkpoint} --metrics {chosen.metrics} --dataset DATASET"
    if not relevant:
        measured.append(f"  nothing yet; run {command}")
    curves = [result for result in relevant if "rate_distortion" in result]
    curves.sort(key=lambda result: result["model"]["weights"] == "raw")  # averaged weights first
    curve = curves[0]["rate_distortion"] if curves else {}
    progressive = _progressive(curve) if table == "table4" else []
    return "\n".join([*lines, "", *measured, *progressive, *_differences(chosen, relevant, described, matching)])


def describe(checkpoint: str) -> dict[str, Any]:
    """Options and configurations in a checkpoint's folder, as far as they are there. ValueError where no model is."""
    folder, model = Path(checkpoint), runs.model_folder(Path(checkpoint))
    options = runs.relevant_options(runs.options_beside(folder))
    configs = [runs.read_json(model / name) for name in ("unet/config.json", "scheduler/scheduler_config.json")]
    return {**options, **configs[0], **configs[1]}


def _matches(row: Row, described: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was trained as this row says, as far as its options tell."""
    data = str(described.get("dataset_name") or described.get("train_data_dir")).lower()
    if row.data_name not in data:
        return False
    keys = ("objective", "prediction_type", "variance_type", "block_out_channels", "sample_size")
    paper = {**PAPER_CIFAR10, "sample_size": 32} if row.config == CIFAR10 else {**PAPER_256, "sample_size": 256}
    wanted = {**paper, **row.options}
    return all(_words(described.get(key)) == _words(wanted[key]) for key in (*keys, *row.options))


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value).lower()


def _measured(checkpoint: str, results: Sequence[Mapping[str, Any]], origin: str) -> list[str]:
    lines = [f"Measured here, on {checkpoint}{origin}:"]
    for result in results:
        data = result["data"]
        where = f", {data['name']} {data['split']}" if data else ""
        lines.append(f"  {result['name']} {runs.shown_value(result)}{where}, {result['model']['weights']} weights")
    return lines


def _progressive(curve: Mapping[str, Sequence[float]]) -> list[str]:
    """Table 4, with a column for a measured curve where it has that number of steps."""
    measured = {}
    if curve:
        columns = (curve["num_reverse_steps"], curve["rate_bpd"], curve["rmse"])
        measured = {steps: (rate, rmse) for steps, rate, rmse in zip(*columns, strict=True)}
    lines = ["", "  reverse steps    published rate, RMSE" + ("    measured rate, RMSE" if measured else "")]
    for steps, (rate, rmse) in PROGRESSIVE.items():
        line = f"  {steps:13}    {rate:14.5f}, {rmse:8.5f}"
        if steps in measured:
            line += f"    {measured[steps][0]:13.5f}, {measured[steps][1]:9.5f}"
        lines.append(line)
    return lines


def _differences(
    table: Table, results: Sequence[Mapping[str, Any]], described: Mapping[str, Any], matching: Sequence[Row]
) -> list[str]:
    """How what was measured differs from the paper: protocol first, then configuration."""
    found = []
    for result in results:
        protocol, model, data = result["protocol"], result["model"], result["data"]
        about = [f"data {data['name']} ({data['split']})"] if data and data["name"] != table.dataset.split()[0] else []
        paper_split = "test" if result["metric"] == "bpd" else "train"
        if data and data["split"] != paper_split:
            about.append(f"the {data['split']} split, where the paper has {paper_split}")
        if protocol.get("num_samples", 50_000) != 50_000:
            about.append(f"{protocol['num_samples']:,} samples instead of 50,000")
        if "inception" not in protocol.get("extractor", "inception"):
            about.append(f"features of {protocol['extractor']}")
        if model["num_inference_steps"] != 1000:
            about.append(f"{model['num_inference_steps']} reverse steps")
        if model["weights"] != "ema":
            about.append(f"{model['weights']} weights")
        if protocol.get("num_timesteps_subset"):
            about.append(f"an estimate from {protocol['num_timesteps_subset']} terms per image")
        if result["metric"] == "bpd":
            about.append("exact decoder, where the paper's code approximates the CDF by a tanh")
            about.append(f"{protocol['num_images']:,} images")
        found.append(f"  {result['name']}: {'; '.join(about) or 'none but the choice of checkpoint'}")
    paper, deviations = compare_with_paper(described, is_points="sample_size" not in described)
    own = {name for row in matching for name in row.options}  # of the row itself
    changed = [f"  {name}: {ours}, in the paper {theirs}" for name, theirs, ours in deviations if name not in own]
    of_protocol = ["", "Differences of protocol:", *found] if found else [""]
    return [*of_protocol, f"Differences from {paper}:", *(changed or ["  none"])]
