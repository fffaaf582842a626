"""Which commands ``ritornello`` has, and how it ends when one of them fails."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

try:
    import rich  # noqa: F401  (what others here need)
    import tyro
except ImportError as error:  # pragma: no cover - the extra is installed in tests
    raise SystemExit(
        f"ritornello: error: the command needs the extra 'experiments' ({error}): "
        "pip install 'ritornello[experiments]'"
    ) from None

from ritornello.experiments.cli.buffers import forget, inspect
from ritornello.experiments.cli.flags import check_kept
from ritornello.experiments.cli.output import COMMAND
from ritornello.experiments.cli.recipes import recipes
from ritornello.experiments.cli.results import report, results
from ritornello.experiments.cli.runs import compare, demo, extend, run
from ritornello.experiments.cli.speed import bench, simulate
from ritornello.experiments.ranks.progress import say


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command; errors end with one line and status 2."""
    from ritornello.errors import CheckpointError
    from ritornello.experiments.ranks.interruption import RunInterruptedError
    from ritornello.experiments.ranks.launch import LaunchError, place_in_job

    arguments = sys.argv[1:] if arguments is None else arguments
    COMMAND.set(shlex.join(["ritornello", *arguments]))
    interruption: tuple[str, int] | None = None
    functions = (
        *(demo, run, extend, compare, report, results),
        *(inspect, forget, bench, simulate, recipes),
    )
    try:
        if arguments and arguments[0] == extend.__name__:
            check_kept(arguments)
        tyro.extras.subcommand_cli_from_dict(
            {each.__name__: each for each in functions},
            prog="ritornello",
            description="Continual learning with a distributed rehearsal buffer.",
            args=arguments,
        )
    except (LaunchError, CheckpointError) as error:
        _fail(error, status=1)
    except RunInterruptedError as end:
        place = place_in_job(os.environ)
        interruption = str(end) if place is None or place.rank == 0 else "", end.status
    except (ValueError, OSError) as error:
        if os.environ.get("RITORNELLO_TRACEBACK"):
            raise
        _fail(error, status=2)
    except ImportError as error:
        if os.environ.get("RITORNELLO_TRACEBACK"):
            raise
        hint = "" if "pip install" in str(error) else ": pip install 'ritornello[experiments]'"
        _fail(f"{error}{hint}", status=2)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    if interruption is not None:
        # Not before the error is gone: it holds what must not outlive the interpreter.
        _fail(*interruption)


def _fail(error: Any, status: int) -> None:
    if error:
        say(f"ritornello: error: {error}", style="red")
    sys.exit(status)


if __name__ == "__main__":
    main()
