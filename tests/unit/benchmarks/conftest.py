"""What holds for every test of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.cells import RESULTS
from samunet.core.files import sha256_file


@pytest.fixture(autouse=True)
def results_stay_as_they_are() -> Iterator[None]:
    """No test writes into the committed figures."""
    before = {file.name: sha256_file(file) for file in RESULTS.glob("*.json")}
    yield
    assert {file.name: sha256_file(file) for file in RESULTS.glob("*.json")} == before
