"""A Hub that fails, in ten ways at each of the endpoints that an upload asks: over real HTTP, without real waits."""

import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.utils._http as client
import pytest
from huggingface_hub import HfApi, constants, get_session
from local_hub import MODEL, TOKEN, Fault, LocalHub

from ddpm_hf.hub import BackgroundUploads, publishing as hub, retries
from ddpm_hf.hub.background import SNAPSHOTS

ALLOWED = MODEL | {"README.md", "options.yaml", "metrics.jsonl", "curves.png", "samples/step-3-ema.png"}
ENDPOINTS = {  # what an upload to a branch of a private repository asks
    *("dataset", "create_repo", "info", "create_branch", "preupload", "lfs_batch", "lfs_put", "validate_yaml"),
    "commit",
}
FAULTS = {
    **{str(status): Fault(status) for status in (401, 403, 404, 409, 412, 500, 503)},
    "429": Fault(429, retry_after="7"),
    "reset": Fault("reset"),
    "stall": Fault("stall"),
}
EVERYWHERE = ("403", "503", "reset")  # one fault of each kind; the others at two endpoints, and in the slow tier
CASES = [
    pytest.param(
        endpoint,
        fault,
        id=f"{endpoint}-{fault}",
        marks=[] if fault in EVERYWHERE or endpoint in ("create_repo", "commit") else pytest.mark.slow,
    )
    for endpoint in sorted(ENDPOINTS)
    for fault in FAULTS
]
PASSING = ("429", "500", "503", "reset", "stall")
USUAL_WAITS = [4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
REMEDIES = {
    "401": "run `hf auth login` or set HF_TOKEN (HTTP 401)",
    "403": "it needs write access to this name (HTTP 403)",
    "404": "no such repository or revision, or the token may not see it (HTTP 404)",
    "409": "the repository is being changed by someone else; try again (HTTP 409)",
    "412": "the repository was changed in the meantime; try again (HTTP 412)",
    "429": "the Hub asks for fewer requests; try again later (HTTP 429, in 7 s)",
    "500": "the Hub is in trouble; try again later (HTTP 500)",
    "503": "the Hub is in trouble; try again later (HTTP 503)",
    "reset": "the Hub cannot be reached, or does not answer; try again later",
    "stall": "the Hub cannot be reached, or does not answer; try again later (ReadTimeout)",
}


def assert_one_line(text: str) -> None:
    assert "\n" not in text and TOKEN not in text and "Traceback" not in text, text


def expected_cause(endpoint: str, fault: str) -> str:
    if fault == "409" and endpoint in ("create_repo", "create_branch"):
        return REMEDIES["404"]  # there it says that it exists, and then it does not
    return REMEDIES[fault]


def impatient(monkeypatch, fault: str) -> None:
    """Where the Hub does not answer: half a second for a request, and two tries."""
    if fault == "stall":
        monkeypatch.setattr(retries, "TIMEOUT_S", 0.5)
        monkeypatch.setattr(retries, "MAX_WAITED_S", retries.FIRST_WAIT_S)


@pytest.mark.parametrize(("endpoint", "fault"), CASES)
def test_an_upload_fails_in_one_line_and_then_completes(
    endpoint, fault, server, small_run, waits, caplog, monkeypatch
):
    options: dict[str, Any] = {"private": True, "revision": "v2"}
    passing = fault in PASSING and endpoint != "dataset"  # which is asked only for a link in the card
    impatient(monkeypatch, fault)
    server.faults[endpoint] = FAULTS[fault]
    if endpoint != "dataset":
        with pytest.raises(hub.PublishError) as error:
            hub.publish(small_run, "tester/x", **options)
        assert str(error.value).startswith("tester/x was not uploaded: ")
        assert expected_cause(endpoint, fault) in str(error.value)
        assert_one_line(str(error.value))
        # what may pass is asked eight times, what cannot once; a longer wait that is asked for is kept, and a second
        expected = [8.0 if fault == "429" else 4.0, *USUAL_WAITS[1:]]
        assert waits == (expected[: 1 if fault == "stall" else 7] if passing else [])
        assert server.failed == [endpoint] * (len(waits) + 1)
        # the fault goes away: at first while we wait, then for good
        server.faults[endpoint] = FAULTS[fault]._replace(times=passing)

    def wait(seconds: float) -> None:
        waits.append(seconds)
        monkeypatch.setattr(retries, "TIMEOUT_S", 60.0)

    waits.clear()
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=wait))
    assert hub.publish(small_run, "tester/x", **options) == f"{server.url}/tester/x"
    assert len(waits) == passing
    assert set(server.files("tester/x", "v2")) == ALLOWED
    assert server.files("tester/x", "v2")["curves.png"] == b"curves.png, not really"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 * passing and all("trying again for up to" in line for line in told)
    for line in told:
        assert_one_line(line)


def test_the_endpoints_above_are_those_that_an_upload_asks(server, small_run, monkeypatch):
    seen = set()
    monkeypatch.setattr(server, "next_fault", lambda endpoint: seen.add(endpoint))
    hub.publish(small_run, "tester/x", private=True, revision="v2")
    assert seen == ENDPOINTS


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in EVERYWHERE else pytest.mark.slow) for fault in FAULTS]
)
def test_training_goes_on_whatever_the_hub_does(fault, server, small_run, tmp_path, waits, caplog, monkeypatch):
    """The uploads beside it tell each failure in one line, and the last one ends in bounded time."""
    caplog.set_level(logging.INFO)
    folder = Path(shutil.copytree(small_run, tmp_path / "run"))
    impatient(monkeypatch, fault)
    server.faults = dict.fromkeys(("create_repo", "commit"), FAULTS[fault])
    uploads = BackgroundUploads(folder, "tester/x", private=True)
    uploads.submit(folder / "checkpoints" / "step-3")
    shutil.rmtree(folder / "checkpoints" / "step-3" / "unet")  # pruned while it is uploaded
    shutil.copytree(small_run / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(hub.PublishError) as error:
        uploads.finish()
    assert_one_line(str(error.value))
    for record in caplog.records:
        assert_one_line(record.getMessage())
        assert record.exc_info is None
    # the repository, a checkpoint and the finished run
    assert sum(waits) <= 3 * retries.MAX_WAITED_S and not (folder / SNAPSHOTS).exists()
    server.faults.clear()
    monkeypatch.setattr(retries, "TIMEOUT_S", 60.0)
    uploads = BackgroundUploads(folder, "tester/x", private=True)
    assert uploads.finish() == f"{server.url}/tester/x"
    assert set(server.files("tester/x")) == ALLOWED and server.repos["tester/x"].private


# ---- what the Hub asks for -----------------------------------------------------------------------------------------


def waits_after(retry_after: str, server: LocalHub, run: Path, waits: list[float]) -> list[float]:
    """The waits before an upload that is asked once to wait."""
    waits.clear()
    server.faults["create_repo"] = Fault(503, times=1, retry_after=retry_after)
    hub.publish(run, "tester/x")
    return waits


def test_the_wait_that_the_hub_asks_for_is_kept(server, small_run, waits):
    assert waits_after("123", server, small_run, waits) == [124.0]  # huggingface_hub adds one against rounding
    in_two_minutes = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 120))
    (waited,) = waits_after(in_two_minutes, server, small_run, waits)
    assert 60 < waited <= 121  # a date in whole seconds, on a machine that may be busy
    for meaningless in ("", "soon", "-5", "²", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert waits_after(meaningless, server, small_run, waits) == [retries.FIRST_WAIT_S]


@pytest.mark.parametrize("seconds", ["3600", "9" * 9])
def test_a_longer_wait_than_ours_is_told_not_waited(seconds, server, small_run, waits):
    server.faults["commit"] = Fault(429, retry_after=seconds)
    with pytest.raises(hub.PublishError, match=f"fewer requests; try again later .HTTP 429, in {seconds} s"):
        hub.publish(small_run, "tester/x")
    assert waits == []


def test_the_waits_of_all_requests_together_are_limited(server, small_run, waits):
    """Each request could pass after its own waits; the third finds the ten minutes used up."""
    for endpoint in ("create_repo", "preupload", "commit"):
        server.faults[endpoint] = Fault(503, times=2, retry_after="140")
    with pytest.raises(hub.PublishError, match="in trouble"):
        hub.publish(small_run, "tester/x")
    assert waits == [141.0] * 4 and server.failed == ["create_repo"] * 2 + ["preupload"] * 2 + ["commit"]


def test_the_hubs_own_header_for_limits_is_read(server, small_run, waits):
    server.faults["commit"] = Fault(429, times=1, ratelimit='"api";r=0;t=55')
    hub.publish(small_run, "tester/x")
    assert waits == [56.0]


def test_a_hub_that_is_always_busy_is_asked_eight_times(server, small_run, waits):
    """create_repo of huggingface_hub would ask again at once, endlessly, where this conflict is named."""
    text = "Cannot create repo: another conflicting operation is in progress"
    server.faults["create_repo"] = Fault(409, message=text)
    with pytest.raises(hub.PublishError, match="try again later .another operation is in progress"):
        hub.publish(small_run, "tester/x")
    assert len(server.failed) == 8 and waits == USUAL_WAITS


def test_a_hub_that_is_down(server, small_run, waits, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nobody listens
    with pytest.raises(hub.PublishError, match="cannot be reached, or does not answer; try again later .ConnectError"):
        hub.publish(small_run, "tester/x")
    assert waits == USUAL_WAITS


def test_an_upload_that_must_stay_offline_ends_at_once(server, small_run, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.PublishError, match="OfflineModeIsEnabled: Cannot reach"):
        hub.publish(small_run, "tester/x")
    assert waits == [] and server.log == []


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_an_upload_that_is_no_longer_wanted_ends_after_its_wait(fault, server, small_run, waits):
    server.faults["lfs_put"] = FAULTS[fault]
    with pytest.raises(hub.PublishError) as error:
        hub.publish(small_run, "tester/x", keep_trying=lambda: len(waits) < 2)
    assert REMEDIES[fault] in str(error.value)
    assert waits == USUAL_WAITS[:2] and server.failed == ["lfs_put"] * 2


def test_other_requests_are_as_huggingface_hub_makes_them(server, small_run, waits):
    """Its own timeout, retries and errors, in the same process and after an upload."""
    hub.publish(small_run, "tester/x")
    server.faults["preupload"] = Fault(503, times=1)
    api = HfApi()
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/x")  # retries by itself
    assert server.failed == ["preupload"] and "x.txt" in server.files("tester/x")
    assert waits == [1.0] and get_session().timeout.read is None


def test_what_the_hub_says_is_shown_without_token_and_signatures(server, small_run):
    server.faults["commit"] = Fault(418, message=f"\x1b[2J\nsee https://s3/x?sig={TOKEN}&more {TOKEN}")
    with pytest.raises(hub.PublishError) as error:
        hub.publish(small_run, "tester/x")
    assert "see https://s3/x [token]: Bearer [token]" in str(error.value) and "\x1b" not in str(error.value)
    assert_one_line(str(error.value))


@pytest.mark.parametrize(
    ("status", "cause"), [(401, "not logged in"), (404, "may not see it"), (418, f"Refusal: {TOKEN} and more")]
)
def test_an_error_of_the_hub_is_one_line_without_the_token(status, cause, monkeypatch):
    class Refusal(Exception):
        response = SimpleNamespace(status_code=status)

    class RefusingApi:
        def create_repo(self, *args, **kwargs):
            raise Refusal(f"{TOKEN}\nand more")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "HfApi", RefusingApi)
    with pytest.raises(hub.PublishError) as error:
        hub.create("tester/x")
    assert cause.replace(TOKEN, "[token]") in str(error.value)
    assert TOKEN not in str(error.value) and "\n" not in str(error.value)
