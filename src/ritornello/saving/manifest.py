"""The manifest of a saved buffer: everything that all ranks know of it, as JSON.

Nothing in a manifest is believed: every value is checked, and what can be computed is not read.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import reprlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ritornello.arrays import Ints
from ritornello.errors import CheckpointError
from ritornello.records.layout import Layout
from ritornello.records.pages import Paging
from ritornello.rounds.arguments import meant
from ritornello.saving.checked_json import (
    checked_bool,
    checked_count,
    checked_number,
    checked_seconds,
    checked_text,
    checked_texts,
    no_constant,
)
from ritornello.saving.saved_layout import layout_from_json, layout_to_json
from ritornello.version import __version__

FORMAT = "ritornello rehearsal buffer"

FORMAT_VERSION = 1

VERSION_WITH_PAGES = 2
"""Of buffers whose samples differ in length; others stay as earlier releases can read them."""

ARGUMENTS_SINCE = {"draws": "global"}
"""What earlier releases did without saying so."""

MOST_BYTES = 2**24
"""A manifest has a few lines for each shard and task; a longer one is none of ours."""

MOST_NAME = 10_000
"""Characters of a task's name."""

MOST_ROUNDS = 2**48
"""Nobody has more steps; what is computed from fewer fits into 64 bits."""

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
    """What the ``RehearsalBuffer`` was made with, as text."""
    capacity: int
    held_per_rank: tuple[int, ...]
    num_rounds: int
    num_offers: int
    """As many as rounds; more where earlier releases had candidates wait for a later round, with
    ``rounds_per_exchange``. Those are not taken over."""
    is_offered: bool
    """Whether the last mini-batch was offered, so that the next draw takes ``num_staged``."""
    num_staged: int
    """Representatives that the last round has drawn for each rank; with local draws, for the one
    that has drawn most."""
    layout: Layout | None
    """How samples lie in records; None before the first mini-batch."""
    label: int | None
    """The position of the class label among the layout's fields."""
    on_gpu: bool = False
    """Whether mini-batches were on a GPU."""
    num_drawn: int | None = None
    """As ``num_staged``, also after what was staged is gone; None: of an earlier release."""
    rate: float | None = None
    """What ``num_representatives`` was set to; None: it was fixed."""
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
        """The size of each representative; 0 before the first mini-batch."""
        return self.layout.record_bytes if self.layout else 0

    @property
    def paging(self) -> Paging | None:
        """The pages of the shards, if samples differ in length."""
        return self.layout.paging if self.layout else None

    @property
    def identity(self) -> int | None:
        """The position among the layout's fields of the one that tells samples apart, if any."""
        named = self.arguments.get("identity")
        for position, each in enumerate(self.layout.fields if self.layout else ()):
            path = each.path[0] if len(each.path) == 1 else each.path
            if each.is_integer and str(path) == named:
                return position
        return None

    @property
    def in_common(self) -> str:
        """What is the same on every rank: each has noted by its own clock when tasks began."""
        return replace(self, tasks=()).as_json()

    @property
    def lacks_draw(self) -> bool:
        """Whether representatives must be drawn again for the next step: see ``forget``."""
        if self.num_drawn is None:  # earlier releases drew something wherever there was something
            return self.num_rounds > 0 and self.num_held > 0 and self.num_staged == 0
        return self.num_held > 0 and self.num_staged < self.num_drawn

    def meant(self, argument: str) -> str | None:
        """An argument's text, the same for all that mean the same; None: it is not there."""
        text = self.arguments.get(argument, ARGUMENTS_SINCE.get(argument))
        return None if text is None else meant(argument, text)

    def task_numbers(self, admitted_in: Ints) -> Ints:
        """The position in ``tasks`` of what was admitted in some rounds; -1: before the first."""
        first_rounds = np.array([task.first_round for task in self.tasks], dtype=np.int64)
        return first_rounds.searchsorted(admitted_in, side="right") - 1

    def as_json(self) -> str:
        """As text.

        Raises:
            CheckpointError: a sample's keys are neither texts nor integers.
        """
        version = VERSION_WITH_PAGES if self.paging else FORMAT_VERSION
        content: dict[str, Any] = {"format": FORMAT, "format_version": version}
        content |= {name: value for name, value in vars(self).items() if name != "layout"}
        for name in ("tasks", "removals", "files"):
            content[name] = [asdict(each) for each in content[name]]
        content["layout"] = None if self.layout is None else layout_to_json(self.layout)
        return json.dumps(with_checksum(content), indent=1)

    def as_readable_json(self) -> str:
        """As text, after ``from_json`` has taken it: so nothing is saved that no load accepts.

        Raises:
            CheckpointError: it does not.
        """
        text = self.as_json()
        try:
            Manifest.from_json(text, "the manifest")
        except CheckpointError as error:
            raise CheckpointError(f"what is saved could not be loaded: {error}") from error
        return text

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """From text.

        Args:
            text: of a manifest.
            where: it comes from, for errors.

        Raises:
            CheckpointError: it is none, or of another version.
        """
        if len(text) > MOST_BYTES:
            raise CheckpointError(
                f"{where} is no manifest: it has {len(text)} bytes, and {MOST_BYTES} at most"
            )
        try:
            content = json.loads(text, parse_constant=no_constant)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise CheckpointError(f"{where} is no manifest of a rehearsal buffer")
            version = content.get("format_version")
            if version not in (FORMAT_VERSION, VERSION_WITH_PAGES):
                raise CheckpointError(
                    f"{where} has the format version {version!r}, but this release of Ritornello "
                    f"({__version__}) reads versions {FORMAT_VERSION} and {VERSION_WITH_PAGES}: "
                    "use the release that wrote it, or a newer one"
                )
            if content != with_checksum(content):
                raise ValueError("its checksum is that of another text")
            return cls._checked(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise CheckpointError(f"{where} is damaged: {kind}{error}") from error

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> Manifest:
        layout = None if content["layout"] is None else layout_from_json(content["layout"])
        label = content["label"]
        if label is not None and (layout is None or checked_count(label) >= len(layout.fields)):
            raise ValueError(f"label={reprlib.repr(label)} is no field of the layout")
        if layout is not None and label is not None and not layout.fields[label].is_integer:
            raise ValueError(f"label={label} is the field {layout.fields[label]}: no integer")
        num_drawn, rate = content.get("num_drawn"), content.get("rate")
        manifest = cls(
            arguments=checked_texts(content["arguments"]),
            capacity=checked_count(content["capacity"]),
            held_per_rank=tuple(map(checked_count, content["held_per_rank"])),
            num_rounds=checked_count(content["num_rounds"], MOST_ROUNDS),
            num_offers=checked_count(content["num_offers"], MOST_ROUNDS),
            is_offered=checked_bool(content["is_offered"]),
            num_staged=checked_count(content["num_staged"]),
            layout=layout,
            label=label,
            on_gpu=checked_bool(content.get("on_gpu", False)),
            num_drawn=None if num_drawn is None else checked_count(num_drawn),
            rate=None if rate is None else checked_number(rate),
            tasks=tuple(
                TaskMark(
                    checked_text(each["name"]),
                    checked_count(each["first_round"]),
                    checked_seconds(each["began_at"]),
                )
                for each in content["tasks"]
            ),
            removals=tuple(
                Removal(
                    checked_texts(each["where"]),
                    checked_count(each["num_removed"]),
                    checked_count(each["num_left"]),
                    checked_text(each["removed_at"]),
                )
                for each in content["removals"]
            ),
            files=tuple(
                SavedFile(
                    checked_text(each["name"]),
                    checked_count(each["num_bytes"]),
                    checked_text(each["sha256"]),
                )
                for each in content["files"]
            ),
            save_id=checked_text(content["save_id"]),
            saved_at=checked_text(content["saved_at"]),
            versions=checked_texts(content["versions"]),
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
        if self.num_drawn is not None and self.num_drawn < self.num_staged:
            raise ValueError(f"{self.num_staged} staged of {self.num_drawn} drawn")
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
