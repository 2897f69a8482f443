"""Names of devices."""

from __future__ import annotations

import pytest

from samunet.core.errors import UsageError
from samunet.models.device import device_class, resolve_device


def test_cpu_always_exists_and_others_are_checked() -> None:
    """The CPU is itself, auto is something that exists, and a device that is not there is refused with a list."""
    assert resolve_device("cpu") == "cpu"
    assert resolve_device(resolve_device("auto")) == resolve_device("auto")
    with pytest.raises(UsageError, match="does not exist") as caught:
        resolve_device("cuda:99")
    assert "cpu" in str(caught.value.expected)


def test_everything_but_the_cpu_is_planned_as_a_gpu() -> None:
    """The plan knows two classes of devices."""
    assert [device_class(name) for name in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "gpu", "gpu", "gpu"]
