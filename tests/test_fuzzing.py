"""Every boundary at which bytes of others come in: what is damaged is refused by the boundary's own exception.

No traceback of another kind, no hang, and where a checksum, tag or signature can tell, nothing else than what was
written is ever taken. Each boundary is a function of a random generator that gives one try: damage, read, compare; it
returns whether the damage was refused.
"""

import contextlib
import io
import json
import random
import struct
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mutations import MUTATIONS, changed, changed_text, limited, mutated
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock

from dopamine_lib.data.cache import read_array, write_array
from dopamine_lib.data.images import prepare
from dopamine_lib.data.transfer import unpack_zip
from dopamine_lib.data.uploads import read_upload
from dopamine_lib.encryption import bfv_sum, links
from dopamine_lib.encryption.certificates import Credentials, read_certificate
from dopamine_lib.encryption.group import make_group, read_group
from dopamine_lib.encryption.masks import MaskSum
from dopamine_lib.encryption.messages import SERVER, AggregationAborted, MessageError
from dopamine_lib.errors import InputError
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.run_folder import read_record, write_record
from dopamine_lib.inference.network import serving
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.crypto_provider import CryptoProvider
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.network.serving import calibration_images
from dopamine_lib.inference.protocols.channel import ChannelError, local_pair
from dopamine_lib.inference.workers.client import _read_card
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint
from dopamine_lib.models.features import NormalisedFeatures
from dopamine_lib.models.networks import squeezenet
from dopamine_lib.models.weights import load_weights
from dopamine_lib.page.served_model import SERVED, facts
from dopamine_lib.report.verification import options_of, read_results

pytestmark = pytest.mark.slow
REFUSED = (MessageError, AggregationAborted, InputError)  # of encryption's messages


def tries(seed, one_try, refusals):
    """Run ``one_try(rng)`` often; returns how often the damage was refused."""
    rng, refused = random.Random(seed), 0
    for _ in range(MUTATIONS):
        with limited():
            try:
                one_try(rng)
            except refusals as error:
                refused += 1
                assert str(error) and "\n" not in str(error)
    return refused


def file_tries(seed, path, original, read, right=None, damage=mutated):
    """Damage the file at ``path``; what is read without a refusal must be ``right``, where a checksum can tell."""

    def one_try(rng):
        path.write_bytes(damage(rng, original))
        found = read(path)
        assert right is None or found == right

    return tries(seed, one_try, InputError)


# --- encryption ------------------------------------------------------------------------------------------

STEPS = ("share", "delivery", "masked", "survivors", "vouch", "vouched", "reveal")


def mask_round(masks, number, values, hook):
    """A round of all hospitals, in which ``hook(step, hospital, message)`` is what arrives of each message."""
    server, hospitals, everybody = masks.server, masks.hospitals, range(len(masks.hospitals))
    server.begin(number, everybody)
    for i in everybody:
        server.receive(hook("share", i, hospitals[i].share(number, everybody)))
    for i, told in server.deliveries().items():
        server.receive(hook("masked", i, hospitals[i].mask(hook("delivery", i, told), values[i])))
    for i, told in server.survivors().items():
        server.receive(hook("vouch", i, hospitals[i].confirm(hook("survivors", i, told))))
    for i, told in server.confirmations().items():
        server.receive(hook("reveal", i, hospitals[i].reveal(hook("vouched", i, told))))
    return server.total()


def mask_try(values, old):
    def one_try(rng):
        masks, where, seen = MaskSum(5, 9), (rng.choice(STEPS), rng.randrange(5)), []

        def hook(step, i, message):
            seen.append(message)
            return mutated(rng, message, old + seen) if (step, i) == where else message

        total = mask_round(masks, 0, values, hook)
        old[:] = (old + seen)[-60:]
        assert (total == sum(values.values())).all()

    return one_try


def test_messages_of_masks_changed_on_the_way():
    values = {k: np.random.default_rng(k).integers(-99, 99, 9) for k in range(5)}
    assert tries(1, mask_try(values, []), REFUSED) > MUTATIONS / 2


def test_messages_of_masks_that_a_party_with_the_right_keys_spoils(monkeypatch):
    """It can spoil the total, which nothing can tell; nobody falls over it."""
    values, sound = {k: np.random.default_rng(k).integers(-99, 99, 9) for k in range(5)}, links.Link.seal

    def one_try(rng):
        kind, who, downwards = rng.randrange(1, 8), rng.randrange(5), rng.random() < 0.5

        def seal(link, sent, round_number, body, bound=b""):
            ends = (SERVER, who) if downwards else (who, SERVER)
            body = mutated(rng, body, [body]) if (sent, link._own, link._peer) == (kind, *ends) else body
            return sound(link, sent, round_number, body, bound)

        with monkeypatch.context() as patch:
            patch.setattr(links.Link, "seal", seal)
            mask_round(MaskSum(5, 9), 0, values, lambda step, i, message: message)

    assert tries(2, one_try, REFUSED) > MUTATIONS / 10


@pytest.mark.parametrize("inside", [False, True], ids=["on the way", "within a hospital's own seal"])
def test_messages_of_bfv(inside, monkeypatch):
    d, old = 300, []
    hospitals, server = bfv_sum.set_up(4, d)
    values = {k: np.random.default_rng(k).integers(-900, 900, d) for k in range(4)}
    rounds, encrypt = iter(range(10**6)), hospitals[2].group.encrypt

    def one_try(rng):
        number, up = next(rounds), rng.random() < 0.5
        server.begin(number)
        for k, hospital in enumerate(hospitals):
            if inside and k == 2:
                hospital.group.encrypt = lambda slots: mutated(rng, encrypt(slots)) or b"\0"
            message = hospital.message(number, values[k])
            old[:] = [*old, message][-20:]
            server.add(mutated(rng, message, old) if k == 2 and up and not inside else message)
        aggregate = bytes(server.aggregate())
        old[:] = [*old, aggregate][-20:]
        told = aggregate if up or inside else mutated(rng, aggregate, old)
        assert all((hospital.open(number, told).total == sum(values.values())).all() for hospital in hospitals)

    assert tries(3, one_try, REFUSED) > MUTATIONS / 2


@pytest.mark.parametrize("form", ["server_bytes", "hospital_bytes"])
def test_a_groups_keys(form):
    group, other = make_group("packed", 3, 300), make_group("packed", 5, 20)
    forms = {getattr(one, form)() for one in (group, other)}

    def one_try(rng):
        original = getattr(group, form)()
        found = read_group(mutated(rng, original, sorted(forms)))
        assert getattr(found, form)() in forms

    assert tries(4, one_try, MessageError) > MUTATIONS / 2


# --- private inference -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU6()
    layers = *layers, BasicBlock(6, 6), nn.ReLU()
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormalisedFeatures(), nn.Linear(6, 5)
    return compile_model(nn.Sequential(*layers, *end).eval(), 17, torch.rand(8, 3, 17, 17), (0.5,) * 3, (0.5,) * 3)[0]


def test_frames_of_a_channel():
    """Bytes of the payload itself are TLS's to protect."""
    data = np.arange(50, dtype=np.uint32)
    frame = struct.pack("<II", 7, data.nbytes) + data.tobytes()

    def one_try(rng):
        one, two = local_pair(1.0)
        sent, found = mutated(rng, frame, [frame]), np.zeros(50, np.uint32)
        try:
            one._sock.sendall(sent)
            one._sock.shutdown(1)
            two.receive(7, found)
        finally:
            one.close(), two.close()
        assert sent[:8] == frame[:8] and found.tobytes() == sent[8 : 8 + data.nbytes]

    assert tries(5, one_try, ChannelError) > MUTATIONS / 4


def test_plans(plan):
    """A plan that is taken can be dealt for, within bounds."""

    def one_try(rng):
        found = Plan.from_json(changed_text(rng, plan.to_json()))
        if sum(found.costs().values()) < 2**26:
            for _ in CryptoProvider(found).deal():
                pass

    assert tries(6, one_try, InputError) > MUTATIONS / 2


def test_cards(plan):
    card = json.dumps({"plan": plan.to_json(), "grades": list("abcde"), "inputs": None, "thresholds": {"c": 1.5}})

    def one_try(rng):
        found, grades, *_ = _read_card(changed_text(rng, card))
        assert len(grades) == found.classes

    assert tries(7, one_try, ChannelError) > MUTATIONS / 2


def test_credentials_and_certificates(tmp_path):
    path = tmp_path / "patient.pem"
    made = Credentials.at(path, "patient")
    original, certificate = path.read_bytes(), made.certificate.encode()

    def read(file):
        found = Credentials.at(file, "patient")
        return found.key != made.key or bool(found.fingerprint)

    assert file_tries(8, path, original, read, True) > MUTATIONS / 4
    assert file_tries(9, tmp_path / "a.crt", certificate, lambda file: bool(read_certificate(file)), True) > 30


# --- files -----------------------------------------------------------------------------------------------


def header_changed(rng, data):
    """A safetensors file with a value of its metadata changed, or any byte."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if rng.random() < 0.3:
        return mutated(rng, data)
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    with contextlib.suppress(ValueError):  # a checksum is text
        metadata[key] = json.loads(metadata[key])
    value = json.dumps(changed(rng, metadata[key]))
    metadata[key] = value if rng.random() < 0.9 else rng.choice(("", "{", "nan", "[" * 50_000))
    text = json.dumps(header if rng.random() < 0.9 else changed(rng, header)).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def test_headers_of_models(tmp_path):
    assert file_tries(10, tmp_path / "m.safetensors", SERVED.read_bytes(), facts, damage=header_changed) > 30


def test_models(tmp_path, monkeypatch):
    """As the provider loads them, up to the compilation, which asks for nothing more of the file."""
    images = calibration_images(32)[:1]
    monkeypatch.setattr(serving, "calibration_images", lambda size: images)
    monkeypatch.setattr(serving, "compile_model", lambda net, size, x, *rest: (net(x), None))

    def read(path):
        logits, _, grades = serving.load(path)
        assert logits.shape == (1, len(grades))

    assert file_tries(11, tmp_path / "m.safetensors", SERVED.read_bytes(), read, damage=header_changed) > 30


@pytest.mark.parametrize("kind", ["npz", "pth", "safetensors"])
def test_weights(tmp_path, kind):
    state, path = squeezenet(5).state_dict(), tmp_path / f"weights.{kind}"
    if kind == "npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    elif kind == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    assert file_tries(12, path, path.read_bytes(), lambda path: load_weights(path) and None) > MUTATIONS / 10


RECORD = {"server_steps": 3, "charged": [5, 4], "epoch": 1, "reserved": 2, "aborted": 0, "history": [{"epoch": 1}]}


def test_checkpoints(tmp_path):
    path, vectors = tmp_path / "c.safetensors", {key: torch.arange(4.0) for key in ("w", "velocity", "mean")}
    save_checkpoint(path, SimpleNamespace(state=lambda: (vectors, RECORD)))

    def read(path):
        taken = []
        load_checkpoint(path, SimpleNamespace(restore=lambda *state: taken.append(state)))
        ((found, record),) = taken
        return record == RECORD and all(torch.equal(found[key], vectors[key]) for key in vectors | found)

    assert file_tries(13, path, path.read_bytes(), read, True, header_changed) > MUTATIONS / 2


def test_ledgers_and_records(tmp_path):
    write_record(tmp_path / "r.json", RECORD)
    original = (tmp_path / "r.json").read_bytes()

    def damage(rng, data):
        return changed_text(rng, data.decode()).encode(errors="surrogateescape")

    assert file_tries(14, tmp_path / "r.json", original, read_record, RECORD, damage=damage) > MUTATIONS / 2


def test_results(tmp_path):
    """What the report reads first; that the numbers agree is ``verify``'s to say."""
    results = {"options": Options().record(), "settings": {"FSCDP": {"epsilon": 1.0}}, "hospitals": [9] * 10}
    results |= {"weights": "w", "weights_sha256": "0", "patients": {"train": 90, "test": 9}, "data": "synthetic"}
    results |= {"model": "head", "delta": 1e-4, "randomness": "operating system"}
    original = json.dumps(results).encode()
    options_of(results)

    def damage(rng, data):
        return changed_text(rng, data.decode()).encode(errors="surrogateescape")

    def read(path):
        options_of(read_results(path)[0])

    assert file_tries(18, tmp_path / "results.json", original, read, damage=damage) > MUTATIONS / 4


def test_caches(tmp_path):
    path, values = tmp_path / "array.npy", np.random.default_rng(0).normal(size=(20, 5)).astype("<f4")
    write_array(path, values.shape, "<f4", [values])
    original = path.read_bytes()

    def one_try(rng):
        path.write_bytes(mutated(rng, original))
        found = read_array(path, values.shape, "<f4")
        assert found is None or (found == values).all()

    assert tries(15, one_try, ()) == 0


def uploads():
    rng = np.random.default_rng(0)
    image, files = Image.fromarray(rng.integers(0, 255, (60, 70, 3), np.uint8)), []
    kinds = [("PNG", mode, {}) for mode in ("RGB", "RGBA", "P", "L")]
    kinds += [("JPEG", mode, {}) for mode in ("RGB", "CMYK", "L")] + [("JPEG", "RGB", {"progressive": True})]
    for kind, mode, options in kinds:
        image.convert(mode).save(file := io.BytesIO(), kind, **options)
        files.append(file.getvalue())
    return files


@pytest.mark.filterwarnings("ignore")
def test_uploads():
    files = uploads()

    def one_try(rng):
        pixels = prepare(read_upload(mutated(rng, rng.choice(files), files), "eye"), 64)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8

    assert tries(16, one_try, InputError) > MUTATIONS / 4


def test_archives(tmp_path):
    with zipfile.ZipFile(made := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        contents = {"train.csv": b"id,grade", "train_images/a.png": bytes(300), "train_images/b.png": b"b" * 50}
        for name, content in contents.items():
            archive.writestr(name, content)
    file, target, original = tmp_path / "a.zip", tmp_path / "out", made.getvalue()

    def read(path):
        for old in target.rglob("*.*"):
            old.unlink()
        for old in sorted(target.rglob("*"), reverse=True):
            old.rmdir()
        try:
            unpack_zip(path, target, prefix="train", max_bytes=10**6, max_files=100)
        finally:
            assert {entry.name for entry in tmp_path.iterdir()} <= {"a.zip", "out"}
        for entry in target.rglob("*"):
            assert not entry.is_symlink() and target in entry.resolve().parents
            assert entry.is_dir() or entry.read_bytes() in contents.values()  # CRC-32

    assert file_tries(17, file, original, read) > MUTATIONS / 4
