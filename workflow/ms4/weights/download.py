"""Bytes from a hub to disk, by ranged requests that go on where the last one ended.

huggingface_hub is asked for metadata, addresses, credentials and its HTTP session. The transfer
itself is done here: its own writes to a file of random name and starts from zero after a kill,
which for these shards loses up to 49 GB.

A partial file is named after its content (`NAME.HASH.part`), so that a piece of one commit is
never glued to a piece of another. Several threads may fetch from one `Repository`: they share the
meter, and how long the hub asked to be left alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

import ms4
from ms4 import manifest
from ms4.errors import Ms4Error
from ms4.weights.meter import Meter, gigabytes, say
from ms4.weights.patience import Gate, Halted, Pace, Passing, Patience
from ms4.weights.shards import writable
from ms4.weights.sources import NO_ENDPOINT, Words

_BLOCK = 1 << 22
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_LOG_IN = "set HF_TOKEN or run `hf auth login`"


class Hashes:
    """SHA-256 of a file's content, and the hash by which the hub knows it, fed piece by piece."""

    def __init__(self, size: int, *, git: bool) -> None:
        """`size` is that of the whole file, in bytes, which a git blob's hash begins with."""
        self._sha256 = hashlib.sha256()
        self._git = (
            hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else self._sha256
        )

    def update(self, block: bytes) -> None:
        """Feed the next piece."""
        self._sha256.update(block)
        if self._git is not self._sha256:
            self._git.update(block)

    def sha256(self) -> str:
        """SHA-256, 64 hexadecimal digits."""
        return self._sha256.hexdigest()

    def digest(self) -> str:
        """SHA-256 or, if asked for, the git blob's SHA-1 (40 hexadecimal digits)."""
        return self._git.hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as its hub describes it."""

    name: str
    size: int
    """Bytes."""
    digest: str
    """SHA-256 of a file in large file storage, else the git blob's SHA-1."""

    def partial(self, directory: Path) -> Path:
        """Where the file grows until it is whole; one name for one content."""
        return directory / f"{self.name}.{self.digest[:16]}.part"

    def hashes(self) -> Hashes:
        """Empty hashes of the kind that the file is checked by."""
        return Hashes(self.size, git=len(self.digest) == 40)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    commit: str
    files: dict[str, RepoSibling]
    words: Words

    def file(self, name: str) -> RemoteFile:
        """What the hub says of the file `name`, which is one of `files`.

        Raises:
            Ms4Error: the hub gives no size or no hash to check it by.
        """
        sibling = self.files[name]
        digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        size = sibling.lfs.size if sibling.lfs is not None else sibling.size
        # The digest becomes part of a file name: it must be nothing but digits.
        if not isinstance(size, int) or size < 0 or not _DIGEST.fullmatch(str(digest)):
            raise Ms4Error(
                f"{self.words.source}: the hub gives no size or no hash for {name}, so that it "
                "could not be checked; use another hub (HF_ENDPOINT) or a local directory."
            )
        return RemoteFile(name, size, str(digest))


class _Partial:
    """An open partial file, and the running hashes of what it holds."""

    def __init__(
        self,
        stream: BinaryIO,
        path: Path,
        remote: RemoteFile,
        commit: str,
        meter: Meter,
        halt: threading.Event,
    ) -> None:
        self._stream, self._path, self._remote, self._meter = stream, path, remote, meter
        self._commit = commit
        self.size = os.fstat(stream.fileno()).st_size
        self.hashes = remote.hashes()
        if self.size > remote.size:
            self.restart()
        if self.size > 1e9:
            say(f"{path.name}: checking the {gigabytes(self.size)} that are there")
        stream.seek(0)
        left = self.size
        while block := stream.read(min(_BLOCK, left)):
            if halt.is_set():
                raise Halted
            self.hashes.update(block)
            left -= len(block)

    def restart(self) -> None:
        """Throw away what is there."""
        with writable(self._path):
            self._stream.truncate(0)
        self._meter.add(-self.size)
        self.size = 0
        self.hashes = self._remote.hashes()

    def append(self, block: bytes) -> None:
        """Write `block` through to the system, so that a kill of this process loses none of it."""
        left = memoryview(block)
        with writable(self._path):
            while left:
                left = left[self._stream.write(left) :]
        self.size += len(block)
        self.hashes.update(block)
        self._meter.add(len(block))

    def differs(self, how: str) -> Ms4Error:
        """Remove the file; the error says that it was not what the hub had announced."""
        self._path.unlink(missing_ok=True)
        return Ms4Error(
            f"{self._remote.name}: {how}: it changed under the pin (commit {self._commit[:12]}), "
            "or was damaged on the way; the partial file was removed. Run the same command again, "
            "which fetches that file anew. If this comes back, the hub (HF_ENDPOINT) or what "
            "stands between alters files: use another network or hub, or name another commit."
        )


def _place(url: httpx2.URL) -> str:
    """Host and port of `url`: what may be shown, as an address can carry a password."""
    return url.host if url.port is None else f"{url.host}:{url.port}"


class Repository:
    """A model repository on a hub.

    The address is HF_ENDPOINT or huggingface_hub's own; the token, if any, is what
    huggingface_hub finds in the environment or its store. It is kept in memory only.
    """

    def __init__(self, name: str, words: Words | None = None) -> None:
        """Raises Ms4Error if the address or the token cannot be one."""
        self.name, self._words, self._gate = name, words or Words(), Gate()
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        try:
            address = httpx2.URL(self._endpoint)
        except httpx2.InvalidURL:
            address = httpx2.URL("")
        if address.scheme not in ("http", "https") or not address.host:
            raise Ms4Error(NO_ENDPOINT)
        self.host = _place(address)
        self._headers = build_hf_headers(library_name="ms4", library_version=ms4.__version__)
        authorization = self._headers.get("authorization")
        self._has_token = authorization is not None
        # A header with such characters would be refused further down, by an error that quotes it.
        if authorization is not None and not (
            authorization.isascii() and authorization.isprintable()
        ):
            raise Ms4Error(
                "HF_TOKEN (or the token that `hf auth login` stored) holds characters that no "
                "token has; copy it again."
            )

    def snapshot(self, revision: str | None) -> Snapshot:
        """The commit that `revision` stands for (None: the main branch) and its files.

        Raises:
            Ms4Error: no such repository or revision, no access, or the hub does not answer.
        """
        halt = threading.Event()  # never set: nothing runs beside it
        patience = Patience(self._gate, halt)
        api = HfApi(self._endpoint, library_name="ms4", library_version=ms4.__version__)
        while True:
            self._gate.wait(halt)
            try:
                with self._explained("the list of files", revision):
                    info = api.model_info(
                        self.name,
                        revision=revision,
                        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                        files_metadata=True,
                    )
                break
            except Passing as failure:
                patience.wait(failure)
            except HFValidationError as error:
                raise Ms4Error(
                    f"{self._words.source}: {self.name} is neither a directory here nor a hub id "
                    "(owner/name)."
                ) from error
            except (KeyError, TypeError, ValueError) as error:
                raise self._no_hub() from error
        if info.sha is None or not _COMMIT.fullmatch(info.sha) or info.siblings is None:
            raise self._no_hub()
        if revision is not None and _COMMIT.fullmatch(revision) and info.sha != revision:
            raise Ms4Error(
                f"{self._words.revision}: {self.host} answers with the commit {info.sha[:12]} when "
                f"asked for {revision[:12]} of {self.name}: what is pinned changed there. Use "
                "another hub (HF_ENDPOINT), or name another commit."
            )
        siblings = {sibling.rfilename: sibling for sibling in info.siblings}
        return Snapshot(info.sha, siblings, self._words)

    def fetch(
        self, file: RemoteFile, commit: str, directory: Path, meter: Meter, halt: threading.Event
    ) -> str:
        """Bring `file` whole into `directory`, going on with its partial file; its SHA-256.

        Raises:
            Ms4Error: the hub refuses, fails or stalls, or what came is not what it announced.
            Halted: `halt` was set.
        """
        path, part = directory / file.name, file.partial(directory)
        url = hf_hub_url(self.name, file.name, revision=commit, endpoint=self._endpoint)
        patience = Patience(self._gate, halt)
        with writable(part):
            stream = part.open("a+b", buffering=0)
        with stream:
            with writable(part):
                partial = _Partial(stream, part, file, commit, meter, halt)
            while partial.size < file.size:
                self._gate.wait(halt)
                try:
                    self._stream(url, file, commit, partial, patience, halt)
                except Passing as failure:
                    patience.wait(failure)
            if (digest := partial.hashes.digest()) != file.digest:
                raise partial.differs(f"its content has the hash {digest} instead of {file.digest}")
        with writable(path):
            manifest.commit_file(part, path)
        return partial.hashes.sha256()

    def _stream(
        self,
        url: str,
        file: RemoteFile,
        commit: str,
        partial: _Partial,
        patience: Patience,
        halt: threading.Event,
    ) -> None:
        """One request for the rest of `file`."""
        # A compressed answer could not be gone on with in the middle.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if partial.size:
            headers["Range"] = f"bytes={partial.size}-"
        with (
            self._explained(file.name, commit),
            get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response,
        ):
            if response.status_code == 416:
                raise partial.differs(f"the hub has fewer bytes of it than its {file.size}")
            hf_raise_for_status(response)
            _align(response, file, partial)
            pace = Pace(_place(response.url), file.name)
            for block in response.iter_bytes():
                if halt.is_set():
                    raise Halted
                partial.append(block)
                if partial.size > file.size:
                    raise partial.differs(f"the hub sent more than its {file.size} bytes")
                patience.reached(partial.size)
                pace.add(len(block))
            if partial.size < file.size:
                raise Passing(f"{_place(response.url)} ended {file.name} before its end")

    @contextmanager
    def _explained(self, what: str, revision: str | None) -> Iterator[None]:
        """Turn a failed request for `what` into a Passing or an Ms4Error.

        What the server wrote into its answer is never repeated: it may hold the token.
        """
        try:
            yield
        except HfHubHTTPError as error:
            raise self._refusal(error, what, revision) from error
        except httpx2.TimeoutException as error:
            seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
            raise Passing(
                f"{self.host} did not answer for {seconds} s when asked for {what}"
            ) from error
        except httpx2.ConnectError as error:
            raise Passing(
                f"{self.host} cannot be reached ({error}): check the network, the proxy and "
                "HF_ENDPOINT"
            ) from error
        except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError) as error:
            raise Passing(f"{self.host} broke the connection in {what}") from error
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise Ms4Error(
                f"{self.host}: {what} cannot be fetched ({type(error).__name__}); check HF_ENDPOINT"
                " and the proxy settings."
            ) from error

    def _refusal(self, error: HfHubHTTPError, what: str, revision: str | None) -> Exception:
        """What an answer of 400 and more means, and what to do."""
        status, host = error.response.status_code, _place(error.response.url)
        name, token = self.name, _LOG_IN
        if status == 429:
            return Passing(
                f"{host} limits the rate of requests (429)", _retry_after(error.response)
            )
        if status == 408 or status >= 500:
            return Passing(f"{host} answered {status} when asked for {what}")
        if isinstance(error, GatedRepoError):
            return Ms4Error(
                f"{self._words.source}: {name} is gated ({status}): accept its terms on "
                f"{self.host}/{name}, then give a token of that account: {token}."
            )
        if isinstance(error, RevisionNotFoundError):
            return Ms4Error(
                f"{self._words.revision}: {name} has no revision {revision}; name a branch, a tag "
                "or a commit that it has, or leave it out for the main branch."
            )
        if isinstance(error, RemoteEntryNotFoundError):
            return Ms4Error(
                f"{self._words.source}: {name} lists {what}, but {host} does not have it (404) at "
                f"{revision}. Run again later, or name another commit ({self._words.revision})."
            )
        if host != self.host:
            # Storage that the hub redirects to: its signed addresses expire, a new one is due.
            return Passing(f"{host}, to which {self.host} refers, answered {status} for {what}")
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            access = (
                "the token that is set does not reach it"
                if self._has_token
                else f"it is private: then {token}"
            )
            return Ms4Error(
                f"{self._words.source}: {host} has no repository {name} ({status}), or {access}. "
                "Check the spelling."
            )
        if status in (401, 403):
            fault = "refuses the token that is set" if self._has_token else "asks for a token"
            return Ms4Error(
                f"{self._words.source}: {host} {fault} ({status}) for {name}. Give one that may "
                f"read it: {token}."
            )
        return Ms4Error(
            f"{self._words.source}: {host} answered {status} when asked for {what} of {name}; "
            f"check that and HF_ENDPOINT."
        )

    def _no_hub(self) -> Ms4Error:
        return Ms4Error(
            f"{self.host} does not answer as a hub does; check HF_ENDPOINT and whether a proxy or a"
            " login page stands between."
        )


def _align(response: httpx2.Response, file: RemoteFile, partial: _Partial) -> None:
    """Make `partial` end where the body of `response` begins; check the announced length."""
    total = response.headers.get("Content-Length")
    if response.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != partial.size:
            partial.restart()
            raise Passing(f"{_place(response.url)} sent another part of {file.name} than asked")
        total = found[2] if found[2] != "*" else None
    elif response.status_code == 200:
        if partial.size:
            partial.restart()
        if "Content-Encoding" in response.headers:
            total = None
    else:
        raise Passing(f"{_place(response.url)} answered {response.status_code} for {file.name}")
    if total is not None and total.isdecimal() and int(total) != file.size:
        raise partial.differs(f"the hub sends {total} bytes instead of {file.size}")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the hub asks to wait, or None if it does not say."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isascii() and value.isdecimal() else None
