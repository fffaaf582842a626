"""What accidents do to the files of a saved buffer. Checksums are then wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from saved_buffers import another_save

Dice = np.random.Generator


Damage = Callable[[Path, Dice], None]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def any_file(folder: Path, dice: Dice) -> Path:
    files = files_of(folder)
    return files[dice.integers(len(files))]


def truncate(folder: Path, dice: Dice) -> None:
    path = any_file(folder, dice)
    os.truncate(path, dice.integers(path.stat().st_size))


def flip_bits(folder: Path, dice: Dice) -> None:
    path = any_file(folder, dice)
    content = bytearray(path.read_bytes())
    for place in dice.integers(len(content), size=dice.integers(1, 4)).tolist():
        content[place] ^= 1 << int(dice.integers(8))
    path.write_bytes(content)


def swap_bytes(folder: Path, dice: Dice) -> None:
    path = any_file(folder, dice)
    content = bytearray(path.read_bytes())
    first, second = dice.integers(len(content), size=2).tolist()
    content[first], content[second] = content[second], content[first]
    path.write_bytes(content)


def zero_a_block(folder: Path, dice: Dice) -> None:
    path = any_file(folder, dice)
    content = bytearray(path.read_bytes())
    first = int(dice.integers(len(content)))
    end = min(len(content), first + int(dice.integers(1, 512)))
    content[first:end] = bytes(end - first)
    path.write_bytes(content)


def append_bytes(folder: Path, dice: Dice) -> None:
    with open(any_file(folder, dice), "ab") as file:
        file.write(dice.bytes(int(dice.integers(1, 600))))


def insert_bytes(folder: Path, dice: Dice) -> None:
    path = any_file(folder, dice)
    content = path.read_bytes()
    place = int(dice.integers(len(content)))
    path.write_bytes(content[:place] + dice.bytes(int(dice.integers(1, 40))) + content[place:])


def delete(folder: Path, dice: Dice) -> None:
    any_file(folder, dice).unlink()


def empty(folder: Path, dice: Dice) -> None:
    any_file(folder, dice).write_bytes(b"")


def copy_one_over_another(folder: Path, dice: Dice) -> None:
    shutil.copy(any_file(folder, dice), any_file(folder, dice).with_suffix(".copy"))
    source, target = any_file(folder, dice), any_file(folder, dice)
    target.write_bytes(source.read_bytes())


def swap_files(folder: Path, dice: Dice) -> None:
    first, second = any_file(folder, dice), any_file(folder, dice)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def mix_with_another_save(folder: Path, dice: Dice) -> None:
    """A shard of it, or its manifest; both are whole."""
    name = folder.name.partition("@")[0]
    other = files_of(another_save(name, folder.parent))
    path = any_file(folder, dice)
    path.write_bytes(next(o for o in other if o.suffix == path.suffix).read_bytes())


def in_place_of_a_file(make: Callable[[Path, Path], None]) -> Damage:
    def damage(folder: Path, dice: Dice) -> None:
        path = any_file(folder, dice)
        moved = folder.parent / f"{folder.name}.{path.name}"
        path.rename(moved)
        make(path, moved)

    return damage


def link_to_a_copy_inside(folder: Path, dice: Dice) -> None:
    path = any_file(folder, dice)
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(moved.name)


def lock_away(folder: Path, dice: Dice) -> None:
    any_file(folder, dice).chmod(0)


ACCIDENTS: dict[str, Damage] = {
    "truncated": truncate,
    "bits flipped": flip_bits,
    "bytes swapped": swap_bytes,
    "block zeroed": zero_a_block,
    "bytes appended": append_bytes,
    "bytes inserted": insert_bytes,
    "file deleted": delete,
    "file emptied": empty,
    "file copied over another": copy_one_over_another,
    "files swapped": swap_files,
    "file of another save": mix_with_another_save,
    "link out of the folder": in_place_of_a_file(lambda path, moved: path.symlink_to(moved)),
    "link to /dev/zero": in_place_of_a_file(lambda path, _: path.symlink_to("/dev/zero")),
    "link inside": link_to_a_copy_inside,
    "named pipe": in_place_of_a_file(lambda path, _: os.mkfifo(path)),
    "folder for a file": in_place_of_a_file(lambda path, _: path.mkdir()),
    "no permission": lock_away,
}
