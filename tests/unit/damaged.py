"""Files that are damaged in their middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def damaged_parquet(path: Path, items: list[Any], group: int) -> None:
    """Write a Parquet file of so many items a row group, the third of which cannot be unpacked."""
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=group, compression="gzip")
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
