"""Overlay pictures: slices with reference and prediction drawn as contours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from samunet.core.files import atomic_path
from samunet.core.labels import LabelSpec

REFERENCE_STYLE: Final = "--"
PREDICTION_STYLE: Final = "-"


def draw_overlay(
    path: Path,
    image: NDArray[Any],
    prediction: NDArray[Any],
    *,
    labels: LabelSpec,
    spacing: Sequence[float],
    slice_axis: int,
    reference: NDArray[Any] | None = None,
    title: str = "",
    num_slices: int = 6,
) -> None:
    """Draw evenly chosen slices that hold a structure.

    Args:
        path: PNG to write.
        image: (Z, Y, X) intensities.
        prediction: (Z, Y, X) label values, solid contours.
        labels: Structures and their values.
        spacing: Millimetres along (Z, Y, X), for the pixels' aspect.
        slice_axis: Axis across which slices are taken.
        reference: (Z, Y, X) label values, dashed contours.
        title: Above the picture.
        num_slices: Most slices to show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    maps = [(prediction, PREDICTION_STYLE)] + ([] if reference is None else [(reference, REFERENCE_STYLE)])
    chosen = _slices_to_show([m for m, _ in maps], slice_axis, num_slices)
    low, high = np.percentile(image, (0.5, 99.5))
    rows, columns = [step for axis, step in enumerate(spacing) if axis != slice_axis]
    figure = Figure(figsize=(3 * min(3, len(chosen)), 3.2 * -(-len(chosen) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    colours = [f"C{index % 10}" for index in range(labels.num_foreground)]
    for place, index in enumerate(chosen, start=1):
        axes = figure.add_subplot(-(-len(chosen) // 3), min(3, len(chosen)), place)
        axes.imshow(np.take(image, index, slice_axis), cmap="gray", vmin=low, vmax=high, aspect=rows / columns)
        axes.set_title(f"slice {index}", fontsize=8)
        axes.set_axis_off()
        for values, style in maps:
            for name, colour in zip(labels.names, colours, strict=True):
                _contour(axes, np.take(labels.structure_mask(values, name), index, slice_axis), colour, style)
    handles = [Line2D([], [], color=c, label=n) for n, c in list(zip(labels.names, colours, strict=True))[:12]]
    if reference is not None:
        handles.append(Line2D([], [], color="gray", linestyle=REFERENCE_STYLE, label="reference"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _slices_to_show(maps: Sequence[NDArray[Any]], axis: int, most: int) -> list[int]:
    others = tuple(a for a in range(3) if a != axis)
    occupied = np.flatnonzero(np.any([np.any(m != 0, axis=others) for m in maps], axis=0))
    if occupied.size == 0:
        return [maps[0].shape[axis] // 2]
    picks = np.unique(np.linspace(0, occupied.size - 1, min(most, occupied.size)).round().astype(int))
    return [int(occupied[pick]) for pick in picks]


def _contour(axes: Any, mask: NDArray[np.bool_], colour: str, style: str) -> None:
    from skimage.measure import find_contours

    for line in find_contours(np.pad(mask, 1).astype(float), 0.5):  # type: ignore[no-untyped-call]
        axes.plot(line[:, 1] - 1, line[:, 0] - 1, style, color=colour, linewidth=1)
