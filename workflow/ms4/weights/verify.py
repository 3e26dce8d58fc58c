"""Stage verify: is the base what the model's table says, and is it the source times its scales?

Keys, dtypes and shapes are compared exactly, for every tensor. A sample of the tensors, some of
each role, is recomputed from the source (`recompute`).
"""

from __future__ import annotations

from pathlib import Path

from ms4 import spec
from ms4.config import RunConfig
from ms4.errors import Ms4Error
from ms4.manifest import check_files, read_manifest, write_manifest
from ms4.weights.convert import BASE, MANIFEST, SOURCE
from ms4.weights.layouts import Source
from ms4.weights.recompute import decode_e4m3 as decode_e4m3
from ms4.weights.recompute import recompute as recompute
from ms4.weights.shards import read_header
from ms4.weights.tables import base_table

OUTPUT = Path("results/verify.json")


def check_keys(target: Path, dims: spec.Dimensions, to: str) -> int:
    """Compare the headers of the base's files with the table; returns the number of tensors.

    Raises:
        Ms4Error: a tensor is missing, left over, or of another dtype or shape; each is named.
    """
    expected = base_table(dims, to)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(target.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            found[name] = (entry.dtype, entry.shape)
    faults = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name}: {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if faults:
        shown = "\n  ".join(faults[:20])
        raise Ms4Error(
            f"{target}: {len(faults)} tensors are not the model's:\n  {shown}\n"
            f"Remove {MANIFEST} and {target} and run again."
        )
    return len(found)


def _sample(dims: spec.Dimensions) -> list[spec.Tensor]:
    """First and last FP8 tensor of each kind: both ends of the model, every projection."""
    kinds: dict[str, list[spec.Tensor]] = {}
    for tensor in spec.tensors(dims):
        if tensor.dtype == "F8_E4M3":
            kinds.setdefault(tensor.disk.split(".", 4)[-1], []).append(tensor)
    return [tensor for group in kinds.values() for tensor in {group[0], group[-1]}]


def run_stage(config: RunConfig) -> None:
    """Check `weights/base/` and write `results/verify.json`."""
    base, origin = read_manifest(MANIFEST, "descale"), read_manifest(SOURCE, "fetch")
    check_files(base, BASE, hashes=True)
    dims = spec.read_dimensions(BASE)
    count = check_keys(BASE, dims, base["experts"])
    with Source(Path(origin["directory"])) as source:
        errors = {
            tensor.disk: recompute(source, BASE, tensor, base["experts"])
            for tensor in _sample(dims)
            if source.is_here([tensor])
        }
    write_manifest(
        OUTPUT,
        "verify",
        config_hash=config.part_hash("verify"),
        inputs=[MANIFEST],
        tensors=count,
        parameters=base["parameters"],
        recomputed=errors,
    )
    worst = max(errors.values())
    print(
        f"verify: {count} tensors as the table has them; {len(errors)} recomputed from FP8 × scale,"
    )
    print(f"        largest error {worst:.2%} ({base['experts']} experts, everything else exact)")
