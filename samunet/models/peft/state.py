"""Free functions over whatever was injected: collect, freeze, select, merge, validate."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from samunet.core.errors import ConfigError
from samunet.models.peft.library import library_layers, library_parameters, merged_layer
from samunet.models.peft.protocol import AdapterModule, MergeableModule


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full names and parameters of all injected modules."""
    found = [(prefix, m.adapter_params()) for prefix, m in model.named_modules() if isinstance(m, AdapterModule)]
    found += [(prefix, library_parameters(layer)) for prefix, layer in library_layers(model)]
    names = [f"{prefix}.{name}".lstrip(".") for prefix, relative in found for name in relative]
    return {name: model.get_parameter(name) for name in names}


def freeze_all_but(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly the named parameters be trained.

    Raises:
        KeyError: If a name is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(names) - set(parameters))
    if unknown:
        raise KeyError(f"no parameters of these names: {', '.join(unknown)}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Names and values of the parameters that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merge(model: nn.Module) -> None:
    """Write every injected module into its base weights and remove it; a second call finds nothing to do.

    Args:
        model: Changed in place; no injected module itself.

    Raises:
        ConfigError: If one of them has no exact merge; nothing is changed then.
    """
    sites = [(name, m) for name, m in model.named_modules() if isinstance(m, AdapterModule)]
    refused = [
        f"{name} ({getattr(module, 'kind', type(module).__name__)})"
        for name, module in sites
        if not isinstance(module, MergeableModule)
    ]
    if refused:
        raise ConfigError(
            "these adapters are not linear in their input and cannot be merged into the base weights",
            expected="lora, fact or peft only",
            found=_shorten(refused),
            todo="keep the model with its adapters",
        )
    merged = [(name, module.merged()) for name, module in sites if isinstance(module, MergeableModule)]
    merged += [(name, merged_layer(layer)) for name, layer in library_layers(model)]
    for name, plain in merged:
        parent, _, child = name.rpartition(".")
        if plain is None:
            delattr(model.get_submodule(parent), child)
        else:
            setattr(model.get_submodule(parent), child, plain)


def validate(model: nn.Module, *, covered: Collection[str], unused: Collection[str] = ()) -> None:
    """Check that no parameter is both random and frozen.

    Args:
        model: With its final ``requires_grad``.
        covered: Names of the parameters whose values came from a checkpoint.
        unused: Names of parameters that no output depends on.

    Raises:
        ConfigError: Listing the parameters that would stay at their random start, or adapters that are frozen.
    """
    excused = set(covered) | set(unused)
    stuck = [n for n, p in model.named_parameters() if not p.requires_grad and n not in excused]
    stuck += [n for n, p in adapter_parameters(model).items() if not p.requires_grad and n not in stuck]
    if stuck:
        raise ConfigError(
            f"{len(stuck)} parameters are frozen at random values",
            found=_shorten(stuck),
            todo="train that part fully (encoder.train or decoder.train = full), or start from weights that cover it",
        )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
