"""Small FP8 checkpoints of any dimensions in both layouts, of random bytes, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ms4 import spec
from ms4.weights import configs, layouts
from ms4.weights.shards import ITEM_BYTES

DIMS = spec.Dimensions(
    vocabulary=256,
    hidden=64,
    layers=2,
    experts=4,
    experts_per_token=2,
    expert_width=32,
    heads=2,
    q_rank=32,
    kv_rank=16,
    nope=8,
    rope=8,
    value=16,
    vision_hidden=16,
    vision_layers=1,
    vision_heads=2,
    vision_head=8,
    vision_width=16,
    patch=2,
    merge=2,
)
"""A hundred kilobytes."""
KINDS = {"F8_E4M3": "float8_e4m3fn", "BF16": "bfloat16", "F32": "float32", "U8": "uint8"}
"""What safetensors' own writer calls the dtypes."""


@dataclass
class Stored:
    """One tensor as it is stored."""

    dtype: str
    shape: tuple[int, ...]
    bits: np.ndarray[Any, Any]
    """uint8 or uint16, in one dimension."""


def tensors(dims: spec.Dimensions, layout: layouts.Layout, seed: int = 0) -> dict[str, Stored]:
    """All tensors of a checkpoint."""
    dice = np.random.default_rng(seed)
    made = {}
    for name, (dtype, shape) in layouts.expected(dims, layout).items():
        count = math.prod(shape)
        if dtype == "F8_E4M3":
            codes = dice.integers(0, 256, count, dtype=np.uint8)
            bits = np.where(codes & 127 == 127, 0, codes).astype(np.uint8)
        elif "scale" in name:
            bits = bf16(dice.uniform(1e-4, 1e-2, count))
        else:
            bits = bf16(dice.normal(0, 0.1, count))
        made[name] = Stored(dtype, shape, bits)
    return made


TABLE = {
    "b.codes": ("F8_E4M3", (4, 6)),
    "a.weight": ("BF16", (5, 3)),
    "a.scale": ("BF16", ()),
    "c.offset": ("F32", (3,)),
    "c.packed": ("U8", (7,)),
    "empty": ("BF16", (0, 4)),
}
"""Tensors of every dtype and of odd shapes, which are no model."""


def random_bits(seed: int = 0) -> dict[str, Stored]:
    """The tensors of `TABLE`."""
    dice = np.random.default_rng(seed)
    sizes = {n: ITEM_BYTES[dtype] * int(np.prod(shape)) for n, (dtype, shape) in TABLE.items()}
    return {
        name: Stored(*TABLE[name], dice.integers(0, 256, size, dtype=np.uint8))
        for name, size in sizes.items()
    }


def save(some: Mapping[str, Stored], path: Path) -> None:
    """Write a file by safetensors' own writer."""
    specs = {
        name: safetensors.TensorSpec(
            dtype=KINDS[stored.dtype],
            shape=stored.shape,
            data_ptr=stored.bits.ctypes.data,
            data_len=stored.bits.nbytes,
        )
        for name, stored in some.items()
    }
    safetensors.serialize_file(specs, path, metadata={"format": "pt"})


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The bits of numbers cut to BF16."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def load(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by safetensors' own reader."""
    return {
        name: Stored(
            tensor["dtype"], tuple(tensor["shape"]), np.frombuffer(tensor["data"], np.uint8).copy()
        )
        for name, tensor in safetensors.deserialize(path.read_bytes())
    }


def write(
    directory: Path,
    layout: layouts.Layout = "hf",
    dims: spec.Dimensions = DIMS,
    shards: int = 3,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of `shards` files with index, settings and a tokenizer file."""
    directory.mkdir(parents=True)
    everything = tensors(dims, layout, seed)
    names = list(everything)
    each = -(-len(names) // shards)
    stem = "model" if layout == "hf" else "consolidated"
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        some = names[number * each : (number + 1) * each]
        save({name: everything[name] for name in some}, directory / file)
        weight_map |= dict.fromkeys(some, file)
    write_index(directory, layout, weight_map)
    config = configs.hf_config(dims)
    settings = config if layout == "hf" else configs.to_params(config, fp8=True)
    (directory / layouts.SETTINGS[layout]).write_text(json.dumps(settings))
    (directory / "tekken.json").write_text(json.dumps({"vocab": list(range(30_000))}))
    return directory


def write_index(directory: Path, layout: layouts.Layout, weight_map: Mapping[str, Any]) -> None:
    (directory / layouts.INDEX[layout]).write_text(json.dumps({"weight_map": weight_map}))


def shards_of(directory: Path) -> list[Path]:
    """The files of weights."""
    return sorted(directory.glob("*-of-*.safetensors"))


def shard_of(directory: Path, name: str) -> Path:
    """The file that holds a tensor."""
    return next(path for path in shards_of(directory) if name in load(path))
