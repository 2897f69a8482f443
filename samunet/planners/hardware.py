"""What the machine offers, found without torch: GPU memory, available memory, minutes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from samunet.artifacts.plan import Budget
from samunet.core.errors import UsageError
from samunet.planners.schedule import DEFAULT_CPU_MINUTES

ASSUMED_GPU_GIB = 8.0
LEAST_GPU_GIB = 0.01
KEPT_FREE = 0.2
_GIB = 1 << 30
_UNLIMITED = 1 << 60
# Files of version 2 and 1 with the limit, what is used, and in which line how much of that is pages of files that were
# not read of late: the kernel drops them when a process needs the memory, so they are no use of it.
_CGROUPS = (
    tuple(Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current", "memory.stat")),
    tuple(
        Path("/sys/fs/cgroup/memory") / name
        for name in ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    ),
)
_DROPPABLE = ("total_inactive_file", "inactive_file")


def detect_budget(*, gpu_memory_gib: float | None = None, cpu_minutes: float | None = None) -> Budget:
    """The hardware to plan for: what is given, else what is found, else modest assumptions, with the reason.

    Args:
        gpu_memory_gib: Memory of the GPU to plan for; None to look.
        cpu_minutes: Training minutes on a CPU; None for the default.

    Raises:
        UsageError: If the memory given is less than a plan can hold.
    """
    check_gpu_memory(gpu_memory_gib)
    gpu, gpu_reason = (gpu_memory_gib, "as given") if gpu_memory_gib is not None else _gpu_memory()
    cpu, cpu_reason = cpu_memory()
    minutes, minutes_reason = (cpu_minutes, "as given") if cpu_minutes is not None else (DEFAULT_CPU_MINUTES, "default")
    return Budget(
        gpu_memory_gib=round(gpu, 2),
        cpu_memory_gib=round(cpu, 1),
        cpu_minutes=minutes,
        reason=f"GPU memory {gpu_reason}; CPU memory {cpu_reason}; CPU minutes {minutes_reason}",
    )


def check_gpu_memory(gpu_memory_gib: float | None) -> None:
    """Refuse memory that is given and that no GPU has.

    Args:
        gpu_memory_gib: As given; None where the machine decides.

    Raises:
        UsageError: If it is less than a plan can hold.
    """
    if gpu_memory_gib is not None and not gpu_memory_gib >= LEAST_GPU_GIB:
        raise UsageError(
            "no GPU has so little memory",
            expected=f"GiB, at least {LEAST_GPU_GIB:g}, as --gpu-memory 8",
            found=f"{gpu_memory_gib:g}",
            todo="give the memory of the GPU that will train, or leave --gpu-memory out",
        )


def _gpu_memory() -> tuple[float, str]:
    assumed = ASSUMED_GPU_GIB, "assumed, as no GPU was found here (--gpu-memory changes it)"
    program = shutil.which("nvidia-smi")
    if program is None:
        return assumed
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        found = [float(line) / 1024 for line in answer.split("\n") if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return assumed
    sizes = [gib for gib in found if gib >= LEAST_GPU_GIB]
    return (min(sizes), "of the smallest GPU found here") if sizes else assumed


def cpu_memory() -> tuple[float, str]:
    """What a process may take in GiB, and why: available memory, or what the control group leaves, less a fifth."""
    found = [(_UNLIMITED, "")]
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append((int(line.split()[1]) * 1024, "available now"))
    for limit_file, usage_file, lines_file in _CGROUPS:
        limit, usage = _read(limit_file).strip(), _read(usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            used = max(0, int(usage) - _droppable(_read(lines_file)))
            found.append((max(0, int(limit) - used), "left in the control group"))
    size, reason = min(found)
    if size >= _UNLIMITED:
        return ASSUMED_GPU_GIB, "assumed, as the system does not tell"
    return (1 - KEPT_FREE) * size / _GIB, f"{reason}, less {KEPT_FREE:.0%}"


def _droppable(statistics: str) -> int:
    """Bytes of a control group and those below it that only cache files; 0 where that is not told."""
    told = dict(line.split(maxsplit=1) for line in statistics.splitlines() if " " in line)
    return next((int(told[name]) for name in _DROPPABLE if name in told), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
