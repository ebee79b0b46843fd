"""Secure sums by masks (Bonawitz et al. 2017): no party holds a key to everything, and hospitals may drop out.

Values are integers mod 2^32. A round, with t = ``threshold`` and all messages relayed by the server:

    1 share    i draws a key pair s_i and a seed b_i, shares both among all (Shamir: t shares rebuild them), seals
               each holder's two shares for that holder, and publishes its public key and a hash of b_i
    2 mask     i sends x_i + G(b_i) + sum over j > i of G(s_ij) - sum over j < i of G(s_ij), where G is AES-CTR
               and s_ij the seed on which the key pairs s_i and s_j agree: in the sum over all, the G(s_ij) cancel
    3 confirm  the server names the survivors, whose values arrived; i vouches for that list to each of them
    4 reveal   i hands over its share of b for a survivor and its share of s for a dropout: never both
    total      the server rebuilds and removes the survivors' G(b_i), and their G(s_ij) with the dropouts

So the server learns the survivors' sum. Why b_i: a message that arrives after its sender was declared a dropout has
lost its s_ij to the recovery, and only b_i still hides it. Why never both shares: together they open one hospital's
values. Why t is more than half: otherwise the server could give two groups of t different lists and get both kinds.
Step 3 stops a server that mixes lists to learn the sum of fewer than t. What is sealed in steps 1 and 3 is bound to
the round, the invited or the survivors, and a ``context`` such as a hash of the model: hospitals that were given
different models (one of them a useful one, the others one at which their gradients vanish, so that the sum is one
hospital's update: Pasquini et al. 2022) refuse each other's shares, and nothing is masked. All of this holds while
fewer than 2t - n of the n hospitals collude with the server. To t - 1 who collude, a sum of t is that of one hospital;
t of them together rebuild everything.

Why, by simulation (Bonawitz et al. 2017, theorem 6.5, with the models of Pasquini et al. 2022): whatever the server and
a set C of hospitals, |C| < 2t - n, send and see, a simulator can show them that knows no honest values but one sum.

    1  Links among honest hospitals: their keys are unknown, so a sealed box may as well hold zeros, and one that was
       exchanged, or is bound to another round, model or list, opens nowhere.
    2  Shares: C holds fewer than t of each honest secret, and they are uniform whatever the secret.
    3  To the adversary the seeds s_ij of two honest hospitals and b_i are then random (X25519), and so are their
       streams (AES): every honest message y_i is a uniform vector.
    4  An honest hospital answers step 4 once, for a list S that has it and for which t hospitals vouch to it, itself
       included, at least t - |C| of them honest. A second list would take as many others, but 2 (t - |C|) > n - |C|: so
       there is one S. For i outside it shares of s_i come out, b_i stays random, and y_i uniform.
    5  For honest i in S shares of b_i come out. Each of them has opened the boxes of all others in S, or it would have
       refused the list: so any two share an s_ij that nobody else knows. Vectors with all these masks on them are
       uniform but for their sum z, that of x_i over the honest in S, at least t - |C| of them. Any values of the
       simulator's own that add up to z look the same.
    6  The boxes of 5 are bound to model and invited, so z was computed at one model, by hospitals told of the same
       invited.

The recovery shows the server s_i, so s_i must mask nothing else: keys and seeds are new in every round, at the price
of K key pairs and K (K - 1) agreements, and a round that was begun is never run again. Only the links that carry
the shares last for a session. Not covered: hospitals that send wrong values on purpose, and a server that leaves
hospitals out, down to t of them.
"""

import numpy as np

from dopamine_lib.encryption.codec import LAYOUTS
from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.mask_hospital import MaskHospital
from dopamine_lib.encryption.mask_server import MaskServer
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.encryption.transcript import Transcript
from dopamine_lib.errors import InputError, check_within

__all__ = ["MaskHospital", "MaskServer", "MaskSum"]


class MaskSum:
    """Hospitals 0 … K-1 and their server in one process, every message as bytes.

    hospitals    K
    d            number of values in a message
    least        the number of hospitals that must arrive; a round with fewer, or with no more than half, is aborted
    transcript   records everything the server sees
    total_range  the largest |total| of one value that comes back

    >>> sums = MaskSum(hospitals=3, d=2)
    >>> sums.sum(0, [0, 1, 2], {0: np.array([1, 2]), 2: np.array([10, -20])}).tolist()  # hospital 1 drops out
    [11, -18]
    """

    def __init__(self, hospitals: int, d: int, *, least: int = 2, transcript: Transcript | None = None):
        check_within("d", d, 1, 2**31, "it is the number of values in a message", low_open=False)
        check_within("hospitals", hospitals, 2, SERVER - 1, "a sum of one hides nothing", low_open=False)
        check_within("least", least, 2, hospitals, "more cannot arrive, and a sum of one hides nothing", low_open=False)
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

        invited  the hospitals that share masks; one of them without values drops out in mid-round
        Raises AggregationAborted where fewer than t arrive, MessageError for a round that was begun before, and
        InputError for values of hospitals that are not invited.
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
