"""The plain functions behind chapter 3's explorers: real ciphertexts, added up and multiplied until they fail.

The ring of the sums is a toy that protects nothing (n = 128), so that a slider answers at once; what the noise takes
of the paper's q is worked out once. The scheme is the textbook one.
"""

import functools
import math

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.encryption.bfv import Bfv, Ciphertext, Parameters, SecretKey, paper_parameters
from dopamine_lib.encryption.encoding import Batching
from dopamine_lib.encryption.ring import centred, ntt_primes
from dopamine_lib.errors import check_within
from dopamine_lib.pictures import BLACK, BLUE, GREY, RED, SKY, explorer_panel, ticks

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
    counts, edges = np.histogram(np.clip(seen["noise"], -0.99, 0.99), bins=80, range=(-1, 1))  # the axis ends at q
    inside = np.abs(edges[:-1] + edges[1:]) / 2 < 0.5
    for part, colour in ((inside, BLUE), (~inside, RED)):
        axes.stairs(np.where(part, counts, 0), edges, fill=True, color=colour)
    for bound in (-0.5, 0.5):
        axes.axvline(bound, color=GREY, linestyle=":")
    wrong = f"wrong: {seen['wrong_coefficients']:.0%} of the coefficients, {seen['wrong_slots']:.0%} of the slots"
    axes.set(xlabel="noise / q", ylabel="coefficients", xlim=(-1, 1), yscale="log", ylim=(0.5, 200))
    axes.set_xticks((-1, -0.5, 0, 0.5, 1))
    ticks(axes.yaxis, 1, 10, 100)
    axes.set_title(f"sum of {ciphertexts}: budget {seen['budget']:.1f} bits\n{wrong}")
    return figure


#: What happens to a ciphertext at the paper's size, one after the other.
OPERATIONS = ("fresh", "sum of ten", "times public weights", "product of two", "fourth power", "eighth power")


@functools.lru_cache(maxsize=1)
def noise_used() -> dict[str, float]:
    """By operation, the bits of noise in a real ciphertext at the paper's n, t and q, of all bits that q has.

    >>> used = noise_used()
    >>> round(used["sum of ten"] - used["fresh"], 1) < 4 < used["product of two"] - used["fresh"]
    True
    """
    scheme = Bfv(paper_parameters(), seed=3)
    secret, slots = scheme.secret_key(), Batching(scheme.parameters.n, scheme.parameters.t)
    public, rng = scheme.public_key(secret), np.random.default_rng(3)  # for looking at: nothing is hidden
    numbers = rng.integers(-100, 101, (10, scheme.parameters.n))
    fresh = scheme.encrypt(public, slots.encode(numbers))
    one, other = (tuple(component[i] for component in fresh) for i in range(2))
    total, square = scheme.total(fresh), scheme.multiply(one, one)
    fourth = scheme.multiply(square, square)
    ciphertexts = (
        one,
        total,
        scheme.multiply_plain(total, slots.encode(rng.integers(0, 3, scheme.parameters.n))),
        scheme.multiply(one, other),
        fourth,
        scheme.multiply(fourth, fourth),
    )
    bits = math.log2(scheme.parameters.q)
    found = [bits - scheme.noise_budget(secret, ciphertext) for ciphertext in ciphertexts]
    return dict(zip(OPERATIONS, found, strict=True))


def draw_budget(step: int = len(OPERATIONS)) -> Figure:
    """How much of q the noise fills after each of ``OPERATIONS`` up to a step; what is left is the noise budget.

    Raises InputError for a step that is not there.
    """
    check_within("step", step, 1, len(OPERATIONS), "there are no more operations", low_open=False)
    used, bits = noise_used(), math.log2(paper_parameters().q)
    figure = Figure(figsize=(6.6, 3.0))
    axes = figure.add_axes((0.24, 0.16, 0.73, 0.7))
    for place, noise in enumerate(list(used.values())[:step]):
        axes.barh(place, bits, color="white", edgecolor=BLACK, linewidth=0.8)
        axes.barh(place, noise, color=RED if bits - noise < 1 else SKY, edgecolor=BLACK, hatch="///", linewidth=0.8)
        left = f"budget {bits - noise:.1f} bits" if bits - noise >= 0.05 else "budget gone: it decrypts to anything"
        inside = noise > 0.6 * bits
        box = dict(facecolor="white", edgecolor="none", pad=1)
        axes.text(noise + (-2 if inside else 2), place, left, va="center", ha="right" if inside else "left", bbox=box)
    axes.set_yticks(range(len(OPERATIONS)), OPERATIONS)
    axes.set_xticks(range(0, 101, 20))
    axes.set(xlim=(0, bits + 1), ylim=(len(OPERATIONS) - 0.4, -0.6), xlabel=f"bits of q, {bits:.0f} in all")
    axes.set_title("what the noise takes of a ciphertext", fontsize=11)
    told = ", ".join(f"{name} {bits - noise:.1f}" for name, noise in list(used.items())[:step])
    figure.set_label(f"Bars of {bits:.0f} bits that noise fills from the left. Bits of budget left: {told}.")
    return figure
