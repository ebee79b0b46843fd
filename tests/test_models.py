"""Models and their starting weights: shapes, sources, and files that are refused."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dopamine_lib.files import EMBEDDED, IMAGENET_FILE
from dopamine_lib.models import features, networks
from dopamine_lib.models.features import extract_features
from dopamine_lib.models.networks import HALF, IMAGENET, build, squeezenet
from dopamine_lib.models.weights import load_weights

BACKBONE = {key: value for key, value in squeezenet(5).state_dict().items() if key.startswith("features.")}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)


def test_the_embedded_weights_are_small_and_complete():
    weights = load_weights()
    assert EMBEDDED.stat().st_size <= 1.6e6
    assert set(BACKBONE) <= set(weights.state) and weights.source.startswith("embedded")
    assert (weights.mean, weights.std) == HALF and len(weights.sha256) == 64


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_a_file_of_torchvisions_keys_is_read(tmp_path, suffix):
    path = tmp_path / f"own{suffix}"
    if suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in BACKBONE.items()})
    elif suffix == ".pth":
        torch.save(BACKBONE, path)
    else:
        save_file(BACKBONE, path)
    weights = load_weights(path)
    assert weights.source == f"file: own{suffix}" and (weights.mean, weights.std) == IMAGENET
    assert torch.equal(weights.state["features.0.weight"], BACKBONE["features.0.weight"])
    net = build("squeezenet", 5, weights, 0)
    assert torch.equal(net.features[0].weight, BACKBONE["features.0.weight"])


class Hostile:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (open, ("hostile-was-run", "w"))


def test_a_hostile_pickle_is_not_run(tmp_path, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Hostile()}, tmp_path / "hostile.pth")
    with refuses("hostile.pth", "cannot be read"):
        load_weights(tmp_path / "hostile.pth")
    assert not (tmp_path / "hostile-was-run").exists()


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("none.npz", None, "does not exist"),
        ("torn.npz", b"PK\x03\x04torn", "cannot be read"),
        ("torn.pth", b"torn", "cannot be read"),
        ("torn.safetensors", b"torn", "cannot be read"),
        ("notes.txt", b"hello", "ends in '.txt'"),
    ],
)
def test_unreadable_weights_are_refused(tmp_path, refuses, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refuses(name, said):
        load_weights(tmp_path / name)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"features.0.weight": None}, "has no 'features.0.weight'"),
        ({"features.0.weight": torch.zeros(64, 3, 5, 5)}, "has shape (64, 3, 5, 5)"),
        ({"features.0.bias": torch.full((64,), float("nan"))}, "not finite"),
    ],
)
def test_unfitting_weights_are_refused(tmp_path, refuses, change, said):
    state = {key: value for key, value in (BACKBONE | change).items() if value is not None}
    save_file(state, tmp_path / "w.safetensors")
    with refuses("w.safetensors", said):
        load_weights(tmp_path / "w.safetensors")


def test_torchvisions_checkpoint_is_never_downloaded(tmp_path, refuses, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with refuses("squeezenet1_1-b8a52dc0.pth", "download"):
        load_weights("imagenet")


def test_a_damaged_torchvision_checkpoint_is_refused(tmp_path, refuses, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(BACKBONE, tmp_path / "hub" / "checkpoints" / IMAGENET_FILE)
    with refuses("is damaged"):
        load_weights("imagenet")


def test_features_are_normalised_image_by_image(images):
    weights = load_weights("random")
    features = extract_features(weights, images, progress=False)
    assert features.shape == (6, 512) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(6), atol=1e-5)
    assert torch.allclose(features.mean(1), torch.zeros(6), atol=1e-6)
    # other images change nothing
    alone = extract_features(weights, images[2:3], progress=False)
    assert torch.allclose(alone[0], features[2], atol=1e-5)


def test_features_are_cached_by_content(images, monkeypatch):
    weights = load_weights("random")
    first = extract_features(weights, images, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(features, "backbone", lambda *_: pytest.fail("extracted again"))
        assert torch.equal(extract_features(weights, images.copy(), progress=False), first)
    changed = images.copy()
    changed[0] //= 2
    assert not torch.equal(extract_features(weights, changed, progress=False)[0], first[0])
    assert not torch.equal(extract_features(weights, images, seed=1, progress=False), first)


@pytest.mark.parametrize("model", ["head", "cnn", "squeezenet"])
def test_initial_weights_follow_the_seed_and_leave_torchs_alone(model):
    weights = load_weights("random")
    before = torch.random.get_rng_state()
    one, other = (build(model, 5, weights, 3) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_networks_built_at_once_have_the_weights_of_their_own_seeds(monkeypatch):
    """Parties of one process build theirs in threads, and PyTorch has one generator for all of them."""
    alone, sound = build("cnn", 5, None, seed=3), networks._network
    other = threading.Thread(target=build, args=("cnn", 5, None, 4))

    seeded, built = threading.Event(), threading.Event()

    def interrupted(*arguments):
        if threading.current_thread() is other:
            seeded.set()
            built.wait(10)
        else:
            other.start()
            seeded.wait(0.5)  # which does not come, if the other has to wait
        return sound(*arguments)

    monkeypatch.setattr(networks, "_network", interrupted)
    at_once = build("cnn", 5, None, seed=3)
    built.set()
    other.join()
    assert all(torch.equal(one, two) for one, two in zip(alone.parameters(), at_once.parameters(), strict=True))


@pytest.mark.parametrize("model", networks.MODELS)
def test_the_parameters_of_a_model_are_counted_without_drawing_any(model, refuses):
    before = torch.random.get_rng_state()
    counted = networks.parameter_count(model, 7, inputs=29)
    assert torch.equal(before, torch.random.get_rng_state())
    assert counted == sum(p.numel() for p in build(model, 7, load_weights("random"), 0, inputs=29).parameters())
    with refuses("model 'vgg'", "squeezenet"):
        networks.parameter_count("vgg", 7)


@pytest.mark.parametrize("model, size", [("cnn", 16), ("cnn", 28), ("squeezenet", 17), ("squeezenet", 64)])
def test_models_take_the_sizes_they_say(model, size):
    net = build(model, 5, load_weights("random"), 0)
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_an_unknown_model_is_refused(refuses):
    with refuses("model 'vgg'", "squeezenet"):
        build("vgg", 5, None, 0)
