"""What a run leaves on disk: checkpoints to go on from, and models to hand out. safetensors, never pickle."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path


def save_checkpoint(path: Path, training) -> None:
    """Write a Training's state in one step: the old checkpoint or the new one is on disk, never half of one."""
    vectors, record = training.state()
    with atomic_path(path) as temporary:
        save_file(
            {key: value.contiguous() for key, value in vectors.items()},
            temporary,
            {"state": json.dumps(record)},
        )


def load_checkpoint(path: Path, training) -> None:
    """Put a checkpoint's state back into a Training. Raises InputError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["state"])
            vectors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:
        raise InputError(
            f"checkpoint {path} cannot be read; the ledger in it is lost, so start again in another --out"
        ) from error
    training.restore(vectors, record)


def save_model(path: Path, net: torch.nn.Module, metadata: dict) -> None:
    """Write a model's tensors; ``metadata`` (made JSON) says what they are."""
    tensors = {key: value.detach().contiguous() for key, value in net.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})


def load_model(path: Path, backbone_weights=None):
    """A model written by ``reproduce``: ``(net, metadata)``, with net from inputs (B, 3, H, W) to logits.

    backbone_weights  for a ``head``: file of the SqueezeNet it stands on; the embedded one by default.
    Raises InputError for a file of something else, and where the backbone is not the one the head was trained on.
    """
    from dopamine_lib.models.networks import NormalisedFeatures, backbone, build, load_weights, read_state

    state, metadata = read_state(path)
    try:
        metadata = {key: json.loads(value) for key, value in metadata.items()}
        architecture, classes = metadata["architecture"], len(metadata["grades"])
        start, seed = (metadata["backbone_sha256"], metadata["backbone_seed"]) if architecture == "head" else (None, 0)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a model written by reproduce: its metadata names no architecture") from error
    net = build(architecture, classes, load_weights("random"), 0)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the {architecture} it says it is; run reproduce again") from error
    if architecture == "head":
        weights = load_weights(backbone_weights if start else "random")
        if weights.sha256 != start:
            wanted = metadata.get("weights", "that one")
            raise InputError(f"{path} stands on a backbone with SHA-256 {start}, not {weights.sha256}; give {wanted}")
        net = torch.nn.Sequential(backbone(weights, seed), NormalisedFeatures(), net)
    return net.eval(), metadata
