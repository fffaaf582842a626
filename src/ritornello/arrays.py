"""Names for the kinds of NumPy array that policies and plans are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

Arrays = Mapping[str, NDArray[Any]]
"""By their names."""
