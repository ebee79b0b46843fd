"""The holders of keys, and the server's view: no secret, by a search that finds planted ones."""

import os

import numpy as np
import pytest

from dopamine_lib.encryption.aggregation import BfvHospital, BfvServer
from dopamine_lib.encryption.bfv_sum import BfvSum
from dopamine_lib.encryption.group import BFVVector, Group, make_group, read_group
from dopamine_lib.encryption.keys import Identity, channel
from dopamine_lib.encryption.messages import MessageError
from dopamine_lib.encryption.transcript import Transcript, encodings

K, D = 3, 300


def draw():
    """Each hospital's integers, in range of three hospitals in the packed layout."""
    return dict(enumerate(np.random.default_rng(0).integers(-10_000, 10_001, (K, D))))


def secrets(sums):
    """The secrets that no server may see: the group's keys and every channel key, by name."""
    group = sums.hospitals[0].group
    yield "secret key and check key", group.hospital_bytes(), group.server_bytes()
    for hospital in sums.hospitals:
        yield "channel", hospital._channel.up, b""
        yield "channel", hospital._channel.down, b""


def test_transcript_shows_nothing():
    """It holds no hospital's values, no key and no total, in any form."""
    transcript = Transcript()
    sums = BfvSum(K, D, transcript=transcript)
    values = draw()
    total = sums.sum(0, [0, 1, 2], values)
    names = [name for name, _ in transcript.records]
    assert names == ["keys", *["message", "ciphertext"] * K, "aggregate"]
    for own in (*values.values(), total):
        assert transcript.find_values(own, 1000.0) == []
    for _, secret, known in secrets(sums):
        assert transcript.find(secret, known=known) == []


def test_planted_secrets_are_found():
    """The same search finds each form of a hospital's values, and each key, wherever it is put."""
    sums = BfvSum(K, D)
    values, noise = draw()[0], os.urandom(1000)
    for form, data in encodings(values, 1000.0):
        transcript = Transcript()
        transcript.record("update", noise + data[4:60] + noise)  # a stretch, at an odd place
        transcript.record("whole", data[:16])
        first, second = transcript.find_values(values, 1000.0)
        assert first.record == "update" and 1000 <= first.offset <= 1012, form
        assert second.record == "whole" and second.offset == 0, form
    for name, secret, known in secrets(sums):
        transcript = Transcript()
        at = len(secret) // 3 & ~7
        transcript.record("keys", noise + secret[at : at + 64] + noise)
        assert transcript.find(secret, known=known), name


def test_a_hospital_that_forgets_to_encrypt_is_found(monkeypatch):
    """Sealed, its message looks like any other; the server opens it, and the transcript records what it sees."""
    monkeypatch.setattr(Group, "encrypt", lambda self, slots: slots.tobytes())
    transcript = Transcript()
    sums = BfvSum(K, D, transcript=transcript)
    values = draw()
    with pytest.raises(MessageError, match="cannot be read"):
        sums.sum(0, [0, 1, 2], values)
    assert [(f.record, f.form) for f in transcript.find_values(values[0])] == [("ciphertext", "slots of 'packed'")]


def test_a_secret_too_short_to_search_for_is_refused():
    with pytest.raises(ValueError, match="too few"):
        Transcript().find(b"short")


def test_the_server_holds_no_key():
    group = make_group("packed", K, D)
    server = read_group(group.server_bytes())
    assert len(group.server_bytes()) < 300 and server.check_key is None and not server.context.is_private()
    ciphertext = BFVVector(group.context.data, [1, 2, 3]).serialize()
    with pytest.raises(ValueError, match="secret_key"):
        BFVVector(server.context.data, ciphertext).decrypt()
    with pytest.raises(MessageError, match="no secret key to hand on"):
        server.hospital_bytes()
    assert repr(group) == "<Group packed, 3 hospitals, d = 300, hospital>"
    # a key that was used and handed on is still the same
    again = read_group(group.hospital_bytes())
    assert again.key_id == group.key_id and read_group(again.hospital_bytes()).key_id == group.key_id
    assert BFVVector(again.context.data, ciphertext).decrypt() == [1, 2, 3]


def test_keys_in_the_wrong_hands(refuses):
    group, own, server = make_group("packed", K, D), Identity(), Identity()
    link = channel(own, server.public, group.session, 0)
    assert link == channel(server, own.public, group.session, 0) != channel(server, own.public, group.session, 1)
    assert link.up != link.down and repr(link) == "Channel()"
    with refuses("the server was given the hospitals' secret key"):
        BfvServer(group, {0: link})
    with refuses("hospital 0 was given the server's keys"):
        BfvHospital(0, read_group(group.server_bytes()), link)
    with refuses("number is 3"):
        BfvHospital(3, group, link)
    with refuses("layout 'ring32' is for masks"):
        make_group("ring32", K, D)
    with refuses("hospitals is 1001"):
        make_group("paper", 1001, D)
    with refuses("values are int32 (300,)", "int64 (300,)"):
        BfvHospital(0, group, link).message(0, np.zeros(D, np.int32))


def test_sealed_keys_open_for_one_party_only():
    group, first, second, third = make_group("packed", K, D), Identity(), Identity(), Identity()
    sealed = first.seal(second.public, group.hospital_bytes(), b"today")
    assert read_group(second.unseal(first.public, sealed, b"today")).key_id == group.key_id
    for opener, sender, data in ((third, first, sealed), (second, third, sealed), (second, first, sealed[:-1])):
        with pytest.raises(MessageError, match="does not open"):
            opener.unseal(sender.public, data, b"today")
    with pytest.raises(MessageError, match="another party or session"):
        second.unseal(first.public, sealed, b"tomorrow")  # delivered once more
    transcript = Transcript()
    transcript.record("relayed", sealed)
    assert transcript.find(group.hospital_bytes()) == []


def test_damaged_keys_are_refused():
    data = make_group("packed", K, D).hospital_bytes()
    for wrong in (data[:50], b"x" + data[1:], data[:-5], data[:2000] + b"00" + data[2002:], b""):
        with pytest.raises(MessageError):
            read_group(wrong)
