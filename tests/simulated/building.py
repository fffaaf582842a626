"""Builds the simulated accelerator, once for each version of PyTorch and of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "sources"
BUILD_SECONDS = 600.0


class BuildError(Exception):
    """There is no compiler, or it refuses the sources."""


def library() -> Path:
    """The built library.

    Raises:
        BuildError: it cannot be built; says why.
    """
    parts = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ritornello-tests"
    built = cache / f"simulated-{torch.__version__}-{digest}.so"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # of test processes that begin together, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _build(built)
    return built


def _build(built: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++ or clang++)")
    torch_folder = Path(torch.__file__).parent
    unfinished = built.with_suffix(".unfinished")
    command = [
        *(compiler, "-O1", "-g0", "-std=c++20", "-fPIC", "-shared", "-o", str(unfinished)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *("-isystem", str(torch_folder / "include")),
        *("-isystem", str(torch_folder / "include/torch/csrc/api/include")),
        str(SOURCES / "device.cpp"),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
    )
    if ran.returncode:
        raise BuildError(f"{compiler} failed: {ran.stderr[-2000:]}")
    unfinished.replace(built)
