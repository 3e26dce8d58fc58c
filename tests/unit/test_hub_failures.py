"""Stage fetch: what it says and leaves when a hub, the network or the disk fails."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ms4.errors import Ms4Error
from ms4.weights.download import Repository
from tests.fetching import (
    BIG,
    CREDENTIAL,
    REPOSITORY,
    SHARDS,
    WRONG,
    Project,
    finish,
    leave_partial,
    make_checkpoint,
    refused,
    resolved,
)
from tests.hub import Fault, Hub, serve

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Hub]:
    with serve({REPOSITORY: checkpoint}) as hub:
        yield hub


@pytest.fixture
def project(tmp_path: Path, server: Hub) -> Project:
    return Project(tmp_path / "project", server.url)


# Content that is not what the hub announced.


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (BIG, lambda data: data[::-1], "has the hash"),
        (BIG, lambda data: data[:-5], "bytes instead of"),
        (BIG, lambda data: data + b"12345", "bytes instead of"),
        ("LICENSE", lambda data: data[::-1], "has the hash"),
    ],
)
def test_wrong_bytes(
    project: Project, server: Hub, checkpoint: Path, name: str, change: Any, words: str
) -> None:
    server.faults.append(Fault(f"*/{name}", times=1, body=change((checkpoint / name).read_bytes())))
    damaged = "changed under the pin (commit ", "damaged on the way"
    assert refused(project.fetch(), name, words, *damaged, "the partial file was removed")
    assert not project.partials(name)
    assert not (project.source / name).exists()
    assert not (project.directory / "weights/source.json").exists()


def test_rest_that_the_server_no_longer_has(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    leave_partial(project, checkpoint, 100_000)
    server.faults.append(Fault(f"*/{BIG}", body=b"short"))
    assert refused(project.fetch(), "fewer bytes", "the partial file was removed")
    assert not project.partials(BIG)


def test_a_hash_that_changed_under_the_pin(project: Project, server: Hub, checkpoint: Path) -> None:
    """A hub that gives another hash for the same commit; also where it is asked by its branch."""
    assert project.fetch().code == 0
    before = {path: path.read_bytes() for path in project.source.iterdir() if path.is_file()}
    server.digests[BIG] = "ab" * 32
    (project.source / "tekken.json").unlink()
    del before[project.source / "tekken.json"]
    for revision in (None, server.commit(checkpoint)):
        project.configure(REPOSITORY, revision)
        server.requests.clear()
        words = f"{BIG}: changed under the pin", "gives abab", "Nothing here was touched"
        if revision is None:
            assert refused(project.fetch(), *words, "remove weights/source/.fetched.json")
            assert not resolved(server)
            after = {path: path.read_bytes() for path in before}
            assert after == before
        else:  # the commit was whole here: only what is lost is asked for, by what was recorded
            assert project.fetch().code == 0
            assert resolved(server) == ["tekken.json"]
            assert project.holds(checkpoint)


def test_a_branch_that_moved_is_told(project: Project, server: Hub, checkpoint: Path) -> None:
    assert "when it was fetched" not in project.fetch().text
    before = server.commit(checkpoint)[:12]
    (checkpoint / "LICENSE").write_text("MIT\n")
    after, result = server.commit(checkpoint)[:12], project.fetch()
    told = f"the main branch of {REPOSITORY} is {after} now; it was {before} when it was fetched"
    assert (result.code, told in result.text) == (0, True), result
    assert project.holds(checkpoint)


def test_a_file_that_is_gone_under_the_pin(
    project: Project, server: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project.fetch().code == 0
    commit = server.commit(checkpoint)
    (checkpoint / "LICENSE").unlink()
    monkeypatch.setattr(server, "commit", lambda directory: commit)
    assert refused(project.fetch(), "LICENSE: changed under the pin", "gives none now")


def test_a_record_of_before_says_nothing_of_what_the_hub_listed(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    assert project.fetch().code == 0
    record = project.source / ".fetched.json"
    state = json.loads(record.read_text())
    del state["listed"]
    record.write_text(json.dumps(state))
    server.requests.clear()
    assert project.fetch().code == 0
    assert not resolved(server)
    assert project.holds(checkpoint)


def test_a_commit_that_stands_for_another_one(
    project: Project, server: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.commit(checkpoint)
    monkeypatch.setattr(server, "find", lambda repository, revision: checkpoint)
    project.configure(REPOSITORY, "f" * 40)
    words = f"answers with the commit {commit[:12]}", "asked for ffffffffffff", "what is pinned"
    assert refused(project.fetch(), "model.revision", *words)
    assert not resolved(server)


# Refusals.


def test_unknown_repository(project: Project) -> None:
    project.configure("someone/else")
    assert refused(project.fetch(), "model.source", "no repository someone/else", "HF_TOKEN")


def test_impossible_repository_name(project: Project) -> None:
    project.configure("someone/small four")
    assert refused(project.fetch(), "model.source", "nor a hub id (owner/name)")


def test_private_repository(tmp_path: Path, checkpoint: Path) -> None:
    with serve({REPOSITORY: checkpoint}, token=CREDENTIAL) as hub:
        project = Project(tmp_path / "project", hub.url)
        assert refused(project.fetch(), "it is private: then set HF_TOKEN or run `hf auth login`")
        assert refused(project.fetch(HF_TOKEN=WRONG), "refuses the token that is set (401)")
        assert project.fetch(HF_TOKEN=CREDENTIAL).code == 0
        assert project.holds(checkpoint)


def test_gated_repository(tmp_path: Path, checkpoint: Path) -> None:
    with serve({REPOSITORY: checkpoint}, token=CREDENTIAL, gated=True) as hub:
        project = Project(tmp_path / "project", hub.url)
        assert refused(project.fetch(), "is gated (401): accept its terms", "HF_TOKEN")
        assert refused(project.fetch(HF_TOKEN=WRONG), "is gated (403)", "`hf auth login`")
        # The token may also lie in the hub's own store.
        (project.directory / "home").mkdir(exist_ok=True)
        (project.directory / "home/token").write_text(CREDENTIAL)
        assert project.fetch().code == 0
        assert project.holds(checkpoint)


def test_token_goes_to_the_hub_only(tmp_path: Path, checkpoint: Path) -> None:
    with serve({REPOSITORY: checkpoint}, token=CREDENTIAL, redirect=True) as hub:
        project = Project(tmp_path / "project", hub.url)
        hub.faults += [
            Fault("/api/*", times=1, status=500, echo_authorization=True),
            Fault("*/tekken.json", times=1, status=418, echo_authorization=True),
            Fault(f"*/{SHARDS[0]}", times=1, status=403, echo_authorization=True),
        ]
        results = [project.fetch(HF_TOKEN=CREDENTIAL, HF_DEBUG=debug) for debug in ("0", "1", "0")]
        assert [result.code for result in results] == [2, 2, 0], results
        assert project.holds(checkpoint)
        assert all(r.authorization == f"Bearer {CREDENTIAL}" for r in hub.requests if not r.storage)
        stored = [r for r in hub.requests if r.storage]
        assert {r.path.rsplit("/", 1)[1] for r in stored} == {*SHARDS, "tekken.json"}
        assert all(r.authorization is None for r in stored)
    assert not any(CREDENTIAL in result.text for result in results)
    for path in project.directory.rglob("*"):
        assert not path.is_file() or CREDENTIAL.encode() not in path.read_bytes(), path


def test_impossible_token(project: Project) -> None:
    stray = "hf_stray–dash"
    result = project.fetch(HF_TOKEN=stray)
    assert refused(result, "HF_TOKEN", "copy it again")
    assert "hf_stray" not in result.text


def test_storage_that_refuses_is_asked_again(tmp_path: Path, checkpoint: Path) -> None:
    """Signed addresses expire: the hub must be asked for a new one, from where the file ended."""
    with serve({REPOSITORY: checkpoint}, redirect=True) as hub:
        project = Project(tmp_path / "project", hub.url)
        hub.faults += [
            Fault(f"*/{BIG}", times=1, storage=True, cut_after=100_000),
            Fault(f"*/{BIG}", times=1, storage=True, status=403),
        ]
        assert project.fetch().code == 0
        rest = "bytes=100000-"
        assert hub.ranges(BIG) == [None, None, rest, rest, rest, rest]
        assert [r.storage for r in hub.requests if r.path.endswith(BIG)] == [False, True] * 3
        assert project.holds(checkpoint)


def test_file_that_the_hub_lists_but_does_not_have(project: Project, server: Hub) -> None:
    server.faults.append(
        Fault("*/params.json", status=404, headers={"X-Error-Code": "EntryNotFound"})
    )
    assert refused(project.fetch(), "lists params.json", "(404)", "model.revision")


def test_forbidden(project: Project, server: Hub) -> None:
    server.faults.append(Fault("*/resolve/*", status=403))
    assert refused(project.fetch(HF_TOKEN=CREDENTIAL), "refuses the token that is set (403)")


def test_other_refusals(project: Project, server: Hub) -> None:
    server.faults.append(Fault("*/resolve/*", status=451, body=b"<html>for legal reasons"))
    assert refused(project.fetch(), "answered 451 when asked for ")


def test_rate_limit_is_waited_for(project: Project, server: Hub, checkpoint: Path) -> None:
    server.faults += [
        Fault("/api/*", times=1, status=429, headers={"Retry-After": "1"}),
        Fault(f"*/{BIG}", times=1, status=429, headers={"RateLimit": '"resolvers";r=0;t=1'}),
    ]
    result = project.fetch()
    assert result.code == 0
    assert result.text.count("(429); waiting 1 s, as it asks") == 2
    assert project.holds(checkpoint)
    for path in ("/api/", BIG):
        limited, after = (r.at_s for r in server.requests if path in r.path)
        assert after - limited >= 1


def test_rate_limit_is_not_waited_for_endlessly(project: Project, server: Hub) -> None:
    server.faults.append(Fault("/api/*", status=429, headers={"Retry-After": "0"}))
    assert refused(project.fetch(), "limits the rate of requests (429)", "Run again later")
    assert len(server.requests) == 4
    server.faults[0] = Fault("/api/*", status=429, headers={"Retry-After": "3600"})
    assert refused(project.fetch(), "asks to wait 3600 s more")
    assert len(server.requests) == 5


def test_passing_server_errors(project: Project, server: Hub, checkpoint: Path) -> None:
    server.faults += [
        Fault("/api/*", times=1, status=503),
        Fault("*/config.json", times=1, status=500),
        Fault(f"*/{BIG}", times=1, status=504),
    ]
    assert project.fetch().code == 0
    assert project.holds(checkpoint)


def test_lasting_failures(tmp_path: Path, checkpoint: Path) -> None:
    """Each is retried for some seconds, so they run at the same time."""
    with serve({REPOSITORY: checkpoint}) as hub, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        hub.revisions |= {f"someone/{name}": {"main": checkpoint} for name in ("stalls", "cuts")}
        hub.faults += [
            Fault(f"/{REPOSITORY}/*/{BIG}", status=502),
            Fault(f"/someone/stalls/*/{BIG}", hold_after=10),
            Fault(f"/someone/cuts/*/{BIG}", cut_after=0),
        ]
        broken, refusing, stalling, cutting = projects = [
            Project(tmp_path / f"project-{number}", closed if number == 1 else hub.url)
            for number in range(4)
        ]
        stalling.configure("someone/stalls")
        cutting.configure("someone/cuts")
        started = [project.start(HF_HUB_DOWNLOAD_TIMEOUT="1") for project in projects]
        results = [finish(process) for process in started]
        host = re.sub("^http://", "", hub.url)
        go_on = "the same command goes on from there"
        assert refused(results[0], f"{host} answered 502 when asked for {BIG} (4 tries)", go_on)
        assert refused(results[1], closed[7:], "cannot be reached", "Connection refused")
        assert refused(results[2], f"did not answer for 1 s when asked for {BIG}", go_on)
        assert refused(results[3], f"broke the connection in {BIG}", go_on)
        assert not (broken.directory / "weights/source.json").exists()
        assert not refusing.source.exists()

        hub.faults.clear()
        hub.release.set()
        hub.requests.clear()
        assert broken.fetch().code == 0
        assert sorted(resolved(hub)) == [BIG]  # what was whole stays
        assert stalling.fetch().code == 0
        assert stalling.holds(checkpoint)
        assert hub.ranges(BIG) == [None, "bytes=40-"]  # four tries of ten bytes each


def test_no_hub_at_the_address(project: Project, server: Hub) -> None:
    server.faults.append(Fault("/api/*", status=200, body=b"<html>Please log in to this network"))
    assert refused(project.fetch(), "does not answer as a hub does", "HF_ENDPOINT")
    server.faults[0].body = b"[]"
    assert refused(project.fetch(), "does not answer as a hub does")
    server.faults[0].body = json.dumps({"id": REPOSITORY, "sha": "../..", "siblings": []}).encode()
    assert refused(project.fetch(), "does not answer as a hub does")


@pytest.mark.parametrize("address", ["hub.example", "file:///etc", "http://", "http:"])
def test_impossible_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(Ms4Error, match="HF_ENDPOINT: is not the address of a hub"):
        Repository(REPOSITORY)


def test_password_in_endpoint_is_not_shown(project: Project, server: Hub) -> None:
    server.faults.append(Fault("*", status=400))
    result = project.fetch(HF_ENDPOINT=server.url.replace("://", "://me:secret-word@"))
    assert refused(result, "answered 400")
    assert "secret-word" not in result.text


# Offline.


def test_offline(project: Project, server: Hub, checkpoint: Path) -> None:
    assert refused(project.fetch(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "main branch")
    assert not server.requests
    project.fetch()
    server.requests.clear()
    assert project.fetch(HF_HUB_OFFLINE="1").code == 0
    assert project.holds(checkpoint)
    (project.source / BIG).unlink()
    assert refused(project.fetch(HF_HUB_OFFLINE="1"), "does not hold all of")
    assert not server.requests


# The disk.


def test_disk_too_small(project: Project, server: Hub) -> None:
    server.sizes[BIG] = 10**18
    assert refused(project.fetch(), "takes 1000000000.", "GB free")
    assert BIG not in resolved(server)


def test_disk_full(project: Project, server: Hub, checkpoint: Path) -> None:
    project.source.mkdir(parents=True)
    digest = hashlib.sha256((checkpoint / BIG).read_bytes()).hexdigest()
    (project.source / f"{BIG}.{digest[:16]}.part").symlink_to("/dev/full")
    assert refused(project.fetch(), BIG, "the disk is full", "what is whole is kept")


def test_directory_that_cannot_be_made(project: Project) -> None:
    (project.directory / "weights").write_text("in the way")
    assert refused(project.fetch(), "weights", "Mend that and run the same command again")


# What a person sees.


def test_bar_on_a_terminal(project: Project, server: Hub, checkpoint: Path) -> None:
    """Protects what somebody who waits wants to know: how much is here, how fast it comes, and the
    time that is left."""
    server.pace = 400_000  # so that the bar is drawn on the way
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ms4", "fetch", "--config", "config.yaml"],
        cwd=project.directory,
        env=project.environment | {"TERM": "xterm-256color", "COLUMNS": "100"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:
        pass  # how Linux says that the other end was closed
    os.close(ours)
    assert process.wait() == 0
    assert project.holds(checkpoint)
    assert "━".encode() in shown
    assert b"fetched" in shown
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"\d/\d+\.\d kB +\d+\.\d kB/s +0:00:0[0-9]", words), words
