import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler

from timm_dearkd.engine.seeding import EpochBatchSampler, SeededErasing, get_rng_state, seeded, set_rng_state


def draw():
    """A number of each generator."""
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seeded_numbers_depend_on_the_key_alone_and_leave_the_others():
    set_rng_state(state := get_rng_state())
    expected = [draw(), draw()]
    set_rng_state(state)
    found = {}
    first = draw()
    for key in ((0, 1), (1, 0), (0, 1)):
        with seeded(*key):
            numbers = draw()
        assert found.setdefault(key, numbers) == numbers
    assert [first, draw()] == expected
    assert all(len(set(numbers)) == 2 for numbers in zip(*found.values()))


def test_numbers_outside_stay_when_the_code_inside_fails():
    state = get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(0):
        draw(), 1 / 0
    found = draw()
    set_rng_state(state)
    assert found == draw()


def test_batches_know_their_epoch_and_their_place_among_all_processes():
    batches = []
    for rank in (0, 1):
        sampler = DistributedSampler(range(12), num_replicas=2, rank=rank, seed=3)
        batches.append(EpochBatchSampler(BatchSampler(sampler, 2, drop_last=True), rank, world_size=2))
        batches[-1].set_epoch(5)
    whole = [list(sampler) for sampler in batches]
    places = [place for step in zip(*whole) for pair in zip(*step) for _, place, _ in pair]
    assert places == list(range(12))
    order = DistributedSampler(range(12), num_replicas=1, rank=0, seed=3)
    order.set_epoch(5)
    by_place = {place: index for rank in whole for batch in rank for _, place, index in batch}
    assert [by_place[place] for place in range(12)] == list(order)
    assert {epoch for rank in whole for batch in rank for epoch, _, _ in batch} == {5}
    batches[1].set_epoch(5, first_batch=2)
    assert list(batches[1]) == whole[1][2:]


def test_erased_areas_depend_on_the_batch_and_not_on_those_before():
    erasing = SeededErasing(lambda images: images * torch.rand(4), 0, torch.device('cpu'))
    erasing.set_epoch(1)
    whole = [erasing(torch.ones(4)) for _ in range(3)]
    erasing.set_epoch(1, first_batch=2)
    assert erasing(torch.ones(4)).equal(whole[2]) and not whole[1].equal(whole[2])
