"""Sums by masks: exact, robust against dropouts, and closed to every message that is not as it should be."""

import hashlib
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_rounds import EDGE, D, some_values

from dopamine_lib.encryption import mask_hospital, masking
from dopamine_lib.encryption.codec import RangeError
from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.links import Handshake, Link
from dopamine_lib.encryption.masking import add_masks, pair_seed, threshold
from dopamine_lib.encryption.masks import MaskSum
from dopamine_lib.encryption.messages import SERVER, AggregationAborted, MessageError
from dopamine_lib.encryption.transcript import Transcript


def test_masks_cancel_and_blocks_of_keystream_join():
    rng = np.random.default_rng(1)
    seeds = [rng.bytes(32) for _ in range(3)]
    for d in (1, masking._CHUNK // 4, masking._CHUNK // 4 + 1, 40_000):
        total = np.zeros(d, np.uint32)
        add_masks(total, [(seed, True) for seed in seeds])
        assert d == 1 or len(np.unique(total)) > d * 0.99
        longer = np.zeros(d + 5, np.uint32)
        add_masks(longer, [(seed, True) for seed in seeds])
        assert (longer[:d] == total).all()
        add_masks(total, [(seed, False) for seed in seeds])
        assert not total.any()


def test_both_ends_agree_on_a_seed_and_every_round_has_its_own():
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    publics = [key.public_key().public_bytes_raw() for key in (one, two)]
    seeds = {pair_seed(one, publics[1], r, (0, 1)) for r in range(5)}
    assert seeds == {pair_seed(two, publics[0], r, (1, 0)) for r in range(5)} and len(seeds) == 5


def test_a_link_sends_nothing_twice_and_reads_nothing_twice():
    ours, theirs = Link(bytes(32), 0, 1), Link(bytes(32), 1, 0)
    first = ours.seal(1, 0, b"a", b"bound")
    assert len(first) == 28 and theirs.open(1, 0, first, b"bound") == b"a"
    for kind, round_number in ((1, 0), (0, 0)):
        with pytest.raises(MessageError, match="never sent again"):
            ours.seal(kind, round_number, b"b")
    with pytest.raises(MessageError, match="a replay"):
        theirs.open(1, 0, first, b"bound")
    second = ours.seal(2, 0, b"b", b"bound")
    with pytest.raises(MessageError, match="not authentic"):
        theirs.open(2, 0, second, b"other")
    with pytest.raises(MessageError, match="not number 2"):
        ours.open(2, 0, second, b"bound")  # sent back to its sender
    assert theirs.open(2, 0, second, b"bound") == b"b"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_total_is_exact_whichever_hospitals_drop_out(data):
    hospitals = data.draw(st.integers(2, 6))
    masks = MaskSum(hospitals, 3)
    limit = EDGE // hospitals
    for round_number in range(2):
        invited = sorted(data.draw(st.sets(st.integers(0, hospitals - 1), min_size=2)))
        needed = threshold(len(invited), 2)
        here = data.draw(st.sets(st.sampled_from(invited), min_size=needed))
        rows = st.lists(st.integers(-limit, limit), min_size=3, max_size=3)
        values = {i: np.array(data.draw(rows), np.int64) for i in here}
        total = masks.sum(round_number, invited, values)
        assert total.dtype == np.int64 and (total == sum(values.values())).all()


def test_totals_at_the_edge_are_exact():
    masks = MaskSum(3, 2)
    values = {0: np.array([EDGE, -EDGE]), 1: np.zeros(2, np.int64), 2: np.zeros(2, np.int64)}
    assert masks.sum(0, range(3), values).tolist() == [EDGE, -EDGE]
    assert masks.total_range == EDGE


def test_a_whole_round_of_many_values_with_dropouts():
    masks, values = MaskSum(10, 100_000, least=7), some_values(range(10), 100_000)
    assert (masks.sum(0, range(10), values) == sum(values.values())).all()
    for gone in (0, 4, 9):
        del values[gone]
    assert (masks.sum(1, range(10), values) == sum(values.values())).all()


@pytest.mark.parametrize("least, here", [(2, 3), (5, 4)])
def test_too_few_survivors_abort_the_round_and_nothing_is_opened(least, here):
    """Half of six is not enough even where ``least`` is lower: t is more than half."""
    transcript = Transcript()
    masks = MaskSum(6, D, least=least, transcript=transcript)
    with pytest.raises(AggregationAborted, match="nothing is opened"):
        masks.sum(0, range(6), some_values(range(here)))
    assert not [name for name, _ in transcript.records if "seed of" in name or "key of" in name or "total" in name]
    values = some_values(range(6))
    assert (masks.sum(1, range(6), values) == sum(values.values())).all()  # the session goes on


def test_a_round_that_was_begun_is_never_run_again():
    masks, values = MaskSum(4, D), some_values(range(4))
    with pytest.raises(AggregationAborted):
        masks.sum(5, range(4), some_values(range(2)))
    for number in (5, 4):
        with pytest.raises(MessageError, match="take a new round"):
            masks.sum(number, range(4), values)
        with pytest.raises(MessageError, match="spent"):
            masks.hospitals[0].share(number, range(4))
    assert (masks.sum(6, range(4), values) == sum(values.values())).all()


@pytest.mark.parametrize("invited, given_", [([0, 1], [0, 1, 2]), ([0, 1, 7], [0, 1]), ([0, 1, SERVER], [0, 1])])
def test_only_hospitals_of_the_session_that_are_invited_take_part(invited, given_):
    with pytest.raises((ValueError, IndexError), match="invite|range"):
        MaskSum(3, D).sum(0, invited, some_values(given_))


@pytest.mark.parametrize(
    "values, error",
    [
        (np.full(D, EDGE + 1), RangeError),
        (np.full(D, -EDGE - 1), RangeError),
        (np.zeros(D), ValueError),
        (np.zeros(D + 1, np.int64), ValueError),
    ],
)
def test_values_that_do_not_fit_are_refused(values, error):
    with pytest.raises(error, match="values? (is|are)|value 0"):
        MaskSum(3, D).sum(0, range(3), {**some_values(range(3)), 1: values})


@pytest.mark.parametrize("arguments", [(1, D), (3, D, 4), (3, D, 1), (3, 0)])
def test_sums_that_add_or_hide_nothing_are_refused(refuses, arguments):
    hospitals, d, *least = arguments
    with refuses("must lie in"):
        MaskSum(hospitals, d, least=least[0] if least else 2)


def tampered(message):
    """The same message cut off, with a bit flipped in ten places, and with two more bytes."""
    yield from (message[:-1], message[: len(message) // 2], message[:3], message + b"ab")
    for at in np.linspace(0, len(message) - 1, 10).astype(int):
        yield message[:at] + bytes([message[at] ^ 4]) + message[at + 1 :]


def test_no_changed_message_passes_in_any_step():
    masks, values = MaskSum(3, D), some_values(range(3))
    server, hospitals = masks.server, masks.hospitals

    def refused_by_server(message):
        for bad in tampered(message):
            with pytest.raises(MessageError):
                server.receive(bad)
        server.receive(message)
        with pytest.raises(MessageError):
            server.receive(message)  # a second time

    def refused_by_hospital(hospital, step, message, *more):
        for bad in tampered(message):
            hospital._due = step  # else the first refusal would end the round
            with pytest.raises(MessageError):
                getattr(hospital, step)(bad, *more)
        hospital._due = step
        return getattr(hospital, step)(message, *more)

    server.begin(0, range(3))
    for hospital in hospitals:
        refused_by_server(hospital.share(0, range(3)))
    for i, message in server.deliveries().items():
        refused_by_server(refused_by_hospital(hospitals[i], "mask", message, values[i]))
    for i, message in server.survivors().items():
        refused_by_server(refused_by_hospital(hospitals[i], "confirm", message))
    for i, message in server.confirmations().items():
        refused_by_server(refused_by_hospital(hospitals[i], "reveal", message))
    assert (server.total() == sum(values.values())).all()


def test_a_refused_message_ends_the_hospitals_round():
    masks = MaskSum(3, D)
    masks.server.begin(0, range(3))
    for hospital in masks.hospitals:
        masks.server.receive(hospital.share(0, range(3)))
    message = masks.server.deliveries()[0]
    for bad in (message[:-1], message):
        with pytest.raises(MessageError):
            masks.hospitals[0].mask(bad, np.zeros(D, np.int64))


@pytest.mark.parametrize("step", ["confirm", "reveal", "mask"])
def test_no_step_is_taken_before_its_time(step):
    """A hospital that has only shared, or not even that, refuses every other step, and its round is over."""
    masks = MaskSum(3, D)
    masks.hospitals[0].share(0, range(3))
    hospital = masks.hospitals[1 if step == "mask" else 0]
    more = [np.zeros(D, np.int64)] if step == "mask" else []
    with pytest.raises(MessageError, match="not due"):
        getattr(hospital, step)(b"", *more)
    with pytest.raises(MessageError, match="not due"):
        hospital.mask(b"", np.zeros(D, np.int64))


def test_messages_of_another_round_session_or_list_are_refused():
    masks, other = MaskSum(3, D), MaskSum(3, D)
    masks.server.begin(1, range(3))
    first = masks.hospitals[0].share(0, range(3))
    for stranger in (first, other.hospitals[0].share(1, range(3)), b""):
        with pytest.raises(MessageError):
            masks.server.receive(stranger)
    # hospitals with different lists of invited hospitals cannot read each other's shares
    for number, invited in ((0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0, 1, 2))):
        masks.server.receive(masks.hospitals[number].share(1, invited))
    masks.hospitals[0]._invited = (0, 1, 2, 3)
    with pytest.raises(MessageError, match="another list"):
        masks.hospitals[0].mask(masks.server.deliveries()[0], np.zeros(D, np.int64))


def test_a_session_needs_known_keys_and_fresh_hellos():
    masks = MaskSum(3, D)
    hellos = [party.hello() for party in (masks.server, *masks.hospitals)]
    stranger = b"\x09\x00" + bytes(32)
    for bad in ([*hellos, stranger], [*hellos, hellos[1]], hellos[2:], [hellos[0][:-1]], []):
        with pytest.raises(MessageError):
            masks.hospitals[0].join(bad)


@pytest.mark.parametrize("gone", [None, 2])
@pytest.mark.parametrize("damage", ["changed", "beyond the prime", "short"])
def test_a_wrong_share_is_noticed_and_its_holder_named(gone, damage):
    """It gives another secret: the hash of the seed, or the public key, does not fit. Enough others' will do."""
    masks, values = MaskSum(3, D, least=2), some_values(range(3))
    if gone is not None:
        del values[gone]
    masks.server.begin(0, range(3))
    for hospital in masks.hospitals:
        masks.server.receive(hospital.share(0, range(3)))
    for i, message in masks.server.deliveries().items():
        if i in values:
            masks.server.receive(masks.hospitals[i].mask(message, values[i]))
    for i, message in masks.server.survivors().items():
        masks.server.receive(masks.hospitals[i].confirm(message))
    key, seed = masks.hospitals[0]._held[2]
    wrong = {"changed": lambda s: bytes([0, *s[1:32], s[32] ^ 1]), "short": lambda s: s[1:]}
    change = wrong.get(damage, lambda s: b"\xff" * len(s))
    masks.hospitals[0]._held[2] = tuple(map(change, (key, seed)))
    for i, message in masks.server.confirmations().items():
        sent = masks.hospitals[i].reveal(message)
        if damage == "short" and i == 0:  # that is seen at once, and nothing of it used
            with pytest.raises(MessageError, match="hospital 0 sent"):
                masks.server.receive(sent)
        else:
            masks.server.receive(sent)
    if gone is None:
        assert (masks.server.total() == sum(values.values())).all()
        assert masks.server.liars == (set() if damage == "short" else {0})
    else:
        error, said = (AggregationAborted, "nothing") if damage == "short" else (MessageError, "hospital 2 give")
        with pytest.raises(error, match=said):
            masks.server.total()


@pytest.mark.parametrize("liars", [(0,), (0, 4), (1, 3)])
def test_a_round_goes_on_while_enough_shares_are_right(liars):
    masks, values = MaskSum(5, D), some_values(range(5))
    honest = {number: masks.hospitals[number].reveal for number in liars}

    def lie(number):
        def reveal(message):
            held = masks.hospitals[number]._held
            for i in held:
                held[i] = tuple((int.from_bytes(s) ^ 1).to_bytes(len(s)) for s in held[i])
            return honest[number](message)

        return reveal

    for number in liars:
        masks.hospitals[number].reveal = lie(number)
    assert (masks.sum(0, range(5), values) == sum(values.values())).all() and masks.server.liars == set(liars)


@pytest.mark.parametrize("point", [bytes(32), bytes([1, *[0] * 31])], ids=["zero", "one"])
def test_a_key_of_low_order_is_refused_and_its_sender_named(point):
    masks = MaskSum(3, D)
    masks.server.begin(0, range(3))

    class Low:
        def __init__(self, key):
            self.private_bytes_raw, self.exchange = key.private_bytes_raw, key.exchange

        def public_key(self):
            return SimpleNamespace(public_bytes_raw=lambda: point)

    for hospital in masks.hospitals:
        with pytest.MonkeyPatch.context() as patch:
            if hospital.number == 2:
                key = Low(X25519PrivateKey.generate())
                patch.setattr(mask_hospital, "X25519PrivateKey", SimpleNamespace(generate=lambda key=key: key))
            masks.server.receive(hospital.share(0, range(3)))
    for i, message in masks.server.deliveries().items():
        if i != 2:
            with pytest.raises(MessageError, match="hospital 2 in round 0: .* low order"):
                masks.hospitals[i].mask(message, np.zeros(D, np.int64))


def test_shares_of_another_length_are_refused_by_the_server_with_the_sender():
    masks = MaskSum(3, D)
    for round_number, body in enumerate((b"", bytes(10), bytes(66))):
        masks.server.begin(round_number, range(3))
        for hospital in masks.hospitals:
            message = hospital.share(round_number, range(3))
            if hospital.number == 1:
                hospital._links[SERVER]._sent = (-1, 0)
                message = hospital._links[SERVER].seal(masking.SHARES, round_number, body)
                with pytest.raises(MessageError, match="hospital 1 sent"):
                    masks.server.receive(message)
            else:
                masks.server.receive(message)
        assert sorted(masks.server.deliveries()) == [0, 2]  # of which the round may go on


def test_an_identity_that_is_stolen_later_opens_no_earlier_session():
    """The link's key needs a private key that was forgotten; without that (the fault put back) it would open."""
    one, two = Identity(), Identity()
    publics = {0: one.public, 1: two.public}
    ours, theirs = Handshake(0, one, publics), Handshake(1, two, publics)
    hellos = [ours.hello(), theirs.hello()]
    purpose = b"link " + b"".join(hellos)
    kept = [ours._own, theirs._own]
    sealed = ours.links(hellos)[1].seal(1, 0, b"a share")
    assert ours._own is None
    assert theirs.links(hellos)[0].open(1, 0, sealed) == b"a share"
    lasting, forgotten = one.agree(two.public, purpose), kept[0].agree(kept[1].public, purpose)
    for stolen in (lasting, hashlib.blake2b(lasting, digest_size=32).digest()):
        with pytest.raises(MessageError, match="not authentic"):
            Link(stolen, 1, 0).open(1, 0, sealed)
    key = hashlib.blake2b(lasting, key=forgotten, digest_size=32).digest()
    assert Link(key, 1, 0).open(1, 0, sealed) == b"a share"  # so nothing but the forgotten keys was missing
    with pytest.raises(MessageError, match="new session"):
        ours.links(hellos)


def test_two_names_with_one_key_and_hellos_of_low_order_are_refused(refuses):
    one, two = Identity(), Identity()
    with refuses("parties 1 and 2 have the same public key"):
        Handshake(0, one, {0: one.public, 1: two.public, 2: two.public})
    ours = Handshake(0, one, {0: one.public, 1: two.public})
    with pytest.raises(MessageError, match="party 1: .* low order"):
        ours.links([ours.hello(), b"\1\0" + bytes(32)])


def test_thresholds_are_more_than_half_and_at_least_least():
    for invited, least in itertools.product(range(2, 30), range(2, 12)):
        t = threshold(invited, least)
        assert 2 * t > invited and t >= least and t == max(least, invited // 2 + 1)


@pytest.mark.slow
def test_a_whole_training_of_the_head_takes_minutes_at_most():
    masks, values = MaskSum(10, 2565, least=7), some_values(range(10), 2565)
    total, start = sum(values.values()), time.process_time()
    for round_number in range(3001):
        assert (masks.sum(round_number, range(10), values) == total).all()
    assert time.process_time() - start < 300
