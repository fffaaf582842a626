"""The ``ritornello`` command: its flags, what they ask for, and what the terminal shows of it."""

from ritornello.experiments.cli.command import main

__all__ = ["main"]
