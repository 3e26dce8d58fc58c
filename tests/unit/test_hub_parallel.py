"""Stage fetch with several files on their way: how many, what a failure or a kill leaves."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ms4.weights.download import Repository
from ms4.weights.patience import Gate, Halted
from ms4.weights.pull import CONNECTIONS
from tests import small_source
from tests.commands import wait_for
from tests.fetching import REPOSITORY, Project, refused, resolved
from tests.hub import Fault, Hub, serve


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return small_source.write(tmp_path / "checkpoint", shards=7)


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Hub]:
    with serve({REPOSITORY: checkpoint}) as hub:
        yield hub


@pytest.fixture
def project(tmp_path: Path, server: Hub) -> Project:
    return Project(tmp_path / "project", server.url)


def holds(project: Project, checkpoint: Path) -> bool:
    """Whether the source is whole."""
    return all(
        (project.source / path.name).read_bytes() == path.read_bytes()
        for path in checkpoint.iterdir()
    )


def shards(checkpoint: Path) -> list[str]:
    return [path.name for path in small_source.shards_of(checkpoint)]


def sizes(project: Project) -> dict[str, int]:
    """Shard → bytes of it that are here."""
    return {
        path.name.split(".safetensors")[0] + ".safetensors": path.stat().st_size
        for path in project.source.glob("model-*")
    }


def test_four_at_a_time(project: Project, server: Hub, checkpoint: Path) -> None:
    server.faults.append(Fault("*/model-*", hold_after=10))
    process = project.start(HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_for(lambda: list(sizes(project).values()) == [10] * CONNECTIONS, "four partial files")
    server.release.set()
    assert process.wait(60) == 0
    assert server.most_at_once == CONNECTIONS
    assert sorted(resolved(server)) == sorted(path.name for path in checkpoint.iterdir())
    assert holds(project, checkpoint)
    assert not project.partials()


@pytest.mark.slow
def test_one_failure_stops_the_others_and_keeps_what_came(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    names = shards(checkpoint)
    server.faults += [
        # A second later, when the others have what comes of them.
        Fault(f"*/{names[2]}", times=1, status=503, headers={"Retry-After": "1"}),
        Fault(f"*/{names[2]}", times=1, status=404, headers={"X-Error-Code": "EntryNotFound"}),
        Fault("*/model-*", hold_after=1000),
    ]
    result = project.fetch(HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert refused(result, f"lists {names[2]}", "(404)")
    assert not (project.directory / "weights/source.json").exists()
    # What waited for a connection was not begun.
    assert set(resolved(server)).isdisjoint(names[CONNECTIONS + 1 :])
    came = sizes(project)
    assert set(came) <= set(names[: CONNECTIONS + 1])
    assert max(came.values()) == 1000

    server.faults.clear()
    server.release.set()
    server.requests.clear()
    assert project.fetch().code == 0
    for name in names:
        size = came.get(name, 0)
        assert server.ranges(name) == [f"bytes={size}-" if size else None]
    assert holds(project, checkpoint)


def test_a_second_process_is_refused(project: Project, server: Hub) -> None:
    server.faults.append(Fault("*/model-*", hold_after=10))
    process = project.start(HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_for(lambda: sizes(project), "a partial file")
    assert refused(project.fetch(), "`ms4 fetch` (process", "is at work in", "ms4 resume")
    server.release.set()
    assert process.wait(60) == 0


def test_the_gate_holds_all_back() -> None:
    gate, halt = Gate(), threading.Event()
    gate.wait(halt)
    gate.close(0.05)
    gate.wait(halt)  # it opens by itself
    gate.close(3600)
    halt.set()
    with pytest.raises(Halted):
        gate.wait(halt)


@pytest.mark.parametrize("header", [{"Retry-After": "1"}, {"RateLimit": '"resolvers";r=0;t=1'}])
def test_a_rate_limit_is_waited_for(
    server: Hub, monkeypatch: pytest.MonkeyPatch, header: dict[str, str]
) -> None:
    """Protects the wait that a hub asks for: the next request comes after it, and the words about
    it are no wait."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.faults.append(Fault("/api/*", times=1, status=429, headers=header))
    Repository(REPOSITORY).snapshot(None)
    limited, after = (request.at_s for request in server.requests)
    assert after - limited >= 1


def killed_at_random(
    project: Project, server: Hub, checkpoint: Path, seed: int, times: int
) -> None:
    """Kill it at random moments, and end it: nothing that was here comes again."""
    dice = random.Random(seed)
    names = shards(checkpoint)
    whole_size = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    server.pace = sum(whole_size[name] for name in names) / CONNECTIONS / 0.5
    kills = 0
    while True:
        before = sizes(project)
        server.requests.clear()
        process = project.start()
        if kills < times:
            wait_for(lambda: server.requests, "the first request")
            time.sleep(dice.uniform(0, 0.8))
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        for name in names:
            # At most one request, for exactly what was not here.
            size = before.get(name, 0)
            if size == whole_size[name]:
                assert server.ranges(name) == [], name
            else:
                assert server.ranges(name) in ([], [f"bytes={size}-" if size else None]), name
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert holds(project, checkpoint)
    assert not project.partials()


@pytest.mark.slow
def test_kills_at_random_moments(project: Project, server: Hub, checkpoint: Path) -> None:
    killed_at_random(project, server, checkpoint, seed=1, times=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_many_kills_at_random_moments(
    project: Project, server: Hub, checkpoint: Path, seed: int
) -> None:
    killed_at_random(project, server, checkpoint, seed, times=10)
