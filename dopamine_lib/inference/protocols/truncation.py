"""Truncation without ReLU, and the way from Z_2^32 to Z_2^64: one round.

From the crypto-provider: a mask r (32 bits), and shares in the target ring of v[0] and v[1], where
v[1] = -(r >> shift) and v[0] = v[1] + msb(r) 2^(32 - shift).

    1. The patient adds 2^30 to its share, so that x is positive. Open m = x + r.
    2. m wrapped around exactly where msb(r) = 1 and msb(m) = 0; so x >> shift = (m >> shift) + v[msb m].
       The patient subtracts 2^30 >> shift again.

Why this hides x: m is masked by a uniform r, used once; v is shared afresh. The result is rounded down or up at random,
with the right mean, and is exact for shift = 0. Needs |x| < 2^30
and shift <= 30.
"""

import math

import numpy as np

from dopamine_lib.inference.protocols.buffers import Layout
from dopamine_lib.inference.protocols.operation import PATIENT, Operation, Party

OFFSET = np.uint32(2**30)


class TruncationOperation(Operation):
    """x >> shift for an array of ``shape``, as shares in Z_2^bits."""

    rounds = 1
    messages = ("m = x + r",)

    def __init__(self, shape, shift: int, bits: int = 32):
        self.shape, self.shift = shape, shift
        self.ring = np.dtype(f"u{bits // 8}").type
        self.patient = Layout(r=("u4", shape), v=(self.ring, (2, *shape)))
        self.provider = Layout(r=("u4", shape))
        self.corrections = Layout(v=(self.ring, (2, *shape)))
        self.sent_by_patient = self.sent_by_provider = 4 * math.prod(shape)

    def deal(self, patient, provider, corrections, session, space) -> None:
        r = patient.r + provider.r
        v_1 = -(r >> self.shift).astype(self.ring)
        v_0 = v_1 + ((r >> 31).astype(self.ring) << (31 - self.shift) << 1)
        np.subtract(np.stack([v_0, v_1]), patient.v, out=corrections.v)

    def run(self, party: Party, tag: int, x: np.ndarray, own) -> np.ndarray:
        """Shares of x >> shift."""
        masked = x + own.r
        if party.number == PATIENT:
            masked += OFFSET
        m = party.open(tag, masked)
        y = np.where(m >= 2**31, own.v[1], own.v[0])
        if party.number == PATIENT:
            y += (m >> self.shift).astype(self.ring)
            y -= self.ring(OFFSET >> self.shift)
        return y
