"""Shared by the tests of masks: values, a round by hand, and the server's view of it."""

import numpy as np

from dopamine_lib.encryption.masking import MASKED

D = 50
EDGE = 2**31 - 1


def some_values(hospitals, d=D, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.integers(-(10**6), 10**6, d) for k in hospitals}


def steps(masks, round_number, invited, values, vouching=None):
    """One round by hand; returns the masked messages by hospital. The server is left waiting for ``total``."""
    server, hospitals = masks.server, masks.hospitals
    server.begin(round_number, invited)
    for i in invited:
        server.receive(hospitals[i].share(round_number, invited))
    masked = {i: hospitals[i].mask(message, values[i]) for i, message in server.deliveries().items()}
    for i in vouching or invited:
        server.receive(masked[i])
    for i, message in server.survivors().items():
        server.receive(hospitals[i].confirm(message))
    for i, message in server.confirmations().items():
        server.receive(hospitals[i].reveal(message))
    return masked


def body_of(masks, number, round_number, message):
    """A masked message as the server reads it, uint32 (d,), without the replay check."""
    link = masks.server._links[number]
    link._received = (-1, 0)
    return np.frombuffer(link.open(MASKED, round_number, message), "<u4")


def holding(transcript):
    """Everything that the server has seen, as one string of bytes."""
    return b"|".join(data for _, data in transcript.records)
