"""Files that are not what they seem: one clear error each, in time, and never a lost record."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from ms4 import cli
from ms4.data.dataset import run_stage
from ms4.errors import Ms4Error
from tests.unit.damaged import damaged_parquet
from tests.unit.projects import configure, fetch, result, sample, write

pytestmark = pytest.mark.slow


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
    damaged_parquet(path, items, 300)


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


# Names that are not UTF-8, and terminals that know ASCII alone.

ODD = os.fsdecode(b"b\xff\xe9.jsonl")
ASCII = {
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}
STRICT = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}


def ms4(tekken: Path, variables: dict[str, str], *arguments: str) -> str:
    """What `ms4 data` prints."""
    command = [sys.executable, "-m", "ms4", "data", "--tokenizer", str(tekken), *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=True)
    assert done.stderr == b""
    return done.stdout.decode("ascii" if variables is ASCII else "utf-8")


@pytest.mark.parametrize("variables", [ASCII, STRICT])
def test_any_name_on_any_terminal(variables: dict[str, str], small_tekken: Path) -> None:
    for name in (ODD, "ü.jsonl"):
        write(name, sample("a", "ä😀"), "nonsense\n")
    out = ms4(small_tekken, variables, "*.jsonl")
    assert "b\\udcff\\udce9.jsonl:2: not valid JSON" in out
    lines = Path("ms4-data-faults.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["not valid JSON"] * 2
    found = json.loads(ms4(small_tekken, variables, "--json", "*.jsonl"))
    assert ODD in found["files"]
    assert found["samples"] == 2
    assert "sample 1, b\\udcff" in ms4(small_tekken, variables, "--show", "1", "*.jsonl")


def test_preprocess_takes_any_name() -> None:
    write(ODD, sample("a", "b"))
    run_stage(configure(train=["b*.jsonl"], holdout=0))
    assert list(result()["train"]["formats"]) == [ODD]
    assert ODD in result()["inputs"]
    run_stage(configure(train=[ODD], holdout=0))


# What is no file.


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "a pipe, which cannot be read twice; write its content to a file"),
        (_socket, "a socket, which cannot be read twice; write its content to a file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, which cannot be read twice; write"),
        (Path.mkdir, "a directory; name the files in it, by a pattern perhaps"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_what_is_no_file_is_not_read(make: Callable[[Path], object], what: str) -> None:
    make(Path("a.jsonl"))
    for faulty in ("error", "drop"):
        with pytest.raises(Ms4Error, match=re.escape(f"has a fault:\n  a.jsonl: {what}")):
            run_stage(configure(train=["a.jsonl"], faulty=faulty))
    assert cli.main(["data", "--tokenizer", "a.jsonl", "a.jsonl"]) == 2


# What would take quadratic time: each of these took hours.

MANY = 1 << 20
NESTED = "line 1: more than 10,000 brackets inside one another"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.json", "[" * MANY, NESTED),
        ("a.json", "[" * MANY + "]" * MANY, NESTED),
        ("a.json", "[" + '{"a":' * MANY, NESTED),
        ("a.json", "[" + ("[" * 9_998 + "}" * MANY), "ends before its list does"),
        ("a.jsonl", '{"a":' * MANY, "JSON nested too deeply"),
        ("a.jsonl", json.dumps({f"k{n}": 1 for n in range(200_000)})[:-1] + ', "k199999": 2}',
         "the key 'k199999' stands twice"),
        ("a.jsonl", '{"a": ' + "1" * MANY + "}", "not readable as JSON: a number of more than"),
        ("a.json", '[{"a": "' + "\\" * MANY + '1"}]', "no `messages`"),
        ("a.json", "[" + "\n" * MANY + "{}]", "no `messages`"),
    ],
    ids=range(9),
)  # fmt: skip
def test_hostile_json_takes_linear_time(name: str, text: str, fault: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(Ms4Error, match=re.escape(fault)):
        run_stage(configure(train=[name]))


# Files that are named twice, and what `ms4 data` wrote itself.


def test_the_list_of_faults_is_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", sample("a", "b"))
    write("ms4-data-faults.txt", "a.jsonl:7: not valid JSON\n")
    tokenizer = json.loads(Path("weights/source.json").read_text())["directory"] + "/tekken.json"
    names = ["a.jsonl", "ms4-data-faults.txt"]
    for files in (names, ["*[lt]"]):
        assert cli.main(["data", "--json", "--tokenizer", tokenizer, *files]) == 0
        assert list(json.loads(capsys.readouterr().out)["files"]) == ["a.jsonl"]
    assert cli.main(["data", "--tokenizer", tokenizer, "./ms4-data-faults.txt"]) == 2
    assert "is what this command wrote; name data files" in capsys.readouterr().err
    write("ms4-data-faults.txt", "a.jsonl:7: not valid JSON\n")
    with pytest.raises(Ms4Error, match=r"ms4-data-faults.txt: what `ms4 data` wrote about data"):
        run_stage(configure(train=names))


def test_a_file_that_is_named_twice(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", sample("a", "b"))
    Path("b.jsonl").symlink_to("a.jsonl")
    train = ["a.jsonl", "a*", "b.jsonl"]
    lines = [
        "a.jsonl: named 2 times (a.jsonl, a*); taken once",
        "a.jsonl and b.jsonl are one file: its samples are taken 2 times",
    ]
    run_stage(configure(train=train, holdout=0))
    out = capsys.readouterr().out
    tokenizer = json.loads(Path("weights/source.json").read_text())["directory"] + "/tekken.json"
    assert cli.main(["data", "--tokenizer", tokenizer, *train]) == 0
    assert "\n".join(lines) in out
    assert "\n".join(lines) in capsys.readouterr().out


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(Ms4Error, match=r"sets/\*.jsonl: a pattern that no file matches; correct"):
        run_stage(configure(train=["sets/*.jsonl"]))


# What a stage that fails leaves.


def test_a_stage_that_fails_leaves_no_result_of_other_data() -> None:
    write("train.jsonl", sample("a", "b"))
    run_stage(configure())
    assert Path("results/data.json").is_file()
    write("train.jsonl", "nonsense\n")
    with pytest.raises(Ms4Error, match="not valid JSON"):
        run_stage(configure())
    assert not Path("results/data.json").exists()


def test_a_directory_that_cannot_be_written() -> None:
    write("train.jsonl", sample("a", "b"))
    write("data", "a file in the place of the directory")
    with pytest.raises(Ms4Error, match=r"data.*: cannot be written \(.*\); make room, or the proj"):
        run_stage(configure())


def test_no_room(small_tekken: Path) -> None:
    write("train.jsonl", *(sample(f"a {n}", "b " * 100) for n in range(500)))
    write("config.yaml", "data: {train: [train.jsonl]}\n")
    command = f"ulimit -f 8; exec {sys.executable} -m ms4 preprocess --config config.yaml"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (File too large); make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path("data/packed").glob(".*")), "what was written is removed"
    assert not Path("results/data.json").exists()


def test_one_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", ""]) == 2
    assert capsys.readouterr().err.count("ms4 data:") <= 1
