"""The stage `preprocess`: conversations → packed tokens, masks and test prompts.

All data is read and checked before anything is written, and all faults are reported together.
The same input gives the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from ms4 import manifest
from ms4.config import EFFORTS, DataSection, RunConfig
from ms4.data import split
from ms4.data.chat import Chat
from ms4.data.conversation import Conversation
from ms4.data.faults import Faults, SampleFault
from ms4.data.format_names import NAMES
from ms4.data.formats import Reading, in_its_names, to_conversation
from ms4.data.image_store import ImageStoreWriter
from ms4.data.packed import PackedData as PackedData
from ms4.data.packed import PackedWriter
from ms4.data.packed import TestSample as TestSample
from ms4.data.packed import load_packed as load_packed
from ms4.data.packed import read_test as read_test
from ms4.data.packing import Int64s, pack
from ms4.data.prepare import (
    FileResult,
    Outcome,
    Recipe,
    Sample,
    documents,
    looked_at,
    read_files,
    started,
)
from ms4.data.progress import ByteProgress
from ms4.data.readers import parse_row
from ms4.data.reasoning import check_order
from ms4.data.render import EXAMPLE_CHARACTERS as EXAMPLE_CHARACTERS
from ms4.data.render import count
from ms4.data.render import render_example as render_example
from ms4.data.sources import Source, expand, repeated
from ms4.data.statements import image_tokens, statements, too_long
from ms4.data.tables import pinned
from ms4.data.tally import Tally
from ms4.errors import Ms4Error, printable

SOURCE = Path("weights/source.json")
TRAIN = Path("data/packed/train.safetensors")
TEST = Path("data/packed/test.jsonl")
IMAGES = Path("data/packed/images.safetensors")
FAULTS = Path("data/faults.txt")
RESULT = Path("results/data.json")

HOLDOUT = "holdout"
"""The held-out set that `data.holdout` takes from the training data."""
NEAR_LISTED = 20


@dataclass
class _HeldOut:
    """The held-out sets: what is written of them, and what training data is compared with."""

    out: TextIO
    store: ImageStoreWriter | None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    places: dict[bytes, str] = field(default_factory=dict)
    near: split.NearDuplicates = field(default_factory=split.NearDuplicates)
    sources: list[Source] = field(default_factory=list)

    def add(self, chat: Chat, name: str, place: str, line: int, conversation: Conversation) -> None:
        """Write a sample in every effort.

        Raises:
            SampleFault: it cannot be encoded, or has no answer to compare with.
        """
        where = f"{name}, {place}:{line}"
        self.places.setdefault(conversation.key(), where)
        samples = _test_samples(chat, name, line, conversation, self.store)
        self.near.add(where, split.signature(split.text_of(conversation)))
        counts = self.counts.setdefault(name, {"samples": 0, "tokens": 0})
        counts["samples"] += 1
        for sample in samples:
            counts["tokens"] += len(sample.tokens or ())
            self.out.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")


@dataclass
class _Training:
    """What reading the training files gave."""

    tally: Tally = field(default_factory=Tally)
    copies: list[int] = field(default_factory=list)
    """How often each document is taken in an epoch."""
    formats: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    held_out: int = 0
    first: tuple[str, Sample] | None = None
    """Place and sample of the first one, for the example."""
    longest: int = 0


def _read_held_out(
    recipe: Recipe,
    chat: Chat,
    faults: Faults,
    held_out: _HeldOut,
    on_bytes: Callable[[int], None],
) -> None:
    data = recipe.data
    for name, path in data.test.items():
        held_out.counts[name] = {"samples": 0, "tokens": 0}
        for source in map(pinned, expand([path])):
            held_out.sources.append(source)
            format, rows = looked_at(source, data, on_bytes)
            reading = Reading.of(format, data)
            for row in rows:
                try:
                    conversation = to_conversation(parse_row(row), reading)
                    conversation = recipe.resolved(conversation, source)
                    held_out.add(chat, name, source.name, row.line or 0, conversation)
                except SampleFault as fault:
                    faults.add(source.name, row.line, in_its_names(str(fault), reading))


def _test_samples(
    chat: Chat, name: str, line: int, conversation: Conversation, store: ImageStoreWriter | None
) -> list[TestSample]:
    """A held-out conversation in every effort, whichever of them is evaluated."""
    if conversation.plain is not None:
        raise SampleFault("plain text has no answer to compare with; give conversations")
    check_order(conversation)
    conversation = conversation.all_trained()
    plain = conversation.without_thinking()
    encoded = {"none": chat.encode(plain, "none"), "high": chat.encode(conversation, "high")}
    last_turn = encoded["none"].tokens[encoded["none"].last_turn :].tolist()
    _, answer, _ = chat.decode_answer(last_turn, "none")
    numbers = [store.add(image) for image in encoded["none"].images] if store is not None else []
    samples = []
    for effort in EFFORTS:
        whole = effort == "none" or conversation.ends_with_thinking
        samples.append(
            TestSample(
                set=name,
                line=line,
                effort=effort,
                prompt=encoded[effort].prompt.tolist(),
                tokens=encoded[effort].tokens.tolist() if whole else None,
                trained=encoded[effort].trained.tolist() if whole else None,
                answer=answer,
                images=numbers,
            )
        )
    return samples


class _Signatures:
    """Signatures of the training samples, in a file: held-out samples may come after them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines, self._sources = array("q"), array("q")
        self._names: dict[str, int] = {}

    def add(self, name: str, line: int, signature: split.Signature) -> None:
        """Note the signature of a sample."""
        self._file.write(signature.tobytes())
        self._lines.append(line)
        self._sources.append(self._names.setdefault(name, len(self._names)))

    def alike(self, near: split.NearDuplicates) -> Iterator[dict[str, Any]]:
        """Yield each sample that is nearly one of the held-out ones."""
        self._file.seek(0)
        names = list(self._names)
        for line, source in zip(self._lines, self._sources, strict=True):
            raw = self._file.read(4 * split.PERMUTATIONS)
            found = near.find(np.frombuffer(raw, dtype=np.uint32))
            if found is not None:
                place, similarity = found
                yield {
                    "sample": f"{names[source]}:{line}",
                    "held_out": place,
                    "similarity": round(float(similarity), 2),
                }


def copies_of(key: bytes, weight: float) -> int:
    """How often a sample is taken at this weight; a fraction by the sample's content."""
    whole = int(weight)
    if whole == weight:
        return whole
    # Not the key itself: `holdout` decides by that, and the two choices must not go together.
    digest = hashlib.sha256(b"weight" + key).digest()
    return whole + (int.from_bytes(digest[:8], "big") < (weight - whole) * 2.0**64)


class _Reader:
    """Takes the training data, file by file."""

    def __init__(
        self,
        data: DataSection,
        chat: Chat,
        held_out: _HeldOut,
        writer: PackedWriter,
        store: ImageStoreWriter | None,
        signatures: _Signatures,
        faults: Faults,
        left_out: Faults,
    ) -> None:
        self._data = data
        self._chat = chat
        self._held_out = held_out
        self._writer = writer
        self._store = store
        self._signatures = signatures
        self._faults = faults
        self._left_out = left_out
        self.training = _Training()

    def file(self, result: FileResult) -> None:
        """Take one file's outcomes."""
        name, training = result.source.name, self.training
        training.formats[name] = NAMES[result.format]
        unused: set[str] = set()
        for batch in result.batches:
            unused |= batch.unused
            for outcome in batch.outcomes:
                self._outcome(outcome, result.source)
        if unused:
            training.unused[name] = sorted(unused)

    def _outcome(self, outcome: Outcome, source: Source) -> None:
        tally, place = self.training.tally, f"{source.name}:{outcome.line}"
        sample, refused = outcome.sample, outcome.refused
        twin = self._held_out.places.get(sample.key) if sample is not None else None
        if sample is not None and sample.conversation is not None and twin is not None:
            # Of two samples of the same words both are held out by content: nothing leaks.
            twin = None if twin.startswith(f"{HOLDOUT}, ") else twin
        if twin is not None:
            refused = (
                f"stands word for word in a held-out set ({twin}), which would make the "
                "evaluation lie; remove it from one of them"
            )
        elif sample is not None and sample.conversation is not None:
            try:
                self._held_out.add(
                    self._chat, HOLDOUT, source.name, outcome.line or 0, sample.conversation
                )
                self.training.held_out += 1
                tally.records += 1
                return
            except SampleFault as fault:
                refused = str(fault)
        if sample is None or refused:
            tally.refuse(outcome, place)
            # A fault of a whole file stops in any case: no one chose to leave that out.
            stops = outcome.fault and (self._data.faulty == "error" or outcome.of_file)
            into = self._faults if stops else self._left_out
            into.add(source.name, outcome.line, refused)
            return
        tally.take(sample)
        copies = copies_of(sample.key, self._data.weights.get(source.entry, 1.0))
        if copies:
            self._keep(sample, place, copies)
            if sample.signature is not None:
                self._signatures.add(source.name, outcome.line or 0, sample.signature)

    def _keep(self, sample: Sample, place: str, copies: int) -> None:
        training = self.training
        training.first = training.first or (place, sample)
        for tokens, trained in documents(sample, self._data.sequence_length):
            self._writer.add(tokens, trained)
            if self._store is not None:
                self._store.add_document(sample.encoded.images)
            training.copies.append(copies)
            training.longest = max(training.longest, len(tokens))


def load_chat(data: DataSection) -> Chat:
    """The tokenizer of the weights, checked against their manifest."""
    source = manifest.read_manifest(SOURCE, "fetch")
    directory = Path(source["directory"])
    entries = [entry for entry in source["files"] if entry["path"] == "tekken.json"]
    if not entries:
        raise Ms4Error(f"{SOURCE}: lists no tekken.json. Remove it and run `ms4 fetch` again.")
    manifest.check_files({**source, "files": entries}, directory, hashes=True)
    return Chat(directory / "tekken.json", data.images.max_size)


def _pack(
    training: _Training, lengths: Int64s, data: DataSection
) -> tuple[Int64s, Int64s, dict[str, Any]]:
    """Documents of the bins, their starts, and what the manifest says of them."""
    taken = np.repeat(np.arange(len(lengths)), np.array(training.copies, dtype=np.int64))
    documents, starts = pack(lengths[taken], data.sequence_length, data.packing)
    bins, tokens = len(starts) - 1, int(lengths[taken].sum())
    return (
        taken[documents],
        starts,
        {
            "documents": len(lengths),
            "bins": bins,
            "fill": round(tokens / (bins * data.sequence_length), 6),
            "longest": training.longest,
        },
    )


def _print_statement(
    data: DataSection,
    chat: Chat,
    training: _Training,
    train: dict[str, Any],
    test: dict[str, dict[str, int]],
) -> None:
    length = data.sequence_length
    efforts = ", ".join(
        f"{counts['samples']:,} {effort}" for effort, counts in train["by_effort"].items()
    )
    share = train["trained_tokens"] / train["tokens"]
    lines = [f"{printable(name)}: {format}" for name, format in training.formats.items()]
    lines += [
        printable(f"{name}: nothing is made of {', '.join(f'`{key}`' for key in keys)}")
        for name, keys in training.unused.items()
    ]
    lines += map(printable, repeated(data.train))
    lines.append(
        f"training data: {count(train['samples'], 'sample')} ({efforts}), "
        f"{train['tokens']:,} tokens, {share:.1%} of them trained"
    )
    lines.append(
        f"packed into {count(train['bins'], 'sequence')} of {length:,} tokens, "
        f"{train['fill']:.1%} full; the longest sample has {train['longest']:,} tokens"
    )
    if other := training.tally.dropped - training.tally.too_long:
        lines.append(f"dropped for other reasons: {count(other, 'record')} (in {FAULTS})")
    if training.tally.images:
        lines.append(image_tokens(training.tally))
    lines += statements(training.tally, length)
    if near := train["near_duplicates"]["count"]:
        worst = train["near_duplicates"]["first"][0]
        lines.append(
            f"nearly the same as held-out samples: {count(near, 'sample')}, {worst['sample']} and "
            f"{worst['held_out']} for one"
        )
    lines += [f"held-out set {name}: {count(c['samples'], 'sample')}" for name, c in test.items()]
    if training.first is not None:
        place, sample = training.first
        lines.append(
            f"what the model sees of {printable(place)}, with ⟦what is trained⟧:\n"
            f"{render_example(chat, sample.encoded)}"
        )
    print("\n".join(lines), flush=True)


def run_stage(config: RunConfig) -> None:
    """Turn the configured conversations into packed tokens in the current project.

    Raises:
        Ms4Error: names all that is wrong with the data, or what cannot be written.
    """
    try:
        _run(config)
    except OSError as error:  # of what is written: what is read has faults
        where = error.filename or TEST.parent
        raise Ms4Error(
            f"{where}: cannot be written ({error.strerror or error}); make room, or the project's "
            "directories writable, and run again"
        ) from error


def _run(config: RunConfig) -> None:
    data = config.data
    chat = load_chat(data)
    sources = [pinned(source) for source in expand(data.train)]
    local = [source.path for source in (*sources, *expand(data.test.values())) if not source.hub]
    size = sum(path.stat().st_size for path in local if path.is_file())
    faults, left_out = Faults(config.data_files()), Faults(config.data_files())
    TEST.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in TEST.parent.glob(".*.tmp"):
        left_by_a_kill.unlink()
    # What was made of other data must not seem to be of this.
    RESULT.unlink(missing_ok=True)
    temporary = TEST.with_name(f".{TEST.name}.{os.getpid()}.tmp")
    spool = TEST.with_name(f".signatures.{os.getpid()}.tmp")
    with_images = data.modality == "text_vision"
    compared = bool(data.test) or data.holdout > 0
    workers = config.run.threads or len(os.sched_getaffinity(0))
    try:
        with (
            temporary.open("w", encoding="utf-8") as out,
            spool.open("w+b") as signatures,
            PackedWriter(TRAIN) as writer,
            ExitStack() as stack,
        ):
            store = None
            if with_images:
                largest = data.images.max_size
                store = stack.enter_context(ImageStoreWriter(IMAGES, largest, workers))
            recipe = Recipe(data, with_images=with_images, signatures=compared)
            held_out, near = _HeldOut(out, store), _Signatures(signatures)
            reader = _Reader(data, chat, held_out, writer, store, near, faults, left_out)
            with (
                started(chat, recipe, workers, size) as pool,
                ByteProgress("conversations", size) as progress,
            ):
                # Held-out sets first: a training sample is then looked up among theirs.
                _read_held_out(recipe, chat, faults, held_out, progress.advance)
                for result in read_files(sources, pool, data, progress.advance):
                    reader.file(result)
            training, tally = reader.training, reader.training.tally
            refused = tally.too_long and data.too_long == "error"
            faults.raise_any(FAULTS, too_long(tally, data.sequence_length) if refused else "")
            left_out.write(FAULTS)
            if not training.copies:
                raise Ms4Error(f"nothing is left to train on: {_why_nothing(tally, data)}")
            alike = list(near.alike(held_out.near))
            documents, starts, packed = _pack(training, writer.lengths, data)
            train_hash = writer.finish(documents, starts)
            images = {**store.finish(), **tally.image_counts()} if store is not None else {}
            out.flush()
            manifest.commit_file(temporary, TEST)
    finally:
        temporary.unlink(missing_ok=True)
        spool.unlink(missing_ok=True)

    train = {
        **tally.counts(),
        **packed,
        "held_out": training.held_out,
        "formats": training.formats,
        "unused": training.unused,
        "near_duplicates": {"count": len(alike), "first": alike[:NEAR_LISTED]},
        **({"images": images} if with_images else {}),
    }
    manifest.write_manifest(
        RESULT,
        "preprocess",
        config_hash=config.part_hash("preprocess"),
        inputs=[SOURCE, *local],
        files=[
            manifest.file_entry(TRAIN, Path(), train_hash),
            *(manifest.file_entry(path, Path()) for path in (TEST, IMAGES)[: 1 + with_images]),
        ],
        hub={s.name: s.hub.revision for s in (*sources, *held_out.sources) if s.hub},
        train=train,
        test=held_out.counts,
    )
    _print_statement(data, chat, training, train, held_out.counts)


def _why_nothing(tally: Tally, data: DataSection) -> str:
    if tally.too_long:
        return f"{too_long(tally, data.sequence_length)}. Raise data.sequence_length."
    if tally.samples:
        return "data.weights leaves out every sample. Raise a weight, or give more data."
    return f"{count(tally.dropped, 'record')} dropped (in {FAULTS}). Correct the data."
