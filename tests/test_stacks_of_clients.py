"""Which clients train in one stack: one batch length each, most steps first, whoever asks."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from selffl_ray.client_data import ClientData
from selffl_ray.training import Rows, TrainingConfig


def data_of(num_examples):
    """A host's clients, by index, with so many training examples."""
    data = ClientData.__new__(ClientData)
    data.clients = dict.fromkeys(sorted(num_examples))
    data.place = {index: place for place, index in enumerate(data.clients)}
    num = torch.tensor([num_examples[index] for index in data.clients], dtype=torch.int64)
    data._rows = {"train": Rows(torch.empty(0), torch.empty(0), torch.cumsum(num, 0) - num, num)}
    return data


SIZES = st.dictionaries(st.integers(0, 99), st.integers(1, 70), min_size=1, max_size=30)


@given(num=SIZES, size=st.integers(1, 9), epochs=st.sampled_from([None, 1, 3]), draw=st.data())
def test_stacks_hold_the_asked_clients_of_one_batch_length_by_descending_steps(
    num, size, epochs, draw
):
    training = TrainingConfig(batch_size=16, num_local_epochs=epochs)
    asked = draw.draw(st.permutations(sorted(num)))[: draw.draw(st.integers(0, len(num)))]
    stacks = data_of(num).stacks(asked, training, size)
    assert stacks == data_of(num).stacks(set(asked), training, size)
    assert sorted(i for stack in stacks for i in stack) == sorted(asked)
    for stack in stacks:
        assert len({training.batch_length(num[i]) for i in stack}) == 1
        keys = [(-training.steps(num[i]), i) for i in stack]
        assert keys == sorted(keys)
    heads = [training.batch_length(num[stack[0]]) for stack in stacks]
    assert heads == sorted(heads)
    for stack, following in pairwise(stacks):
        same = training.batch_length(num[stack[0]]) == training.batch_length(num[following[0]])
        assert len(stack) == size or not same, "a stack is full before the next begins"


def test_nobody_makes_no_stack():
    assert data_of({3: 5}).stacks([], TrainingConfig(), 4) == []
