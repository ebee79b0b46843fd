"""The secrecy of masks, each claim with the planted fault that breaks it."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from mask_rounds import D, body_of, holding, some_values, steps
from scipy import stats

from dopamine_lib.encryption import mask_hospital, masking, shamir
from dopamine_lib.encryption.masking import CARD, add_masks, pair_seed
from dopamine_lib.encryption.masks import MaskSum
from dopamine_lib.encryption.messages import SERVER, AggregationAborted, MessageError, cut, pack_numbers
from dopamine_lib.encryption.transcript import Transcript


def pair_masks_off(masks, transcript, number, masked, round_number, others):
    """The attack: remove a hospital's pair masks from its message with the key that the recovery has shown."""
    secret = next(data for name, data in transcript.records if f"key of hospital {number}" in name)
    key, left = X25519PrivateKey.from_private_bytes(secret), masked.copy()
    publics = {j: card[0] for j, card in masks.server._cards.items()}
    add_masks(left, [(pair_seed(key, publics[j], round_number, (number, j)), number > j) for j in others])
    return left


@pytest.mark.parametrize("single_mask", [False, True], ids=["double", "planted: single"])
def test_a_late_message_of_a_declared_dropout_stays_masked(single_mask, monkeypatch):
    if single_mask:
        monkeypatch.setattr(mask_hospital, "add_masks", lambda total, seeds: add_masks(total, seeds[1:]))
    transcript = Transcript()
    masks, values = MaskSum(4, 4096, transcript=transcript), some_values(range(4), 4096)
    masked = steps(masks, 0, range(4), values, vouching=[0, 1, 2])
    total = masks.server.total()
    assert (total == sum(values[i] for i in range(3))).all() != single_mask  # the fault also spoils the total
    with pytest.raises(MessageError, match="late"):
        masks.server.receive(masked[3])
    late = pair_masks_off(masks, transcript, 3, body_of(masks, 3, 0, masked[3]), 0, (0, 1, 2))
    found = (late.view(np.int32) == values[3]).all()
    assert found == single_mask
    if not single_mask:  # the rest is spread evenly: 1 false alarm in 1,000
        assert stats.chisquare(np.bincount(late >> 28, minlength=16)).pvalue > 1e-3


@pytest.mark.parametrize("reused", [False, True], ids=["fresh", "planted: reused"])
def test_masks_of_two_rounds_have_nothing_in_common(reused, monkeypatch):
    """Masks that are used twice cancel in the difference of two messages, which is then that of the values."""
    masks = MaskSum(3, 2000)
    if reused:
        monkeypatch.setattr(mask_hospital.os, "urandom", lambda n: bytes(n))
        monkeypatch.setattr(mask_hospital, "pair_seed", lambda own, public, r, pair: bytes([sum(pair)] * 32))
    first, second = some_values(range(3), 2000, 1), some_values(range(3), 2000, 2)
    bodies = []
    for round_number, values in enumerate((first, second)):
        message = steps(masks, round_number, range(3), values)[1]
        bodies.append(body_of(masks, 1, round_number, message))
        masks.server._kind = None
    difference = (bodies[1] - bodies[0]).view(np.int32)
    assert (difference == second[1] - first[1]).all() == reused
    if not reused:
        assert stats.chisquare(np.bincount(difference.view(np.uint32) >> 28, minlength=16)).pvalue > 1e-3


def test_one_kind_of_share_of_each_hospital_is_handed_over():
    transcript = Transcript()
    masks, values = MaskSum(5, D, transcript=transcript), some_values(range(4))
    masks.sum(0, range(5), values)
    rebuilt = [
        name.split(": ")[1] for name, _ in transcript.records if " of hospital" in name and "message" not in name
    ]
    assert rebuilt == [f"seed of hospital {i}" for i in range(4)] + ["key of hospital 4"]
    for hospital in masks.hospitals[:4]:  # another list, the same message again: neither is answered
        for step in ("confirm", "reveal"):
            with pytest.raises(MessageError, match="not due"):
                getattr(hospital, step)(b"")
        assert hospital._held is None


def test_planted_both_kinds_of_share_open_one_hospital():
    """The reason for never both: with t shares of each kind the server reads hospital 1's values."""
    masks, values = MaskSum(3, D), some_values(range(3))
    server, hospitals = masks.server, masks.hospitals
    server.begin(0, range(3))
    for hospital in hospitals:
        server.receive(hospital.share(0, range(3)))
    masked = {i: hospitals[i].mask(message, values[i]) for i, message in server.deliveries().items()}
    held = {j: hospitals[j]._held[1] for j in (0, 2)}
    key, seed = (shamir.reconstruct({j: pair[kind] for j, pair in held.items()}, 2) for kind in (0, 1))
    own = X25519PrivateKey.from_private_bytes(key)
    left = body_of(masks, 1, 0, masked[1]).copy()
    seeds = [(pair_seed(own, server._cards[j][0], 0, (1, j)), j < 1) for j in (0, 2)]
    add_masks(left, seeds)
    assert not (left.view(np.int32) == values[1]).any()  # one kind is not enough
    add_masks(left, [(seed, False)])
    assert (left.view(np.int32) == values[1]).all()


def test_a_server_with_two_lists_of_survivors_gets_no_shares():
    """Hospital 0 hears that 3 survived, the others that it did not: no hospital hands over any share."""
    masks, values = MaskSum(4, D), some_values(range(4))
    server, hospitals = masks.server, masks.hospitals
    server.begin(0, range(4))
    for hospital in hospitals:
        server.receive(hospital.share(0, range(4)))
    for i, message in server.deliveries().items():
        server.receive(hospitals[i].mask(message, values[i]))
    lists = {0: (0, 1, 2, 3), 1: (0, 1, 2), 2: (0, 1, 2)}
    vouchers = {j: [] for j in lists}
    for i, told in lists.items():
        sealed = hospitals[i].confirm(server._links[i].seal(masking.SURVIVORS, 0, pack_numbers(told)))
        boxes = cut(server._links[i].open(masking.VOUCH, 0, sealed), masking.VOUCH_BYTES)
        for j, box in zip([j for j in told if j != i], boxes, strict=True):
            vouchers.setdefault(j, []).append(box)
    for i in lists:
        with pytest.raises(MessageError, match="not authentic"):
            hospitals[i].reveal(server._links[i].seal(masking.VOUCHED, 0, b"".join(vouchers[i])))


def test_one_list_is_not_enough_without_vouchers():
    masks = MaskSum(4, D)
    values = some_values(range(4))
    server, hospitals = masks.server, masks.hospitals
    server.begin(0, range(4))
    for hospital in hospitals:
        server.receive(hospital.share(0, range(4)))
    for i, message in server.deliveries().items():
        server.receive(hospitals[i].mask(message, values[i]))
    survivors = server.survivors()
    hospitals[0].confirm(survivors[0])
    with pytest.raises(AggregationAborted):
        hospitals[0].reveal(server._links[0].seal(masking.VOUCHED, 0, b""))
    with pytest.raises(AggregationAborted):
        server.confirmations()  # nobody has confirmed


def test_a_declared_dropout_hands_over_nothing():
    masks = MaskSum(4, D)
    server, hospitals = masks.server, masks.hospitals
    server.begin(0, range(4))
    for hospital in hospitals:
        server.receive(hospital.share(0, range(4)))
    for i, message in server.deliveries().items():
        hospitals[i].mask(message, np.zeros(D, np.int64))
    for told, error in (((0, 1, 2), AggregationAborted), ((0, 1), AggregationAborted), ((0, 1, 7), MessageError)):
        hospitals[3]._due = "confirm"
        server._links[3]._sent = (-1, 0)
        hospitals[3]._links[SERVER]._received = (0, masking.DELIVERY)
        with pytest.raises(error):
            hospitals[3].confirm(server._links[3].seal(masking.SURVIVORS, 0, pack_numbers(told)))


def test_the_transcript_holds_no_hospitals_values_and_would_show_them():
    transcript = Transcript()
    masks, values = MaskSum(4, 400, transcript=transcript), some_values(range(4), 400)
    masks.sum(0, range(4), {k: own for k, own in values.items() if k != 2})
    names = {name.split(": ")[1].split(" of ")[0] for name, _ in transcript.records}
    assert names == {f"message {kind}" for kind in (1, 3, 5, 7)} | {"seed", "key", "total"}
    assert not any(transcript.find_values(own) for own in values.values())
    assert sum(values[k] for k in (0, 1, 3)).tobytes() in holding(transcript)  # the total, as it should
    transcript.record("planted", b"head" + values[1].astype("<i4").tobytes())
    assert transcript.find_values(values[1])


def test_the_secrets_of_a_round_are_never_in_the_clear(monkeypatch):
    """The server sees no hospital's seed or key before it is to rebuild it, and no repr shows one."""
    drawn, real = [], mask_hospital.share
    monkeypatch.setattr(mask_hospital, "share", lambda secret, *rest: drawn.append(secret) or real(secret, *rest))
    transcript = Transcript()
    masks = MaskSum(4, D, transcript=transcript)
    steps(masks, 0, range(4), some_values(range(4)))
    assert len(drawn) == 8 and not any(secret in holding(transcript) for secret in drawn)
    for hospital in masks.hospitals:
        assert hospital._key is None and hospital._seed is None
        assert repr(hospital) == f"<MaskHospital {hospital.number}, d = {D}>"
    masks.server.total()
    assert sum(secret in holding(transcript) for secret in drawn) == 4  # the survivors' seeds, and no key


def test_a_card_shows_only_a_public_key_and_a_hash():
    masks = MaskSum(3, D)
    message = masks.hospitals[0].share(0, range(3))
    body = masks.server._links[0].open(masking.SHARES, 0, message)
    number, public, hashed = CARD.unpack(body[: CARD.size])
    hospital = masks.hospitals[0]
    assert number == 0 and public == hospital._key.public_key().public_bytes_raw()
    assert hashed == masking.seed_hash(hospital._seed) and hospital._seed not in body
    assert len(body) == CARD.size + 2 * masking.BOX_BYTES
