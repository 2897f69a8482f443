"""Variants of LoRA from the peft library, an extra of this package.

The library wraps a layer: the keys of the base weights gain ``.base_layer``, so weights are loaded before.

Source: Mangrulkar et al., PEFT (the library); Liu et al., DoRA, 2024; Kalajdzievski, rsLoRA, 2023.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

from samunet.artifacts.method import PeftLibrary
from samunet.core.errors import UsageError
from samunet.models.peft.blocks import chosen_blocks, linear_place
from samunet.models.peft.lora import plain_linear
from samunet.models.sam.encoder import SamEncoder

TUNERS = "peft.tuners."
PARAMETER_PREFIX = "lora_"


def inject_library(encoder: SamEncoder, choice: PeftLibrary) -> None:
    """Let the peft library wrap whole linear layers of the chosen blocks.

    Raises:
        ConfigError: If a block does not exist, or a layer was replaced before.
        UsageError: If the library is not installed.
    """
    library = _library()
    names = {id(module): name for name, module in encoder.named_modules()}
    blocks = encoder.attention_blocks()
    places = [linear_place(blocks[i], t) for i in chosen_blocks(encoder, choice.blocks) for t in choice.targets]
    layers = [plain_linear(getattr(parent, name)) for parent, name in places]
    config = library.LoraConfig(
        r=choice.rank,
        lora_alpha=choice.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=[names[id(layer)] for layer in layers],
        use_dora=choice.variant == "dora",
        use_rslora=choice.variant == "rslora",
    )
    library.inject_adapter_in_model(config, encoder)


def library_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Full names and modules of the layers that the library wraps."""
    return [(name, m) for name, m in model.named_modules() if is_library_layer(m)]


def is_library_layer(module: nn.Module) -> bool:
    """Whether a module is a wrapper of the library's, known by where its class is defined."""
    return type(module).__module__.startswith(TUNERS) and hasattr(module, "base_layer")


def library_parameters(layer: nn.Module) -> list[str]:
    """Names of the parameters that the library added to a layer, relative to it."""
    return [name for name, _ in layer.named_parameters() if name.startswith(PARAMETER_PREFIX)]


def merged_layer(layer: nn.Module) -> nn.Module:
    """The plain layer with the library's update in its weight; the update is linear in the input in all variants."""
    layer.merge()  # type: ignore[operator]
    base: nn.Module = layer.get_base_layer()  # type: ignore[operator]
    return base


def _library() -> ModuleType:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UsageError(
            "this adapter comes from the peft library, which cannot be imported",
            found=str(error),
            todo="pip install samunet[peft], or choose the lora adapter",
        ) from error
