"""Publishing a run on the Hub.

What may leave the machine is decided in one place, `UPLOADED` in uploaded.py. The token is that of
huggingface_hub, from `hf auth login` or HF_TOKEN; nothing here takes, prints or stores it.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from ..pipeline_ddpm_paper import without_origin
from ..pipeline_loading import PLAIN_CARD
from ..runs import check_names as check_names, model_folder, public_options, read_options
from .card import model_card
from .retries import PublishError, cause, failures_in_one_line, limited_requests
from .uploaded import files_to_upload

CONFIGURATIONS = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"}
logger = logging.getLogger(__name__)

MODEL_PARTS = ("model_index.json", "pipeline.py", "unet/", "scheduler/")


def create(repo_id: str, *, private: bool = False, keep_trying: Callable[[], bool] = lambda: True) -> None:
    """Make the repository unless it is there. Raises PublishError; also for a public one where `private` is asked."""
    with failures_in_one_line(repo_id), limited_requests(repo_id, keep_trying=keep_trying):
        _create(HfApi(), repo_id, private=private)


def _create(api: HfApi, repo_id: str, *, private: bool) -> None:
    api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the organization has it
    # create_repo leaves one that exists as it is
    if private and not api.model_info(repo_id).private:
        raise PublishError("it exists and is public; make it private in its settings, or give another name")


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    checkpoint: Path | None = None,
    keep_trying: Callable[[], bool] = lambda: True,
) -> str:
    """Upload a run, or any saved pipeline, with a model card, in one commit. Returns the page's address.

    Args:
        run: a training run's folder, finished or not, of which the newest good checkpoint is taken; or a pipeline's.
            A README.md that lies in it is uploaded as it is, in place of the generated card.
        repo_id: "user/name". Made where it does not exist.
        private: make it private; refused where it exists and is public.
        revision: a branch, made where it does not exist; None: main.
        license: an identifier the Hub knows, such as "apache-2.0", for the card.
        checkpoint: the one whose model is uploaded, in place of the run's own.
        keep_trying: asked before a request is tried again; False ends the upload.

    Only what `UPLOADED` names is uploaded. Where the Hub is down or asks to wait, its requests are tried again; all
    waits together take at most ten minutes. Raises ValueError for names that cannot be and folders without a model,
    PublishError where the Hub cannot be reached or refuses.
    """
    check_names(repo_id, revision)
    run = Path(run)
    model = checkpoint or model_folder(run)
    api = HfApi()
    with failures_in_one_line(repo_id):
        contents = _contents(run, model)
        if "README.md" not in contents:
            contents["README.md"] = card_or_plain(run, model, repo_id, revision=revision, license=license).encode()
        operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        with limited_requests(repo_id, keep_trying=keep_trying):
            _create(api, repo_id, private=private)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            for operation in operations:  # large files one by one: for several at once huggingface_hub takes threads,
                if operation.path_in_repo.endswith((".safetensors", ".png")):  # and a process waits for them to exit
                    api.preupload_lfs_files(repo_id, [operation], revision=revision, free_memory=False)
            api.create_commit(repo_id, operations, commit_message="Upload with ddpm_hf", revision=revision)
    return f"{api.endpoint}/{repo_id}"


def _contents(run: Path, model: Path) -> dict[str, Any]:
    """What is uploaded, by its path in the repository: files, and configurations without this machine's paths."""
    contents: dict[str, Any] = {
        name: path for name, path in files_to_upload(run).items() if not name.startswith(MODEL_PARTS)
    }
    contents |= {name: path for name, path in files_to_upload(model).items() if name.startswith(MODEL_PARTS)}
    if not any(name.endswith(".safetensors") for name in contents):
        raise PublishError(f"{model} has no weights in safetensors")
    for name in contents.keys() & CONFIGURATIONS:
        contents[name] = without_origin(contents[name])
    if "options.yaml" in contents:
        options = public_options(read_options(contents["options.yaml"]))
        contents["options.yaml"] = yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode()
    return contents


def card_or_plain(run: Path, model: Path, repo_id: str, **kwargs: Any) -> str:
    """The run's card; a plain one, with a warning, where it cannot be made: that must not stop an upload."""
    try:
        return model_card(run, model, repo_id, **kwargs)
    except Exception as error:  # whatever is wrong with a run's files
        logger.warning("a plain model card is uploaded, since the run's could not be written: %s", cause(error))
        return PLAIN_CARD.format(repo_id=repo_id)
