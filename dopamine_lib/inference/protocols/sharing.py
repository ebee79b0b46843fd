"""Fixed point in Z_2^32 and Z_2^64, and additive shares.

A real number v stands in the ring as round(v * scale) mod 2^k; the upper half of the ring is negative. A share of x
is a uniform number; two shares add up to x, and either alone says nothing about it, because for every x each value
of it is equally likely. Sums and products by public numbers need no communication: each party works on its share.
"""

import numpy as np
from numpy.typing import ArrayLike

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.randomness import fill, fresh_seed

RINGS = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def encode(values: ArrayLike, scale: float, bits: int = 32) -> np.ndarray:
    """Real numbers as ring elements round(v * scale) mod 2^bits, of the same shape.

    Raises InputError for a value that is not finite or that lies outside [-2^(bits-1), 2^(bits-1)) after scaling.

    >>> encode([1.5, -0.25], 2**8)
    array([       384, 4294967232], dtype=uint32)
    >>> decode(encode([1.5, -0.25], 2**8), 2**8)
    array([ 1.5 , -0.25])
    """
    scaled = np.rint(np.asarray(values, np.float64) * scale)
    limit = 2.0 ** (bits - 1)
    outside = ~((scaled >= -limit) & (scaled < limit))
    if outside.any():
        raise InputError(
            f"value {np.asarray(values)[outside].flat[0]} at scale {scale:g} is not within the ring's "
            f"[-2^{bits - 1}, 2^{bits - 1}): use a smaller scale"
        )
    return scaled.astype(np.int64).astype(RINGS[bits])


def signed(x: np.ndarray) -> np.ndarray:
    """Ring elements as signed integers of the same width: the upper half is negative."""
    return x.view(f"<i{x.dtype.itemsize}")


def decode(x: np.ndarray, scale: float) -> np.ndarray:
    """Ring elements as real numbers, float64."""
    return signed(x) / scale


def random_ring(shape: tuple[int, ...], bits: int = 32, seed: bytes | None = None) -> np.ndarray:
    """Uniform ring elements; from the operating system's randomness unless a 16-byte seed is given."""
    out = np.empty(shape, RINGS[bits])
    fill(out.reshape(-1), seed or fresh_seed(), 0)
    return out


def share(x: np.ndarray, seed: bytes | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Two additive shares of a ring array: x_0 uniform, x_1 = x - x_0.

    >>> x_0, x_1 = share(encode([5, -3], 1))                       # other shares every time
    >>> signed(reconstruct(x_0, x_1))
    array([ 5, -3], dtype=int32)
    """
    mask = random_ring(x.shape, 8 * x.dtype.itemsize, seed)
    return mask, x - mask


def reconstruct(share_0: np.ndarray, share_1: np.ndarray) -> np.ndarray:
    """The ring array that two shares stand for."""
    return share_0 + share_1
