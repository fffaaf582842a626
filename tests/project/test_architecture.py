"""The structure that the design promises, held by reading the sources."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ritornello

SOURCES = Path(ritornello.__file__).parent
NOT_CORE = {"experiments", "integrations"}
CORE = sorted(p for p in SOURCES.rglob("*.py") if not NOT_CORE & {*p.relative_to(SOURCES).parts})


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def files_importing(*modules: str) -> set[str]:
    return {
        path.relative_to(SOURCES).as_posix()
        for path in CORE
        for name in imports_of(path)
        if name in modules
    }


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_torch_and_numpy_alone(path: Path) -> None:
    for name in imports_of(path):
        assert not name.startswith(("ritornello.experiments", "ritornello.integrations"))
        top = name.partition(".")[0]
        allowed = {"torch", "numpy", "ritornello"}
        if path.name == "mpi.py":  # loads it only where it is used, see below
            allowed |= {"mpi4py"}
        assert top in allowed or top in sys.stdlib_module_names


def test_importing_the_library_loads_no_experiments_and_no_mpi() -> None:
    code = (
        "import sys, ritornello; "
        "not_core = ('ritornello.experiments', 'ritornello.integrations'); "
        "assert not [m for m in sys.modules if m.startswith(not_core)]; "
        "extras = {'matplotlib', 'torchvision', 'timm', 'rich', 'sklearn', 'mpi4py', 'kornia'}; "
        "extras |= {'lightning', 'accelerate', 'avalanche', 'tensorboard', 'wandb', 'tensordict', 'torch._dynamo'}; "
        "assert not extras & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_the_worker_the_loader_and_checksums_own_a_thread() -> None:
    makes_threads = {
        path.relative_to(SOURCES).as_posix()
        for path in CORE
        if "threading.Thread(" in path.read_text() or "ThreadPoolExecutor(" in path.read_text()
    }
    assert makes_threads == {
        "rounds/worker.py",
        "prefetch.py",
        "saving/shard_file.py",
        "testing.py",
    }


def test_only_transports_talk_to_other_ranks() -> None:
    importing = files_importing("torch.distributed") - {"testing.py"}
    assert importing == {
        "buffer.py",  # for a type annotation
        "transports/opening.py",
        "transports/collective.py",
        "transports/mpi.py",
    }


def test_one_module_knows_about_devices() -> None:
    """All others ask ``records/accelerators.py``: what is said of CUDA alone is wrong for others."""
    for path in SOURCES.rglob("*.py"):
        if path.name == "accelerators.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            of_one_maker = named.startswith(("torch.cuda", "torch.xpu", "torch.mps", "torch.npu"))
            assert not of_one_maker, f"{path}: {named}"
            assert not named.startswith(("torch.accelerator", "torch.get_device_module")), path
            assert not named.endswith((".is_cuda", ".is_xpu", ".is_mps")), f"{path}: {named}"
            if isinstance(node, ast.Compare):
                assert "'cuda'" not in ast.unparse(node), f"{path}: {ast.unparse(node)}"


def test_every_public_name_has_a_docstring() -> None:
    for name in ritornello.__all__:
        public = getattr(ritornello, name)
        if inspect.isclass(public):
            assert public.__doc__, name
            for member, value in vars(public).items():
                if inspect.isfunction(value) and not member.startswith("_"):
                    assert value.__doc__, f"{name}.{member}"
