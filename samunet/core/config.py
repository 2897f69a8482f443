"""Hand-editable schemas: frozen, typed, unknown keys refused with the nearest name, all faults at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from samunet.core.errors import ConfigError
from samunet.core.files import read_json, write_json

SchemaType = TypeVar("SchemaType", bound="Schema")


class Schema(BaseModel):
    """Base of every artifact that is stored as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def parse_schema(cls: type[SchemaType], content: Any, *, file: Path | None = None, context: Any = None) -> SchemaType:
    """Validate JSON content against a schema.

    Args:
        cls: The schema.
        content: JSON.
        file: Where it was read.
        context: Given to the schema's validators.

    Raises:
        ConfigError: With every fault in one message: its place, the value found, and for an unknown key the
            nearest known one.
    """
    try:
        return cls.model_validate(content, context=context)
    except ValidationError as error:
        faults = [_describe(cls, fault) for fault in error.errors(include_url=False)]
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(
            f"{cls.__name__}: {count}\n" + "\n".join(f"  - {text}" for text in faults),
            file=file,
            todo="correct these entries, or delete the file and plan again",
        ) from None


def load_schema(cls: type[SchemaType], path: Path) -> SchemaType:
    """Read and validate a JSON artifact."""
    return parse_schema(cls, read_json(path), file=path)


def save_schema(artifact: Schema, path: Path) -> None:
    """Write an artifact atomically as readable JSON."""
    write_json(path, artifact.model_dump(mode="json"))


def _describe(cls: type[BaseModel], fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    head = f"{place}: " if place else ""
    if fault["type"] == "value_error":
        return f"{head}{fault['ctx']['error']}"
    if fault["type"] != "extra_forbidden":
        return f"{head}{fault['msg']} (found {_short(fault.get('input'))})"
    unknown = str(fault["loc"][-1])
    nearest = difflib.get_close_matches(unknown, _keys_below(cls), n=1, cutoff=0.5)
    hint = f", did you mean '{nearest[0]}'?" if nearest else ""
    return f"{head}unknown key '{unknown}'{hint}"


def _keys_below(cls: type[BaseModel]) -> list[str]:
    """Every field name of a schema and of the schemas nested in it."""
    names: list[str] = []
    seen: set[type[BaseModel]] = set()
    pending: list[Any] = [cls]
    while pending:
        current = pending.pop()
        if isinstance(current, type) and issubclass(current, BaseModel):
            if current in seen:
                continue
            seen.add(current)
            names.extend(current.model_fields)
            pending.extend(field.annotation for field in current.model_fields.values())
        pending.extend(getattr(current, "__args__", ()))
    return names


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
