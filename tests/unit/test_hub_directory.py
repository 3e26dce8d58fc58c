"""`ms4 fetch REPO_OR_PATH DIR`, the stage's code with other places; layouts; room on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from ms4 import manifest, spec
from ms4.cli import main
from ms4.weights import configs, layouts
from ms4.weights.meter import gigabytes
from ms4.weights.tables import piece_bytes
from tests import small_source
from tests.commands import wait_for
from tests.fetching import (
    HIDDEN,
    REPOSITORY,
    SHARDS,
    Project,
    Result,
    environment,
    finish,
    make_checkpoint,
    refused,
    resolved,
)
from tests.hub import Fault, Hub, serve

Layout = Literal["hf", "native"]
OTHER: dict[Layout, Layout] = {"hf": "native", "native": "hf"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One checkpoint in both layouts, as the published repository has it."""
    directory = small_source.write(tmp_path / "checkpoint", "hf")
    for path in small_source.write(tmp_path / "native", "native").iterdir():
        path.replace(directory / path.name)
    for name in ("SYSTEM_PROMPT.txt", "chat_template.jinja", "README.md"):
        (directory / name).write_text(name)
    return directory


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve({REPOSITORY: checkpoint}) as hub:
        for name in [name for name in os.environ if name.startswith(HIDDEN)]:
            monkeypatch.delenv(name)
        for name, value in environment(tmp_path / "home", hub.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def fetch(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`ms4 fetch` with arguments, in this process."""

    def run(*argv: str | Path) -> Result:
        code = main(["fetch", *map(str, argv)])
        captured = capfd.readouterr()
        return Result(code, captured.out + captured.err)

    return run


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


def needed(layout: Layout, checkpoint: Path) -> set[str]:
    stem = {"hf": "model", "native": "consolidated"}[layout]
    beside = {layouts.SETTINGS[layout], layouts.INDEX[layout], "tekken.json"}
    if layout == "hf":
        beside.add("params.json")
    shards = {path.name for path in checkpoint.glob(f"{stem}-*.safetensors")}
    return {*beside, *shards, "SYSTEM_PROMPT.txt", "chat_template.jinja"}


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_one_layout_and_never_both(
    server: Hub, checkpoint: Path, fetch: Callable[..., Result], layout: Layout
) -> None:
    result = fetch(REPOSITORY, "out", "--layout", layout)
    assert result.code == 0, result.text
    wanted = needed(layout, checkpoint)
    assert sorted(resolved(server)) == sorted(wanted)
    assert names(Path("out")) == {*wanted, "source.json", ".fetched.json"}
    written = manifest.read_manifest(Path("out/source.json"), "fetch")
    manifest.check_files(written, Path("out"), hashes=True)
    assert {entry["path"] for entry in written["files"]} == wanted
    assert written["layout"] == layout
    assert written["directory"] == "."
    assert written["repository"] == REPOSITORY
    assert written["revision"] == server.commit(checkpoint)
    assert "freed" not in written
    assert layouts.Source(Path("out")).layout == layout

    # Again: nothing comes, the manifest has the same bytes. By its commit, nothing is asked.
    before = Path("out/source.json").read_bytes()
    server.requests.clear()
    assert "nothing to fetch" in fetch(REPOSITORY, "out", "--layout", layout).text
    assert not resolved(server)
    assert Path("out/source.json").read_bytes() == before
    commit = server.commit(checkpoint)
    server.requests.clear()
    assert fetch(REPOSITORY, "out", "--layout", layout, "--revision", commit).code == 0
    assert not server.requests

    # The other layout takes the place of this one; what both have is not fetched again.
    other = OTHER[layout]
    assert fetch(REPOSITORY, "out", "--layout", other).code == 0
    assert set(resolved(server)) == needed(other, checkpoint) - needed(layout, checkpoint)
    assert names(Path("out")) == {*needed(other, checkpoint), "source.json", ".fetched.json"}


def test_native_layout_in_a_project(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", server.url)
    project.configure(REPOSITORY, layout="native")
    assert project.fetch().code == 0
    assert project.manifest()["layout"] == "native"
    assert {entry["path"] for entry in project.manifest()["files"]} == needed("native", checkpoint)
    # What the later stages read of the source is there in this layout too.
    assert layouts.read_dimensions(project.source) == small_source.DIMS


def test_a_repository_that_lacks_the_layout(
    server: Hub, checkpoint: Path, fetch: Callable[..., Result]
) -> None:
    (checkpoint / "params.json").unlink()
    (checkpoint / layouts.INDEX["native"]).unlink()
    result = fetch(REPOSITORY, "out", "--layout", "native")
    assert refused(result, f"lacks params.json, {layouts.INDEX['native']}. In the native layout")
    assert not Path("out/source.json").exists()


def test_a_file_of_the_users_is_not_written_over(
    server: Hub, checkpoint: Path, fetch: Callable[..., Result]
) -> None:
    Path("out").mkdir()
    (Path("out") / "config.json").write_text("{}")
    (Path("out") / "tekken.json").write_bytes((checkpoint / "tekken.json").read_bytes())
    result = fetch(REPOSITORY, "out")
    assert refused(result, "out/config.json: is there, with another content", "not fetched by ms4")
    assert Path("out/config.json").read_text() == "{}"
    Path("out/config.json").unlink()
    # What has the right content is taken over.
    assert fetch(REPOSITORY, "out").code == 0
    assert "tekken.json" not in resolved(server)
    # And what was fetched is ours: damage is mended.
    Path("out/config.json").write_text("{}")
    assert fetch(REPOSITORY, "out").code == 0
    assert Path("out/config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_a_directory_that_cannot_be_one(server: Hub, fetch: Callable[..., Result]) -> None:
    Path("out").write_text("in the way")
    assert refused(fetch(REPOSITORY, "out"), "out: cannot be written (File exists)")
    assert Path("out").read_text() == "in the way"


def test_errors_name_what_was_given(server: Hub, fetch: Callable[..., Result]) -> None:
    for words in (
        (fetch("someone/else", "out"), "REPO_OR_PATH: ", "no repository someone/else"),
        (fetch(REPOSITORY, "out", "--revision", "v9"), "--revision: ", "no revision v9"),
        (fetch("./nowhere", "out", "--convert", "nf4"), "REPO_OR_PATH: nowhere: no such directory"),
        (fetch(REPOSITORY, "out", "--free-source"), "goes with --convert"),
    ):
        assert refused(*words)
        assert "model." not in words[0].text


@pytest.mark.slow
def test_a_second_process_is_refused(
    server: Hub, fetch: Callable[..., Result], tmp_path: Path
) -> None:
    server.faults.append(Fault("*/model-*", hold_after=10))
    command = [sys.executable, "-m", "ms4", "fetch", REPOSITORY, "out"]
    first = subprocess.Popen(
        command,
        env=os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(lambda: list(Path("out").glob("*.part")), "a partial file")
    assert refused(fetch(REPOSITORY, "out"), f"is at work in {tmp_path}/out", "two writers")
    assert fetch(REPOSITORY, "elsewhere/other", "--layout", "native").code == 0
    server.release.set()
    assert finish(first).code == 0


# A local directory.


@pytest.mark.parametrize("options", [(), ("--free-source", "--convert", "nf4")])
def test_a_local_directory_is_left_alone(
    checkpoint: Path, fetch: Callable[..., Result], options: tuple[str, ...], tmp_path: Path
) -> None:
    before = names(checkpoint)
    result = fetch(checkpoint, tmp_path / "out", *options)
    advice = "nothing in it is removed" if options else f"ms4 descale {checkpoint} TARGET"
    assert refused(result, str(checkpoint), advice)
    assert names(checkpoint) == before
    assert not (tmp_path / "out").exists()


def test_a_projects_own_directory_is_not_freed(checkpoint: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", "http://127.0.0.1:1")
    project.configure(str(checkpoint), free_source=True)
    assert refused(project.fetch(), f"model.free_source: {checkpoint}", "nothing in it is removed")


# The disk.


def test_room_for_the_whole_plan(
    server: Hub, checkpoint: Path, tmp_path: Path, fetch: Callable[..., Result]
) -> None:
    """Source and base, before the long part is begun; all numbers are said."""
    dims = replace(spec.Dimensions(), experts=2**17)
    size = gigabytes(sum(piece_bytes(dims, "nf4").values()))  # 60 TB
    (checkpoint / "config.json").write_text(json.dumps(configs.hf_config(dims)))
    project = Project(tmp_path / "project", server.url)
    result = project.fetch()
    assert refused(
        result,
        f"fetching the rest of {REPOSITORY} takes 171.0 kB",
        f"the base (nf4) that comes of it takes {size}, together {size}; the disk has ",
        "GB free",
        "model.free_source: true",
    )
    assert not any(name.endswith(".safetensors") for name in resolved(server))
    # Outside a project nobody said that it will be converted.
    with serve({REPOSITORY: make_checkpoint(tmp_path / "other")}) as other:
        other.sizes[SHARDS[0]] = 10**18
        os.environ["HF_ENDPOINT"] = other.url
        assert refused(fetch(REPOSITORY, "alone"), "takes 1000000000.", "the disk has ")


# What the environment says.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "http://me:secret-word/@["),
        ("HF_ENDPOINT", "http://127.0.0.1:secret-word"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
    ],
)
def test_impossible_environment(tmp_path: Path, name: str, value: str) -> None:
    project = Project(tmp_path / "project", "http://127.0.0.1:1")
    result = project.fetch(**{name: value})
    assert refused(result, name)
    assert "secret-word" not in result.text


def test_a_local_directory_needs_no_hub(tmp_path: Path) -> None:
    project = Project(tmp_path / "project", "http://[")
    project.configure(str(make_checkpoint(tmp_path / "local")))
    assert project.fetch().code == 0
