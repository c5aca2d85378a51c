"""Shared parts of the benchmarks."""

from functools import partial

from timing import time_side_by_side


def test_candidates_take_turns_and_none_always_follows_the_same():
    ran = []
    names = ["a", "b", "c", "d"]
    times = time_side_by_side(
        {name: partial(ran.append, name) for name in names}, "cpu", seconds=0.0, min_runs=20
    )
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(names, 20)
    rounds = [ran[i : i + 4] for i in range(0, len(ran), 4)]
    assert len(rounds) == 21 and all(sorted(turns) == names for turns in rounds)  # one warms up
    before = {name: {ran[i - 1] for i in range(1, len(ran)) if ran[i] == name} for name in names}
    assert all(len(others) >= 3 for others in before.values())
