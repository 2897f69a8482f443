"""How many slices a forward of a prediction holds: as many as fit the memory that is free, fewer where it ran out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import OutOfMemoryError
from samunet.core.log import Reporter
from samunet.models.device import device_class, free_bytes, ran_out, release_memory
from samunet.planners import memory
from samunet.planners.batches import BATCH_CAP
from samunet.planners.hardware import KEPT_FREE, cpu_memory
from samunet.planners.load import Load

# A forward that records nothing holds more slices than a training step.
STEP_SHARE = 2
Result = TypeVar("Result")


class Room:
    """The slices per forward of one model or several, from case to case.

    Args:
        recipe: Theirs.
        num_tokens: Mask tokens of a model without prompts.
        models: How many are averaged.
        device: Where they are.
        precision: In which they compute.
        most: Most slices per forward; None: twice a training step's, on a CPU at most twice those of a CPU's step.
        reporter: Told where memory ran out.
    """

    def __init__(
        self,
        recipe: ResolvedRecipe,
        *,
        num_tokens: int,
        models: int,
        device: str,
        precision: str,
        most: int | None,
        reporter: Reporter,
    ) -> None:
        self.most = most or STEP_SHARE * min(recipe.batch_size, BATCH_CAP[device_class(device)])
        self._models, self._device, self._reporter = models, device, reporter
        self._load = Load(
            get_spec(recipe.backbone),
            recipe.input_size,
            recipe.tile_vox,
            STOCK_TOKENS if recipe.method.promptable else num_tokens,
            self.most,
            recipe.method,
            slab_depth=recipe.slab_depth,
            precision=precision,
            attention=recipe.attention,
        )

    def slices(self, *, views: int, plane_vox: int, held_vox: int = 0) -> int:
        """Slices per forward, in whole slabs, at least one, that are predicted to fit what is free now.

        Args:
            views: Mirrored views of a slice.
            plane_vox: Voxels of a whole slice.
            held_vox: Voxels of the volume, where its maps are kept as a whole.
        """
        free = available_gib(self._device)
        return memory.largest_prediction(
            self._load,
            budget_gib=free,
            cap=self.most,
            models=self._models,
            views=views,
            plane_vox=plane_vox,
            held_vox=held_vox,
        )

    def predict(
        self, segment: Callable[[int], Result], *, case: str, views: int = 1, plane_vox: int, held_vox: int = 0
    ) -> Result:
        """Segment a case; where memory runs out, again from its start with half the slices, here and in later cases.

        Args:
            segment: Segments the case with so many slices per forward, which do not change what it gives.
            case: Its name.
            views: As for :meth:`slices`.
            plane_vox: As there.
            held_vox: As there.

        Raises:
            OutOfMemoryError: If one slab at a time does not fit.
        """
        depth = self._load.slab_depth
        slices = self.slices(views=views, plane_vox=plane_vox, held_vox=held_vox)
        while True:
            try:
                return segment(slices)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                found = (str(error) or type(error).__name__).split("\n")[0]
            # Outside of the except clause, whose traceback would keep the failed forward's tensors.
            release_memory()
            if slices <= depth:
                raise self._out_of_memory(case, slices, found)
            self.most = max(1, slices // depth // 2) * depth
            self._reporter.info(
                f"memory ran out while predicting {case}: {self.most} slice{'s' * (self.most > 1)} at once instead of "
                f"{slices}; going on"
            )
            slices = self.most

    def _out_of_memory(self, case: str, slices: int, found: str) -> OutOfMemoryError:
        on_cpu = device_class(self._device) == "cpu"
        other = "close other programs" if on_cpu else "close other programs that use it, predict with --device cpu"
        single = ", load fewer folds with -f" if self._models > 1 else ""
        return OutOfMemoryError(
            f"memory of {self._device} ran out while predicting, with as few slices at once as possible",
            case=case,
            expected=f"room for a forward of {slices} slice{'s' * (slices > 1)}",
            found=found,
            todo=f"{other}{single}, or predict on a machine with more memory",
        )


def available_gib(device: str) -> float:
    """Memory in GiB that a prediction may take now: what is free, less a fifth."""
    if device_class(device) == "cpu":
        return cpu_memory()[0]
    return (1 - KEPT_FREE) * free_bytes(device) / memory.GIB
