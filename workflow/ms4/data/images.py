"""Images of conversations: where their bytes may come from, what may be decoded, and how many
tokens they take.

An image counts as it is seen: upright, by its EXIF orientation. Tokens and pixels then follow
mistral-common's rules: the longest side is brought to at most `max_size` pixels, each side to the
next multiple of 28 (14 pixels a patch, 2 × 2 patches a token), a row of tokens ends with a break.

Nothing outside the data's own directories is opened, whatever a record says, and nothing is fetched
unless that is allowed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import io
import os
import stat
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from struct import error as StructError
from urllib.parse import unquote, urlsplit

import httpx2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from ms4.data.conversation import Conversation, Image, Part
from ms4.data.faults import SampleFault
from ms4.errors import Ms4Error

MAX_SIZE = 1540
"""Pixels of the longest side that the vision tower was made for."""
PATCH, MERGE = 14, 2
UNIT = PATCH * MERGE
"""Pixels of a token's side."""
MAX_BYTES = 64 << 20
"""Bytes of an image file."""
MAX_PIXELS = 50_000_000
"""Width × height of an image: decoding takes about 25 bytes each."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Some other formats start programs."""
FETCH_S = 30.0
"""Seconds without an answer after which a fetch is given up."""

Grid = tuple[int, int]
"""Columns and rows of an image's tokens, breaks not counted."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_DECODING = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    RuntimeError,
    MemoryError,
    StructError,
    zlib.error,
    Pillow.DecompressionBombError,
)
"""What Pillow raises on files that are damaged, or made to do damage."""
_REMEMBERED = 10_000
_sizes: dict[bytes, tuple[int, int]] = {}
"""SHA-256 of images that were decoded without a fault → their size, upright."""


@dataclass(frozen=True)
class ImageRules:
    """What images of a data set may be."""

    roots: tuple[Path, ...] = ()
    """Directories, beside that of the data file, that paths may lead into."""
    allow_http: bool = False
    """Whether http and https addresses are fetched."""


@dataclass(frozen=True)
class EncodedImage:
    """An image of an encoded conversation."""

    sha256: bytes
    """Of its file: equal files are stored once."""
    raw: bytes
    """The file as it is."""
    size: tuple[int, int]
    """Width and height in pixels, upright, before any scaling."""
    grid: Grid

    @property
    def tokens(self) -> int:
        """Tokens, breaks included."""
        return _tokens(self.grid)

    @property
    def tokens_uncapped(self) -> int:
        """Tokens if it were scaled down to no less than the vision tower takes."""
        return _tokens(grid_of(self.size, MAX_SIZE))


def _tokens(grid: Grid) -> int:
    return (grid[0] + 1) * grid[1]


def grid_of(size: tuple[int, int], max_size: int) -> Grid:
    """Columns and rows of an image's tokens; as `ImageEncoder._image_to_num_tokens` has it.

    Args:
        size: width and height in pixels.
        max_size: pixels that the longest side is scaled down to.
    """
    width, height = size
    ratio = max(height / max_size, width / max_size)
    if ratio > 1:
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (width - 1) // UNIT + 1, (height - 1) // UNIT + 1


def encoded_image(raw: bytes, max_size: int) -> EncodedImage:
    """An image's hash, size and grid.

    Raises:
        SampleFault: it cannot be decoded.
    """
    sha256 = hashlib.sha256(raw).digest()
    size = _sizes.get(sha256)
    if size is None:
        size = open_image(raw).size
        if len(_sizes) >= _REMEMBERED:
            _sizes.clear()
        _sizes[sha256] = size
    return EncodedImage(sha256, raw, size, grid_of(size, max_size))


def open_image(raw: bytes) -> Pillow.Image:
    """Decode an image file whole, upright, in a mode that mistral-common turns into RGB.

    Raises:
        SampleFault: it is no image of a known format, damaged, cut short, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Pillow.open(io.BytesIO(raw), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise SampleFault(
                    f"an image of {width} × {height} pixels, more than the {MAX_PIXELS:,} that "
                    "are decoded; scale it down"
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise SampleFault(
            f"an image is of no format that is read ({', '.join(FORMATS)}); convert it"
        ) from error
    except _DECODING as error:
        what = " ".join(str(error).split())[:100] or type(error).__name__
        raise SampleFault(f"an image is damaged or cut short ({what}); replace it") from error
    if upright.mode in _SIXTEEN_BIT:
        # Pillow cuts such values off at 255 where it turns them into 8 bits.
        high = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
        upright = Pillow.fromarray(high)
    if upright.mode not in _MODES:
        raise SampleFault(f"an image has the mode {upright.mode}; convert it to RGB of 8 bits")
    return upright


def check_scaling() -> None:
    """Check that images can be scaled, before anything is done that would be lost.

    Raises:
        Ms4Error: opencv is not installed.
    """
    # Not imported: it takes a second, and nothing of it is needed here.
    if importlib.util.find_spec("cv2") is None:
        raise Ms4Error(
            "images are scaled by opencv, which is not installed: pip install "
            "opencv-python-headless (it is part of the `train` extra)."
        )


def pixels(raw: bytes, max_size: int) -> npt.NDArray[np.float32]:
    """What the vision tower sees: mistral-common's own scaling (bicubic) and normalization.

    Args:
        raw: an image file.
        max_size: pixels that the longest side is scaled down to.

    Returns:
        float32 [3, height, width], both multiples of 28.

    Raises:
        SampleFault: it cannot be decoded.
    """
    from mistral_common.tokens.tokenizers.image import transform_image  # takes a second to import

    image = open_image(raw)
    columns, rows = grid_of(image.size, max_size)
    made = transform_image(image, (columns * UNIT, rows * UNIT))
    return np.ascontiguousarray(made, dtype=np.float32)


def resolve(conversation: Conversation, data_file: Path, rules: ImageRules) -> Conversation:
    """The conversation with every image's bytes in it, each of them decoded once as a check.

    Args:
        conversation: as it was read.
        data_file: relative paths are relative to its directory.
        rules: where images may come from.

    Raises:
        SampleFault: which image of which message cannot be had, why, and what to do.
    """
    if not any(part.kind == "image" for message in conversation.messages for part in message.parts):
        return conversation
    messages = []
    for number, message in enumerate(conversation.messages, 1):
        parts: list[Part] = []
        many = sum(part.kind == "image" for part in message.parts)
        for part in message.parts:
            if part.kind == "image" and part.image is not None:
                try:
                    raw = _read(part.image, data_file.parent, rules)
                    encoded_image(raw, MAX_SIZE)
                except SampleFault as fault:
                    which = 1 + sum(done.kind == "image" for done in parts)
                    named = f", image {which} of {many}" if many > 1 else ""
                    raise SampleFault(
                        f"message {number} ({message.role}){named}: {fault}"
                    ) from fault
                parts.append(replace(part, image=Image("bytes", raw)))
            else:
                parts.append(part)
        messages.append(replace(message, parts=tuple(parts)))
    return replace(conversation, messages=tuple(messages))


def _read(image: Image, directory: Path, rules: ImageRules) -> bytes:
    value = image.value
    if isinstance(value, bytes):
        raw = value
    elif image.kind == "base64":
        raw = _from_base64(value)
    elif image.kind == "path":
        raw = _from_path(value, directory, rules)
    elif value[:7].lower() == "file://":
        raw = _from_file_uri(value, directory, rules)
    elif value[:7].lower() == "http://" or value[:8].lower() == "https://":
        raw = _fetch(value, rules)
    else:
        raise SampleFault(f"the address {_short(value)} is neither http nor a file; download it")
    if len(raw) > MAX_BYTES:
        raise _too_large()
    if not raw:
        raise SampleFault("an image is empty; replace it")
    return raw


def _too_large() -> SampleFault:
    return SampleFault(f"an image has more than {MAX_BYTES >> 20} MiB; scale it down")


def _from_base64(text: str) -> bytes:
    if len(text) > MAX_BYTES * 3 // 2:
        raise _too_large()
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleFault("an image is not valid base64; encode it again") from error


def _from_file_uri(uri: str, directory: Path, rules: ImageRules) -> bytes:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise SampleFault(f"the address {_short(uri)} is not valid; write a path") from error
    if parts.netloc not in ("", "localhost"):
        raise SampleFault(f"the address {_short(uri)} names another machine; write a path")
    return _from_path(unquote(parts.path), directory, rules)


def _from_path(text: str, directory: Path, rules: ImageRules) -> bytes:
    """The bytes of a file that lies, all links followed, in the data's own directories."""
    bases = (directory, *rules.roots)
    try:
        roots = [base.resolve() for base in bases]
        found = [(base / text).resolve() for base in bases]
        inside = [path for path in found if any(path.is_relative_to(root) for root in roots)]
        if not inside:
            raise SampleFault(
                f"the image path {_short(text)} leads out of the data's directory; put the image "
                "there, or its directory into data.images.roots"
            )
        path = next((path for path in inside if path.exists()), inside[0])
        # What was a link's target a moment ago is opened as no link; a pipe does not block.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SampleFault(f"the image path {_short(text)} is not a file; correct it")
            if status.st_size > MAX_BYTES:
                raise _too_large()
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SampleFault(
            f"no image at {_short(text)}; paths are relative to the data file, or to "
            "data.images.roots"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name too long
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleFault(f"the image {_short(text)} cannot be read ({why}); correct it") from error


def _fetch(url: str, rules: ImageRules) -> bytes:
    if not rules.allow_http:
        raise SampleFault(
            f"the image {_short(url)} would have to be fetched; download it and give its path, or "
            "set data.images.allow_http"
        )
    taken = bytearray()
    try:
        with httpx2.stream("GET", url, follow_redirects=True, timeout=FETCH_S) as response:
            response.raise_for_status()
            for piece in response.iter_bytes():
                taken += piece
                if len(taken) > MAX_BYTES:
                    raise _too_large()
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.CookieConflict, ValueError) as error:
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise SampleFault(
            f"the image {_short(url)} cannot be fetched ({why!a}); download it"
        ) from error
    return bytes(taken)


def _short(text: str) -> str:
    """At most 80 characters, none of which a terminal obeys, and no password of an address."""
    scheme, separator, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    if separator and "@" in host:
        text = f"{scheme}://…@{host.rpartition('@')[2]}{slash}{path}"
    text = ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."
