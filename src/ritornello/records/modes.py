"""Keeps the buffer out of what ``torch.compile`` compiles, and out of inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def outside_modes(method: Method) -> Method:
    """A method that is called as it is from compiled code, and from inside inference mode.

    A graph ends before it, and another one follows. ``torch.compiler.disable`` as a decorator does
    the same, but loads the compiler with the library, which takes half as long as loading torch.

    What is made in inference mode can never be written outside it, nor trained on. So memory that
    is kept, and what the trainer gets, is made outside; without gradients, as inside.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with outside_inference(), torch.no_grad():
                return method(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(Method, call)


def outside_inference() -> AbstractContextManager[object]:
    """A context in which tensors are made as outside inference mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
