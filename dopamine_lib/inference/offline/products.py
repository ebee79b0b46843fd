"""Shares of A * W for a convolution: the patient knows A, the provider W. By chapter 3's BFV with t = 2^32.

    1. The patient lays the channels of A one behind the other into the coefficients of polynomials and sends their
       encryptions under its own key.
    2. The provider multiplies each by polynomials of its weights, laid so that whole outputs of the convolution appear
       among the product's coefficients (Huang et al., Cheetah, 2022), and adds up over the input's channels.
    3. It adds an encryption of zero, noise uniform on 2^FLOOD values, and -r for a random polynomial r, and sends that.
    4. The patient decrypts: its share is A * W - r, the provider's is r.
Exact modulo 2^32: a polynomial's coefficients are numbers modulo t.

Why this hides A: the provider sees ciphertexts only, and a public key. It is as hard as ring-LWE: 128 bits by the
standard's table (``STANDARD``).
Why this hides W: the message A * W - r is uniform in every coefficient. The second component of a ciphertext is masked
by the encryption of zero (ring-LWE again, for the patient does not know its randomness). The noise left over depends on
W, and is drowned: with at most ``MOST_TERMS`` weights in a coefficient it stays below 2^85. Two models differ by
less than 2^86 then, which moves a uniform choice among 2^FLOOD by 2^-64 in total variation, and 2^13 replies of 2^13
coefficients each by 2^-38.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from dopamine_lib.encryption.bfv import Bfv, Parameters
from dopamine_lib.encryption.ring import ntt_primes
from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import Channel
from dopamine_lib.inference.protocols.convolution import Branch, ConvolutionOperation
from dopamine_lib.inference.protocols.sharing import random_ring, signed

N, LIMBS = 8192, 6
#: Bits of the noise that drowns the noise of a product, and of one of its digits.
FLOOD, DIGIT = 150, 30
#: The most weights that one coefficient of a sum of products is made of.
MOST_TERMS = 2**22
#: What it costs, in transforms, to encrypt a polynomial, and to blind and decrypt one.
_IN, _OUT = 5, 7


@cache
def parameters() -> Parameters:
    """n = 8192, t = 2^32, and a q of 186 bits."""
    return Parameters(N, 2**32, ntt_primes(N, 31, LIMBS))


def scheme(seed: int | None = None) -> Bfv:
    """Chapter 3's scheme with these parameters; its transforms are compiled where ``kernels`` are."""
    bfv = Bfv(parameters(), seed)
    if kernels.active() is not kernels:
        from dopamine_lib.inference.offline.compiled_ring import CompiledRing

        bfv.ring = CompiledRing(N, parameters().primes)
    return bfv


class Packing(NamedTuple):
    """How one group of a branch's channels lies in polynomials.

    inputs, outputs   channels of the group, before and behind
    width, rows       of a tile: a strip of the padded input, as high as fits
    channels, made    input channels in a polynomial, and output channels in a product
    tiles, step       number of strips, and rows from one to the next
    high, wide        rows of outputs from a tile, and columns
    """

    inputs: int
    outputs: int
    width: int
    rows: int
    channels: int
    made: int
    tiles: int
    step: int
    high: int
    wide: int

    @property
    def area(self) -> int:
        """Coefficients between one channel and the next."""
        return self.rows * self.width

    @property
    def polynomials(self) -> tuple[int, int]:
        """Of a tile's input, and of its output."""
        return -(-self.inputs // self.channels), -(-self.outputs // self.made)


def pack(branch: Branch, shape: tuple[int, int, int]) -> Packing:
    """The packing with the least work for an input (C, H, W). Raises InputError for an image too wide.

    >>> packing = pack(Branch(64, (3, 3), (1, 1), (1, 1)), (16, 15, 15))
    >>> packing.area, packing.channels, packing.made, packing.polynomials
    (289, 2, 14, (8, 5))
    """
    (kernel_rows, kernel_columns), (down, right) = branch.kernel, branch.stride
    height, width = (n + 2 * p for n, p in zip(shape[1:], branch.padding, strict=True))
    rows = min(height, N // width)
    if rows < kernel_rows:
        raise InputError(
            f"an image of {width} columns with its padding leaves no room for {kernel_rows} rows in {N} coefficients: "
            "use a smaller size, or a crypto-provider"
        )
    high, wide = (rows - kernel_rows) // down + 1, (width - kernel_columns) // right + 1
    tiles = -(-((height - kernel_rows) // down + 1) // high)
    inputs, outputs = shape[0] // branch.groups, branch.channels // branch.groups
    most = max(1, MOST_TERMS // (inputs * kernel_rows * kernel_columns))

    def packing(channels: int) -> Packing:
        made = min(outputs, N // (channels * rows * width), most)
        return Packing(inputs, outputs, width, rows, channels, made, tiles, high * down, high, wide)

    def cost(one: Packing) -> int:
        read, written = one.polynomials
        return tiles * (_IN * read + _OUT * written) + read * written

    return min(map(packing, range(1, min(inputs, N // (rows * width)) + 1)), key=cost)


def lay_inputs(x: np.ndarray, packing: Packing) -> Iterator[np.ndarray]:
    """For each tile the polynomials (polynomials, N) of a padded input (C, H, W), signed."""
    for tile in range(packing.tiles):
        strip = signed(x[:, tile * packing.step : tile * packing.step + packing.rows])
        laid = np.zeros((packing.polynomials[0] * packing.channels, packing.area), np.int64)
        laid[: len(x), : strip[0].size] = strip.reshape(len(x), -1)
        laid = laid.reshape(packing.polynomials[0], -1)
        yield np.pad(laid, ((0, 0), (0, N - laid.shape[1])))


def lay_weights(matrix: np.ndarray, branch: Branch, packing: Packing, number: int) -> np.ndarray:
    """The polynomials (polynomials, N) that make product ``number``, from a matrix (outputs, inputs * kernel).

    Weight (o, c, k, l) lies ``channels`` areas behind the last output's, and as far before the end of one as it reads
    behind its beginning; so all products with what it reads meet in one coefficient (``positions``).
    """
    weights = signed(matrix).reshape(len(matrix), packing.inputs, *branch.kernel)
    weights = weights[number * packing.made : (number + 1) * packing.made]
    kernel = np.add.outer(np.arange(branch.kernel[0]) * packing.width, np.arange(branch.kernel[1]))
    laid = np.zeros((packing.polynomials[0], N), np.int64)
    for channel in range(packing.inputs):
        block, place = divmod(channel, packing.channels)
        for o, of_output in enumerate(weights):
            at = _end(branch, packing) + (o * packing.channels - place) * packing.area
            laid[block, at - kernel] = of_output[channel]
    return laid


def positions(branch: Branch, packing: Packing) -> np.ndarray:
    """Where in a product the outputs (made, high, wide) of a tile stand."""
    rows = np.arange(packing.high) * branch.stride[0] * packing.width
    columns = np.arange(packing.wide) * branch.stride[1]
    first = _end(branch, packing) + np.arange(packing.made) * packing.channels * packing.area
    return np.add.outer(first, np.add.outer(rows, columns))


def _end(branch: Branch, packing: Packing) -> int:
    """Where the first weight of the first output lies: as far on as the last one reads."""
    kernel_rows, kernel_columns = branch.kernel
    return (packing.channels - 1) * packing.area + (kernel_rows - 1) * packing.width + kernel_columns - 1


def _groups(operation: ConvolutionOperation) -> Iterator[tuple[int, Branch, int, slice, slice, Packing]]:
    """Number of the branch, branch, number of the group, its channels before and behind, and their packing."""
    begin = 0
    for b, branch in enumerate(operation.layer.branches):
        packing = pack(branch, operation.input_shape)
        for g in range(branch.groups):
            out = slice(begin + g * packing.outputs, begin + (g + 1) * packing.outputs)
            yield b, branch, g, slice(g * packing.inputs, (g + 1) * packing.inputs), out, packing
        begin += branch.channels


def _padded(x: np.ndarray, branch: Branch) -> np.ndarray:
    return np.pad(x, ((0, 0), *((p, p) for p in branch.padding)))


def _take(products: np.ndarray, branch: Branch, packing: Packing, out: np.ndarray, number: int, tile: int) -> None:
    """Put a product's outputs (made, high, wide) from coefficients (N,) where they belong in a group's (C, H, W)."""
    rows = slice(tile * packing.high, (tile + 1) * packing.high)
    part = out[number * packing.made : (number + 1) * packing.made, rows]
    found = products[positions(branch, packing)].astype(np.uint32)
    part[:] = found[: part.shape[0], : part.shape[1]]


class PatientProducts:
    """The patient's side, for one session: makes the key and sends its public part."""

    def __init__(self, channel: Channel, tag: int, seed: int | None = None):
        self._channel, self._tag, self._scheme = channel, tag, scheme(seed)
        self._secret = self._scheme.secret_key()
        self._public = self._scheme.public_key(self._secret)
        channel.send(tag, np.stack(self._public).astype("<u4"))

    def multiply(self, operation: ConvolutionOperation, a: np.ndarray, out: np.ndarray) -> None:
        """The patient's share of A * W into ``out``, of the layer's shape, for A (C, H, W)."""
        for _, branch, _, before, behind, packing in _groups(operation):
            for tile, laid in enumerate(lay_inputs(_padded(a[before], branch), packing)):
                for polynomial in laid:
                    encrypted = self._scheme.encrypt(self._public, polynomial)
                    self._channel.send(self._tag, np.stack(encrypted).astype("<u4"))
                for number in range(packing.polynomials[1]):
                    reply = _receive(self._channel, self._tag)
                    message = self._scheme.decrypt(self._secret, tuple(reply))
                    _take(message, branch, packing, out[behind], number, tile)


class ProviderProducts:
    """The provider's side, for one session: has the patient's public key."""

    def __init__(self, channel: Channel, tag: int, seed: int | None = None):
        self._channel, self._tag, self._scheme = channel, tag, scheme(seed)
        self._ring, self._p = self._scheme.ring, np.array(parameters().primes)[:, None]
        self._public = self._ring.transform(_receive(channel, tag))

    def multiply(self, operation: ConvolutionOperation, weights: list[np.ndarray], out: np.ndarray) -> None:
        """The provider's share of A * W into ``out``, of the layer's shape, for the branches' matrices."""
        for b, branch, g, _, behind, packing in _groups(operation):
            matrix = weights[b].reshape(branch.groups, packing.outputs, -1)[g]
            for tile in range(packing.tiles):
                a = [self._ring.transform(_receive(self._channel, self._tag)) for _ in range(packing.polynomials[0])]
                for number in range(packing.polynomials[1]):
                    laid = self._ring.reduce(lay_weights(matrix, branch, packing, number))
                    total = self._masked_zero()
                    for encrypted, w in zip(a, self._ring.transform(laid), strict=True):
                        total = self._ring.add(total, encrypted * w % self._p)
                    r = signed(random_ring((N,))).astype(np.int64)
                    reply = self._finish(self._ring.inverse(total), r)
                    self._channel.send(self._tag, reply.astype("<u4"))
                    _take(r, branch, packing, out[behind], number, tile)

    def _masked_zero(self) -> np.ndarray:
        """(p0 u, p1 u) of Eq. 5, transformed: the encryption of zero but for its errors."""
        u = self._ring.transform(self._ring.reduce(self._scheme.source.ternary((N,))))
        return self._public * u % self._p

    def _finish(self, ciphertext: np.ndarray, r: np.ndarray) -> np.ndarray:
        """A ciphertext (2, L, N) with the errors of step 3, the noise that drowns the rest, and r (N,) subtracted."""
        ring, errors = self._ring, self._scheme.source.error((2, N))
        minus_r = ring.scale(ring.reduce(-r), parameters().delta)
        ciphertext = ring.add(ciphertext, ring.reduce(errors))
        ciphertext[0] = ring.add(ring.add(ciphertext[0], minus_r), flood(self._scheme))
        return ciphertext


def flood(bfv: Bfv) -> np.ndarray:
    """Fresh noise (L, N), each coefficient uniform on 0 … 2^FLOOD - 1."""
    ring, noise = bfv.ring, np.int64(0)
    for digit in bfv.source.uniform(2**DIGIT, (FLOOD // DIGIT, N)):
        noise = ring.add(ring.scale(noise, 2**DIGIT), ring.reduce(digit))
    return noise


def _receive(channel: Channel, tag: int) -> np.ndarray:
    """Two polynomials (2, L, N), residues below their primes whatever was sent."""
    received = np.empty((2, LIMBS, N), "<u4")
    channel.receive(tag, received)
    return received % np.array(parameters().primes)[:, None]
