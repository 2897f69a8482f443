"""The list of presets."""

from __future__ import annotations

import pytest

from samunet.artifacts.method import summarise
from samunet.cli.train import build_parser
from samunet.planners.presets import PRESETS


def test_presets_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a line with its backbone, weights and summary in columns, and one with its method and source."""
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["--list-presets"])
    assert not caught.value.code
    written = capsys.readouterr()
    lines = (written.out + written.err).splitlines()
    columns = {line.split()[0]: (line, following) for line, following in zip(lines, [*lines[1:], ""], strict=True)}
    starts = set()
    for name, preset in PRESETS.items():
        line, following = columns[name]
        assert line.split(None, 3)[1:] == [preset.backbone, preset.weights, preset.summary]
        assert following == f"    {summarise(preset.method)} ({preset.source})"
        starts.add(line.rindex(preset.summary))
    assert len(starts) == 1
    assert lines[0].startswith("auto ")
