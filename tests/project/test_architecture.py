"""The structure that the design promises, held by reading the sources."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

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


# The rooms, and who may import whom.

Floors = Sequence[tuple[str, ...]]

HOUSE: Floors = [
    ("experiments",),
    ("integrations",),
    ("ritornello",),  # the public names
    ("loaders", "testing"),
    ("buffer",),
    ("saving",),
    ("rounds",),
    ("transports",),
    ("policies", "records"),
    ("arrays", "errors", "version"),
]
"""From top to bottom. A room, or a module beside them, imports from floors below its own only."""

EXPERIMENTS: Floors = [
    ("cli",),
    ("inspection", "speed"),
    ("reporting",),
    ("training",),
    ("results",),
    ("strategies",),
    ("models",),
    ("data", "ranks"),
    ("recipes",),
]
"""The same inside ``experiments``."""

MOST_ENTRIES = 15
"""In a folder, beside its ``__init__.py``."""

MOST_LINES = 450
"""Of a file, docstrings not counted."""


class Arrow(NamedTuple):
    """One module imports another: anywhere in it, also inside a function or for types alone."""

    importing: str
    imported: str
    where: str


@cache
def arrows() -> list[Arrow]:
    """All imports of the library's modules by each other."""
    paths = {module_of(path): path for path in SOURCES.rglob("*.py")}
    found = []
    for module, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: an import relative to its folder"
                each = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
                names = [full if full in paths else str(parent) for full, parent in each]
            for name in names:
                if name in paths:
                    where = f"{path.relative_to(SOURCES)}:{node.lineno}"
                    found.append(Arrow(module, name, where))
    return found


def module_of(path: Path) -> str:
    """The dotted name of a module, or of a package for its ``__init__.py``."""
    dotted = path.relative_to(SOURCES.parent).with_suffix("").as_posix().replace("/", ".")
    return dotted.removesuffix(".__init__")


def room_in(package: str, module: str) -> str | None:
    """The room of a package that a module is in; the package's last name for its ``__init__``."""
    if module == package:
        return package.rpartition(".")[2]
    if not module.startswith(f"{package}."):
        return None
    return module.removeprefix(f"{package}.").partition(".")[0]


def arrows_not_down(package: str, floors: Floors, found: Sequence[Arrow]) -> list[str]:
    """Imports of one room by another that is not above it."""
    floor_of = {room: number for number, rooms in enumerate(floors) for room in rooms}
    wrong = []
    for arrow in found:
        above, below = room_in(package, arrow.importing), room_in(package, arrow.imported)
        if above is None or below is None or above == below:
            continue
        if floor_of[above] >= floor_of[below]:
            wrong.append(f"{arrow.where}: {above} imports {below} ({arrow.imported})")
    return wrong


def circle_in(found: Sequence[Arrow]) -> str:
    """Some modules that import each other in a circle; "" if there are none."""
    graph: dict[str, set[str]] = {}
    for arrow in found:
        graph.setdefault(arrow.importing, set()).add(arrow.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


@pytest.mark.parametrize(
    ("package", "floors"), [("ritornello", HOUSE), ("ritornello.experiments", EXPERIMENTS)]
)
def test_every_room_has_its_floor(package: str, floors: Floors) -> None:
    rooms = {room_in(package, module_of(path)) for path in SOURCES.rglob("*.py")} - {None}
    if package == "ritornello.experiments":
        rooms -= {"experiments"}  # its `__init__` imports nothing
    assert rooms == {room for each in floors for room in each}, "name it in HOUSE or EXPERIMENTS"


@pytest.mark.parametrize(
    ("package", "floors"), [("ritornello", HOUSE), ("ritornello.experiments", EXPERIMENTS)]
)
def test_arrows_between_rooms_run_down(package: str, floors: Floors) -> None:
    assert len(arrows()) > 300
    wrong = arrows_not_down(package, floors, arrows())
    assert not wrong, "a room imports from rooms below its own only:\n" + "\n".join(wrong)


def test_an_arrow_up_or_beside_would_be_found() -> None:
    down = Arrow("ritornello.saving.folder", "ritornello.rounds.round", "saving/folder.py:1")
    up = Arrow("ritornello.rounds.round", "ritornello.saving.folder", "rounds/round.py:1")
    beside = Arrow("ritornello.records.shard", "ritornello.policies.names", "records/shard.py:1")
    within = Arrow("ritornello.rounds.round", "ritornello.rounds.staging", "rounds/round.py:2")
    door = Arrow("ritornello.rounds.round", "ritornello", "rounds/round.py:3")
    wrong = arrows_not_down("ritornello", HOUSE, [down, up, beside, within, door])
    assert wrong == [
        "rounds/round.py:1: rounds imports saving (ritornello.saving.folder)",
        "records/shard.py:1: records imports policies (ritornello.policies.names)",
        "rounds/round.py:3: rounds imports ritornello (ritornello)",
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    circle = circle_in(arrows())
    assert not circle, f"imported <- importing: {circle}"


def test_a_circle_would_be_found() -> None:
    ring = [Arrow(one, other, "") for one, other in ("ab", "bc", "ca", "cd")]
    assert {*circle_in(ring).split(" <- ")} == {*"abc"}


def test_a_folder_holds_as_much_as_one_can_take_in() -> None:
    entries = {
        path.relative_to(SOURCES).as_posix(): sorted(
            each.name for each in path.iterdir() if each.name not in ("__init__.py", "__pycache__")
        )
        for path in [SOURCES, *SOURCES.rglob("*")]
        if path.is_dir() and path.name != "__pycache__"
    }
    too_full = {folder: names for folder, names in entries.items() if len(names) > MOST_ENTRIES}
    assert not too_full, f"more than {MOST_ENTRIES} entries: make a room of some"


def num_lines_of_code(path: Path) -> int:
    """Lines of a file that are not of docstrings."""
    text = path.read_text()
    num_lines = len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            num_lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return num_lines


def test_no_file_is_too_long_to_read() -> None:
    num_lines = {
        path.relative_to(SOURCES).as_posix(): num_lines_of_code(path)
        for path in SOURCES.rglob("*.py")
    }
    too_long = {path: num for path, num in num_lines.items() if num > MOST_LINES}
    assert not too_long, f"more than {MOST_LINES} lines: a file has one subject"


# What only one of them does.


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
        "extras |= {'lightning', 'accelerate', 'transformers', 'avalanche', 'tensorboard', 'wandb', 'tensordict', 'torch._dynamo'}; "
        "assert not extras & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_few_own_a_thread() -> None:
    makes_threads = {
        path.relative_to(SOURCES).as_posix()
        for path in CORE
        if "threading.Thread(" in path.read_text() or "ThreadPoolExecutor(" in path.read_text()
    }
    assert makes_threads == {
        "rounds/worker.py",
        "transports/watch.py",
        "transports/collective.py",  # gloo's constructor, which may wait for too long
        "saving/shard_file.py",
        "testing.py",
    }


def test_only_the_shard_moves_what_is_stored() -> None:
    writes_rows = set()
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text())):
            is_row = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
            into = ast.unparse(node.value) if is_row else ""
            if into.endswith((".rows", "._words", "._array")) or (
                isinstance(node, ast.Attribute) and node.attr == "index_copy_"
            ):
                writes_rows.add(path.relative_to(SOURCES).as_posix())
    assert writes_rows == {"records/shard.py"}


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
