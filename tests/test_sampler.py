"""Which samples a step sees is a pure function of (seed, position)."""

from itertools import islice

import pytest

from data.sampler import EndlessBatches, order, sample_rng


def take(batches, n):
    return list(islice(iter(batches), n))


@pytest.mark.parametrize("length, size", [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_seeking_equals_counting(length, size):
    straight = take(EndlessBatches(length, size, seed=4), 40)
    whole = EndlessBatches(length, size, seed=4)
    for n in range(30):
        position = whole.after(n)
        assert take(EndlessBatches(length, size, seed=4, position=position), 10) == straight[n : n + 10], n
        again = EndlessBatches(length, size, seed=4, position=position)
        assert [again.after(k) for k in range(9)] == [whole.after(n + k) for k in range(9)]


def test_an_epoch_visits_each_sample_once_in_an_order_of_its_own():
    batches = take(EndlessBatches(12, 4, seed=1), 6)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == [(0, i) for i in range(12)]
    assert sorted(second) == [(1, i) for i in range(12)]
    assert [i for _, i in first] != [i for _, i in second]
    assert order(1, 0, 12) != order(2, 0, 12)
    assert [i for _, i in sum(take(EndlessBatches(12, 4, shuffle=False), 3), [])] == list(range(12))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_global_sequence_does_not_depend_on_the_world_size(world):
    straight = take(EndlessBatches(20, 6, seed=9), 8)
    ranks = [take(EndlessBatches(20, 6, seed=9, rank=r, world_size=world), 8) for r in range(world)]
    for step, batch in enumerate(straight):
        assert [key for keys in ranks for key in keys[step]] == batch


def test_epochs_are_counted():
    batches = EndlessBatches(10, 3)
    assert [n for n in range(1, 13) if batches.ends_epoch(n)] == [3, 6, 9, 12]
    assert [n for n in range(1, 13) if batches.ends_epoch(n, every=2)] == [6, 12]
    assert not batches.ends_epoch(0)
    resumed = EndlessBatches(batches.length, batches.batch_size, position=batches.after(6))  # what was due is still
    assert resumed.ends_epoch(0, every=2) and not resumed.ends_epoch(1)
    assert batches.batches_until(4) == 12
    assert EndlessBatches(10, 3, position=(1, 3)).batches_until(4) == 8
    assert EndlessBatches(10, 3, position=(5, 0)).batches_until(4) == 0


def test_augmentation_differs_by_each_of_seed_epoch_index():
    draws = {sample_rng(s, e, i).random() for s in range(3) for e in range(3) for i in range(3)}
    assert len(draws) == 27
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random()


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="the training set has 3 samples"):
        EndlessBatches(3, 4)
    with pytest.raises(ValueError, match="can't be shared by 3"):
        EndlessBatches(30, 4, world_size=3)
