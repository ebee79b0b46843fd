"""What every protocol of the package is made of: an operation, and a party that takes part in it.

An operation is one use of correlated randomness. Its three layouts are public: what the patient draws from its
seed, what the provider draws from its own, and the corrections the crypto-provider computes from both and sends to
the provider, so that together they have the right joint distribution. Either part alone is uniform.
"""

import numpy as np

from dopamine_lib.inference.protocols.buffers import Layout, Workspace

PATIENT, PROVIDER = 0, 1
#: Messages of operation number i have the tags 16 i … 16 i + 15.
TAGS = 16


class Operation:
    """One use of correlated randomness: its layouts, and how the crypto-provider fills the corrections.

    session  what the provider draws once a session (the model's mask); empty for most operations
    """

    patient = provider = corrections = session = Layout()
    #: Bytes sent online by each party, and the rounds this takes.
    sent_by_patient = sent_by_provider = rounds = comparisons = 0
    #: What its messages are called, in order of their tags.
    messages: tuple[str, ...] = ()

    def deal(self, patient, provider, corrections, session, space) -> None:
        """Fill ``corrections`` from both parties' arrays: the crypto-provider's work."""


class Party:
    """One of the two parties online: its number, its channel to the other, its scratch memory."""

    def __init__(self, number: int, channel, workspace: Workspace | None = None):
        self.number, self.channel, self.workspace = number, channel, workspace or Workspace()

    def open(self, tag: int, mine: np.ndarray, combine=np.add) -> np.ndarray:
        """Swap shares and combine them: both parties end with the same array. One round."""
        theirs = self.workspace.array("opened", mine.shape, mine.dtype)
        self.channel.exchange(tag, mine, theirs)
        return combine(mine, theirs, out=self.workspace.array(f"opened {tag % TAGS}", mine.shape, mine.dtype))
