"""The model card: what it says of a run, and that no name of whatever origin becomes markup."""

import copy
import html
import json
import re
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_results import RESULTS, measured_on
from hostile_names import HOSTILE
from huggingface_hub import ModelCard

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.hub import card as cards, model_card, publishing as hub
from ddpm_hf.paper import compare_with_paper
from ddpm_hf.pipeline_loading import PLAIN_CARD
from ddpm_hf.runs import TrainingOptions, parse_options, public_options, write_results

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, unet, scheduler, **options) -> Path:
    DDPMPaperPipeline(unet, scheduler).save_pretrained(folder)
    (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": None, "train_data_dir": None, **options}))
    return folder


def test_results_of_other_weights_are_not_in_the_card(tiny_unet, tiny_scheduler, tmp_path, caplog):
    """Of a run that went on after it was evaluated, or of its raw weights."""
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    write_results(folder / "evaluation.json", [*measured_on(tiny_unet())[:1], *RESULTS[1:]])
    card: Any = ModelCard(model_card(folder, folder, "tester/x"))
    assert [found.metric_name for found in card.data.eval_results] == ["bits/dim"] and "FID" not in card.text
    assert "2 results of other weights are left out" in caplog.text


def test_results_of_weights_stored_in_half_precision_are_in_the_card(tiny_unet, tiny_scheduler, tmp_path, caplog):
    """They are loaded, and so measured, in float32."""
    write_run(tmp_path, tiny_unet().half(), tiny_scheduler())
    write_results(tmp_path / "evaluation.json", measured_on(DDPMPaperPipeline.from_pretrained(tmp_path).unet)[:1])
    card: Any = ModelCard(model_card(tmp_path, tmp_path, "tester/x"))
    assert [found.metric_name for found in card.data.eval_results] == ["bits/dim"]
    assert "are left out" not in caplog.text


def markup(text: str) -> str:
    """What could be Markdown, HTML, YAML or Jinja in the text, in order; character references are text."""
    return re.sub(r"[\w\s\-/,×+()'.]", "", re.sub(r"&#\d+;", "", text))


def assert_same_shape(card: ModelCard, harmless: ModelCard, names: Sequence[str]) -> None:
    """The card has no markup more than the other, which holds harmless names in the same places."""
    pairs = zip(card.text.splitlines(), harmless.text.splitlines(), strict=True)
    assert all(markup(ours) == markup(theirs) for ours, theirs in pairs), names


def groups(size: int) -> list[list[str]]:
    """All hostile names, so many on one card; the last card is filled up."""
    filled = HOSTILE + HOSTILE[: -len(HOSTILE) % size]
    return [filled[i : i + size] for i in range(0, len(filled), size)]


@pytest.mark.slow
def test_hostile_names_in_options_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    names = ("dataset_name", "init_from", "mixed_precision", "random_flip", "seed")

    def card(values: Sequence[str]) -> ModelCard:
        options = {**dict(zip(names, values, strict=True)), "num_samples": 4}
        (folder / "options.yaml").write_text(yaml.safe_dump(options))
        return ModelCard(model_card(folder, folder, "tester/x"))

    harmless = card(["harmless"] * len(names))
    assert harmless.text.count("harmless") == len(names) + 1  # random_flip stands in two tables
    for values in groups(len(names)):
        hostile = card(values)
        assert hostile.data.to_dict() == harmless.data.to_dict()
        assert_same_shape(hostile, harmless, values)
        assert "www." not in hostile.text and len(hostile.text) < len(harmless.text) + 12_000


def test_hostile_names_of_folders_and_versions_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    (folder / "train_state").mkdir()

    def card(versions: Sequence[str], data: str) -> ModelCard:
        (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": None, "train_data_dir": data}))
        manifest = {"step": 3, "environment": {value: value for value in versions}, "options": {}}
        (folder / "train_state" / "manifest.json").write_text(json.dumps(manifest))
        return ModelCard(model_card(folder, folder, "tester/x"))

    harmless = card([f"harmless {i}" for i in range(10)], "harmless")
    for values in groups(10):
        hostile = card(values, values[0])
        assert hostile.data.to_dict() == harmless.data.to_dict()
        assert_same_shape(hostile, harmless, values)


def test_absolute_paths_are_cut_to_their_last_part(tiny_unet, tiny_scheduler, tmp_path):
    private = {"train_data_dir": "/home/ann/photos", "init_from": "/mnt/disk/base"}
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler(), **private)
    text = model_card(folder, folder, "tester/x")
    assert "trained on photos" in text and "Fine-tuned from base" in text and "/home" not in text
    assert "--train_data_dir YOUR_FOLDER" in text
    assert public_options({**private, "a": "runs/x", "b": 3}) == {
        **{"train_data_dir": "photos", "init_from": "base"},
        **{"a": "runs/x", "b": 3},
    }


def test_what_is_not_known_drops_its_section(tiny_mlp, tiny_scheduler, tmp_path):
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(tmp_path)
    card = ModelCard(model_card(tmp_path, tmp_path, "tester/points", license="mit"))
    headings = re.findall(r"^## (.*)", card.text, flags=re.MULTILINE)
    assert headings == ["Use", "Limitations", "Citation"]
    assert "for points in 2 dimensions" in card.text and 'seeds=range(16), output_type="np")' in card.text
    assert "None" not in card.text and "![" not in card.text
    assert card.data.license == "mit" and "datasets" not in card.data.to_dict()


def test_results_stand_in_the_card_and_in_its_metadata(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    card: Any
    without: Any = ModelCard(model_card(folder, folder, "tester/x"))
    assert without.data.eval_results is None and "## Evaluation" not in without.text
    write_results(folder / "evaluation.json", measured_on(tiny_unet()))
    card = ModelCard(model_card(folder, folder, "tester/x"))
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


@pytest.mark.slow
def test_hostile_names_in_results_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    """In the body as text; in the metadata as they are, on one line, read back character by character."""
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    measured = measured_on(tiny_unet())[1]

    def card(values: Sequence[str]) -> Any:
        results: Any = [copy.deepcopy(measured) | {"name": value} for value in values]
        for result, value in zip(results, values, strict=True):
            result["data"] |= {"name": value, "split": value}
            result["protocol"]["extractor"] = result["model"]["weights"] = value
        (folder / "evaluation.json").write_text(json.dumps({"results": results}), encoding="utf-8")
        return ModelCard(model_card(folder, folder, "tester/x"))

    harmless = card([f"harmless {i}" for i in range(10)])
    for values in groups(10):
        hostile = card(values)
        assert_same_shape(hostile, harmless, values)
        lines = [" ".join("".join(c if c.isprintable() else " " for c in value).split()) for value in values]
        found = {(each.dataset_name, each.dataset_split, each.metric_name) for each in hostile.data.eval_results}
        assert found == {(line, line, f"{line}, 50 steps") for line in lines}
        kept = {key: entry for key, entry in hostile.data.to_dict().items() if key != "model-index"}
        assert kept == {key: entry for key, entry in harmless.data.to_dict().items() if key != "model-index"}


def test_a_garbage_evaluation_gives_a_plain_card(tiny_unet, tiny_scheduler, tmp_path, caplog):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler())
    (folder / "evaluation.json").write_text("garbage")
    with pytest.raises(ValueError, match="is not a list of evaluation results"):
        model_card(folder, folder, "tester/x")
    assert hub.card_or_plain(folder, folder, "tester/x") == PLAIN_CARD.format(repo_id="tester/x")
    assert "evaluation.json is not a list of evaluation results" in caplog.text


def test_a_public_data_set_is_named_in_the_metadata(server, tiny_unet, tiny_scheduler, tmp_path, monkeypatch):
    folder = write_run(tmp_path, tiny_unet(), tiny_scheduler(), dataset_name="ann/birds")
    monkeypatch.chdir(folder)
    server.datasets["ann/secret"] = True
    names = ("ann/birds", "ann/secret", "ann/nothing", "digits", "unet/config.json")
    assert [cards.is_public_dataset(name) for name in names] == [True, False, False, False, False]
    assert ModelCard(model_card(folder, folder, "tester/x")).data.datasets == ["ann/birds"]


@pytest.mark.parametrize("config", ["cifar10", "celebahq256", "lsun256"])
def test_the_papers_configurations_do_not_differ_from_it(config):
    arguments = ["--config", str(ROOT / f"training/configs/{config}.yaml"), "--dataset_name", "x"]
    options = parse_options(TrainingOptions, arguments)
    scheduler = DDPMPaperScheduler(beta_schedule=options.beta_schedule, variance_type=options.variance_type).config
    size = 32 if config == "cifar10" else 256
    paper, deviations = compare_with_paper({**vars(options), **scheduler, "sample_size": size})
    assert deviations == [] and ("CIFAR-10" in paper) == (size == 32)
    changed = {**vars(options), **scheduler, "sample_size": size, "ema_decay": 0.99, "beta_schedule": "quad"}
    assert compare_with_paper(changed)[1] == [("beta_schedule", "linear", "quad"), ("ema_decay", 0.9999, 0.99)]


def test_the_template_is_one_text_and_belongs_to_the_package():
    ours = files("ddpm_hf.hub").joinpath("card_template.md").read_bytes()
    assert (ROOT / "model_cards" / "template.md").read_bytes() == ours
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "hub/card_template.md" in project["tool"]["setuptools"]["package-data"]["ddpm_hf"]


@pytest.mark.parametrize("config", ["cifar10", "celebahq256", "lsun256"])
def test_cards_of_the_papers_configurations(config):
    card = ModelCard((ROOT / "model_cards" / config / "README.md").read_text(encoding="utf-8"))
    assert card.data.library_name == "diffusers" and "arxiv:2006.11239" in card.data.tags
    assert "No weights are released" in card.text and "published" in card.text
    assert f"accelerate launch training/train.py --config training/configs/{config}.yaml" in card.text


# ---- classes -------------------------------------------------------------------------------------------------------


def write_labelled(folder: Path, unet: Any, scheduler: Any, names: dict[int, str], counts: dict[str, int]) -> Path:
    DDPMPaperPipeline(unet, scheduler, id2label=names).save_pretrained(folder)
    (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": "pets", "train_data_dir": None}))
    (folder / "train_state").mkdir(exist_ok=True)
    manifest = {"step": 3, "options": {}, "dataset": {"classes": counts}}
    (folder / "train_state" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_classes_and_how_to_draw_them(tiny_unet, tiny_scheduler, tmp_path):
    unet = tiny_unet(num_class_embeds=3, null_class=2)
    folder = write_labelled(tmp_path, unet, tiny_scheduler(), {0: "cat", 1: "dog"}, {"cat": 1234, "dog": 5})
    card = ModelCard(model_card(folder, folder, "tester/pets"))
    assert "| 0 | cat | 1,234 |\n| 1 | dog | 5 |\n" in card.text
    assert "samples = pipe(seeds=range(16)).images" in card.text
    (line,) = re.findall(r"^by_class = (.*)", card.text, flags=re.MULTILINE)
    pipe: Any = DDPMPaperPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert len(eval(line, {"pipe": pipe})) == 16  # the card's own words run
    assert "unconditional" not in card.text and "pipeline_tag" not in card.data.to_dict()


def test_a_network_that_needs_labels_is_given_them(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_labelled(tmp_path, tiny_unet(num_class_embeds=2), tiny_scheduler(), {0: "cat"}, {})
    card = ModelCard(model_card(folder, folder, "tester/pets"))
    lines = re.findall(r"^samples = (.*)", card.text, flags=re.MULTILINE)
    pipe: Any = DDPMPaperPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert len(lines) == 2 and all(len(eval(line, {"pipe": pipe})) == 16 for line in lines)
    assert "guidance_scale" not in card.text and "| 1 |  |  |" in card.text


def test_many_classes_are_counted_and_impossible_numbers_ignored(tiny_unet, tiny_scheduler, tmp_path):
    folder = write_labelled(tmp_path, tiny_unet(num_class_embeds=40), tiny_scheduler(), {}, {})
    card = ModelCard(model_card(folder, folder, "tester/pets"))
    assert "| 29 |" in card.text and "| 30 |" not in card.text and "And 10 more" in card.text
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    for rows in (10**15, "many", -3, True, [1]):
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "num_class_embeds": rows}))
        assert "| class |" not in ModelCard(model_card(folder, folder, "tester/pets")).text


@pytest.mark.slow
def test_hostile_names_of_classes_stay_names(tiny_unet, tiny_scheduler, tmp_path):
    unet = tiny_unet(num_class_embeds=10)

    def card(names: Sequence[str]) -> ModelCard:
        unique = {i: f"{name}{i}" for i, name in enumerate(names)}
        counts = dict.fromkeys(unique.values(), 7)
        folder = write_labelled(tmp_path, unet, tiny_scheduler(), unique, counts)
        return ModelCard(model_card(folder, folder, "tester/x"))

    harmless = card(["harmless"] * 10)
    for values in groups(10):
        hostile = card(values)
        assert hostile.data.to_dict() == harmless.data.to_dict()
        assert_same_shape(hostile, harmless, values)
