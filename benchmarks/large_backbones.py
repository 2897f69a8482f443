"""Every method on SAM's own backbones: exact counts, identity at the start, and one training step at 224 pixels.

    python -m benchmarks.large_backbones --folder FOLDER

For ViT-B, L and H a checkpoint with random weights in SAM's layout is made once (0.4, 1.2 and 2.6 GB) and each method
is built on it. Recorded: trained parameters, beside the formula's; the largest difference of the adapted encoder's
embedding from the plain one's, relative to its size; the loss before and after a step; whether any frozen tensor moved;
peak memory. Rows whose result exists are skipped; each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import RESULTS, stored
from benchmarks.methods import row
from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.method import Method, summarise
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import Decay, IntensityMap, LossWeights, ResolvedRecipe
from samunet.core.files import sha256_file, write_json
from samunet.models.build import BuiltModel, build_model
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.sam.network import build_network
from samunet.models.weights import WeightsFile
from samunet.pipeline.provenance import describe
from samunet.planners.counts import decoder_parameters, encoder_adapter_parameters
from samunet.planners.presets import PRESETS

TABLE = "large_backbones"
SIDE, DEPTH, NUM_TOKENS = 224, 2, 3
METHODS = (
    "sam_decoder",
    "medsam",
    "sam_adapter",
    "samed",
    "samed_s",
    "med_sa",
    "finetune_sam_vit_b_both_vanilla",
    "finetune_sam_vit_b_both_adapter",
    "finetune_sam_vit_b_decoder_adapter",
    "finetune_sam_vit_b_decoder_lora",
    "ma_sam",
    "nnsam",
)
BACKBONES = ("vit_b", "vit_l", "vit_h", "vit_t")


def main() -> None:
    """Run the rows that are missing, each in its own process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random checkpoints go")
    parser.add_argument("--backbone", nargs="+", default=list(BACKBONES))
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "BACKBONE"), help="run a single row and print it as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_row(options.one[0], options.one[1], options.folder)))
        return
    file = RESULTS / f"{TABLE}.json"
    results: dict[str, Any] = stored(file)
    for backbone in options.backbone:
        base_file(backbone, options.folder)
        for method in METHODS:
            name = f"{method} {backbone}"
            if name not in results:
                words = [sys.executable, "-m", "benchmarks.large_backbones", "--folder", str(options.folder)]
                done = subprocess.run([*words, "--one", method, backbone], capture_output=True, text=True, check=False)
                failed = {"failed": f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
                results[name] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
                write_json(file, dict(sorted(results.items())))
                print(name, results[name], flush=True)
    print(table(results))


def base_file(backbone: str, folder: Path) -> Path:
    """A checkpoint of random weights, made once; norms and positions are perturbed so that slips show."""
    path = folder / f"random_{backbone}.pth"
    if not path.is_file():
        torch.manual_seed(0)
        network = build_network(get_spec(backbone), image_size=SIDE, num_tokens=STOCK_TOKENS)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.ndim == 1 or "rel_pos" in name or "attention_biases" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    return path


def one_row(preset: str, backbone: str, folder: Path) -> dict[str, Any]:
    """Build a method on a backbone, compare it with plain SAM, take a step."""
    method = PRESETS[preset].method
    path = base_file(backbone, folder)
    built = build(method, backbone, path)
    images = torch.randn(DEPTH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    difference = encoder_difference(built, backbone, path, images)
    frozen = {n: t.clone() for n, t in built.model.state_dict().items() if n in built.model.untouched}
    losses = [step(built, images, method), step(built, images, method)]
    moved = [
        name for name, tensor in built.model.state_dict().items() if name in frozen and not frozen[name].equal(tensor)
    ]
    counts, spec = built.model.count_parameters(), get_spec(backbone)
    tokens = STOCK_TOKENS if method.promptable else NUM_TOKENS
    encoder = encoder_adapter_parameters(method, spec, slab_depth=DEPTH)
    if method.encoder.train == "full":
        encoder = sum(p.numel() for p in built.model.network.image_encoder.parameters())
    return {
        "preset": preset,
        "backbone": backbone,
        "method": summarise(method),
        "trained": counts,
        "formula": {
            "encoder": encoder,
            "decoder": None if method.fusion.kind == "unet" else decoder_parameters(method, tokens),
        },
        "encoder_difference": difference,
        "loss": losses,
        "frozen_tensors_moved": len(moved),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "provenance": {k: v for k, v in describe().items() if k not in ("command", "started")},
    }


def build(method: Method, backbone: str, path: Path) -> BuiltModel:
    """The model, from the random checkpoint."""
    recipe = ResolvedRecipe(
        weights_kind="sam",
        device_class="cpu",
        backbone=backbone,
        input_size=SIDE,
        tile_vox=SIDE,
        method=method,
        slab_depth=DEPTH if method.depth.kind != "none" else 1,
        attention="upstream",
        intensity_map=IntensityMap(kind="unit", lower=(0.0,), upper=(1.0,)),
        loss=LossWeights(),
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup_steps=1,
        decay=Decay(),
        batch_size=DEPTH,
        accumulation_steps=1,
        iterations=1,
        epochs=1,
        minutes=None,
        precision="fp32",
        checkpointing=True,
        ema_decay=0.0,
        augmentation=Augmentation(enabled=False),
        foreground_fraction=0.5,
        memory_gib=0.0,
    )
    weights = WeightsFile(path, sha256_file(path), "sam")
    return build_model(recipe, num_tokens=NUM_TOKENS, num_input_channels=3, channels="direct", weights=weights, seed=0)


@torch.no_grad()
def encoder_difference(built: BuiltModel, backbone: str, path: Path, images: Tensor) -> float:
    """Largest difference of embeddings from plain SAM's, relative to the largest embedding."""
    plain = build_network(get_spec(backbone), image_size=SIDE, num_tokens=STOCK_TOKENS)
    plain.load_state_dict(torch.load(path, weights_only=True))
    wanted = plain.eval().image_encoder(images)
    built.model.eval()
    depth = DEPTH if built.model.method.depth.kind != "none" else 1
    found = built.model.encode(images, depth=depth)
    built.model.train()
    return float((found - wanted).abs().max() / wanted.abs().max())


def step(built: BuiltModel, images: Tensor, method: Method) -> float:
    """One optimizer step towards a half-covered mask; returns the loss before it."""
    model = built.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    depth = DEPTH if method.depth.kind != "none" else 1
    if method.promptable:
        boxes = torch.tensor([[10.0, 20.0, 100.0, 120.0]]).expand(len(images), -1)
        logits, _ = model.prompted(model.encode(images, depth=depth), PromptBatch(boxes=boxes))
    else:
        logits = model(images, depth=depth)
    target = torch.zeros_like(logits)
    target[..., : logits.shape[-1] // 2] = 1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def table(results: dict[str, Any]) -> str:
    """Markdown: one line per method and backbone."""
    head = ["method", "backbone", "encoder", "decoder", "as the formula", "difference", "frozen moved", "GiB"]
    lines = [row(head), row(["---"] * len(head))]
    for name, cell in sorted(results.items()):
        if "failed" in cell:
            lines.append(row([name, "", cell["failed"], *[""] * 5]))
            continue
        trained, formula = cell["trained"], cell["formula"]
        other = 256 if trained["other"] else 0
        same = trained["encoder"] == formula["encoder"]
        same = same and formula["decoder"] in (None, trained["decoder"] + other)
        lines.append(
            row(
                [
                    cell["method"],
                    cell["backbone"],
                    f"{trained['encoder']:,}",
                    f"{trained['decoder']:,}",
                    "yes" if same else "no",
                    f"{cell['encoder_difference']:.0e}",
                    cell["frozen_tensors_moved"],
                    cell["peak_rss_gib"],
                ]
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
