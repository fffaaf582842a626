"""The ``ritornello`` command."""

from ritornello.experiments.cli.command import main

__all__ = ["main"]
