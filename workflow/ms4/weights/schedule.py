"""What stands on the disk while shards come, pieces of a base are made of them, and shards go.

With freeing, a piece waits for all shards up to its last one, and those that wait for fewer are
made first, in whatever order the shards arrive. So what is on the disk at each moment follows from
sizes alone, and the most is known before anything is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from ms4 import spec
from ms4.weights.shards import table_bytes
from ms4.weights.tables import piece_bytes, pieces


@dataclass(frozen=True)
class Schedule:
    """A conversion that goes along with a fetch."""

    shards: Mapping[str, int]
    """Bytes of the shards, in the order in which they are fetched."""
    here: Mapping[str, int]
    """Bytes of a shard, or of its partial file, that are on the disk when it begins."""
    pieces: Mapping[str, int]
    """Bytes that each piece that is to be made adds to the disk, in the order of making; 0 for one
    that is there and only has to be compared with the source."""
    replaced: Mapping[str, int]
    """Bytes of an old file that goes when a piece takes its place."""
    needs: Mapping[str, Set[str]]
    """Piece → the shards that it is made of."""
    free: bool
    """Shards go when nothing needs them any more."""

    def in_order(self) -> list[tuple[str, Set[str]]]:
        """The pieces in the order of making, and the shards that must be whole before."""
        if not self.free:
            return list(self.needs.items())
        shards = list(self.shards)
        last = {p: max(shards.index(shard) for shard in some) for p, some in self.needs.items()}
        return [(p, set(shards[: last[p] + 1])) for p in sorted(self.pieces, key=last.__getitem__)]

    def ready(self, whole: Set[str], done: Set[str]) -> list[str]:
        """The pieces to make now, up to those after which a shard can go."""
        found: list[str] = []
        gone = self.unneeded(done)
        for piece, wanted in self.in_order():
            if piece not in done and wanted <= whole:
                found.append(piece)
                if self.free and self.unneeded(done | set(found)) > gone:
                    break
        return found

    def unneeded(self, done: Set[str]) -> set[str]:
        """The shards that no piece needs which is not done."""
        needed = {s for piece, some in self.needs.items() if piece not in done for s in some}
        return set(self.shards) - needed

    def peak(
        self,
        come: Set[str] = frozenset(),
        begun: Set[str] = frozenset(),
        done: Set[str] = frozenset(),
    ) -> int:
        """The most bytes that shards and pieces will take together beyond what the disk held when
        the schedule began.

        Args:
            come: shards that came since, and may have been freed by now.
            begun: shards that are on their way: counted whole from now on.
            done: pieces that were made since, and compared if shards are freed.
        """
        whole = {shard for shard, size in self.shards.items() if self.here[shard] == size}
        return max(0, *self._sizes(whole | come, set(begun), set(done)))

    def _sizes(self, come: set[str], begun: set[str], done: set[str]) -> Iterator[int]:
        """What is added to the disk, whenever it changes."""
        size = sum(self.pieces[piece] - self.replaced[piece] for piece in done)
        size += sum(self.shards[shard] - self.here[shard] for shard in come | begun)
        gone: set[str] = set()
        for shard in (None, *self.shards):
            if shard is not None:
                if shard not in come | begun:
                    size += self.shards[shard] - self.here[shard]
                    yield size
                come.add(shard)
            while True:
                # As it is done: first what may go goes, then what may be made is made.
                going = (self.unneeded(done) & come) - gone if self.free else set()
                size -= sum(self.shards[shard] for shard in going)
                gone |= going
                yield size
                ready = self.ready(come, done)
                if not ready:
                    break
                for piece in ready:
                    size += self.pieces[piece]
                    yield size
                    size -= self.replaced[piece]
                    done.add(piece)


def as_published(dims: spec.Dimensions, to: str, *, free: bool) -> Schedule:
    """The schedule of a whole conversion, of shards that are cut as the published ones.

    Args:
        dims: of the model.
        to: how the base stores FP8 tensors.
        free: whether shards are freed.
    """
    table = spec.disk_tensors(dims)
    shards = {f"{n}": names for n, names in enumerate(spec.plan_shards(table))}
    holder = {name: shard for shard, names in shards.items() for name in names}
    sizes = piece_bytes(dims, to)
    return Schedule(
        shards={shard: table_bytes({n: table[n] for n in some}) for shard, some in shards.items()},
        here=dict.fromkeys(shards, 0),
        pieces=sizes,
        replaced=dict.fromkeys(sizes, 0),
        needs={
            name: {holder[stored] for t in tensors for stored in (t.disk, *t.scales())}
            for name, tensors in pieces(dims).items()
        },
        free=free,
    )
