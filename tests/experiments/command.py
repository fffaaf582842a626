"""The command, as a function."""

from __future__ import annotations

from ritornello.experiments import cli


def run(*arguments: str) -> int:
    """Runs ``ritornello`` with some arguments in this process; its exit status."""
    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
