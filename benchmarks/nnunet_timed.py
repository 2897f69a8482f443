"""nnU-Net's trainer under a time limit; runs in nnU-Net's environment, started by `benchmarks.nnunet_peer`.

Everything is nnU-Net's own but the length: the learning rate falls over the minutes, step by step, as it would over the
epochs, and with `--adamw` the optimizer is AdamW. Its final checkpoint predicts the fold's validation cases with
nnU-Net's code. What was reached is kept in `--state` every few minutes, and a run that finds it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import fmean as mean

import torch
from nnunetv2.run.run_training import get_trainer_from_args

STEPS_PER_LINE, KEPT = 20, 50
ADAMW_RATE, ADAMW_DECAY = 1e-3, 0.01
POWER = 0.9
SAVE_EVERY_SECONDS = 120.0


def main() -> None:
    """Train and validate; prints what was done as JSON on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--configuration", required=True)
    parser.add_argument("--plans", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--adamw", action="store_true")
    parser.add_argument("--cpu-clock", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    trainer = get_trainer_from_args(
        options.dataset, options.configuration, 0, "nnUNetTrainer", options.plans, device=torch.device("cpu")
    )
    trainer.initialize()
    if options.adamw:
        trainer.initial_lr = ADAMW_RATE
        trainer.optimizer = torch.optim.AdamW(trainer.network.parameters(), ADAMW_RATE, weight_decay=ADAMW_DECAY)
    steps, minutes, loss = train(trainer, options)
    trainer.perform_actual_validation(False)
    facts = {"steps": steps, "training_minutes": round(minutes, 2), "loss": loss, "batch_size": trainer.batch_size}
    print(json.dumps({**facts, "folder": trainer.output_folder}))


def train(trainer, options: argparse.Namespace) -> tuple[int, float, float]:  # type: ignore[no-untyped-def]
    """As nnU-Net's run_training, until the minutes are over; goes on from what an interrupted run has kept."""
    trainer.on_train_start()
    losses, before = restore(trainer, options.state)
    clock = time.process_time if options.cpu_clock else time.monotonic
    began = saved = clock()
    trainer.network.train()
    while (progress := (before + clock() - began) / (60 * options.minutes)) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - progress) ** POWER
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        if len(losses) % STEPS_PER_LINE == 0:
            print(f"{progress:.1%} step {len(losses)} loss {mean(losses[-STEPS_PER_LINE:]):.3f}", flush=True)
        if clock() - saved > SAVE_EVERY_SECONDS:
            saved = clock()
            keep(trainer, options.state, losses, before + saved - began)
    minutes = (before + clock() - began) / 60
    keep(trainer, options.state, losses, 60 * minutes)
    trainer.on_train_end()
    return len(losses), minutes, mean(losses[-KEPT:])


def keep(trainer, file: Path, losses: list[float], seconds: float) -> None:  # type: ignore[no-untyped-def]
    """Write what a later run needs to go on; the file appears whole or not at all."""
    partial = file.with_suffix(".partial")
    state = {"network": trainer.network.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    torch.save({**state, "losses": losses, "seconds": seconds}, partial)
    os.replace(partial, file)


def restore(trainer, file: Path) -> tuple[list[float], float]:  # type: ignore[no-untyped-def]
    """Losses so far and the seconds they took; random numbers are drawn anew, as nnU-Net does when it goes on."""
    if not file.is_file():
        return [], 0.0
    state = torch.load(file, weights_only=True)
    trainer.network.load_state_dict(state["network"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    print(f"going on after step {len(state['losses'])}", flush=True)
    return state["losses"], state["seconds"]


if __name__ == "__main__":
    main()
