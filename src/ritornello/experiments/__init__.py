"""Experiments: the ``ritornello`` command, and all that is behind it."""
