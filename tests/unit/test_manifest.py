"""Manifests: atomic, complete, the same bytes for the same work."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ms4
from ms4 import manifest
from ms4.errors import Ms4Error
from tests.commands import wait_for

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)

WRITE_FOREVER = """
from pathlib import Path
from ms4 import manifest
number = 0
while True:
    number += 1
    manifest.write_json(Path("out.json"), {"number": number, "text": "x" * 200_000})
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, **content: object) -> dict[str, object]:
    return manifest.write_manifest(path, "fetch", config_hash="abc", **content)  # type: ignore[arg-type]


def test_sha256_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than two blocks
    (tmp_path / "file").write_bytes(data)
    assert manifest.sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@given(st.dictionaries(st.text(), JSON))
def test_hash_of_json_is_independent_of_order(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert manifest.sha256_json(value) == manifest.sha256_json(turned)


@given(JSON, JSON)
def test_hash_of_json_tells_values_apart(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (manifest.sha256_json(one) == manifest.sha256_json(other)) == same


@settings(deadline=None)
@given(value=JSON)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "new" / "directory" / "value.json"
    manifest.write_json(path, value)
    assert manifest.read_json(path) == value
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


def test_a_kill_leaves_the_old_or_the_new_file(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    path = tmp_path / "out.json"
    for _ in range(5):
        before = manifest.read_json(path)["number"] if path.exists() else 0
        process = start(sys.executable, "-c", WRITE_FOREVER, cwd=tmp_path)
        wait_for(lambda old=before: path.exists() and manifest.read_json(path)["number"] != old, "")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(manifest.read_json(path)["text"]) == 200_000


def test_manifest_says_who_from_what_and_nothing_of_the_day(root: Path) -> None:
    (root / "payload").mkdir()
    (root / "payload/a.bin").write_bytes(b"abc")
    (root / "input.json").write_text("{}")
    entry = manifest.file_entry(root / "payload/a.bin", root / "payload")
    written = write(
        Path("results/out.json"), inputs=[Path("input.json")], files=[entry], loss={"none": 0.5}
    )
    assert written == manifest.read_manifest(Path("results/out.json"), "fetch")
    assert written == {
        "stage": "fetch",
        "ms4_version": ms4.__version__,
        "config_hash": "abc",
        "inputs": {"input.json": hashlib.sha256(b"{}").hexdigest()},
        "files": [{"path": "a.bin", "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}],
        "loss": {"none": 0.5},
    }


def test_same_work_same_bytes(root: Path) -> None:
    write(Path("one.json"), tokens=5)
    write(Path("two.json"), tokens=5)
    assert (root / "one.json").read_bytes() == (root / "two.json").read_bytes()


def test_missing_manifest_names_the_stage_to_run(root: Path) -> None:
    with pytest.raises(Ms4Error) as caught:
        manifest.read_manifest(Path("weights/source.json"), "fetch")
    assert str(caught.value) == (
        "weights/source.json is missing: run `ms4 fetch` (or `snakemake`) first."
    )


def test_manifest_of_another_stage(root: Path) -> None:
    write(Path("out.json"))
    with pytest.raises(Ms4Error, match=r"^out.json: not a manifest of the stage train\. Remove it"):
        manifest.read_manifest(Path("out.json"), "train")
    Path("out.json").write_text("[]")
    with pytest.raises(Ms4Error, match=r"^out.json: not a manifest of the stage fetch\. Remove it"):
        manifest.read_manifest(Path("out.json"), "fetch")


def test_damaged_manifest(root: Path) -> None:
    Path("out.json").write_text('{"stage": ')
    with pytest.raises(
        Ms4Error, match=r"^out.json: not valid JSON \(.*\)\. Remove it and run again"
    ):
        manifest.read_manifest(Path("out.json"), "fetch")
    Path("out.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Ms4Error, match=r"^out.json: not valid JSON"):
        manifest.read_manifest(Path("out.json"), "fetch")


def test_unreadable_json(root: Path) -> None:
    Path("directory.json").mkdir()
    with pytest.raises(Ms4Error, match=r"^directory.json: cannot be read \(Is a directory\)\.$"):
        manifest.read_json(Path("directory.json"))


def test_check_files_names_every_fault(root: Path) -> None:
    for name in ("whole", "missing", "short", "changed"):
        (root / name).write_bytes(b"12345678")
    entries = [manifest.file_entry(path, root) for path in sorted(root.iterdir())]
    written = write(Path("out.json"), files=entries)
    manifest.check_files(written, root, hashes=True)

    (root / "missing").unlink()
    (root / "short").write_bytes(b"1234")
    (root / "changed").write_bytes(b"87654321")
    with pytest.raises(Ms4Error) as caught:
        manifest.check_files(written, root, hashes=True)
    assert str(caught.value) == (
        "files of the stage fetch are not as its manifest says:\n"
        f"  {root}/changed: content differs from its SHA-256\n"
        f"  {root}/missing: missing\n"
        f"  {root}/short: 4 bytes instead of 8\n"
        "Remove the manifest of that stage and run again; whole pieces are kept."
    )
    with pytest.raises(Ms4Error) as caught:
        manifest.check_files(written, root)
    assert "changed: content" not in str(caught.value)
