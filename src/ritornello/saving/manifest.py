"""The manifest of a saved buffer: everything that all ranks know of it, as JSON.

Nothing in a manifest is believed: every value is checked, and what can be computed is not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ritornello.arrays import Ints
from ritornello.errors import CheckpointError
from ritornello.records.layout import Layout
from ritornello.records.nesting import Batch, Registered, Template, leaves_of
from ritornello.saving.files import checked_count
from ritornello.version import __version__

FORMAT = "ritornello rehearsal buffer"

FORMAT_VERSION = 1

MOST_BYTES = 2**24
"""A manifest has a few lines for each shard and task; a longer one is none of ours."""

MOST_ROUNDS = 2**48
"""Nobody has more steps; what is computed from fewer fits into 64 bits."""

MOST_RECORD_BYTES = 2**40
MOST_DIMENSIONS = 64
MOST_FIELDS = 10_000
MOST_LEVELS = 64
"""How deep a sample may be nested."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}

SHARD_FILE = re.compile(r"shard-[0-9]{5,}-of-[0-9]{5,}-[0-9a-f]{16}\.safetensors")
"""The only names of files that a manifest may give: none leads out of its folder."""


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest with the checksum of all the rest: against accidents."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return {**rest, "checksum": hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


@dataclass(frozen=True)
class TaskMark:
    """Where a task began in the stream; see ``RehearsalBuffer.begin_task``."""

    name: str
    first_round: int
    """Candidates that were admitted in this round or later are of it, until the next one."""
    began_at: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class SavedFile:
    """A shard's file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Removal:
    """What was removed from a saved buffer on request; see ``forget``."""

    where: dict[str, str]
    """The conditions; of values that may say who somebody is, checksums alone."""
    num_removed: int
    num_left: int
    removed_at: str
    """In UTC, ISO 8601."""


@dataclass(frozen=True)
class Manifest:
    """A saved buffer, without its representatives."""

    arguments: dict[str, str]
    """Those of the ``RehearsalBuffer``, as text."""
    capacity: int
    held_per_rank: tuple[int, ...]
    num_rounds: int
    num_offers: int
    """As many as rounds; more where earlier releases had candidates wait for a later round, with
    ``rounds_per_exchange``. Those are not taken over."""
    is_offered: bool
    """Whether the last mini-batch was offered, so that the next draw takes ``num_staged``."""
    num_staged: int
    """Representatives that the last round has drawn for each rank."""
    layout: Layout | None
    """What the records look like; None before the first mini-batch."""
    label: int | None
    """The position of the class label among the layout's fields."""
    on_gpu: bool = False
    """Whether mini-batches were on a GPU."""
    tasks: tuple[TaskMark, ...] = ()
    removals: tuple[Removal, ...] = ()
    files: tuple[SavedFile, ...] = ()
    """For each shard, its file; none for a ``state_dict``."""
    save_id: str = ""
    saved_at: str = ""
    """In UTC, ISO 8601."""
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "ritornello": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
    )

    @property
    def num_ranks(self) -> int:
        """How many shards there are."""
        return len(self.held_per_rank)

    @property
    def num_held(self) -> int:
        """Representatives in all shards."""
        return sum(self.held_per_rank)

    @property
    def record_bytes(self) -> int:
        """Bytes of each representative."""
        return self.layout.record_bytes if self.layout else 0

    @property
    def in_common(self) -> str:
        """What is the same on every rank: each has noted by its own clock when tasks began."""
        return replace(self, tasks=()).as_json()

    @property
    def lacks_draw(self) -> bool:
        """Whether representatives must be drawn again for the next step: see ``forget``."""
        return self.num_rounds > 0 and self.num_held > 0 and self.num_staged == 0

    def task_numbers(self, admitted_in: Ints) -> Ints:
        """The position in ``tasks`` of what was admitted in some rounds; -1: before the first."""
        first_rounds = np.array([task.first_round for task in self.tasks], dtype=np.int64)
        return first_rounds.searchsorted(admitted_in, side="right") - 1

    def as_json(self) -> str:
        """As text.

        Raises:
            CheckpointError: a sample's keys are neither texts nor integers.
        """
        content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        content |= {name: value for name, value in vars(self).items() if name != "layout"}
        for name in ("tasks", "removals", "files"):
            content[name] = [asdict(each) for each in content[name]]
        content["layout"] = None if self.layout is None else _layout_to_json(self.layout)
        return json.dumps(with_checksum(content), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """From text.

        Args:
            text: of a manifest.
            where: it comes from, for errors.

        Raises:
            CheckpointError: it is none, or of another version.
        """
        try:
            content = json.loads(text, parse_constant=_no_number)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise CheckpointError(f"{where} is no manifest of a rehearsal buffer")
            version = content.get("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{where} has the format version {version!r}, but this release of Ritornello "
                    f"({__version__}) reads version {FORMAT_VERSION}: use the release that wrote "
                    "it, or a newer one"
                )
            if content != with_checksum(content):
                raise ValueError("its checksum is that of another text")
            return cls._checked(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise CheckpointError(f"{where} is damaged: {kind}{error}") from error

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> Manifest:
        layout = None if content["layout"] is None else _layout_from_json(content["layout"])
        label = content["label"]
        if label is not None and (layout is None or checked_count(label) >= len(layout.fields)):
            raise ValueError(f"label={reprlib.repr(label)} is no field of the layout")
        manifest = cls(
            arguments=_texts(content["arguments"]),
            capacity=checked_count(content["capacity"]),
            held_per_rank=tuple(map(checked_count, content["held_per_rank"])),
            num_rounds=checked_count(content["num_rounds"], MOST_ROUNDS),
            num_offers=checked_count(content["num_offers"], MOST_ROUNDS),
            is_offered=_yes_or_no(content["is_offered"]),
            num_staged=checked_count(content["num_staged"]),
            layout=layout,
            label=label,
            on_gpu=_yes_or_no(content.get("on_gpu", False)),
            tasks=tuple(
                TaskMark(
                    _text(each["name"]),
                    checked_count(each["first_round"]),
                    _seconds(each["began_at"]),
                )
                for each in content["tasks"]
            ),
            removals=tuple(
                Removal(
                    _texts(each["where"]),
                    checked_count(each["num_removed"]),
                    checked_count(each["num_left"]),
                    _text(each["removed_at"]),
                )
                for each in content["removals"]
            ),
            files=tuple(
                SavedFile(
                    _text(each["name"]), checked_count(each["num_bytes"]), _text(each["sha256"])
                )
                for each in content["files"]
            ),
            save_id=_text(content["save_id"]),
            saved_at=_text(content["saved_at"]),
            versions=_texts(content["versions"]),
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raises ValueError where something contradicts something else."""
        if not self.held_per_rank or self.num_held > self.capacity:
            raise ValueError(
                f"held_per_rank={reprlib.repr(self.held_per_rank)} for a capacity of "
                f"{self.capacity}"
            )
        counts = (self.num_rounds, self.num_offers, self.num_held, self.num_staged)
        if (self.layout is None and any(counts)) or self.is_offered > self.num_offers:
            raise ValueError(f"rounds, offers, representatives and staged ones cannot be {counts}")
        first_rounds = [task.first_round for task in self.tasks]
        if first_rounds != sorted(first_rounds) or max(first_rounds, default=0) > self.num_rounds:
            raise ValueError(
                f"tasks begin in rounds {reprlib.repr(first_rounds)}: they must be in that order, "
                f"and there were {self.num_rounds}"
            )
        if self.files and len(self.files) != self.num_ranks:
            raise ValueError(f"{len(self.files)} files for {self.num_ranks} shards")
        if len({file.name for file in self.files}) < len(self.files):
            raise ValueError("two shards have the same file")
        for file in self.files:
            if not SHARD_FILE.fullmatch(file.name):
                raise ValueError(f"{reprlib.repr(file.name)} is no name of a shard's file")

    def with_files(self, files: tuple[SavedFile, ...], save_id: str, saved_at: str) -> Manifest:
        """As it was saved."""
        return replace(self, files=files, save_id=save_id, saved_at=saved_at)


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    return {
        "nesting": _nesting_to_json(layout.template),
        "fields": [
            {
                "path": str(each).partition(":")[0],
                "dtype": str(each.dtype).removeprefix("torch."),
                "shape": list(each.shape),
            }
            for each in layout.fields
        ],
    }


def _layout_from_json(content: dict[str, Any]) -> Layout:
    if len(content["fields"]) > MOST_FIELDS:
        raise ValueError(f"{len(content['fields'])} fields")
    leaves = []
    for each in content["fields"]:
        shape = [checked_count(size) for size in each["shape"]]
        dtype = DTYPES.get(_text(each["dtype"]))
        if dtype is None:
            raise ValueError(f"a field of the dtype {reprlib.repr(each['dtype'])}")
        # Zeros count as ones: no stride may be too large for PyTorch.
        num_bytes = dtype.itemsize * math.prod(max(1, size) for size in shape[:MOST_DIMENSIONS])
        if len(shape) > MOST_DIMENSIONS or num_bytes > MOST_RECORD_BYTES:
            raise ValueError(f"a field of the shape {reprlib.repr(shape)}")
        leaves.append(torch.empty((0, *shape), dtype=dtype))
    remaining = iter(leaves)
    batch = _nesting_from_json(content["nesting"], lambda: next(remaining))
    if sum(1 for _ in leaves_of(batch)) != len(leaves):
        raise ValueError("the nesting has another number of leaves than there are fields")
    return Layout.of(batch)


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


def _nesting_from_json(content: Any, leaf: Callable[[], torch.Tensor], level: int = 0) -> Batch:
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


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{reprlib.repr(value)} must be a text")
    return value


def _texts(value: Any) -> dict[str, str]:
    return {_text(key): _text(each) for key, each in value.items()}


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{reprlib.repr(value)} must be true or false")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 2**53:
        raise ValueError(f"{reprlib.repr(value)} must be seconds since 1970")
    return float(value)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")
