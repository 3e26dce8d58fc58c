"""`ms4 data`: what files hold, and what training would make of them. Nothing but faults is written.

Works without a project, a checkpoint or torch: tokens are those of the vocabulary that
mistral-common ships, which is the model's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ms4 import memory, settings, spec, throughput, yaml_text
from ms4.config import RunConfig, check
from ms4.data.chat import Chat
from ms4.data.dataset import FAULTS, SOURCE, copies_of, load_chat
from ms4.data.faults import Faults
from ms4.data.format_names import NAMES
from ms4.data.histogram import by_fill, by_length, histogram
from ms4.data.packing import pack
from ms4.data.prepare import Recipe, Sample, documents, read_files, started
from ms4.data.progress import ByteProgress
from ms4.data.render import count, render_whole
from ms4.data.sources import FAULTS_FILE, Source, expand, repeated
from ms4.data.statements import image_tokens, statements
from ms4.data.tally import Tally
from ms4.data.tekken import write_tekken
from ms4.device import GPUS
from ms4.errors import Ms4Error, print_json, printable
from ms4.plan import total_steps

ALONE_FAULTS = Path(FAULTS_FILE)
"""Where all faults stand, outside a project."""


@dataclass
class FileCounts:
    """One file's share."""

    format: str
    """The format's name in the configuration; `unknown` of a file without records."""
    records: int = 0
    samples: int = 0
    unused: set[str] = field(default_factory=set)
    """Keys that nothing was made of."""


@dataclass
class Survey:
    """What the files hold."""

    files: dict[str, FileCounts] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    faults: Faults = field(default_factory=Faults)
    """Why each dropped record was dropped, whether or not that would stop `ms4 preprocess`."""
    by_settings: int = 0
    """How many of these a setting leaves out."""
    filled: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Tokens of each sequence."""

    @property
    def format(self) -> str:
        """The format of all files, or `mixed`."""
        found = {counts.format for counts in self.files.values() if counts.records}
        return "mixed" if len(found) > 1 else next(iter(found), "unknown")


def read_settings(
    files: Sequence[str], config: Path | None, overrides: Sequence[str], effort: str | None
) -> RunConfig:
    """The configuration that these files would be trained with.

    Args:
        files: they take the place of `data.train`; held-out sets are left out.
        config: a configuration file; None: the defaults.
        overrides: `key=value` over it.
        effort: `none`, `high` or `per-sample`, over `data.reasoning`.

    Raises:
        Ms4Error: the file or a setting is wrong.
    """
    values: dict[str, Any] = {}
    if config is not None:
        tree, root = yaml_text.parse(yaml_text.read(config, "configuration file"), str(config))
        check(tree, str(config), root)
        values = tree
        weights = values["data"].get("weights") or {}
        values["data"]["weights"] = {name: w for name, w in weights.items() if name in files}
    for override in overrides:
        name, value = settings.read_setting(override, RunConfig)
        settings.put(values, name, value)
    settings.put(values, "data.train", list(files))
    settings.put(values, "data.test", {})
    settings.put(values, "data.holdout", 0.0)
    if effort is not None:
        settings.put(values, "data.reasoning", effort.replace("-", "_"))
    evaluate = values.get("evaluate")
    if isinstance(evaluate, dict):
        evaluate.pop("min_exact_match", None)  # it names held-out sets
    return check(values, "the settings")


def tokenizer(path: Path | None, config: RunConfig) -> Chat:
    """The tokenizer of a file, else of the project's weights, else the one that they will bring:
    of mistral-common, for the tiny model with its few words.

    Raises:
        Ms4Error: it cannot be loaded.
    """
    largest = config.data.images.max_size
    if path is not None:
        if not path.exists():
            raise Ms4Error(f"{path}: no such file; name a tekken.json.")
        if not path.is_file():  # a pipe might never be written to
            raise Ms4Error(f"{path}: not a file; name a tekken.json.")
        return Chat(path, largest)
    if SOURCE.is_file():
        return load_chat(config.data)
    with tempfile.TemporaryDirectory(prefix="ms4-") as directory:
        made = Path(directory) / "tekken.json"
        if config.model.source == "tiny":
            write_tekken(made, vocabulary=spec.TINY.vocabulary)
        else:
            write_tekken(made)
        return Chat(made, largest)


def survey(
    config: RunConfig,
    chat: Chat,
    sources: Sequence[Source],
    on_bytes: Callable[[int], None] | None = None,
) -> Survey:
    """Read all of these sources.

    Args:
        config: how.
        chat: the tokenizer.
        sources: what to read.
        on_bytes: told of each part that was read; None: a bar or lines on standard error.
    """
    found = Survey(faults=Faults(source.name for source in sources))
    lengths = array("q")
    local = [source.path for source in sources if source.hub is None]
    size = sum(path.stat().st_size for path in local if path.is_file())
    workers = config.run.threads or len(os.sched_getaffinity(0))
    recipe = Recipe(config.data, with_images=config.data.modality == "text_vision")
    with (
        started(chat, recipe, workers, size) as pool,
        _progress(size, on_bytes) as advance,
    ):
        for result in read_files(sources, pool, config.data, advance):
            name = result.source.name
            counts = found.files[name] = FileCounts(result.format)
            weight = config.data.weights.get(result.source.entry, 1.0)
            for batch in result.batches:
                counts.unused |= batch.unused
                for outcome in batch.outcomes:
                    counts.records += outcome.records
                    if outcome.sample is None:
                        found.tally.refuse(outcome, f"{name}:{outcome.line}")
                        found.faults.add(name, outcome.line, outcome.refused)
                        found.by_settings += not outcome.fault
                        continue
                    counts.samples += 1
                    found.tally.take(outcome.sample)
                    for tokens, _ in documents(outcome.sample, config.data.sequence_length):
                        copies = copies_of(outcome.sample.key, weight)
                        lengths.extend([len(tokens)] * copies)
            if not counts.records:
                counts.format = "unknown"
    packed = np.frombuffer(lengths, dtype=np.int64)
    members, starts = pack(packed, config.data.sequence_length, config.data.packing)
    if len(members):
        found.filled = np.add.reduceat(packed[members], starts[:-1])
    return found


@contextmanager
def _progress(size: int, on_bytes: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    if on_bytes is not None:
        yield on_bytes
        return
    with ByteProgress("conversations", size) as progress:
        yield progress.advance


def find_sample(
    config: RunConfig, chat: Chat, sources: Sequence[Source], number: int
) -> tuple[str, Sample]:
    """Place and content of the sample with this number, from 1; what follows is not read.

    Raises:
        Ms4Error: there are not so many.
    """
    seen = 0
    recipe = Recipe(config.data, with_images=config.data.modality == "text_vision")
    with started(chat, recipe, 1, 0) as pool:
        for result in read_files(sources, pool, config.data):
            for batch in result.batches:
                for outcome in batch.outcomes:
                    seen += outcome.sample is not None
                    if outcome.sample is not None and seen == number:
                        return f"{result.source.name}:{outcome.line}", outcome.sample
    raise Ms4Error(
        f"--show {number}: the data has {count(seen, 'sample')} that can be used; without --show, "
        "the reasons are told."
    )


def run(
    files: Sequence[str],
    *,
    as_json: bool = False,
    show: int | None = None,
    effort: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    tokenizer_file: Path | None = None,
) -> int:
    """Answer `ms4 data`; returns the exit code: 2 if nothing can be used.

    Raises:
        Ms4Error: a setting or the tokenizer is wrong, or there is no such sample to show.
    """
    # A shell's `*` names the list of faults too, which is no data.
    files = [name for name in files if Path(name).name != FAULTS_FILE]
    if "" in files:
        raise Ms4Error("a file without a name; name data files.")
    if not files:
        raise Ms4Error(f"{FAULTS_FILE} is what this command wrote; name data files.")
    config = read_settings(files, config_file, overrides, effort)
    if show is not None and show < 1:
        raise Ms4Error(f"--show {show}: samples are numbered from 1.")
    sources = expand(config.data.train)
    chat = tokenizer(tokenizer_file, config)
    shown = find_sample(config, chat, sources, show) if show is not None else None
    if shown is not None and not as_json:
        print(_shown(chat, shown, show or 0))
        return 0
    found = survey(config, chat, sources)
    costs = _costs(config, found)
    if as_json:
        tree = _tree(config, found, costs)
        if shown is not None:
            tree["shown"] = {
                "place": shown[0],
                "text": render_whole(chat, shown[1].encoded, colour=False),
            }
        print_json(tree)
    else:
        print("\n".join(_report(config, found, costs)))
    return 0 if found.tally.samples else 2


def _shown(chat: Chat, shown: tuple[str, Sample], number: int) -> str:
    place, sample = shown
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    how = "in colour" if colour else "between ⟦ and ⟧"
    encoded = sample.encoded
    return (
        f"sample {number}, {printable(place)}: effort {sample.effort}, {len(encoded.tokens):,} "
        f"tokens, {int(encoded.trained.sum()):,} of them trained, {how}\n"
        f"{render_whole(chat, encoded, colour)}"
    )


@dataclass(frozen=True)
class _Costs:
    steps: int
    hours: dict[str, float]
    """By GPU, of those that the run fits into; estimates."""


def _costs(config: RunConfig, found: Survey) -> _Costs:
    train = config.train
    a_step = train.micro_batch * train.accumulation
    steps = total_steps(config, len(found.filled))
    dims = spec.Dimensions()
    peak = memory.plan(config, dims, "cuda").peak
    tokens = steps * a_step * config.data.sequence_length
    hours = {
        gpu.name: throughput.estimate(config, dims, gpu).hours(tokens)
        for gpu in GPUS
        if throughput.fits(gpu, peak)
    }
    return _Costs(steps if len(found.filled) else 0, hours if len(found.filled) else {})


def tree(config: RunConfig, found: Survey) -> dict[str, Any]:
    """What was found, as JSON values: what `ms4 data --json` prints."""
    return _tree(config, found, _costs(config, found))


def _tree(config: RunConfig, found: Survey, costs: _Costs) -> dict[str, Any]:
    counts = found.tally.counts()
    lengths = found.tally.sample_lengths
    length = config.data.sequence_length
    return {
        "format": found.format,
        "records": counts.pop("records"),
        "samples": counts.pop("samples"),
        "dropped": counts.pop("dropped"),
        "faults": found.faults.entries(),
        "tokens": counts.pop("tokens"),
        "trained_tokens": counts.pop("trained_tokens"),
        **counts,
        "images": found.tally.images,
        **found.tally.image_counts(),
        "files": {
            name: {
                "format": file.format,
                "records": file.records,
                "samples": file.samples,
                "unused": sorted(file.unused),
            }
            for name, file in found.files.items()
        },
        "lengths": {
            "median": int(np.median(lengths)) if len(lengths) else 0,
            "p95": int(np.percentile(lengths, 95)) if len(lengths) else 0,
            "longest": int(lengths.max(initial=0)),
        },
        "repeated": repeated(config.data.train),
        "packing": {
            "sequence_length": length,
            "sequences": len(found.filled),
            "fill": round(_fill(found, length), 6),
        },
        "steps": costs.steps,
        "hours": {gpu: round(hours, 4) for gpu, hours in costs.hours.items()},
    }


def _fill(found: Survey, length: int) -> float:
    return float(found.filled.sum() / (len(found.filled) * length)) if len(found.filled) else 0.0


def _report(config: RunConfig, found: Survey, costs: _Costs) -> list[str]:
    tally, length = found.tally, config.data.sequence_length
    lines = []
    for name, file in found.files.items():
        label = NAMES.get(file.format, file.format)  # type: ignore[call-overload]
        lines.append(f"{printable(name)}: {label}, {count(file.records, 'record')}")
        if file.unused:
            keys = ", ".join(f"`{printable(key)}`" for key in sorted(file.unused))
            lines.append(f"  nothing is made of {keys}")
    lines += map(printable, repeated(config.data.train))
    lines.append(
        f"{count(tally.records, 'record')}: {count(tally.samples, 'sample')}, "
        f"{tally.dropped:,} dropped"
    )
    if tally.samples:
        lines += _content(config, found, costs)
    lines += statements(tally, length)
    lines += _fault_lines(found)
    if not tally.samples:
        declare = ", or declare data.format or data.fields" if tally.records else ""
        lines.append(f"nothing can be used: correct the faults{declare}")
    return lines


def _content(config: RunConfig, found: Survey, costs: _Costs) -> list[str]:
    tally, length = found.tally, config.data.sequence_length
    lengths = tally.sample_lengths
    lines = [
        f"{count(tally.turns, 'turn')} of the assistant, {count(tally.tokens, 'token')}, "
        f"{tally.trained_tokens:,} of them trained ({tally.trained_tokens / tally.tokens:.1%})"
    ]
    lines += [
        f"effort {effort}: {count(counts['samples'], 'sample')}, "
        f"{counts['tokens'] / tally.tokens:.1%} of the tokens"
        for effort, counts in tally.by_effort.items()
        if counts["samples"]
    ]
    if tally.images:
        lines.append(image_tokens(tally))
    lines += [
        "",
        f"tokens of a sample: half have at most {int(np.median(lengths)):,}, "
        f"95 % at most {int(np.percentile(lengths, 95)):,}, the longest has {lengths.max():,}",
        *histogram(by_length(lengths)),
        "",
        f"packing: {count(len(found.filled), 'sequence')} of {length:,} tokens, "
        f"{_fill(found, length):.1%} full",
        *histogram(by_fill(found.filled, length)),
        "",
        f"training: {count(costs.steps, 'step')} "
        f"({config.train.micro_batch} × {config.train.accumulation} sequences each)",
    ]
    if costs.hours:
        lines.append(
            "hours, estimated from published ceilings: "
            + ", ".join(f"{hours:.2g} on {gpu}" for gpu, hours in costs.hours.items())
        )
    return lines


def _fault_lines(found: Survey) -> list[str]:
    faults = found.faults
    path = FAULTS if Path("config/config.yaml").is_file() else ALONE_FAULTS
    if not len(faults):
        if path == ALONE_FAULTS:  # of an earlier call
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return []
    try:
        listed, where = faults.write(path), f"all in {path}"
    except OSError as error:
        listed, where = faults.first(), f"{path} cannot be written: {error.strerror}"
    rest = len(faults) - found.by_settings
    told = [count(rest, "fault")] if rest else []
    if found.by_settings:
        told.append(f"{count(found.by_settings, 'record')} that settings leave out")
    return ["", f"{' and '.join(told)} ({where}):", *(f"  {printable(x)}" for x in listed)]
