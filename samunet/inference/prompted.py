"""Segmenting what prompts point at: the tile around a prompt is encoded, the decoder answers, slices are followed.

Positions are (row, column) on the store grid, boxes (row0, column0, row1, column1) of voxel edges; SAM's (x, y) in
encoder pixels exist only inside :class:`PromptBatch`. Mirrored views are not used: a prompt has one view.

Legend: B tiles of a batch, C input channels, T mask tokens, H W in-plane store grid, V tile side, S encoder side,
h = S / 16.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samunet.artifacts.method import Method
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.labels import LabelSpec
from samunet.inference.encode import scale_slice, to_encoder, to_store, zoom
from samunet.inference.prompt_geometry import (
    PlacedObject,
    following_prompt,
    prompt_within,
    tile_places,
    ways_from,
)
from samunet.inference.restore import SliceLogits
from samunet.inference.simulation import ObjectPrompt
from samunet.inference.sliding import autocast, gather_channels
from samunet.models.decoders.promptable import PromptBatch
from samunet.preprocessing.slicing import Pair, cut_tile, tile_windows, voxel_to_pixel

UNPROMPTED = -20.0
ASKED = -19.0
LARGEST_LOGIT = 100.0
NEGLIGIBLE = -10.0
MIN_AREA_VOX = 5
MAX_AREA_CHANGE = 3.0
KEPT_SLICES = 32

Plane = NDArray[np.float32]


class PromptableModel(Protocol):
    """What prediction asks of a promptable model."""

    def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """Embeddings (B, E, h, h) of encoder inputs (B, C, S, S)."""

    def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, T, 4h, 4h) and estimated IoU (B, T)."""


@dataclass(frozen=True)
class PromptedOptions:
    """How a volume is segmented from prompts.

    Args:
        context: Neighbouring slices on each side that are input channels.
        batch_size: Slices per forward.
        device: Where the models are.
        precision: "fp32", "bf16" or "fp16" autocast.
        propagate: Look for an object on the slices beside those that were marked.
    """

    context: int
    batch_size: int
    device: str
    precision: str
    propagate: bool = True


@dataclass(frozen=True, eq=False)
class _Question:
    """What is asked on a slice; ``former`` is the (H, W) mask logits of the slice before, shown to the decoder."""

    index: int
    prompt: ObjectPrompt
    former: Plane | None = None


@dataclass(frozen=True, eq=False)
class _Tile:
    """A question restricted to one tile; ``number`` is the question's."""

    number: int
    start: Pair
    asked: _Question

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Tiles of one kind fit one :class:`PromptBatch`."""
        return len(self.asked.prompt.points), self.asked.prompt.box is not None, self.asked.former is not None


@dataclass(frozen=True, eq=False)
class _Patch:
    """The part of an object's logits on a slice that matters: its window in the slice, in half precision."""

    token: int
    rows: slice
    columns: slice
    logits: NDArray[np.float16]


class PromptedPredictor:
    """Prompted segmentation with one or several models of the same recipe.

    Each object of each label gets, on every slice where it was pointed at, the mask of token 0 (of SAM as it is, and
    for one click alone, the token of 1 to 3 whose estimated IoU is largest, which is SAM's own rule). An object whose
    prompts have no thickness is followed to the slices on both sides, each prompted by the tight box of the mask
    before it, with a click in its middle where the method knows clicks, and with that mask where the method knows
    masks (SAM as it is, and training with corrections). Between two marked slices, the nearer one is followed.
    It ends at a mask of fewer than MIN_AREA_VOX voxels or of an area that changed by more than MAX_AREA_CHANGE times
    from one slice to the next: that mask is dropped.

    A slice no larger than a tile is seen whole. Otherwise the tile lies around the prompt, shifted into the slice; a
    prompt larger than a tile is seen in several, of which the largest logit counts.

    Args:
        models: In eval mode; their logits are averaged.
        recipe: Tile, input size, intensity map, method, slab.
        options: Cutting and following.
    """

    def __init__(self, models: Sequence[PromptableModel], recipe: ResolvedRecipe, options: PromptedOptions) -> None:
        self._models = list(models)
        self._recipe = recipe
        self._options = options

    def slices(
        self, data: NDArray[np.float32], objects: Sequence[PlacedObject], labels: LabelSpec
    ) -> Iterator[SliceLogits]:
        """Logits of every slice on the store grid, in order.

        Prompted slices of an object are held in half precision, each only as far as its mask reaches.

        Args:
            data: (C, S, H, W) as stored.
            objects: What was pointed at.
            labels: What the maps mean.

        Yields:
            (slice index, (T, H, W)): per structure the largest logit of its objects, ASKED at least, and
            UNPROMPTED all over slices on which it has none; background is 0, so that the largest positive logit wins.
        """
        embeddings = _Embeddings(self._models, self._recipe, self._options, data)
        patches: dict[int, list[_Patch]] = defaultdict(list)
        for item in objects:
            token = list(labels.names).index(item.label) + (0 if labels.has_regions else 1)
            for index, plane in self._object(embeddings, item):
                patches[index] += _cut_patch(token, plane)
        for index in range(data.shape[1]):
            maps = torch.full((labels.num_tokens, *data.shape[2:]), UNPROMPTED)
            if not labels.has_regions:
                maps[0] = 0
            found = patches.pop(index, ())
            for token in {patch.token for patch in found}:
                maps[token] = ASKED
            for patch in found:
                place = maps[patch.token, patch.rows, patch.columns]
                torch.maximum(place, torch.from_numpy(patch.logits).float(), out=place)
            yield index, maps

    def _object(self, embeddings: _Embeddings, item: PlacedObject) -> Iterator[tuple[int, Plane]]:
        """(slice, (H, W) logits) of every slice on which an object is found."""
        questions = [_Question(index, item.prompts[index]) for index in item.sources]
        size = self._options.batch_size
        answers: dict[int, Plane] = {}
        for first in range(0, len(questions), size):
            chunk = questions[first : first + size]
            found = zip([question.index for question in chunk], self._ask(embeddings, chunk), strict=True)
            if not (item.extends and self._options.propagate):
                yield from found
                continue
            answers.update(found)
        yield from answers.items()
        for source, way in ways_from(tuple(answers), embeddings.num_slices):
            yield from self._follow(embeddings, item, way, answers[source])

    def _follow(
        self, embeddings: _Embeddings, item: PlacedObject, way: Iterable[int], former: Plane
    ) -> Iterator[tuple[int, Plane]]:
        """The object on one slice after the other, each prompted by the one before."""
        method = self._recipe.method
        area = int((former > 0).sum())
        for index in way:
            if area < MIN_AREA_VOX:
                return
            prompt = following_prompt(former > 0, clicks=method.prompts.kind != "box", given=item.prompts.get(index))
            question = _Question(index, prompt, former if knows_masks(method) else None)
            (former,) = self._ask(embeddings, [question])
            previous, area = area, int((former > 0).sum())
            if area < MIN_AREA_VOX or not 1 / MAX_AREA_CHANGE <= area / previous <= MAX_AREA_CHANGE:
                return
            yield index, former

    def _ask(self, embeddings: _Embeddings, questions: Sequence[_Question]) -> list[Plane]:
        """(H, W) logits that answer each question."""
        side, shape = self._recipe.tile_vox, embeddings.shape
        tiles = [tile for number, asked in enumerate(questions) for tile in _tiles_of(number, asked, shape, side)]
        planes = [np.full(shape, UNPROMPTED, np.float32) for _ in questions]
        for _, group in groupby(sorted(tiles, key=lambda tile: tile.kind), key=lambda tile: tile.kind):
            members = list(group)
            for first in range(0, len(members), self._options.batch_size):
                chunk = members[first : first + self._options.batch_size]
                for tile, logits in zip(chunk, self._masks(embeddings, chunk), strict=True):
                    outer, inner = tile_windows(tile.start, side, shape)
                    place = planes[tile.number][outer]
                    np.maximum(place, np.clip(logits[inner], UNPROMPTED, LARGEST_LOGIT), out=place)
        return planes

    @torch.inference_mode()
    def _masks(self, embeddings: _Embeddings, tiles: Sequence[_Tile]) -> Plane:
        """(B, V, V) logits of tiles of one kind, averaged over the models."""
        prompts = prompt_batch(
            [tile.asked.prompt for tile in tiles],
            [tile.start for tile in tiles],
            recipe=self._recipe,
            device=self._options.device,
            former=[tile.asked.former for tile in tiles if tile.asked.former is not None],
        )
        answers = []
        for model, seen in zip(self._models, embeddings.of(tiles), strict=True):
            with autocast(self._options.device, self._options.precision):
                logits, quality = model.prompted(seen, prompts)
            answers.append((logits.float(), quality.float()))
        logits = torch.stack([logits for logits, _ in answers]).mean(0)
        quality = torch.stack([quality for _, quality in answers]).mean(0)
        chosen = choose_token(quality, prompts, self._recipe.method)
        maps = logits[torch.arange(len(logits), device=logits.device), chosen][:, None]
        result: Plane = to_store(maps, self._recipe)[:, 0].cpu().numpy()
        return result


class _Embeddings:
    """Embeddings of a case's tiles: encoded when first asked for, the latest KEPT_SLICES kept.

    With a depth mechanism, slabs lie side by side along the volume, the last one flush with its end; the slices of a
    slab are encoded together.
    """

    def __init__(
        self,
        models: Sequence[PromptableModel],
        recipe: ResolvedRecipe,
        options: PromptedOptions,
        data: NDArray[np.float32],
    ) -> None:
        self._models, self._recipe, self._options, self._data = models, recipe, options, data
        self.num_slices: int = data.shape[1]
        self.shape: Pair = (data.shape[2], data.shape[3])
        self._depth: int = min(recipe.slab_depth, self.num_slices)
        self._kept: OrderedDict[tuple[int, Pair], list[Tensor]] = OrderedDict()

    def of(self, tiles: Sequence[_Tile]) -> list[Tensor]:
        """Per model, the embeddings (B, E, h, h) of tiles."""
        slabs = {(self._slab(tile.asked.index), tile.start): None for tile in tiles}
        found = {key: self._kept[key] for key in slabs if key in self._kept}
        missing = [key for key in slabs if key not in found]
        size = max(1, self._options.batch_size // self._depth)
        for first in range(0, len(missing), size):
            found.update(self._encode(missing[first : first + size]))
        for key in slabs:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > max(1, KEPT_SLICES // self._depth):
            self._kept.popitem(last=False)
        return [torch.stack([self._pick(found, tile, number) for tile in tiles]) for number in range(len(self._models))]

    def _pick(self, found: dict[tuple[int, Pair], list[Tensor]], tile: _Tile, model: int) -> Tensor:
        slab = self._slab(tile.asked.index)
        return found[slab, tile.start][model][tile.asked.index - slab]

    def _slab(self, index: int) -> int:
        """First slice of the slab that holds a slice."""
        return min(index // self._depth * self._depth, self.num_slices - self._depth)

    def _encode(self, keys: Sequence[tuple[int, Pair]]) -> dict[tuple[int, Pair], list[Tensor]]:
        """Per slab and tile, each model's embeddings (slab depth, E, h, h)."""
        side, device = self._recipe.tile_vox, self._options.device
        places = [(index, start) for first, start in keys for index in range(first, first + self._depth)]
        image = [cut_tile(self._channels(index), start, side, fill=0) for index, start in places]
        inside = np.ones((1, *self.shape), np.float32)
        valid = [cut_tile(inside, start, side, fill=0) for _, start in places]
        images, valids = (torch.from_numpy(np.stack(stack)).to(device) for stack in (image, valid))
        encoded = to_encoder(images, valids, self._recipe)
        parts = []
        for model in self._models:
            with autocast(device, self._options.precision):
                seen = model.encode(encoded, depth=self._depth)
            parts.append(seen.reshape(len(keys), self._depth, *seen.shape[1:]))
        return {key: [part[number] for part in parts] for number, key in enumerate(keys)}

    def _channels(self, index: int) -> NDArray[np.float32]:
        """The input channels (C, H, W) of a slice."""
        return scale_slice(gather_channels(self._data, index, self._options.context), self._recipe.intensity_map)


def prompt_batch(
    prompts: Sequence[ObjectPrompt],
    starts: Sequence[Pair],
    *,
    recipe: ResolvedRecipe,
    device: str,
    former: Sequence[Plane] = (),
) -> PromptBatch:
    """Prompts on slices to SAM's encoder pixels.

    Args:
        prompts: One per tile, with the same number of points, and a box all or none.
        starts: First row and column of each tile.
        recipe: Tile and input size.
        device: Where to put them.
        former: Per tile the (H, W) logits shown as SAM's mask prompt; empty for none.
    """
    side, size = recipe.tile_vox, recipe.input_size

    def pixels(positions: list[object]) -> Tensor:
        within = np.array(positions, np.float64).reshape(len(starts), -1, 2) - np.array(starts)[:, None]
        return torch.from_numpy(voxel_to_pixel(within, side, size)).float().flip(-1).to(device)

    points = pixels([prompt.points for prompt in prompts]) if prompts[0].points else None
    signs = torch.tensor([prompt.positive for prompt in prompts], dtype=torch.long, device=device)
    boxes = pixels([prompt.box for prompt in prompts]).flatten(1) if prompts[0].box else None
    masks = None
    if former:
        cut = [cut_tile(plane, start, side, fill=UNPROMPTED) for plane, start in zip(former, starts, strict=True)]
        masks = zoom(torch.from_numpy(np.stack(cut))[:, None].to(device), size // 4)
    return PromptBatch(points=points, point_labels=None if points is None else signs, boxes=boxes, masks=masks)


def choose_token(quality: Tensor, prompts: PromptBatch, method: Method) -> Tensor:
    """The mask token that answers: 0, or for one click alone to SAM as it is, the best of the others.

    Args:
        quality: (B, T) estimated IoU.
        prompts: What was asked.
        method: Whether anything was trained: then a loss reached token 0 alone.

    Returns:
        (B,) token indices.

    Source: Kirillov et al., Segment Anything, 2023, section 3: several masks for an ambiguous prompt.
    """
    one_click = prompts.points is not None and prompts.points.shape[1] == 1
    alone = one_click and prompts.boxes is None and prompts.masks is None
    if not method.trains_anything and alone and quality.shape[1] > 1:
        return quality[:, 1:].argmax(1) + 1
    return quality.new_zeros(len(quality), dtype=torch.long)


def knows_masks(method: Method) -> bool:
    """Whether the decoder has seen mask prompts: SAM's own has, another by training with corrections."""
    return method.decoder.train == "none" or method.prompts.corrections > 0


def _tiles_of(number: int, asked: _Question, shape: Pair, side: int) -> Iterator[_Tile]:
    """The tiles that answer a question, each with the part of the prompt that it holds."""
    prompt = asked.prompt
    reached = np.array([*prompt.points, *([] if prompt.box is None else [prompt.box[:2], prompt.box[2:]])])
    for start in tile_places(reached.min(0), reached.max(0), side, shape):
        part = prompt_within(prompt, start, side)
        if part.box is not None or any(part.positive):
            yield _Tile(number, start, _Question(asked.index, part, asked.former))


def _cut_patch(token: int, plane: Plane) -> list[_Patch]:
    """The window of a slice in which logits are not negligible; none if there is none."""
    relevant = plane > NEGLIGIBLE
    if not relevant.any():
        return []
    rows, columns = (np.flatnonzero(relevant.any(axis)) for axis in (1, 0))
    window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return [_Patch(token, *window, plane[window].astype(np.float16))]
