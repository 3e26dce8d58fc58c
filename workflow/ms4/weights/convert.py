"""Stage descale: FP8 with scales → the base that is trained on.

The source is read tensor by tensor and written in pieces, one a decoder layer, so that memory stays
bounded by a layer and a kill loses one piece. Each piece has a record beside it (what it was made
from, its SHA-256); a rerun keeps the pieces whose record holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ms4 import spec
from ms4.config import RunConfig
from ms4.errors import Ms4Error
from ms4.manifest import (
    check_files,
    commit_file,
    file_entry,
    read_json,
    read_manifest,
    sha256_json,
    write_json,
    write_manifest,
)
from ms4.progress import track
from ms4.weights import fp8, nf4

SOURCE = Path("weights/source.json")
BASE = Path("weights/base")
MANIFEST = Path("weights/base.json")
INDEX = "model.safetensors.index.json"


class Source:
    """The tensors of an FP8 checkpoint in the HF layout, read by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.dims = spec.read_dimensions(directory)
        self.files: dict[str, str] = read_json(directory / INDEX)["weight_map"]
        self._check_keys()

    def _check_keys(self) -> None:
        expected = set(spec.disk_tensors(self.dims))
        missing, extra = sorted(expected - set(self.files)), sorted(set(self.files) - expected)
        if missing or extra:
            raise Ms4Error(
                f"{self.directory / INDEX}: not the tensors of this model: "
                f"{len(missing)} missing ({', '.join(missing[:5]) or 'none'}), "
                f"{len(extra)} unexpected ({', '.join(extra[:5]) or 'none'}). "
                "The FP8 checkpoint in the HF layout is wanted, scales included."
            )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored."""
        path = self.directory / self.files[name]
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def scales(self) -> dict[str, list[float]]:
        """Every scale of the checkpoint; BF16 values are exact as JSON numbers."""
        names = [name for tensor in spec.tensors(self.dims) for name in tensor.scales()]
        return {name: self.read(name).to(torch.float64).flatten().tolist() for name in names}

    def coded(self, tensor: spec.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One parameter as it is stored, and its scale if it has one, both checked.

        Raises:
            Ms4Error: a dtype or shape is not the table's, or a scale is not a positive number.
        """
        weight = self.read(tensor.disk)
        wanted = fp8.FP8 if tensor.dtype == "F8_E4M3" else torch.bfloat16
        if weight.dtype != wanted or tuple(weight.shape) != tensor.shape:
            raise Ms4Error(
                f"{self.directory / self.files[tensor.disk]}: {tensor.disk} is "
                f"{weight.dtype} {tuple(weight.shape)}, not {wanted} {tensor.shape}."
            )
        if tensor.dtype != "F8_E4M3":
            return weight, None
        scale = self.read(tensor.scale)
        if tuple(scale.shape) != tensor.scales()[tensor.scale]:
            raise Ms4Error(f"{tensor.scale}: shape {tuple(scale.shape)} is not the table's.")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise Ms4Error(f"{tensor.scale}: a scale is zero, negative or not a number.")
        return weight, scale


def base_tensors(dims: spec.Dimensions, experts: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the base's tensors; `experts` is `nf4` or `bf16`."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in spec.tensors(dims):
        if tensor.role == "experts" and experts == "nf4":
            count, out, inner = tensor.shape
            shapes = nf4.packed_shapes(count, out * inner)
            table.update({tensor.disk + suffix: value for suffix, value in shapes.items()})
        else:
            table[tensor.disk] = ("BF16", tensor.shape)
    return table


def _pieces(dims: spec.Dimensions) -> Iterator[tuple[str, list[spec.Tensor]]]:
    """The base's files and what is in them."""
    table = spec.tensors(dims)
    seen = [t for t in table if t.role in ("vision", "projector")]
    text = [t for t in table if t not in seen]
    yield "text.safetensors", [t for t in text if t.layer is None]
    for layer in range(dims.layers):
        yield f"layer-{layer:02d}.safetensors", [t for t in text if t.layer == layer]
    yield "vision.safetensors", seen


def _make_piece(
    source: Source, tensors: list[spec.Tensor], path: Path, experts: str
) -> dict[str, Any]:
    """Convert some tensors into one file; returns its manifest entry, with the tensors' names."""
    made: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        weight, scale = source.coded(tensor)
        if scale is None:
            made[tensor.disk] = weight
        elif tensor.role == "experts" and experts == "nf4":
            packed = nf4.quantize_fp8(weight, scale).by_suffix()
            made.update({tensor.disk + suffix: value for suffix, value in packed.items()})
        else:
            made[tensor.disk] = fp8.descale(weight, scale)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(made, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    commit_file(temporary, path)
    return {**file_entry(path, path.parent), "tensors": sorted(made)}


def base_config(config: dict[str, Any], dims: spec.Dimensions, scale: str) -> dict[str, Any]:
    """The base's config.json: no quantization block, and the softmax scale written out.

    `plain` is written as yarn parameters that every version of transformers reads as
    1/sqrt(head): mscale_all_dim 0 switches the factor off, and attention_factor 1 keeps cos and sin
    from being multiplied instead. `softmax_scale` is what our own attention uses.
    """
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    text = dict(made["text_config"])
    rope = dict(text.get("rope_parameters") or {})
    text["softmax_scale"] = dims.softmax_scales(rope)[scale]
    rope |= {"mscale_all_dim": 0.0 if scale == "plain" else 1.0, "attention_factor": 1.0}
    text["rope_parameters"] = rope
    return {**made, "text_config": text, "dtype": "bfloat16"}


def run_stage(config: RunConfig) -> None:
    """Make `weights/base/` and `weights/base.json`."""
    manifest = read_manifest(SOURCE, "fetch")
    directory = Path(manifest["directory"])
    check_files(manifest, directory)
    source = Source(directory)
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    made_from = sha256_json([manifest["files"], config.part_hash("descale")])
    records = BASE / ".pieces"
    records.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for name, tensors in track(list(_pieces(source.dims)), "descale"):
        record_path, path = records / f"{name}.json", BASE / name
        record = read_json(record_path) if record_path.exists() else {}
        if not (
            record.get("made_from") == made_from
            and path.exists()
            and file_entry(path, BASE) == record["entry"]
        ):
            record_path.unlink(missing_ok=True)
            entry = _make_piece(source, tensors, path, config.model.experts)
            names = entry.pop("tensors")
            record = {"made_from": made_from, "entry": entry, "tensors": names}
            write_json(record_path, record)
        entries.append(record["entry"])
    weight_map = {
        name: Path(record.name).stem
        for record in sorted(records.glob("*.json"))
        for name in read_json(record)["tensors"]
    }
    sizes = sum(entry["size"] for entry in entries)
    write_json(
        BASE / INDEX,
        {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(weight_map.items()))},
    )
    write_json(
        BASE / "config.json",
        base_config(read_json(directory / "config.json"), source.dims, config.model.softmax_scale),
    )
    shutil.copyfile(directory / "tekken.json", BASE / "tekken.json")
    entries += [file_entry(BASE / name, BASE) for name in (INDEX, "config.json", "tekken.json")]
    write_manifest(
        MANIFEST,
        "descale",
        config_hash=config.part_hash("descale"),
        inputs=[SOURCE],
        files=entries,
        directory=BASE.as_posix(),
        experts=config.model.experts,
        softmax_scale=config.model.softmax_scale,
        parameters=sum(tensor.numel for tensor in spec.tensors(source.dims)),
        source_scales=source.scales(),
    )
    print(
        f"base: {len(entries) - 3} pieces, {sizes / 1e9:.2f} GB, experts in {config.model.experts}"
    )
