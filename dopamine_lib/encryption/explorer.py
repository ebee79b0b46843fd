"""The plain functions behind chapter 3's explorer: real ciphertexts in a small ring, added up until they fail.

The ring is a toy that protects nothing (n = 128), so that a slider answers at once. The scheme is the textbook one.
"""

import functools

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.encryption.bfv import Bfv, Ciphertext, Parameters, SecretKey
from dopamine_lib.encryption.encoding import Batching
from dopamine_lib.encryption.ring import centred, ntt_primes
from dopamine_lib.errors import check_within
from dopamine_lib.pictures import BLUE, GREY, RED, explorer_panel

N, MAX_CIPHERTEXTS = 128, 100
#: Bits of q and of t that the sliders offer: all have primes that are 1 modulo 2n (11 bits do not), and residues fit.
Q_BITS, T_BITS = (18, 31), (12, 16)


@functools.lru_cache(maxsize=8)
def _hundred(q_bits: int, t_bits: int) -> tuple[Bfv, SecretKey, np.ndarray, Ciphertext, np.ndarray]:
    """A scheme, its secret key, a hundred random messages, their fresh ciphertexts and their noises."""
    (t,) = ntt_primes(N, t_bits)
    q = min(ntt_primes(N, q_bits, 20), key=lambda q: q % t)  # a small remainder, so that its noise hides no errors
    scheme = Bfv(Parameters(N, t, (q,)), seed=3)
    secret = scheme.secret_key()
    messages = scheme.source.uniform(t, (MAX_CIPHERTEXTS, N)) - t // 2
    ciphertexts = scheme.encrypt(scheme.public_key(secret), messages)
    # with the message known, its noise can be told apart even where decryption fails
    noises = centred(t * scheme.phase(secret, ciphertexts) - q * messages.astype(object), t * q).astype(np.int64)
    return scheme, secret, messages, ciphertexts, noises


def sum_of(ciphertexts: int, q_bits: int = 26, t_bits: int = 12) -> dict:
    """Add up this many fresh ciphertexts, and decrypt the sum.

    Returns ``noise`` (n,), each coefficient's true noise as a share of q, which decrypts correctly within 1/2;
    ``wrong_coefficients`` and ``wrong_slots``, as shares; ``budget`` in bits. Raises InputError outside the sliders'
    bounds.
    """
    check_within("number of ciphertexts", ciphertexts, 1, MAX_CIPHERTEXTS, "a hundred are prepared", low_open=False)
    check_within("bits of q", q_bits, *Q_BITS, "the ring is a toy", low_open=False)
    check_within("bits of t", t_bits, *T_BITS, "the ring is a toy", low_open=False)
    scheme, secret, messages, fresh, noises = _hundred(q_bits, t_bits)
    t = scheme.parameters.t
    total = scheme.total(tuple(component[:ciphertexts] for component in fresh))
    found, right = scheme.decrypt(secret, total), centred(messages[:ciphertexts].sum(axis=0), t)
    batching = Batching(N, t)
    return {
        "noise": noises[:ciphertexts].sum(axis=0) / scheme.parameters.q,
        "wrong_coefficients": float(np.mean(found != right)),
        "wrong_slots": float(np.mean(batching.decode(found) != batching.decode(right))),
        "budget": scheme.noise_budget(secret, total),
    }


def draw_sum(ciphertexts: int = 10, q_bits: int = 26, t_bits: int = 12) -> Figure:
    """The noise of every coefficient of a sum, and the share of it that decrypts wrongly."""
    seen = sum_of(ciphertexts, q_bits, t_bits)
    figure, axes = explorer_panel(0.67)
    width = max(1.0, 1.05 * 2 * float(np.abs(seen["noise"]).max()))
    counts, edges = np.histogram(seen["noise"], bins=60, range=(-width / 2, width / 2))
    inside = np.abs(edges[:-1] + edges[1:]) / 2 < 0.5
    for part, colour in ((inside, BLUE), (~inside, RED)):
        axes.stairs(np.where(part, counts, 0), edges, fill=True, color=colour)
    for bound in (-0.5, 0.5):
        axes.axvline(bound, color=GREY, linestyle=":")
    wrong = f"wrong: {seen['wrong_coefficients']:.0%} of the coefficients, {seen['wrong_slots']:.0%} of the slots"
    axes.set(xlabel="noise / q", ylabel="coefficients", xlim=(-width / 2, width / 2))
    axes.locator_params(nbins=4)
    axes.set_title(f"sum of {ciphertexts}: budget {seen['budget']:.1f} bits\n{wrong}")
    return figure
