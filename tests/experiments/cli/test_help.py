"""Holds every help text of ``ritornello``.

``python tests/experiments/cli/test_help.py`` writes ``help.txt`` anew, after a change that was meant.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from ritornello.experiments import cli

HELP = Path(__file__).parent / "help.txt"
COMMANDS = (
    "",
    *("demo", "run", "extend", "compare", "report", "results"),
    *("inspect", "forget", "bench", "simulate", "recipes"),
)
LAYOUT = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
LINES_OF_BOXES = re.compile("[\u2500-\u257f]|-{4,}")


def help_of(command: str) -> str:
    stream = io.StringIO()
    with redirect_stdout(stream), pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    return stream.getvalue()


def title_of(command: str) -> str:
    return " ".join(["$ ritornello", *command.split(), "--help"])


def words_of(text: str) -> list[str]:
    """The text without its layout, which is another one with other versions of tyro and rich."""
    return LINES_OF_BOXES.sub(" ", text).split()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command or "ritornello")
def test_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAYOUT.items():
        monkeypatch.setenv(name, value)
    _, *parts = re.split(r"^(\$ .*)\n", HELP.read_text(), flags=re.MULTILINE)
    kept = dict(zip(parts[::2], parts[1::2], strict=True))
    assert words_of(help_of(command)) == words_of(kept[title_of(command)]), (
        f"`{title_of(command)}` is not what {HELP.name} holds; if the change is meant, write that "
        "file anew: python tests/experiments/cli/test_help.py"
    )


def test_the_help_of_every_command_is_held() -> None:
    [commands] = re.findall(r"\{(.*?)\}", "".join(words_of(help_of(""))))
    assert commands.split(",") == list(COMMANDS[1:])


if __name__ == "__main__":
    os.environ |= LAYOUT
    text = "\n".join(f"{title_of(command)}\n{help_of(command)}" for command in COMMANDS)
    HELP.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
