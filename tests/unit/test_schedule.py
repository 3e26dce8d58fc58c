"""The disk while shards come and go: the published model's numbers, and any order of arrival."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms4 import spec
from ms4.weights.schedule import Schedule, as_published

GB = 1e9


@pytest.mark.parametrize(
    ("to", "kept", "freed"), [("nf4", 187.6, 127.1), ("bf16", 359.7, 270.5), ("fp8", 241.8, 172.3)]
)
def test_the_published_model(to: str, kept: float, freed: float) -> None:
    """Layers 14 and 29 straddle two shards: two of them stand there at a time."""
    whole = as_published(spec.Dimensions(), to, free=False)
    assert list(whole.shards.values()) == [49_078_433_296, 49_132_710_896, 22_711_829_744]
    straddling = [piece for piece, shards in whole.needs.items() if len(shards) > 1]
    assert straddling == ["layer-14.safetensors", "layer-29.safetensors"]
    assert whole.peak() == sum(whole.shards.values()) + sum(whole.pieces.values())
    assert whole.peak() / GB == pytest.approx(kept, abs=0.1)
    assert as_published(spec.Dimensions(), to, free=True).peak() / GB == pytest.approx(
        freed, abs=0.1
    )


def test_by_hand() -> None:
    """Shards a, b, c of 10, 20, 30; piece 1 of a, 2 of a and b, 3 of c; each twice its shards."""
    schedule = Schedule(
        shards={"a": 10, "b": 20, "c": 30},
        here={"a": 10, "b": 5, "c": 0},
        pieces={"1": 20, "2": 60, "3": 60},
        replaced={"1": 7, "2": 0, "3": 0},
        needs={"1": {"a"}, "2": {"a", "b"}, "3": {"c"}},
        free=True,
    )
    # a is here. 1: +20, its old file goes: 13. b: +15 = 28. 2: +60 = 88; a and b go: 58.
    # c: +30 = 88. 3: +60 = 148; c goes: 118.
    assert schedule.peak() == 148
    assert schedule.peak(begun={"c"}) == 148
    assert schedule.ready({"a"}, set()) == ["1"]
    assert schedule.ready({"a", "b"}, set()) == ["1", "2"]
    assert schedule.ready({"a", "c"}, {"1"}) == []  # c has come before b, and waits for it
    assert schedule.unneeded({"1", "2"}) == {"a", "b"}
    assert schedule.peak({"b", "c"}, done={"1", "2", "3"}) == 13 + 60 + 60 - 10 - 5


schedules = st.builds(
    lambda dice, shards, pieces: _random(random.Random(dice), shards, pieces),
    st.integers(),
    st.integers(1, 6),
    st.integers(0, 8),
)


def _random(dice: random.Random, shards: int, pieces: int) -> Schedule:
    names = [f"s{number}" for number in range(shards)]
    sizes = {name: dice.randint(1, 100) for name in names}
    made = [f"p{number}" for number in range(pieces)]
    return Schedule(
        shards=sizes,
        here={
            name: dice.choice([0, 0, size // 2, size]) if dice.random() < 0.5 else 0
            for name, size in sizes.items()
        },
        pieces={name: dice.randint(0, 100) for name in made},
        replaced={name: dice.choice([0, 0, dice.randint(0, 100)]) for name in made},
        needs={name: set(dice.sample(names, dice.randint(1, min(3, shards)))) for name in made},
        free=True,
    )


@given(schedule=schedules, order=st.randoms(use_true_random=False))
def test_whatever_arrives_first_the_peak_holds(schedule: Schedule, order: random.Random) -> None:
    """The rules by which shards are begun, pieces made and shards freed; downloads end in any
    order. It always comes to its end, and never takes more than was foretold."""
    most = schedule.peak()
    size = {name: schedule.here[name] for name in schedule.shards}
    arrived = {name for name in schedule.shards if size[name] == schedule.shards[name]}
    pending = [name for name in schedule.shards if name not in arrived]
    begun: set[str] = set()
    done: set[str] = set()
    added, before = 0, sum(size.values())

    def used() -> int:
        return added + sum(size.values()) - before

    assert used() <= most
    while True:
        for shard in schedule.unneeded(done) & arrived:
            size[shard] = 0
        ready = schedule.ready(arrived, done)
        while pending:
            idle = not (ready or begun)
            if not idle and schedule.peak(arrived, begun | {pending[0]}, done) > most:
                break
            begun.add(pending.pop(0))
        # Whatever is under way may be nearly here when the pieces are made.
        for shard in begun:
            size[shard] = schedule.shards[shard]
        assert used() <= most
        if ready and (not begun or order.random() < 0.5):
            for piece in ready:
                added += schedule.pieces[piece]
                assert used() <= most
                added -= schedule.replaced[piece]
                done.add(piece)
        elif begun:
            come = order.choice(sorted(begun))
            begun.discard(come)
            arrived.add(come)
        else:
            break
    assert not pending
    assert done == set(schedule.pieces)
    assert not any(size.values())
