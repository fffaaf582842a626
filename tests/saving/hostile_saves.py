"""What a hostile author writes into a saved buffer: every checksum and size is right."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accidents import Damage
from numpy.typing import NDArray

from ritornello.saving.folder import MANIFEST
from ritornello.saving.manifest import with_checksum
from ritornello.saving.shard_file import ROWS, header_of

Content = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
Dice = np.random.Generator


def read_manifest(folder: Path) -> Content:
    content: Content = json.loads((folder / MANIFEST).read_text())
    return content


def write_manifest(folder: Path, content: Content) -> None:
    (folder / MANIFEST).write_text(json.dumps(with_checksum(content)))


def put_shard(folder: Path, rank: int, data: bytes, content: Content | None = None) -> None:
    """Writes a shard's file, and its checksum and size into the manifest."""
    content = content or read_manifest(folder)
    about = content["files"][rank]
    (folder / about["name"]).write_bytes(data)
    about |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, content)


def shard_path(folder: Path, rank: int) -> Path:
    return folder / str(read_manifest(folder)["files"][rank]["name"])


def read_shard(folder: Path, rank: int) -> Arrays:
    """All arrays, rows included, in the file's order."""
    return arrays_in(shard_path(folder, rank).read_bytes())


def arrays_in(data: bytes) -> Arrays:
    header, rest = split(data)
    header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        dtype = {"U8": np.uint8, "I64": np.int64, "F64": np.float64}[entry["dtype"]]
        found[name] = np.frombuffer(rest[first:end], dtype).reshape(entry["shape"]).copy()
    return found


def split(data: bytes) -> tuple[Content, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_shard(folder: Path, rank: int, arrays: Arrays) -> None:
    others = {name: each for name, each in arrays.items() if name != ROWS}
    rows = arrays[ROWS]
    header = header_of(others, rows.shape)
    data = b"".join(each.tobytes() for each in (*others.values(), rows))
    put_shard(folder, rank, header + data)


DELETED, TWICE = object(), object()

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    3.5,
    2**31,
    2**48,
    2**53,
    2**61,
    2**63,
    10**30,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "1",
    "x",
    "../../outside",
    "/etc/passwd",
    "shard-00000-of-00001-0123456789abcdef.safetensors",
    "../shard-00000-of-00001-0123456789abcdef.safetensors",
    "a\0b",
    "\ud800",
    "field",
    "x" * 10**6,
    [],
    {},
    [0],
    [1, 2, 3],
    [[]] * 50,
    {"dict": []},
    {"tuple": ["field", "field"]},
    {"": None},
    [0] * 10**5,
    DELETED,
    TWICE,
]


def places_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in some JSON, the whole excluded."""
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for key, value in items:
        yield (*path, key)
        yield from places_in(value, (*path, key))


def with_value(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a path."""
    copied = json.loads(json.dumps(content))
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[path[-1]]
    elif value is TWICE:
        if isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            parent["again"] = parent[path[-1]]
    else:
        parent[path[-1]] = value
    return copied


def hostile_value_in_manifest(folder: Path, dice: Dice) -> None:
    content = read_manifest(folder)
    places = [path for path in places_in(content) if path != ("checksum",)]
    for _ in range(dice.choice([1, 1, 2])):
        path = places[dice.integers(len(places))]
        value = VALUES[dice.integers(len(VALUES))]
        try:
            content = with_value(content, path, value)
        except (KeyError, IndexError, TypeError):
            continue  # the first change has taken the place away
    write_manifest(folder, content)


def nearby_count_in_manifest(folder: Path, dice: Dice) -> None:
    """Plausible numbers: one more, one less, another's."""
    content = read_manifest(folder)
    numbers = [path for path in places_in(content) if type(value_at(content, path)) is int]
    path, other = (numbers[i] for i in dice.integers(len(numbers), size=2).tolist())
    value = value_at(content, path)
    near = [value + 1, max(0, value - 1), value * 2, value // 2, value_at(content, other), 0]
    write_manifest(folder, with_value(content, path, near[dice.integers(len(near))]))


def value_at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def hostile_text_in_manifest(folder: Path, dice: Dice) -> None:
    """What no JSON library writes."""
    text = (folder / MANIFEST).read_text()
    deep = 10 ** int(dice.integers(2, 7))
    texts = [
        "[" * deep,
        "[" * deep + "]" * deep,
        '{"a":' * deep + "1" + "}" * deep,
        text.replace('"nesting":', '"nesting": ' + '{"list": [' * deep + "]}" * deep + ', "n":', 1),
        text.replace('"capacity":', '"capacity": 7, "capacity":', 1),
        text.replace('"capacity":', '"capacity": ' + "9" * deep + ', "c":', 1),
        text + text,
        "\ufeff" + text,
        "",
        "null",
        "[]",
        "{}",
        '"' + "x" * deep + '"',
        "NaN",
        " " * 2**20 + text,
    ]
    (folder / MANIFEST).write_text(texts[dice.integers(len(texts))])


def hostile_manifest_bytes(folder: Path, dice: Dice) -> None:
    data = (folder / MANIFEST).read_bytes()
    variants = [data.decode().encode("utf-16"), b"\xff" + data, b"\x80\x04\x95.", dice.bytes(300)]
    (folder / MANIFEST).write_bytes(variants[dice.integers(len(variants))])


def hostile_layout(folder: Path, dice: Dice) -> None:
    content = read_manifest(folder)
    if content["layout"] is None:
        content["layout"] = {"nesting": "field", "fields": [{}]}
    many = 10 ** int(dice.integers(1, 6))
    dtypes = [
        str(each).removeprefix("torch.")
        for each in vars(torch).values()
        if isinstance(each, torch.dtype)
    ]
    one = {"path": "batch", "dtype": dtypes[dice.integers(len(dtypes))], "shape": []}
    shapes: list[list[int]] = [
        [2**40],
        [2**40, 2**40],
        [2**20, 2**20, 2**20, 2**4],
        [2**32, 2**32],
        [0],
        [0, 2**40],
        [1] * many,
        [2**33],
        [1000, 1000, 1000, 1000],
    ]
    deep: Any = "field"
    for _ in range(min(many, 300)):
        deep = {"list": [deep]}
    kind = int(dice.integers(6))
    layout = content["layout"]
    if kind == 0:
        layout |= {"nesting": {"tuple": ["field"] * many}, "fields": [one] * many}
    elif kind == 1:
        layout["fields"][0]["shape"] = shapes[dice.integers(len(shapes))]
        layout["fields"][0].setdefault("dtype", "float32")
    elif kind == 2:
        layout |= {"nesting": deep, "fields": [one]}
    elif kind == 3:
        layout |= {"nesting": {"dict": [["a", "field"], ["a", "field"]]}, "fields": [one, one]}
    elif kind == 4:
        layout |= {"nesting": {"tuple": []}, "fields": []}
    else:
        layout["fields"][-1]["dtype"] = one["dtype"]
    if dice.random() < 0.5:  # nothing is held, so that the shards' sizes fit
        content["held_per_rank"] = [0] * len(content["held_per_rank"])
        write_manifest(folder, content)
        for rank in range(len(content.get("files", []))):
            arrays = read_shard(folder, rank)
            arrays[ROWS] = np.zeros((0, 2**40 if dice.random() < 0.5 else 16), np.uint8)
            for name in arrays:
                if name not in (ROWS, "policy.offered"):
                    arrays[name] = arrays[name][:0]
            write_shard(folder, rank, arrays)
        return
    write_manifest(folder, content)


def hostile_size_of_job(folder: Path, dice: Dice) -> None:
    """Very many ranks, of which some file is said to be the shard."""
    content = read_manifest(folder)
    many = 10 ** int(dice.integers(1, 6))
    content["held_per_rank"] = [0] * many
    content["capacity"] = int(2 ** dice.integers(5, 61))
    if dice.random() < 0.7:
        content["files"] = [content["files"][0]] * many
    write_manifest(folder, content)


def hostile_rounds(folder: Path, dice: Dice) -> None:
    content = read_manifest(folder)
    huge = int(2 ** dice.integers(30, 62)) - 1000 * int(dice.integers(2))
    for name in ("num_rounds", "num_offers"):
        if dice.random() < 0.7:
            content[name] = huge
    if dice.random() < 0.3:
        content["is_offered"] = not content["is_offered"]
    write_manifest(folder, content)


def hostile_value_in_header(folder: Path, dice: Dice) -> None:
    rank = int(dice.integers(len(read_manifest(folder)["files"])))
    header, rest = split(shard_path(folder, rank).read_bytes())
    places = list(places_in(header))
    path = places[dice.integers(len(places))]
    value = VALUES[dice.integers(len(VALUES))]
    if type(value_at(header, path)) is int and dice.random() < 0.7:
        value = value_at(header, path) + int(dice.integers(-16, 17))
    text = json.dumps(with_value(header, path, value)).encode()
    put_shard(folder, rank, len(text).to_bytes(8, "little") + text + rest)


def hostile_header_text(folder: Path, dice: Dice) -> None:
    rank = int(dice.integers(len(read_manifest(folder)["files"])))
    data = shard_path(folder, rank).read_bytes()
    header, rest = split(data)
    text = json.dumps(header).encode()
    deep = 10 ** int(dice.integers(2, 6))
    length = [0, 1, 2**20, 2**31, 2**63, 2**64 - 1, len(data) - 8, len(data)]
    texts = [
        b"[" * deep,
        b'{"a":' * deep,
        b"null",
        b"[]",
        b"{}",
        text[:-1] + b',"rows":{"dtype":"U8","shape":[0,16],"data_offsets":[0,0]}}',
        text[:-1]
        + b',"more":{"dtype":"F64","shape":[0,4611686018427387000],"data_offsets":[0,0]}}',
        text[:-1]
        + b',"more":{"dtype":"U8","shape":'
        + b"["
        + b"9999," * 9999
        + b"0]"
        + b',"data_offsets":[0,0]}}',
    ]
    if dice.random() < 0.4:
        put_shard(folder, rank, length[dice.integers(len(length))].to_bytes(8, "little") + data[8:])
    else:
        text = texts[dice.integers(len(texts))]
        put_shard(folder, rank, len(text).to_bytes(8, "little") + text + rest)


def changed(array: NDArray[Any], dice: Dice) -> NDArray[Any]:
    """An array that is not what it was."""
    floats = array.dtype == np.float64
    odd = [np.nan, np.inf, -np.inf, -1e-7, -1.0, 1e308, 5e-324] if floats else []
    numbers = [-1, 0, 1, 2, 10, 255, 2**31, 2**48, 2**61, 2**62, 2**63 - 1, -(2**63)]
    values = odd or (dice.integers(256, size=3).tolist() if array.dtype == np.uint8 else numbers)
    array = array.copy()
    flat = array.reshape(-1)
    ways: list[Callable[[], NDArray[Any]]] = [
        lambda: array[:-1],
        lambda: array[1:],
        lambda: np.concatenate([array, array[-1:]]),
        lambda: np.concatenate([array, array]),
        lambda: array[::-1],
        lambda: array[:0],
        lambda: array.astype(np.int64 if floats else np.float64),
        lambda: array.astype(np.uint8),
        lambda: array.reshape(-1, 1),
        lambda: array.reshape(1, *array.shape),
        lambda: dice.permutation(array),
        lambda: np.full_like(array, values[dice.integers(len(values))]),
        lambda: np.zeros(()) if floats else np.zeros((), np.int64),
    ]
    choice = int(dice.integers(len(ways) + 12))
    if choice < len(ways):
        with np.errstate(invalid="ignore"):  # NaN has no integer
            return np.require(ways[choice](), requirements="C")
    if len(flat):
        place = dice.integers(len(flat))
        if choice % 3 == 0 and not odd:
            flat[place] += np.array(1 if dice.random() < 0.5 else -1).astype(array.dtype)
        elif choice % 3 == 1:
            flat[place] = flat[dice.integers(len(flat))]
        else:
            flat[place] = values[dice.integers(len(values))]
    return array


def hostile_arrays(folder: Path, dice: Dice) -> None:
    rank = int(dice.integers(len(read_manifest(folder)["files"])))
    arrays = read_shard(folder, rank)
    change_arrays(arrays, dice)
    write_shard(folder, rank, arrays)


def change_arrays(arrays: Arrays, dice: Dice) -> None:
    names = [name for name in arrays if name != ROWS]
    for _ in range(dice.choice([1, 1, 2])):
        name = str(dice.choice(names))
        kind = dice.random()
        if kind < 0.05:
            arrays.pop(name, None)
        elif kind < 0.1:
            arrays[f"{name}.more"] = np.zeros(int(dice.integers(1000)), np.int64)
        elif name in arrays:
            arrays[name] = changed(arrays[name], dice)


def hostile_labels(folder: Path, dice: Dice) -> None:
    """Records with other labels than the policy believes, also impossible ones."""
    rank = int(dice.integers(len(read_manifest(folder)["files"])))
    arrays = read_shard(folder, rank)
    name = str(dice.choice([ROWS, ROWS, "staged"]))
    records = arrays.get(name, np.zeros((0, 0), np.uint8))
    if records.size:
        labels = records[:, 16:24].copy().view(np.int64)  # three float32 and padding before
        place = dice.integers(len(labels))
        labels[place] = dice.choice([-1, 0, 1, 4, 5, 2**31, 2**62, -(2**63)])
        records[:, 16:24] = labels.view(np.uint8)
    write_shard(folder, rank, arrays)


def hostile_staging(folder: Path, dice: Dice) -> None:
    """More, fewer or other records for the next step, told alike everywhere."""
    content = read_manifest(folder)
    many = int(dice.choice([0, 1, 2, 5, 7, 64, 1000]))
    content["num_staged"] = many
    write_manifest(folder, content)
    for rank in range(len(content["files"])):
        arrays = read_shard(folder, rank)
        width = arrays[ROWS].shape[1]
        if "staged" in arrays:
            arrays["staged"] = np.frombuffer(dice.bytes(many * width), np.uint8).reshape(
                many, width
            )
        write_shard(folder, rank, arrays)


def sparse_file(folder: Path, dice: Dice) -> None:
    """Files that are huge and take no room, with sizes that are right."""
    content = read_manifest(folder)
    rank = int(dice.integers(len(content["files"])))
    header, rest = split(shard_path(folder, rank).read_bytes())
    num_bytes = 2 ** int(dice.integers(36, 44))
    end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    name = str(dice.choice(["more", "policy.more", "contents.more"]))
    header[name] = {
        "dtype": "I64",
        "shape": [num_bytes // 8],
        "data_offsets": [end, end + num_bytes],
    }
    text = json.dumps(header).encode()
    put_shard(folder, rank, len(text).to_bytes(8, "little") + text + rest)
    path = shard_path(folder, rank)
    os.truncate(path, path.stat().st_size + num_bytes)
    content = read_manifest(folder)
    content["files"][rank]["num_bytes"] = path.stat().st_size
    write_manifest(folder, content)


HOSTILE: dict[str, Damage] = {
    "values of the manifest": hostile_value_in_manifest,
    "nearby counts in the manifest": nearby_count_in_manifest,
    "text of the manifest": hostile_text_in_manifest,
    "bytes of the manifest": hostile_manifest_bytes,
    "layout": hostile_layout,
    "ranks": hostile_size_of_job,
    "rounds": hostile_rounds,
    "values of a header": hostile_value_in_header,
    "text of a header": hostile_header_text,
    "arrays": hostile_arrays,
    "labels of records": hostile_labels,
    "records for the next step": hostile_staging,
    "sparse files": sparse_file,
}
