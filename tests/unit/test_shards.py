"""Safetensors files that are read: headers that lie, files that are none, reading by offset."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms4.errors import Ms4Error
from ms4.weights import shards
from ms4.weights.shards import ITEM_BYTES, Reader, read_header
from tests.examples import examples
from tests.small_source import TABLE, random_bits, save


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(random_bits(), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_reads_what_safetensors_wrote(file: Path) -> None:
    entries = read_header(file)
    theirs = dict(safetensors.deserialize(file.read_bytes()))
    assert entries.keys() == theirs.keys()
    with Reader() as reader:
        for name, stored in random_bits().items():
            assert (entries[name].dtype, entries[name].shape) == TABLE[name]
            assert reader.read(entries[name]).tobytes() == bytes(theirs[name]["data"])
            assert reader.read(entries[name]).tobytes() == stored.bits.tobytes()
        assert reader.read(entries["b.codes"], 5, 7).tobytes() == (
            random_bits()["b.codes"].bits[5:12].tobytes()
        )


def test_many_threads_share_a_reader_and_it_closes_its_files(file: Path) -> None:
    entries, wanted = read_header(file), random_bits()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def right(_: int) -> bool:
        return all(
            reader.read(entries[name]).tobytes() == stored.bits.tobytes()
            for name, stored in wanted.items()
        )

    with Reader() as reader:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(right, range(50)))
        assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_file_that_is_cut_after_its_header_was_read(file: Path) -> None:
    entries = read_header(file)
    os.truncate(file, file.stat().st_size - 1)
    last = max(entries.values(), key=lambda entry: entry.start)
    with Reader() as reader, pytest.raises(Ms4Error, match=f"{last.name}: the file ends within it"):
        reader.read(last)


def test_a_file_that_is_gone_after_its_header_was_read(file: Path) -> None:
    entries = read_header(file)
    file.unlink()
    with Reader() as reader, pytest.raises(Ms4Error, match=r"x\.safetensors: cannot be read"):
        reader.read(entries["a.scale"])


def with_header(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> None:
    """Write a file with any header: a JSON value, or text as it is."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def one(**changes: Any) -> dict[str, Any]:
    """The header of one tensor `a` of 8 bytes."""
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    """The header of two tensors of two BF16 numbers."""
    place = {"dtype": "BF16", "shape": [2]}
    return {"a": place | {"data_offsets": first}, "b": place | {"data_offsets": second}}


GAP = two([0, 2], [4, 8]) | {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
LIES: dict[str, tuple[Any, str]] = {
    "beyond the file": (one(shape=[4], data_offsets=[0, 16]), "a: its data should lie at 0 to 16"),
    "begins beyond": (one(data_offsets=[8, 16]), "a: its data should lie at 8 to 16 of 8"),
    "huge": (one(shape=[2**60], data_offsets=[0, 2**61]), "a: its data should lie"),
    "beyond 64 bits": (one(data_offsets=[0, 2**64 + 8]), "a: its shape or place"),
    "negative": (one(data_offsets=[-8, 0]), "a: its shape or place"),
    "backwards": (one(data_offsets=[8, 0]), "a: its data should lie at 8 to 0"),
    "overlapping": (two([0, 4], [2, 6]), "b: its data overlaps"),
    "the same place": (two([4, 8], [4, 8]), "a: its data leaves a gap"),
    "one twice, one never": (two([0, 4], [0, 4]), "its data overlaps"),
    "a gap": (GAP, "b: its data leaves a gap"),
    "a gap before": (one(shape=[1], data_offsets=[4, 8]), "a: its data leaves a gap"),
    "bytes of nobody": (one(shape=[1], data_offsets=[0, 4]), "4 bytes at its end belong to no"),
    "no tensors at all": ({}, "8 bytes at its end belong to no tensor"),
    "too few bytes": (one(shape=[3]), r"a: 8 bytes cannot hold F32 \[3\]"),
    "too many bytes": (one(shape=[1]), r"a: 8 bytes cannot hold F32 \[1\]"),
    "a product beyond 64 bits": (one(shape=[2**61] * 8), "a: 8 bytes cannot hold"),
    "a negative shape": (one(shape=[-2, -1]), "a: its shape or place"),
    "a shape of many": (one(shape=[1] * 100_000), "a: its shape or place"),
    "a fractional shape": (one(shape=[2.0]), "a: its shape or place"),
    "true as a number": (one(shape=[2, True]), "a: its shape or place"),
    "offsets as text": (one(data_offsets=["0", "8"]), "a: its shape or place"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "a: its shape or place"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "a: its shape or place"),
    "an unknown dtype": (one(dtype="I64", shape=[1]), "a: has the dtype 'I64'"),
    "a dtype that is none": (one(dtype=["F32"]), "a: has the dtype"),
    "a number as description": ({"a": 7}, "a: the header does not describe it"),
    "a list": ([one()], "no table of tensors"),
    "a number": ("7", "no table of tensors"),
    "nothing": ("", "not JSON"),
    "no JSON": ('{"a": ', "not JSON"),
    "no UTF-8": ('{"\ud800": 1}', "not JSON"),
    "nested without end": ("[" * 100_000, "not JSON"),
    "nested in a description": ('{"a":' * 50_000, "not JSON"),
    "a number of many digits": ('{"a": ' + "9" * 10_000 + "}", "not JSON"),
    "not a number": (one(shape=[float("nan")]), "a: its shape or place"),
    "a name twice": (
        '{"a": %s, "a": %s}' % ((json.dumps(one()["a"]),) * 2),
        "a: is twice in the header",
    ),
    "an offset twice": (
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4], "data_offsets": [0, 8]}}',
        "data_offsets: is twice",
    ),
    "a name without end": ({"n" * 10_000: 7}, "n{200}: the header does not describe it"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path: Path, lie: str) -> None:
    header, message = LIES[lie]
    path = tmp_path / "x.safetensors"
    with_header(path, header)
    with pytest.raises(Ms4Error, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 600


def test_the_header_that_the_lies_are_made_of_is_true(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with_header(path, one() | {"__metadata__": {"format": "pt"}})
    assert list(read_header(path)) == ["a"]
    with_header(path, two([4, 8], [0, 4]))
    assert list(read_header(path)) == ["b", "a"]


@pytest.mark.parametrize("size", range(9))
def test_files_of_a_few_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(Ms4Error, match="fetch it again"):
        read_header(path)


@pytest.mark.parametrize("length", [9, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_lie(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    with_header(path, "{}", b"", length)
    with pytest.raises(Ms4Error, match=f"header should be {length} bytes long"):
        read_header(path)


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with_header(path, "{}", b"", shards.MOST_HEADER + 1)
    os.truncate(path, 1 << 40)  # a hole: it takes no space
    with pytest.raises(Ms4Error, match="header should be"):
        read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe among them: opening one waits for a writer, for ever."""
    pipe, directory, loop = (tmp_path / name for name in ("pipe", "directory", "loop"))
    os.mkfifo(pipe)
    directory.mkdir()
    loop.symlink_to("loop")
    with pytest.raises(Ms4Error, match="not a regular file"):
        read_header(pipe)
    with pytest.raises(Ms4Error, match="not a regular file"):
        read_header(directory)
    with pytest.raises(Ms4Error, match="cannot be read"):
        read_header(loop)
    with pytest.raises(Ms4Error, match=r"cannot be read \(No such file"):
        read_header(tmp_path / "none")


def consistent(path: Path) -> None:
    """Fail unless the header is refused, or gives tensors that fill the file exactly."""
    try:
        entries = read_header(path)
    except Ms4Error as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - both ends are right
        return
    size = path.stat().st_size
    for entry in entries.values():
        assert 8 <= entry.start <= entry.start + entry.size <= size
        assert entry.size == ITEM_BYTES[entry.dtype] * int(np.prod(entry.shape, dtype=object))
    places = sorted((entry.start, entry.start + entry.size) for entry in entries.values())
    ends = [end for _, end in places]
    assert [start for start, _ in places[1:]] == ends[:-1]
    with Reader() as reader:
        for entry in entries.values():
            assert reader.read(entry).nbytes == entry.size


MANGLED = settings(
    max_examples=examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANGLED
@given(data=st.data())
def test_mangled_bytes_of_a_header(file: Path, data: st.DataObject) -> None:
    content = bytearray((file.parent / "x.safetensors").read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    places = st.one_of(st.integers(0, 7), st.integers(8, end - 1))
    for at, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        content[at] = byte
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = file.with_name("mangled")
    path.write_bytes(content[:cut])
    consistent(path)


ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 30),
        st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
        st.floats(),
        st.text(max_size=3),
        st.sampled_from(list(ITEM_BYTES)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@MANGLED
@given(data=st.data())
def test_mangled_values_of_a_header(file: Path, data: st.DataObject) -> None:
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*header, "new", "__metadata__"]))
        inside = header.get(name)
        if isinstance(inside, dict) and data.draw(st.booleans()):
            key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
            numbers = st.lists(st.integers(0, 70), max_size=3)
            inside[key] = data.draw(st.one_of(ODD, numbers))
        else:
            header[name] = data.draw(ODD)
    path = file.with_name("mangled")
    with_header(path, header, content[end:])
    consistent(path)
