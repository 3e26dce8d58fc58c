"""The lock of a stage, with real processes that are really killed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from ms4 import lock
from ms4.errors import Ms4Error
from tests.commands import run, wait_for

HOLD = """
import sys, time
from ms4 import lock
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hold_elsewhere(start: Start, root: Path, stage: str = "train") -> subprocess.Popen[str]:
    log = root / f"{stage}.out"
    process = start(sys.executable, "-c", HOLD, stage, "600", cwd=root, log=log)
    wait_for(lambda: log.read_text() == "held\n", f"{stage} to be held")
    return process


def owner_file(root: Path, *, age_s: float = 0, **changes: object) -> Path:
    """An owner file as a process of another host left it so many seconds ago."""
    owner = lock.Owner("train", "another-host", 12345, 1e9, "77")
    path = root / "locks/train.owner"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(owner) | changes))
    touched = time.time() - age_s
    os.utime(path, (touched, touched))
    return path


def test_held_once_and_left_clean(root: Path) -> None:
    with lock.hold("train"):
        (owner,) = lock.live_owners(root)
        assert (owner.stage, owner.pid) == ("train", os.getpid())
        assert owner.host == socket.gethostname()
    assert lock.live_owners(root) == []
    assert [path.name for path in (root / "locks").iterdir()] == ["train.lock"]


def test_left_clean_after_an_error(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.hold("train"):
        raise ZeroDivisionError
    with lock.hold("train"):
        assert len(lock.live_owners(root)) == 1


FORKS = """
import os, signal, time
from ms4 import lock
with lock.hold("train"):
    if not os.fork():
        time.sleep(0.7)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_dead_owner_forked_is_waited_for(root: Path) -> None:
    """A process that it forked has the locked file open, and lives a little longer."""
    subprocess.run([sys.executable, "-c", FORKS], check=False)
    file = (root / "locks/train.lock").open("a")
    with pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.hold("train"):
        assert len(lock.live_owners(root)) == 1


def test_second_holder_is_refused_by_name(root: Path, start: Start) -> None:
    process = hold_elsewhere(start, root)
    with pytest.raises(Ms4Error) as caught, lock.hold("train"):
        pytest.fail("two holders")
    message = str(caught.value)
    assert f"`ms4 train` (process {process.pid} on {socket.gethostname()})" in message
    assert str(root) in message
    assert "ms4 resume" in message
    assert process.poll() is None
    assert [owner.pid for owner in lock.live_owners(root)] == [process.pid]


def test_refusal_as_a_command(root: Path, start: Start, tmp_path: Path) -> None:
    """`ms4 fetch` beside a running one: exit code 2, one message, in its log too."""
    config_file = root / "config/config.yaml"
    config_file.parent.mkdir()
    config_file.write_text("data: {train: [a.jsonl]}\nmodel: {source: ./nowhere}\n")
    process = hold_elsewhere(start, root, "fetch")
    answer = run(sys.executable, "-m", "ms4", "fetch", cwd=root)
    assert answer.returncode == 2
    assert answer.stdout.startswith(f"ms4 fetch: `ms4 fetch` (process {process.pid} on ")
    assert "Traceback" not in answer.stdout
    assert (root / "logs/fetch.log").read_text() == answer.stdout


def test_stages_do_not_hinder_each_other(root: Path, start: Start) -> None:
    hold_elsewhere(start, root, "train")
    with lock.hold("fetch"):
        assert [owner.stage for owner in lock.live_owners(root)] == ["fetch", "train"]


def test_killed_holder_releases(root: Path, start: Start) -> None:
    process = hold_elsewhere(start, root)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (root / "locks/train.owner").exists()  # nobody could clean up
    assert lock.live_owners(root) == []
    with lock.hold("train"):
        assert [owner.pid for owner in lock.live_owners(root)] == [os.getpid()]


def test_killed_holder_that_nobody_reaped_is_dead(root: Path, start: Start) -> None:
    process = hold_elsewhere(start, root)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it ended, and stays a zombie
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert lock.live_owners(root) == []
    with lock.hold("train"):
        pass


def test_owner_of_a_dead_process_is_taken_over(root: Path) -> None:
    """Where flock grants everyone, only the owner file tells; its process id is nobody's now."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner_file(root, host=socket.gethostname(), pid=gone.pid)
    with lock.hold("train"):
        assert [owner.pid for owner in lock.live_owners(root)] == [os.getpid()]


def test_reused_process_id_is_not_the_owner(root: Path) -> None:
    owner_file(root, host=socket.gethostname(), pid=os.getpid(), started=1e9)
    assert lock.live_owners(root) == []


def test_live_owner_is_refused_even_where_flock_grants_everyone(root: Path) -> None:
    """The owner file alone must stop a second one: nobody holds the flock here."""
    started = psutil.Process(os.getppid()).create_time()
    owner_file(root, host=socket.gethostname(), pid=os.getppid(), started=started)
    with pytest.raises(Ms4Error, match=rf"process {os.getppid()} on"), lock.hold("train"):
        pytest.fail("two holders")
    assert (root / "locks/train.owner").exists()


def test_owner_on_another_host_with_a_heartbeat_is_refused(root: Path) -> None:
    path = owner_file(root, age_s=lock.STALE_S / 2)
    expected = r"`ms4 train` \(process 12345 on another-host, Slurm job 77\)"
    with pytest.raises(Ms4Error, match=expected), lock.hold("train"):
        pytest.fail("two holders")
    assert path.exists()
    assert [owner.host for owner in lock.live_owners(root)] == ["another-host"]


def test_owner_on_another_host_without_heartbeat_is_taken_over(root: Path) -> None:
    owner_file(root, age_s=lock.STALE_S * 2)
    assert lock.live_owners(root) == []
    with lock.hold("train"):
        assert [owner.pid for owner in lock.live_owners(root)] == [os.getpid()]


def test_owner_file_cut_short_is_taken_over(root: Path) -> None:
    owner_file(root).write_text('{"stage": "tra')
    assert lock.live_owners(root) == []
    with lock.hold("train"):
        assert len(lock.live_owners(root)) == 1


def test_of_many_at_once_one_wins(root: Path, start: Start) -> None:
    logs = [root / f"{number}.out" for number in range(6)]
    for log in logs:
        start(sys.executable, "-c", HOLD, "train", "600", cwd=root, log=log)
    wait_for(lambda: all(log.read_text() for log in logs), "six tries")
    wait_for(
        lambda: sum("Ms4Error" in log.read_text() for log in logs) == 5, "five refusals", seconds=30
    )
    assert sum(log.read_text().startswith("held") for log in logs) == 1
    assert len(lock.live_owners(root)) == 1


CLAIM = """
import os, time
from pathlib import Path
from ms4 import lock
path = Path("locks/train.owner")
Path(f"{os.getpid()}.ready").touch()
while not Path("go").exists():
    time.sleep(0.001)
lock._claim(path, "train")
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_of_many_that_take_over_one_wins(root: Path, start: Start, attempt: int) -> None:
    """The owner file alone, as where flock grants everyone, and a dead owner's file in the way."""
    owner_file(root, age_s=lock.STALE_S * 2)
    logs = [root / f"{number}.out" for number in range(8)]
    for log in logs:
        start(sys.executable, "-c", CLAIM, cwd=root, log=log)
    wait_for(lambda: len(list(root.glob("*.ready"))) == 8, "eight processes")
    (root / "go").touch()
    wait_for(lambda: all(log.read_text() for log in logs), "eight tries")
    wait_for(lambda: sum("Error" in log.read_text() for log in logs) == 7, "seven refusals")
    assert sum(log.read_text() == "claimed\n" for log in logs) == 1
    assert len(lock.live_owners(root)) == 1


def test_the_right_of_one_that_died_taking_over_passes_on(root: Path) -> None:
    """A guard of a dead process, and one of a process that died while it took over from that."""
    path = owner_file(root, age_s=lock.STALE_S * 2)
    content = path.read_bytes()
    for _ in range(2):
        name = f".{path.name}.{hashlib.sha256(content).hexdigest()[:16]}.taken"
        guard = path.with_name(name)
        record = json.loads(content)
        guard.write_text(json.dumps({**record, "pid": record["pid"] + 1}))
        os.utime(guard, (0, 0))
        content = guard.read_bytes()
    with lock.hold("train"):
        assert [owner.pid for owner in lock.live_owners(root)] == [os.getpid()]
        assert not list(path.parent.glob(".*.taken"))


def test_heartbeat_moves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with lock.hold("train"):
        path = root / "locks/train.owner"
        os.utime(path, (0, 0))
        wait_for(lambda: path.stat().st_mtime > 0, "a heartbeat", seconds=30)


def test_wait_until_free(root: Path, start: Start) -> None:
    process = hold_elsewhere(start, root)
    seen = []
    for owners in lock.wait_until_free(root, poll_s=0.05):
        seen.append(owners)
        if len(seen) == 2:
            process.kill()
            process.wait()
    assert len(seen) == 2
    assert all(owner.pid == process.pid for owners in seen for owner in owners)


def test_no_locks_at_all(root: Path) -> None:
    assert lock.live_owners(root) == []
