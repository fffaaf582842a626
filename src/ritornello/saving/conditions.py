"""Which samples are meant: conditions on their class label, their task and their integer fields."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ritornello.arrays import Bools, Bytes, Ints
from ritornello.records.layout import INTEGERS, Field
from ritornello.records.nesting import path_text
from ritornello.saving.manifest import Manifest

Values = int | str | Sequence[int | str]
"""A value, several, or several as a text with commas."""


@dataclass(frozen=True)
class Condition:
    """One condition: a sample's value is one of some."""

    name: str
    """As it is written down: ``label``, ``task``, or the field's short name."""
    position: int | None
    """Among the layout's fields; None: the task."""
    is_private: bool
    """Whether the values may say who somebody is, and are not to be written down."""
    values: Ints
    """Those that are meant; tasks by their positions in the manifest."""
    texts: tuple[str, ...]
    """The same, as they were given."""


class Where:
    """Conditions that all must hold.

    Args:
        conditions: ``label`` (the class label), ``task`` (a name from ``begin_task``) or an integer
            field of the samples, to the value or values that are meant. A field is named by its
            keys and indices, with dots between them (``id``, ``2``, ``meta.id``), or as the layout
            writes it (``batch['meta']['id']``).
        manifest: of the saved buffer.

    Raises:
        ValueError: no condition at all, no such field, or values that it cannot have.
    """

    def __init__(self, conditions: Mapping[str, Values], manifest: Manifest) -> None:
        if not conditions:
            raise ValueError("where: give a condition, such as label=3; without any all would go")
        self._manifest = manifest
        has_begun = manifest.layout is not None  # else there are neither fields nor samples
        self._conditions = [self._condition(*each) for each in conditions.items() if has_begun]

    def matches(self, records: Bytes, admitted_in: Ints) -> Bools:
        """Which samples are meant, bool ``[n]``.

        Args:
            records: uint8 ``[n, record_bytes]``.
            admitted_in: int64 ``[n]``, the rounds in which they were admitted.
        """
        layout = self._manifest.layout
        matching = np.ones(len(records), dtype=np.bool_)
        if layout is None:
            return matching
        rows = torch.from_numpy(records)
        for each in self._conditions:
            if each.position is None:
                found = self._manifest.task_numbers(admitted_in)
            else:
                found = layout.integers(rows, each.position)
            matching &= np.isin(found, each.values)
        return matching

    def as_proof(self, receipt: str) -> dict[str, str]:
        """The conditions for the manifest; of private values the checksum with a receipt.

        Args:
            receipt: a random text. Without it nobody can find a value by trying.
        """
        return {
            each.name: ",".join(
                f"sha256:{hashlib.sha256(f'{each.name}={text} {receipt}'.encode()).hexdigest()}"
                if each.is_private
                else text
                for text in each.texts
            )
            for each in self._conditions
        }

    @property
    def is_private(self) -> bool:
        """Whether some values are not to be written down."""
        return any(each.is_private for each in self._conditions)

    def _condition(self, name: str, values: Values) -> Condition:
        if name == "task":
            return self._task_condition(values)
        if name != "label":
            position = self._position(name)
            short = _short_name(self._fields[position])
            return self._field_condition(short, position, values, True)
        if self._manifest.label is None:
            raise ValueError(
                "where label: the saved buffer does not know which field is the class label; give "
                f"the field: {self._names()}"
            )
        return self._field_condition(name, self._manifest.label, values, False)

    def _task_condition(self, values: Values) -> Condition:
        names = [task.name for task in self._manifest.tasks]
        if not names:
            raise ValueError(
                "where task: the saved buffer knows no tasks, as nobody has called begin_task; a "
                "field of that name is batch['task']"
            )
        # Names may have commas in them.
        whole = isinstance(values, str) and values in names
        texts = (str(values),) if whole else _texts(values)
        unknown = sorted(set(texts) - set(names))
        if unknown:
            raise ValueError(f"where task: no task is named {unknown}; there are {names}")
        numbers = np.flatnonzero(np.isin(names, texts))
        return Condition("task", None, False, numbers, texts)

    def _field_condition(
        self, name: str, position: int, values: Values, is_private: bool
    ) -> Condition:
        field = self._fields[position]
        if not field.is_integer:
            raise ValueError(
                f"where {name}: the field {field} per sample must be one integer; there are "
                f"{self._names()}"
            )
        dtype = INTEGERS[field.dtype]
        limits = np.iinfo(dtype)
        try:
            numbers = [int(text) for text in _texts(values)]
        except ValueError as error:
            raise ValueError(f"where {name}={values}: it must be an integer ({error})") from None
        for number in numbers:
            if not limits.min <= number <= limits.max:
                raise ValueError(f"where {name}={number}: the field is {field}")
        found = np.array(numbers, dtype=dtype).astype(np.int64)
        return Condition(name, position, is_private, found, tuple(map(str, numbers)))

    def _position(self, name: str) -> int:
        found = [
            position
            for position, field in enumerate(self._fields)
            if name in (_short_name(field), path_text(field.path))
        ]
        if len(found) != 1:
            several = "several fields have" if found else "no field has"
            raise ValueError(f"where {name}: {several} that name; there are {self._names()}")
        return found[0]

    @property
    def _fields(self) -> tuple[Field, ...]:
        return self._manifest.layout.fields if self._manifest.layout else ()

    def _names(self) -> str:
        names = ["label"] if self._manifest.label is not None else []
        names += ["task"] if self._manifest.tasks else []
        names += [
            f"{_short_name(field)} ({path_text(field.path)})"
            for field in self._fields
            if field.is_integer
        ]
        return ", ".join(names) or "none"


def _short_name(field: Field) -> str:
    return ".".join(map(str, field.path))


def _texts(values: Values) -> tuple[str, ...]:
    if isinstance(values, str):
        return tuple(each.strip() for each in values.split(","))
    if isinstance(values, Sequence):
        return tuple(map(str, values))
    return (str(values),)
