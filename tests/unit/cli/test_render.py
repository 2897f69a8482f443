"""What a command's errors become."""

from __future__ import annotations

import pytest

from samunet.cli.render import run_command
from samunet.core import errors
from samunet.core.errors import SamunetError


def _kinds(kind: type[SamunetError]) -> list[type[SamunetError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds(child))]


@pytest.mark.parametrize("kind", [k for k in _kinds(SamunetError) if k.__module__ == errors.__name__])
def test_an_error_that_ends_a_command_is_exit_code_2(
    kind: type[SamunetError], capsys: pytest.CaptureFixture[str]
) -> None:
    """1 is left to commands that went on without the cases that failed."""

    def body() -> int:
        raise kind("it cannot be done", case="a", todo="something else")

    assert run_command(body) == 2
    assert capsys.readouterr().err == "error: it cannot be done\n  case: a\n  what to do: something else\n"


def test_a_command_that_went_on_says_so_itself() -> None:
    """The exit code of a body that returns is the body's."""
    assert [run_command(lambda code=code: code) for code in (0, 1)] == [0, 1]  # type: ignore[misc]
