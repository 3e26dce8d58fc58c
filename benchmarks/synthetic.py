"""A checkpoint of any size in the official HF layout, with random codes: for what needs bulk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from ms4 import spec
from ms4.manifest import write_json
from ms4.weights import configs
from ms4.weights.layouts import INDEX
from ms4.weights.meter import Meter
from ms4.weights.shards import ITEM_BYTES, Piece

POOL = 1 << 26
"""Random bytes that all data are stretches of: made once, to write at the speed of the disk."""
SHARD_LIMIT = 2_000_000_000


def dimensions(layers: int, experts: int = 32) -> spec.Dimensions:
    """The real model with fewer layers, experts and words: 0.82 GB of FP8 a layer of 32 experts."""
    return replace(
        spec.Dimensions(), layers=layers, experts=experts, vocabulary=8192, vision_layers=2
    )


def write_checkpoint(directory: Path, dims: spec.Dimensions, seed: int = 0) -> int:
    """Write it; returns the bytes of its tensors.

    Codes are those of normal weights with the largest on 448, as a real checkpoint's are nearly:
    what is random by the bit has exponents that no weights have, and NaN.
    """
    dice = np.random.default_rng(seed)
    codes = normal_codes(dice)
    halves = (dice.standard_normal(POOL // 2, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    plain = halves.astype(np.uint16).view(np.uint8)
    table = spec.disk_tensors(dims)
    scales = {name for tensor in spec.tensors(dims) for name in tensor.scales()}
    shards = spec.plan_shards(table, SHARD_LIMIT)
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in table.values())
    weight_map = {}
    with Meter("synthetic checkpoint", total) as meter:
        for number, names in enumerate(shards, start=1):
            path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            piece = Piece(path, {name: table[name] for name in names})
            for name in names:
                dtype, shape = table[name]
                size = ITEM_BYTES[dtype] * math.prod(shape)
                if name in scales:
                    value = np.float32(dice.uniform(1e-4, 4e-4)).view(np.uint32) >> 16
                    piece.write(name, 0, np.full(size // 2, value, np.uint16))
                else:
                    pool = codes if dtype == "F8_E4M3" else plain
                    for at in range(0, size, POOL // 2):
                        begin = 2 * int(dice.integers(POOL // 4))
                        piece.write(name, at, pool[begin : begin + min(POOL // 2, size - at)])
                meter.add(size)
            piece.finish()
            weight_map.update(dict.fromkeys(names, path.name))
    write_json(
        directory / INDEX["hf"], {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    write_json(directory / "config.json", configs.hf_config(dims))
    return total


def normal_codes(dice: np.random.Generator) -> np.ndarray:
    """FP8 codes of normal numbers of which 448 is 4.5 standard deviations."""
    magnitudes = np.abs(dice.standard_normal(POOL, dtype=np.float32)) * np.float32(448 / 4.5)
    exponent = np.clip(np.floor(np.log2(np.maximum(magnitudes, 2.0**-9))), -6, 8)
    step = np.exp2(exponent - 3)
    rounded = np.minimum(np.round(magnitudes / step) * step, 448)
    exponent = np.clip(np.floor(np.log2(np.maximum(rounded, 2.0**-9))), -6, 8)
    mantissa = np.round(rounded / np.exp2(exponent - 3)).astype(np.int32)
    # Normal numbers carry an implicit 8 in their mantissa; those below 2**-6 do not.
    bits = np.where(mantissa >= 8, ((exponent.astype(np.int32) + 7) << 3) + mantissa - 8, mantissa)
    signs = dice.integers(0, 2, POOL, dtype=np.uint8) << 7
    return bits.astype(np.uint8) | signs
