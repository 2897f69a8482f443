"""nnU-Net's trainer under a time limit; runs in nnU-Net's environment, started by `benchmarks.nnunet_peer`.

Everything is nnU-Net's own but the length: the learning rate falls over the minutes, step by step, as it would over the
epochs, and with `--adamw` the optimizer is AdamW. Its final checkpoint predicts the fold's validation cases with
nnU-Net's code.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import fmean as mean

import torch
from nnunetv2.run.run_training import get_trainer_from_args

STEPS_PER_LINE, KEPT = 20, 50
ADAMW_RATE, ADAMW_DECAY = 1e-3, 0.01
POWER = 0.9


def main() -> None:
    """Train and validate; prints what was done as JSON on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--configuration", required=True)
    parser.add_argument("--plans", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
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
    """As nnU-Net's run_training, until the minutes are over."""
    trainer.on_train_start()
    clock = time.process_time if options.cpu_clock else time.monotonic
    began, losses = clock(), list[float]()
    trainer.network.train()
    while (progress := (clock() - began) / (60 * options.minutes)) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - progress) ** POWER
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        if len(losses) % STEPS_PER_LINE == 0:
            print(f"{progress:.1%} step {len(losses)} loss {mean(losses[-STEPS_PER_LINE:]):.3f}", flush=True)
    minutes = (clock() - began) / 60
    trainer.on_train_end()
    return len(losses), minutes, mean(losses[-KEPT:])


if __name__ == "__main__":
    main()
