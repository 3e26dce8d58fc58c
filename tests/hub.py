"""A model hub on the loopback interface: real HTTP, directories on disk as repositories.

It speaks what `huggingface_hub` asks for (model information, files by ranges, redirects to a
storage host) and can be told to fail. Tests use `serve`; by hand:

    python tests/hub.py owner/name=DIRECTORY …

prints the value that HF_ENDPOINT must have, and serves until interrupted.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 100_000
"""Files of more bytes, and all safetensors files, count as large file storage."""


@dataclass
class Fault:
    """What goes wrong with requests whose path fits `path`."""

    path: str
    """Shell pattern over the request's path, for instance `*/resolve/*/config.json`."""
    times: int | None = None
    """How many requests it strikes; None: all."""
    storage: bool | None = None
    """Strike only at the storage host, or only at the hub; None: at both."""
    status: int | None = None
    """Answer so, with `headers` and `body`, instead of serving."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the answer; over those of the file where it is served."""
    body: bytes | None = None
    """Send this instead of the content (a range of it, if one is asked for)."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    hold_after: int | None = None
    """Stop after so many bytes of the body until `Hub.release` is set."""
    trickle_after: int | None = None
    """Send byte by byte, a hundred a second, after so many bytes of the body."""
    ignore_range: bool = False
    """Answer 200 with the whole content, whatever range is asked for."""
    echo_authorization: bool = False
    """Write the request's Authorization header into the body of the answer `status`."""


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    storage: bool
    """Whether it came to the storage host that large files are redirected to."""
    at_s: float = field(default_factory=time.monotonic)
    """When it came, on the monotonic clock."""


@dataclass
class _Content:
    data: bytes
    sha256: str
    blob: str


class Hub:
    """A running hub; `faults` may be changed at any time, `requests` grows."""

    def __init__(
        self,
        repositories: Mapping[str, Path | Mapping[str, Path]],
        *,
        token: str | None = None,
        gated: bool = False,
        redirect: bool = False,
    ) -> None:
        self.revisions: dict[str, dict[str, Path]] = {
            name: {"main": place} if isinstance(place, Path) else dict(place)
            for name, place in repositories.items()
        }
        self.token, self.gated, self.redirect = token, gated, redirect
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.release = threading.Event()
        self.sizes: dict[str, int] = {}
        """File name → size that the metadata claims instead of the true one."""
        self.digests: dict[str, str] = {}
        """File name → hash that the metadata claims instead of the true one."""
        self.url = self.storage_url = ""
        self.pace: float | None = None
        """Bytes a second of each connection; None: as fast as may be."""
        self.served: Counter[str] = Counter()
        """File name → bytes of its content that were sent."""
        self.at_once = self.most_at_once = 0
        """Requests for files that are being answered, and the most that ever were."""
        self._guard = threading.Lock()
        self._cache: dict[tuple[Path, int, int], _Content] = {}

    def content(self, path: Path) -> _Content:
        """A file's bytes and hashes."""
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        with self._guard:
            if key not in self._cache:
                data = path.read_bytes()
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
                self._cache[key] = _Content(
                    data, hashlib.sha256(data).hexdigest(), blob.hexdigest()
                )
            return self._cache[key]

    def files(self, directory: Path) -> dict[str, _Content]:
        """A repository's files by name."""
        return {
            path.relative_to(directory).as_posix(): self.content(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

    def commit(self, directory: Path) -> str:
        """The commit that a directory's content stands for: 40 hexadecimal digits."""
        listing = [(name, content.blob) for name, content in self.files(directory).items()]
        return hashlib.sha1(json.dumps(listing).encode(), usedforsecurity=False).hexdigest()

    def find(self, repository: str, revision: str) -> Path | None:
        """The directory of a branch, tag or commit."""
        for name, directory in self.revisions[repository].items():
            if revision in (name, self.commit(directory)):
                return directory
        return None

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of all GET requests for the file `name`, in order."""
        return [
            request.range
            for request in self.requests
            if request.method == "GET" and request.path.endswith(f"/{name}")
        ]

    def strike(self, path: str, *, storage: bool) -> Fault | None:
        """The first fault that fits, counted down."""
        with self._guard:
            for fault in self.faults:
                if fault.times == 0 or fault.storage not in (None, storage):
                    continue
                if fnmatchcase(path, fault.path):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def record(self, request: Request) -> None:
        """Note a request."""
        with self._guard:
            self.requests.append(request)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a file is sent."""
        with self._guard:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self._guard:
                self.at_once -= 1

    def sent(self, name: str, size: int) -> None:
        """Note that so much of a file was sent."""
        with self._guard:
            self.served[name] += size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    storage: bool

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet: `Hub.requests` has it all."""

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        authorization = self.headers.get("Authorization")
        self.hub.record(
            Request(self.command, path, self.headers.get("Range"), authorization, self.storage)
        )
        try:
            fault = self.hub.strike(path, storage=self.storage)
            if fault is not None and fault.status is not None:
                body = fault.body or b""
                if fault.echo_authorization:
                    body = json.dumps({"error": f"you sent {authorization}"}).encode()
                self._answer(fault.status, body, fault.headers)
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._model(found[1], found[2] or "main", parse_qs(parts.query))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                with self.hub.answering():
                    self._file(found[1], found[2], found[3], fault or Fault(""))
            else:
                self._refuse(404, "")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client is gone, as it may be in these tests

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._answer(status, b"", headers)

    def _allowed(self, repository: str, *, metadata: bool) -> bool:
        """As the public hub does: a gated repository shows its metadata to all."""
        given = self.headers.get("Authorization")
        if repository not in self.hub.revisions:
            self._refuse(404 if given else 401, "RepoNotFound")
        elif self.hub.token is None or given == f"Bearer {self.hub.token}":
            return True
        elif self.hub.gated:
            if metadata:
                return True
            self._refuse(403 if given else 401, "GatedRepo")
        else:
            self._refuse(401, "" if given else "RepoNotFound")
        return False

    def _model(self, repository: str, revision: str, query: dict[str, list[str]]) -> None:
        if not self._allowed(repository, metadata=True):
            return
        directory = self.hub.find(repository, revision)
        if directory is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = []
        for name, content in self.hub.files(directory).items():
            sibling: dict[str, Any] = {"rfilename": name}
            if query.get("blobs", [""])[0].lower() in ("true", "1"):
                size = self.hub.sizes.get(name, len(content.data))
                sibling |= {"size": size, "blobId": self.hub.digests.get(name, content.blob)}
                if name.endswith(".safetensors") or len(content.data) > LARGE:
                    sha256 = self.hub.digests.get(name, content.sha256)
                    sibling["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 134}
            siblings.append(sibling)
        info = {"id": repository, "sha": self.hub.commit(directory), "siblings": siblings}
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, revision: str, name: str, fault: Fault) -> None:
        # The storage host knows signed addresses, not tokens.
        if not self.storage and not self._allowed(repository, metadata=False):
            return
        directory = self.hub.find(repository, revision)
        if directory is None:
            self._refuse(404, "RevisionNotFound")
            return
        files = self.hub.files(directory)
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[name]
        large = name.endswith(".safetensors") or len(content.data) > LARGE
        etag = content.sha256 if large else content.blob
        headers = {"X-Repo-Commit": self.hub.commit(directory), "ETag": f'"{etag}"'}
        if large:
            headers |= {
                "X-Linked-Size": str(len(content.data)),
                "X-Linked-Etag": f'"{content.sha256}"',
            }
        if large and self.hub.redirect and not self.storage:
            self._answer(302, b"", {**headers, "Location": self.hub.storage_url + self.path})
            return
        self._send(name, content.data if fault.body is None else fault.body, headers, fault)

    def _send(self, name: str, data: bytes, headers: dict[str, str], fault: Fault) -> None:
        status, asked = 200, self.headers.get("Range")
        headers = {**headers, "Accept-Ranges": "bytes"}
        if asked is not None and not fault.ignore_range:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            if found is None or int(found[1]) >= len(data):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data)), **fault.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        places = (fault.cut_after, fault.hold_after, fault.trickle_after)
        stop = next((n for n in places if n is not None), len(data))
        self._write(name, data[:stop])
        if fault.trickle_after is not None:
            for at in range(stop, len(data)):
                time.sleep(0.01)
                self._write(name, data[at : at + 1])
        if fault.cut_after is not None:
            self.close_connection = True
        elif fault.hold_after is not None:
            self.hub.release.wait()
            self._write(name, data[stop:])

    def _write(self, name: str, data: bytes) -> None:
        pace = self.hub.pace
        each = len(data) if pace is None else max(1, int(pace / 100))
        for start in range(0, len(data), max(each, 1)):
            if pace is not None:
                time.sleep(0.01)
            part = data[start : start + each]
            self.wfile.write(part)
            self.wfile.flush()
            self.hub.sent(name, len(part))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone, as they may be in these tests."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _start(hub: Hub, *, storage: bool) -> _Server:
    handler = type("Handler", (_Handler,), {"hub": hub, "storage": storage})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@contextmanager
def serve(
    repositories: Mapping[str, Path | Mapping[str, Path]],
    *,
    token: str | None = None,
    gated: bool = False,
    redirect: bool = False,
) -> Iterator[Hub]:
    """Serve directories as model repositories until the block is left.

    Args:
        repositories: repository (`owner/name`) → its directory, or branch or tag → directory.
        token: what a client must send to see the repositories (`gated`: their files).
        gated: the repositories show their metadata, but not their files, without the token.
        redirect: large files are redirected to a second host, as the public hub does.
    """
    hub = Hub(repositories, token=token, gated=gated, redirect=redirect)
    servers = [_start(hub, storage=storage) for storage in (False, True)]
    hub.url = f"http://127.0.0.1:{servers[0].server_address[1]}"
    # Another host name makes it another origin to the client, as storage is.
    hub.storage_url = f"http://localhost:{servers[1].server_address[1]}"
    try:
        yield hub
    finally:
        hub.release.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def main(arguments: list[str]) -> int:
    """Serve `owner/name=DIRECTORY` arguments until interrupted."""
    pairs = [argument.partition("=") for argument in arguments]
    if not pairs or not all(path and Path(path).is_dir() for _, _, path in pairs):
        print("usage: python tests/hub.py owner/name=DIRECTORY …", file=sys.stderr)
        return 2
    with serve({name: Path(path) for name, _, path in pairs}) as hub:
        print(hub.url, flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
