"""A whole session of secure aggregation under BFV in one process: every party, and every message as bytes."""

import os

import numpy as np

from dopamine_lib.encryption.aggregation import BfvHospital, BfvServer
from dopamine_lib.encryption.codec import find_layout
from dopamine_lib.encryption.group import make_group, read_group
from dopamine_lib.encryption.keys import Identity, channel
from dopamine_lib.encryption.messages import pack_numbers
from dopamine_lib.encryption.transcript import Transcript
from dopamine_lib.errors import InputError


class BfvSum:
    """All hospitals and the server in one process, every message as bytes.

    total_range  the largest |total| of one value that comes back
    transcript   records everything the server sees

    >>> sums = BfvSum(hospitals=2, d=3)
    >>> sums.sum(0, [0, 1], {0: np.array([1, 2, 3]), 1: np.array([10, 20, -30])}).tolist()
    [11, 22, -27]
    """

    def __init__(
        self,
        hospitals: int,
        d: int,
        layout: str = "packed",
        *,
        least: int = 2,
        limit: int | None = None,
        transcript: Transcript | None = None,
    ):
        self.hospitals, self.server = set_up(hospitals, d, layout, least=least, limit=limit, transcript=transcript)
        self.total_range = find_layout(layout).total_range

    def sum(self, round_number: int, invited: list[int], values: dict[int, np.ndarray]) -> np.ndarray:
        """The total int64 (d,) of the invited hospitals that have ``values``; the others drop out in mid-round.

        Raises AggregationAborted, with nothing decrypted and the round spent, where fewer than ``least`` arrive.
        """
        if not set(values) <= set(invited):
            raise InputError(
                f"hospitals {sorted(set(values) - set(invited))} send values, but were not invited: invite all"
            )
        self.server.begin(round_number)
        context = pack_numbers(sorted(invited))
        for number, own in values.items():
            self.server.add(self.hospitals[number].message(round_number, own, context))
        aggregate = self.server.aggregate()
        for number in values:
            total, _ = self.hospitals[number].open(round_number, aggregate, context)
        return total


def set_up(
    hospitals: int,
    d: int,
    layout: str = "packed",
    *,
    least: int = 2,
    limit: int | None = None,
    transcript: Transcript | None = None,
) -> tuple[list[BfvHospital], BfvServer]:
    """A session's hospitals and server, by the steps and bytes that several machines would exchange.

    1. Every party has an Identity, and all public keys are known.
    2. Hospital 0 makes the group's keys and seals them for each other hospital; the server gets no key.
    3. Each hospital and the server derive their channel.
    """
    group = make_group(layout, hospitals, d)
    identities, server = [Identity() for _ in range(hospitals)], Identity()
    first, members = identities[0], []
    for number, own in enumerate(identities):
        fresh = os.urandom(16)  # each hospital's own
        sealed = first.seal(own.public, group.hospital_bytes(), fresh)
        keys = read_group(own.unseal(first.public, sealed, fresh))
        members.append(
            BfvHospital(number, keys, channel(own, server.public, keys.session, number), least=least, limit=limit)
        )
    known = read_group(group.server_bytes())
    channels = {k: channel(server, own.public, known.session, k) for k, own in enumerate(identities)}
    return members, BfvServer(known, channels, least=least, transcript=transcript)
