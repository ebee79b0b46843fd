"""The inner loops of the protocols, in NumPy; ``compiled`` has the same functions compiled by numba.

All arithmetic is modulo 2^32, so there is one right answer, and both modules give it bit for bit. ``active()`` is the
compiled one where numba is installed and otherwise, with a warning, this one; ``DOPAMINE_KERNELS=numpy`` asks for this
one.
"""

import logging
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np

#: Arrays of uint32, and of uint8 that are 0 or 1.
Words = Bits = np.ndarray
#: Columns of a product, and elements of an array, worked on at once.
_COLUMNS, _BLOCK = 4096, 2**14


@cache
def active() -> ModuleType:
    """The module in use, with the functions below. The first call may compile for ten seconds."""
    if os.environ.get("DOPAMINE_KERNELS") != "numpy":
        try:
            from dopamine_lib.inference.protocols import compiled

            return compiled
        except ImportError:
            logging.getLogger(__name__).warning(
                "numba cannot be imported: private inference computes in NumPy, several times slower; pip install numba"
            )
    from dopamine_lib.inference.protocols import kernels

    return kernels


def multiply(w: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out = w x mod 2^32 for w (m, k), x (k, n).

    In halves of 16 bits and float64, which BLAS multiplies fast: a sum of up to 2^21 products below 2^32 is exact.
    The product of the upper halves vanishes modulo 2^32.
    """
    w_low, w_high = (w & 0xFFFF).astype(np.float64), (w >> 16).astype(np.float64)
    for start in range(0, x.shape[1], _COLUMNS):
        part = x[:, start : start + _COLUMNS]
        low, high = (part & 0xFFFF).astype(np.float64), (part >> 16).astype(np.float64)
        middle = (w_low @ high + w_high @ low).astype(np.uint64)
        out[:, start : start + _COLUMNS] = (w_low @ low).astype(np.uint64) + (middle << np.uint64(16))


def _blocks(count: int) -> Iterator[slice]:
    """Slices of a size whose temporaries stay in the cache; each but the last a multiple of 8."""
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _pick(bits: np.ndarray, if_set, if_clear) -> np.ndarray:
    """``np.where`` for bits of 0 and 1, without a branch for every element."""
    return if_clear ^ ((if_set ^ if_clear) & -bits.astype(np.uint32))


def look_up(m: np.ndarray, thermometer: np.ndarray, planes: np.ndarray) -> None:
    """Shares of l0 e1 l1 e2 l2 e3 l3 as packed bits in ``planes`` (8, n / 8), for opened m (n,).

    thermometer  uint16 (4, n): this party's shares of [j <= v] in bit j, for each nibble v of the mask
    """
    for part in _blocks(len(m)):
        packed = slice(part.start // 8, part.stop // 8)
        for k in range(4):
            nibble = ((m[part] >> (15 + 4 * k)) & 15).astype(np.uint16)
            word = thermometer[k, part] >> nibble
            less = word & 2
            if k:
                planes[2 * k - 1, packed] = np.packbits((word ^ less >> 1) & 1 == 1, bitorder="little")
            planes[2 * k, packed] = np.packbits(less == 2, bitorder="little")


def look_up_end(number: int, m: Words, thermometer: np.ndarray, rho: Words, planes: Bits, rest: Bits) -> None:
    """Steps a and b of ``comparison`` for opened m (n,), as packed bits: this party's shares of e3 and l2 of m'.

    thermometer  of the two upper nibbles (2, n)
    planes       uint8 (2, n / 8); rest (n / 8,): its share of msb(m') ^ rho ^ l3
    """
    for part in _blocks(len(m)):
        packed, moved = slice(part.start // 8, part.stop // 8), m[part] + np.uint32(2**30)
        next_word, word = (thermometer[k, part] >> (moved >> (23 + 4 * k) & 15).astype(np.uint16) for k in (0, 1))
        last = word >> 1 ^ rho[part].astype(np.uint16) ^ (moved >> 31).astype(np.uint16) * np.uint16(1 - number)
        for out, bits in ((planes[0], word ^ word >> 1), (planes[1], next_word >> 1), (rest, last)):
            out[packed] = np.packbits(bits & 1 == 1, bitorder="little")


def finish_relu(
    number: int, m: Words, beta: Bits, rho: Words, extra: Words, tops: np.ndarray, shift: int, out: Words
) -> None:
    """Step 5 of ``relu``: out (n,) = ((m >> shift) + s) [beta ^ rho].

    extra, tops  shares (2, n) of rho s[1] and s[1], and of rho msb(r) and msb(r)
    """
    for part in _blocks(len(m)):
        clear = (m[part] >> 31) - np.uint32(1)  # all bits where msb(m) is 0
        product, s = (
            e[part] + (t[part].astype(np.uint32) << (31 - shift) << 1 & clear) for e, t in zip(extra, tops, strict=True)
        )
        out[part] = (m[part] >> shift) * _selected(number, beta[part], rho[part])
        out[part] += _pick(beta[part], s - product, product)


def pack_masked(x: Words, rest: np.uint32, r: Words, lower: np.ndarray, upper: np.ndarray) -> None:
    """The upper 20 bits of x + rest, plus those of r (n,): 16 in ``lower`` uint16 (n,), four in ``upper`` (n / 2,).

    x (count,) may be shorter than r, and is 0 from there on. Element i has the lower half of byte i of ``upper``,
    element n / 2 + i the upper one.
    """
    kept, half = r >> 12, len(upper)
    kept[: len(x)] += x + rest >> 12
    lower[:] = kept & 0xFFFF
    upper[:] = kept[:half] >> 16 & 15 | (kept[half:] >> 16 & 15) << 4


def open_upper(lower_0: np.ndarray, upper_0: Bits, lower_1: np.ndarray, upper_1: Bits, m: Words) -> None:
    """The sum m (n,) of what both parties packed, with 12 lower bits of zero."""
    half = len(upper_0)
    for part, by in ((slice(half), 0), (slice(half, None), 4)):
        sums = (upper_0 >> by & 15).astype(np.uint32) + (upper_1 >> by & 15)
        m[part] = (lower_0[part].astype(np.uint32) + lower_1[part] + (sums << 16)) << 12


def finish_maximum(
    number: int, b: Words, m: Words, beta: Bits, r: Words, rho: Words, rho_r: Words, coarse: int, out: Words
) -> None:
    """Step 4 of ``pooling``: out (count,) = b + m [beta ^ rho] - beta r - (1 - 2 beta) rho_r."""
    for part in _blocks(len(b)):
        out[part] = b[part] + m[part] * _selected(number, beta[part], rho[part])
        out[part] -= _pick(beta[part], (r[part] >> coarse << coarse) - rho_r[part], rho_r[part])


def _selected(number, chosen, rho) -> np.ndarray:
    """This party's share of beta ^ rho: rho, or one minus rho where beta is set; the patient holds the one."""
    return _pick(chosen, np.uint32(1 - number) - rho, rho)


def deal_comparison(
    r_0: Words, r_1: Words, sigma: Bits, thermometer_0: np.ndarray, rho_0: Words,
    r: Words, rho: Bits, thermometer: np.ndarray, rho_1: Words, coarse: int,
) -> None:  # fmt: skip
    """The mask r = r_0 + r_1, both without their ``coarse`` lowest bits, the bits rho = sigma ^ msb(r), and the
    provider's corrections of thermometers and rho.
    """
    for part in _blocks(len(r)):
        r[part] = (r_0[part] >> coarse) + (r_1[part] >> coarse) << coarse
        rho[part] = sigma[part] ^ (r[part] >> 31)
        rho_1[part] = rho[part].astype(np.uint32) - rho_0[part]
        for k in range(4):
            nibble = ((r[part] >> (15 + 4 * k)) & 15).astype(np.uint16)
            thermometer[k, part] = thermometer_0[k, part] ^ (np.uint16(2**16 - 1) >> (np.uint16(15) - nibble))


def deal_relu(
    r: Words, rho: Bits, shift: int, extra_0: Words, tops_0: np.ndarray, extra: Words, tops: np.ndarray
) -> None:
    """extra (2, n) = rho s[1] and s[1], with s as in step 5 of ``relu``, less extra_0; tops so of msb(r)."""
    for part in _blocks(len(r)):
        s, top = -(r[part] >> shift), (r[part] >> 31).astype(tops.dtype)
        for i, (word, bit) in enumerate(((s * rho[part], top * rho[part]), (s, top))):
            extra[i, part], tops[i, part] = word - extra_0[i, part], bit - tops_0[i, part]


def deal_maximum(r: Words, rho: Bits, rho_r_0: Words, rho_r: Words) -> None:
    """rho_r = rho r - rho_r_0."""
    for part in _blocks(len(r)):
        rho_r[part] = (r[part] & -rho[part].astype(np.uint32)) - rho_r_0[part]
