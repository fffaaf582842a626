"""Ritornello at home in other frameworks: thin modules, each with an extra of the same name.

Each imports its framework, so the library imports nothing from here; the command loads trackers
if it is asked to (``--track``).
"""


def missing(extra: str, what: str) -> ImportError:
    """The error that says how to get what is not installed.

    Args:
        extra: of this package, that brings it; the integration's name, too.
        what: the framework, as its users call it.
    """
    return ImportError(
        f"ritornello.integrations.{extra} needs {what}: pip install 'ritornello[{extra}]'"
    )
