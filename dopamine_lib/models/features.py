"""The frozen features under a ``head``: extracted once, normalised image by image, and cached by content."""

import hashlib
import json

import numpy as np
import torch
from torch import nn

from dopamine_lib.data.cache import cache_dir, read_array, write_array
from dopamine_lib.machine import check_torch
from dopamine_lib.models.architectures import feature_network
from dopamine_lib.models.networks import CPU, Weights, build, to_input
from dopamine_lib.progress import progress_bar

BATCH = 64  # images in one pass of the backbone


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
