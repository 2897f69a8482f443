"""plans.json as text that people edit: what they changed, and configurations that inherit from others.

Works on JSON content, before any schema sees it, and on the plan's copy beside it. An entry is a decision: a dict that
holds "value".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from samunet.core.errors import ConfigError
from samunet.core.files import read_json, sha256_json, write_json

INHERITS = "inherits_from"
BY_HAND = "set by hand"
RECORD_ENDING = "_as_planned.json"
PENDING_ENDING = "_as_planned.next.json"
COPY = "as_planned"
"""Entry of a plan and of its copy by which they are known to go together: a hash of what was written."""
EDITED = {"edited": True}
"""Validation context of a plan that is about to be planned anew: what depends on an edit need not fit it yet."""
_CONFIGURATIONS = "configurations"
Content = dict[str, Any]
Place = tuple[str, ...]


def record_file(path: Path) -> Path:
    """Beside a plan, a copy of it as it was written: what differs from it was edited."""
    return path.with_name(path.stem + RECORD_ENDING)


def write_with_record(path: Path, content: Content) -> None:
    """Write a plan and its copy so that an interruption leaves the old pair or the new one.

    The new copy lies beside the old one until the plan that names it is written; readers take the one that is named.
    """
    beside, pending = record_file(path), path.with_name(path.stem + PENDING_ENDING)
    # left by an interruption after the plan was written: the only copy of the plan that is replaced now
    if path.is_file() and pending.is_file() and read_record(path, read_json(path)) == _read(pending):
        pending.replace(beside)
    content = {**content, COPY: sha256_json(content)}
    write_json(pending, content)
    write_json(path, content)
    pending.replace(beside)


def read_record(path: Path, content: Content) -> Content | None:
    """The copy that goes with a plan; None if there is none.

    Args:
        path: Of the plan.
        content: Of the plan.
    """
    beside = record_file(path)
    if COPY not in content:
        return read_json(beside) if beside.is_file() else None
    copies = (_read(file) for file in (beside, path.with_name(path.stem + PENDING_ENDING)))
    return next((copy for copy in copies if copy is not None and copy.get(COPY) == content[COPY]), None)


def _read(file: Path) -> Content | None:
    content = read_json(file) if file.is_file() else None
    return content if isinstance(content, dict) else None


def entries(content: Any, place: Place = ()) -> Iterator[tuple[Place, Content]]:
    """Every decision of a plan's content with its place, in order."""
    if not isinstance(content, dict):
        return
    if "value" in content:
        yield place, content
        return
    for key, below in content.items():
        yield from entries(below, (*place, key))


def entry_at(content: Any, place: Place) -> Content | None:
    """The decision at a place, or None."""
    for key in place:
        if not isinstance(content, dict) or key not in content:
            return None
        content = content[key]
    return content if isinstance(content, dict) and "value" in content else None


def marked(content: Content, record: Content | None) -> Content:
    """The content with what the user changed marked as the user's.

    Args:
        content: Of plans.json, as it is now.
        record: Of plans.json as it was written; None if that is not known: then only what says so is the user's.

    Returns:
        A copy. An entry is the user's if it says so, if its value is another one than was written, or if it was not
        written at all; one without a reason gets one.
    """
    content = deepcopy(content)
    for place, entry in entries(content):
        written = entry_at(record, place)
        if record is not None and (written is None or written["value"] != entry["value"]):
            entry["source"] = "user"
            if written is not None and "source" not in written and written.get("reason") == entry.get("reason"):
                entry["reason"] = f"{BY_HAND}; the rule had {_short(written['value'])}: {written['reason']}"
        if "reason" not in entry:
            entry["reason"] = BY_HAND
            entry["source"] = "user"
    return content


def resolved(content: Any, *, file: Path | None = None) -> Any:
    """The content with every configuration complete: what it does not name comes from the one it inherits from.

    Raises:
        ConfigError: If a parent does not exist or configurations inherit from each other in a circle.
    """
    configurations = content.get(_CONFIGURATIONS) if isinstance(content, dict) else None
    if not isinstance(configurations, dict):
        return content
    made = {name: _complete(name, configurations, (), file) for name in configurations}
    return {**content, _CONFIGURATIONS: made}


def reduced(content: Content) -> Content:
    """The reverse of :func:`resolved`: configurations that inherit hold only what differs from their parent."""
    made = {}
    for name, configuration in content[_CONFIGURATIONS].items():
        parent = configuration.get(INHERITS)
        own = {key: value for key, value in configuration.items() if key != INHERITS}
        known = content[_CONFIGURATIONS].get(parent)
        made[name] = own if known is None else {INHERITS: parent, **_beyond(known, own)}
    return {**content, _CONFIGURATIONS: made}


def _complete(name: str, configurations: Mapping[str, Any], children: Place, file: Path | None) -> Any:
    configuration = configurations[name]
    parent = configuration.get(INHERITS) if isinstance(configuration, dict) else None
    if parent is None:
        return configuration
    if str(parent) not in configurations:
        raise ConfigError(
            f"configuration '{name}' inherits from one that does not exist",
            file=file,
            expected=f"{INHERITS}: one of {', '.join(other for other in configurations if other != name)}",
            found=str(parent),
        )
    if parent == name or parent in children:
        raise ConfigError(
            "configurations inherit from each other in a circle",
            file=file,
            expected=f"a chain of {INHERITS} that ends in a planned configuration",
            found=" -> ".join([*children, name, parent]),
        )
    return _merged(_complete(parent, configurations, (*children, name), file), configuration)


def _merged(parent: Any, child: Any) -> Any:
    """Parent's content with the child's on top; decisions are taken over whole."""
    if not isinstance(parent, dict) or not isinstance(child, dict) or "value" in child:
        return child
    return {**parent, **{key: _merged(parent[key], own) if key in parent else own for key, own in child.items()}}


def _beyond(parent: Any, child: Content) -> Content:
    """What of the child's content its parent's does not say."""
    kept = {}
    for key, own in child.items():
        other = parent.get(key) if isinstance(parent, dict) else None
        if not isinstance(own, dict):
            if own != other:
                kept[key] = own
        elif "value" in own:
            if not isinstance(other, dict) or any(own.get(part) != other.get(part) for part in ("value", "source")):
                kept[key] = own
        elif below := _beyond(other, own):
            kept[key] = below
    return kept


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
