"""The same normal noise where a model trains on a GPU: bits from the processor, the arithmetic on the device.

The words come from the processor's cryptographic generator, like all noise, and are the only thing that is copied.
float64 on a GPU is IEEE's, and CUDA documents its logarithm, cosine and sine to within 2 units in the last place
(Programming Guide, "Mathematical Functions"), where ``normal.ERROR`` has room for 4. Which real number a value stands
for is decided by its bits, so the rounded messages are the processor's, integer for integer.
"""

import numpy as np
import torch

from dopamine_lib.privacy.normal import WORD, Normals
from dopamine_lib.privacy.randomness import Stream, unit

#: Of 53 bits: below the first or from the second on, ``normal.RADII`` asks for more.
FEW, MANY = 1 << (WORD - 38), (1 << WORD) - (1 << (WORD - 21))


class DeviceNormals(Normals):
    """``Normals`` whose ``values`` are a float64 Tensor on a device, computed there when they are first asked for.

    What belongs to the processor, drawing the words and looking for those that need more bits, is done at once and may
    be done in another thread, ahead of use. A pinned block is copied while the device computes.
    """

    def __init__(self, stream: Stream, n: int, std: float, device: torch.device):
        self.std, self._stream, self._half = std, stream, (n + 1) // 2
        self._words, self._bits = stream.words(2 * self._half, pinned=device.type == "cuda"), {}
        self._device, self._values = device, None
        u = self._words[: self._half].numpy() & ((1 << WORD) - 1)
        pairs = np.flatnonzero((u < FEW) | (u >= MANY))
        self._far = [index for pair in pairs.tolist() for index in (pair, self._half + pair)]
        self._exact = [float(sum(self._interval(index, 0.0)) / 2) for index in self._far]

    @property
    def values(self) -> torch.Tensor:
        """float64 (n,), or (n + 1,) for an odd n, on the device."""
        if self._values is None:
            words = self._words.to(self._device, non_blocking=True)
            radius = unit(words[: self._half]).neg_().log1p_().mul_(-2.0).sqrt_().mul_(self.std)
            angle = unit(words[self._half :]).mul_(2 * torch.pi)
            self._values = torch.cat([radius * angle.cos(), radius * angle.sin()])
            for index, value in zip(self._far, self._exact, strict=True):
                self._values[index] = value
        return self._values
