"""The layout of records as JSON, and out of it again."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from ritornello.errors import CheckpointError
from ritornello.records.layout import DTYPES, MOST_FIELDS, Layout, check_field
from ritornello.records.nesting import MOST_LEVELS, Batch, Registered, Template, leaves_of
from ritornello.records.pages import LEAST_PAGE_BYTES, MOST_PAGE_BYTES, Paging
from ritornello.records.ragged import FORMS, Ragged
from ritornello.saving.checked_json import checked_count, checked_text


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """What ``layout_from_json`` understands.

    Raises:
        CheckpointError: a sample's keys are neither texts nor integers.
    """
    return {
        "nesting": _nesting_to_json(layout.template),
        "fields": [
            {
                "path": str(each).partition(":")[0],
                "dtype": str(each.dtype).removeprefix("torch."),
                "shape": list(each.shape),
                **({} if each.form is None else {"form": each.form}),
            }
            for each in layout.fields
        ],
        **({} if layout.paging is None else {"paging": asdict(layout.paging)}),
    }


def layout_from_json(content: dict[str, Any]) -> Layout:
    """The layout again; that of any nesting is one of dicts, lists and tuples.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is none, or one of
            samples that are too large.
    """
    if len(content["fields"]) > MOST_FIELDS:
        raise ValueError(f"{len(content['fields'])} fields")
    leaves = list[Any]()
    for each in content["fields"]:
        shape = [checked_count(size) for size in each["shape"]]
        dtype = DTYPES.get(checked_text(each["dtype"]))
        if dtype is None:
            raise ValueError(f"a field of the dtype {reprlib.repr(each['dtype'])}")
        check_field(dtype, shape)
        if "form" not in each:
            leaves.append(torch.empty((0, *shape), dtype=dtype, device="cpu"))
        elif each["form"] in FORMS:
            leaves.append(Ragged.like(each["form"], dtype, tuple(shape)))
        else:
            raise ValueError(f"a field of the form {reprlib.repr(each['form'])}")
    remaining = iter(leaves)
    batch = _nesting_from_json(content["nesting"], lambda: next(remaining))
    if sum(1 for _ in leaves_of(batch)) != len(leaves):
        raise ValueError("the nesting has another number of leaves than there are fields")
    ragged = [path for path, leaf in leaves_of(batch) if isinstance(leaf, Ragged)]
    layout = Layout.of_leaves(batch, ragged)
    if not ragged:
        return layout
    paging = Paging(**{name: checked_count(each) for name, each in content["paging"].items()})
    if not LEAST_PAGE_BYTES <= paging.page_bytes <= MOST_PAGE_BYTES or paging.page_bytes % 16:
        raise ValueError(f"pages of {paging.page_bytes} bytes")
    return replace(layout, paging=paging)


def _nesting_to_json(template: Template) -> Any:
    if isinstance(template, Registered):  # nothing of its type: a load executes nothing
        inside = dict(zip(template.steps, template.children, strict=True))
        return _nesting_to_json(inside if template.are_named else list(inside.values()))
    if isinstance(template, dict):
        for key in template:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"the samples have the key {key!r}: a buffer can be saved if all keys of its "
                    "samples are strings or integers"
                )
        return {"dict": [[key, _nesting_to_json(each)] for key, each in template.items()]}
    if isinstance(template, tuple):
        return {"tuple": [_nesting_to_json(each) for each in template]}
    if isinstance(template, list):
        return {"list": [_nesting_to_json(each) for each in template]}
    return "field"


def _nesting_from_json(content: Any, leaf: Callable[[], Any], level: int = 0) -> Batch:
    if level > MOST_LEVELS:
        raise ValueError(f"a nesting of more than {MOST_LEVELS} levels")
    if content == "field":
        try:
            return leaf()
        except StopIteration:
            raise ValueError("the nesting has more leaves than there are fields") from None
    ((kind, inside),) = content.items()
    if kind == "dict":
        pairs = ((key, _nesting_from_json(each, leaf, level + 1)) for key, each in inside)
        return dict(_with_plain_keys(pairs))
    if kind not in ("tuple", "list"):
        raise ValueError(f"a nesting of the kind {reprlib.repr(kind)}")
    children = [_nesting_from_json(each, leaf, level + 1) for each in inside]
    return tuple(children) if kind == "tuple" else children


def _with_plain_keys(pairs: Iterator[tuple[Any, Batch]]) -> Iterator[tuple[str | int, Batch]]:
    for key, value in pairs:
        if type(key) not in (str, int):
            raise ValueError(f"a key {reprlib.repr(key)}")
        yield key, value
