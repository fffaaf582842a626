"""What is built of a checkout: the wheel, the source distribution, and what they say of themselves."""

from __future__ import annotations

import email
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

import ritornello

CHECKOUT = Path(__file__).parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
VERSION = ritornello.__version__

TOP = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "PKG-INFO",
    "README.md",
    "SECURITY.md",
    "benchmarks",
    "docs",
    "examples",
    "pyproject.toml",
    "src",
    "tests",
}
"""What a source distribution holds at its top; ``.gitignore`` and ``PKG-INFO`` are hatchling's."""

FAMILIES = {
    "Apache Software License": {"Apache-2.0"},
    "BSD License": {"BSD-2-Clause", "BSD-3-Clause"},
    "MIT License": {"MIT"},
    "Python Software Foundation License": {"PSF-based"},
    "Apache": {"Apache-2.0"},
    "Apache 2.0": {"Apache-2.0"},
    "Apache 2.0 License": {"Apache-2.0"},
    "Apache Software License 2.0": {"Apache-2.0"},
    "BSD": {"BSD-2-Clause", "BSD-3-Clause"},
    "LicenseRef-MPICH": {"MPICH"},
}
"""Licences as packages name them -> as the documentation does."""


def build(*arguments: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sdist")
    build("--sdist", "--outdir", str(folder), str(CHECKOUT))
    prefix = f"ritornello-{VERSION}/"
    with tarfile.open(folder / f"ritornello-{VERSION}.tar.gz") as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        assert all(member.name.startswith(prefix) for member in files)
        return {m.name.removeprefix(prefix): archive.extractfile(m).read() for m in files}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build("--wheel", "--outdir", str(folder), str(CHECKOUT))
    [path] = folder.iterdir()
    assert path.name == f"ritornello-{VERSION}-py3-none-any.whl"
    return path


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> dict[str, bytes]:
    return contents(wheel_path)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata_of(wheel: dict[str, bytes]) -> Message:
    return email.message_from_bytes(wheel[f"ritornello-{VERSION}.dist-info/METADATA"])


def sources() -> dict[str, bytes]:
    root = CHECKOUT / "src"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_the_sources_and_nothing_else(wheel: dict[str, bytes]) -> None:
    about = f"ritornello-{VERSION}.dist-info/"
    assert {name for name in wheel if name.startswith(about)} == {
        about + name
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert {name: data for name, data in wheel.items() if not name.startswith(about)} == sources()
    for needed in (
        "py.typed",
        "experiments/data/load.py",  # folders of data that lie in a checkout are ignored
        "experiments/reporting/templates/report.html.j2",
    ):
        assert f"ritornello/{needed}" in wheel


def test_the_source_distribution_is_the_checkout_without_what_lies_in_it(
    sdist: dict[str, bytes],
) -> None:
    assert {name.partition("/")[0] for name in sdist} == TOP
    for name, data in sdist.items():
        if name != "PKG-INFO":
            assert data == (CHECKOUT / name).read_bytes(), name
    for folder, pattern in (
        ("src", "*.py"),
        ("tests", "*.py"),
        ("benchmarks", "*.py"),
        ("examples", "*"),
        ("docs", "*.md"),
    ):
        here = {
            path.relative_to(CHECKOUT).as_posix()
            for path in (CHECKOUT / folder).rglob(pattern)
            if path.is_file() and not {"__pycache__", "_build"} & {*path.parts}
        }
        assert here
        assert here <= sdist.keys()
    assert ".ci/run" in sdist
    for name in sdist:
        assert not re.search(r"(^|/)(\.git|\.venv[^/]*|__pycache__|_build|dist|runs)/", name), name


def test_a_wheel_of_the_source_distribution_is_the_same(
    sdist: dict[str, bytes], wheel: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in sdist.items():
        path = tmp_path / "unpacked" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    build("--wheel", "--outdir", str(tmp_path / "out"), str(tmp_path / "unpacked"))
    [path] = (tmp_path / "out").iterdir()
    assert contents(path) == wheel


def test_what_the_wheel_says_of_itself(wheel: dict[str, bytes]) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Name"] == "ritornello"
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# Ritornello\n")
    # Only addresses that exist.
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2406.03285"]
    required = metadata.get_all("Requires-Dist") or []
    core = [each for each in required if "extra ==" not in each]
    assert sorted(re.split(r"[<>=]", each)[0] for each in core) == ["numpy", "torch"]
    assert set(metadata.get_all("Provides-Extra") or []) == {*PROJECT["optional-dependencies"]}
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert not [each for each in classifiers if each.startswith("License")]  # is an expression
    pythons = {each.rpartition(" ")[2] for each in classifiers if "Python :: 3." in each}
    assert pythons == {"3.11", "3.12", "3.13"}


def test_the_command_is_there(wheel: dict[str, bytes]) -> None:
    text = wheel[f"ritornello-{VERSION}.dist-info/entry_points.txt"].decode()
    assert text.split() == [
        "[console_scripts]",
        "ritornello",
        "=",
        "ritornello.experiments.cli:main",
    ]
    [installed] = importlib.metadata.entry_points(group="console_scripts", name="ritornello")
    assert callable(installed.load())
    assert (Path(sys.executable).parent / "ritornello").exists()


def test_the_wheel_alone_needs_pytorch_and_numpy_alone(wheel_path: Path, tmp_path: Path) -> None:
    """Without any extra, as after ``pip install ritornello-*.whl``."""
    with zipfile.ZipFile(wheel_path) as archive:
        archive.extractall(tmp_path)
    extras = {module for module in MODULES.values() if module not in ("torch", "numpy")}
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
for name in {sorted(extras)!r}:
    sys.modules[name] = None  # cannot be imported
import torch, ritornello
assert ritornello.__file__.startswith({str(tmp_path)!r}), ritornello.__file__
with ritornello.RehearsalBuffer(10, num_representatives=2) as buffer:
    for _ in range(3):
        images, labels = buffer.update((torch.zeros(4, 3), torch.arange(4)))
    assert len(images) == 6
    buffer.save("saved")
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_version_has_one_source() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    citation = (CHECKOUT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [VERSION]
    assert importlib.metadata.version("ritornello") == VERSION


# Licences.


def dependencies() -> dict[str, set[str]]:
    """Direct dependencies, and what needs them: "" or the names of extras."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    found: dict[str, set[str]] = {}
    for group, requirements in groups.items():
        for each in requirements:
            found.setdefault(re.split(r"[<>=\[; ]", each)[0].lower(), set()).add(group)
    return found


MODULES = {
    name: {"avalanche-lib": "avalanche", "pillow": "PIL", "scikit-learn": "sklearn"}.get(
        name, name.replace("-", "_")
    )
    for name in dependencies()
}


def licence_table() -> dict[str, tuple[set[str], str]]:
    """Package -> what needs it, licence; from the documentation."""
    text = (CHECKOUT / "docs" / "compatibility.md").read_text().partition("## Licences")[2]
    rows = re.findall(r"^\| ([\w-]+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    table = {}
    for package, users, licence in rows:
        if package.strip("-") not in ("", "package"):
            names = {each.strip("` ") for each in users.split(",")}
            table[package] = ({"" if each == "the library" else each for each in names}, licence)
    return table


def test_the_table_of_licences_has_each_direct_dependency() -> None:
    assert {package: users for package, (users, _) in licence_table().items()} == dependencies()


def licences_of(metadata: Any) -> set[str]:
    """What a package says its licence is, in the words of the table; empty if it does not say."""
    expression = metadata.get("License-Expression")
    if expression:
        return set(re.split(r" AND | OR |[()]", expression))
    said = [each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier") or []]
    found = set().union(*(FAMILIES.get(each, set()) for each in said))
    text = metadata.get("License") or ""
    if not found and len(text) < 40:
        found = FAMILIES.get(text, {text} if text else set())
    return found


def test_the_licences_are_what_the_packages_say() -> None:
    num_compared = 0
    for package, (_, licence) in licence_table().items():
        try:
            said = licences_of(importlib.metadata.metadata(package))
        except importlib.metadata.PackageNotFoundError:  # of an extra that is not installed here
            continue
        if said:
            assert licence in said, package
            num_compared += 1
    assert num_compared > 10
