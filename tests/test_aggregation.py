"""Secure aggregation with BFV: exact sums, noise to spare, dropouts, and the server's memory."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from tenseal import sealapi

from dopamine_lib.encryption.bfv_sum import BfvSum, set_up
from dopamine_lib.encryption.codec import LAYOUTS, SLOTS
from dopamine_lib.encryption.group import MAX_HOSPITALS, BFVVector, Group, make_group
from dopamine_lib.encryption.messages import AggregationAborted, MessageError

K, D = 3, 300
ENCRYPTED = [name for name, layout in LAYOUTS.items() if layout.plain_modulus]
rng = np.random.default_rng(0)


def draw(sums, d=D):
    limit = sums.hospitals[0].limit
    return {k: rng.integers(-limit, limit + 1, d) for k in range(K)}


@pytest.mark.parametrize("layout", ENCRYPTED)
def test_sums_are_exact_round_after_round(layout):
    """More than one ciphertext, the last one short; all hospitals, some, and dropouts."""
    d = 3 * SLOTS * LAYOUTS[layout].fields // 2
    sums = BfvSum(K, d, layout)
    assert sums.total_range == LAYOUTS[layout].total_range
    for number, (invited, arrived) in enumerate([([0, 1, 2], [0, 1, 2]), ([0, 2], [0, 2]), ([0, 1, 2], [2, 1])]):
        values = draw(sums, d)
        total = sums.sum(2 * number, invited, {k: values[k] for k in arrived})
        assert total.dtype == np.int64 and np.array_equal(total, sum(values[k] for k in arrived))


def exact_at_the_edge(layout, d, hospitals):
    """All values at the limit, one or two under it, or anywhere; one sign in all hospitals, so totals reach R."""
    sums = BfvSum(hospitals, d, layout)
    limit = sums.hospitals[0].limit
    values = limit - rng.integers(0, 3, d) * (rng.random(d) < 0.5) - (rng.random(d) < 0.3) * rng.integers(0, limit, d)
    values = values * rng.choice([-1, 1], d)
    assert np.count_nonzero(np.abs(values) == limit) > d // 4
    total = sums.sum(0, list(range(hospitals)), {k: values for k in range(hospitals)})
    assert np.array_equal(total, hospitals * values)


@pytest.mark.parametrize("layout", ENCRYPTED)
def test_exact_at_the_edge(layout):
    exact_at_the_edge(layout, 30_000, 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ENCRYPTED)
def test_ten_million_values_at_the_edge(layout):
    exact_at_the_edge(layout, 10_000_000, 2)


@pytest.mark.parametrize(("layout", "hospitals", "least_bits"), [("paper", 100, 40), ("packed", MAX_HOSPITALS, 1)])
def test_noise_budget_after_many_additions(layout, hospitals, least_bits):
    """SEAL's own measure after as many additions as there ever are; the sum still decrypts."""
    context = make_group(layout, hospitals, SLOTS).context
    value = LAYOUTS[layout].total_range // hospitals
    numbers = [value if i % 2 else -value for i in range(SLOTS)]
    total = BFVVector(context.data, numbers)
    for _ in range(hospitals - 1):
        total.add_(BFVVector(context.data, numbers))
    decryptor = sealapi.Decryptor(context.seal_context().data, context.secret_key().data)
    assert decryptor.invariant_noise_budget(total.ciphertext()[0]) >= least_bits
    assert total.decrypt() == [hospitals * number for number in numbers]


def test_noise_bound_for_the_largest_group():
    """Hoeffding on the 42 fair bits of each of 1,000 noises, for q just under 2^60 and the layout's t."""
    t = LAYOUTS["packed"].plain_modulus
    margin = (2**60 - 2**30) // (2 * t)
    assert 95 * 21.5 < margin
    slack = margin - MAX_HOSPITALS / 2
    log2_failure = 1 - 2 * slack**2 / (42 * MAX_HOSPITALS) / math.log(2)
    assert log2_failure < -160
    # the bound is not vacuous: with ten thousand it no longer holds
    assert margin - 10_000 / 2 < 0


def test_too_few_abort_the_round_and_spend_it():
    sums = BfvSum(K, D, least=3)
    values = draw(sums)
    with pytest.raises(AggregationAborted, match="round 4 has only 2 of the 3 hospitals"):
        sums.sum(4, [0, 1, 2], {k: values[k] for k in (0, 1)})
    with pytest.raises(AggregationAborted):
        sums.sum(5, [0, 1, 2], {})
    with pytest.raises(MessageError, match="rounds only increase"):
        sums.sum(4, [0, 1, 2], values)
    assert np.array_equal(sums.sum(6, [0, 1, 2], values), sum(values.values()))


def test_a_hospital_does_not_decrypt_for_too_few(monkeypatch):
    """Even if the server, which also counts, lets it pass; and before it decrypts anything."""
    hospitals, server = set_up(K, D, least=3)
    server.least = 1
    server.begin(0)
    server.add(hospitals[0].message(0, np.ones(D, np.int64)))
    aggregate = server.aggregate()
    monkeypatch.setattr(Group, "ciphertext", lambda *_: pytest.fail("decrypted"))
    with pytest.raises(AggregationAborted, match="has only 1 of the 3 hospitals"):
        hospitals[0].open(0, aggregate)


def test_uninvited(refuses):
    sums = BfvSum(K, D)
    with refuses("hospitals [2] send values, but were not invited"):
        sums.sum(0, [0, 1], draw(sums))


SERVER = """
import struct, sys
from dopamine_lib.encryption.aggregation import BfvServer
from dopamine_lib.encryption.group import read_group
from dopamine_lib.encryption.keys import Channel
def take():
    message = bytearray(struct.unpack("<I", sys.stdin.buffer.read(4))[0])
    sys.stdin.buffer.readinto(message)
    return message
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
group = read_group(bytes(take()))
server = BfvServer(group, {k: Channel(bytes(take()), bytes(take())) for k in range(group.hospitals)})
server.begin(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = memory("VmRSS")
for _ in range(group.hospitals):
    server.add(take())
aggregate = server.aggregate()
after = memory("VmHWM")
sys.stdout.buffer.write(struct.pack("<QQ", before, after) + aggregate)
"""


def run_server(hospitals, d, code=SERVER):
    """Run the server in another process that gets bytes only; returns its rise in peak memory and a message's size."""
    members, known = set_up(hospitals, d)
    pieces = [known.group.server_bytes()]
    for k in range(hospitals):
        pieces += [known._channels[k].up, known._channels[k].down]
    values = np.arange(d) % 1000 - 500
    pieces += [member.message(0, values) for member in members]
    sent = b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces)
    # glibc returns large blocks at once, so that the peak is memory in use and not memory kept for reuse
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    ran = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True, env=environment)
    assert np.array_equal(members[0].open(0, ran.stdout[16:]).total, hospitals * values)
    before, after = (int.from_bytes(ran.stdout[i : i + 8], "little") * 1024 for i in (0, 8))
    return after - before, len(pieces[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_the_servers_memory_does_not_grow_with_the_hospitals():
    """In a process of its own: two models' ciphertexts, for 2 hospitals and for 5; not if it kept the messages."""
    d, fixed = 60 * 3 * SLOTS, 4e6
    (two, model), (five, _) = (run_server(hospitals, d) for hospitals in (2, 5))
    assert two < 2 * model + fixed and five < 2 * model + fixed
    keeping = SERVER.replace("server.add(take())", "kept.append(take()); server.add(kept[-1])").replace(
        "server.begin(0)", "server.begin(0); kept = []"
    )
    assert run_server(5, d, keeping)[0] > 5 * model
