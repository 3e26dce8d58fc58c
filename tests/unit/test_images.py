"""Images: where they may come from, what is decoded, and tokens and pixels as mistral-common's."""

from __future__ import annotations

import base64
import io
import os
import random
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image as Pillow
from PIL import ImageOps

from ms4.data import images, preview
from ms4.data.conversation import Conversation, Image, Message, Part, parse_image
from ms4.data.faults import SampleFault
from ms4.data.images import ImageRules, encoded_image, grid_of, open_image, pixels, resolve
from tests.chat_reference import png
from tests.examples import examples

RULES = ImageRules()


def save(image: Pillow.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def mistral_encoder(max_size: int) -> ImageEncoder:
    return ImageEncoder(ImageConfig(14, max_size, 2), SpecialImageIDs(10, 12, 13))


def conversation(*given: Image) -> Conversation:
    parts = tuple(Part("image", image=image) for image in given)
    return Conversation(
        (Message("user", (Part("text", "see"), *parts)), Message("assistant", (Part("text", "b"),)))
    )


def taken(image: Image, data_file: Path, rules: ImageRules = RULES) -> bytes:
    part = resolve(conversation(image), data_file, rules).messages[0].parts[1]
    assert part.image is not None
    assert part.image.kind == "bytes"
    assert isinstance(part.image.value, bytes)
    return part.image.value


def refused(image: Image, data_file: Path, message: str, rules: ImageRules = RULES) -> None:
    with pytest.raises(SampleFault, match=message) as caught:
        resolve(conversation(image), data_file, rules)
    text = str(caught.value)
    assert text.startswith("message 1 (user): ")
    assert ";" in text, "what to do"
    assert text.isprintable()
    assert len(text) < 300


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """A data file with images beside it, and one that is none of its business."""
    home = tmp_path / "data"
    (home / "sub").mkdir(parents=True)
    (home / "a.png").write_bytes(png(40, 30))
    (home / "sub" / "b ü.png").write_bytes(png(30, 40, 1))
    (tmp_path / "secret.png").write_bytes(png(20, 20, 2))
    (tmp_path / "data-other").mkdir()
    (tmp_path / "data-other" / "c.png").write_bytes(png(21, 21, 3))
    return home / "train.jsonl"


# Tokens and pixels.


@settings(deadline=None, max_examples=examples(300))
@given(
    st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    st.integers(28, 1540) | st.just(1540),
)
def test_grids_are_those_of_mistral_common(size: tuple[int, int], max_size: int) -> None:
    class OfSize:
        def __init__(self) -> None:
            self.size = size

    expected = mistral_encoder(max_size)._image_to_num_tokens(OfSize())  # type: ignore[arg-type]
    assert grid_of(size, max_size) == expected


@pytest.mark.parametrize("max_size", [1540, 300, 28])
@pytest.mark.parametrize("size", [(1, 1), (28, 56), (333, 217), (1541, 30), (3, 700), (2000, 1500)])
def test_tokens_and_pixels_are_those_of_mistral_common(
    size: tuple[int, int], max_size: int
) -> None:
    raw = png(*size)
    expected = mistral_encoder(max_size)(ImageChunk(image=Pillow.open(io.BytesIO(raw))))
    image = encoded_image(raw, max_size)
    assert image.size == size
    assert image.tokens == len(expected.tokens)
    columns, rows = image.grid
    assert expected.tokens.count(10) == columns * rows
    made = pixels(raw, max_size)
    assert made.dtype == np.float32
    assert made.shape == (3, rows * 28, columns * 28)
    assert (made == expected.image).all()


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"]


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        *[(mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")],
        *[(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "JPEG") for mode in ("L", "RGB", "CMYK")],
        *[(mode, "WEBP") for mode in ("RGB", "RGBA")],
        *[(mode, "BMP") for mode in ("1", "L", "P", "RGB")],
        *[(mode, "GIF") for mode in ("L", "P", "RGB")],
    ],
)
def test_modes_and_formats_become_what_mistral_common_makes_of_them(mode: str, form: str) -> None:
    image = Pillow.open(io.BytesIO(png(50, 40, 7))).convert(mode)
    raw = save(image, form)
    reopened = Pillow.open(io.BytesIO(raw))
    expected = mistral_encoder(1540)(ImageChunk(image=reopened))
    assert (pixels(raw, 1540) == expected.image).all()


def test_transparent_parts_become_white() -> None:
    clear = Pillow.new("RGBA", (28, 28), (0, 0, 0, 0))
    white = Pillow.new("RGB", (28, 28), "white")
    assert (pixels(save(clear, "PNG"), 1540) == pixels(save(white, "PNG"), 1540)).all()
    palette = Pillow.new("P", (28, 28), 0)
    raw = save(palette, "PNG", transparency=0)
    assert (pixels(raw, 1540) == pixels(save(white, "PNG"), 1540)).all()


def test_sixteen_bits_become_the_upper_eight() -> None:
    values = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    raw = save(Pillow.fromarray(values), "PNG")
    eight = save(Pillow.fromarray((values >> 8).astype(np.uint8)), "PNG")
    assert Pillow.open(io.BytesIO(raw)).mode == "I;16"
    assert (pixels(raw, 1540) == pixels(eight, 1540)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_seen_upright(orientation: int, form: str) -> None:
    image = Pillow.open(io.BytesIO(png(100, 40, 5)))
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    raw = save(image, form, exif=exif)
    stored = Pillow.open(io.BytesIO(raw))
    upright = ImageOps.exif_transpose(stored)
    size = (40, 100) if orientation >= 5 else (100, 40)
    assert upright.size == size
    assert encoded_image(raw, 1540).size == size
    expected = mistral_encoder(1540)(ImageChunk(image=upright))
    assert (pixels(raw, 1540) == expected.image).all()


def test_what_a_smaller_cap_saves() -> None:
    shown = [encoded_image(png(*size), 280) for size in ((560, 280), (100, 100), (560, 560))]
    assert [image.tokens for image in shown] == [5 * 11, 4 * 5, 10 * 11]
    assert [image.tokens_uncapped for image in shown] == [10 * 21, 4 * 5, 20 * 21]


def test_the_cap_of_the_configuration_holds_without_a_tokenizer_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["model.source=tiny", "data.modality=text_vision", "data.images.max_size=280"]
    chat = preview.tokenizer(None, preview.read_settings(["a"], None, settings, None))
    (shown,) = chat.encode(conversation(Image("bytes", png(560, 280))), "none").images
    assert shown.tokens == 5 * 11


# Where images may come from.


def test_paths_are_relative_to_the_data_file(data_file: Path) -> None:
    home = data_file.parent
    for path in ("a.png", "./sub/../a.png", str(home / "a.png"), f"file://{home}/a.png"):
        image = parse_image(path, "here")
        assert taken(image, data_file) == (home / "a.png").read_bytes()
    second = (home / "sub" / "b ü.png").read_bytes()
    for path in (
        "sub/b ü.png",
        f"file://{home}/sub/b%20%C3%BC.png",
        f"FILE://localhost{home}/sub/b%20%C3%BC.png",
    ):
        assert taken(parse_image(path, "here"), data_file) == second
    # In a path that is no address, a percent sign is one.
    (home / "50%20.png").write_bytes(second)
    assert taken(parse_image("50%20.png", "here"), data_file) == second


def test_other_roots_are_opened_only_if_they_are_named(data_file: Path) -> None:
    other = data_file.parent.parent / "data-other"
    rules = ImageRules(roots=(other,))
    raw = (other / "c.png").read_bytes()
    for path in ("c.png", "../data-other/c.png", str(other / "c.png")):
        assert taken(Image("path", path), data_file, rules) == raw
    # A directory whose name begins like the data's is another one.
    refused(Image("path", "../data-other/c.png"), data_file, "leads out of the data's directory")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "sub/../../secret.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "..",
        "~/../../../../etc/passwd",
        "../nothing-here.png",
    ],
)
def test_nothing_outside_is_opened(path: str, data_file: Path) -> None:
    refused(parse_image(path, "here"), data_file, "leads out of the data's directory")


def test_which_of_several_images_is_wrong_is_told(data_file: Path) -> None:
    one, other = Image("path", "a.png"), Image("base64", "bm8gaW1hZ2U=")
    several = conversation(one, other, one)
    with pytest.raises(SampleFault, match=r"^message 1 \(user\), image 2 of 3: an image is of no"):
        resolve(several, data_file, RULES)


def test_links_do_not_lead_outside(data_file: Path) -> None:
    home = data_file.parent
    (home / "link.png").symlink_to(home.parent / "secret.png")
    (home / "directory").symlink_to(home.parent)
    (home / "inside.png").symlink_to(home / "a.png")
    (home / "loop.png").symlink_to(home / "loop.png")
    for path in ("link.png", "directory/secret.png"):
        refused(Image("path", path), data_file, "leads out of the data's directory")
    assert taken(Image("path", "inside.png"), data_file) == (home / "a.png").read_bytes()
    refused(Image("path", "loop.png"), data_file, "cannot be read|no image at")
    # A data file that is reached by a link keeps its own directory as its root.
    (home.parent / "linked").symlink_to(home)
    linked = home.parent / "linked" / "train.jsonl"
    assert taken(Image("path", "a.png"), linked) == (home / "a.png").read_bytes()


def test_what_is_no_file_is_a_fault_and_does_not_block(data_file: Path) -> None:
    home = data_file.parent
    os.mkfifo(home / "pipe.png")
    (home / "empty.png").touch()
    (home / "large.png").write_bytes(b"x")
    os.truncate(home / "large.png", images.MAX_BYTES + 1)
    (home / "shut.png").write_bytes(b"x")
    refused(Image("path", "pipe.png"), data_file, "is not a file")
    refused(Image("path", "sub"), data_file, "is not a file|cannot be read")
    refused(Image("path", "missing.png"), data_file, "no image at 'missing.png'")
    refused(Image("path", "empty.png"), data_file, "an image is empty")
    refused(Image("path", "large.png"), data_file, "more than 64 MiB")
    refused(Image("path", "x" * 5000), data_file, "cannot be read")
    refused(Image("path", "a\0.png"), data_file, "cannot be read")
    refused(Image("path", "\x1b[31mred.png"), data_file, r"no image at '\\x1b\[31mred.png'")
    refused(Image("path", "\ud800.png"), data_file, "cannot be read|no image")


def test_base64_and_data_uris(data_file: Path) -> None:
    raw = png(9, 9)
    text = base64.b64encode(raw).decode()
    broken = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for image in (
        Image("base64", text),
        Image("base64", broken),
        parse_image(f"data:image/png;base64,{text}", "here"),
        parse_image(f"DATA:;BASE64,{text}", "here"),
        parse_image({"base64": f"Data:image/png;base64,{text}"}, "here"),
        parse_image(
            "data:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D"), "here"
        ),
        Image("bytes", raw),
    ):
        assert taken(image, data_file) == raw
    refused(Image("base64", text[:-3] + "!!!"), data_file, "not valid base64")
    refused(Image("base64", text[:-7]), data_file, "not valid base64|damaged")
    for uri in (f"data:image/png;base64{text}", "data:image/png,%00", "data:;base64,"):
        with pytest.raises(SampleFault, match="here: a data URI without `;base64,` and data"):
            parse_image(uri, "here")
    refused(Image("base64", "A" * (images.MAX_BYTES * 2)), data_file, "more than 64 MiB")
    refused(Image("base64", ""), data_file, "an image is empty")
    refused(Image("bytes", bytes(images.MAX_BYTES + 1)), data_file, "more than 64 MiB")


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        elif self.path == "/file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(2000):
                self.wfile.write(bytes(1 << 16))
        elif self.path == "/a.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(12, 8))
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_nothing_is_fetched_unless_that_is_allowed(web: str, data_file: Path) -> None:
    for address in (f"{web}/a.png", f"{web.upper()}/a.png", "https://127.0.0.1:1/a.png"):
        image = parse_image(address, "here")
        refused(image, data_file, r"would have to be fetched.*data\.images\.allow_http")
    assert Handler.asked == []
    refused(parse_image("ftp://127.0.0.1/a.png", "here"), data_file, "neither http nor a file")
    refused(parse_image("file://server/a.png", "here"), data_file, "names another machine")


def test_fetching(web: str, data_file: Path) -> None:
    rules = ImageRules(allow_http=True)
    assert taken(Image("url", f"{web}/a.png"), data_file, rules) == png(12, 8)
    assert taken(Image("url", f"{web}/moved"), data_file, rules) == png(12, 8)
    refused(Image("url", f"{web}/none"), data_file, "cannot be fetched .*404", rules)
    refused(Image("url", f"{web}/file"), data_file, "cannot be fetched", rules)
    refused(Image("url", f"{web}/endless"), data_file, "more than 64 MiB", rules)
    refused(Image("url", "http://127.0.0.1:1/x"), data_file, "cannot be fetched", rules)
    refused(Image("url", "http://[::1/x"), data_file, "cannot be fetched", rules)
    with pytest.raises(SampleFault) as caught:
        resolve(conversation(Image("url", "http://me:word@127.0.0.1:1/x")), data_file, rules)
    assert "word" not in str(caught.value)


# What is decoded.


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says to be so large and holds one line."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (7_072, "an image of 7072 × 7072 pixels, more than the 50,000,000 that are decoded; scale"),
        (10_000, "more than the 50,000,000 that are decoded"),
        # Pillow refuses these before it says how large they are.
        (20_000, "Image size .* exceeds limit"),
        (2**31 - 1, "damaged"),
    ],
)
def test_decompression_bombs_are_not_decoded(side: int, message: str, data_file: Path) -> None:
    refused(Image("bytes", png_of_size(side, side)), data_file, message)


def test_what_is_no_image(data_file: Path) -> None:
    refused(Image("bytes", b"<html>"), data_file, "of no format that is read")
    # Pillow would start Ghostscript for this one.
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    refused(Image("bytes", postscript), data_file, "of no format that is read")
    floats = save(Pillow.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    refused(Image("bytes", floats), data_file, "the mode F; convert it")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_are_faults_and_nothing_else(form: str) -> None:
    """Cut short at any place, or with bytes changed: an image or a fault, never another error."""
    whole = save(Pillow.open(io.BytesIO(png(60, 50, 3))).convert("RGB"), form)
    assert open_image(whole).size == (60, 50)
    dice = random.Random(0)
    cut = [fault_of(whole[: dice.randrange(len(whole))]) for _ in range(150)]
    assert sum(fault is not None for fault in cut) > 140
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            raw[dice.randrange(min(len(raw), dice.choice([64, 512, 10**6])))] = dice.randrange(256)
        fault_of(bytes(raw))


def fault_of(raw: bytes) -> str | None:
    """What is said of a file; None if it is decoded."""
    try:
        image = open_image(raw)
    except SampleFault as fault:
        text = str(fault)
    else:
        assert image.size[0] * image.size[1] <= images.MAX_PIXELS
        return None
    assert text.isprintable()
    assert ";" in text
    return text


def test_text_alone_is_left_as_it_is(data_file: Path) -> None:
    text = Conversation((Message("user", (Part("text", "a"),)),))
    assert resolve(text, data_file, RULES) is text
