"""`ms4 descale` of sources that are damaged, lie or mean harm.

Each is refused with exit code 2 and one message that names the file and the tensor; nothing is left
that a later run would trust: with the source mended, the same command ends as if nothing had been.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms4.weights import layouts
from tests.descaling import left_clean, refused
from tests.kill_points import Result, content, ms4
from tests.small_source import Stored, bf16, load, save, shard_of, shards_of, write, write_index

LAYER = "language_model.model.layers.1."
EXPERTS = f"{LAYER}mlp.experts.down_proj"
O_PROJ = f"{LAYER}self_attn.o_proj.weight"
NORM = f"{LAYER}input_layernorm.weight"
SCALE = f"{LAYER}self_attn.o_proj.weight_scale_inv"
NATIVE = "layers.1.experts.2.w3"
STORAGES = ("bf16", "nf4", "fp8")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {layout: write(root / layout, layout) for layout in ("hf", "native")}


@pytest.fixture(scope="module")
def references(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """The right NF4 bases of the sources."""
    made = {}
    for layout, source in sources.items():
        where = tmp_path_factory.mktemp(layout)
        assert ms4(where, "descale", source, "base", "--to", "nf4").code == 0
        made[layout] = content(where / "base")
    return made


@pytest.fixture
def source(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(sources["hf"], tmp_path / "source")


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def descale(where: Path, source: Path, to: str = "nf4") -> Result:
    return ms4(where, "descale", source, "base", "--to", to)


def edit(path: Path, change: Callable[[dict[str, Stored]], object]) -> None:
    """Change the tensors of a file, and not its time stamp."""
    before = path.stat()
    tensors = load(path)
    change(tensors)
    save(tensors, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put(name: str, stored: Stored) -> Callable[[dict[str, Stored]], object]:
    return lambda tensors: tensors.update({name: stored})


def weight_map(source: Path) -> dict[str, Any]:
    layout = layouts.find_layout(source)
    index: dict[str, Any] = json.loads((source / layouts.INDEX[layout]).read_text())["weight_map"]
    return index


def mended(
    where: Path, source: Path, good: Path, reference: dict[str, bytes], to: str = "nf4"
) -> bool:
    """Whether it ends right once the files are the good ones again, time stamps and all."""
    shutil.rmtree(source)
    shutil.copytree(good, source)
    result = descale(where, source, to)
    assert result.code == 0, result.text
    assert content(where / "base") == reference
    return True


# What a damaged disk or a bad transfer does to a shard.

CUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
    "in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "cut short"),
    "to its head": (lambda path: os.truncate(path, 100), "header should be"),
    "to 7 bytes": (lambda path: os.truncate(path, 7), "header should be"),
    "to nothing": (lambda path: os.truncate(path, 0), "header should be"),
    "appended": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "1 bytes at its end"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 50), "header should be"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_shards_of_a_wrong_length(
    where: Path, source: Path, sources: dict[str, Path], references: Any, cut: str
) -> None:
    change, message = CUTS[cut]
    shard = shards_of(source)[1]
    change(shard)
    assert refused(descale(where, source), str(shard), message)
    assert not (where / "base").exists()
    assert mended(where, source, sources["hf"], references["hf"])


@pytest.mark.parametrize("to", STORAGES)
@pytest.mark.parametrize("name", [EXPERTS, O_PROJ])
def test_fp8_codes_that_are_not_a_number(
    where: Path, source: Path, sources: dict[str, Path], references: Any, name: str, to: str
) -> None:
    """One flipped byte, in the last layer: what was made before is kept, and right."""
    shard = shard_of(source, name)
    edit(shard, lambda tensors: tensors[name].bits.__setitem__(-5, 0xFF))
    assert refused(descale(where, source, to), str(shard), name, "not a number")
    assert left_clean(where / "base")
    if to == "nf4":
        assert mended(where, source, sources["hf"], references["hf"])


@pytest.mark.parametrize("to", STORAGES)
def test_native_codes_that_are_not_a_number(
    where: Path, sources: dict[str, Path], tmp_path: Path, to: str
) -> None:
    source = shutil.copytree(sources["native"], tmp_path / "native")
    name = f"{NATIVE}.weight"
    shard = shard_of(source, name)
    edit(shard, lambda tensors: tensors[name].bits.__setitem__(0, 0x7F))
    assert refused(descale(where, source, to), str(shard), name, "not a number")
    assert left_clean(where / "base")


BAD_SCALES = [0.0, -0.0, -1e-3, float("nan"), float("inf"), 1e37]


@pytest.mark.parametrize("value", BAD_SCALES)
def test_scales_that_make_no_sense(
    where: Path, source: Path, sources: dict[str, Path], references: Any, value: float
) -> None:
    name = f"{EXPERTS}_scale_inv"
    shard = shard_of(source, name)
    edit(shard, lambda tensors: tensors[name].bits.view(np.uint16).__setitem__(2, bf16_of(value)))
    assert refused(descale(where, source), str(shard), name, "a scale is zero, negative")
    assert left_clean(where / "base")
    assert mended(where, source, sources["hf"], references["hf"])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_activation_scales_that_no_manifest_can_keep(
    where: Path, source: Path, value: float
) -> None:
    name = f"{EXPERTS}_activation_scale"
    shard = shard_of(source, name)
    edit(shard, lambda tensors: tensors[name].bits.view(np.uint16).__setitem__(0, bf16_of(value)))
    assert refused(descale(where, source), str(shard), name, "infinite or not a number")
    assert left_clean(where / "base")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFF81])
@pytest.mark.parametrize("name", [NORM, "vision_tower.ln_pre.weight"])
def test_bf16_values_that_are_not_a_number(where: Path, source: Path, name: str, bits: int) -> None:
    shard = shard_of(source, name)
    edit(shard, lambda tensors: tensors[name].bits.view(np.uint16).__setitem__(-1, bits))
    assert refused(descale(where, source), str(shard), name, "BF16 values that are not a number")
    assert left_clean(where / "base")


def bf16_of(value: float) -> np.uint16:
    bits: np.uint16 = bf16(np.array([value]))[0]
    return bits


@pytest.mark.parametrize("to", STORAGES)
def test_a_native_scale_that_makes_no_sense(
    where: Path, sources: dict[str, Path], tmp_path: Path, to: str
) -> None:
    source = shutil.copytree(sources["native"], tmp_path / "native")
    name = f"{NATIVE}.qscale_weight"
    shard = shard_of(source, name)
    edit(shard, lambda tensors: tensors[name].bits.fill(0))
    assert refused(descale(where, source, to), str(shard), name, "a scale is zero")
    assert left_clean(where / "base")


def pieces_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def test_flipped_bits_in_a_header(where: Path, source: Path, references: Any) -> None:
    """Each of some: refused, or without effect (a bit of what is not about tensors)."""
    shard = shard_of(source, O_PROJ)
    good = shard.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    dice = np.random.default_rng(0)
    found = 0
    for at, bit in zip(dice.integers(0, end, 40), dice.integers(0, 8, 40), strict=True):
        bad = bytearray(good)
        bad[at] ^= 1 << bit
        shard.write_bytes(bad)
        result = descale(where, source)
        if result.code:
            assert refused(result, str(shard.parent))
            assert not (where / "base").exists()
            found += 1
        else:
            assert pieces_of(content(where / "base")) == pieces_of(references["hf"])
            shutil.rmtree(where / "base")
    assert found > 30


# Other tensors than the model's.


def other(dtype: str, *shape: int) -> Stored:
    size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype] * int(np.prod(shape))
    return Stored(dtype, shape, np.zeros(size, np.uint8))


OTHERS: dict[str, tuple[str, Stored]] = {
    "a norm in F32": (NORM, other("F32", 64)),
    "a weight in BF16": (O_PROJ, other("BF16", 64, 32)),
    "a norm in FP8": (NORM, other("F8_E4M3", 64)),
    "a weight transposed": (O_PROJ, other("F8_E4M3", 32, 64)),
    "a weight of another shape": (O_PROJ, other("F8_E4M3", 64, 31)),
    "a flat weight": (O_PROJ, other("F8_E4M3", 2048)),
    "an expert too few": (EXPERTS, other("F8_E4M3", 3, 64, 32)),
    "scales in F32": (f"{EXPERTS}_scale_inv", other("F32", 4, 1, 1)),
    "flat scales": (f"{EXPERTS}_scale_inv", other("BF16", 4)),
    "one scale": (f"{EXPERTS}_scale_inv", other("BF16")),
    "two scales": (SCALE, other("BF16", 2)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_dtypes_and_shapes(where: Path, source: Path, case: str) -> None:
    name, stored = OTHERS[case]
    shard = shard_of(source, name)
    edit(shard, put(name, stored))
    assert refused(descale(where, source), str(shard), f"{name} is {stored.dtype} [")
    assert not (where / "base").exists()


def test_a_scale_of_one_element_may_have_a_dimension(
    where: Path, source: Path, references: Any
) -> None:
    shard = shard_of(source, SCALE)
    edit(shard, lambda tensors: setattr(tensors[SCALE], "shape", (1,)))
    assert descale(where, source).code == 0
    assert pieces_of(content(where / "base")) == pieces_of(references["hf"])


def without(names: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in names.items() if key != name}


@pytest.mark.parametrize("name", [SCALE, f"{EXPERTS}_activation_scale", O_PROJ, NORM])
def test_tensors_that_are_missing(where: Path, source: Path, name: str) -> None:
    """From the index alone, from the index and the file, from the file alone, without an index."""
    shard, index = shard_of(source, name), weight_map(source)
    write_index(source, "hf", without(index, name))
    assert refused(descale(where, source), str(source), f"1 missing ({name})")
    edit(shard, lambda tensors: tensors.pop(name))
    assert refused(descale(where, source), str(source), f"1 missing ({name})")
    write_index(source, "hf", index)
    assert refused(descale(where, source), str(shard), "index and the file disagree", name)
    (source / layouts.INDEX["hf"]).unlink()
    assert refused(descale(where, source), str(source), f"1 missing ({name})")
    assert not (where / "base").exists()


def test_tensors_that_are_unknown(where: Path, source: Path) -> None:
    name = f"{LAYER}mlp.experts.extra_proj"
    shard, index = shards_of(source)[2], weight_map(source)
    edit(shard, put(name, other("BF16", 2)))
    assert refused(descale(where, source), str(shard), "index and the file disagree", name)
    write_index(source, "hf", index | {name: shard.name})
    assert refused(descale(where, source), f"1 unexpected ({name} in {shard.name})")
    (source / layouts.INDEX["hf"]).unlink()
    assert refused(descale(where, source), f"1 unexpected ({name} in {shard.name})")
    assert not (where / "base").exists()


def test_a_checkpoint_that_is_not_in_fp8(where: Path, source: Path) -> None:
    """In BF16 and without scales, as others publish it: they are named, not guessed."""
    for shard in shards_of(source):
        tensors = {
            name: other("BF16", *stored.shape)
            for name, stored in load(shard).items()
            if "scale" not in name
        }
        save(tensors, shard)
    (source / layouts.INDEX["hf"]).unlink()
    assert refused(descale(where, source), "missing", "_scale", "The FP8 checkpoint is wanted")


# An index that lies.


@pytest.mark.parametrize(
    "file",
    [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.pkl",
        "pytorch_model.bin",
        "x.safetensors\n",
        7,
        None,
        ["model-00001-of-00003.safetensors"],
    ],
)
def test_an_index_that_leads_astray(where: Path, source: Path, file: Any) -> None:
    for path in ("/etc/x.safetensors", "../../x.safetensors"):
        assert not (source / path).exists()
    write_index(source, "hf", weight_map(source) | {O_PROJ: file})
    index = source / layouts.INDEX["hf"]
    assert refused(descale(where, source), str(index), "only plain file names")
    assert not (where / "base").exists()


def test_an_index_that_names_a_file_that_is_missing(where: Path, source: Path) -> None:
    shard = shard_of(source, O_PROJ)
    write_index(source, "hf", weight_map(source) | {O_PROJ: "model-9.safetensors"})
    assert refused(descale(where, source), str(shard), "index and the file disagree", O_PROJ)
    edit(shard, lambda tensors: tensors.pop(O_PROJ))
    assert refused(descale(where, source), str(source), "lacks model-9.safetensors")
    assert not (where / "base").exists()


def test_a_shard_that_is_missing(where: Path, source: Path) -> None:
    shard = shards_of(source)[1]
    shard.unlink()
    assert refused(descale(where, source), str(source), f"lacks {shard.name}")
    assert not (where / "base").exists()


def test_an_index_that_has_a_tensor_elsewhere(where: Path, source: Path) -> None:
    shard = shard_of(source, O_PROJ)
    elsewhere = next(path for path in shards_of(source) if path != shard)
    write_index(source, "hf", weight_map(source) | {O_PROJ: elsewhere.name})
    assert refused(descale(where, source), "index and the file disagree", O_PROJ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map"),
        ('{"metadata": {}}', "has no weight_map"),
    ],
)
def test_an_index_that_is_none(where: Path, source: Path, text: str, message: str) -> None:
    index = source / layouts.INDEX["hf"]
    index.write_bytes(text.encode("latin-1"))
    assert refused(descale(where, source), str(index), message)


def test_one_tensor_in_two_files_and_no_index(where: Path, source: Path) -> None:
    (source / layouts.INDEX["hf"]).unlink()
    shard = shard_of(source, NORM)
    elsewhere = shards_of(source)[-1 if shard != shards_of(source)[-1] else 0]
    edit(elsewhere, put(NORM, load(shard)[NORM]))
    second = max(shard, elsewhere)
    assert refused(descale(where, source), str(second), NORM, "too; remove one")


def test_names_that_are_no_text(where: Path, source: Path) -> None:
    """Half a surrogate pair is JSON, but nothing that a log in UTF-8 holds."""
    index = source / layouts.INDEX["hf"]
    index.write_text('{"weight_map": {"\\ud800\\u001b[2J": "model-00001-of-00003.safetensors"}}')
    result = descale(where, source)
    assert refused(result, "1 unexpected", r"\ud800\x1b[2J")


# Files that are none.


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("change", [pipe, directory, loop])
@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors"])
def test_files_that_are_none(
    where: Path, source: Path, change: Callable[[Path], None], name: str
) -> None:
    change(source / name)
    assert refused(descale(where, source), str(source), name)
    assert not (where / "base").exists()


def test_a_tokenizer_that_is_a_pipe_is_left_out(where: Path, source: Path) -> None:
    pipe(source / "tekken.json")
    assert descale(where, source).code == 0
    assert not (where / "base/tekken.json").exists()


def test_shards_may_be_links(
    where: Path, source: Path, sources: dict[str, Path], references: Any
) -> None:
    """As in the cache of the hub's client."""
    for shard in shards_of(source):
        shard.unlink()
        shard.symlink_to(sources["hf"] / shard.name)
    assert descale(where, source).code == 0
    assert content(where / "base") == references["hf"]
