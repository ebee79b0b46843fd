"""The textbook BFV scheme: section 3.2's SecretKeyGen, PublicKeyGen (Eq. 4), Encrypt (Eq. 5) and Decrypt (Eq. 6).

For reading: every step is a line of ring arithmetic. It runs at real sizes, but its timing depends on secrets and
nothing authenticates a ciphertext, so training across hospitals encrypts with TenSEAL (``group.Group.encrypt``).
The plaintext modulus is t here; section 3.2 calls it b.
"""

import functools
import itertools
import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from dopamine_lib.encryption.encoding import check_whole
from dopamine_lib.encryption.ring import Ring, centred, ntt_primes
from dopamine_lib.encryption.sampling import ERROR_BITS, ERROR_STD, Source
from dopamine_lib.errors import InputError, check_within

#: The homomorphic-encryption standard's table for a ternary secret (Albrecht et al. 2018, classical attacks): by n,
#: the largest bit length of q for 128, 192 and 256 bits of security, against the attacks known then.
STANDARD = {
    1024: (27, 19, 14),
    2048: (54, 37, 29),
    4096: (109, 75, 58),
    8192: (218, 152, 118),
    16384: (438, 305, 237),
    32768: (881, 611, 476),
}

#: A ciphertext: (c0, c1), each (..., L, n) as in ``Ring``; a product of two has a third component.
Ciphertext = tuple[np.ndarray, ...]
MAX_COMPONENTS = 16


@dataclass(frozen=True)
class Parameters:
    """The public parameters: the ring's degree n, the plaintext modulus t, and the primes whose product is q.

    Raises InputError for a ring that ``Ring`` refuses, or t outside [2, q/2].
    """

    n: int
    t: int
    primes: tuple[int, ...]

    def __post_init__(self):
        if not (isinstance(self.t, int) and 2 <= self.t <= self.q // 2):
            raise InputError(
                f"t is {self.t}, but must be a whole number in [2, {self.q // 2}], up to half of q: add primes"
            )

    @functools.cached_property
    def ring(self) -> Ring:
        """R_q."""
        return Ring(self.n, self.primes)

    @property
    def q(self) -> int:
        """The coefficient modulus."""
        return self.ring.q

    @property
    def delta(self) -> int:
        """Delta = floor(q / t): how far apart two messages lie in R_q."""
        return self.q // self.t

    @property
    def security(self) -> int:
        """128, 192 or 256 bits by the standard's table; 0 where the table promises none, as for every toy ring."""
        levels = zip((128, 192, 256), STANDARD.get(self.n, ()), strict=False)
        return max((level for level, longest in levels if self.q.bit_length() <= longest), default=0)


def paper_parameters() -> Parameters:
    """Section 3.2's n = 4096 and t = 40961, and a q of 109 bits, the longest that ``STANDARD`` allows for 128 bits."""
    return Parameters(4096, 40961, ntt_primes(4096, 28) + ntt_primes(4096, 27, 3))


@dataclass(frozen=True)
class SecretKey:
    """The ternary polynomial s, as residues (L, n); ``repr`` does not show it."""

    s: np.ndarray = field(repr=False)


class Bfv:
    """The scheme for one set of parameters. A message is a polynomial: integers (..., n) of magnitude up to t/2.

    seed  None for randomness from the operating system; a number for keys and ciphertexts that repeat and are open
          to anyone who knows the number: for teaching only

    >>> scheme = Bfv(Parameters(n=8, t=97, primes=ntt_primes(8, 30)))
    >>> secret = scheme.secret_key()
    >>> public = scheme.public_key(secret)
    >>> one, two = (scheme.encrypt(public, np.full(8, m)) for m in (1, 2))
    >>> scheme.decrypt(secret, scheme.add(one, two)).tolist()
    [3, 3, 3, 3, 3, 3, 3, 3]
    """

    def __init__(self, parameters: Parameters, seed: int | None = None):
        self.parameters, self.ring = parameters, parameters.ring
        self.source = Source(seed)

    def secret_key(self) -> SecretKey:
        """SecretKeyGen: s from chi, here uniform on {-1, 0, 1}."""
        return SecretKey(self.ring.reduce(self.source.ternary((self.parameters.n,))))

    def public_key(self, secret: SecretKey) -> tuple[np.ndarray, np.ndarray]:
        """PublicKeyGen, Eq. 4: ([-(a s + e)]_q, a), a ring-LWE sample."""
        ring, n = self.ring, self.parameters.n
        a = np.stack([self.source.uniform(p, (n,)) for p in ring.primes])
        e = ring.reduce(self.source.error((n,)))
        return ring.negate(ring.add(ring.multiply(a, secret.s), e)), a

    def encrypt(self, public: tuple[np.ndarray, np.ndarray], m: ArrayLike) -> Ciphertext:
        """Encrypt, Eq. 5: ([p0 u + e1 + Delta m]_q, [p1 u + e2]_q), with fresh u, e1, e2 for every message.

        Raises InputError unless m is (..., n), of integers within t/2.
        """
        ring, m = self.ring, self._message(m)
        u = ring.reduce(self.source.ternary(m.shape))
        e1, e2 = ring.reduce(self.source.error(m.shape)), ring.reduce(self.source.error(m.shape))
        lifted = ring.scale(ring.reduce(m), self.parameters.delta)
        p0, p1 = public
        return ring.add(ring.add(ring.multiply(p0, u), e1), lifted), ring.add(ring.multiply(p1, u), e2)

    def decrypt(self, secret: SecretKey, ciphertext: Ciphertext) -> np.ndarray:
        """Decrypt, Eq. 6: round(t [c0 + c1 s]_q / q) modulo t, int64 (..., n) in (-t/2, t/2].

        It never fails: too much noise, a wrong key or a damaged ciphertext gives a wrong message.
        """
        t, q = self.parameters.t, self.parameters.q
        rounded = (2 * t * self.phase(secret, ciphertext) + q) // (2 * q)
        return centred(rounded, t).astype(np.int64)

    def phase(self, secret: SecretKey, ciphertext: Ciphertext) -> np.ndarray:
        """[c0 + c1 s + c2 s^2 ...]_q as Python's integers (..., n), the inside of Eq. 6: Delta m plus noise."""
        self._check(ciphertext)
        total = ciphertext[-1]
        for component in reversed(ciphertext[:-1]):
            total = self.ring.add(self.ring.multiply(total, secret.s), component)
        return self.ring.lift(total)

    def add(self, one: Ciphertext, other: Ciphertext) -> Ciphertext:
        """A ciphertext of the sum; its noise is the sum of the noises."""
        self._check(one, other)
        return tuple(self.ring.add(a, b) for a, b in itertools.zip_longest(one, other, fillvalue=np.int64(0)))

    def total(self, ciphertexts: Ciphertext) -> Ciphertext:
        """The sum of k ciphertexts made by one ``encrypt``: components (k, L, n) become (L, n)."""
        self._check(ciphertexts)
        if any(component.ndim != 3 for component in ciphertexts):
            raise InputError(
                "total takes k ciphertexts made by one encrypt, components (k, L, n): add single ones with add"
            )
        return tuple(self.ring.add(component.sum(axis=0), np.int64(0)) for component in ciphertexts)

    def multiply_plain(self, ciphertext: Ciphertext, m: ArrayLike) -> Ciphertext:
        """A ciphertext of the product with a public polynomial m, which multiplies the noise as well."""
        self._check(ciphertext)
        factor = self.ring.reduce(self._message(m))
        return tuple(self.ring.multiply(component, factor) for component in ciphertext)

    def multiply(self, one: Ciphertext, other: Ciphertext) -> Ciphertext:
        """A ciphertext of the product, with len(one) + len(other) - 1 components (Fan and Vercauteren 2012, section 4).

        The product of the two polynomials in s, computed over the integers, then scaled by t/q and rounded.
        Relinearisation, which brings it back to two components with another public key, is left out.
        """
        self._check(one, other)
        wide, t, q = self._wide, self.parameters.t, self.parameters.q
        one, other = ([wide.reduce(self.ring.lift(c)) for c in ciphertext] for ciphertext in (one, other))
        product = [0] * (len(one) + len(other) - 1)
        for (i, a), (j, b) in itertools.product(enumerate(one), enumerate(other)):
            product[i + j] = wide.add(product[i + j], wide.multiply(a, b))
        return tuple(self.ring.reduce((2 * t * wide.lift(c) + q) // (2 * q)) for c in product)

    @functools.cached_property
    def _wide(self) -> Ring:
        """A ring with so large a modulus that no product of ciphertexts wraps: multiplication over the integers."""
        largest = MAX_COMPONENTS * self.parameters.n * self.parameters.q**2
        return Ring(self.parameters.n, ntt_primes(self.parameters.n, 31, largest.bit_length() // 30 + 1))

    def noise(self, secret: SecretKey, ciphertext: Ciphertext) -> np.ndarray:
        """[t (c0 + c1 s)]_q, as Python's integers (..., n): what remains of the phase without the message.

        Decryption is right as long as every coefficient of the *true* noise stays within q/2. Beyond that, message
        and noise cannot be told apart, and this function gives the noise modulo q.
        """
        return centred(self.parameters.t * self.phase(secret, ciphertext), self.parameters.q)

    def noise_budget(self, secret: SecretKey, ciphertext: Ciphertext) -> float:
        """Bits by which the noise may still grow, log2(q / (2 max|noise|)); near 0, decryption has failed."""
        largest = max(int(np.abs(self.noise(secret, ciphertext)).max()), 1)
        return math.log2(self.parameters.q) - 1 - math.log2(largest)

    def _message(self, m: ArrayLike) -> np.ndarray:
        m = check_whole(m, self.parameters.t // 2, "coefficient")
        if m.shape[-1] != self.parameters.n:
            raise InputError(
                f"a message has {m.shape[-1]} coefficients, but must have n = {self.parameters.n}: pad with zeros"
            )
        return m

    def _check(self, *ciphertexts: Ciphertext) -> None:
        shape = (len(self.ring.primes), self.parameters.n)
        for ciphertext in ciphertexts:
            found = [np.shape(component)[-2:] for component in ciphertext]
            if not 2 <= len(found) <= MAX_COMPONENTS or any(one != shape for one in found):
                raise InputError(
                    f"a ciphertext has components {found}, but must have 2 to 16 of {shape}: check its parameters"
                )


def predicted_budget(parameters: Parameters, ciphertexts: int = 1) -> tuple[float, float]:
    """Noise budget of a sum of fresh ciphertexts, before anything is encrypted: (typical, guaranteed), in bits.

    A fresh phase is Delta m + v with v = e1 + e2 s - e u: each coefficient has 2 n products of an error and a ternary
    value. Times t, and with t Delta = q - r, the noise of a sum is t sum(v) - r sum(m). *Guaranteed* adds up the
    largest values. *Typical* is the median of the largest coefficient for uniform m: by the central limit theorem,
    or with the largest sum(m) where the sum is too short to be Gaussian. Raises InputError for fewer than one
    ciphertext.
    """
    check_within("number of ciphertexts", ciphertexts, 1, math.inf, "add up at least one", low_open=False)
    errors, messages = (math.sqrt(ciphertexts) * std for std in _fresh_noise(parameters))
    n, t, r = parameters.n, parameters.t, parameters.q % parameters.t
    largest, quantile = ciphertexts * r * t / 2, _largest_of(n)
    typical = quantile * errors + min(quantile * (math.hypot(errors, messages) - errors), largest)
    guaranteed = ciphertexts * ERROR_BITS * (1 + 2 * n) * t + largest
    return tuple(math.log2(parameters.q / 2 / noise) for noise in (typical, guaranteed))


def predicted_product_budget(parameters: Parameters) -> float:
    """Typical noise budget, in bits, of the product of two different fresh ciphertexts of uniform messages.

    Each noise is multiplied by t and by the other's c0 + c1 s divided by q, whose n coefficients have the variance
    (1 + 2n/3) / 12. So its standard deviation grows by t n / sqrt(18), and by sqrt(2) for the two of them: t n / 3.
    """
    grown = math.hypot(*_fresh_noise(parameters)) * parameters.t * parameters.n / 3
    return math.log2(parameters.q / 2 / (_largest_of(parameters.n) * grown))


def _fresh_noise(parameters: Parameters) -> tuple[float, float]:
    """Standard deviations of the two parts of fresh noise, t v and r m."""
    n, t = parameters.n, parameters.t
    return t * ERROR_STD * math.sqrt(1 + 2 * n * 2 / 3), parameters.q % t * t / math.sqrt(12)


def _largest_of(n: int) -> float:
    """Median of the largest of n Gaussian magnitudes, in standard deviations."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / n)) / 2)
