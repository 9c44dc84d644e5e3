"""Names of repositories and branches, and the options of training that name them."""

from pathlib import Path

import pytest
from hostile_names import HOSTILE

from ddpm_hf.hub import check_names
from ddpm_hf.runs import TrainingOptions, parse_options

ROOT = Path(__file__).parents[2]


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
        check_names(name)


def test_hostile_names_are_no_repositories():
    """Nor revisions; but for those words that are as good a name as any."""
    harmless = {"null", "yes", "0x1F", "1e3", "2026-01-01", "CON", "evil.com", "www.evil.com"}
    assert harmless < set(HOSTILE)
    for value in HOSTILE:
        for repo_id in (value, f"tester/{value}", f"{value}/x"):
            if repo_id not in {f"tester/{word}" for word in harmless} | {f"{word}/x" for word in harmless}:
                with pytest.raises(ValueError, match="give it as user/name"):
                    check_names(repo_id)
        if value not in harmless | {"x" * 10_000, "user/name.git"}:
            with pytest.raises(ValueError, match="give the name of a branch"):
                check_names("tester/x", value)


def test_names_that_repositories_have():
    for name in ("a/b", "ann/ddpm-cifar10_32.v1", "A1/0"):
        check_names(name, "feature/x-1.0")
    with pytest.raises(ValueError, match="the revision is 'a\"b'"):
        check_names("a/b", 'a"b')


def training_options(*arguments: str):
    return parse_options(TrainingOptions, arguments, default_config=ROOT / "training/configs/digits.yaml")


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
