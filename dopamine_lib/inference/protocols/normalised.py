"""The head: logits = W x^ + b for shared features x, where x^ is x centred and divided by its norm. In Z_2^64.

W's rows are centred first, which centres x: W (x - mean x) = (W - mean of each row) x. With n features let
Q(x, y) = n x.y - sum(x) sum(y); then Q(x, x) = n |x - mean x|^2, and x^ = sqrt(n / Q(x, x)) (x - mean x).

Set-up: a mask B of W for the session, known to the provider, which sends F = W - B (as in ``convolution``).
From the crypto-provider, once an image: masks a (n) and k (one number) known to the patient, g (n) and h (classes)
known to the provider, and shares of the products B a, 2 Q(a, g) and k h.

    1. The shares x_0, x_1 are in Z_2^64 (``truncation``). The patient sends E = x_0 - a, the provider G = x_1 - g.
    2. Shares of u = W x:      patient F a + (B a)_0               provider W (E + x_1) + (B a)_1
       Shares of q = Q(x, x):  patient Q(x_0, x_0) + 2 Q(a, G) + (2 Q(a, g))_0
                               provider Q(x_1, x_1) + 2 Q(E, x_1) + (2 Q(a, g))_1
    3. The provider sends q_1 and H = u_1 - h. The patient learns q and puts t = sqrt(n / q), in fixed point.
    4. The patient sends e = t - k. Shares of t u + b, by u = u_0 + u_1 with t u_0 known to the patient:
       patient t u_0 + k H + (k h)_0        provider e u_1 + (k h)_1 + b

Why this hides: E, G, H, e are masked by uniform numbers that the receiver does not know and that are used once.
What it does not hide: the patient learns q, the spread of its own image's features under the provider's network: one
number besides the answer. The provider learns nothing.
"""

import math

import numpy as np

from dopamine_lib.inference.protocols.buffers import Layout
from dopamine_lib.inference.protocols.operation import Operation, Party


def form(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Q(x, y) mod 2^64, an array (1,), for ring vectors of one length."""
    total, total_x, total_y = (v.sum(dtype=np.uint64, keepdims=True) for v in (x * y, x, y))
    return np.uint64(len(x)) * total - total_x * total_y


class NormalisedOperation(Operation):
    """W x^ + b for ``features`` inputs and ``classes`` outputs."""

    rounds = 3
    messages = ("E = x_0 - a and G = x_1 - g", "q_1 and H = u_1 - h", "e = t - k")

    def __init__(self, features: int, classes: int, inverse_bits: int):
        self.features, self.classes, self.inverse_bits = features, classes, inverse_bits
        products = {"u": ("u8", (classes,)), "q": ("u8", (1,)), "last": ("u8", (classes,))}
        self.patient = Layout(a=("u8", (features,)), k=("u8", (1,)), **products)
        self.provider = Layout(g=("u8", (features,)), h=("u8", (classes,)))
        self.corrections = Layout(**products)
        self.session = Layout(b0=("u8", (classes, features)))
        self.sent_by_patient, self.sent_by_provider = 8 * (features + 1), 8 * (features + 1 + classes)

    def deal(self, patient, provider, corrections, session, space) -> None:
        corrections.u[:] = (session.b0 * patient.a).sum(1, dtype=np.uint64) - patient.u
        corrections.q[:] = np.uint64(2) * form(patient.a, provider.g) - patient.q
        corrections.last[:] = patient.k * provider.h - patient.last

    def prepare(self, own, masked_weights, space) -> None:
        """The patient's share of u, in place of its share of B a."""
        own.u += (masked_weights[0] * own.a).sum(1, dtype=np.uint64)

    def run_patient(self, party: Party, tag: int, x: np.ndarray, own) -> np.ndarray:
        """The patient's share of the logits (classes,)."""
        x, g = x.reshape(-1), np.empty(self.features, np.uint64)
        party.channel.exchange(tag, x - own.a, g)  # 1
        q = form(x, x) + np.uint64(2) * form(own.a, g) + own.q  # 2
        received = np.empty(1 + self.classes, np.uint64)
        party.channel.receive(tag + 1, received)  # 3
        q += received[:1]
        # features that are all alike have no direction: x^ is 0, as in the plain network
        inverse = math.sqrt(self.features / int(q[0])) if q[0] else 0
        t = np.array([round(2**self.inverse_bits * inverse)], np.uint64)
        party.channel.send(tag + 2, t - own.k)  # 4
        return t * own.u + own.k * received[1:] + own.last

    def run_provider(self, party: Party, tag: int, x: np.ndarray, own, weights, bias: np.ndarray) -> np.ndarray:
        """The provider's share of the logits (classes,)."""
        x, e = x.reshape(-1), np.empty(self.features, np.uint64)
        party.channel.exchange(tag, x - own.g, e)  # 1
        u = (weights[0] * (e + x)).sum(1, dtype=np.uint64) + own.u  # 2
        q = form(x, x) + np.uint64(2) * form(e, x) + own.q
        party.channel.send(tag + 1, np.concatenate([q, u - own.h]))  # 3
        masked = np.empty(1, np.uint64)
        party.channel.receive(tag + 2, masked)  # 4
        return masked * u + own.last + bias
