"""Schedule and moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samunet.training.optim import MovingAverage, learning_rate_factor


def test_the_rate_warms_up_linearly_and_decays_to_zero():
    """Half-way through the warm-up it is half; at the end of the run it is zero."""
    assert learning_rate_factor(4, 0.0, warmup_steps=10) == pytest.approx(0.5)
    assert learning_rate_factor(100, 0.5, warmup_steps=10) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(100, 1.0, warmup_steps=10) == 0
    assert learning_rate_factor(100, 1.7, warmup_steps=10) == 0


def test_a_short_run_warms_up_in_its_first_tenth():
    """Where the planned warm-up would take the whole run, progress ends it."""
    assert learning_rate_factor(9, 0.05, warmup_steps=1000) == pytest.approx(0.5 * 0.95**0.9)
    assert learning_rate_factor(30, 0.2, warmup_steps=1000) == pytest.approx(0.8**0.9)


def test_the_average_follows_its_formula_and_skips_frozen_parameters():
    """After one update from 0 to 1 with decay min(d, 2/11) the average is 1 - 2/11."""
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.zero_()
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(1)
    average.update()
    assert set(average.state()) == {"weight", "num_updates"}
    assert torch.allclose(average.state()["weight"], torch.full((1, 2), 1 - 2 / 11))


def test_swapping_twice_restores_both():
    """Live and averaged weights change places and come back bit for bit."""
    model = nn.Linear(3, 3)
    average = MovingAverage(model, 0.99)
    with torch.no_grad():
        model.weight.add_(1)
    live, shadow = model.weight.detach().clone(), average.state()["weight"].clone()
    average.swap()
    assert torch.equal(model.weight, shadow)
    average.swap()
    assert torch.equal(model.weight, live)


def test_without_decay_there_is_no_average():
    """Decay 0 keeps the live weights through a swap."""
    model = nn.Linear(2, 2)
    average = MovingAverage(model, 0.0)
    before = model.weight.detach().clone()
    average.update()
    average.swap()
    assert torch.equal(model.weight, before)
