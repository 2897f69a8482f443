"""One exception tree. A message says what was expected, what was found, where, and what to do."""

from __future__ import annotations

from pathlib import Path


class SamunetError(Exception):
    """Base of every error a user can cause or meet.

    One that concerns a single case becomes that case's outcome wherever other cases can go on; one that ends a command
    gives it the exit code of wrong usage or input.

    Args:
        problem: What is wrong, one sentence.
        expected: What should have been there.
        found: What was there instead.
        case: The case it concerns.
        file: The file it concerns.
        todo: What the user can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        case: str | None = None,
        file: Path | str | None = None,
        todo: str | None = None,
    ) -> None:
        self.problem = problem
        self.expected = expected
        self.found = found
        self.case = case
        self.file = None if file is None else Path(file)
        self.todo = todo
        super().__init__(problem)

    def __str__(self) -> str:
        rows = [
            ("case", self.case),
            ("file", self.file),
            ("expected", self.expected),
            ("found", self.found),
            ("what to do", self.todo),
        ]
        details = [f"  {name}: {value}" for name, value in rows if value is not None]
        return "\n".join([self.problem, *details])

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.problem, self.__dict__.copy()))


def _rebuild(cls: type[SamunetError], problem: str, state: dict[str, object]) -> SamunetError:
    error = cls(problem)
    error.__dict__.update(state)
    return error


class UsageError(SamunetError):
    """The command line or the call asks for something that does not exist or does not go together."""


class ConfigError(SamunetError):
    """A plan, dataset.json or another hand-editable file breaks its schema."""


class DataError(SamunetError):
    """A case or a file of a dataset cannot be used."""


class GeometryError(DataError):
    """An affine, spacing or shape that no voxel grid can have."""


class StoreError(SamunetError):
    """The preprocessed store is missing, incomplete, or was made by another plan."""


class WeightsError(SamunetError):
    """Pretrained weights cannot be found, verified or loaded."""


class CheckpointError(SamunetError):
    """A training result is missing, incomplete or does not fit."""


class TrainingError(SamunetError):
    """Training cannot go on."""


class OutOfMemoryError(SamunetError):
    """A step does not fit the device."""
