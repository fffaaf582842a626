"""Nested samples: their containers, and the leaves in these.

Tuples, named tuples, lists and mappings are containers, and so is every type that is registered
with PyTorch's pytree: TensorDict, tensor classes, Hugging Face's model outputs, dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Path = tuple[Any, ...]
"""Where a leaf is in a nested sample: ``(1,)`` or ``("target", "label")``."""

MOST_LEVELS = 64
"""In the nesting of a sample."""

Batch = Any
"""A nesting of containers whose leaves are tensors ``[b, ...]``."""

Template = Any
"""Containers as in a batch; the leaves are positions in a sequence of tensors."""


class Children(NamedTuple):
    """What is in a container."""

    steps: Sequence[Any]
    """The key, index or attribute of each."""
    values: Sequence[Any]
    are_named: bool
    """Whether steps are keys or attributes, whose order says nothing."""


@dataclass(frozen=True)
class Registered:
    """A container in a template, of a type that is registered with PyTorch's pytree."""

    kind: type
    steps: tuple[Any, ...]
    children: tuple[Template, ...]
    are_named: bool
    context: Any
    """What the registered type keeps beside its children. The same for every batch."""

    def rebuild(self, leaves: Sequence[Any]) -> Batch:
        """Such a container with other leaves."""
        unflatten = pytree.SUPPORTED_NODES[self.kind].unflatten_fn
        # Some change the context that they are given.
        return unflatten([rebuild(each, leaves) for each in self.children], copy(self.context))


def path_text(path: Path) -> str:
    """A path as a user would write it: ``batch[0]['image']``."""
    return "batch" + "".join(f"[{step!r}]" for step in path)


def children_of(batch: Batch) -> Children | None:
    """What is in a container; None for a leaf, and for a registered container with nothing."""
    if isinstance(batch, Mapping):
        # An empty one that is no dict keeps what it holds elsewhere, as a stack of texts does.
        if not batch.keys() and not isinstance(batch, dict):
            return None
        return Children(list(batch.keys()), [each for _, each in batch.items()], are_named=True)
    if isinstance(batch, (tuple, list)):
        return Children(range(len(batch)), batch, are_named=False)
    return _registered_children_of(batch)


def _registered_children_of(batch: Batch) -> Children | None:
    registered = pytree.SUPPORTED_NODES.get(type(batch))
    if registered is None:
        return None
    values, _ = registered.flatten_fn(batch)
    if not values:
        return None
    keys: list[Any] = []
    if registered.flatten_with_keys_fn is not None:
        keys = [key for key, _ in registered.flatten_with_keys_fn(batch)[0]]
    if keys and all(isinstance(key, pytree.MappingKey) for key in keys):
        return Children([key.key for key in keys], values, are_named=True)
    if keys and all(isinstance(key, pytree.GetAttrKey) for key in keys):
        return Children([key.name for key in keys], values, are_named=True)
    return Children(range(len(values)), values, are_named=False)


def leaves_of(
    batch: Batch, path: Path = (), whole: Collection[Path] = ()
) -> Iterator[tuple[Path, Any]]:
    """The leaves of a nested batch with their paths, in order.

    Args:
        batch: nested.
        path: where it is.
        whole: where a list or tuple is a leaf itself.

    Raises:
        ValueError: containers are in each other too deeply.
    """
    if len(path) > MOST_LEVELS:
        raise ValueError(
            f"the mini-batch is nested more than {MOST_LEVELS} levels deep: give its tensors in a "
            "flatter tuple, list or dict"
        )
    is_leaf = isinstance(batch, Tensor) or path in whole
    children = None if is_leaf else children_of(batch)
    if children is None:
        yield path, batch
        return
    for step, value in zip(children.steps, children.values, strict=True):
        yield from leaves_of(value, (*path, step), whole)


def template_of(
    batch: Batch, position: Callable[[Path], int], whole: Collection[Path] = ()
) -> Template:
    """The template of a nested batch.

    Args:
        batch: whose containers it has.
        position: gives the position of the leaf at a path.
        whole: see ``leaves_of``.
    """
    return _template_of(batch, (), position, whole)


def _template_of(
    batch: Batch, path: Path, position: Callable[[Path], int], whole: Collection[Path]
) -> Template:
    is_leaf = isinstance(batch, Tensor) or path in whole
    children = None if is_leaf else children_of(batch)
    if children is None:
        return position(path)
    inside = {
        step: _template_of(value, (*path, step), position, whole)
        for step, value in zip(children.steps, children.values, strict=True)
    }
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*inside.values())
    if isinstance(batch, tuple):
        return tuple(inside.values())
    if isinstance(batch, list):
        return list(inside.values())
    if type(batch) is not dict and type(batch) in pytree.SUPPORTED_NODES:
        registered = _registered_children_of(batch)
        # What is registered by other parts than its keys comes back as a dict.
        if registered is not None and set(registered.steps) == inside.keys():
            return Registered(
                kind=type(batch),
                steps=tuple(registered.steps),
                children=tuple(inside[step] for step in registered.steps),
                are_named=registered.are_named,
                context=_context_of(batch),
            )
    return inside


def _context_of(batch: Batch) -> Any:
    size = getattr(batch, "batch_size", None)
    if isinstance(size, torch.Size) and len(size):
        # One that notes its size, as a TensorDict does, would take a dimension of as many
        # features for it in a batch of another size. None has a dimension of 0.
        batch = batch[:0]
    return pytree.SUPPORTED_NODES[type(batch)].flatten_fn(batch)[1]


def rebuild(template: Template, leaves: Sequence[Any]) -> Batch:
    """A batch nested like ``template``, with other leaves."""
    kind = type(template)
    if kind is int:
        return leaves[template]
    if kind is dict:
        return {key: rebuild(value, leaves) for key, value in template.items()}
    if kind is Registered:
        return template.rebuild(leaves)
    inside = [rebuild(value, leaves) for value in template]
    if kind is list:
        return inside
    return kind(*inside) if hasattr(template, "_fields") else tuple(inside)


def mapped(batch: Batch, change: Callable[[Any], Any], whole: Collection[Path] = ()) -> Batch:
    """A batch nested alike, with other tensors; what is no tensor stays as it is.

    Args:
        batch: nested.
        change: gives another tensor, or, in place of a list that is a leaf itself, another list.
        whole: where such lists are; see ``leaves_of``.
    """
    leaves = {
        path: change(leaf) if isinstance(leaf, Tensor) or path in whole else leaf
        for path, leaf in leaves_of(batch, whole=whole)
    }
    positions = {path: position for position, path in enumerate(leaves)}
    return rebuild(template_of(batch, positions.__getitem__, whole), list(leaves.values()))


def leaves_like(template: Template, batch: Batch, found: list[Any], path: Path = ()) -> None:
    """Puts the leaves of a batch into ``found``, each at its position in the template.

    Args:
        template: of the first mini-batch.
        batch: another one.
        found: as long as the template has leaves; written.
        path: of both.

    Raises:
        ValueError: the batch is nested otherwise.
    """
    kind = type(template)
    if kind is int:
        found[template] = batch
    elif kind is dict:
        mapping = batch if isinstance(batch, Mapping) else _as_mapping(batch)
        if not isinstance(mapping, Mapping) or (
            # Some types' views of keys are no sets.
            mapping.keys() != template.keys() and set(mapping.keys()) != template.keys()
        ):
            raise _other_keys(path, template, mapping)
        for key, value in template.items():
            leaves_like(value, mapping[key], found, (*path, key))
    elif kind is Registered:
        values = _children_like(template, batch, path)
        for step, value, each in zip(template.steps, template.children, values, strict=True):
            leaves_like(value, each, found, (*path, step))
    else:
        parts = batch if isinstance(batch, (tuple, list)) else _as_sequence(batch)
        if not isinstance(parts, (tuple, list)) or len(parts) != len(template):
            raise _other_parts(path, len(template), parts)
        for index, value in enumerate(template):
            leaves_like(value, parts[index], found, (*path, index))


def _children_like(template: Registered, batch: Batch, path: Path) -> Sequence[Any]:
    """What is in a batch's container, in the order of the template's."""
    values: Sequence[Any]
    is_alike = type(batch) is template.kind
    if is_alike:
        values, context = pytree.SUPPORTED_NODES[template.kind].flatten_fn(batch)
        if len(values) == len(template.steps) and _are_equal(context, template.context):
            return values
    if template.are_named:
        mapping = batch if isinstance(batch, Mapping) else _as_mapping(batch)
        if not isinstance(mapping, Mapping) or set(mapping.keys()) != set(template.steps):
            raise _other_keys(path, template.steps, mapping)
        values = [mapping[step] for step in template.steps]
    else:
        values = batch if isinstance(batch, (tuple, list)) else _as_sequence(batch)
        if not isinstance(values, (tuple, list)) or len(values) != len(template.steps):
            raise _other_parts(path, len(template.steps), values)
    if is_alike and not isinstance(batch, Mapping):  # all that a mapping holds has a key
        raise ValueError(
            f"{path_text(path)}: this {template.kind.__name__} holds other things beside its "
            "tensors than that of the first mini-batch: the buffer stores tensors only, so what "
            "else there is must always be the same"
        )
    return values


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # there are tensors or arrays in them
        return False


def _as_mapping(batch: Batch) -> Batch:
    """A registered container with named children as a dict; anything else as it is."""
    children = _registered_children_of(batch)
    if children is None or not children.are_named:
        return batch
    return dict(zip(children.steps, children.values, strict=True))


def _as_sequence(batch: Batch) -> Batch:
    """A registered container with numbered children as a list; anything else as it is."""
    children = _registered_children_of(batch)
    return batch if children is None or children.are_named else list(children.values)


def _other_keys(path: Path, keys: Any, batch: Batch) -> ValueError:
    found = list(batch.keys()) if isinstance(batch, Mapping) else type(batch).__name__
    return ValueError(
        f"{path_text(path)} has {found}, but the buffer's samples have the keys {list(keys)} "
        "there: the nesting is fixed by the first mini-batch"
    )


def _other_parts(path: Path, num_parts: int, batch: Batch) -> ValueError:
    found = len(batch) if isinstance(batch, (tuple, list)) else type(batch).__name__
    return ValueError(
        f"{path_text(path)} has {found} parts, but the buffer's samples have {num_parts} there: "
        "the nesting is fixed by the first mini-batch"
    )
