"""What a run counts."""

from __future__ import annotations

from samunet.training.run_state import RunState


def test_epochs_without_a_score_do_not_count_for_patience():
    """Two of four epochs after the best were scored; without any score there is nothing to count."""
    rows = [{"epoch": 1, "monitor": 0.5}, {"epoch": 2, "monitor": None}, {"epoch": 3, "monitor": 0.4}, {"epoch": 4}]
    state = RunState(best_epoch=1, best_score=0.5, history=[*rows, {"epoch": 5, "monitor": 0.3}])
    assert state.epochs_without_better() == 2
    assert RunState(history=[{"epoch": 1}, {"epoch": 2, "monitor": None}]).epochs_without_better() == 0


def test_the_mean_loss_of_an_epoch_does_not_depend_on_when_it_is_counted():
    """Bit by bit, however the steps are grouped; the next epoch starts anew."""
    losses = [0.1 * n**0.5 for n in range(1, 20)]
    one, other = RunState(), RunState()
    one.add_losses(losses)
    for loss in losses:
        other.add_losses([loss])
    assert one.take_mean_loss() == other.take_mean_loss()
    one.add_losses([2.0])
    assert one.take_mean_loss() == 2.0
