"""One decision of a plan: its value, why, and whether a rule or the user took it."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from samunet.core.config import Schema

ValueType = TypeVar("ValueType")
Source = Literal["rule", "user"]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveTriple = tuple[Positive, Positive, Positive]
Share = Annotated[float, Field(ge=0, le=1)]
Overlap = Annotated[float, Field(ge=0, lt=1)]


class Decided(Schema, Generic[ValueType]):
    """A decision and why it was taken. What a rule decided is written without ``source`` and ``by_rule``.

    Args:
        value: The decision; edit it by hand if you know better.
        reason: One sentence with the numbers it was derived from.
        source: Who took it. The user's decisions survive planning again, and others are planned around them.
        by_rule: What the rule says where the user decided; None where no rule was asked yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: ValueType
    reason: str
    source: Source = "rule"
    by_rule: ValueType | None = None

    @model_serializer(mode="wrap")
    def _without_marks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if self.source == "rule":
            content.pop("source", None)
            content.pop("by_rule", None)
        return content

    @property
    def by_user(self) -> bool:
        """Whether the user decided."""
        return self.source == "user"
