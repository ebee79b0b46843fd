"""Delivery by syft: a message reaches its reader, unchanged and in order, and nobody else; and a query by this way."""

import os
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import dopamine_lib.inference.workers
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.crypto_provider import CryptoProvider
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.plan import ANSWER, MODEL
from dopamine_lib.inference.network.rehearsal import at_once
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import ChannelError, local_pair
from dopamine_lib.inference.protocols.operation import TAGS
from dopamine_lib.models.networks import HALF, to_input

syft_delivery = pytest.importorskip("dopamine_lib.inference.workers.syft_delivery")

TAG = 7
CHAPTER = Path(__file__).parent.parent / "notebooks" / "06_private_inference.ipynb"


@pytest.fixture
def three():
    """A drive with three workers and a stranger whom the crypto-provider approved but allows nothing."""
    with syft_delivery.Drive() as drive:
        yield drive, *joined(drive)


def joined(drive):
    patient, provider, third, stranger = map(drive.join, ("patient", "provider", "crypto-provider", "stranger"))
    for one, other in ((patient, provider), (patient, third), (provider, third), (stranger, third)):
        syft_delivery.introduce(one, other)
    for one, other in ((patient, provider), (provider, patient), (third, patient), (third, provider)):
        one.allow(other)
    return patient, provider, third, stranger


def test_messages_arrive_in_order_for_their_reader_only(three):
    drive, patient, provider, third, stranger = three
    for reader, size in ((patient, 16), (provider, 16), (patient, 0), (patient, 1000)):
        message = os.urandom(size)
        third.send(reader, TAG, message)
        assert reader.receive(third, TAG) == message
    assert [name.split("/")[1] for name in patient.files] == ["to_patient"] * 3
    stranger.synchronise()
    assert stranger.files == []
    with pytest.raises(ChannelError, match="nothing for stranger from crypto-provider"):
        stranger.receive(third, TAG, timeout=0.1)
    third.allow(stranger)  # the same stranger, once allowed: the test can fail
    third.send(stranger, TAG, b"now")
    assert stranger.receive(third, TAG) == b"now"
    assert not any("to_patient" in name for name in stranger.files)


def test_a_long_message_goes_in_parts(three):
    _, _, provider, third, _ = three
    message = os.urandom(2 * syft_delivery.MAX_BYTES + 5)
    third.send(provider, TAG, message)
    assert len(provider.files) == 0 and provider.receive(third, TAG) == message
    assert len(provider.files) == 3


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_drives_owner_reads_nothing(encrypted):
    """And with encryption off, syft's default, it reads everything, wherever the secret stands."""
    with syft_delivery.Drive(encrypted) as drive:
        patient, _, third, _ = joined(drive)
        for length in (16, 17, 18):
            secret = os.urandom(length)
            third.send(patient, TAG, secret)
            assert patient.receive(third, TAG) == secret
            assert drive.shows(secret) != encrypted
            assert not drive.shows(os.urandom(length))


def test_an_old_message_is_not_taken_again(three):
    """Nor another's, a part too few, or rubbish: each is put where the next message is due."""
    drive, patient, provider, third, _ = three
    third.send(patient, TAG, b"first")
    third.send(provider, TAG, b"not for the patient")
    third.send(provider, TAG, b"nor this")
    assert patient.receive(third, TAG) == b"first"
    old = next(drive.folder.glob("patient/crypto-provider@*/to_patient/*.bin"))
    theirs = sorted(drive.folder.glob("crypto-provider/crypto-provider@*/to_provider/*.bin"))[1]
    due = old.with_name("000001-000.bin")
    for content in (old.read_bytes(), theirs.read_bytes(), b"", b"rubbish" * 9):
        due.write_bytes(content)
        with pytest.raises(ChannelError, match="another message than number 1, tag 7"):
            patient.receive(third, TAG)
    due.unlink()
    third.send(patient, TAG, b"second")
    with pytest.raises(ChannelError, match="tag 8"):
        patient.receive(third, TAG + 1)
    assert patient.receive(third, TAG) == b"second"


def test_refusals(three, refuses):
    _, patient, _, _, stranger = three
    with refuses("patient has no folder that stranger may read", "call allow first"):
        patient.send(stranger, TAG, b"x")
    assert repr(patient) == "Peer('patient')"


def test_a_message_of_another_size_is_refused(three):
    _, patient, provider, _, _ = three
    provider.send(patient, MODEL, b"12345678")
    with pytest.raises(ChannelError, match="sent 8 bytes where 4 are due"):
        syft_delivery.ByPost(None, patient, provider, [MODEL]).receive(MODEL, np.empty(1, np.uint32))


def test_a_query_whose_shares_go_by_syft(three, monkeypatch, capsys):
    """Seeds, masked model, image's share and answer's share by syft, the rounds by a channel; nothing is printed."""
    monkeypatch.setattr(kernels, "active", lambda: kernels)
    _, patient, provider, third, _ = three
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    images = np.random.default_rng(2).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    plan, weights = compile_model(net.requires_grad_(False), 8, to_input(images, *HALF), *HALF)
    crypto_provider = CryptoProvider(plan)
    third.send(patient, TAG, crypto_provider.patient_seed)
    third.send(provider, TAG, crypto_provider.provider_seed)
    tags = (MODEL, TAGS * plan.weighted[0], ANSWER)
    (to_provider, to_patient), (offline, dealt) = local_pair(), local_pair()
    one = Patient(plan, patient.receive(third, TAG), syft_delivery.ByPost(to_provider, patient, provider, tags))
    other = Provider(
        plan, weights, provider.receive(third, TAG), syft_delivery.ByPost(to_patient, provider, patient, tags)
    )
    at_once(one.setup, other.setup)
    at_once(one.prepare, lambda: other.prepare(offline), lambda: crypto_provider.send(dealt))
    logits = at_once(lambda: one.infer(plan.to_input(images[0])), other.serve)[0]
    assert np.allclose(logits, net(to_input(images[:1], *HALF)).numpy()[0], atol=1e-2)
    posted = {name for name in patient.files if name.startswith("provider@")}
    assert len(posted) == 2 + 1  # two masked layers and the answer's share
    assert capsys.readouterr().out == ""
    for channel in (to_provider, to_patient, offline, dealt):
        channel.close()


def test_nothing_stays_on_the_disk():
    with syft_delivery.Drive() as drive:
        drive.join("patient")
        assert list(drive.folder.rglob("crypto_keys.json"))
    assert not drive.folder.exists()


def test_the_chapter_goes_on_without_syft(monkeypatch, capsys):
    """Its cells about syft, run where syft cannot be imported: one sentence, and no error."""
    monkeypatch.delitem(sys.modules, "dopamine_lib.inference.workers.syft_delivery")
    monkeypatch.delattr(dopamine_lib.inference.workers, "syft_delivery")
    monkeypatch.setitem(sys.modules, "syft.sync.connections.drive.gdrive_transport", None)
    code = [cell.source for cell in nbformat.read(CHAPTER, 4).cells if cell.cell_type == "code"]
    about_syft = [source for source in code if "syft_delivery" in source]
    assert len(about_syft) == 2
    names = {}
    for source in about_syft:
        exec(source, names)
    said = capsys.readouterr().out
    assert said.startswith("syft cannot be imported here") and len(said.splitlines()) == 1
