"""What may leave the machine: the files of a run that are uploaded, and no others."""

from pathlib import Path

from ..pipeline_ddpm_paper import PIPELINE_FILES, files_matching

# A pipeline, and what a run leaves beside it; `*` stays within one folder.
UPLOADED = (*PIPELINE_FILES, "samples/*.png", "curves.png", "metrics.jsonl", "options.yaml", "evaluation.json")


def files_to_upload(folder: str | Path) -> dict[str, Path]:
    """The files of `folder` that `UPLOADED` names, by their names in a repository; nothing behind a symlink."""
    return files_matching(UPLOADED, folder)
