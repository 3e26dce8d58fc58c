"""Conversion along with a fetch, and shards that are freed: the base of a plain fetch and descale.

Over real HTTP from tests/hub.py. The small source is cut at every so many tensors: its layers
straddle two shards, as two of the published model do.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from ms4 import config, manifest, spec
from ms4.cli import main, run_stage
from ms4.weights import convert
from tests import small_source
from tests.commands import wait_for
from tests.fetching import HIDDEN, REPOSITORY, Result, environment, refused, resolved
from tests.hub import Fault, Hub, serve
from tests.kill_points import Conditions, content, ms4, named_after_syncs, read_trace, start
from tests.killed_fetch import Killed, shards, survive_moments, survive_points, weights

Layout = Literal["hf", "native"]
STORAGES = ("bf16", "nf4", "fp8")
SHARDS = 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    layouts: tuple[Layout, ...] = ("hf", "native")
    return {one: small_source.write(root / one, one, shards=SHARDS) for one in layouts}


@pytest.fixture(scope="module")
def bases(
    checkpoints: dict[Layout, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Layout, str], dict[str, bytes]]:
    """The files of a base that `ms4 descale` makes of a whole source, by layout and storage."""
    made: dict[tuple[Layout, str], dict[str, bytes]] = {}

    def base(layout: Layout, to: str) -> dict[str, bytes]:
        if (layout, to) not in made:
            target = tmp_path_factory.mktemp("base") / to
            assert main(["descale", str(checkpoints[layout]), str(target), "--to", to]) == 0
            made[layout, to] = weights(target)
        return made[layout, to]

    return base


@pytest.fixture
def hub(
    checkpoints: dict[Layout, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    with serve({f"{REPOSITORY}-{layout}": path for layout, path in checkpoints.items()}) as hub:
        for name in [name for name in os.environ if name.startswith(HIDDEN)]:
            monkeypatch.delenv(name)
        for name, value in environment(tmp_path / "home", hub.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield hub


@dataclass
class Fetch:
    """`ms4 fetch` of one layout into `out`, in this process."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, layout: Layout, to: str, *options: str) -> Result:
        command = ["fetch", f"{REPOSITORY}-{layout}", "out", "--layout", layout, "--convert", to]
        code = main([*command, *options])
        captured = self.capture.readouterr()
        return Result(code, captured.out + captured.err)


@pytest.fixture
def fetch(capfd: pytest.CaptureFixture[str]) -> Fetch:
    return Fetch(capfd)


# The same base, whichever way.


@pytest.mark.slow
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("to", STORAGES)
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_the_base_of_a_plain_fetch_and_descale(
    hub: Hub,
    fetch: Fetch,
    checkpoints: dict[Layout, Path],
    bases: Callable[[Layout, str], dict[str, bytes]],
    layout: Layout,
    to: str,
    free: bool,
) -> None:
    source = checkpoints[layout]
    options = ("--free-source",) if free else ()
    result = fetch(layout, to, *options)
    assert result.code == 0, result.text
    assert weights(Path("out") / to) == bases(layout, to)
    base = manifest.read_manifest(Path("out") / to / "base.json", "descale")
    manifest.check_files(base, Path("out") / to, hashes=True)
    # Every file once, and nothing else.
    assert sorted(resolved(hub)) == sorted(path.name for path in source.iterdir())
    assert hub.served == {path.name: path.stat().st_size for path in source.iterdir()}

    written = manifest.read_manifest(Path("out/source.json"), "fetch")
    manifest.check_files(written, Path("out"), hashes=True)
    here, freed = ({e["path"]: e for e in written.get(key, [])} for key in ("files", "freed"))
    assert set(here) | set(freed) == {path.name for path in source.iterdir()}
    assert set(freed) == (set(shards(source)) if free else set())
    assert not shards(Path("out")) if free else shards(Path("out")) == shards(source)
    for name, entry in freed.items():
        whole = manifest.file_entry(source / name, source)
        assert (entry["size"], entry["sha256"]) == (whole["size"], whole["sha256"])
        assert entry["pieces"]
        assert all((Path("out") / piece).is_file() for piece in entry["pieces"])
    if free:
        # Every parameter was compared; what is exact has no error.
        errors = written["recomputed"]
        assert set(errors) == {t.disk for t in spec.tensors(small_source.DIMS)}
        assert {name for name, error in errors.items() if error} <= {
            name for name in errors if "experts" in name
        }

    # Again: the branch is looked up, nothing comes; by its commit, nothing is asked; offline too.
    before = content(Path("out"))
    hub.requests.clear()
    assert "nothing to fetch" in fetch(layout, to, *options).text
    assert [request.path.startswith("/api/") for request in hub.requests] == [True]
    assert content(Path("out")) == before
    hub.requests.clear()
    assert fetch(layout, to, *options, "--revision", hub.commit(source)).code == 0
    assert not hub.requests


def test_plain_fetch_then_convert_then_free(
    hub: Hub, fetch: Fetch, bases: Callable[[Layout, str], dict[str, bytes]]
) -> None:
    """Each step goes on from the one before; only what is not here comes."""
    assert main(["fetch", f"{REPOSITORY}-hf", "out"]) == 0
    hub.requests.clear()
    assert fetch("hf", "bf16").code == 0
    assert fetch("hf", "nf4", "--free-source").code == 0
    assert not resolved(hub)
    assert not shards(Path("out"))
    for to in ("bf16", "nf4"):
        assert weights(Path("out") / to) == bases("hf", to)
    # Who wants the source gets it, and is told why it comes again.
    result = fetch("hf", "nf4")
    assert result.code == 0
    assert "had been freed, and must be fetched again" in result.text
    assert sorted(resolved(hub)) == shards(Path("out"))
    assert "freed" not in manifest.read_manifest(Path("out/source.json"), "fetch")


def test_local_directory_is_converted_from_where_it_is(
    checkpoints: dict[Layout, Path],
    bases: Callable[[Layout, str], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    assert main(["fetch", str(checkpoints["native"]), str(out), "--convert", "nf4"]) == 0
    assert weights(out / "nf4") == bases("native", "nf4")
    assert not shards(out)
    written = manifest.read_manifest(out / "source.json", "fetch")
    assert written["directory"] == str(checkpoints["native"])
    assert (written["origin"], written["layout"]) == ("local", "native")


# Along with the fetch.


def test_pieces_are_made_while_shards_are_on_their_way(
    hub: Hub, checkpoints: dict[Layout, Path]
) -> None:
    source = checkpoints["hf"]
    hub.faults.append(Fault(f"*/{shards(source)[-1]}", hold_after=10))
    command = ["fetch", f"{REPOSITORY}-hf", "out", "--convert", "bf16"]
    code: list[int] = []
    thread = threading.Thread(target=lambda: code.append(main(command)))
    thread.start()
    try:
        wait_for(lambda: list(Path("out/bf16/.pieces").glob("*.json")), "the first piece")
        assert not (Path("out") / shards(source)[-1]).exists()
        assert not Path("out/bf16/base.json").exists()
    finally:
        hub.release.set()
        thread.join(60)
    assert code == [0]


def test_what_came_is_converted_before_a_failure_is_told(
    hub: Hub, fetch: Fetch, checkpoints: dict[Layout, Path]
) -> None:
    last = shards(checkpoints["hf"])[-1]
    missing = {"X-Error-Code": "EntryNotFound"}
    hub.faults.append(Fault(f"*/{last}", times=1, status=404, headers=missing))
    while (result := fetch("hf", "bf16")).code:
        assert refused(result, f"lists {last}, but")
        made = len(list(Path("out/bf16/.pieces").glob("*.json")))
    hub.requests.clear()
    assert fetch("hf", "bf16").code == 0
    assert not resolved(hub)
    assert made <= 4


# Room on the disk.


WEIGHTS = re.compile(r"\.?[a-z0-9-]+\.safetensors(\.tmp|\.[0-9a-f]+\.part)?")


def on_disk(root: Path) -> int:
    """Bytes of shards, partial files and pieces."""
    return sum(path.stat().st_size for path in root.rglob("*") if WEIGHTS.fullmatch(path.name))


@contextmanager
def held_still(process: psutil.Process) -> Iterator[None]:
    """Stop a process, so that what it has on the disk can be looked at."""
    process.suspend()
    while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
        time.sleep(0.0001)
    yield
    process.resume()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "to"), [("hf", "bf16"), ("hf", "nf4"), ("hf", "fp8"), ("native", "nf4")]
)
def test_the_peak_is_as_foretold(
    hub: Hub, checkpoints: dict[Layout, Path], tmp_path: Path, layout: Layout, to: str
) -> None:
    """Measured again and again while the command runs, on a line that is not too fast."""
    whole = sum(path.stat().st_size for path in checkpoints[layout].iterdir())
    hub.pace = whole / 0.5
    command = ("fetch", f"{REPOSITORY}-{layout}", "out", "--layout", layout, "--convert", to)
    conditions = Conditions(environment=environment(tmp_path / "home", hub.url))
    running = start(tmp_path, *command, "--free-source", conditions=conditions)
    most = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(running.process.pid)
        while running.process.is_alive():
            with held_still(process):
                most = max(most, on_disk(tmp_path / "out"))
            time.sleep(0.002)
    result = running.result()
    assert result.code == 0, result.text
    foretold = re.search(r"at most ([0-9.]+) kB of shards and base on the disk", result.text)
    assert foretold is not None, result.text
    assert 0.9 * float(foretold[1]) <= most / 1000 <= float(foretold[1]) + 0.05
    ends = re.search(r"at a time, ([0-9.]+) kB in the end", result.text)
    assert ends is not None
    assert float(ends[1]) == pytest.approx(on_disk(tmp_path / "out") / 1000, abs=0.05)
    # That is the point of it.
    assert most < whole + on_disk(tmp_path / "out")


@pytest.mark.parametrize("free", [False, True])
def test_too_little_room(
    hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    """The free space is the one number that a test cannot have for real at this size."""
    usage = shutil.disk_usage(Path())
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=200_000))
    result = fetch("hf", "bf16", *(("--free-source",) if free else ()))
    numbers = r"fetching the rest of \S+ takes 171\.\d kB, the base \(bf16\) takes 242\.\d kB, "
    numbers += r"together 413\.\d kB; the disk has 200\.0 kB free\. Free some, or use a larger disk"
    numbers += r", or take less at a time: with --free-source (\d+\.\d) kB will do"
    if free:
        numbers = r"fetching the rest of \S+ \(171\.\d kB\) and making the base in bf16 "
        numbers += r"\(242\.\d kB\), each shard freed when it may be, takes (\d+\.\d) kB; the disk"
        numbers += r" has 200\.0 kB free"
    found = re.search(numbers, result.text)
    assert refused(result)
    assert found is not None, result.text
    assert 242 < float(found[1]) < 413
    assert not any(name.endswith(".safetensors") for name in resolved(hub))


def test_what_is_foreclosed_is_said(hub: Hub, fetch: Fetch) -> None:
    said = {to: fetch("hf", to, "--free-source").text for to in ("fp8", "bf16", "nf4")}
    assert "forecloses: nothing; the base holds the source's very codes" in said["fp8"]
    assert "forecloses: the FP8 export with the source's very codes" in said["bf16"]
    assert "forecloses: exports in FP8, and an exact BF16 copy" in said["nf4"]


# What goes wrong later.


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_freed_shards_come_again_if_a_piece_is_lost(
    hub: Hub,
    fetch: Fetch,
    checkpoints: dict[Layout, Path],
    bases: Callable[[Layout, str], dict[str, bytes]],
    damage: str,
) -> None:
    fetch("hf", "nf4", "--free-source")
    piece = Path("out/nf4/layer-00.safetensors")
    if damage == "gone":
        piece.unlink()
    else:
        data = bytearray(piece.read_bytes())
        data[-1] ^= 1
        piece.write_bytes(data)
    others = {path: path.stat().st_ino for path in piece.parent.glob("*.safetensors")}
    others.pop(piece, None)
    written = manifest.read_manifest(Path("out/source.json"), "fetch")
    needed = [e["path"] for e in written["freed"] if "nf4/layer-00.safetensors" in e["pieces"]]
    assert 0 < len(needed) < SHARDS
    hub.requests.clear()
    result = fetch("hf", "nf4", "--free-source")
    assert result.code == 0, result.text
    assert "out/nf4: layer-00.safetensors must be made, of shards that were freed" in result.text
    assert f"{', '.join(needed)}: had been freed, and must be fetched again" in result.text
    assert sorted(resolved(hub)) == needed
    assert weights(piece.parent) == bases("hf", "nf4")
    assert {path: path.stat().st_ino for path in others} == others
    assert not shards(Path("out"))


def test_a_piece_that_differs_frees_nothing(
    hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that is wrong, which is what the comparison is for."""
    exact = convert.fp8.descale_codes

    def wrong(codes: Any, scale: float, made: Any) -> None:
        exact(codes, scale, made)
        made[0] ^= 1

    monkeypatch.setattr(convert.fp8, "descale_codes", wrong)
    assert refused(fetch("hf", "bf16", "--free-source"), "differs from source × scale")
    assert shards(Path("out"))
    assert not Path("out/source.json").exists()


def test_hub_without_sha256(hub: Hub, fetch: Fetch, checkpoints: dict[Layout, Path]) -> None:
    for name in shards(checkpoints["hf"]):
        hub.digests[name] = "0" * 40
    assert refused(fetch("hf", "bf16"), "has no SHA-256 of", "Fetch first, and convert then")


# In a project.


def settings(layout: Layout, **model: Any) -> config.RunConfig:
    model |= {"source": f"{REPOSITORY}-{layout}", "layout": layout}
    values = {"model": model, "data": {"train": ["train.jsonl"]}, "run": {"threads": 2}}
    return config.check(values, "test")


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_a_project_that_frees_its_source(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bases: Callable[[Layout, str], dict[str, bytes]],
    layout: Layout,
) -> None:
    made: dict[bool, dict[str, Any]] = {}
    for free in (False, True):
        (tmp_path / str(free)).mkdir()
        monkeypatch.chdir(tmp_path / str(free))
        chosen = settings(layout, experts="nf4", free_source=free)
        run_stage("fetch", chosen)
        assert bool(shards(Path("weights/source"))) != free
        assert bool(list(Path("weights/base").glob("*.safetensors"))) == free
        assert not Path("weights/base.json").exists()
        times = {path: path.stat().st_mtime_ns for path in Path("weights/base").glob("l*")}
        run_stage("descale", chosen)
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert weights(Path("weights/base")) == bases(layout, "nf4")
        made[free] = manifest.read_manifest(Path("weights/base.json"), "descale")
        del made[free]["inputs"]  # the sources' manifests differ in what is here
    assert made[True] == made[False]

    # Again: nothing comes, and every manifest has the same bytes.
    before = {path: path.read_bytes() for path in Path("weights").glob("*.json")}
    hub.requests.clear()
    for stage in ("fetch", "descale"):
        run_stage(stage, chosen)
    assert not resolved(hub)
    assert {path: path.read_bytes() for path in before} == before

    # The base was damaged: descale says what to do, and that does it.
    Path("weights/base/layer-01.safetensors").unlink()
    with pytest.raises(Exception, match=r"layer-01\.safetensors: is not whole") as raised:
        run_stage("descale", chosen)
    assert "Remove weights/source.json and run again" in str(raised.value)
    Path("weights/source.json").unlink()
    for stage in ("fetch", "descale"):
        run_stage(stage, chosen)
    assert weights(Path("weights/base")) == bases(layout, "nf4")
    assert {path: path.read_bytes() for path in before} == before
    assert 0 < len(resolved(hub)) < SHARDS

    # Another storage takes the whole source again.
    hub.requests.clear()
    other = settings(layout, experts="bf16", free_source=True)
    for stage in ("fetch", "descale"):
        run_stage(stage, other)
    assert len(resolved(hub)) == SHARDS
    assert weights(Path("weights/base")) == bases(layout, "bf16")


# Kills.


def test_a_fetch_syncs_what_it_names(hub: Hub, tmp_path: Path) -> None:
    """Protects what was fetched from a power cut: a file before it gets its name, the directory
    after it; and these are all the files."""
    (here := tmp_path / "here").mkdir()
    under = Conditions(
        trace=tmp_path / "trace", environment=environment(tmp_path / "home", hub.url)
    )
    assert ms4(here, "fetch", f"{REPOSITORY}-hf", "out", conditions=under).code == 0
    named = named_after_syncs(read_trace(tmp_path / "trace"))
    assert {str(path.relative_to(here / "out")) for path in named} == set(content(here / "out"))


@pytest.fixture(params=[(), ("--free-source",)], ids=["kept", "freed"])
def killed(
    request: pytest.FixtureRequest,
    hub: Hub,
    checkpoints: dict[Layout, Path],
    bases: Callable[[Layout, str], dict[str, bytes]],
    tmp_path: Path,
) -> Killed:
    reference = bases("hf", "nf4")
    return Killed(hub, checkpoints["hf"], tmp_path / "home", reference, request.param)


@pytest.mark.slow
def test_an_interrupt_stops_everything(killed: Killed, tmp_path: Path) -> None:
    killed.hub.faults.append(Fault(f"*/{shards(killed.source)[1]}", hold_after=1000))
    running = killed.start(tmp_path / "at", HF_HUB_DOWNLOAD_TIMEOUT="1")
    part = f"{shards(killed.source)[1]}.*.part"
    wait_for(
        lambda: [p for p in (tmp_path / "at/out").glob(part) if p.stat().st_size == 1000],
        "a partial file",
    )
    running.send(signal.SIGINT)
    result = running.result()
    assert result.code == 130
    assert "interrupted; the same command goes on" in result.text
    assert "Traceback" not in result.text
    killed.hub.faults.clear()
    killed.hub.release.set()
    killed.ends_right(tmp_path / "at")


@pytest.mark.slow
def test_killed_at_some_points(killed: Killed, tmp_path: Path) -> None:
    survive_points(killed, tmp_path, some=3)


@pytest.mark.slow
def test_killed_at_random_moments(killed: Killed, tmp_path: Path) -> None:
    survive_moments(killed, tmp_path, seed=1, times=2)


@pytest.mark.soak
def test_killed_at_every_point(killed: Killed, tmp_path: Path) -> None:
    survive_points(killed, tmp_path, some=None)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_random_moments(killed: Killed, tmp_path: Path, seed: int) -> None:
    survive_moments(killed, tmp_path, seed, times=8)
