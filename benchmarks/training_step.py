"""A training step of any load, built and taken as the trainer does, and ways to measure the peak of its memory."""

from __future__ import annotations

import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.layers import weight_init
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.plan import Decay, IntensityMap, LossWeights, ResolvedRecipe
from samunet.models.channels import build_channel_input
from samunet.models.decoders.adapters import inject_decoder
from samunet.models.decoders.side_path import SidePath
from samunet.models.fusion import FusionUNet
from samunet.models.peft.inject import inject_adapters, inject_depth
from samunet.models.sam.attention import fold_attention
from samunet.models.sam.network import build_network
from samunet.models.segmentation import SegmentationModel
from samunet.planners.memory import Load
from samunet.training import losses, prompted
from samunet.training.objective import Objective, SemanticObjective
from samunet.training.optim import MovingAverage, clip_gradients
from samunet.training.prompted import PromptedObjective, PromptedSample, PromptRound

CHANNELS = 3
# Functions that autocast computes in float32 on a GPU, and on a CPU in whatever precision comes in.
GPU_FLOAT32 = {"softmax", "layer_norm", "pow", "sum", "norm"}
FUSED_STEP = 16


class GpuCasts(TorchFunctionMode):
    """Autocast on a CPU with a GPU's list of what stays in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in GPU_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs))
        if name == "scaled_dot_product_attention" and kwargs.get("attn_mask") is not None:
            return _fused_with_bias(args[0], args[1], args[2], kwargs["attn_mask"])
        return func(*args, **kwargs)


def _fused_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A GPU's fused attention with a bias, which a CPU only has for other shapes of the bias."""
    q, k, v, bias = (tensor.to(torch.bfloat16) for tensor in (q, k, v, bias))
    length = bias.shape[-1]
    bias = functional.pad(bias, (0, -length % FUSED_STEP))[..., :length].expand(*q.shape[:3], length)
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
    return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, each storage once, and their peak per phase."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = "build"
        self.peaks: dict[str, int] = {}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is gone."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)


def recipe_of(load: Load) -> ResolvedRecipe:
    """The recipe of a load."""
    return ResolvedRecipe(
        weights_kind="sam",
        device_class="cpu",
        backbone=load.spec.name,
        input_size=load.input_size,
        tile_vox=load.tile_vox,
        method=load.method,
        slab_depth=load.slab_depth,
        attention=load.attention,
        intensity_map=IntensityMap(kind="unit", lower=(0.0,), upper=(1.0,)),
        loss=LossWeights(estimated_iou=1.0),
        learning_rate=1e-4,
        weight_decay=0.1,
        warmup_steps=1,
        decay=Decay(),
        batch_size=load.slices,
        accumulation_steps=1,
        iterations=1,
        epochs=1,
        minutes=None,
        precision=load.precision,
        checkpointing=load.checkpointing,
        ema_decay=0.99,
        augmentation=Augmentation(enabled=False),
        foreground_fraction=0.5,
        memory_gib=0.0,
    )


def build(load: Load) -> SegmentationModel:
    """The model of a load with undefined weights."""
    method = load.method
    network = build_network(
        load.spec,
        image_size=load.input_size,
        num_tokens=load.num_tokens,
        upsampler=method.decoder.upsampler,
        path=SidePath.of(method.decoder),
    )
    if load.attention != "upstream":
        fold_attention(network.image_encoder, global_only=load.attention == "folded_global")
    inject_adapters(network.image_encoder, method.encoder.adapters)
    inject_depth(network.image_encoder, method.depth, max_depth=load.slab_depth)
    if method.fusion.kind == "sam":
        inject_decoder(network.mask_decoder, method.decoder)
    is_unet = method.fusion.kind == "unet"
    unet = FusionUNet(CHANNELS, load.num_tokens, width=method.fusion.width) if is_unet else None
    channels = build_channel_input("direct", CHANNELS)
    model = SegmentationModel(network, channel_input=channels, method=method, unet=unet, estimate_iou=True)
    model.set_checkpointing(load.checkpointing)
    return model


def batch_of(load: Load) -> tuple[Tensor, ...]:
    """A batch of random slabs: image, valid, target, and for promptable methods one click each."""
    lead, side = (load.slices // load.slab_depth, load.slab_depth), load.tile_vox
    image, valid = torch.rand(*lead, CHANNELS, side, side), torch.ones(*lead, 1, side, side)
    target = torch.zeros(*lead, 1, side, side, dtype=torch.int16)
    target[..., side // 4 : side // 2, side // 4 : side // 2] = 1
    if not load.method.promptable:
        return image, valid, target
    points, labels = torch.full((*lead, 1, 2), side / 3), torch.ones(*lead, 1, dtype=torch.int64)
    return PromptedSample(
        image, valid, target, points, labels, torch.zeros(*lead, 4), torch.zeros(*lead, dtype=torch.bool)
    )


class ShapedPrompts(PromptedObjective):
    """The prompted loss where every slice has a click, without looking at values, which fake tensors do not have."""

    def _groups(self, flat: PromptedSample, embeddings: Tensor) -> list[PromptRound]:
        return [self._group(flat, embeddings, torch.arange(len(embeddings)), is_box=False)]

    def _to_pixels(self, voxels: Tensor) -> Tensor:
        return voxels * 1.0


def _one_click(state: PromptRound, _: Tensor) -> PromptRound:
    """The state with its first click once more."""
    points = torch.cat([state.points, state.points[:, :1]], 1)
    return replace(state, points=points, point_labels=torch.cat([state.point_labels, state.point_labels[:, :1]], 1))


def _shaped_overlap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union without a histogram, whose size depends on values."""
    indices, chosen = target[:, 0].long(), logits.argmax(1)
    number, classes = logits.shape[:2]
    rows = torch.arange(number).view(-1, 1, 1) * classes
    valid = indices >= 0
    where = valid & (chosen == indices)
    both = (rows + chosen).masked_fill(where, 0)
    known = (rows + indices).masked_fill(valid, 0)
    counts = torch.zeros(number, classes - 1) + both.float().mean() + known.float().mean()
    return counts, counts


def train_step(load: Load, meter: LiveBytes | None = None, *, device: str = "cpu", fake: bool = False) -> None:
    """Build a model and take a training step as the trainer does.

    Args:
        load: What is trained.
        meter: Told the phases.
        device: Where.
        fake: Whether tensors have no values.
    """
    recipe, model = recipe_of(load), build(load)
    if not fake:
        model.to(device)
    prompts = ShapedPrompts if fake else PromptedObjective
    objective: Objective = SemanticObjective(recipe, has_regions=False, device=device)
    if load.method.promptable:
        objective = prompts(recipe, device=device)
    groups = [{"params": group} for group in model.trainable_parameters().values()]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    average = MovingAverage(model, recipe.ema_decay)
    model.train()
    warm_up(optimizer)
    with nullcontext() if meter is None else meter:
        for _ in range(2 if load.accumulates else 1):
            phase(meter, "forward")
            loss = objective.loss(model, tuple(part.to(device) for part in batch_of(load)))
            phase(meter, "backward")
            # By its edge, since for a tensor the casts would be switched off where blocks are recomputed.
            torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
            del loss
        phase(meter, "update")
        clip_gradients([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        average.update()


def phase(meter: LiveBytes | None, name: str) -> None:
    if meter is not None:
        meter.phase = name


def warm_up(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def count(load: Load) -> dict[str, int]:
    """Peak bytes per phase of a step under fake tensors, as on a GPU."""
    meter = LiveBytes()
    with ExitStack() as stack:
        for patch in _valueless():
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(meter)
        if load.is_half:
            stack.enter_context(GpuCasts())
        train_step(load, meter, fake=True)
    return {name: peak for name, peak in meter.peaks.items() if name != "build"}


def _valueless() -> list[Any]:
    """What looks at values, replaced by what does not."""
    same = lambda first, *_, **__: first  # noqa: E731 - it stands for several functions
    return [
        mock.patch.object(nn.init, "_no_grad_trunc_normal_", same),
        mock.patch.object(weight_init, "_trunc_normal_", same),
        mock.patch.object(nn.Module, "to", same),
        mock.patch("timm.models.tiny_vit.calculate_drop_path_rates", lambda _, depths, **__: [0.0] * depths),
        mock.patch.object(prompted, "add_corrections", _one_click),
        mock.patch.object(losses, "_label_overlap", _shaped_overlap),
    ]


def profile(load: Load) -> dict[str, int]:
    """Peak bytes of a step with real tensors on the processor, from the allocations that the profiler saw."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_step(load)
    waiting, changes = list(recorded.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    return {"step": max(accumulate(size for _, size in sorted(changes)))}


def resident(load: Load) -> int:
    """Bytes by which the resident memory of a fresh process grows at most during a real step (Linux)."""
    before = _status("VmRSS")
    train_step(load)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def allocate(load: Load) -> dict[str, int]:
    """Peak bytes of a step that a GPU's allocator gave out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train_step(load, device="cuda")
    return {"step": torch.cuda.max_memory_allocated()}
