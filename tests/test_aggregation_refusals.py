"""Faults that TenSEAL passes silently, and what a malicious server could do: here they raise."""

import os

import numpy as np
import pytest
import tenseal
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.encryption import messages
from dopamine_lib.encryption.bfv_sum import set_up
from dopamine_lib.encryption.codec import SLOTS, RangeError
from dopamine_lib.encryption.group import BFVVector, make_group
from dopamine_lib.encryption.messages import MessageError, read_header
from dopamine_lib.encryption.sum_check import MODULUS, SumCheck

K, D = 3, 300
rng = np.random.default_rng(0)


@pytest.fixture
def session():
    """Hospitals, server and one round's messages of a fresh session."""
    hospitals, server = set_up(K, D)
    values = {k: rng.integers(-hospitals[k].limit, hospitals[k].limit + 1, D) for k in range(K)}
    server.begin(0)
    return hospitals, server, values, [hospital.message(0, values[k]) for k, hospital in enumerate(hospitals)]


def vector(context, values):
    return tenseal.bfv_vector(context, values)


def test_tenseal_wraps_ours_refuses():
    context = tenseal.context(tenseal.SCHEME_TYPE.BFV, SLOTS, plain_modulus=40961)
    assert vector(context, [20481]).decrypt() == [-20480]
    assert (vector(context, [20480]) + vector(context, [1])).decrypt() == [-20480]
    hospitals, _ = set_up(2, 1, "paper")
    with pytest.raises(RangeError, match="value 0 is 10241 units.*at most 10240"):
        hospitals[0].message(0, np.array([10241]))


def test_tenseal_adds_and_decrypts_under_any_key():
    """Two contexts with equal parameters and different keys mix silently."""
    ours, other = (tenseal.context(tenseal.SCHEME_TYPE.BFV, SLOTS, plain_modulus=40961) for _ in range(2))
    wrong = tenseal.bfv_vector_from(other, vector(ours, [1, 2, 3]).serialize())
    assert len(wrong.decrypt()) == 3 and wrong.decrypt() != [1, 2, 3]
    assert (vector(ours, [1]) + vector(other, [1])).decrypt() != [2]

    hospitals, server = set_up(K, D)
    strangers, their_server = set_up(K, D)
    server.begin(0), their_server.begin(0)
    message = strangers[0].message(0, np.ones(D, np.int64))
    with pytest.raises(MessageError, match="has session"):
        server.add(message)
    their_server.add(message)
    their_server.add(strangers[1].message(0, np.ones(D, np.int64)))
    with pytest.raises(MessageError, match="has session"):
        hospitals[0].open(0, their_server.aggregate())


def test_wrong_key_behind_the_right_names(session, monkeypatch):
    """A key under another's name is caught by the check sum: decryption gives something else than the sum."""
    hospitals, server, values, sent = session
    for message in sent:
        server.add(message)
    aggregate = server.aggregate()
    with pytest.raises(MessageError, match="made once"):  # a second would be tagged under the same nonce
        server.aggregate()
    monkeypatch.setattr(hospitals[0].group, "context", make_group("packed", K, D).context)
    with pytest.raises(MessageError, match="not the sum of the messages of hospitals"):
        hospitals[0].open(0, aggregate)
    assert np.array_equal(hospitals[1].open(0, aggregate).total, sum(values.values()))


def test_tenseal_takes_empty_bytes_and_any_order(session):
    """Empty bytes are an empty vector, and ciphertexts cut off or swapped pass unnoticed. Ours refuses them."""
    context = tenseal.context(tenseal.SCHEME_TYPE.BFV, SLOTS, plain_modulus=40961)
    assert tenseal.bfv_vector_from(context, b"").size() == 0
    chunks = [vector(context, [k] * SLOTS).serialize() for k in range(2)]
    assert [tenseal.bfv_vector_from(context, c).decrypt()[0] for c in chunks[::-1]] == [1, 0]

    hospitals, server = set_up(K, 4 * SLOTS)  # two ciphertexts
    server.begin(0)
    message = hospitals[0].message(0, np.arange(4 * SLOTS) % 7)
    header, body = read_header(message)
    first, second = messages.split(body, 2)
    for wrong, reason in (
        (b"", "shorter than a header"),
        (message[:-1], "ends within part 1"),
        (message[: -len(second) - 4], "ends within part 1"),
        (message[: len(header.to_bytes())], "ends within part 0"),
        (message + b"0", "1 bytes after"),
        (header.to_bytes() + messages.join([second, first]), "not authentic"),
        (header.to_bytes() + messages.join([first, first]), "not authentic"),
        (b"PK" + message[2:], "begins with"),
    ):
        with pytest.raises(MessageError, match=reason):
            server.add(wrong)
    assert server.add(message) == 0
    assert server.add(hospitals[1].message(0, np.arange(4 * SLOTS) % 7)) == 1
    aggregate = server.aggregate()
    for wrong in (b"", aggregate[:-1], aggregate[:100], aggregate + b"0", aggregate[:-16]):
        with pytest.raises(MessageError):
            hospitals[0].open(0, wrong)
    assert np.array_equal(hospitals[0].open(0, aggregate).total, 2 * (np.arange(4 * SLOTS) % 7))


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_of_a_message_whose_second_ciphertext_is_none_nothing_is_added(first):
    """It is authentic, from a hospital that means no good: its first ciphertext stayed in the sum."""
    d = 4 * SLOTS  # two ciphertexts
    hospitals, server = set_up(K, d)
    values = {k: np.arange(d) % 7 + k for k in range(K)}
    server.begin(0)
    if not first:
        server.add(hospitals[1].message(0, values[1]))
    bad, group = hospitals[2], hospitals[2].group
    header = group.header(messages.UPDATE, 2, 0, bad._check.make(0, 2, values[2]))
    parts = [group.encrypt(group.layout.pack(values[2])[:SLOTS]), b"not a ciphertext at all"]
    with pytest.raises(MessageError, match="hospital 2: a ciphertext cannot be read"):
        server.add(messages.seal(bad._channel.up, header, parts))
    for k in [0, 1] if first else [0]:
        server.add(hospitals[k].message(0, values[k]))
    opened = hospitals[0].open(0, server.aggregate())
    assert opened.hospitals == (0, 1) and np.array_equal(opened.total, values[0] + values[1])


def test_sixty_flipped_bits(session):
    """TenSEAL decrypts most single-bit flips to something else; ours refuses every one, in both directions."""
    hospitals, server, values, sent = session
    context = hospitals[0].group.context
    clean = BFVVector(context.data, hospitals[0].group.layout.pack(values[0]).tolist())
    raw, passed = clean.serialize(), 0
    flips = np.random.default_rng(1).integers(0, 8 * len(raw), 60)
    for bit in flips.tolist():
        try:
            passed += BFVVector(context.data, flip(raw, bit)).decrypt() != clean.decrypt()
        except (ValueError, RuntimeError):
            pass
    assert passed >= 30

    for bit in np.random.default_rng(2).integers(0, 8 * len(sent[0]), 60).tolist():
        with pytest.raises(MessageError):
            server.add(flip(sent[0], bit))
    for bit in range(8 * 60):  # every bit of the header
        with pytest.raises(MessageError):
            server.add(flip(sent[0], bit))
    for message in sent:  # the refused messages changed nothing
        server.add(message)
    aggregate = server.aggregate()
    for bit in np.random.default_rng(3).integers(0, 8 * (len(aggregate) - 16 * K), 60).tolist():
        with pytest.raises(MessageError):
            hospitals[1].open(0, flip(aggregate, bit))
    assert np.array_equal(hospitals[1].open(0, aggregate).total, sum(values.values()))


def flip(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_replays_and_repetitions(session):
    hospitals, server, values, sent = session
    server.add(sent[0])
    with pytest.raises(MessageError, match="hospital 0 is already in round 0"):
        server.add(sent[0])
    server.add(sent[1])
    aggregate = server.aggregate()
    with pytest.raises(MessageError, match="late"):
        server.add(sent[2])
    with pytest.raises(MessageError, match="rounds only increase"):
        server.begin(0)
    server.begin(1)
    with pytest.raises(MessageError, match="round_number 0, but must have 1"):
        server.add(sent[2])
    with pytest.raises(MessageError, match="rounds only increase"):
        hospitals[0].message(0, values[0])
    assert hospitals[0].open(0, aggregate).hospitals == (0, 1)
    with pytest.raises(MessageError, match="rounds only increase"):
        hospitals[0].open(0, aggregate)
    with pytest.raises(MessageError, match="round_number 0, but must have 1"):
        hospitals[0].open(1, aggregate)


def test_a_hospital_cannot_speak_for_another_or_for_the_server(session):
    hospitals, server, values, sent = session
    header, body = read_header(sent[0])
    with pytest.raises(MessageError, match="not authentic"):
        server.add(header._replace(sender=1).to_bytes() + bytes(body))
    with pytest.raises(MessageError, match="names hospital 9"):
        server.add(header._replace(sender=9).to_bytes() + bytes(body))
    with pytest.raises(MessageError, match="has kind 1, but must have 2"):
        hospitals[1].open(0, sent[0])
    for message in sent:
        server.add(message)
    aggregate = server.aggregate()
    # hospital 0 knows its own channel, but cannot make the tag that hospital 1 checks
    end = len(aggregate) - 16 * K
    own = messages.tag(hospitals[0]._channel.down, 0, aggregate[:end])
    assert aggregate[end : end + 16] == own
    with pytest.raises(MessageError, match="not authentic"):
        hospitals[1].open(0, aggregate[:end] + own * K)


def answer(server, vectors, arrived, check, round_number=0):
    """An aggregate with valid tags over whatever the server likes."""
    server._total, server._arrived, server._checks = vectors, arrived, check
    server._round, server._open = round_number, True
    return server.aggregate()


def unsealed(server, message):
    """The parts of a message that the server sees: its ciphertext and its check."""
    header, body = read_header(message)
    (ciphertext,) = messages.unseal(server._channels[header.sender].up, header, messages.split(body, 1))
    return ciphertext, header.check


def tampered(server, sent):
    """Aggregates that a server without the secret key can make, by name of the attack."""
    ciphertexts, checks = zip(*(unsealed(server, message) for message in sent), strict=True)
    everybody, total = [0, 1, 2], sum(checks) % MODULUS

    def added(numbers, shift=0):
        vectors = [BFVVector(server.group.context.data, ciphertexts[k]) for k in numbers]
        for vector in vectors[1:]:
            vectors[0].add_(vector)
        if shift:
            vectors[0].add_plain_([shift] * vectors[0].size())
        return vectors[:1]

    yield "one alone, called three", answer(server, added([0]), everybody, total)
    yield "one alone with its check, called three", answer(server, added([0]), everybody, checks[0])
    yield "one left out unnamed", answer(server, added([0, 1]), everybody, (checks[0] + checks[1]) % MODULUS)
    yield "one counted twice", answer(server, added([0, 1, 2, 2]), everybody, (total + checks[2]) % MODULUS)
    yield "two, one counted twice", answer(server, added([0, 1, 1]), [0, 1], (checks[0] + 2 * checks[1]) % MODULUS)
    yield "shifted by one", answer(server, added(everybody, shift=1), everybody, total)


def test_a_server_cannot_pass_off_another_sum(session):
    hospitals, server, _, sent = session
    refused = 0
    for what, aggregate in tampered(server, sent):
        hospitals[0]._opened = -1
        with pytest.raises(MessageError, match="is not the sum of the messages of hospitals"):
            hospitals[0].open(0, aggregate)
        assert what
        refused += 1
    assert refused == 6


def test_without_the_check_sum_a_server_could(session, monkeypatch):
    """The planted fault: each of those aggregates is opened, and one of them shows hospital 0's own values."""
    hospitals, server, values, sent = session
    monkeypatch.setattr(SumCheck, "holds", lambda *_: True)
    for what, aggregate in tampered(server, sent):
        hospitals[0]._opened = -1
        total = hospitals[0].open(0, aggregate).total
        assert not np.array_equal(total, sum(values.values())), what
        assert np.array_equal(total, values[0]) == what.startswith("one alone")


def test_a_hospital_named_twice_is_refused(session):
    """One hospital's values twice would have a matching check sum, and count as two."""
    hospitals, server, _, sent = session
    ciphertext, check = unsealed(server, sent[0])
    first, again = (BFVVector(server.group.context.data, ciphertext) for _ in range(2))
    first.add_(again)
    with pytest.raises(MessageError, match=r"hospitals is \[0, 0\]"):
        hospitals[0].open(0, answer(server, [first], [0, 0], 2 * check % MODULUS))


def test_the_last_rounds_sum_is_refused(session):
    """The server repeats the ciphertexts of an earlier round under a new header."""
    hospitals, server, values, sent = session
    for message in sent:
        server.add(message)
    aggregate = server.aggregate()
    assert hospitals[0].open(0, aggregate).hospitals == (0, 1, 2)
    header, body = read_header(aggregate)
    parts = messages.split(body[2 + 2 * K : -16 * K], 1)
    old = [BFVVector(server.group.context.data, bytes(part)) for part in parts]
    with pytest.raises(MessageError, match="is not the sum"):
        hospitals[0].open(1, answer(server, old, [0, 1, 2], header.check, round_number=1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 14), st.integers(1, 9))
def test_check_sum_sees_every_change(seed, position, hospitals):
    """Even a change by a power of two, where most bits of the product vanish."""
    random = np.random.default_rng(seed)
    check = SumCheck(os.urandom(32), bytes(16))
    values = random.integers(-(2**31), 2**31, (hospitals, 15))
    made = [check.make(5, k, own) for k, own in enumerate(values)]
    named = tuple(range(hospitals))
    total, added = values.sum(0), sum(made) % MODULUS
    assert check.holds(5, named, total, added)
    assert not check.holds(6, named, total, added) and not check.holds(5, named[1:], total, added)
    total[position] += 2 ** int(random.integers(0, 24))
    assert not check.holds(5, named, total, added)
    assert not check.holds(5, named, total - values[0], (added - made[0]) % MODULUS)
