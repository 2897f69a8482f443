"""The one place that imports segment-anything and timm, and explains why they do not load.

Both import torchvision; a torchvision built for another torch dies at import with an operator that does not exist.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from samunet.core.errors import UsageError

REINSTALL = (
    "install torch and torchvision from the same place, for a CPU: "
    "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu "
    "(for a GPU: the same line without --index-url)"
)


def guarded_import(name: str) -> ModuleType:
    """Import a module that needs torchvision.

    Raises:
        UsageError: If it cannot be imported; the message holds the line to type.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        package = missing.split(".")[0].replace("_", "-")
        raise UsageError(
            f"{name} cannot be imported: {missing} is not installed", todo=f"pip install {package}"
        ) from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        if "torchvision" not in f"{error}":
            raise
        raise UsageError(
            f"{name} cannot be imported: torch and torchvision were not built for each other",
            expected="a torchvision wheel made for the installed torch",
            found=str(error).strip().splitlines()[0],
            todo=REINSTALL,
        ) from error


modeling = guarded_import("segment_anything.modeling")
image_encoder = guarded_import("segment_anything.modeling.image_encoder")
mask_decoder = guarded_import("segment_anything.modeling.mask_decoder")
tiny_vit = guarded_import("timm.models.tiny_vit")
convnext = guarded_import("timm.models.convnext")
