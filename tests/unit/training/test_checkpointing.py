"""What a continued run restores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from samunet.training.checkpointing import (
    _load_optimizer,
    _optimizer_tensors,
    _random_state,
    _restore_random_state,
)


def trainer_on(device: str, *, fused: bool) -> SimpleNamespace:
    """A model with its optimizer after a step."""
    model = nn.Linear(3, 2).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    model(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["fused"] = fused
    return SimpleNamespace(model=model, optimizer=optimizer)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_the_step_of_a_fused_optimizer_lies_beside_its_parameter(fused: bool, device: str) -> None:
    """A fused step on a GPU refuses a count on the CPU, which is where a checkpoint is read to."""
    saved = _optimizer_tensors(trainer_on("cpu", fused=False))
    continued = trainer_on("meta", fused=fused)
    _load_optimizer(continued, saved)
    for parameter, state in continued.optimizer.state.items():
        assert state["step"].device.type == device
        assert state["exp_avg"].device == state["exp_avg_sq"].device == parameter.device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_fused_optimizer_goes_on_a_gpu() -> None:
    """From the state as a checkpoint gives it, on the CPU."""
    before = trainer_on("cuda", fused=False)
    saved = {name: value.cpu() for name, value in _optimizer_tensors(before).items()}
    model = nn.Linear(3, 2).cuda()
    after = SimpleNamespace(model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True))
    _load_optimizer(after, saved)
    model(torch.ones(1, 3, device="cuda")).sum().backward()
    after.optimizer.step()
    assert {float(state["step"]) for state in after.optimizer.state.values()} == {2.0}


def test_the_random_state_is_that_of_the_runs_own_gpu(monkeypatch: pytest.MonkeyPatch):
    """A run on cuda:1 saves and restores the generator of cuda:1; one on the CPU touches no GPU's."""
    generators = {"cuda": torch.tensor([0]), "cuda:1": torch.tensor([7])}

    def restore(value: Tensor, device: str = "cuda") -> None:
        generators[device] = value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": generators[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    saved = _random_state("cuda:1")
    generators["cuda:1"] = torch.tensor([8])
    _restore_random_state(saved, "cpu")
    assert {name: int(value) for name, value in generators.items()} == {"cuda": 0, "cuda:1": 8}
    _restore_random_state(saved, "cuda:1")
    assert {name: int(value) for name, value in generators.items()} == {"cuda": 0, "cuda:1": 7}
    assert set(_random_state("cpu")) == {"cpu"}
