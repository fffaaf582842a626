"""What a buffer of image files costs beside one of pixels: memory, time per step, accuracy.

    python benchmarks/stored_files.py cifar10.npz FOLDER               # as they are, 32 x 32
    python benchmarks/stored_files.py cifar10.npz FOLDER --tiles 8     # mosaics of 256 x 256

Writes the images as JPEG files into a folder, if it is not there yet. With ``--tiles`` an image is
a mosaic of as many images of one class by as many: a stand-in for photographs of ImageNet's size,
whose decoding costs as much. Times are of whole runs that take turns, see ``price.py``; what is
held in bytes, and the accuracy, are means over seeds. With files each step decodes its
representatives, beside the training if there is a core to spare.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from price import seconds_in_turns

from ritornello.experiments.data.data_set import LabelledImages
from ritornello.experiments.data.load import load
from ritornello.experiments.recipes.named import recipe_named
from ritornello.experiments.recipes.recipe import Recipe
from ritornello.experiments.training.run import run

QUALITY = 90
"""Of the JPEG files."""

MOST_SEEN = 64
"""Pixels of larger images' crops: the model is small, so that what is measured is the decoding."""

VARIANTS: dict[str, dict[str, Any]] = {
    "incremental": {"strategy": "incremental"},
    "pixels": {},
    "files": {"stores": "files"},
}
"""The recipe, with these changes. The first one is what the others' times are compared with."""


def write_files(part: LabelledImages, folder: Path, per_class: int, tiles: int) -> None:
    """Writes ``folder/CLASS/NUMBER.jpg``.

    Args:
        part: of a data set.
        folder: where to.
        per_class: files of each class.
        tiles: images in each row and column of a file's image.
    """
    dice = np.random.default_rng(0)
    for label in np.unique(part.labels).tolist():
        own = dice.permutation(np.flatnonzero(part.labels == label))
        (folder / f"{label:03}").mkdir(parents=True)
        for number in range(per_class):
            chosen = np.resize(np.roll(own, -number * tiles**2), tiles**2)
            images = part.__getitems__(chosen.tolist())[0].permute(0, 2, 3, 1).numpy()
            image = Image.fromarray(mosaic(images, tiles))
            image.save(folder / f"{label:03}" / f"{number:05}.jpg", quality=QUALITY)


def mosaic(images: NDArray[np.uint8], tiles: int) -> NDArray[np.uint8]:
    """One image of images ``[tiles * tiles, H, W, 3]``, row by row."""
    _, height, width, channels = images.shape
    rows = images.reshape(tiles, tiles, height, width, channels).swapaxes(1, 2)
    return rows.reshape(tiles * height, tiles * width, channels)


def recipe_of(folder: Path, side: int, arguments: argparse.Namespace) -> Recipe:
    """Four tasks on these images, with a model that is small enough for a few cores."""
    recipe = recipe_named(
        "frontier",
        data_path=str(folder),
        image_size=side,
        model="strided-cnn",
        epochs=arguments.epochs,
        num_tasks=5,
        composition="append",
        loss_weights="by-task",
    )
    recipe = replace(recipe, remembers="stream", augmentation="none", num_workers=0)
    if side <= MOST_SEEN:
        return recipe
    return replace(recipe, augmentation="resized-crop-flip", crop_size=MOST_SEEN)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="CIFAR-10 as an npz file")
    parser.add_argument("folder", help="of the files; made if it is not there", type=Path)
    parser.add_argument("--tiles", type=int, default=1, help="in each row and column of an image")
    parser.add_argument("--per-class", type=int, default=1000, help="training files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of one turn")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        data = load("cifar10", arguments.data)
        for name, part, share in (("train", data.train, 1), ("val", data.test, 5)):
            number = arguments.per_class // share
            write_files(part, arguments.folder / name, number, arguments.tiles)
    recipe = recipe_of(arguments.folder, 32 * arguments.tiles, arguments)
    recipes = {name: replace(recipe, **changes) for name, changes in VARIANTS.items()}
    seconds = seconds_in_turns(list(recipes.values()), arguments.steps)
    print(f"{len(seconds)} turns of {arguments.steps} steps each")
    for number, (name, each) in enumerate(recipes.items()):
        low, middle, high = np.quantile(seconds[:, number] / seconds[:, 0], (0.25, 0.5, 0.75))
        step = 1e3 * np.median(seconds[:, number]) / arguments.steps
        line = f"{name:<12} {step:6.1f} ms per step  {middle:.3f} ({low:.3f} to {high:.3f})"
        found = [run(replace(each, seed=seed)) for seed in arguments.seeds]
        if found:
            top1 = np.array([100 * results["average_top1"] for results in found])
            line += f"  top-1 {top1.mean():.1f} ± {top1.std(ddof=min(1, len(top1) - 1)):.1f} %"
        if found and found[0]["buffer"] is not None:
            held = found[0]["buffer"]["num_held"]
            used = found[0]["buffer"]["used_bytes"]
            line += f"  {held:,} held in {used / 1e6:.1f} MB, {used / held:,.0f} bytes for each"
        print(line)


if __name__ == "__main__":
    main()
