"""Stage fetch: what it brings, checks and goes on with, over real HTTP from tests/hub.py."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from ms4 import config, manifest
from ms4.errors import Ms4Error
from ms4.weights import hub as stage
from tests import small_source
from tests.fetching import (
    BIG,
    NEEDED,
    REPOSITORY,
    SHARDS,
    Project,
    leave_partial,
    make_checkpoint,
    make_config,
    refused,
    resolved,
    write_index,
)
from tests.hub import Fault, Hub, serve


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


# A local directory.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_local_directory_is_read_in_place(here: Path, checkpoint: Path) -> None:
    stage.run_stage(make_config("./checkpoint"))
    written = manifest.read_manifest(Path("weights/source.json"), "fetch")
    assert written["directory"] == str(checkpoint)
    assert written["origin"] == "local"
    assert "repository" not in written
    assert [entry["path"] for entry in written["files"]] == NEEDED
    manifest.check_files(written, checkpoint, hashes=True)
    assert list(Path("weights").iterdir()) == [Path("weights/source.json")]
    before = Path("weights/source.json").read_bytes()
    stage.run_stage(make_config("./checkpoint"))
    assert Path("weights/source.json").read_bytes() == before


def test_local_directory_missing(here: Path) -> None:
    with pytest.raises(Ms4Error, match=r"model\.source: nowhere/at/all: no such directory\. Give"):
        stage.run_stage(make_config("nowhere/at/all"))


def test_local_source_that_is_a_file(here: Path) -> None:
    Path("weights.bin").touch()
    with pytest.raises(Ms4Error, match="is not a directory"):
        stage.run_stage(make_config("./weights.bin"))


def test_local_directory_has_no_revision(here: Path, checkpoint: Path) -> None:
    with pytest.raises(Ms4Error, match=r"model\.revision: a local directory has none"):
        stage.run_stage(make_config("./checkpoint", "main"))


def test_local_missing_files_are_all_named(here: Path, checkpoint: Path) -> None:
    for name in ("tekken.json", *SHARDS):
        (checkpoint / name).unlink()
    with pytest.raises(Ms4Error, match=f"lacks tekken.json, {SHARDS[0]}, {SHARDS[1]}"):
        stage.run_stage(make_config("./checkpoint"))


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("held", [{"hf"}, {"native"}, {"hf", "native"}])
def test_local_layout_is_the_one_that_is_there(
    here: Path, layout: Literal["hf", "native"], held: set[Literal["hf", "native"]]
) -> None:
    for one in held:
        small_source.write(here / one, one)
        shutil.copytree(here / one, here / "both", dirs_exist_ok=True)
    stage.run_stage(make_config("./both", layout=layout))
    written = manifest.read_manifest(Path("weights/source.json"), "fetch")
    read = layout if layout in held else held.copy().pop()
    assert written["layout"] == read
    names = [entry["path"] for entry in written["files"]]
    wanted = sorted(path.name for path in (here / read).iterdir())
    assert [name for name in names if name != "params.json"] == [
        name for name in wanted if name != "params.json"
    ]


def test_local_directory_without_weights(here: Path, checkpoint: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json", *SHARDS):
        (checkpoint / name).unlink()
    (checkpoint / "consolidated-00001-of-00001.safetensors").unlink()
    with pytest.raises(Ms4Error, match="holds no weights of this model: neither"):
        stage.run_stage(make_config("./checkpoint"))


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "llama"},
        {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}},
        {"model_type": "mistral3", "text_config": None},
        {"text_config": {"model_type": "mistral4"}},
    ],
)
def test_other_models_are_refused(here: Path, checkpoint: Path, model: dict[str, Any]) -> None:
    (checkpoint / "config.json").write_text(json.dumps(model))
    with pytest.raises(Ms4Error, match="not a Mistral Small 4"):
        stage.run_stage(make_config("./checkpoint"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "fault"), [("{", "not valid JSON"), ("[]", "JSON object"), ("[" * 10**5, "JSON")]
)
def test_damaged_json(here: Path, checkpoint: Path, name: str, content: str, fault: str) -> None:
    (checkpoint / name).write_text(content)
    with pytest.raises(Ms4Error, match=f"{name}: .*{fault}"):
        stage.run_stage(make_config("./checkpoint"))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/outside.safetensors",
        "sub\\outside.safetensors",
        "..",
        ".hidden.safetensors",
        "model.safetensors\n",
        "model\0.safetensors",
        "pytorch_model.bin",
        "model.safetensors.pkl",
        5,
        None,
    ],
)
def test_hostile_index(here: Path, checkpoint: Path, name: Any) -> None:
    write_index(checkpoint, {"a": SHARDS[0], "b": name})
    with pytest.raises(Ms4Error, match=r"only plain file names that end in \.safetensors"):
        stage.run_stage(make_config("./checkpoint"))


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_index_without_weight_map(here: Path, checkpoint: Path, weight_map: Any) -> None:
    write_index(checkpoint, weight_map)
    with pytest.raises(Ms4Error, match="has no weight_map"):
        stage.run_stage(make_config("./checkpoint"))


def test_whole_tiny_model_is_not_made_again(here: Path) -> None:
    made = make_checkpoint(here / "weights/tiny")
    wanted = make_config("tiny")
    files = [manifest.file_entry(made / name, made) for name in NEEDED]
    manifest.write_manifest(
        made / ".made.json", "fetch", config_hash=wanted.part_hash("fetch"), files=files
    )
    stage.run_stage(wanted)
    written = manifest.read_manifest(Path("weights/source.json"), "fetch")
    assert (written["origin"], written["directory"]) == ("tiny", "weights/tiny")
    assert written["files"] == files


def test_no_torch_is_imported(here: Path, checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ms4 import config; from ms4.weights import hub;"
        "hub.run_stage(config.load(Path('config.yaml'))); sys.exit('torch' in sys.modules)"
    )
    Path("config.yaml").write_text(config.dump(make_config("./checkpoint")))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A hub: what is fetched, and what is not.


def test_fetch_from_hub(project: Project, server: Hub, checkpoint: Path) -> None:
    result = project.fetch()
    assert result.code == 0, result.text
    assert project.holds(checkpoint)
    written = project.manifest()
    assert written["origin"] == "hub"
    assert written["directory"] == "weights/source"
    assert written["repository"] == REPOSITORY
    assert written["revision"] == server.commit(checkpoint)
    assert written["config_hash"] == make_config(REPOSITORY).part_hash("fetch")
    assert sorted(resolved(server)) == NEEDED  # each once, and nothing else
    assert not project.partials()
    assert re.search(rf"fetching 2 files, [0-9.]+ kB, of {REPOSITORY} from", result.text)
    assert f"weights/source: {len(NEEDED)} files" in result.text
    assert "\x1b" not in result.text

    # Again: the branch is looked up, nothing is downloaded and the manifest has the same bytes.
    before = (project.directory / "weights/source.json").read_bytes()
    server.requests.clear()
    assert project.fetch().code == 0
    assert len(server.requests) == 1
    assert not resolved(server)
    assert (project.directory / "weights/source.json").read_bytes() == before

    # By its commit, the same needs no network at all.
    project.configure(REPOSITORY, server.commit(checkpoint))
    server.requests.clear()
    assert project.fetch().code == 0
    assert not server.requests


@pytest.mark.slow
def test_changed_and_lost_files_are_fetched_again(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    project.fetch()
    damaged = project.source / SHARDS[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (project.source / "tekken.json").unlink()
    # A new time alone is no change: the content is compared.
    (project.source / BIG).touch()
    server.requests.clear()
    assert project.fetch().code == 0
    assert sorted(resolved(server)) == sorted([SHARDS[0], "tekken.json"])
    assert project.holds(checkpoint)


@pytest.mark.slow
def test_files_without_record_are_hashed_not_fetched(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    project.fetch()
    (project.source / ".fetched.json").unlink()
    server.requests.clear()
    assert project.fetch().code == 0
    assert not resolved(server)
    assert project.holds(checkpoint)


@pytest.mark.slow
def test_revisions(tmp_path: Path) -> None:
    old, new = make_checkpoint(tmp_path / "old", 1), make_checkpoint(tmp_path / "new", 2)
    with serve({REPOSITORY: {"v1": old, "main": new}}) as hub:
        project = Project(tmp_path / "project", hub.url)
        project.configure(REPOSITORY, "v1")
        assert project.fetch().code == 0
        assert project.holds(old)
        assert project.manifest()["revision"] == hub.commit(old)
        project.configure(REPOSITORY)
        hub.requests.clear()
        assert project.fetch().code == 0
        assert project.holds(new)
        assert project.manifest()["revision"] == hub.commit(new)
        assert sorted(resolved(hub)) == SHARDS  # the rest is the same in both commits

        project.configure(REPOSITORY, "v3")
        assert refused(project.fetch(), f"model.revision: {REPOSITORY} has no revision v3")


def test_missing_files_on_hub_are_all_named(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    (checkpoint / "tekken.json").unlink()
    (checkpoint / BIG).unlink()
    assert refused(project.fetch(), "model.source", f"lacks tekken.json, {BIG}")
    assert not any(name in SHARDS for name in resolved(server))


def test_hostile_index_on_hub(project: Project, server: Hub, checkpoint: Path) -> None:
    write_index(checkpoint, {"a": "../../outside.safetensors"})
    assert refused(project.fetch(), "'../../outside.safetensors'", "plain file names")
    assert not list(project.directory.rglob("outside*"))


def test_hostile_hash_on_hub(project: Project, server: Hub) -> None:
    server.digests[BIG] = "../../outside"
    assert refused(project.fetch(), f"no hash for {BIG}")
    assert not list(project.directory.rglob("outside*"))


def test_other_model_on_hub_is_refused_before_its_weights(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    assert refused(project.fetch(), "not a Mistral Small 4")
    assert not any(name in SHARDS for name in resolved(server))


# Going on after a cut or a kill.


def test_cut_connection_goes_on_with_the_rest(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    server.faults.append(Fault(f"*/{BIG}", times=1, cut_after=100_000))
    assert project.fetch().code == 0
    assert server.ranges(BIG) == [None, "bytes=100000-"]
    assert project.holds(checkpoint)


@pytest.mark.slow
def test_kill_loses_nothing(project: Project, server: Hub, checkpoint: Path) -> None:
    server.faults.append(Fault(f"*/{BIG}", times=1, hold_after=150_000))
    process = project.start()
    while not (
        any(part.stat().st_size == 150_000 for part in project.partials(BIG))
        and (project.source / SHARDS[0]).exists()  # it came beside
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.requests.clear()
    assert project.fetch().code == 0
    assert server.ranges(BIG) == ["bytes=150000-"]
    assert resolved(server).count(SHARDS[0]) == 0
    assert project.holds(checkpoint)
    assert not project.partials()


@pytest.mark.slow
def test_server_that_ignores_ranges(project: Project, server: Hub, checkpoint: Path) -> None:
    leave_partial(project, checkpoint, 100_000)
    server.faults.append(Fault(f"*/{BIG}", ignore_range=True))
    assert project.fetch().code == 0
    assert server.ranges(BIG) == ["bytes=100000-"]
    assert project.holds(checkpoint)


@pytest.mark.slow
def test_server_that_sends_another_range(project: Project, server: Hub, checkpoint: Path) -> None:
    leave_partial(project, checkpoint, 100_000)
    server.faults.append(
        Fault(f"*/{BIG}", times=1, headers={"Content-Range": "bytes 7-99999/384088"})
    )
    assert project.fetch().code == 0
    assert server.ranges(BIG) == ["bytes=100000-", None]
    assert project.holds(checkpoint)


def test_partial_longer_than_the_file(project: Project, server: Hub, checkpoint: Path) -> None:
    part = leave_partial(project, checkpoint, 100_000)
    part.write_bytes((checkpoint / BIG).read_bytes() + b"more")
    assert project.fetch().code == 0
    assert server.ranges(BIG) == [None]
    assert project.holds(checkpoint)


def test_partial_as_long_as_the_file(project: Project, server: Hub, checkpoint: Path) -> None:
    part = leave_partial(project, checkpoint, 100_000)
    part.write_bytes((checkpoint / BIG).read_bytes())
    assert project.fetch().code == 0
    assert server.ranges(BIG) == []
    assert project.holds(checkpoint)


@pytest.mark.slow
def test_damaged_partial_is_removed(project: Project, server: Hub, checkpoint: Path) -> None:
    """Also one with a hole below its length, as a power cut may leave it: a file that is on its way
    is not synced. No other file is fetched again for it."""
    part = leave_partial(project, checkpoint, 100_000)
    with part.open("r+b") as file:
        file.truncate(50_000)
        file.truncate(100_000)
    assert refused(project.fetch(), BIG, "has the hash", "the partial file was removed")
    assert not project.partials(BIG)
    whole = {path.name for path in project.source.iterdir()}
    server.requests.clear()
    assert project.fetch().code == 0
    # Others may still have been on their way, too.
    assert BIG in resolved(server)
    assert not whole & set(resolved(server))
    assert server.ranges(BIG) == [None]
    assert project.holds(checkpoint)


def test_partial_of_another_commit_is_not_glued_on(
    project: Project, server: Hub, checkpoint: Path
) -> None:
    leave_partial(project, checkpoint, 100_000)
    content = (checkpoint / BIG).read_bytes()
    (checkpoint / BIG).write_bytes(content[:50_000] + b"!" + content[50_001:])
    assert project.fetch().code == 0
    assert server.ranges(BIG) == [None]
    assert project.holds(checkpoint)
    assert not project.partials()
