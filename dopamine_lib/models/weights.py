"""Starting weights: the embedded ones, torchvision's or a file's, checked against their network. No pickle is read."""

import contextlib
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dopamine_lib.data.function import is_function
from dopamine_lib.errors import InputError
from dopamine_lib.files import EMBEDDED, IMAGENET_FILE
from dopamine_lib.models.architectures import feature_network, imagenet_file
from dopamine_lib.models.networks import HALF, IMAGENET, Weights, shaped

MAX_WEIGHTS = 4 * 2**30  # bytes of a weights file, unpacked
IMAGENET_URL = "https://download.pytorch.org/models/"


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
    return _from_file(source, network, shaped(network, 5, size=size))


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
