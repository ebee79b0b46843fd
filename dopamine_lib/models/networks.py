"""The models of the kit, their starting weights, and the frozen features of the ``head``.

``squeezenet``  torchvision's SqueezeNet-1.1 with a 512 -> 5 classifier: 725,061 parameters (paper, section 4.2)
``cnn``         a small convolutional network for 28-pixel images
``head``        a linear layer on SqueezeNet's frozen features, extracted once: 2,565 parameters
``linear``, ``mlp``  of a table's rows: ``models.tables``

No model uses batch normalisation: statistics over other patients would carry their data past the privacy bound.
Features are normalised image by image for the same reason.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.errors import InputError
from dopamine_lib.files import EMBEDDED, IMAGENET_FILE
from dopamine_lib.machine import check_torch
from dopamine_lib.models.tables import TABLE_MODELS

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
    """Starting weights for SqueezeNet: their origin, their tensors and the input normalisation they were trained with.

    ``state`` is keyed like torchvision's state dict (``features.0.weight`` …), and empty for a random start.
    """

    source: str
    sha256: str | None
    state: dict[str, torch.Tensor]
    mean: Channels
    std: Channels


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


def _checked(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file that SqueezeNet has. Raises InputError unless all its features are among them."""
    reference = squeezenet(5).state_dict()
    state = {key: value for key, value in state.items() if key in reference}
    missing = [key for key in reference if key.startswith("features.") and key not in state]
    if missing:
        raise InputError(f"weights file {path} has no '{missing[0]}'; its keys must be torchvision's squeezenet1_1's")
    for key, value in state.items():
        if key.startswith("features.") and value.shape != reference[key].shape:
            raise InputError(
                f"weights file {path}: '{key}' has shape {tuple(value.shape)}, squeezenet1_1 needs "
                f"{tuple(reference[key].shape)}"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"weights file {path}: '{key}' holds values that are not finite")
    return state


def load_weights(source: str | Path | None = None) -> Weights:
    """The starting weights for SqueezeNet: a file, ``"imagenet"``, ``"random"``, or None for the embedded weights.

    ``"imagenet"`` is torchvision's checkpoint, which must already be in torch's hub directory: nothing is downloaded.
    Raises InputError for a file that is missing, damaged, or not keyed and shaped like torchvision's squeezenet1_1.
    """
    if source == "random":
        return Weights("random start", None, {}, *HALF)
    path = Path(source or EMBEDDED)
    if source == "imagenet":
        path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_FILE
        if not path.is_file():
            raise InputError(
                f"torchvision's checkpoint is not at {path}; download {IMAGENET_URL}{IMAGENET_FILE} to there"
            )
    state, metadata = read_state(path)
    state = {key: value.float() for key, value in state.items()}
    if path != EMBEDDED:  # the embedded file needs no check, and so no torchvision, which takes 100 MB in every process
        state = _checked(state, path)
    if path == EMBEDDED:
        name = "embedded: SqueezeNet-1.1 trained by this kit on public synthetic patients"
    elif source == "imagenet":
        name = f"torchvision's ImageNet checkpoint ({path.name})"
    else:
        name = f"file: {path.name}"
    normalise = HALF if "mean 0.5 std 0.5" in metadata.get("preprocessing", "").replace(",", "") else IMAGENET
    sha256 = _sha256(path)
    if source == "imagenet" and not sha256.startswith(IMAGENET_FILE[-12:-4]):
        raise InputError(
            f"{path} is damaged: its SHA-256 does not begin with {IMAGENET_FILE[-12:-4]}; download it again"
        )
    return Weights(name, sha256, state, *normalise)


def build(model: str, classes: int, weights: Weights | None, seed: int, inputs: int = 0) -> nn.Module:
    """``model`` with a seeded initialisation, and SqueezeNet with ``weights`` wherever the shapes agree.

    inputs  numbers in a row, for a model of tables
    Raises InputError for an unknown model, and where PyTorch's defaults were changed (``check_torch``).
    """
    check_torch()
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        if model == "head":
            net = nn.Linear(FEATURES, classes)
            nn.init.zeros_(net.weight)
            nn.init.zeros_(net.bias)
        elif model == "cnn":
            net = cnn(classes)
        elif model in TABLE_MODELS:
            net = TABLE_MODELS[model](inputs, classes)
        elif model == "squeezenet":
            net = squeezenet(classes)
            own = net.state_dict()
            fitting = {key: value for key, value in weights.state.items() if value.shape == own[key].shape}
            net.load_state_dict(own | fitting)
        else:
            raise _unknown(model)
    finally:
        torch.random.set_rng_state(generator_state)
    return net


def parameter_count(model: str, classes: int, inputs: int = 0) -> int:
    """d, the parameters of ``model`` with ``classes`` outputs, from its layers' shapes alone.

    inputs  numbers in a row, for a model of tables

    >>> parameter_count("head", classes=5), parameter_count("cnn", classes=5), parameter_count("linear", 2, inputs=29)
    (2565, 30629, 60)

    Raises InputError for an unknown model.
    """
    layers = {"head": lambda classes: nn.Linear(FEATURES, classes), "cnn": cnn, "squeezenet": squeezenet}
    layers |= {name: partial(make, inputs) for name, make in TABLE_MODELS.items()}
    if model not in layers:
        raise _unknown(model)
    with torch.device("meta"):  # shapes without memory or random initialisation
        return sum(parameter.numel() for parameter in layers[model](classes).parameters())


def _unknown(model: str) -> InputError:
    return InputError(f"model '{model}' is unknown; choose one of {', '.join(MODELS)}")


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
    """Each image's features (…, 512), centred over its own channels and scaled to L2 norm 1.

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
        """(B, 512) to (B, 512)."""
        return normalise_features(features)


def backbone(weights: Weights, seed: int = 0) -> nn.Sequential:
    """SqueezeNet's frozen features, averaged over positions: (B, 3, H, W) -> (B, 512), not yet normalised."""
    net = build("squeezenet", 5, weights, seed)
    frozen = nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
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
    """Normalised features of uint8 (N, H, W, 3) images: float32 (N, 512), cached by content.

    The cache's key is a hash of the pixels, the weights (or the seed of a random start) and the version of this recipe;
    a GPU, which rounds differently, has features of its own.
    """
    check_torch()
    key = hashlib.sha256(b"features 2" + (b"" if device.type == "cpu" else device.type.encode()))
    key.update(json.dumps([weights.sha256 or f"random {seed}", weights.mean, weights.std, images.shape]).encode())
    for start in range(0, len(images), 512):
        key.update(np.ascontiguousarray(images[start : start + 512]))
    path = cache_dir() / f"features-{key.hexdigest()[:32]}.npy"
    found = read_array(path, (len(images), FEATURES), "<f4")
    if found is not None:
        return torch.from_numpy(np.array(found))
    net = backbone(weights, seed).to(device)
    features = torch.empty(len(images), FEATURES)
    for start in tqdm(range(0, len(images), BATCH), desc="features", unit="batch", disable=None if progress else True):
        batch = images[start : start + BATCH]
        # a short batch is filled up: kernels go by its size, and an image's features must not tell how many there are
        full = np.concatenate([batch, np.repeat(batch[-1:], BATCH - len(batch), axis=0)])
        features[start : start + BATCH] = net(to_input(full, weights.mean, weights.std).to(device))[: len(batch)].cpu()
    features = normalise_features(features)
    write_array(path, tuple(features.shape), "<f4", [np.ascontiguousarray(features.numpy(), "<f4")])
    return features
