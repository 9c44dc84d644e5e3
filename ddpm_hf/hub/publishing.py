"""Publishing a run on the Hub.

What may leave the machine is decided in one place, `UPLOADED` in pipeline_ddpm_paper.py. The token is that of
huggingface_hub, from `hf auth login` or HF_TOKEN; nothing here takes, prints or stores it.

Left to itself, huggingface_hub waits for an answer for ever and hides five retries, with waits of any length, in each
of some requests. Here every request is made once and waited for a minute, and `publish` alone tries again.
"""

import contextlib
import email.utils
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from ..pipeline_ddpm_paper import PLAIN_CARD, files_to_upload
from ..runs import model_folder, on_one_line, public_options, read_options
from .card import model_card

logger = logging.getLogger(__name__)

MODEL_PARTS = ("model_index.json", "pipeline.py", "unet/", "scheduler/")
NOT_LOGGED_IN = "not logged in, or the token is not valid: run `hf auth login` or set HF_TOKEN"
CAUSES = {
    401: NOT_LOGGED_IN,
    403: "the token may not write there: it needs write access to this name",
    404: "no such repository or revision, or the token may not see it",
    409: "the repository is being changed by someone else; try again",
    412: "the repository was changed in the meantime; try again",
    429: "the Hub asks for fewer requests; try again later",
}
MAY_PASS = {408, 429, 500, 502, 503, 504}  # statuses after which the same request may do better later
TIMEOUT_S = 60.0  # for a connection, and for every single wait for the Hub to take or send anything
FIRST_WAIT_S, MAX_WAITED_S = 4.0, 600.0  # between tries: four times longer each, and so long in all


class PublishError(OSError):
    """An upload that did not happen; the message is one line with the cause, and without the token."""

    retry_after_s: float | None = None  # what the Hub asks to wait, or 0; None: waiting alone does not help


# ---- the upload ----------------------------------------------------------------------------------------------------


def check_names(repo_id: str, revision: str | None = None) -> None:
    """Raises ValueError unless `repo_id` is user/name, as the Hub has it, and `revision` a plain branch name."""
    name = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
    is_name = re.fullmatch(f"{name}/{name}", repo_id, re.ASCII) and max(map(len, repo_id.split("/"))) <= 96
    if not is_name or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ValueError(
            f"the repository is {repo_id[:100]!r}; give it as user/name, each of at most 96 letters, digits, '-', '_' "
            "and '.'"
        )
    if revision is not None and not re.fullmatch(f"{name}(?:/{name})*", revision, re.ASCII):
        raise ValueError(f"the revision is {revision!r}; give the name of a branch, such as main or v2")


def create(repo_id: str, *, private: bool = False) -> None:
    """Make the repository unless it is there. Raises PublishError; also for a public one where `private` is asked."""
    with _one_line_errors(repo_id):
        HfApi().create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the organization has it
        # create_repo leaves one that exists as it is
        if private and not HfApi().model_info(repo_id).private:
            raise PublishError("it exists and is public; make it private in its settings, or give another name")


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    checkpoint: Path | None = None,
    sleep: Callable[[float], object] = time.sleep,
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
        sleep: waits so many seconds between tries; what it raises ends them.

    Only what `UPLOADED` names is uploaded. What may pass, such as a Hub that is down or asks to wait, is tried again
    for up to ten minutes. Raises ValueError for names that cannot be and folders without a model, PublishError where
    the Hub cannot be reached or refuses.
    """
    check_names(repo_id, revision)
    run = Path(run)
    model = checkpoint or model_folder(run)
    next_wait_s, waited_s = FIRST_WAIT_S, 0.0
    while True:
        try:
            create(repo_id, private=private)
            return _upload(run, model, repo_id, revision=revision, license=license)
        except PublishError as error:
            wait_s = max(next_wait_s, error.retry_after_s or 0)
            if error.retry_after_s is None or waited_s + wait_s > MAX_WAITED_S:
                raise
            if not waited_s:
                logger.warning("%s; trying again for up to %d minutes", error, MAX_WAITED_S // 60)
        sleep(wait_s)
        next_wait_s, waited_s = 4 * next_wait_s, waited_s + wait_s


def _upload(run: Path, model: Path, repo_id: str, *, revision: str | None, license: str | None) -> str:
    """One try of `publish`, into a repository that is there. What an earlier one brought up is not sent again."""
    with _one_line_errors(repo_id):
        contents: dict[str, Any] = {
            name: path for name, path in files_to_upload(run).items() if not name.startswith(MODEL_PARTS)
        }
        contents |= {name: path for name, path in files_to_upload(model).items() if name.startswith(MODEL_PARTS)}
        if not any(name.endswith(".safetensors") for name in contents):
            raise PublishError(f"{model} has no weights in safetensors")
        if "options.yaml" in contents:
            options = public_options(read_options(contents["options.yaml"]))
            contents["options.yaml"] = yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode()
        if "README.md" not in contents:
            contents["README.md"] = card_or_plain(run, model, repo_id, revision=revision, license=license).encode()
        api = HfApi()
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        for operation in operations:  # large files one by one: for several at once huggingface_hub takes threads, for
            if operation.path_in_repo.endswith((".safetensors", ".png")):  # which a process waits before it can exit
                api.preupload_lfs_files(repo_id, [operation], revision=revision, free_memory=False)
        api.create_commit(repo_id, operations, commit_message="Upload with ddpm_hf", revision=revision)
    return f"{api.endpoint}/{repo_id}"


# ---- requests, and what becomes of them ----------------------------------------------------------------------------

_uploading: ContextVar[bool] = ContextVar("_uploading", default=False)


class _Unanswered(ConnectionError):
    """A request that was lost on its way; the same one may do better later."""


class _OneTry:
    """Goes before the client class of huggingface_hub (httpx's, or httpx2's) and changes its requests in an upload:
    they end in time, and what http_backoff would repeat fails at once. All others are sent as before."""

    def send(self, request: Any, **kwargs: Any) -> Any:
        if not _uploading.get():
            return super().send(request, **kwargs)  # type: ignore[misc]
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_S)
        try:
            response = super().send(request, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if any(base.__name__ == "TransportError" for base in type(error).__mro__):
                raise _Unanswered(type(error).__name__) from error
            raise
        response.headers.pop("X-HF-Warning", None)  # would be logged as it is, whatever it says
        if response.status_code in MAY_PASS:
            response.read()
            hf_raise_for_status(response)
        if response.status_code == 409 and b"another conflicting operation is in progress" in response.read():
            raise _Unanswered("another operation is in progress")  # create_repo would ask again for ever, at once
        return response


def _prepare_client() -> None:
    """Have huggingface_hub make its requests through `_OneTry`, from now on."""
    client: Any = get_session()
    if not isinstance(client, _OneTry):
        patient: Any = type("Client", (_OneTry, type(client)), {})
        hooks = client.event_hooks
        # as huggingface_hub makes its own
        set_client_factory(lambda: patient(event_hooks=hooks, follow_redirects=True, timeout=None))


@contextlib.contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Inside, requests are made once, and every failure is a PublishError."""
    token = _uploading.set(True)
    try:
        _prepare_client()
        yield
    except Exception as error:  # the client's, its HTTP library's and the operating system's have no base in common
        raised = PublishError(f"{repo_id} was not uploaded: {_cause(error)}")
        raised.retry_after_s = _retry_after_s(error)
        raise raised from error
    finally:
        _uploading.reset(token)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that caused it; huggingface_hub hides the Hub's answer to a large file behind another."""
    while error is not None:
        yield error
        error = error.__cause__


def _response(error: Exception) -> Any:
    responses = (getattr(one, "response", None) for one in _chain(error))
    return next((response for response in responses if response is not None), None)


def _retry_after_s(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait, 0 where it says nothing; None where waiting alone does not help."""
    response = _response(error)
    if response is None:
        lost = [one for one in _chain(error) if isinstance(one, ConnectionError | TimeoutError)]
        return None if not lost or isinstance(lost[0], OfflineModeIsEnabled) else 0.0
    if response.status_code not in MAY_PASS:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):  # else it is a date
        return max(0.0, (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0


def _cause(error: Exception) -> str:
    """One line about the error, without the token, and what to do where that is known."""
    status = getattr(_response(error), "status_code", None)
    if status in CAUSES:
        asked_s = _retry_after_s(error)
        return f"{CAUSES[status]} (HTTP {status}{f', in {asked_s:.0f} s' if asked_s else ''})"
    if status in MAY_PASS:
        return f"the Hub is in trouble; try again later (HTTP {status})"
    if isinstance(error, LocalTokenNotFoundError):
        return NOT_LOGGED_IN
    lost = next((one for one in _chain(error) if isinstance(one, _Unanswered)), None)
    if lost is not None:
        return f"the Hub cannot be reached, or does not answer; try again later ({lost})"
    return _safe_to_show(str(error) if isinstance(error, PublishError) else f"{type(error).__name__}: {error}")


def _safe_to_show(text: str) -> str:
    """The start of a text of whatever origin, without the token, and without what signed addresses carry in them."""
    token = None
    with contextlib.suppress(Exception):  # it may have to be fetched
        token = get_token()
    text = text.replace(token, "[token]") if token else text
    text = re.sub(r"(?i)(bearer)\s+[\w.~+/=-]+", r"\1 [token]", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return on_one_line(text)[:400]


def card_or_plain(run: Path, model: Path, repo_id: str, **kwargs: Any) -> str:
    """The run's card; a plain one, with a warning, where it cannot be made: that must not stop an upload."""
    try:
        return model_card(run, model, repo_id, **kwargs)
    except Exception as error:  # whatever is wrong with a run's files
        logger.warning("a plain model card is uploaded, since the run's could not be written: %s", _cause(error))
        return PLAIN_CARD.format(repo_id=repo_id)
