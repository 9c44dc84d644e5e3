"""evaluation.json: results of one protocol replace each other, all others stay, and other files are refused."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.runs import read_results, records as results, write_results

RESULT: dict[str, Any] = {
    "metric": "fid",
    "name": "FID-5k",
    "value": 12.5,
    "spread": None,
    "protocol": {"extractor": "tiny", "seeds": "0-4999", "num_reference": 1437, "num_samples": 5000},
    "model": {
        "weights": "ema",
        "weights_sha256": "ab12",
        "scheduler": "DDPMPaperScheduler",
        "variance_type": "fixed_large",
        "num_inference_steps": 1000,
    },
    "data": {"name": "digits", "split": "train", "fingerprint": "cd34"},
    "environment": {"torch": "2.13.0", "num_processes": 1},
    "time_utc": "2026-11-20T15:00:00+00:00",
}


def result(value: float = 12.5, **changed: Any) -> dict[str, Any]:
    """The result with other entries, named by their keys joined with two underscores."""
    made: Any = copy.deepcopy(RESULT) | {"value": value}
    for path, entry in changed.items():
        *parents, last = path.split("__")
        place = made
        for parent in parents:
            place = place[parent]
        place[last] = entry
    return made


OTHER_PROTOCOLS = [
    {"metric": "kid"},
    {"name": "FID"},
    {"protocol__seeds": "1-5000"},
    {"protocol__extractor": "inception"},
    {"protocol": {"num_images": 360, "num_levels": 17, "num_timesteps_subset": None}},
    {"model__weights": "raw"},
    {"model__variance_type": "fixed_small"},
    {"model__num_inference_steps": 50},
    {"data__split": "test"},
    {"data__fingerprint": "ef56"},
    {"data": None},
]


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "evaluation.json"
    assert read_results(path) == []
    written = [result(), result(1.5, **OTHER_PROTOCOLS[4])]
    write_results(path, written)
    assert read_results(path) == written
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == written
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("changed", OTHER_PROTOCOLS, ids=str)
def test_another_protocol_is_another_result(tmp_path, changed):
    path = tmp_path / "evaluation.json"
    write_results(path, [result(1.0)])
    write_results(path, [result(2.0, **changed)])
    assert [x["value"] for x in read_results(path)] == [1.0, 2.0]
    write_results(path, [result(3.0)])
    assert [x["value"] for x in read_results(path)] == [2.0, 3.0]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"model__weights_sha256": "trained on"},
        {"environment": {"torch": "3.0", "num_processes": 8}},
        {"time_utc": "2027-01-01T00:00:00+00:00"},
        {"spread": 0.5},
    ],
    ids=str,
)
def test_the_same_protocol_is_measured_anew(tmp_path, changed):
    """Also where training went on in the meantime, on other machines and on another day."""
    path = tmp_path / "evaluation.json"
    others = [result(float(i), **changed) for i, changed in enumerate(OTHER_PROTOCOLS)]
    write_results(path, [*others[:5], result(-1.0), *others[5:]])
    new = result(-2.0, **changed)
    write_results(path, [new])
    assert read_results(path) == [*others, new]


def test_several_results_replace_each_its_own(tmp_path):
    path = tmp_path / "evaluation.json"
    write_results(path, [result(1.0), result(2.0, metric="kid"), result(3.0, metric="is")])
    write_results(path, [result(4.0, metric="is"), result(5.0)])
    assert [(x["metric"], x["value"]) for x in read_results(path)] == [("kid", 2.0), ("is", 4.0), ("fid", 5.0)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"3",
        b"null",
        b'{"step": 3, "loss": 0.1}',
        b'{"results": 3}',
        b'{"results": [3]}',
        b'{"results": [{}]}',
        b'{"results": [{"metric": "fid"}]}',
    ],
    ids=repr,
)
def test_another_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"evaluation\.json is not a list of evaluation results") as error:
        read_results(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is not a list of evaluation results"):
        write_results(path, [result()])
    assert path.read_bytes() == content


def test_an_interrupted_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    write_results(path, [result(1.0)])
    write_text = Path.write_text

    def half(self: Path, text: str, **kwargs: Any) -> int:
        write_text(self, text[: len(text) // 2], **kwargs)
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path, "write_text", half)
        write_results(path, [result(2.0)])
    assert read_results(path) == [result(1.0)]
    write_results(path, [result(3.0)])
    assert read_results(path) == [result(3.0)] and os.listdir(tmp_path) == [results.RESULTS]


@pytest.mark.parametrize("missing", ["name", "value", "spread", "protocol", "data"])
def test_a_result_that_lacks_something_is_refused(tmp_path, missing):
    incomplete = result()
    del incomplete[missing]
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": [incomplete]}), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a list of evaluation results"):
        read_results(tmp_path / "evaluation.json")
