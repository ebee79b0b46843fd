"""Memory laid out by hand: named arrays in one buffer, and scratch arrays that are used again and again.

A fresh array of several megabytes costs more in page faults than in arithmetic, so everything large lives in
buffers made once.
"""

import math
from types import SimpleNamespace

import numpy as np


class Layout:
    """Named arrays one behind the other in one buffer, each beginning at a multiple of 8 bytes.

    fields  name=(dtype, shape); integers are little-endian, as they travel
    """

    def __init__(self, **fields):
        self.fields = {
            name: (np.dtype(dtype).newbyteorder("<"), tuple(shape)) for name, (dtype, shape) in fields.items()
        }
        self.nbytes = sum(_rounded(dtype.itemsize * math.prod(shape)) for dtype, shape in self.fields.values())

    def views(self, buffer) -> SimpleNamespace:
        """The arrays, by name, as views of a buffer (nbytes,)."""
        views, at = SimpleNamespace(), 0
        for name, (dtype, shape) in self.fields.items():
            size = dtype.itemsize * math.prod(shape)
            setattr(views, name, np.frombuffer(buffer, dtype, math.prod(shape), at).reshape(shape))
            at += _rounded(size)
        return views


class Workspace:
    """Scratch arrays by name: asking again for a name gives the same memory, whatever it held."""

    def __init__(self):
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, shape, dtype=np.uint32) -> np.ndarray:
        """An array of this shape with undefined content, valid until the name is asked for again."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size].view(dtype).reshape(shape)


def _rounded(size: int) -> int:
    return -(-size // 8) * 8
