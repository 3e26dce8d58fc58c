"""What verify says of files that are not what their manifests vouch for, and where it puts what it
finds."""

import json
import shutil

import pytest

from ms4.cli import main, run_stage
from ms4.errors import Ms4Error
from ms4.weights.hub import fetch_directory

from .conftest import settings
from .test_verify import BASE, as_json, edit_json


def flip(path, name=None):
    """Flip the lowest bit of a byte in the middle of a file, or of the first of a tensor's: a
    mantissa bit, so that no code becomes one that is not a number."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    if name is not None:
        begin = 8 + int.from_bytes(data[:8], "little")
        at = begin + json.loads(data[8:begin])[name]["data_offsets"][0]
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def source(project, checkpoint):
    """A source of the project's own, in the place of the one that all tests share."""
    shutil.copytree(checkpoint, project / "published")
    directory = str(project / "published")
    edit_json(project / "weights/source.json", lambda record: record.update(directory=directory))
    return project / "published"


def shard_of(source, tensor):
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return source / index["weight_map"][tensor]


# Not sampled: neither the first nor the last of its kind.
O_PROJ = "language_model.model.layers.2.self_attn.o_proj.weight"


@pytest.mark.parametrize("name", [O_PROJ, None])
def test_a_byte_that_was_flipped_in_the_source_stops_the_stage(project, source, checkpoint, name):
    """A base that was made of it is as wrong as the shard, and agrees with it in everything."""
    path = shard_of(source, O_PROJ)
    flip(path, name)
    with pytest.raises(Ms4Error) as caught:
        run_stage("verify", settings(checkpoint))
    message = str(caught.value)
    assert f"{path}: its content differs from its SHA-256, which `ms4 fetch` recorded" in message
    assert "Put it back as it was, remove the base" in message
    assert f"({BASE} and weights/base.json)" in message
    assert "1 fault:" in message
    assert not (project / "results/verify.json").exists()


def test_the_sources_files_are_counted(project, source, capsys):
    code, found, _ = as_json(capsys, BASE, "--source", source)
    assert (code, found["faults"]) == (0, [])
    files = json.loads((project / "weights/source.json").read_text())["files"]
    assert found["hashed"] == len(files) > 4


def test_a_flipped_byte_outside_a_project(checkpoint, tmp_path, capsys):
    """`ms4 fetch` of a local directory leaves its hashes beside the base."""
    source, work = tmp_path / "published", tmp_path / "work"
    shutil.copytree(checkpoint, source)
    fetch_directory(str(source), work, revision=None, layout="hf", convert="fp8", free=False)
    flip(shard_of(source, O_PROJ), O_PROJ)
    code, found, err = as_json(capsys, work / "fp8", "--source", source)
    assert code == 2
    assert found["hashed"] > 4
    assert any("which `ms4 fetch` recorded" in fault for fault in found["faults"])
    assert f"remove the base that was made of it ({work / 'fp8'})" in err

    # A copy of it at another place is nobody's record.
    shutil.copytree(source, tmp_path / "copy")
    _, found, _ = as_json(capsys, work / "fp8", "--source", tmp_path / "copy")
    assert found["hashed"] == 0
    assert any("no manifest of `ms4 fetch` says what its files were" in n for n in found["notes"])


def test_a_manifest_in_the_source_itself(project, source, capsys):
    """As `ms4 fetch REPO DIR` leaves it; a shard of another length is named as well."""
    shutil.move(project / "weights/source.json", source / "source.json")
    edit_json(source / "source.json", lambda m: m.update(directory=".", origin="hub"))
    path = shard_of(source, O_PROJ)
    path.write_bytes(path.read_bytes() + b"x")
    code, found, err = as_json(capsys, BASE, "--source", source)
    assert code == 2
    assert any(f"{path}: has " in f and "`ms4 fetch` recorded" in f for f in found["faults"])
    assert "Remove it, remove the base" in err


def test_what_was_freed_is_nothing_to_hash(project, source, capsys):
    def free(record):
        gone = [e for e in record["files"] if e["path"].endswith(".safetensors")]
        record["files"] = [entry for entry in record["files"] if entry not in gone]
        record["freed"] = [{**entry, "pieces": ["base/layer-00.safetensors"]} for entry in gone]

    edit_json(project / "weights/source.json", free)
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    code, found, _ = as_json(capsys, BASE)
    assert (code, found["faults"], found["scanned"]) == (0, [], 0)
    flip(source / "tekken.json")  # what stayed is still what it was, or not
    code, found, _ = as_json(capsys, BASE)
    assert code == 2
    assert "tekken.json: its content differs" in found["faults"][0]


def test_a_flipped_byte_of_the_base(project, capsys):
    path = project / BASE / "layer-02.safetensors"
    flip(path)
    assert main(["verify", BASE]) == 2
    _, err = capsys.readouterr()
    assert f"{BASE}/layer-02.safetensors: its content differs from its SHA-256" in err


def test_the_findings_go_to_a_file(project, tmp_path, capsys):
    """Beside the table or the JSON on the screen; of a base with faults too."""
    file = tmp_path / "new/findings.json"
    assert main(["verify", BASE, "--output", str(file)]) == 0
    assert "4 files scanned" in capsys.readouterr().out
    written = json.loads(file.read_text())
    code, found, _ = as_json(capsys, BASE, "--output", file)
    assert (code, written) == (0, found)
    assert file.read_text().endswith("}\n")
    assert [path.name for path in file.parent.iterdir()] == ["findings.json"]
    flip(project / BASE / "layer-02.safetensors")
    code, found, _ = as_json(capsys, BASE, "--output", file)
    assert code == 2
    assert len(json.loads(file.read_text())["faults"]) == len(found["faults"]) == 1


def held(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("weights", "weights: is a directory; give the name of a new file"),
        (f"{BASE}/config.json", "config.json: belongs to what is to be verified"),
        (f"{BASE}/new.json", "new.json: belongs to what is to be verified"),
        ("weights/base.json", "base.json: belongs to what is to be verified"),
        ("published/config.json", "config.json: belongs to what is to be verified"),
        ("file/findings.json", "cannot be written ("),
        ("file/new/findings.json", "cannot be written ("),
    ],
)
def test_a_place_for_the_findings_that_is_none(project, source, capsys, output, message):
    (project / "file").touch()
    before = held(project)
    assert main(["verify", BASE, "--output", output]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out  # before anything was looked at
    assert held(project) == before


def test_the_stage_has_its_own_file(project, capsys):
    assert main(["verify", "--output", "findings.json"]) == 2
    assert "lacks target: ms4 verify TARGET" in capsys.readouterr().err
