"""Image files: pixels of what is in them, and data sets that keep the files beside the pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ritornello.experiments.data.data_set import DataSet, LabelledBatch, LabelledImages

MOST_LOOKED_AT = 2_000
"""Files whose sizes are asked for, to know how large they are."""


class Decoder:
    """What makes pixels of an image file.

    Args:
        image_size: images are resized to it (their shorter side) and cropped at the centre.
        num_channels: 3, or 1: shades of grey.

    Raises:
        ValueError: ``image_size`` is below 1.
    """

    def __init__(self, image_size: int, num_channels: int = 3) -> None:
        from torchvision.transforms import v2

        if image_size < 1:
            raise ValueError(f"image_size={image_size}: it must be at least 1")
        grey = [v2.Grayscale()] if num_channels == 1 else []
        self._transform = v2.Compose(
            [v2.Resize(image_size), v2.CenterCrop(image_size), *grey, v2.PILToTensor()]
        )

    def __call__(self, content: Any) -> Tensor:
        """The pixels, uint8 ``[C, H, W]``.

        Args:
            content: what is in the file: bytes, or an array of them.
        """
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            pixels: Tensor = self._transform(image.convert("RGB"))
        return pixels

    def file(self, path: str) -> tuple[Tensor, bytes]:
        """The pixels of a file, and what is in it.

        Raises:
            ValueError: it is not an image, or is broken; names it.
        """
        try:
            content = Path(path).read_bytes()
            return self(content), content
        except Exception as error:  # what Pillow raises depends on where a file is broken
            raise ValueError(f"data: {path} cannot be read as an image: {error}") from error


class KeptFiles(LabelledImages):
    """Image files whose content comes beside their pixels, for those who store it instead.

    Args:
        images: decoded from files.
        decoder: makes pixels of these.

    Raises:
        ValueError: the images have no files.
    """

    def __init__(self, images: LabelledImages, decoder: Decoder) -> None:
        images.file_of(0)
        self._images, self._decoder, self.labels = images, decoder, images.labels

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """See ``LabelledImages``. With what is in the files, a list of bytes.

        Raises:
            ValueError: a file is not an image, or is broken; names the file.
        """
        found = [self._decoder.file(self._images.file_of(index)) for index in indices]
        images = torch.stack([image for image, _ in found])
        labels = torch.from_numpy(self.labels[np.asarray(indices)])
        return images, labels, [content for _, content in found]

    def file_of(self, index: int) -> str:
        """See ``LabelledImages``."""
        return self._images.file_of(index)

    def some_sizes(self) -> NDArray[np.int64]:
        """How large some of the files are, in bytes; int64 ``[n]``."""
        looked_at = np.linspace(0, len(self) - 1, min(len(self), MOST_LOOKED_AT)).astype(int)
        sizes = [os.path.getsize(self.file_of(index)) for index in looked_at.tolist()]
        return np.array(sizes, dtype=np.int64)


class Decoding:
    """Pixels of stored files, made by some threads: decoders give the interpreter away.

    Args:
        decoder: of one file.
        num_threads: how many files at a time.
        device: where the pixels, and what is stored with them, go.
    """

    def __init__(self, decoder: Decoder, num_threads: int, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self._threads = ThreadPoolExecutor(num_threads, "ritornello-decode")

    def __call__(self, stored: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Images, labels and what else there is, of files, labels and what else there is."""
        files, *others = stored
        contents = [content.numpy() for content in files]
        images = torch.stack(list(self._threads.map(self._decoder, contents)))
        return tuple(leaf.to(self._device) for leaf in (images, *others))


def with_files(data: DataSet) -> DataSet:
    """The data set, whose training samples come with their files.

    Raises:
        ValueError: they have none.
    """
    channels, height, _ = data.image_shape
    return replace(data, train=KeptFiles(data.train, Decoder(height, channels)))
