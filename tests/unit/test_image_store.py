"""The store of images: each once, as mistral-common's pixels in BF16, the same for any workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ms4.data.image_store import ImageStore, ImageStoreWriter, to_bf16
from ms4.data.images import encoded_image, pixels
from ms4.errors import Ms4Error
from tests.chat_reference import png

SIZES = [(30, 40), (100, 29), (28, 28), (300, 200), (1, 1)]
RAWS = [png(*size, seed) for seed, size in enumerate(SIZES)]


NAMES = {"pixels", "starts", "grids", "sha256", "document_starts", "document_images"}
DOCUMENTS = [[0, 1], [], [2, 3, 1, 1], [], [4, 0]]
"""Images of each document, by their numbers in `RAWS`."""


def write(path: Path, max_size: int = 200, workers: int = 1) -> None:
    with ImageStoreWriter(path, max_size, workers) as writer:
        for document in DOCUMENTS:
            writer.add_document([encoded_image(RAWS[number], max_size) for number in document])
        counts = writer.finish()
    assert counts == {"distinct": len(RAWS), "bytes": path.stat().st_size}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127)))
def test_bf16_is_rounded_as_torch_does(values: list[float]) -> None:
    given_values = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(given_values).to(torch.bfloat16).view(torch.int16).numpy()
    assert (to_bf16(given_values).view(np.int16) == expected).all()


def test_each_image_once_as_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "packed" / "images.safetensors"
    write(path)
    assert [file.name for file in path.parent.iterdir()] == ["images.safetensors"]
    store = ImageStore(path)
    assert len(store) == len(RAWS)
    assert store.documents == len(DOCUMENTS)
    assert [store.document(number) for number in range(store.documents)] == DOCUMENTS
    for number, raw in enumerate(RAWS):
        expected = torch.from_numpy(pixels(raw, 200)).to(torch.bfloat16)
        stored = torch.from_numpy(np.array(store.pixels(number)).view(np.int16))
        assert (stored.view(torch.bfloat16) == expected).all()
        image = encoded_image(raw, 200)
        assert store.grids[number].tolist() == list(image.grid)
        assert store.sha256[number].tobytes() == image.sha256
        assert not store.pixels(number).flags.owndata, "mapped, not copied"
    # It is a safetensors file like any other.
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == NAMES
        assert file.get_tensor("pixels").dtype == torch.bfloat16
        starts = file.get_tensor("starts").tolist()
        last = file.get_tensor("pixels")[starts[3] : starts[4]].view(3, -1)
        assert last.shape[1] * 3 == store.pixels(3).size


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    write(tmp_path / "one", workers=1)
    write(tmp_path / "three", workers=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()


def test_an_empty_store(tmp_path: Path) -> None:
    with ImageStoreWriter(tmp_path / "s", 1540) as writer:
        assert writer.finish()["distinct"] == 0
    assert len(ImageStore(tmp_path / "s")) == 0
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.get_tensor("starts").tolist() == [0]


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(Ms4Error, match="is missing: run `ms4 preprocess`"):
        ImageStore(tmp_path / "none")
    whole = tmp_path / "whole"
    write(whole)
    for content in (b"", b"junk" * 3000, whole.read_bytes()[:5000]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(Ms4Error, match="damaged or cut short; run `ms4 preprocess` again"):
            ImageStore(tmp_path / "bad")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ImageStoreWriter(tmp_path / "s", 200) as writer:
            writer.add_document([encoded_image(RAWS[0], 200)])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


CHILD = """
import json, sys
from pathlib import Path
from ms4.data.image_store import ImageStoreWriter
from ms4.data.images import encoded_image
raws = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
with ImageStoreWriter(Path(sys.argv[2]), 200) as writer:
    for document in json.loads(sys.argv[3]):
        writer.add_document([encoded_image(raws[number], 200) for number in document])
    writer.finish()
"""


def _kills(tmp_path: Path, count: int) -> None:
    """kill -9 at random moments: all of the store or nothing, and another run gives the same."""
    write(tmp_path / "whole")
    (tmp_path / "raws").mkdir()
    for number, raw in enumerate(RAWS):
        (tmp_path / "raws" / str(number)).write_bytes(raw)
    dice = np.random.default_rng(0)
    killed = 0
    for number in range(count):
        store = tmp_path / str(number) / "store"
        command = [sys.executable, "-c", CHILD, str(tmp_path / "raws"), str(store)]
        command.append(json.dumps(DOCUMENTS))
        child = subprocess.Popen(command)
        # It is killed some time after it has begun to write; importing takes most of its life.
        deadline = time.monotonic() + 60
        while child.poll() is None and not list(store.parent.glob(".*")):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.02) if number else 0)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        if store.exists():
            assert store.read_bytes() == (tmp_path / "whole").read_bytes()
        write(store)
        assert store.read_bytes() == (tmp_path / "whole").read_bytes()
    assert killed


def test_kills(tmp_path: Path) -> None:
    _kills(tmp_path, 2)


@pytest.mark.soak
def test_many_kills(tmp_path: Path) -> None:
    _kills(tmp_path, 40)


def test_without_opencv(tmp_path: Path) -> None:
    """Tokens need none; a store says so before it begins."""
    code = (
        "import sys, json, pathlib; sys.modules['cv2'] = None\n"
        "from ms4.data.image_store import ImageStoreWriter\n"
        "from ms4.data.images import encoded_image\n"
        "from ms4.errors import Ms4Error\n"
        "from tests.chat_reference import png\n"
        "tokens = encoded_image(png(30, 30), 1540).tokens\n"
        "try: ImageStoreWriter(pathlib.Path(sys.argv[1]), 1540)\n"
        "except Ms4Error as error: print(json.dumps([tokens, str(error)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    tokens, message = json.loads(done.stdout)
    assert tokens == 6
    assert "opencv, which is not installed: pip install opencv-python-headless" in message
    assert list(tmp_path.iterdir()) == []
