"""The requests of an upload: huggingface_hub tries them again, within limits of time, and each failure is one line.

`http_backoff` of huggingface_hub tries a request again after longer and longer waits, or after what `Retry-After`
asks for. An upload needs more: huggingface_hub leaves out the requests that make a repository or a branch, waits
without a limit for an answer and for what is asked, knows no dates, and logs addresses with their signatures. So here
every request of an upload goes through `http_backoff`, with a limit for the request and one for all waits together.
"""

import contextlib
import email.utils
import logging
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from huggingface_hub import get_session, get_token, set_client_factory
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import hf_raise_for_status, http_backoff, parse_ratelimit_headers

from ..runs import on_one_line

logger = logging.getLogger(__name__)

NOT_LOGGED_IN = "not logged in, or the token is not valid: run `hf auth login` or set HF_TOKEN"
CAUSES = {
    401: NOT_LOGGED_IN,
    403: "the token may not write there: it needs write access to this name",
    404: "no such repository or revision, or the token may not see it",
    409: "the repository is being changed by someone else; try again",
    412: "the repository was changed in the meantime; try again",
    429: "the Hub asks for fewer requests; try again later",
}
MAY_PASS = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed later
TIMEOUT_S = 60.0  # for a connection, and for every single wait for the Hub to take or send anything
FIRST_WAIT_S, MAX_RETRIES = 4.0, 7  # of one request; each wait is twice as long as the one before
MAX_WAITED_S = 600.0  # all waits of an upload together


class PublishError(OSError):
    """An upload that did not happen; the message is one line with the cause, and without the token."""


class _Unanswered(ConnectionError):
    """A request that was lost on its way; `http_backoff` tries it again."""


class _GivenUp(ConnectionError):
    """A lost request that is not tried again."""


# ---- trying again --------------------------------------------------------------------------------------------------


@dataclass
class _Upload:
    """What the requests of one upload share."""

    repo_id: str
    keep_trying: Callable[[], bool]
    max_waited_s: float
    waited_s: float = 0.0
    retries: int | None = None  # of the request under way; None between requests
    failure: Exception | None = None  # the one that is waited after

    def may_wait(self, error: Exception, asked_s: float = 0.0) -> bool:
        """Whether the wait after this failure fits into the limit; it is counted where it does."""
        assert self.retries is not None
        wait_s = max(asked_s, FIRST_WAIT_S * 2**self.retries)
        if self.waited_s + wait_s > self.max_waited_s:
            return False
        if not self.waited_s:
            minutes = self.max_waited_s // 60
            logger.warning("%s; trying again for up to %d minutes", _not_uploaded(self.repo_id, error), minutes)
        self.retries, self.waited_s, self.failure = self.retries + 1, self.waited_s + wait_s, error
        return True

    def unanswered(self, what: str) -> ConnectionError:
        """The error to raise for a lost request: one that `http_backoff` waits after, or one that it passes on."""
        error = _Unanswered(what)
        return error if self.may_wait(error) else _GivenUp(what)

    def prepare_wait(self, response: Any) -> None:
        """Have `http_backoff` wait after this answer as usual, or for longer where it asks for that.

        Raises what it says where that is too long.
        """
        asked_s, usual_s = _retry_after_s(response), FIRST_WAIT_S * 2 ** (self.retries or 0)
        try:
            hf_raise_for_status(response)
        except Exception as error:
            if not self.may_wait(error, asked_s):
                raise
        for name in ("RateLimit", "Retry-After"):  # http_backoff knows neither dates nor limits
            response.headers.pop(name, None)
        if asked_s > usual_s:
            response.headers["Retry-After"] = str(round(asked_s))


_current: ContextVar[_Upload | None] = ContextVar("_current", default=None)


class _PatientClient:
    """Goes before huggingface_hub's client class (httpx's, or httpx2's): the requests of an upload are made by
    `http_backoff`, all others as before."""

    def request(self, method: Any, url: Any, **kwargs: Any) -> Any:
        upload = _current.get()
        if upload is None:
            return super().request(method, url, **kwargs)  # type: ignore[misc]
        if upload.retries is not None:  # called by the http_backoff below
            return self._try_once(upload, method, url, **kwargs | {"timeout": TIMEOUT_S})
        upload.retries = 0
        try:
            return http_backoff(
                method,
                url,
                max_retries=MAX_RETRIES,
                base_wait_time=FIRST_WAIT_S,
                max_wait_time=MAX_WAITED_S,
                retry_on_exceptions=_Unanswered,
                retry_on_status_codes=MAY_PASS,
                **kwargs,
            )
        finally:
            upload.retries = None

    def _try_once(self, upload: _Upload, method: Any, url: Any, **kwargs: Any) -> Any:
        if upload.retries and not upload.keep_trying():
            raise _GivenUp(str(upload.failure)) from upload.failure
        try:
            response = super().request(method, url, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if not is_transport_error(error):
                raise
            raise upload.unanswered(type(error).__name__) from error
        response.headers.pop("X-HF-Warning", None)  # would be logged as it is, whatever it says
        if response.status_code == 409 and b"another conflicting operation is in progress" in response.content:
            raise upload.unanswered("another operation is in progress")  # create_repo would ask again at once, always
        if response.status_code in MAY_PASS:
            upload.prepare_wait(response)
        return response


def is_transport_error(error: BaseException) -> bool:
    """Whether a request was lost on its way, by the class that httpx and httpx2 have for it."""
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


@contextlib.contextmanager
def limited_requests(
    repo_id: str, *, keep_trying: Callable[[], bool] = lambda: True, max_waited_s: float | None = None
) -> Iterator[None]:
    """Inside, the requests of this thread are those of one upload: limited in time, and tried again.

    `keep_trying` is asked after each wait. `max_waited_s` of 0 stands for one try each, None for MAX_WAITED_S.
    """
    client: Any = get_session()
    if not isinstance(client, _PatientClient):
        patient: Any = type("Client", (_PatientClient, type(client)), {})
        hooks = client.event_hooks
        # as huggingface_hub makes its own
        set_client_factory(lambda: patient(event_hooks=hooks, follow_redirects=True, timeout=None))
        # http_backoff logs addresses with their signatures
        logging.getLogger("huggingface_hub.utils._http").addFilter(lambda _: _current.get() is None)
    token = _current.set(_Upload(repo_id, keep_trying, MAX_WAITED_S if max_waited_s is None else max_waited_s))
    try:
        yield
    finally:
        _current.reset(token)


# ---- what went wrong, in one line ----------------------------------------------------------------------------------


@contextlib.contextmanager
def failures_in_one_line(repo_id: str) -> Iterator[None]:
    """Inside, every failure becomes a PublishError."""
    try:
        yield
    except Exception as error:  # the client's, its HTTP library's and the operating system's have no base in common
        raise PublishError(_not_uploaded(repo_id, error)) from error


def _not_uploaded(repo_id: str, error: Exception) -> str:
    return f"{repo_id} was not uploaded: {cause(error)}"


def cause(error: Exception) -> str:
    """One line about the error, without the token, and what to do where that is known."""
    chain = list(_chain(error))
    response: Any = next((found for one in chain if (found := getattr(one, "response", None)) is not None), None)
    status = getattr(response, "status_code", None)
    if status in CAUSES:
        asked_s = _retry_after_s(response) if status in MAY_PASS else 0
        return f"{CAUSES[status]} (HTTP {status}{f', in {asked_s:.0f} s' if asked_s else ''})"
    if status in MAY_PASS:
        return f"the Hub is in trouble; try again later (HTTP {status})"
    if isinstance(error, LocalTokenNotFoundError):
        return NOT_LOGGED_IN
    lost = next((one for one in chain if isinstance(one, _Unanswered | _GivenUp)), None)
    if lost is not None:
        return f"the Hub cannot be reached, or does not answer; try again later ({lost})"
    return _safe_to_show(str(error) if isinstance(error, PublishError) else f"{type(error).__name__}: {error}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that caused it; huggingface_hub hides the Hub's answer to a large file behind another."""
    while error is not None:
        yield error
        error = error.__cause__


def _retry_after_s(response: Any) -> float:
    """Seconds that the Hub asks to wait; 0 where it asks for nothing."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):  # else it is a date
        return max(0.0, (email.utils.parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0


def _safe_to_show(text: str) -> str:
    """The start of a text of whatever origin, without the token, and without what signed addresses carry in them."""
    token = None
    with contextlib.suppress(Exception):  # it may have to be fetched
        token = get_token()
    text = text.replace(token, "[token]") if token else text
    text = re.sub(r"(?i)(bearer)\s+[\w.~+/=-]+", r"\1 [token]", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return on_one_line(text)[:400]
