"""Secret sharing (Shamir 1979): a secret in n shares, any t of which reconstruct it while t - 1 reveal nothing.

The secret is the value at 0 of a random polynomial of degree t - 1, a share is its value at the holder's point.
t points determine the polynomial. Through t - 1 points and any secret there is exactly one, so all secrets stay
equally likely, whatever the computing power. The field is the integers mod the smallest prime over 2^256: a field of
bytes would save a byte per share, but this is the textbook formula, and Python multiplies such numbers in a fraction
of a microsecond.
"""

import functools
import secrets
from collections.abc import Iterable, Mapping

from dopamine_lib.errors import InputError

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def share(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """A share of 33 bytes for each holder; ``threshold`` of them reconstruct the secret of 32 bytes.

    holders  numbers from 0, all different; holder i gets the value at i + 1, since the secret is at 0

    >>> shares = share(b"a secret of thirty-two bytes ...", holders=[0, 1, 2], threshold=2)
    >>> reconstruct({0: shares[0], 2: shares[2]}, threshold=2)
    b'a secret of thirty-two bytes ...'

    Raises InputError for a secret of another length, a repeated holder, or a threshold outside 1 … holders.
    """
    holders = list(holders)
    if len(secret) != SECRET_BYTES:
        raise InputError(f"a secret has {len(secret)} bytes, but must have {SECRET_BYTES}: hash or pad it first")
    if len(set(holders)) != len(holders) or min(holders, default=0) < 0:
        raise InputError(f"holders are {holders}, but must be different numbers from 0 on: one share each")
    if not 1 <= threshold <= len(holders):
        raise InputError(f"threshold is {threshold}, but must lie in [1, {len(holders)}]: as many as there are holders")
    polynomial = [int.from_bytes(secret)] + [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return {holder: _value(polynomial, holder + 1).to_bytes(SHARE_BYTES) for holder in holders}


def reconstruct(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of 32 bytes from at least ``threshold`` shares, by Lagrange's formula at 0.

    Shares that do not belong together give another value, which cannot be noticed here: compare it with a hash.
    Raises InputError for too few shares, for a damaged one, or where the result cannot be a secret.
    """
    if len(shares) < threshold:
        raise InputError(f"there are {len(shares)} shares, but {threshold} are needed: ask more holders")
    holders = tuple(sorted(shares))[:threshold]
    values = [int.from_bytes(shares[holder]) for holder in holders]
    if any(len(shares[holder]) != SHARE_BYTES for holder in holders) or max(values) >= PRIME:
        raise InputError(f"a share is not a number below the prime in {SHARE_BYTES} bytes: it is damaged")
    secret = sum(weight * value for weight, value in zip(_weights(holders), values, strict=True)) % PRIME
    if secret >= 256**SECRET_BYTES:
        raise InputError("shares give a number over 32 bytes: they do not belong to one secret")
    return secret.to_bytes(SECRET_BYTES)


def _value(polynomial: list[int], x: int) -> int:
    """The polynomial at x, coefficients from the constant up, by Horner's rule."""
    y = 0
    for coefficient in reversed(polynomial):
        y = (y * x + coefficient) % PRIME
    return y


@functools.lru_cache(maxsize=256)
def _weights(holders: tuple[int, ...]) -> list[int]:
    """Lagrange's weights at 0 for the points holder + 1: the product of x_j / (x_j - x_i) over the others j."""
    weights = []
    for own in holders:
        above = below = 1
        for other in holders:
            if other != own:
                above, below = above * (other + 1) % PRIME, below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights
