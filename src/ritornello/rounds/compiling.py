"""Keeps the buffer out of what ``torch.compile`` compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def outside_graphs(method: Method) -> Method:
    """A method that compiled code calls as it is: a graph ends before it, and another one follows.

    ``torch.compiler.disable`` as a decorator does the same, but loads the compiler with the
    library, which takes half as long as loading torch.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(Method, call)
