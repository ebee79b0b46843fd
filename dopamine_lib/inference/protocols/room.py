"""Did any value come near the ring's end? The patient learns one bit, before it believes the answer.

A picture unlike any that the scales were set on may drive values out of the ring, where they wrap around and the answer
is wrong. Of every value that ReLU, a maximum or a truncation looks at, the parties hold shares o_0 ^ o_1 = o of a bit
that says whether it lies outside [-2^30, 2^30), half of the ring (``comparison``). All bits are 0 exactly where the
parties' shares are the same, so they are hashed, to h_0 and h_1, and the hashes are compared, in the field GF(2^64):

From the crypto-provider: a known to the patient, b known to the provider, and shares of a b.

    1. The patient sends E = h_0 ^ a.
    2. The provider draws u, not 0, and sends F = u ^ b and S = b E ^ u h_1 ^ (a b)_1.
    3. The patient has F h_0 ^ S ^ (a b)_0 = u (h_0 ^ h_1), which is 0 exactly where the hashes are the same.

Why this hides the rest: E and F are masked by uniform numbers used once. u (h_0 ^ h_1) is 0 or uniform among all that
are not 0, and with F it determines S. So the patient learns the bit and nothing else, the provider nothing.

What the bit does not say: a value that is wrong by a whole turn of the ring looks like one that is not, so values all
of which lie between 3/2 and 5/2 of the ring's half (or around another turn) pass, where none lies between 1/2 and 3/2.
The spread q of a normalised head is not asked about: it fits while the features' norm is below four times the largest
on public images.
Two different strings have the same hash with a probability of 2^-64. The bit is one more thing that the provider's
weights can be asked about: an active patient, which may shift any hidden value by what it sends, learns one bit a query
of where it lies.
"""

import secrets

import numpy as np

from dopamine_lib.inference.protocols.operation import HASH_BYTES, BufferLayout, Operation, Own, Party, Workspace

#: What the patient is told where a value did.
EXCEEDED = "this picture takes the network beyond what it was scaled for, so the answer may be wrong"
#: x^64 = x^4 + x^3 + x + 1 in GF(2^64).
_REDUCED = 0b11011


def times(x: int, y: int) -> int:
    """The product in GF(2^64), whose elements are written as integers below 2^64.

    >>> times(2, 2**63), times(3, 5)
    (27, 15)
    """
    product = 0
    while y:
        product ^= x if y & 1 else 0
        x, y = x << 1, y >> 1
        x ^= (1 << 64 | _REDUCED) if x >> 64 else 0
    return product


class RoomOperation(Operation):
    """Whether both parties' hashes, ``Party.outside``, are the same."""

    rounds = 1  # the reply comes with the answer
    messages = ("E = h_0 ^ a", "F = u ^ b and S")

    def __init__(self):
        self.patient = BufferLayout(a=("u8", (1,)), c=("u8", (1,)))
        self.provider = BufferLayout(b=("u8", (1,)))
        self.corrections = BufferLayout(c=("u8", (1,)))
        self.sent_by_patient, self.sent_by_provider = HASH_BYTES, 2 * HASH_BYTES

    def deal(self, patient: Own, provider: Own, corrections: Own, weight_masks: list, space: Workspace) -> None:
        corrections.c[0] = times(int(patient.a[0]), int(provider.b[0])) ^ int(patient.c[0])

    def run_patient(self, party: Party, tag: int, own: Own) -> bool:
        """True where some value was near the ring's end."""
        mine, reply = _hashed(party), np.empty(2, "<u8")
        party.channel.send(tag, np.array([mine ^ int(own.a[0])], "<u8"))  # 1
        party.channel.receive(tag + 1, reply)
        f, s = map(int, reply)
        return times(f, mine) ^ s ^ int(own.c[0]) != 0  # 3

    def run_provider(self, party: Party, tag: int, own: Own) -> None:
        """Steps 2; it learns nothing."""
        received, b, u = np.empty(1, "<u8"), int(own.b[0]), 1 + secrets.randbelow(2**64 - 1)
        party.channel.receive(tag, received)
        s = times(b, int(received[0])) ^ times(u, _hashed(party)) ^ int(own.c[0])
        party.channel.send(tag + 1, np.array([u ^ b, s], "<u8"))


def _hashed(party: Party) -> int:
    return int.from_bytes(party.outside.digest(), "little")
