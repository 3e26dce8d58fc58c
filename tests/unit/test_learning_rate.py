"""The learning rate over a run's steps: where it begins, what it reaches, how it falls."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms4.config import TrainSection
from ms4.train.loop import learning_rate

SCHEDULES = ["cosine", "linear", "constant"]


def rates(steps: int, **values: object) -> list[float]:
    train = TrainSection.model_validate({"learning_rate": 1.0, **values})
    return [learning_rate(step, steps, train) for step in range(steps)]


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1, exclude_max=True),
    schedule=st.sampled_from(SCHEDULES),
)
def test_rises_to_the_peak_and_never_rises_again(steps: int, warmup: float, schedule: str) -> None:
    found = rates(steps, warmup=warmup, schedule=schedule)
    rising = math.ceil(warmup * steps)
    assert all(0 < rate <= 1 for rate in found)
    assert all(a < b for a, b in pairwise(found[:rising]))
    assert all(a >= b for a, b in pairwise(found[rising:]))
    if rising < steps:
        assert found[rising] == 1, "the peak is reached in the step after warm-up"


def test_warm_up_is_linear() -> None:
    found = rates(10, warmup=0.4, schedule="constant")[:5]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


def test_cosine_and_line_against_their_formulas() -> None:
    cosine, line = (rates(100, warmup=0.2, schedule=name) for name in ("cosine", "linear"))
    for step in range(20, 100):
        share = (step - 20) / 80
        assert cosine[step] == pytest.approx((1 + math.cos(math.pi * share)) / 2)
        assert line[step] == pytest.approx(1 - share)
    assert (cosine[60], line[60]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert rates(100, warmup=0.0, schedule="constant") == [1.0] * 100


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_learns(schedule: str) -> None:
    assert rates(1, schedule=schedule)[0] > 0
