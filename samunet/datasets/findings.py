"""What verification found, in the one form that every command shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from samunet.core.errors import SamunetError

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or odd, about a dataset.

    Args:
        severity: An error makes the case unusable; a warning is worth a look.
        problem: What is wrong.
        case: The case it concerns; None for the dataset as a whole.
        file: The file it concerns.
        expected: What should have been there.
        found: What was there instead.
        todo: What the user can do about it.
    """

    severity: Severity
    problem: str
    case: str | None = None
    file: Path | None = None
    expected: str | None = None
    found: str | None = None
    todo: str | None = None

    @classmethod
    def from_error(cls, error: SamunetError, *, case: str | None = None, file: Path | None = None) -> Finding:
        """The finding that says what an exception said."""
        case, file = error.case or case, error.file or file
        return cls("error", error.problem, case, file, error.expected, error.found, error.todo)

    def render(self) -> str:
        """Several lines: severity, case and problem, then what is known about them."""
        rows = [("file", self.file), ("expected", self.expected), ("found", self.found), ("what to do", self.todo)]
        details = [f"    {name}: {value}" for name, value in rows if value is not None]
        return "\n".join([f"[{self.severity}] {self.case or 'dataset'}: {self.problem}", *details])


@dataclass(frozen=True)
class VerificationReport:
    """Everything verification found, errors first, then by case."""

    findings: tuple[Finding, ...] = ()

    @classmethod
    def collect(cls, findings: Iterable[Finding]) -> VerificationReport:
        """A report with its findings in reading order."""
        return cls(tuple(sorted(findings, key=lambda f: (f.severity != "error", f.case or "", f.problem))))

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that make a case, or the dataset, unusable."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings worth a look."""
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def bad_cases(self) -> tuple[str, ...]:
        """Names of the cases with an error, sorted."""
        return tuple(sorted({f.case for f in self.errors if f.case is not None}))

    def render(self) -> str:
        """All findings as text, with a count at the end."""
        if not self.findings:
            return "verification found nothing to complain about"
        count = f"{len(self.errors)} errors in {len(self.bad_cases)} cases, {len(self.warnings)} warnings"
        return "\n".join([*(finding.render() for finding in self.findings), count])
