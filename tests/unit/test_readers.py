"""Files: every kind gives the same records; damage is told, and takes no more than it must."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms4.data import json_stream
from ms4.data.faults import SampleFault
from ms4.data.readers import MAX_CELLS, Row, parse_row, read_rows
from ms4.data.sources import Source, expand, local_files
from ms4.errors import Ms4Error
from tests.examples import examples
from tests.unit.damaged import damaged_parquet

Record = dict[str, Any]


def records(count: int = 7) -> list[Record]:
    return [
        {"question": f"Was ist {n}?\n„ß“ 😀", "answer": f'{{"n": [{n}]}}, "so"'}
        for n in range(count)
    ]


def rows(path: Path) -> list[Row]:
    return list(read_rows(Source(str(path), str(path))))


def good(path: Path) -> list[tuple[int | None, Any]]:
    """Lines and records of a file without a fault."""
    return [(row.line, parse_row(row)) for row in rows(path)]


def faults(path: Path) -> list[tuple[int | None, str]]:
    found = []
    for row in rows(path):
        try:
            parse_row(row)
        except SampleFault as fault:
            found.append((row.line, str(fault)))
    return found


# Writers of each kind of file, from records of texts.


def jsonl(items: list[Record]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def json_list(items: list[Record]) -> bytes:
    return json.dumps(items, indent=1).encode()


def json_objects(items: list[Record]) -> bytes:
    return "\n".join(json.dumps(item, indent=2) for item in items).encode()


def table(items: list[Record], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(items[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(items)
    return out.getvalue().encode()


def tsv(items: list[Record]) -> bytes:
    return table(items, "\t")


def parquet(items: list[Record]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), sink, row_group_size=3)
    return sink.getvalue()


def arrow_file(items: list[Record]) -> bytes:
    sink = io.BytesIO()
    whole = pa.Table.from_pylist(items)
    with pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=3)
    return sink.getvalue()


def arrow_stream(items: list[Record]) -> bytes:
    sink = io.BytesIO()
    whole = pa.Table.from_pylist(items)
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=3)
    return sink.getvalue()


def zst(data: bytes) -> bytes:
    half = len(data) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:half]) + compress(data[half:])  # two frames


WRITERS: dict[str, Callable[[list[Record]], bytes]] = {
    "a.jsonl": jsonl,
    "b.ndjson": jsonl,
    "c.json": json_list,
    "d.json": json_objects,
    "e.csv": table,
    "f.tsv": tsv,
    "g.parquet": parquet,
    "h.arrow": arrow_file,
    "i.arrow": arrow_stream,
    "j.jsonl.gz": lambda items: gzip.compress(jsonl(items)),
    "k.json.gz": lambda items: gzip.compress(json_list(items)),
    "l.csv.gz": lambda items: gzip.compress(table(items)),
    "m.jsonl.zst": lambda items: zst(jsonl(items)),
    "n.tsv.zst": lambda items: zst(tsv(items)),
    "o.unknown": jsonl,
    "p.jsonl": lambda items: b"\xef\xbb\xbf" + jsonl(items),
    "q.json": lambda items: b"\xef\xbb\xbf" + json_list(items),
    "r.csv": lambda items: b"\xef\xbb\xbf" + table(items),
    "s": lambda items: gzip.compress(jsonl(items)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[name](records()))
    found = good(path)
    assert [record for _, record in found] == records()
    lines = [line for line, _ in found]
    assert lines == sorted(set(lines), key=lambda line: line or 0)


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    def lines(name: str) -> list[int | None]:
        path = tmp_path / name
        path.write_bytes(WRITERS[name](records(3)))
        return [row.line for row in rows(path)]

    assert lines("a.jsonl") == [1, 2, 3]
    assert lines("c.json") == [2, 6, 10]
    assert lines("d.json") == [1, 5, 9]
    assert lines("e.csv") == [2, 4, 6]  # a question has two lines
    assert lines("g.parquet") == [1, 2, 3]
    (tmp_path / "x.json").write_text('\n\n [\n\n {"a": 1},{"a": 2},\n\n{"a":\n3}]')
    assert [row.line for row in rows(tmp_path / "x.json")] == [5, 5, 7]


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOnce,\n\nupon a time.\n")
    assert good(path) == [(1, {"text": "Once,\n\nupon a time.\n"})]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x"))
    assert good(tmp_path / "b.txt.gz") == [(1, {"text": "x"})]


def test_a_null_in_a_table_is_an_absent_key(tmp_path: Path) -> None:
    items = [
        {"messages": [{"role": "user", "content": "a", "args": {"city": "Ulm"}}]},
        {"messages": [{"role": "user", "content": "b", "args": {"day": 1}, "more": None}]},
    ]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(items))
    del items[1]["messages"][0]["more"]
    assert [record for _, record in good(path)] == items


# What is wrong with a file.


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", "", [(None, "holds no samples; leave it out")]),
        ("a.json", "[]", [(None, "holds no samples; leave it out")]),
        ("a.csv", "a,b\n", [(None, "holds no samples; leave it out")]),
        ("a.csv", "a,a\n1,2\n", [(None, "its first row must name the columns, each differently")]),
        ("a.csv", "a,\n1,2\n", [(None, "its first row must name the columns, each differently")]),
        ("a.csv", "a,b\n1\n2,3\n4,5,6\n", [(2, "1 cell, but the table has 2 columns"),
                                           (4, "3 cells, but the table has 2 columns")]),
        ("a.csv", b"a,\xff\n1,2\n3,4\n", [(1, "not UTF-8; convert the file with `iconv`")]),
        ("a.csv", 'a,"b"x\n1,2\n3,4\n', [(1, "not a row of the table (")]),
        ("a.csv", "a;b\n1;2\n", [(None, "its columns stand between `;`; save it with commas")]),
        ("a.tsv", "a,b\n1,2\n", [(None, "its columns stand between commas; save it with tabs")]),
        ("a.csv", "a\tb\n1\t2\n", [(None, "its columns stand between tabs; save it with comm")]),
        ("a.csv", 'a,b\n"1"x,2\n3,4\n', [(2, "not a row of the table (")]),
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', [(3, "not a row of the table (unexpected end of data")]),
        ("a.csv", b"a,b\n1,2\n\xff,4\n", [(3, "not UTF-8; convert the file with `iconv`")]),
        ("a.txt", b"\xff", [(1, "not UTF-8; convert")]),
        ("a.txt", " ", [(None, "holds no samples")]),
        ("a.jsonl", '{"a": 1}\n{"a": \n', [(2, "not valid JSON: Expecting value")]),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', [(2, "not UTF-8; convert")]),
        ("a.jsonl", "{}".encode("utf-16"), [(None, "UTF-16; convert it to UTF-8 with `iconv -f")]),
        ("a.jsonl", "{}".encode("utf-32"), [(None, "UTF-32; convert it to UTF-8 with `iconv -f")]),
        ("a.json", '[{"a": 1},\n{"a": 2}', [(None, "ends before its list does: it may be")]),
        ("a.json", '[{"a": 1},\n{"a": "x}\n,\n{"a": 3}]', [(2, "not valid JSON")]),
        ("a.json", '[{"a": [1},\n{"a": 2}]', [(1, "not valid JSON")]),
        ("a.json", '[{"a": 1} x {"a": 2}]', [(1, "not valid JSON: Extra data")]),
        ("a.json", '[{"a": 1}]\n nonsense', [(2, "not valid JSON")]),
        ("a.bz2", bz2.compress(b"{}"), [(None, "compressed by bzip2, which is not read; unp")]),
        ("a.jsonl", lzma.compress(b"{}"), [(None, "compressed by xz, which is not read; unpack")]),
        ("a.xlsx", b"PK\x03\x04\n\n\n\n", [(None, "compressed by zip, which is not read; unpack")]),
        ("a.jsonl.gz", "{}", [(None, "named .gz, but is not compressed so; rename it")]),
        ("a.parquet", "PAR1 and no more", [(None, "cannot be read on as a table (")]),
        ("a.parquet", "", [(None, "cannot be read on as a table (")]),
        ("a.arrow", "ARROW1  and no more", [(None, "cannot be read on as a table (")]),
        ("a.arrow", b"\xff\xff\xff\xff1234", [(None, "cannot be read on as a table (")]),
    ],
)  # fmt: skip
def test_faults_of_files(
    name: str, data: bytes | str, expected: list[tuple[int | None, str]], tmp_path: Path
) -> None:
    found = faults(write(tmp_path / name, data))
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, text), (_, start) in zip(found, expected, strict=True):
        assert text.startswith(start)
        assert ";" in text, "says what to do"


def test_what_follows_a_broken_element_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": 1},\n{"a": "x}\n,\n{"a": 3}]')
    assert [row.value for row in rows(path)] == [b'{"a": 1}', b'{"a": "x}', b'{"a": 3}']


@pytest.mark.parametrize("name", ["j.jsonl.gz", "m.jsonl.zst"])
def test_compressed_data_that_is_cut_off(name: str, tmp_path: Path) -> None:
    noise = random.Random(0)
    items = [{"a": "".join(noise.choices("abcdefgh ", k=2000))} for _ in range(200)]
    whole = WRITERS[name](items)
    path = write(tmp_path / name, whole[: len(whole) * 2 // 3])
    found = rows(path)
    assert 50 < len(found) < 200
    assert found[-1].fault is not None
    assert found[-1].fault.startswith(
        "the compressed data ends or is damaged here: what follows is"
    )
    assert found[-1].line == len(found)
    for row, item in zip(found[:-1], items, strict=False):
        assert parse_row(row) == item


def test_a_parquet_file_with_a_damaged_part_counts_what_is_lost(tmp_path: Path) -> None:
    items = [{"a": str(n) * 50} for n in range(400)]
    damaged_parquet(tmp_path / "a.parquet", items, 100)
    found = rows(tmp_path / "a.parquet")
    assert found[-1].fault is not None
    assert "cannot be read on as a table" in found[-1].fault
    assert sum(row.records for row in found) == 400
    assert found[-1].line == len(found)


def test_an_arrow_stream_without_its_end_is_told(tmp_path: Path) -> None:
    whole = arrow_stream(records())
    path = write(tmp_path / "a.arrow", whole[:-8])
    found = rows(path)
    assert len(found) == len(records()) + 1
    assert "the end mark is missing" in (found[-1].fault or "")


def test_a_record_without_end_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "MAX_RECORD", 1000)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    path = write(tmp_path / "a.json", '[{"a": 1},\n' + '{"a": {' * 1000)
    found = faults(path)
    assert [line for line, _ in found] == [None]
    assert found[0][1].startswith("line 2: a record of more than")
    monkeypatch.setattr("ms4.data.readers.MAX_RECORD", 1000)
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 5000 + '"}\n{"a": 2}\n')
    assert [line for line, _ in faults(path)] == [2]
    assert [row.line for row in rows(path)] == [1, 2, 3]
    path = write(tmp_path / "a.csv", "a,b\n1,2\n" + "1," * 1000 + "\n1,2\n")
    assert [(row.line, row.ends) for row in rows(path)] == [(2, False), (3, True)]
    # A row goes over lines, each of them short.
    path = write(tmp_path / "a.csv", "a,b\n1,2\n" + '"x\n",' * 1000 + "\n1,2\n")
    found = faults(path)
    assert [line for line, _ in found] == [3]
    assert found[0][1].startswith("a row of more than 0 MiB: the file is broken; ")
    whole = "".join(f'{n},"{"x" * 300}\n{"y" * 300}"\n' for n in range(5))
    assert [row.fault for row in rows(write(tmp_path / "a.csv", "a,b\n" + whole))] == [None] * 5
    path = write(tmp_path / "a.txt", "x" * 2000)
    assert faults(path)[0][1].startswith("a text of more than")


def test_a_row_of_too_many_cells_is_not_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1,2\n" + "," * (MAX_CELLS + 1) + "\n1,2\n")
    told = "a row of more than 1,000,000 cells: the file is broken; correct it"
    assert faults(path) == [(3, told)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_a_list_is_split_the_same_however_it_is_read(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    text = '[{"a\\\\": "[{\\"x\\","}, [1, [2]], "s,\\n", 3 ,\n{}]\n{"b": 1} {"c": "]"}'
    pieces = list(json_stream.split_values(io.BytesIO(text.encode())))
    assert [json.loads(piece) for _, piece in pieces] == [
        {"a\\": '[{"x",'}, [1, [2]], "s,\n", 3, {}, {"b": 1}, {"c": "]"},
    ]  # fmt: skip
    assert [line for line, _ in pieces] == [1, 1, 1, 1, 2, 3, 3]


# Packages that are not there.


def run_without(package: str, path: Path) -> str:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from ms4.data.readers import read_rows\n"
        "from ms4.data.sources import expand\n"
        "from ms4.errors import Ms4Error\n"
        "try: print(len(list(read_rows(expand([sys.argv[1]])[0]))))\n"
        "except Ms4Error as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_what_a_file_takes_that_is_not_installed(tmp_path: Path) -> None:
    table_file = write(tmp_path / "a.parquet", parquet(records()))
    assert run_without("pyarrow", table_file) == (
        f"{table_file}: reading it takes the package pyarrow, which is not installed: "
        "pip install 'ms4[data]'"
    )
    packed = write(tmp_path / "a.jsonl.zst", zst(jsonl(records())))
    assert run_without("zstandard", packed) == (
        "reading a .zst file takes the package zstandard, which is not installed: "
        "pip install 'ms4[data]'"
    )
    assert run_without("datasets", Path("hub:a/b@main")) == (
        "the hub's data set a/b takes the package datasets, which is not installed: "
        "pip install 'ms4[data]'"
    )
    plain = write(tmp_path / "a.jsonl", jsonl(records()))
    assert run_without("pyarrow", plain) == "7"


# Names.


def test_patterns_are_their_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c.json", "x[1].jsonl", "deep/er/d.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    assert local_files(["[ab].jsonl", "c.json", "a.jsonl"]) == ["a.jsonl", "b.jsonl", "c.json"]
    assert local_files(["x[1].jsonl"]) == ["x[1].jsonl"], "a file's own name comes first"
    assert local_files(["**/*.jsonl"])[-1] == "x[1].jsonl"
    assert "deep/er/d.jsonl" in local_files(["**/*.jsonl"])
    assert local_files([str(tmp_path / "*.json")]) == [str(tmp_path / "c.json")]
    assert local_files(["none*.jsonl", "hub:a/b@main"]) == ["none*.jsonl"]
    assert expand(["none*.jsonl"])[0].entry == "none*.jsonl"
    assert faults(Path("none*.jsonl"))[0][1].startswith("a pattern that no file matches; correct")
    assert [s.entry for s in expand(["[ab].jsonl"])] == ["[ab].jsonl"] * 2


def test_data_sets_of_the_hub() -> None:
    hub = expand(["hub:owner/na.me/sub-set@v1.0/x#train[:10%]"])[0].hub
    assert hub is not None
    assert (hub.id, hub.subset, hub.revision, hub.split) == (
        "owner/na.me", "sub-set", "v1.0/x", "train[:10%]",
    )  # fmt: skip
    plain = expand(["hub:owner/name@abc123"])[0].hub
    assert plain is not None
    assert (plain.subset, plain.split) == (None, "train")


@pytest.mark.parametrize(
    "entry", ["hub:owner/name", "hub:name@main", "hub:", "hub:a/b@", "hub:a/b@-x"]
)
def test_a_data_set_of_the_hub_without_a_revision(entry: str) -> None:
    with pytest.raises(
        Ms4Error, match=r"not a data set of the hub with a revision; write hub:OWNER"
    ):
        expand([entry])


# Damage.


def mangle(data: bytes, draw: st.DataObject) -> bytes:
    """What a disk, an editor or a broken transfer does to a file."""
    mangled = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(mangled)))
        match draw.draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat"])):
            case "cut":
                del mangled[at:]
            case "flip" if at < len(mangled):
                mangled[at] ^= draw.draw(st.integers(1, 255))
            case "insert":
                mangled[at:at] = draw.draw(
                    st.binary(max_size=4)
                    | st.sampled_from([b'"', b"\n", b"{", b"}", b"[", b"]", b",", b"\\", b"\x00"])
                )
            case "remove":
                del mangled[at : at + draw.draw(st.integers(1, 40))]
            case "repeat":
                mangled[at:at] = mangled[at : at + draw.draw(st.integers(1, 40))]
    return bytes(mangled)


def check_mangled(name: str, draw: st.DataObject, directory: Path) -> None:
    """Rows or faults, and a number for each; never anything else."""
    path = directory / name
    path.write_bytes(mangle(WRITERS[name](records()), draw))
    found = rows(path)
    assert found, "not even a fault"
    for row in found:
        assert row.line is None or row.line >= 1
        assert row.records >= 0
        assert (row.fault is None) <= (row.records == 1)
        try:
            parse_row(row)
            text = "fine;"
        except SampleFault as fault:
            text = str(fault)
        assert ";" in text


LINES = ["a.jsonl", "p.jsonl"]


@pytest.mark.parametrize("name", WRITERS)
def test_mangled_files(name: str, tmp_path: Path) -> None:
    @settings(
        deadline=None,
        max_examples=examples(25),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        check_mangled(name, draw, tmp_path)

    run()


@pytest.mark.soak
@pytest.mark.parametrize("name", WRITERS)
def test_mangled_files_soak(name: str, tmp_path: Path) -> None:
    @settings(
        deadline=None,
        max_examples=examples(3000),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.data())
    def run(draw: st.DataObject) -> None:
        check_mangled(name, draw, tmp_path)

    run()


@settings(deadline=None, max_examples=examples(200))
@given(st.data())
def test_no_line_of_mangled_jsonl_is_lost(draw: st.DataObject) -> None:
    """Every line that is not blank is a record or a fault of that line."""
    data = mangle(jsonl(records()), draw)
    first = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    from ms4.data.readers import _is_stream_of_values, _line_rows

    if _is_stream_of_values(first, ".jsonl"):
        return
    wanted = [n for n, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r\x0b\x0c")]
    assert [row.line for row in _line_rows(io.BytesIO(data))] == wanted
