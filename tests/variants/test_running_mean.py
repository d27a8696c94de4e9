"""Moving averages."""

import math

import torch
from temposae.variants.running_mean import RunningMean


def test_running_means_are_those_of_what_came(assert_close):
    mean = RunningMean(0.9, 3, 2, start=5.0)
    total = torch.tensor([[2.0, 4.0], [0.0, 0.0], [9.0, 3.0]])
    mean.add_mean(total, torch.tensor([2.0, 0.0, 3.0]))
    assert mean.value.tolist() == [[1, 2], [5, 5], [3, 1]]
    assert mean.known.tolist() == [[True, True], [False, False], [True, True]]
    mean.add_mean(2 * total, torch.tensor([2.0, 0.0, 0.0]))
    assert_close(mean.value, torch.tensor([[1.1, 2.2], [5, 5], [3, 1]]), 1e-6)


def test_relative_means_are_one_on_average(assert_close):
    mean = RunningMean(0.99, 4)
    assert mean.relative().tolist() == [1, 1, 1, 1]
    mean.add_mean(torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert_close(mean.relative(), torch.tensor([0.5, 1, 1.5, 1]), 1e-6)


def test_an_average_begins_as_the_first_value_and_moves_where_there_is_a_new_one():
    average = RunningMean(0.9, 2, start=0.5)
    assert average.value.tolist() == [0.5, 0.5]
    average.add(torch.tensor([2.0, math.nan]), torch.tensor([True, False]))
    assert average.value.tolist() == [2.0, 0.5]
    average.add(torch.tensor([3.0, 7.0]))
    torch.testing.assert_close(average.value, torch.tensor([0.9 * 2 + 0.1 * 3, 7.0]))
    average.add(torch.tensor([100.0, 8.0]), torch.tensor([False, True]))
    torch.testing.assert_close(average.value, torch.tensor([2.1, 0.9 * 7 + 0.1 * 8]))
