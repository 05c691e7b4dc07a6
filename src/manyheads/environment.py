"""What is installed and what this process runs on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from manyheads import _ops


@dataclass(frozen=True)
class Info:
    """The versions and the hardware behind manyheads' answers; `str()` makes a readable report.

    isa: the kernels in use, "amx_fp16", "amx", "avx512_bf16", "avx512", "avx2", "neon" or "scalar";
        None if there are none. The first three are "avx512" with other products for half types.
    available_isas: those this machine can run, best first; MANYHEADS_ISA chooses a later one.
    threads: how many the kernels use, which is torch.get_num_threads().
    native_error: why the native backend is not available, or None if it is.
    """

    manyheads: str
    torch: str
    python: str
    isa: str | None
    available_isas: tuple[str, ...]
    threads: int
    native_error: str | None

    def __str__(self) -> str:
        native = f"not available: {self.native_error}"
        if self.native_error is None:
            native = f"{self.isa} kernels (this machine has {', '.join(self.available_isas)})"
        return "\n".join(
            [
                f"manyheads {self.manyheads}, torch {self.torch}, python {self.python}",
                f"native backend: {native}",
                f"threads: {self.threads}",
            ]
        )


def info() -> Info:
    """Versions, kernels, threads, and why the native backend is missing if it is.

    >>> info().threads >= 1
    True
    """
    kernels = _ops.cpu_kernels()
    return Info(
        manyheads=_version(),
        torch=torch.__version__,
        python=platform.python_version(),
        isa=kernels.name,
        available_isas=kernels.detected,
        threads=torch.get_num_threads(),
        native_error=_ops.LIBRARY_ERROR or kernels.error,
    )


def _version() -> str:
    try:
        return metadata.version("manyheads")
    except metadata.PackageNotFoundError:
        return "unknown (run from a source tree that is not installed)"
