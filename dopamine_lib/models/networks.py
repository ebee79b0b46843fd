"""The models of the kit and anybody's, as they are built, and images as their inputs.

``squeezenet``  torchvision's SqueezeNet-1.1 with a 512 -> 5 classifier: 725,061 parameters (paper, section 4.2)
``cnn``         a small convolutional network for 28-pixel images
``head``        a linear layer on SqueezeNet's frozen features (``features``), extracted once: 2,565 parameters
``linear``, ``mlp``  of a table's rows: ``models.tables``
others          torchvision's by name, and ``module:function``: ``architectures``

No model that is trained uses batch normalisation: statistics over other patients would carry their data past the
privacy bound.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dopamine_lib.data.function import is_function
from dopamine_lib.errors import InputError
from dopamine_lib.machine import check_torch
from dopamine_lib.models.architectures import (
    feature_count,
    make,
    torchvision_models,
)
from dopamine_lib.models.tables import TABLE_MODELS

MODELS = ("head", "cnn", "squeezenet", *TABLE_MODELS)
CPU = torch.device("cpu")
FEATURES = 512

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


def check_model(model: str) -> None:
    """Raise InputError unless ``model`` is one of the kit's or torchvision's, or ``module:function``."""
    if model not in MODELS and not is_function(model) and model not in torchvision_models():
        raise InputError(
            f"model '{model}' is unknown; choose one of {', '.join(MODELS)}, a network of torchvision's (resnet18, "
            "mobilenet_v3_small, efficientnet_b0, …) or a function of yours as module:function"
        )


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


def shaped(model: str, classes: int, inputs: int = 0, size: int | None = None) -> nn.Module:
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
    return sum(parameter.numel() for parameter in shaped(model, classes, inputs, size).parameters())


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
