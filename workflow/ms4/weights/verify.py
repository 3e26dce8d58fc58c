"""Stage verify: is the base what the model's table says, what the source says, and a good model?

Keys, dtypes, shapes and hashes are compared exactly, for every tensor, and the source's files with
the hashes that were recorded when they came. A sample of the tensors is recomputed from the source
by another path than the converter's, and the source is scanned for codes and scales that are no
numbers. Then the loss of a text is taken under both candidates for the softmax scale: which one a
checkpoint was trained with cannot be seen from its weights, and training on the wrong one gives a
model that is a little worse everywhere. Nothing is ever changed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from ms4 import spec
from ms4.config import RunConfig
from ms4.errors import Ms4Error, print_json
from ms4.manifest import read_json, read_manifest, write_json, write_manifest
from ms4.weights import checks, texts
from ms4.weights.base import manifest_of
from ms4.weights.convert import BASE, MANIFEST, OWN_MANIFEST, SOURCE
from ms4.weights.findings import SCALES, Findings, Losses, Verdict, print_findings
from ms4.weights.layerwise import BaseWeights, SourceWeights, token_losses
from ms4.weights.layouts import Layout, Source, find_layout
from ms4.weights.meter import Meter
from ms4.weights.recompute import decode_e4m3 as decode_e4m3
from ms4.weights.recompute import recompute as recompute
from ms4.weights.shards import Reader, writable
from ms4.weights.tables import STORAGES
from ms4.weights.texts import Text

OUTPUT = Path("results/verify.json")
MARGIN = 0.05
"""Nats per token by which the other scale's loss must be lower before it counts."""
ERRORS = 4.0
"""Standard errors of the difference, token by token, that it must be."""
PREDICTED = 0.7
"""Share of ln(vocabulary), which guessing costs, that the better loss must be below."""
_SHOWN = 20
"""Faults that the error shows."""


def sample(source: Source) -> list[spec.Tensor]:
    """First and last parameter of each kind of which the source is here: both ends of the model,
    every projection."""
    kinds: dict[str, list[spec.Tensor]] = {}
    for tensor in spec.tensors(source.dims):
        if source.is_here([tensor]):
            kinds.setdefault(re.sub(r"\d+", "N", tensor.disk), []).append(tensor)
    return [t for group in kinds.values() for t in dict.fromkeys((group[0], group[-1]))]


def judge(own_C: torch.Tensor, other_C: torch.Tensor, vocabulary: int) -> Verdict:
    """Compare the losses of the same tokens under the base's own and the other softmax scale."""
    difference_C = other_C - own_C
    better = min(float(own_C.mean()), float(other_C.mean()))
    gain, error = -float(difference_C.mean()), standard_error(difference_C)
    if not better < PREDICTED * math.log(vocabulary):
        return "unpredicted"
    return "other" if gain > MARGIN and gain > ERRORS * error else "holds"


def tell_unpredicted(found: Findings, dims: spec.Dimensions) -> None:
    """Say that a model predicts nothing: a fault of one of the published sizes, which is trained;
    of any other, which may be a model that nobody has taught yet, a warning.

    Args:
        found: with losses; gets the fault or the note.
        dims: sizes of the model.
    """
    if (losses := found.losses) is None or found.verdict != "unpredicted":
        return
    guessing = math.log(dims.vocabulary)
    what = (
        f"{losses.text} costs {min(losses.plain, losses.yarn):.2f} nats per "
        f"token, and guessing {guessing:.2f}: the model predicts next to nothing (a trained one "
        f"stays below {PREDICTED * guessing:.2f})"
    )
    if dims == spec.Dimensions():
        found.faults.append(
            f"{found.directory}: {what}, so its weights are broken, whatever their hashes say. "
            "Fetch them from their publisher, and convert those."
        )
    else:
        found.notes.append(f"warning: {what}; is it trained? Its softmax scale cannot be judged")


def standard_error(values_C: torch.Tensor) -> float:
    """Of the mean of these values."""
    return float(values_C.std()) / math.sqrt(len(values_C))


class _Examination:
    """One base under examination; each step adds to the findings."""

    def __init__(self, target: Path, manifest: Path, threads: int) -> None:
        self.target, self.path, self.threads = target, manifest, threads
        self.manifest = read_manifest(manifest, "descale")
        self.to: str = self.manifest.get("experts", "")
        scale: str = self.manifest.get("softmax_scale", "")
        if self.to not in STORAGES or scale not in SCALES:
            raise Ms4Error(
                f"{manifest}: does not say how the base is stored and for which softmax scale; "
                "make the base again with `ms4 descale`."
            )
        self.layout: Layout = "native" if self.manifest.get("layout") == "native" else "hf"
        self.dims = spec.read_dimensions(target)
        self.config: dict[str, Any] = read_json(target / "config.json")
        parameters = sum(tensor.numel for tensor in spec.tensors(self.dims))
        self.found = Findings(target.as_posix(), self.to, scale, parameters)

    def base(self) -> dict[str, str]:
        """Tensors, settings and hashes; returns the faults of files by their names."""
        self.found.tensors, faults = checks.tensor_faults(self.target, self.dims, self.to)
        self.found.faults += faults
        self.found.faults += checks.settings_faults(
            self.config, self.dims, self.found.softmax_scale
        )
        return checks.file_faults(self.manifest, self.target, self.threads)

    def source_files(self, directory: Path, record: Mapping[str, Any]) -> None:
        """Hash the source: a base that was made of damaged files is as damaged as they are."""
        if not record:
            self.found.notes.append(
                f"{directory}: no manifest of `ms4 fetch` says what its files were when they came, "
                "so none was compared with its SHA-256"
            )
            return
        own, inside = record.get("origin") == "local", self.path.parent == self.target
        mend = (
            f"{'Put it back as it was' if own else 'Remove it'}, remove the base that was made of "
            f"it ({self.target}{'' if inside else f' and {self.path}'}), and run `ms4 fetch` and "
            "`ms4 descale` again."
        )
        self.found.hashed, faults = checks.source_file_faults(record, directory, mend, self.threads)
        self.found.faults += faults

    def source(self, source: Source, damaged: dict[str, str]) -> None:
        """Scan the source and recompute a sample; say of damaged files what differs in them."""
        if source.dims != self.dims:
            self.found.faults.append(
                f"{source.directory}: has other dimensions than {self.target}, so that it is not "
                "what the base was made from"
            )
            return
        missing = sorted(
            set(source.files.values()) - {e.path.name for e in source.entries.values()}
        )
        if missing:
            self.found.notes.append(
                f"{source.directory}: {', '.join(missing)} not here: neither scanned nor compared"
            )
        self.found.scanned = len({entry.path for entry in source.entries.values()})
        faults, notes = checks.source_faults(source, self.threads)
        self.found.faults += faults
        self.found.notes += [f"{note} (of activations: no weight depends on it)" for note in notes]
        if source.layout == self.layout:
            kept = self.manifest.get("source_scales") or {}
            self.found.faults += checks.kept_scale_faults(source, kept, self.path)
        else:
            self.found.notes.append(
                f"{source.directory}: is in another layout than what the base was made from; the "
                "two can differ by a rounding"
            )
        for name in damaged:
            if name.endswith(".safetensors") and (self.target / name).is_file():
                damaged[name] += checks.differing(source, self.target, name, self.to)
        if not self.found.faults and not damaged:
            self._recompute(source)

    def _recompute(self, source: Source) -> None:
        chosen = sample(source)

        def compare(tensor: spec.Tensor) -> float | Ms4Error:
            try:
                return recompute(source, self.target, tensor, self.to)
            except Ms4Error as error:
                return error
            finally:
                meter.add(tensor.numel)

        with (
            Meter("recompute", sum(tensor.numel for tensor in chosen)) as meter,
            ThreadPoolExecutor(self.threads) as pool,
        ):
            for tensor, error in zip(chosen, pool.map(compare, chosen), strict=True):
                if isinstance(error, Ms4Error):
                    self.found.faults.append(str(error))
                else:
                    # Rounded: a file that is made twice is the same.
                    self.found.recomputed[tensor.disk] = float(f"{error:.4g}")

    def losses(self, source: Source | None, text: Text) -> None:
        """Take the loss of a text under both scales, and of the exact weights where they are."""
        own, other = self.found.softmax_scale, self.found.other
        with Reader() as reader:
            weights = BaseWeights(self.target, self.dims, self.config, self.to, reader)
            both_NC = token_losses(weights, text, (own, other), "loss of the base")
        means = dict(zip((own, other), both_NC.mean(dim=1).tolist(), strict=True))
        exact = None
        lossy = self.to == "nf4" or (self.to == "fp8" and self.layout == "native")
        used = [t for t in spec.tensors(self.dims) if t.role not in ("vision", "projector")]
        if lossy and source is not None and source.is_here(used):
            alone_1C = token_losses(SourceWeights(source), text, (own,), "loss of the source")
            exact = float(alone_1C.mean())
        if not all(map(math.isfinite, (*means.values(), exact or 0.0))):
            self.found.faults.append(f"{self.target}: the loss of {text.name} is not a number")
            return
        difference_C = both_NC[1] - both_NC[0]
        self.found.verdict = judge(both_NC[0], both_NC[1], self.dims.vocabulary)
        self.found.losses = Losses(
            text=text.name,
            tokens=both_NC.shape[1],
            plain=round(means["plain"], 4),
            yarn=round(means["yarn"], 4),
            difference=round(means[other] - means[own], 4),
            standard_error=round(standard_error(difference_C), 4),
            exact=None if exact is None else round(exact, 4),
            added=None if exact is None else round(means[own] - exact, 4),
        )
        tell_unpredicted(self.found, self.dims)


@contextmanager
def _opened(directory: Path | None, layout: Layout, found: Findings) -> Iterator[Source | None]:
    """The source, if there is one; what is wrong with it is a fault."""
    source = None
    if directory is None:
        found.notes.append("no source was given: nothing was scanned or recomputed")
    elif directory.is_dir() and not any(directory.glob("*.safetensors")):
        found.notes.append(f"{directory}: its weights are gone: nothing was scanned or recomputed")
    else:
        try:
            source = Source(directory, find_layout(directory, layout))
        except Ms4Error as error:
            found.faults.append(str(error))
    if source is None:
        yield None
    else:
        with source:
            yield source


def examine(
    target: Path,
    manifest: Path,
    directory: Path | None,
    *,
    origin: Mapping[str, Any],
    record: Mapping[str, Any],
    threads: int,
) -> Findings:
    """Everything that verify looks at.

    Args:
        target: directory of the base.
        manifest: of the stage descale.
        directory: of the source; None: there is none.
        origin: manifest of the source that the base was made from; empty if there is none.
        record: manifest that has the hashes of the files in `directory`; empty if there is none.
        threads: that read and compare.

    Raises:
        Ms4Error: there is no base to look at. What is wrong with it is among the findings.
    """
    under = _Examination(target, manifest, threads)
    found = under.found
    damaged = under.base()
    if directory is not None and directory.is_dir():
        under.source_files(directory, record)
    with _opened(directory, under.layout, found) as source:
        if source is not None:
            under.source(source, damaged)
        found.faults += damaged.values()
        if found.faults:
            found.notes.append("no loss was taken of a base with faults")
            return found
        if freed := origin.get("freed"):
            errors: Mapping[str, float] = origin.get("recomputed") or {}
            worst = max(errors.values(), default=0.0)
            found.notes.append(
                f"files of the source that were freed: {len(freed)}; {len(errors)} parameters of "
                f"the base had been compared with it before, largest error {worst:.2%}"
            )
        try:
            # The tiny model speaks no English.
            tiny = origin.get("origin") == "tiny"
            text = texts.choose(target, under.dims.vocabulary, tiny=tiny)
        except Ms4Error as error:
            found.faults.append(str(error))
            return found
        if text is None:
            found.notes.append(f"{target}: has no tekken.json, so no loss was taken of a text")
        else:
            under.losses(source, text)
    return found


def insist(found: Findings, manifest: Path) -> None:
    """Stop where something is wrong.

    Raises:
        Ms4Error: the base or the source has faults, or the other softmax scale is clearly better.
    """
    if found.faults:
        shown = "\n  ".join(found.faults[:_SHOWN])
        more = f"\n  and {len(found.faults) - _SHOWN} more" if len(found.faults) > _SHOWN else ""
        count = "1 fault" if len(found.faults) == 1 else f"{len(found.faults)} faults"
        raise Ms4Error(
            f"{found.directory}: {count}:\n  {shown}{more}\n"
            f"Of the base: remove its files that are named and {manifest}, and run `ms4 descale` "
            "again, which keeps the others. Of the source: fetch it again, or use another."
        )
    if found.verdict == "other" and found.losses is not None:
        own, other, losses = found.softmax_scale, found.other, asdict(found.losses)
        alone = manifest.name == OWN_MANIFEST and manifest.parent == Path(found.directory)
        mend = (
            f"Make it again with `ms4 descale … --softmax-scale {other}`"
            if alone
            else f"Set model.softmax_scale to `{other}` in the configuration and run again"
        )
        raise Ms4Error(
            f"{found.directory}: {found.losses.text} costs {losses[own]:.3f} nats per token under "
            f"the softmax scale `{own}`, for which the base was made, and {losses[other]:.3f} "
            f"under `{other}`: the model was trained with that one. {mend}; the base itself is "
            "not touched."
        )


def run_stage(config: RunConfig) -> None:
    """Check `weights/base/` and write `results/verify.json`.

    Raises:
        Ms4Error: something is wrong; the table on standard output says what is right, too.
    """
    origin = read_manifest(SOURCE, "fetch")
    threads = config.run.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    directory = Path(origin["directory"])
    found = examine(BASE, MANIFEST, directory, origin=origin, record=origin, threads=threads)
    print_findings(found)
    if found.faults or found.verdict == "other":
        OUTPUT.unlink(missing_ok=True)  # what it vouched for is no longer so
    insist(found, MANIFEST)
    write_manifest(
        OUTPUT,
        "verify",
        config_hash=config.part_hash("verify"),
        inputs=[MANIFEST],
        **asdict(found),
    )


def _record_of(directory: Path, target: Path) -> dict[str, Any]:
    """The manifest that `ms4 fetch` left of the source in `directory`, empty if there is none: in
    it, beside it in a project, or, of a source that was read in place, beside the base."""
    name, beside, base = SOURCE.name, directory.resolve().parent, target.resolve().parent
    places = ((directory, directory), (beside, beside.parent), (base, base), (base, base.parent))
    for place, root in places:
        try:
            record = read_manifest(place / name, "fetch")
            found = root / record["directory"]
        except (Ms4Error, KeyError, TypeError):  # a file of that name may be anything
            continue
        if found.resolve() == directory.resolve():
            return record
    return {}


def _check_output(output: Path, *read: Path | None) -> None:
    """Whether the findings can go there, before hours are spent on them.

    Raises:
        Ms4Error: it is no place for a file, or one that is read here.
    """
    if output.is_dir() or any(
        path is not None and output.resolve().is_relative_to(path.resolve()) for path in read
    ):
        fault = "is a directory" if output.is_dir() else "belongs to what is to be verified"
        raise Ms4Error(f"--output: {output}: {fault}; give the name of a new file elsewhere.")
    with writable(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass


def verify_directory(
    target: Path, source: Path | None, *, as_json: bool, output: Path | None = None
) -> None:
    """`ms4 verify TARGET`: of a base outside a project, or of a project's `weights/base`.

    The findings go to standard output, as a table or as JSON, and to a file if one is named.

    Args:
        target: directory of the base.
        source: of the FP8 checkpoint that it was made from; in a project, the project's own if it
            is not given.
        as_json: print the findings as JSON and nothing else.
        output: file for the findings as JSON, those of a base with faults too.

    Raises:
        Ms4Error: something is wrong; the findings are printed and written before.
    """
    if not target.is_dir():
        raise Ms4Error(f"{target}: no such directory; give one that `ms4 descale` has made.")
    if target.name in ("", ".."):  # what is beside a directory needs its name
        target = target.resolve()
    manifest = manifest_of(target)
    fetched: dict[str, Any] = {}
    record: dict[str, Any] = {}
    # Beside a project's `weights/base.json`, for `weights/base/`.
    if manifest.parent != target and manifest.with_name(SOURCE.name).is_file():
        fetched = read_manifest(manifest.with_name(SOURCE.name), "fetch")
        if source is None:
            source, record = manifest.absolute().parent.parent / fetched["directory"], fetched
    if output is not None:
        _check_output(output, target, source, manifest)
    if source is not None and not record:
        record = _record_of(source, target)
    found = examine(
        target,
        manifest,
        source,
        origin=fetched or record,
        record=record,
        threads=torch.get_num_threads(),
    )
    if output is not None:
        with writable(output):
            write_json(output, asdict(found))
    if as_json:
        print_json(asdict(found))
    else:
        print_findings(found)
    insist(found, manifest)
