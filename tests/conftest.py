"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real datasets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SAMUNET_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real datasets at {folder} (set SAMUNET_TEST_DATA)")
    return folder
