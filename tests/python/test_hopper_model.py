"""The Hopper kernel's rings and barriers, by a model (hopper_model.py) under random interleavings."""

import random

import pytest

from hopper_model import CHUNK, Block, sizes

PIECES = {
    "short and empty": lambda r: [r.choice([0, 0, 0, 5, 16, 40]) for _ in range(r.randint(0, 60))],
    "long runs of empty ones": lambda r: (
        [0] * r.randint(0, 50) + [r.randint(1, 200)] + [0] * 60 + [33] + [0] * 20
    ),
    "one chunk each": lambda r: [r.randint(1, 16) for _ in range(r.randint(1, 60))],
    "long": lambda r: [r.randint(1, 400) for _ in range(r.randint(1, 6))],
    "by falling length": lambda r: sorted(
        (r.choice([0, r.randint(0, 120)]) for _ in range(50)), reverse=True
    ),
    "none": lambda r: [],
}


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("rows", [64, 128])
def test_every_chunk_once_and_in_order(rows, kind):
    for seed in range(12):
        lengths = PIECES[kind](random.Random(seed))
        block = Block(lengths, seed, rows)
        block.run()
        wanted = []
        for piece, length in enumerate(lengths):
            wanted += [(piece, chunk) for chunk in range(-(-length // CHUNK))] + [(piece, "state")]
        assert all(done == wanted for done in block.done), (seed, lengths)


def test_sizes_are_read_from_the_headers():
    assert [sizes(rows)["TEAMS"] for rows in (128, 64)] == [3, 4]
    assert [sizes(rows)["SOLVERS"] for rows in (128, 64)] == [1, 2]


def run_some(lengths, **sizes):
    for seed in range(40):
        Block(lengths, seed, rows=64, **sizes).run()


def test_the_model_finds_a_round_taken_for_another():
    """Three solvers and four teams: a solver meets a team's products in every third round only, and parities repeat."""
    with pytest.raises(AssertionError, match=r"products|overwritten|arrivals|deadlock|stage"):
        run_some([300, 200], SOLVERS=3)


def test_the_model_finds_a_ring_that_teams_do_not_divide():
    """Then nobody has seen a slot's last round come to its end, and copies may overtake each other."""
    with pytest.raises(AssertionError, match=r"inputs|overwritten|arrivals|deadlock|stage"):
        run_some([400, 400], SLOTS=5)


def test_the_model_finds_a_slot_given_back_too_early():
    """As if the recurrence's warps did not all have to be done with a chunk."""

    def run_all():
        for seed in range(40):
            block = Block([400, 400], seed)
            for barrier in block.chunks.empty:
                barrier.count = barrier.missing = 1
            block.run()

    with pytest.raises(AssertionError, match=r"in use|overwritten|arrivals|deadlock|stage"):
        run_all()
