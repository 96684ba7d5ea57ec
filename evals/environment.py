"""What a measurement was made on: versions, machine, and the memory of this process.

Peak memory comes from the kernel's high-water mark of this program (`VmHWM`) where there is one.
`ru_maxrss` will not do on Linux: a child inherits the peak of the process that started it, so a
worker started by a large parent would report its parent's memory.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from bitdistill import __version__

PACKAGES = ("numpy", "tokenizers", "torch", "transformers", "onnxruntime", "mlx")
MIB = 2**20


def versions() -> dict[str, str]:
    """Versions of Python, bitdistill and those of PACKAGES that this process has imported."""
    found = {"python": platform.python_version(), "bitdistill": __version__}
    loaded = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    return found | {n: getattr(m, "__version__", None) or version(n) for n, m in loaded.items()}


def version(package: str) -> str:
    """The installed version of a package; "unknown" for one that is not installed."""
    from importlib import metadata  # slow to import: it brings the email package

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores usable by this process, memory in GiB and operating system."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        import subprocess

        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    return platform.processor() or "unknown"


def available_memory() -> float:
    """Bytes of memory that programs may still take."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    scale = MIB if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
