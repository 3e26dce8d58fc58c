"""What writers make: threads, failures, what a kill leaves, and inputs that do not fit; the kernels
that they code with."""

import json
import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ms4 import lock
from ms4.errors import Ms4Error
from ms4.weights import fp8, writers
from ms4.weights.base import Base
from ms4.weights.layouts import Source, find_layout
from tests import small_source

from . import by_hand

GATE_UP = by_hand.TEXT + "layers.1.mlp.experts.gate_up_proj"
DOWN = by_hand.TEXT + "layers.1.mlp.experts.down_proj"
O_PROJ = by_hand.TEXT + "layers.0.self_attn.o_proj.weight"


@pytest.fixture
def source(tmp_path):
    """A small checkpoint of random codes in the HF layout."""
    return small_source.write(tmp_path / "source", "hf")


# Kernels.


def nearest(values, scale):
    """The codes of the nearest of all FP8 values, ties to the even code, by trying all."""
    grid = torch.arange(256, dtype=torch.uint8).view(fp8.FP8).double()[:127]  # 0 to 448
    distance = (values.abs().double() / scale)[:, None].clamp(max=448.0) - grid
    order = distance.abs() + (torch.arange(127) % 2) * 1e-12  # odd codes lose a tie
    return (order.argmin(dim=1) + 128 * torch.signbit(values)).to(torch.uint8).numpy()


@pytest.mark.parametrize("scale", [2.0**-9, 1.0390625e-3, 0.0078125, 0.7109375, 3.0])
def test_encode_takes_the_nearest_code(scale):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    finite = values.isfinite() & (values.abs() < 1000 * scale)
    some = bits[finite.numpy()]
    assert np.array_equal(fp8.encode(some, scale), nearest(values[finite], scale))
    largest = np.array([0x7F7F, 0xFF7F], np.uint16)
    assert fp8.encode(largest, scale).tolist() == [126, 254]


@pytest.mark.parametrize(("before", "after"), [(0.5, 1.0), (0.001953125, 0.0021209717), (1, 64)])
def test_rescale_takes_the_nearest_code(before, after):
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    values = torch.from_numpy(codes).view(fp8.FP8).double() * before
    assert np.array_equal(fp8.rescale(codes, before, after), nearest(values, after))


# The files.


def test_the_number_of_threads_does_not_matter(source, tmp_path):
    with Base(by_hand.based(source)) as base:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            writers.write_fp8(base, tmp_path / str(threads), limit=30_000)
    names = by_hand.file_names(tmp_path / "1")
    assert len(names) > 6
    by_hand.assert_same_files(tmp_path / "1", tmp_path / "5", names)


def writes(base, source):
    return {
        "bf16": lambda target: writers.write_bf16(base, target),
        "fp8": lambda target: writers.write_fp8(base, target, source),
        "native": lambda target: writers.write_native(source, target),
    }


@contextmanager
def file_size_limit(size):
    """No file of this process may grow beyond it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "native"])
def test_a_write_that_fails_leaves_no_checkpoint_and_may_be_repeated(source, tmp_path, kind):
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        write = writes(base, origin)[kind]
        with file_size_limit(50_000), pytest.raises(Ms4Error, match="limit is reached"):
            write(tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.json"))
        assert not list((tmp_path / "out").glob(".*"))
        with pytest.raises(Ms4Error, match="holds no weights"):
            find_layout(tmp_path / "out")
        # What a kill leaves: a part under its temporary name, files that were whole.
        (tmp_path / "out/.model-00001-of-00001.safetensors.tmp").write_bytes(b"x")
        (tmp_path / "out/tekken.json").write_bytes(b"x")
        write(tmp_path / "out")
        write(tmp_path / "fresh")
    names = by_hand.file_names(tmp_path / "fresh")
    assert by_hand.file_names(tmp_path / "out") == names
    by_hand.assert_same_files(tmp_path / "out", tmp_path / "fresh", names)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "native"])
def test_index_and_settings_come_last(source, tmp_path, kind):
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        writes(base, origin)[kind](tmp_path / "out")
    out = tmp_path / "out"
    when = {name: (out / name).stat().st_mtime_ns for name in by_hand.file_names(out)}
    order = sorted(when, key=when.__getitem__)
    settings = "params.json" if kind == "native" else "config.json"
    assert order[-1] == settings
    assert order[-2].endswith(".index.json")


@pytest.mark.parametrize("kind", ["fp8", "native"])
def test_a_source_that_changes_meanwhile_gives_no_checkpoint(source, tmp_path, kind):
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        os.utime(sorted(source.glob("*.safetensors"))[0], ns=(1, 1))
        with pytest.raises(Ms4Error, match="changed while it was read"):
            writes(base, origin)[kind](tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model.safetensors"])
def test_a_target_with_something_in_it_is_left_alone(source, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        for write in writes(base, origin).values():
            with pytest.raises(Ms4Error, match=f"not empty.*{name}.*new or an empty"):
                write(tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("kind", ["bf16", "fp8", "native"])
def test_a_target_that_another_process_writes_is_left_alone(source, tmp_path, kind):
    """The lock is that of `descale`, which may be what is at work there."""
    out = tmp_path / "out"
    out.mkdir()
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        write = writes(base, origin)[kind]
        with (
            lock.hold("descale", out / lock.LOCKS),
            pytest.raises(Ms4Error, match=r"is at work in .*out; two writers would destroy"),
        ):
            write(out)
        assert by_hand.file_names(out) == []
        write(out)
    assert by_hand.file_names(out)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "native"])
def test_a_target_is_locked_while_it_is_written(source, tmp_path, kind, monkeypatch):
    """Until the last file stands."""
    out, held = tmp_path / "out", []
    write_json = writers.write_json

    def look(path, value):
        held.append(lock.read_owner(out / lock.LOCKS / "descale.owner"))
        write_json(path, value)

    monkeypatch.setattr(writers, "write_json", look)
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        writes(base, origin)[kind](out)
    assert [owner.pid for owner in held] == [os.getpid()] * 2
    assert not list((out / lock.LOCKS).glob("*.owner"))


# What does not belong together.


def test_another_checkpoint_as_source_is_refused(source, tmp_path):
    directory = by_hand.based(source)
    other = shutil.copytree(source, tmp_path / "other")
    by_hand.edit(
        other, lambda held: held[GATE_UP + "_scale_inv"].mul_(2) if GATE_UP in held else None
    )
    wider = small_source.write(tmp_path / "wider", "hf", replace(small_source.DIMS, experts=8))
    with Base(directory) as base:
        with Source(other) as wrong, pytest.raises(Ms4Error, match="gate_up_proj: its scales are"):
            writers.write_fp8(base, tmp_path / "out", wrong)
        with Source(wider) as wrong, pytest.raises(Ms4Error, match="another model than"):
            writers.write_fp8(base, tmp_path / "out", wrong)


def test_a_source_that_lacks_a_shard_is_refused(source, tmp_path):
    directory = by_hand.based(source)
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    with Base(directory) as base, Source(source) as partial:
        for write in (
            lambda: writers.write_fp8(base, tmp_path / "out", partial),
            lambda: writers.write_native(partial, tmp_path / "out"),
        ):
            with pytest.raises(Ms4Error, match=f"lacks {shard.name}"):
                write()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("source_scales"), "lacks scales"),
        (lambda m: m["source_scales"].pop(GATE_UP + "_scale_inv"), "lacks scales of .*gate_up"),
        (lambda m: m["source_scales"].update({DOWN + "_scale_inv": [1.0]}), "lacks scales of"),
        (lambda m: m.update(experts="int3"), "in 'int3', not in one of bf16, nf4, fp8"),
        (lambda m: m.update(stage="fetch"), "not a manifest of the stage descale"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(source, tmp_path, change, message):
    directory = by_hand.based(source)
    manifest = json.loads((directory / "base.json").read_text())
    change(manifest)
    (directory / "base.json").write_text(json.dumps(manifest))
    with pytest.raises(Ms4Error, match=message), Base(directory) as base:
        writers.write_fp8(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.update({O_PROJ: held[O_PROJ].half()}), "o_proj.weight is F16"),
        (lambda held: held.update({O_PROJ: held[O_PROJ].T.contiguous()}), "o_proj.weight is BF16"),
        (lambda held: held.update({"other": held.pop(O_PROJ)}), "o_proj.weight is missing"),
    ],
)
def test_a_base_of_other_tensors_is_refused(source, change, message):
    directory = by_hand.based(source)
    path = directory / "layer-00.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = json.loads((directory / "base.json").read_text())
    for entry in manifest["files"]:
        entry["size"] = (directory / entry["path"]).stat().st_size
    (directory / "base.json").write_text(json.dumps(manifest))
    with pytest.raises(Ms4Error, match=message):
        Base(directory)
