"""Data sets of the hub, from a local hub: read by id, revision and split, or one clear fault."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ms4.manifest import file_entry, write_manifest

pytestmark = pytest.mark.slow

COMMIT = "a" * 40
BLOB = "b" * 40
FILES = {
    name: "".join(
        json.dumps({"question": f"{name} {n}?", "answer": f"{n}!"}) + "\n" for n in range(size)
    ).encode()
    for name, size in (("train.jsonl", 5), ("test.jsonl", 2))
}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The pages of a hub that holds `owner/name` at the revision `v1`."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        path = self.path.split("?")[0]
        if re.fullmatch(rf"/api/datasets/owner/name/revision/(v1|{COMMIT})", path):
            siblings = [{"rfilename": name} for name in FILES]
            self._json({"id": "owner/name", "sha": COMMIT, "private": False, "tags": [],
                        "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip
        elif path == f"/api/datasets/owner/name/tree/{COMMIT}":
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": BLOB}
                    for name, data in FILES.items()
                ]
            )
        elif "/resolve/" in path and path.rsplit("/", 1)[1] in FILES:
            self._file(FILES[path.rsplit("/", 1)[1]], head)
        else:
            self.send_response(404)
            missing = "RevisionNotFound" if "/revision/" in path else "EntryNotFound"
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, data: bytes, head: bool) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(wanted[1]) if wanted else 0
        last = int(wanted[2]) if wanted and wanted[2] else len(data) - 1
        part = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{BLOB}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not head:
            self.wfile.write(part)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def data(entry: str, endpoint: str, tekken: Path, home: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of `ms4 data`; the hub's address is read once, so in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "ms4", "data", "--json", "--tokenizer", str(tekken), entry],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def preprocess(
    section: dict[str, Any], endpoint: str, tekken: Path, project: Path
) -> subprocess.CompletedProcess[str]:
    """The stage in a project with this `data`."""
    write_manifest(
        project / "weights/source.json",
        "fetch",
        config_hash="",
        inputs=[],
        files=[file_entry(tekken, tekken.parent)],
        directory=str(tekken.parent),
    )
    (project / "config.yaml").write_text(json.dumps({"data": section}))
    return subprocess.run(
        [sys.executable, "-m", "ms4", "preprocess", "--config", "config.yaml"],
        cwd=project,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(project / "home")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("split", "samples"),
    [("", 5), ("#train", 5), ("#test", 2)],
)
def test_a_data_set_by_id_revision_and_split(
    split: str, samples: int, hub: str, tekken: Path, tmp_path: Path
) -> None:
    code, found = data(f"hub:owner/name@v1{split}", hub, tekken, tmp_path)
    assert code == 0
    assert (found["format"], found["records"], found["samples"]) == (
        "question_answer",
        samples,
        samples,
    )


def test_a_hub_that_does_not_answer_is_one_fault(tekken: Path, tmp_path: Path) -> None:
    entry = "hub:owner/name@v1"
    done = preprocess({"train": [entry]}, "http://127.0.0.1:9", tekken, tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{entry}: cannot be read on after 0 rows (" in done.stderr


@pytest.mark.parametrize(
    "entry",
    ["hub:owner/name@v2", "hub:owner/name@v1#none", "hub:owner/name/none@v1", "hub:a/b@v1"],
)
def test_what_is_not_there_is_one_fault(entry: str, hub: str, tekken: Path, tmp_path: Path) -> None:
    code, found = data(entry, hub, tekken, tmp_path)
    assert code == 2
    (fault,) = found["faults"]
    assert (fault["file"], fault["line"]) == (entry, None)
    assert fault["reason"].startswith("cannot be read on after 0 rows (")
    assert fault["reason"].endswith("; check its id, revision and split, and the network")


def test_the_commit_of_a_branch_is_recorded(hub: str, tekken: Path, tmp_path: Path) -> None:
    """In results/data.json, of training data and of held-out sets; and it is what is read."""
    train, test = "hub:owner/name@v1", "hub:owner/name@v1#test"
    done = preprocess({"train": [train], "test": {"t": test}}, hub, tekken, tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "results/data.json").read_text())
    assert made["hub"] == {train: COMMIT, test: COMMIT}
    assert (made["train"]["samples"], made["test"]["t"]["samples"]) == (5, 2)
