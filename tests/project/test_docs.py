"""What README and documentation show runs, parses, exists, and is said by the sources.

In a page, a block of Python that imports the library is complete: it runs as it stands, in an empty
folder. Other blocks are excerpts. A comment before a block says otherwise:

- ``<!-- given: loader, model, ... -->``: it runs with these names, of a loop over digits;
- ``<!-- continues -->``: it runs behind the last one that ran on its page, with its names;
- ``<!-- not run: REASON -->``: an excerpt although it imports the library.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pkgutil
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ritornello
from ritornello.experiments.cli import command as cli
from ritornello.experiments.training import run as train

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = ROOT / "src" / "ritornello"
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")))
    if "_build" not in page.parts
}

BLOCK = re.compile(
    r"^(?:<!-- (?P<how>given|continues|not run)(?:: (?P<what>[^>]*?))? -->\n+)?"
    r"^```(?P<language>python|sh|bash|shell)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


# What frameworks say when they are imported or used, whoever uses them: about solvers that are not
# there, loggers that were not given, few workers of a loader, and names of torch that have changed.
FRAMEWORKS_WARN = (
    "ignore:no QP solver found:UserWarning",
    "ignore:No loggers specified:UserWarning",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:The `srun` command:UserWarning",
    "ignore:.*LeafSpec.*",
)


class Block(NamedTuple):
    page: str
    line: int
    how: str | None
    what: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks(of_python: bool) -> list[Block]:
    """All blocks of Python, or all of shell, page by page."""
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")) + 1,
            found["how"],
            found["what"] or "",
            found["code"],
        )
        for page, text in PAGES.items()
        for found in BLOCK.finditer(text)
        if (found["language"] == "python") == of_python
    ]


# Python.


def chains() -> list[list[Block]]:
    """The blocks that run: each with those that continue it."""
    found: list[list[Block]] = []
    for block in blocks(of_python=True):
        if block.how == "not run":
            continue
        if block.how == "continues":
            assert found, f"{block} continues nothing"
            assert found[-1][0].page == block.page, f"{block} continues nothing on its page"
            found[-1].append(block)
        elif block.how == "given" or re.search(
            r"^\s*(from|import) ritornello", block.code, re.MULTILINE
        ):
            found.append([block])
    return found


def digits_loop() -> dict[str, Any]:
    """What the excerpts of training loops take for granted, on scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)[:560] / 16
    labels = torch.tensor(digits.target)[:560]
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return {
        "loader": DataLoader(TensorDataset(images, labels), batch_size=56),
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "optimiser": torch.optim.SGD(model.parameters(), lr=0.1),
    }


@contextmanager
def only_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a process that torchrun has started, as the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings(*FRAMEWORKS_WARN)
@pytest.mark.parametrize("chain", chains(), ids=lambda chain: str(chain[0]))
def test_snippet(chain: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "snippet"}
    starts_group = any("init_process_group(" in block.code for block in chain)
    with only_rank(monkeypatch) if starts_group else nullcontext():
        for block in chain:
            if block.how == "given":
                loop = digits_loop()
                names |= {name: loop[name] for name in re.split(r",\s*", block.what)}
            # Behind as many empty lines as precede it, so that a traceback shows the page's own.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, ROOT / block.page, "exec", dont_inherit=True), names)
        for each in names.values():
            if isinstance(each, ritornello.RehearsalBuffer):
                each.close()


@pytest.mark.parametrize("num_new", [0, 1, 5])
@pytest.mark.parametrize("num_past", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_weights_that_the_guide_gives_to_tasks(num_new: int, num_past: int, k: int) -> None:
    (code,) = [each.code for each in blocks(of_python=True) if "def loss_of_k_tasks" in each.code]
    function = code[code.index("def loss_of_k_tasks") : code.index("buffer = ")]
    names: dict[str, Any] = {}
    exec(function, names)
    new, past = torch.rand(num_new), torch.rand(num_past)
    loss = names["loss_of_k_tasks"](torch.cat((new, past)), num_past, k)
    share = 1 / k if num_past else 1.0
    wanted = share * new.mean().nan_to_num() + (1 - share) * past.mean().nan_to_num()
    torch.testing.assert_close(loss, wanted)


def test_excerpts_are_python() -> None:
    for block in blocks(of_python=True):
        ast.parse(block.code, filename=str(block))


def test_every_way_of_running_is_used() -> None:
    pages = {block.page for chain in chains() for block in chain}
    assert {"README.md", "docs/start_here.md", "docs/strategies.md", "docs/policies.md"} <= pages
    assert {block.how for chain in chains() for block in chain} == {None, "given", "continues"}


# The command line.

SEPARATORS = {";", "&&", "||", "|", "do", "done", "&"}


def commands(code: str) -> Iterator[list[str]]:
    """The commands in some code of shell, word by word; comments and continued lines resolved."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
                continue
            if words:
                yield words
            words = []


def arguments_of(words: list[str]) -> list[str] | None:
    """What the ``ritornello`` command gets, whoever starts it; None if it is another command."""
    for place, word in enumerate(words):
        if word == "ritornello":
            return words[place + 1 :]
        if word == "-m" and words[place + 1 : place + 2] == ["ritornello.experiments.cli"]:
            return words[place + 2 :]
    return None


def ritornello_commands() -> dict[tuple[str, ...], str]:
    """The arguments of all that are shown, in blocks and (with flags) in the text; and where."""
    found = {}
    for block in blocks(of_python=False):
        for words in commands(block.code):
            arguments = arguments_of(words)
            if arguments is not None:
                found[tuple(arguments)] = str(block)
    for page, text in PAGES.items():
        for inline in re.findall(r"`(ritornello \w+ [^`]*--[^`]+)`", text):
            arguments = shlex.split(inline)[1:]
            if not {"--help", "..."} & set(arguments):
                found[tuple(arguments)] = page
    return found


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is shown, up to the point at which it would begin to work."""
    num_parsed = 0

    def check(recipes: dict[str, Any], ranks: int | None, *_: Any, **__: Any) -> None:
        nonlocal num_parsed
        for each in recipes.values():
            train.check(each, ranks or 1)
        num_parsed += 1

    def stopped(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def parsed(*arguments: Any, **settings: Any) -> None:
            nonlocal num_parsed
            inspect.signature(command).bind(*arguments, **settings)
            num_parsed += 1

        return parsed

    monkeypatch.setattr("ritornello.experiments.cli.runs.train", check)
    for name in ("extend", "report", "results", "inspect", "forget", "bench", "simulate"):
        monkeypatch.setattr(cli, name, stopped(getattr(cli, name)))
    failed = []
    for arguments, where in ritornello_commands().items():
        try:
            cli.main(arguments)
        except SystemExit as end:
            if end.code:
                failed.append(f"{where}: ritornello {shlex.join(arguments)}")
    assert not failed
    assert num_parsed > 30


def test_a_wrong_command_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["run", "mnist", "--no-such-flag"], ["run", "no-such-recipe"], ["play"]):
        with pytest.raises(SystemExit) as end:
            cli.main(wrong)
        assert end.value.code
    assert "no-such-recipe" in capsys.readouterr().err


# Files, modules and links.

NAMED_FILE = re.compile(
    r"\b(?:benchmarks|examples|tests|docs|src)/[\w./-]*\w\.(?:py|sh|md|svg|json|sbatch|yaml|toml)\b"
)
NAMED_FOLDER = re.compile(r"`((?:benchmarks|examples|tests|docs|src)(?:/\w+)*)/?`")
NAMED_SOURCE = re.compile(r"`((?:\w+/)*(?:\w+\.py|\w+/))`")
"""As the pages name files that are for readers of the sources: by their room."""
NAMED_OBJECT = re.compile(r"\britornello(?:\.\w+)+")


def test_files_that_are_named_exist() -> None:
    named = [
        (page, name)
        for page, text in PAGES.items()
        for pattern in (NAMED_FILE, NAMED_FOLDER)
        for name in pattern.findall(text)
    ]
    assert len(named) > 100
    assert not {(page, name) for page, name in named if not (ROOT / name).exists()}


def test_sources_that_are_named_exist() -> None:
    pages = ("docs/how_it_works.md", "CONTRIBUTING.md")
    named = [(page, name) for page in pages for name in NAMED_SOURCE.findall(PAGES[page])]
    assert len(named) > 40
    missing = {
        (page, name)
        for page, name in named
        if not any((root / name).exists() for root in (SOURCES, ROOT))
    }
    assert not missing


@pytest.mark.filterwarnings(*FRAMEWORKS_WARN)
def test_modules_and_names_that_are_named_exist() -> None:
    """All that is written with a dot behind ``ritornello``, in text, code and directives."""
    named = {
        (page, name) for page, text in PAGES.items() for name in NAMED_OBJECT.findall(text)
    } - {("CHANGELOG.md", "ritornello.sampling")}  # says that it is no longer there
    assert len(named) > 80
    missing = {(page, name) for page, name in named if not is_importable(name)}
    assert not missing
    assert not is_importable("ritornello.sampling")


def is_importable(name: str) -> bool:
    """Whether it is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_tests_that_are_named_exist() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", PAGES["docs/how_it_works.md"]))
    assert len(named) > 10
    assert named <= defined


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def test_links_within_the_repository() -> None:
    broken = []
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            linked = (ROOT / page).parent / path if path else ROOT / page
            if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
                broken.append(f"{page}: {target}")
    assert not broken


# What is said about the sources.


@cache
def messages() -> str:
    """Every text in the library's sources, a line each; what is filled in is shown as a gap."""
    lines = []
    for path in SOURCES.rglob("*.py"):
        if "experiments" not in path.parts or "strategies" in path.parts:
            lines += [text_of(each) for each in ast.walk(ast.parse(path.read_text()))]
    return "\n".join(lines)


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("\n", " ")
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) or "…" for value in node.values)
    return ""


def is_said(message: str) -> bool:
    """Whether some text of the sources says it; what depends on the case is a gap there, too."""
    message = re.sub(r"\bbatch…|^(update|draw)\b|manifest\.json$", "…", message)
    parts = [re.escape(part) for part in message.removeprefix("… ").split("…")]
    return re.search(".*".join(parts), messages()) is not None


def quoted_messages() -> list[str]:
    section = PAGES["docs/faq.md"].partition("## Error messages")[2]
    terms = re.findall(r"^(`.*)\n: ", section, re.MULTILINE)
    return [each for term in terms for each in re.findall(r"`([^`]+)`", term)]


def test_quoted_messages_are_those_of_the_sources() -> None:
    quoted = quoted_messages()
    assert len(quoted) > 35
    assert [each for each in quoted if not is_said(each)] == []
    assert not is_said("capacity=…: it must be at most the number of ranks")


def test_the_reference_names_everything_public() -> None:
    """What is not there, Sphinx says itself."""
    public = {f"ritornello.{name}" for name in ritornello.__all__ if name != "__version__"}
    assert public <= set(
        re.findall(r"^\.\. auto\w+:: ([\w.]+)", PAGES["docs/api.md"], re.MULTILINE)
    )


def test_tables_of_sizes_are_what_the_layouts_say() -> None:
    path = DOCS / "guides" / "sizing.py"
    spec = importlib.util.spec_from_file_location("sizing", path)
    assert spec is not None
    assert spec.loader is not None
    sizing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizing)
    page = PAGES["docs/guides/sizing.md"]
    assert sizing.page_with_tables(page) == page, "run python docs/guides/sizing.py"
    assert sizing.page_with_tables(page.replace("150,544 B", "150,545 B")) == page


def test_figures_for_choosing_are_measured() -> None:
    """Each mean with its deviation is on the page of results."""
    figures = set(re.findall(r"\d+\.\d ± \d+\.\d", PAGES["docs/guides/choosing.md"]))
    assert len(figures) > 15
    assert figures <= set(re.findall(r"\d+\.\d ± \d+\.\d", PAGES["docs/results.md"]))
