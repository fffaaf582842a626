"""``python -m ritornello.experiments.cli``, for launchers that start modules."""

from ritornello.experiments.cli.command import main

main()
