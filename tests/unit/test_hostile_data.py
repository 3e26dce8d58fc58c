"""Files that are not what they seem: one clear error each, in time, and never a lost record."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ms4.data.dataset import run_stage
from ms4.errors import Ms4Error
from tests.unit.projects import configure, fetch


@pytest.fixture(autouse=True)
def project(tmp_path: Path, small_tekken: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project whose weights are fetched; the current directory."""
    monkeypatch.chdir(tmp_path)
    fetch(small_tekken.parent)
    return tmp_path


# Files that cannot be read to their end.


def _cut_gzip(path: Path, items: list[Any]) -> None:
    whole = gzip.compress("".join(json.dumps(item) + "\n" for item in items).encode())
    path.write_bytes(whole[: len(whole) * 2 // 3])


def _cut_zstandard(path: Path, items: list[Any]) -> None:
    text = "".join(json.dumps(item) + "\n" for item in items).encode()
    whole = zstandard.ZstdCompressor().compress(text)
    path.write_bytes(whole[: len(whole) * 2 // 3])


def _damaged_parquet(path: Path, items: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=300, compression="gzip")
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)


def _cut_arrow(path: Path, items: list[Any]) -> None:
    table = pa.Table.from_pylist(items)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    path.write_bytes(path.read_bytes()[:-8])


def _open_quote(path: Path, items: list[Any]) -> None:
    lines = [f"{item['prompt']},{item['completion']}\n" for item in items]
    path.write_text("prompt,completion\n" + "".join([*lines[:9], '"', *lines[9:]]))


def _open_brackets(path: Path, items: list[Any]) -> None:
    path.write_text(json.dumps(items)[:-2])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("a.jsonl.gz", _cut_gzip),
        ("a.jsonl.zst", _cut_zstandard),
        ("a.parquet", _damaged_parquet),
        ("a.arrow", _cut_arrow),
        ("a.csv", _open_quote),
        ("a.json", _open_brackets),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_always_stops(
    name: str, spoil: Callable[[Path, list[Any]], None]
) -> None:
    items = [{"prompt": f"What is {n}?", "completion": f"{n * n}"} for n in range(1000)]
    spoil(Path(name), items)
    with pytest.raises(Ms4Error, match=rf"the data has .*\n  {name}.*: .*;") as caught:
        run_stage(configure(train=[name], faulty="drop"))
    assert str(caught.value).count("\n") <= 2
    assert not Path("results/data.json").exists()
