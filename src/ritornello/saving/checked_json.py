"""Values out of JSON that anybody may have written, checked before anything relies on them."""

from __future__ import annotations

import reprlib
from typing import Any


def checked_count(value: Any, most: int = 2**62) -> int:
    """A non-negative integer.

    Raises:
        ValueError: it is none, or not below ``most``.
    """
    if type(value) is not int or not 0 <= value < most:
        raise ValueError(f"{reprlib.repr(value)} must be a non-negative integer")
    return value


def checked_bool(value: Any) -> bool:
    """True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{reprlib.repr(value)} must be true or false")
    return value


def checked_number(value: Any, kind: str = "a non-negative number") -> float:
    """A non-negative number below 2**53.

    Raises:
        ValueError: it is none.
    """
    if type(value) not in (int, float) or not 0 <= value < 2**53:
        raise ValueError(f"{reprlib.repr(value)} must be {kind}")
    number: float = value
    return number


def checked_seconds(value: Any) -> float:
    """Seconds since 1970.

    Raises:
        ValueError: it is no such number.
    """
    return float(checked_number(value, "seconds since 1970"))


def checked_text(value: Any) -> str:
    """A text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} must be a text")
    return value


def checked_texts(value: Any) -> dict[str, str]:
    """A dict of texts.

    Raises:
        ValueError: one of its keys or values is none.
        AttributeError: it is no dict.
    """
    return {checked_text(key): checked_text(each) for key, each in value.items()}


def no_constant(text: str) -> Any:
    """To be given to ``json.loads`` for NaN and infinities.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} is no number")
