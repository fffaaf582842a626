"""What a rank reads of its own records, and the fields of them that a function makes anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ritornello.records.layout import Layout
from ritornello.records.modes import outside_inference
from ritornello.records.nesting import Batch, path_text
from ritornello.rounds.round import Rounds
from ritornello.rounds.steps import Steps


def representatives(steps: Steps, batch_size: int) -> Iterator[Batch]:
    """A rank's representatives; see ``RehearsalBuffer.representatives``.

    Args:
        steps: of the buffer.
        batch_size: samples at a time.
    """
    steps.settle()
    steps.training.optimisers.num_steps = 0
    layout = steps.begun.layout if steps.begun else None

    def version() -> tuple[int, int]:
        """Another one as soon as what is stored may be other than it was."""
        return steps.num_offers, steps.rounds.num_overwritten

    stored = _read(steps.rounds, layout, batch_size, version, version())
    return map(steps.outputs.coding.decoded, stored) if steps.outputs.coding.decodes else stored


def _read(
    rounds: Rounds,
    layout: Layout | None,
    batch_size: int,
    version: Callable[[], object],
    begun_with: object,
) -> Iterator[Batch]:
    for first in range(0, rounds.num_held, batch_size):
        if version() != begun_with:
            raise RuntimeError(
                "representatives: the buffer has changed meanwhile; finish the iteration before "
                "the next update, offer, load or rewrite"
            )
        assert layout is not None
        yield _batch_at(rounds, layout, first, min(batch_size, rounds.num_held - first))


def rewrite(steps: Steps, function: Callable[[Batch], Any], fields: Any, batch_size: int) -> None:
    """Makes fields of a rank's representatives anew; see ``RehearsalBuffer.rewrite``."""
    steps.settle()
    begun = steps.begun
    if begun is None:
        return
    rounds = steps.rounds
    try:
        anew = FieldsMadeAnew(begun.layout, begun.label, begun.identity, fields)
    except ValueError as error:
        raise steps.with_rank(error) from None
    before = steps.num_offers
    for first in range(0, rounds.num_held, batch_size):
        num_rows = min(batch_size, rounds.num_held - first)
        stored = _batch_at(rounds, begun.layout, first, num_rows)
        result = function(steps.outputs.coding.decoded(stored))
        if steps.num_offers != before:
            raise RuntimeError(
                "rewrite: the function has called update, draw or offer: the buffer goes on "
                "when rewrite has returned"
            )
        try:
            values = anew.values(result, num_rows)
        except (TypeError, ValueError) as error:
            raise steps.with_rank(error) from None
        steps.between_rounds(partial(_write, steps, first, num_rows, rounds.placed(values)))


def _write(steps: Steps, first: int, num_rows: int, values: Mapping[int, Tensor]) -> None:
    with steps.explaining("rewrite"):
        steps.rounds.rewrite(first, num_rows, values)


def _batch_at(rounds: Rounds, layout: Layout, first: int, num_rows: int) -> Batch:
    with outside_inference():
        return layout.rebuild(rounds.representatives(layout, first, num_rows))


class FieldsMadeAnew:
    """The fields that a user has named.

    Args:
        layout: of the records.
        label: the position of the class label among the fields.
        identity: that of what tells samples apart.
        fields: an index, key or attribute, or a tuple of them for a nested leaf; or a list.

    Raises:
        ValueError: there is no such leaf, it is the class label or the identity, or named twice; or
            none is.
    """

    def __init__(
        self, layout: Layout, label: int | None, identity: int | None, fields: Any
    ) -> None:
        self._layout, self._is_list = layout, isinstance(fields, list)
        self._names: list[Any] = fields if self._is_list else [fields]
        if not self._names:
            raise ValueError("rewrite: fields=[] names no leaf of the samples; name at least one")
        positions = {field.path: position for position, field in enumerate(layout.fields)}
        self._positions = list[int]()
        for name in self._names:
            position = positions.get(name if isinstance(name, tuple) else (name,))
            if position is None:
                raise ValueError(
                    f"rewrite: fields={name!r} names no leaf of the samples; there are "
                    f"{'; '.join(map(str, layout.fields))}. Give an index or key, a tuple of them "
                    "for a nested leaf, or a list of such"
                )
            if position in (label, identity):
                what = "class label" if position == label else "identity"
                raise ValueError(
                    f"rewrite: fields={name!r} is the {what}, by which representatives were "
                    "admitted: it stays; store what may change in a field of its own"
                )
            if layout.fields[position].form is not None:
                raise ValueError(
                    f"rewrite: fields={name!r} differs in length from sample to sample: only "
                    "fields of one size can be made anew in place"
                )
            if position in self._positions:
                raise ValueError(f"rewrite: fields={self._names!r} names {name!r} twice")
            self._positions.append(position)

    def values(self, result: Any, num_rows: int) -> dict[int, Tensor]:
        """What a function has returned for some records, by the position of the field.

        Raises:
            TypeError, ValueError: other than was asked for; names the field.
        """
        given = self._by_position(result)
        for position, value in given.items():
            field = self._layout.fields[position]
            what = f"rewrite: the function gave {path_text(field.path)}"
            if not isinstance(value, Tensor):
                raise TypeError(f"{what} as a {type(value).__name__}: it must be a tensor")
            if value.dtype != field.dtype or tuple(value.shape) != (num_rows, *field.shape):
                needed = f"{field.dtype} {[num_rows, *field.shape]}"
                raise ValueError(
                    f"{what} as {value.dtype} {list(value.shape)}, but for {num_rows} samples it "
                    f"must be {needed}: nothing is converted, as that may lose something; the "
                    "function must do so, as with .to(dtype)"
                )
        return given

    def _by_position(self, result: Any) -> dict[int, Any]:
        if not self._is_list:
            return {self._positions[0]: result}
        if isinstance(result, Mapping):
            if set(result) != set(self._names):
                raise ValueError(
                    f"rewrite: the function gave {list(result)}, but must give {self._names}"
                )
            result = [result[name] for name in self._names]
        if not isinstance(result, (tuple, list)) or len(result) != len(self._names):
            found = len(result) if isinstance(result, (tuple, list)) else type(result).__name__
            raise ValueError(
                f"rewrite: the function gave {found}, but must give a tuple of "
                f"{len(self._names)}, or a dict, for {self._names}"
            )
        return dict(zip(self._positions, result, strict=True))
