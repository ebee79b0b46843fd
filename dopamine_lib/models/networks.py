"""The models of the kit, their starting weights and anybody's, and the frozen features of the ``head``.

``squeezenet``  torchvision's SqueezeNet-1.1 with a 512 -> 5 classifier: 725,061 parameters (paper, section 4.2)
``cnn``         a small convolutional network for 28-pixel images
``head``        a linear layer on SqueezeNet's frozen features, extracted once: 2,565 parameters
``linear``, ``mlp``  of a table's rows: ``models.tables``
others          torchvision's by name, and ``module:function``: ``architectures``

No model that is trained uses batch normalisation: statistics over other patients would carry their data past the
privacy bound. Features are normalised image by image for the same reason.
"""

import contextlib
import hashlib
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.data.function import is_function
from dopamine_lib.errors import InputError
from dopamine_lib.files import EMBEDDED, IMAGENET_FILE
from dopamine_lib.machine import check_torch
from dopamine_lib.models.architectures import (
    feature_count,
    feature_network,
    imagenet_file,
    make,
    torchvision_models,
)
from dopamine_lib.models.tables import TABLE_MODELS
from dopamine_lib.progress import progress_bar

MODELS = ("head", "cnn", "squeezenet", *TABLE_MODELS)
CPU = torch.device("cpu")
FEATURES = 512
BATCH = 64  # images in one pass of the backbone
MAX_WEIGHTS = 4 * 2**30  # bytes of a weights file, unpacked
IMAGENET_URL = "https://download.pytorch.org/models/"

#: A value each for red, green and blue.
Channels = tuple[float, float, float]
#: Means and standard deviations with which inputs are normalised.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Weights:
    """Starting weights of a network: their origin, their tensors and the input normalisation they were trained with.

    state    keyed like the network's state dict (``features.0.weight`` …), and empty for a random start
    network  that they are for, under a ``head``: SqueezeNet or one of torchvision's
    """

    source: str
    sha256: str | None
    state: dict[str, torch.Tensor]
    mean: Channels
    std: Channels
    network: str = "squeezenet"

    @property
    def features(self) -> int:
        """p, the features that the network gives to a ``head``."""
        return FEATURES if self.network == "squeezenet" else feature_count(self.network)


def squeezenet(classes: int = 5) -> nn.Sequential:
    """SqueezeNet-1.1 for (B, 3, H, W) inputs of at least 17 pixels, without in-place ReLU and without dropout.

    Hooks and vmap need the ReLU's input, and dropout would add randomness that a resumed run cannot repeat.
    """
    from torchvision.models import squeezenet1_1

    net = squeezenet1_1(weights=None, num_classes=classes, dropout=0.0)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net


def cnn(classes: int = 5) -> nn.Sequential:
    """A small CNN for (B, 3, H, W) inputs of 16 or more pixels: two convolutions, pooling to 4x4, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a ``.npz``, ``.pth``/``.pt`` or ``.safetensors`` file, without unpickling objects.

    Raises InputError for a file that is missing, unreadable or of another kind.
    """
    path, kind = Path(path), Path(path).suffix.lower()
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist; give a .npz, .pth or .safetensors file")
    _check_size(path)
    try:
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: torch.from_numpy(file[key]) for key in file.files}, {}
        if kind in (".pth", ".pt"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, {}
        if kind == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except Exception as error:  # every reader has its own exceptions for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"weights file {path} cannot be read ({reason}); download or make it again") from error
    raise InputError(f"weights file {path} ends in '{path.suffix}'; .npz, .pth and .safetensors are understood")


def _check_size(path: Path) -> None:
    """Raise InputError for a file that holds, or unpacks to, more than any network of this kit."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):  # .npz and .pth are archives, of which 100 kB may unfold to gigabytes
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # damaged: its reader says so
            size = max(size, sum(member.file_size for member in archive.infolist()))
    if size > MAX_WEIGHTS:
        raise InputError(
            f"weights file {path} holds {size:,} bytes, but at most {MAX_WEIGHTS:,} are read; give the "
            "network's weights alone"
        )


def check_model(model: str) -> None:
    """Raise InputError unless ``model`` is one of the kit's or torchvision's, or ``module:function``."""
    if model not in MODELS and not is_function(model) and model not in torchvision_models():
        raise InputError(
            f"model '{model}' is unknown; choose one of {', '.join(MODELS)}, a network of torchvision's (resnet18, "
            "mobilenet_v3_small, efficientnet_b0, …) or a function of yours as module:function"
        )


def load_weights(source: str | Path | None = None, model: str = "squeezenet", size: int | None = None) -> Weights:
    """The starting weights of a model: a file, ``"imagenet"``, ``"random"``, or None for the embedded ones.

    size  as in ``build``
    Embedded are SqueezeNet's, for ``squeezenet`` and ``head``; for other models None is a random start, and for a
    ``module:function``, like ``"random"``, whatever that makes of it.
    ``"imagenet"`` is torchvision's checkpoint, which must already be in torch's hub directory: nothing is downloaded.
    Raises InputError for a file that is missing, damaged, or not keyed and shaped like the network.
    """
    network = "squeezenet" if model == "head" else model
    if source == "random" or (source is None and network != "squeezenet"):
        start = f"as {network} makes it" if is_function(network) else "random start"
        return Weights(start, None, {}, *HALF, network)
    if source is None:  # it needs no check, and so no torchvision, which takes 100 MB in every process
        state, _ = read_state(EMBEDDED)
        name = "embedded: SqueezeNet-1.1 trained by this kit on public synthetic patients"
        return Weights(name, _sha256(EMBEDDED), {key: value.float() for key, value in state.items()}, *HALF)
    return _from_file(source, network, _shaped(network, 5, size=size))


def load_backbone(backbone: str) -> Weights:
    """The weights of a network under a ``head``, from ``NAME:FILE``: one of torchvision's, and as in ``load_weights``.

    Raises InputError where ``load_weights`` does, and for a name without a file.
    """
    network, _, source = backbone.partition(":")
    if not source:
        raise InputError(f"backbone '{backbone}' names no weights; give them as in resnet50:FILE")
    weights = _from_file(source, network, feature_network(network))
    return replace(weights, source=f"{network}, {weights.source}")


def _from_file(source: str | Path, network: str, net: nn.Module) -> Weights:
    """The weights of a file for ``net``, which is called ``network``: those of all layers but the last."""
    path, published = Path(source), str(source) == "imagenet"
    if published:
        file = IMAGENET_FILE if network == "squeezenet" else imagenet_file(network)
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        if not path.is_file():
            raise InputError(f"torchvision's checkpoint is not at {path}; download {IMAGENET_URL}{file} to there")
    state, metadata = read_state(path)
    state = _checked({key: value.float() for key, value in state.items()}, path, network, net)
    sha256 = _sha256(path)
    if published and not sha256.startswith(path.stem[-8:]):
        raise InputError(f"{path} is damaged: its SHA-256 does not begin with {path.stem[-8:]}; download it again")
    normalise = HALF if "mean 0.5 std 0.5" in metadata.get("preprocessing", "").replace(",", "") else IMAGENET
    name = f"torchvision's ImageNet checkpoint ({path.name})" if published else f"file: {path.name}"
    return Weights(name, sha256, state, *normalise, network)


def _checked(state: dict[str, torch.Tensor], path: Path, network: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a weights file that the net has. Raises InputError unless all but the last layer's are there."""
    reference, own = net.state_dict(), "squeezenet1_1" if network == "squeezenet" else network
    last = [name for name, _ in net.named_parameters()][-1].rpartition(".")[0] + "."
    state = {key: value for key, value in state.items() if key in reference and not key.endswith("num_batches_tracked")}
    for key, value in reference.items():
        if key.startswith(last) or key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise InputError(f"weights file {path} has no '{key}'; its keys must be those of torchvision's {own}")
        if value.shape != state[key].shape:
            raise InputError(
                f"weights file {path}: '{key}' has shape {tuple(state[key].shape)}, {own} needs {tuple(value.shape)}"
            )
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise InputError(f"weights file {path}: '{key}' holds values that are not finite")
    return state


#: PyTorch has one generator for all threads, and parties of one process (``federation.wires.threads``) build at once.
_ONE_GENERATOR = threading.RLock()


@contextlib.contextmanager
def _draws(seed: int) -> Iterator[None]:
    """Torch's generator seeded, and afterwards as it was; one thread at a time."""
    with _ONE_GENERATOR:
        before = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.random.set_rng_state(before)


def build(
    model: str, classes: int, weights: Weights | None, seed: int, inputs: int = 0, size: int | None = None
) -> nn.Module:
    """``model`` with a seeded initialisation, and with ``weights`` wherever the shapes agree; None for none.

    inputs  numbers in a row, for a model of tables
    size    side of an image in pixels, for a ``module:function`` that takes it
    Raises InputError for an unknown model, and where PyTorch's defaults were changed (``check_torch``).
    """
    check_torch()
    check_model(model)
    with _draws(seed):
        if model == "head":
            net = nn.Linear(weights.features if weights else FEATURES, classes)
            nn.init.zeros_(net.weight)
            nn.init.zeros_(net.bias)
            return net
        net = _network(model, classes, inputs, size)
        own = net.state_dict()
        state = weights.state if weights else {}
        fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
        net.load_state_dict(own | fitting)
    return net


def _network(model: str, classes: int, inputs: int = 0, size: int | None = None) -> nn.Module:
    if model in TABLE_MODELS:
        return TABLE_MODELS[model](inputs, classes)
    kit = {"cnn": cnn, "squeezenet": squeezenet}
    return kit[model](classes) if model in kit else make(model, classes, inputs, size)[0]


def _shaped(model: str, classes: int, inputs: int = 0, size: int | None = None) -> nn.Module:
    """The network for its shapes alone, without memory or draws; that of a ``module:function`` is made."""
    check_model(model)
    with contextlib.nullcontext() if is_function(model) else torch.device("meta"), _draws(0):
        return _network(model, classes, inputs, size)


def parameter_count(
    model: str, classes: int, inputs: int = 0, *, backbone: str | None = None, size: int | None = None
) -> int:
    """d, the parameters of ``model`` with ``classes`` outputs, from its layers' shapes alone.

    backbone  under a ``head``, as in ``load_backbone``: its name counts;  inputs, size  as in ``build``

    >>> parameter_count("head", classes=5), parameter_count("cnn", classes=5), parameter_count("linear", 2, inputs=29)
    (2565, 30629, 60)

    Raises InputError for an unknown model.
    """
    if model == "head":
        features = feature_count(backbone.partition(":")[0]) if backbone else FEATURES
        return (features + 1) * classes
    return sum(parameter.numel() for parameter in _shaped(model, classes, inputs, size).parameters())


def replaced_layers(model: str, classes: int, inputs: int = 0, size: int | None = None) -> tuple[str, ...]:
    """Names of the layers of batch normalisation that are group normalisation in this model.

    >>> replaced_layers("cnn", classes=5), replaced_layers("resnet18", classes=5)[:2]
    ((), ('bn1', 'layer1.0.bn1'))
    """
    check_model(model)
    if model in MODELS:
        return ()
    with contextlib.nullcontext() if is_function(model) else torch.device("meta"), _draws(0):
        return make(model, classes, inputs, size)[1]


def to_input(images: np.ndarray, mean: Channels, std: Channels) -> torch.Tensor:
    """uint8 (B, H, W, 3) images as a normalised float32 (B, 3, H, W) tensor in channels_last memory."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    return pixels.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


def resident_inputs(
    images: np.ndarray, mean: Channels, std: Channels, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``to_input`` of the images at an index, for a device that keeps all of them as uint8.

    images  uint8 (N, H, W, 3); 224 pixels take 150 kB each
    """
    pixels = torch.from_numpy(np.array(images)).to(device)
    shift, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))

    def inputs(index: torch.Tensor) -> torch.Tensor:
        chosen = pixels[index.to(device, non_blocking=True)].permute(0, 3, 1, 2)
        return chosen.float().div_(255).sub_(shift).div_(scale)

    return inputs


def normalise_features(features: torch.Tensor) -> torch.Tensor:
    """Each image's features (…, p), centred over its own channels and scaled to L2 norm 1.

    No other patient's data enters, so nothing leaks past the privacy bound.

    >>> features = normalise_features(torch.rand(3, 512))
    >>> bool(features.mean(1).abs().max() < 1e-6), bool((features.norm(dim=1) - 1).abs().max() < 1e-5)
    (True, True)
    """
    centred = features - features.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class NormalisedFeatures(nn.Module):
    """``normalise_features`` as a layer."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, p) to (B, p)."""
        return normalise_features(features)


def backbone(weights: Weights, seed: int = 0) -> nn.Sequential:
    """A network's frozen features, SqueezeNet's averaged over positions: (B, 3, H, W) -> (B, p), not yet normalised."""
    if weights.network == "squeezenet":
        net = build("squeezenet", 5, weights, seed)
        frozen = nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        frozen = feature_network(weights.network)
        frozen.load_state_dict(weights.state, strict=False)
    return frozen.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def extract_features(
    weights: Weights,
    images: np.ndarray,
    *,
    seed: int = 0,
    progress: bool = True,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Normalised features of uint8 (N, H, W, 3) images: float32 (N, p), cached by content.

    The cache's key is a hash of the pixels, the weights (or the seed of a random start) and the version of this recipe;
    a GPU, which rounds differently, has features of its own.
    """
    check_torch()
    key = hashlib.sha256(b"features 2" + (b"" if device.type == "cpu" else device.type.encode()))
    network = [] if weights.network == "squeezenet" else [weights.network]
    start = weights.sha256 or f"random {seed}"
    key.update(json.dumps([start, weights.mean, weights.std, images.shape, *network]).encode())
    for start in range(0, len(images), 512):
        key.update(np.ascontiguousarray(images[start : start + 512]))
    path = cache_dir() / f"features-{key.hexdigest()[:32]}.npy"
    found = read_array(path, (len(images), weights.features), "<f4")
    if found is not None:
        return torch.from_numpy(np.array(found))
    net = backbone(weights, seed).to(device)
    features = torch.empty(len(images), weights.features)
    for start in progress_bar(range(0, len(images), BATCH), title="features", unit="batch", show=progress):
        batch = images[start : start + BATCH]
        # a short batch is filled up: kernels go by its size, and an image's features must not tell how many there are
        full = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        features[start : start + BATCH] = net(to_input(full, weights.mean, weights.std).to(device))[: len(batch)].cpu()
    features = normalise_features(features)
    write_array(path, tuple(features.shape), "<f4", [np.ascontiguousarray(features.numpy(), "<f4")])
    return features
