"""A checkpoint in one of its two layouts, read as the table of `ms4.spec` has it.

The HF layout stacks the experts and puts gate over up; Mistral's native layout keeps each expert's
matrices apart, each with a scale of its own, and orders the rows of the vision tower's q and k by
interleaved pairs. Whatever the layout, a parameter is a row of segments: stretches of bytes in a
file that belong to one place of the HF tensor and have one scale.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import configs
from ms4.weights.shards import ITEM_BYTES, Bytes, Entry, Reader, read_header, readable

Layout = Literal["hf", "native"]
INDEX: Mapping[Layout, str] = {
    "hf": "model.safetensors.index.json",
    "native": "consolidated.safetensors.index.json",
}
SETTINGS: Mapping[Layout, str] = {"hf": "config.json", "native": "params.json"}
_LONE: Mapping[Layout, str] = {"hf": "model*.safetensors", "native": "consolidated*.safetensors"}
"""Files of weights where there is no index."""
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_NAMED = 5
"""Tensors that one error names."""
_MOST_TENSORS = 1 << 20
"""Tensors of a checkpoint, at most: 25 times those of this model. Settings that ask for more are
damaged, and their table would fill the memory before it could be compared."""
MOST_SCALE = 3.3895e38 / 448
"""The largest number of BF16 over that of FP8: beyond, products are infinite."""


@dataclass(frozen=True)
class Segment:
    """A stretch of one parameter."""

    entry: Entry
    """The stored tensor that holds it."""
    offset: int
    """Where it begins there, in elements."""
    at: int
    """Where it begins in the HF tensor, in elements."""
    count: int
    """Elements."""
    scale: float
    """Of its FP8 codes; 1 where it is in BF16."""


def shard_names(path: Path) -> dict[str, str]:
    """Tensor → file of the index at `path`.

    Raises:
        Ms4Error: it is no index, or names something else than safetensors files beside it.
    """
    files = _read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise Ms4Error(f"{path}: has no weight_map; it is not the index of a checkpoint.")
    # A name is opened, and written when it comes from a hub: it must not lead out of the directory,
    # and no format but safetensors is read, as others can run code.
    if bad := sorted({str(name) for name in files.values() if not _plain(name)}):
        listing = ", ".join(repr(name[:80]) for name in bad[:_NAMED])
        raise Ms4Error(
            f"{path}: names {listing} as a shard; only plain file names that end in .safetensors "
            "are accepted. Use another source."
        )
    return dict(files)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe, say, would never end
        raise Ms4Error(f"{path}: cannot be read (no such file).")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Ms4Error(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise Ms4Error(
            f"{path}: is not valid JSON; the source is damaged. Fetch it again, or use another."
        ) from error
    if not isinstance(value, dict):
        raise Ms4Error(f"{path}: does not hold a JSON object; the source is damaged.")
    return value


def _plain(name: Any) -> bool:
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def find_layout(directory: Path, preferred: Layout = "hf") -> Layout:
    """Which layout a directory holds; the preferred one if it holds both.

    An index is enough: the weights may be on their way, or freed.

    Raises:
        Ms4Error: neither.
    """
    if not directory.is_dir():
        fault = "is not a directory" if directory.exists() else "no such directory"
        raise Ms4Error(f"{directory}: {fault}; give one that holds the weights.")
    for layout in sorted(INDEX, key=lambda layout: layout != preferred):
        here = (directory / INDEX[layout]).is_file() or any(directory.glob(_LONE[layout]))
        if here and (directory / SETTINGS[layout]).is_file():
            return layout
    raise Ms4Error(
        f"{directory}: holds no weights of this model: neither {SETTINGS['hf']} with "
        f"model*.safetensors nor {SETTINGS['native']} with consolidated*.safetensors."
    )


def read_settings(directory: Path, layout: Layout) -> dict[str, Any]:
    """The `config.json` of a checkpoint, made from `params.json` in the native layout.

    Raises:
        Ms4Error: it is missing, unreadable or of another model.
    """
    path = directory / SETTINGS[layout]
    settings = _read_object(path)
    made = configs.from_params(settings, str(path)) if layout == "native" else settings
    _check_sizes(spec.dimensions_from_config(made, str(path)), str(path), layout)
    configs.check_rotary(made, str(path))
    return made


def read_dimensions(directory: Path, layout: Layout | None = None) -> spec.Dimensions:
    """The dimensions of the checkpoint in a directory, in the layout that it holds or in this one.

    Raises:
        Ms4Error: its settings are missing, unreadable or of another model.
    """
    layout = layout or find_layout(directory)
    where = str(directory / SETTINGS[layout])
    return spec.dimensions_from_config(read_settings(directory, layout), where)


def _check_sizes(dims: spec.Dimensions, where: str, layout: Layout) -> None:
    # In the native layout three matrices of each expert, each with two scales.
    count = 9 * dims.layers * dims.experts
    if layout == "native" and count > _MOST_TENSORS:
        raise Ms4Error(
            f"{where}: {dims.layers} layers of {dims.experts} experts are {count} tensors and "
            "more; give the settings that belong to the weights."
        )
    if dims.vision_head % 2:
        raise Ms4Error(
            f"{where}: the heads of the vision tower have {dims.vision_head} elements, which are "
            "no pairs to rotate; give the settings that belong to the weights."
        )


def native_names(tensor: spec.Tensor) -> Iterator[str]:
    """The native tensors that a parameter comes from, in the order of its data: for the experts
    one each, or gate and up of each."""
    if tensor.transform == "stack_gate_up":
        for expert in range(tensor.shape[0]):
            for w in ("w1", "w3"):
                yield tensor.native.format(E=expert, w=w)
    elif tensor.transform == "stack_experts":
        for expert in range(tensor.shape[0]):
            yield tensor.native.format(E=expert)
    else:
        yield tensor.native


def native_scales(name: str) -> tuple[str, str]:
    """Names of the weight's and the activation's scale beside a native FP8 tensor."""
    stem = name.removesuffix(".weight")
    return f"{stem}.qscale_weight", f"{stem}.qscale_act"


def matrix_scales(
    tensor: spec.Tensor, layout: Layout, numbers: Callable[[str], list[float]]
) -> tuple[list[float], list[float]]:
    """Scales of an FP8 parameter's weights and of its activations, one each a native matrix: gate
    and up of an expert have the same in the HF layout.

    Args:
        tensor: the parameter.
        layout: whose names `numbers` knows.
        numbers: gives the values of a scale by its name.
    """
    matrices = list(native_names(tensor))
    if layout == "native":
        pairs = [native_scales(name) for name in matrices]
        return [numbers(weight)[0] for weight, _ in pairs], [numbers(act)[0] for _, act in pairs]
    weights, acts = (numbers(name) for name in tensor.scales())
    each = len(matrices) // len(weights)
    return [w for w in weights for _ in range(each)], [a for a in acts for _ in range(each)]


def part_shape(tensor: spec.Tensor) -> tuple[int, ...]:
    """Shape of each of a parameter's native tensors."""
    if tensor.transform == "stack_gate_up":
        return (tensor.shape[1] // 2, tensor.shape[2])
    return tensor.shape[1:] if tensor.transform == "stack_experts" else tensor.shape


def rope_order(dims: spec.Dimensions) -> npt.NDArray[np.intp]:
    """Row of the native vision q or k that each row of the HF one is: interleaved pairs (0 1 0 1 …)
    become halves (0 0 … 1 1 …), head by head."""
    rows = np.arange(dims.vision_heads * dims.vision_head)
    return rows.reshape(dims.vision_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def expected(dims: spec.Dimensions, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the FP8 checkpoint in a layout: name → (dtype, shape), scales included."""
    if layout == "hf":
        return spec.disk_tensors(dims)
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in spec.tensors(dims):
        for name in native_names(tensor):
            table[name] = (tensor.dtype, part_shape(tensor))
            if tensor.dtype == "F8_E4M3":
                table.update(dict.fromkeys(native_scales(name), ("BF16", ())))
    return table


class Source:
    """The tensors of an FP8 checkpoint. A context: it keeps its files open.

    Some files may be absent (they are still being fetched, or were freed): what needs them must not
    be asked for.
    """

    def __init__(self, directory: Path, layout: Layout | None = None) -> None:
        """Open the checkpoint in `directory`, in the layout that it holds, or in this one.

        Raises:
            Ms4Error: it is not exactly this model in FP8 with its scales; says what differs.
        """
        self.directory = directory
        self.layout = layout or find_layout(directory)
        self.config = read_settings(directory, self.layout)
        self.dims = spec.dimensions_from_config(self.config, str(directory / SETTINGS[self.layout]))
        self.reader = Reader()
        self.entries: dict[str, Entry] = {}
        self.files = self._files()
        self._expected = expected(self.dims, self.layout)
        self._check_names()
        self._open: set[str] = set()
        self._stamps: dict[Path, tuple[int, int]] = {}
        self.refresh()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.__exit__()

    def _files(self) -> dict[str, str]:
        index = self.directory / INDEX[self.layout]
        if index.is_file():
            return shard_names(index)
        found: dict[str, str] = {}
        for path in sorted(self.directory.glob(_LONE[self.layout])):
            for name in read_header(path):
                if name in found:
                    raise Ms4Error(f"{path}: {name} is in {found[name]} too; remove one of them.")
                found[name] = path.name
        return found

    def _check_names(self) -> None:
        missing = sorted(self._expected.keys() - self.files.keys())
        extra = [
            f"{name[:200]} in {self.files[name]}"
            for name in sorted(self.files.keys() - self._expected.keys())
        ]
        if missing or extra:
            raise Ms4Error(
                f"{self.directory}: not the tensors of this model: "
                f"{len(missing)} missing ({', '.join(missing[:_NAMED]) or 'none'}), "
                f"{len(extra)} unexpected ({', '.join(extra[:_NAMED]) or 'none'}). "
                "The FP8 checkpoint is wanted, scales included."
            )

    def refresh(self) -> None:
        """Read the headers of the files that have come since.

        Raises:
            Ms4Error: a header is not true, or a tensor is not what it should be.
        """
        for file in sorted(set(self.files.values()) - self._open):
            path = self.directory / file
            if not path.exists():
                continue
            self._stamps[path] = _stamp(path)
            found = read_header(path)
            wanted = {name for name, where in self.files.items() if where == file}
            if faults := [*sorted(wanted - found.keys()), *sorted(found.keys() - wanted)]:
                raise Ms4Error(
                    f"{path}: the index and the file disagree about {len(faults)} tensors "
                    f"({', '.join(faults[:_NAMED])}); fetch both again."
                )
            for name, entry in found.items():
                dtype, shape = self._expected[name]
                if entry.dtype != dtype or not _same_shape(entry.shape, shape):
                    raise Ms4Error(
                        f"{path}: {name} is {entry.dtype} {list(entry.shape)}, not {dtype} "
                        f"{list(shape)}."
                    )
            self.entries |= found
            self._open.add(file)

    def forget(self, file: str) -> None:
        """Let go of a file that is about to be removed: its space is free once nobody reads it."""
        path = self.directory / file
        self.entries = {n: entry for n, entry in self.entries.items() if entry.path != path}
        self._open.discard(file)
        self._stamps.pop(path, None)
        self.reader.close(path)

    def check_unchanged(self) -> None:
        """Check that the files are those whose headers were read; one that is gone by now was.

        Raises:
            Ms4Error: one was written or replaced meanwhile.
        """
        for path, stamp in self._stamps.items():
            if path.exists() and _stamp(path) != stamp:
                raise Ms4Error(
                    f"{path}: changed while it was read; wait until nothing writes it, and run "
                    "again."
                )

    def stored(self, tensor: spec.Tensor) -> list[str]:
        """Names of all that is stored of a parameter: its data, then their scales."""
        if self.layout == "hf":
            return [tensor.disk, *tensor.scales()]
        names = list(native_names(tensor))
        if tensor.dtype != "F8_E4M3":
            return names
        return names + [scale for name in names for scale in native_scales(name)]

    def needs(self, tensors: Sequence[spec.Tensor]) -> set[str]:
        """The files that parameters are stored in."""
        return {self.files[name] for tensor in tensors for name in self.stored(tensor)}

    def is_here(self, tensors: Sequence[spec.Tensor]) -> bool:
        """Whether all of these parameters can be read."""
        return self.needs(tensors) <= self._open

    def check_here(self) -> None:
        """Check that no file is absent.

        Raises:
            Ms4Error: some are; names them.
        """
        if missing := sorted(set(self.files.values()) - self._open):
            raise Ms4Error(f"{self.directory}: lacks {', '.join(missing)}, which the index names.")

    def numbers(self, name: str) -> list[float]:
        """The values of a BF16 tensor, a scale; exact."""
        bits = self.reader.read(self.entries[name]).view(np.uint16).astype(np.uint32) << 16
        return [float(value) for value in bits.view(np.float32)]

    def weight_scales(self, tensor: spec.Tensor) -> list[float]:
        """The scales of a parameter's data, one a stored matrix, checked.

        Raises:
            Ms4Error: a scale is zero, negative, not a number or too large.
        """
        if self.layout == "hf":
            names = [tensor.scale]
        else:
            names = [native_scales(name)[0] for name in native_names(tensor)]
        scales: list[float] = []
        for name in names:
            for value in self.numbers(name):
                if not 0 < value <= MOST_SCALE:
                    raise Ms4Error(
                        f"{self.entries[name].path}: {name}: a scale is zero, negative, not a "
                        f"number or too large ({value}). Fetch the file again, or use another "
                        "source."
                    )
                scales.append(value)
        return scales

    def source_scales(self, tensor: spec.Tensor) -> tuple[list[float], list[float]]:
        """Scales of an FP8 parameter's weights and activations, one each a native matrix.

        Raises:
            Ms4Error: a scale of the weights is zero, negative or not a number.
        """
        self.weight_scales(tensor)
        return matrix_scales(tensor, self.layout, self.numbers)

    def all_scales(self, tensors: Sequence[spec.Tensor]) -> dict[str, list[float]]:
        """Every scale of these parameters by its name on disk; exact as JSON numbers.

        Raises:
            Ms4Error: one is not a number, for which JSON has no word.
        """
        stored = (name for tensor in tensors for name in self.stored(tensor))
        scales = {name: self.numbers(name) for name in stored if _is_scale(name)}
        for name, values in scales.items():
            if not all(map(math.isfinite, values)):
                raise Ms4Error(
                    f"{self.entries[name].path}: {name}: a scale is infinite or not a number. "
                    "Fetch the file again, or use another source."
                )
        return scales

    def segments(self, tensor: spec.Tensor) -> list[Segment]:
        """A parameter's data, in the order of the HF tensor."""
        coded = tensor.dtype == "F8_E4M3"
        scales = self.weight_scales(tensor) if coded else [1.0]
        if self.layout == "hf":
            entry, count = self.entries[tensor.disk], tensor.numel // len(scales)
            return [
                Segment(entry, i * count, i * count, count, scale) for i, scale in enumerate(scales)
            ]
        if tensor.transform == "rope_rows":
            entry, width = self.entries[tensor.native], tensor.shape[1]
            return [
                Segment(entry, int(row) * width, at * width, width, 1.0)
                for at, row in enumerate(rope_order(self.dims))
            ]
        entries = [self.entries[name] for name in native_names(tensor)]
        count = math.prod(part_shape(tensor))
        return [
            Segment(entry, 0, i * count, count, scale)
            for i, (entry, scale) in enumerate(zip(entries, scales, strict=True))
        ]

    def read(self, segment: Segment, start: int = 0, count: int | None = None) -> Bytes:
        """Bytes of a segment: all, or `count` elements from element `start` of it on."""
        item = ITEM_BYTES[segment.entry.dtype]
        wanted = segment.count - start if count is None else count
        return self.reader.read(segment.entry, (segment.offset + start) * item, wanted * item)

    def read_across(self, segments: Sequence[Segment], start: int, count: int) -> Bytes:
        """Bytes of `count` elements of a parameter from element `start` of its HF tensor on.

        Args:
            segments: all of the parameter.
            start: first element.
            count: elements.
        """
        parts: list[Bytes] = []
        while count:
            number, at = divmod(start, segments[0].count)
            some = min(count, segments[number].count - at)
            parts.append(self.read(segments[number], at, some))
            start, count = start + some, count - some
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does: size and time stamp."""
    with readable(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def _same_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal; a scale of one element may be stored as [1]."""
    return found == wanted or (wanted == () and found == (1,))


def _is_scale(name: str) -> bool:
    return name.endswith(("_scale_inv", "activation_scale", ".qscale_weight", ".qscale_act"))
