"""The snippets of the documentation run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("strategies.md", "policies.md")

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    page: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> list[Snippet]:
    """Blocks of Python that import the library are complete; others are excerpts."""
    found = []
    for page in PAGES:
        text = (DOCS / page).read_text()
        for block in BLOCK.finditer(text):
            if re.search(r"^(from|import) ritornello", block[1], re.MULTILINE):
                found.append(Snippet(page, text.count("\n", 0, block.start(1)) + 1, block[1]))
    return found


@pytest.mark.timeout(30)
@pytest.mark.parametrize("snippet", snippets(), ids=str)
def test_snippet(snippet: Snippet) -> None:
    # Behind as many empty lines as precede it, so that a traceback shows the page's own.
    code = "\n" * (snippet.line - 1) + snippet.code
    exec(compile(code, DOCS / snippet.page, "exec", dont_inherit=True), {"__name__": "snippet"})


def test_every_page_has_its_snippets() -> None:
    pages = [each.page for each in snippets()]
    assert {page: pages.count(page) for page in PAGES} == {"strategies.md": 2, "policies.md": 5}
