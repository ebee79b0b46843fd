"""Secure sums by masks (Bonawitz et al. 2017): nobody holds a key to everything, and hospitals may drop out.

Values are integers mod 2^32. A round, with t = ``threshold`` and all messages relayed by the server:

    1 share    i draws a key pair s_i and a seed b_i, splits both among all (Shamir: t shares rebuild them), seals
               each holder's two shares for that holder, and shows its public key and a hash of b_i
    2 mask     i sends x_i + G(b_i) + sum over j > i of G(s_ij) - sum over j < i of G(s_ij), where G is AES-CTR
               and s_ij what the key pairs s_i and s_j agree on: in the sum over all, the G(s_ij) cancel
    3 confirm  the server names the survivors, those whose values came; i vouches for that list to each of them
    4 reveal   of a survivor i hands over its share of b, of one who vanished its share of s: never both
    total      the server rebuilds and takes off the survivors' G(b_i), and their G(s_ij) with the vanished

So the server learns the survivors' sum. Why b_i: a message that comes after its sender was declared gone has lost
its s_ij to the recovery, and b_i alone hides it. Why never both shares: together they open one hospital. Why t is
more than half: else the server could tell two groups of t two stories and get both. Step 3 is against a server
that mixes stories to get at the sum of fewer than t. Both hold while fewer than 2t - n of the n hospitals collude
with the server; t of them together rebuild everything.

Recovery shows the server s_i, so s_i must mask nothing else: keys and seeds are new in every round, at the price
of K key pairs and K (K - 1) agreements, and a round that was begun is never run again. Only the links that carry
the shares stay for a session. Not covered: hospitals that send wrong values on purpose, and a server that leaves
hospitals out, down to t of them.
"""

import numpy as np

from dopamine_lib.encryption.codec import LAYOUTS
from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.mask_hospital import MaskHospital
from dopamine_lib.encryption.mask_server import MaskServer
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError, check_within

__all__ = ["MaskHospital", "MaskServer", "MaskSum"]


class MaskSum:
    """Hospitals 0 … K-1 and their server in one process, every message as bytes.

    hospitals   K
    d           values in a message
    least       hospitals that must arrive; a round in which fewer do, or no more than half, is aborted
    transcript  sees what the server sees, as for MaskServer
    total_range the largest |total| of one value that comes back
    """

    def __init__(self, hospitals: int, d: int, *, least: int = 2, transcript=None):
        check_within("d", d, 1, 2**31, "it is the number of values in a message", low_open=False)
        check_within("hospitals", hospitals, 2, SERVER - 1, "a sum of one hides nothing", low_open=False)
        check_within("least", least, 2, hospitals, "no more can arrive, and a sum of one hides nothing", low_open=False)
        self.total_range = LAYOUTS["ring32"].total_range
        identities = {number: Identity() for number in [*range(hospitals), SERVER]}
        publics = {number: identity.public for number, identity in identities.items()}
        self.server = MaskServer(identities.pop(SERVER), publics, d, least=least, transcript=transcript)
        self.hospitals = [MaskHospital(number, own, publics, d, least=least) for number, own in identities.items()]
        hellos = [party.hello() for party in [self.server, *self.hospitals]]
        for party in [self.server, *self.hospitals]:
            party.join(hellos)

    def sum(self, round_number: int, invited: list[int], values: dict[int, np.ndarray]) -> np.ndarray:
        """The exact total int64 (d,) of ``values``, int64 (d,) by number.

        invited  all who share masks; one of them without values vanishes in mid-round, and is recovered from
        Raises AggregationAborted where fewer than t arrive, MessageError for a round begun before.
        """
        server, hospitals = self.server, self.hospitals
        if not values.keys() <= set(invited):
            raise InputError(
                f"values of {sorted(values)} are given, but {sorted(invited)} are invited: invite them all"
            )
        server.begin(round_number, invited)
        for i in invited:
            server.receive(hospitals[i].share(round_number, invited))
        for i, message in server.deliveries().items():
            if i in values:
                server.receive(hospitals[i].mask(message, values[i]))
        for i, message in server.survivors().items():
            server.receive(hospitals[i].confirm(message))
        for i, message in server.confirmations().items():
            server.receive(hospitals[i].reveal(message))
        return server.total()
