"""Files of a run: checkpoints to resume from, and models to hand out. They are safetensors, never pickle."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dopamine_lib.data.function import is_function
from dopamine_lib.errors import InputError, table_model
from dopamine_lib.files import atomic_path, parse_json
from dopamine_lib.models.architectures import with_weights
from dopamine_lib.models.features import NormalisedFeatures, backbone
from dopamine_lib.models.networks import HALF, IMAGENET, MODELS, Weights, build, check_model
from dopamine_lib.models.tables import TABLE_MODELS
from dopamine_lib.models.weights import load_backbone, load_weights, read_state


class Resumable(Protocol):
    """A training that can be put away and taken up again (``federation.training.Training``)."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Its tensors, and everything else as a record that JSON can hold."""

    def restore(self, vectors: dict[str, torch.Tensor], record: dict) -> None:
        """Take up a state."""


def save_checkpoint(path: Path, training: Resumable) -> None:
    """Write a training's state atomically: either the old checkpoint or the new one is on disk."""
    vectors, record = training.state()
    vectors, state = {key: value.contiguous() for key, value in vectors.items()}, json.dumps(record)
    with atomic_path(path) as temporary:
        save_file(vectors, temporary, {"state": state, "sha256": _digest(vectors, state)})


def load_checkpoint(path: Path, training: Resumable) -> None:
    """Put a checkpoint's state back into a training. Raises InputError for one that is damaged, or of something else.

    Its checksum binds the ledger, which a damaged byte could otherwise set back without a word.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            vectors = {key: file.get_tensor(key) for key in file.keys()}
        state = metadata["state"]
        # older versions wrote the state alone
        if metadata.keys() != {"state"} and metadata.get("sha256") != _digest(vectors, state):
            raise ValueError("its checksum is another")
        training.restore(vectors, json.loads(state))
    except Exception as error:
        raise InputError(
            f"checkpoint {path} cannot be read or is damaged; the ledger in it is lost, so start again in another --out"
        ) from error


def _digest(vectors: dict[str, torch.Tensor], state: str) -> str:
    digest = hashlib.sha256(json.dumps([state, {key: list(vectors[key].shape) for key in sorted(vectors)}]).encode())
    for key in sorted(vectors):
        digest.update(vectors[key].numpy(force=True).tobytes())
    return digest.hexdigest()


def save_model(path: Path, net: torch.nn.Module, metadata: dict) -> None:
    """Write a model's tensors, described by ``metadata``, which becomes JSON."""
    # copies, since tied weights share their memory, which the format forbids
    tensors = {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in net.state_dict().items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})


def load_model(
    path: Path, backbone_weights: str | Path | None = None, *, tables: bool = False
) -> tuple[torch.nn.Module, dict]:
    """A model written by ``reproduce``: ``(net, metadata)``, where net maps inputs (B, 3, H, W) to logits.

    backbone_weights  for a ``head``: the weights of the network below it, by default SqueezeNet's embedded ones
    tables            whether a model of a table's rows, (B, p), will do as well
    Raises InputError for any other file, and where the backbone is not the head's own.
    """
    state, metadata = read_state(path)
    try:
        metadata = {key: parse_json(value) for key, value in metadata.items()}
        architecture, classes = metadata["architecture"], len(metadata["grades"])
        if architecture in TABLE_MODELS and not tables:
            raise table_model(path, architecture)
        inputs = len(metadata["preprocessing"]["inputs"]) if architecture in TABLE_MODELS else 0
        start, seed = (metadata["backbone_sha256"], metadata["backbone_seed"]) if architecture == "head" else (None, 0)
        texts = [architecture, metadata.get("backbone") or "squeezenet", *metadata["grades"]]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("names are texts")
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise TypeError("a seed is a whole number")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a model written by reproduce: its metadata names no architecture") from error
    if is_function(architecture):
        raise InputError(
            f"{path} is of {architecture}, and reading a file runs no code that it names: make the network yourself "
            "and load the tensors by safetensors.torch.load_model"
        )
    below = metadata.get("backbone") or "squeezenet"
    net = build(architecture, classes, Weights("random start", None, {}, *HALF, below), 0, inputs)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit its architecture {architecture}; run reproduce again") from error
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise InputError(f"{path} is damaged: it has weights that are not finite; run reproduce again")
    if architecture != "head" and backbone_weights is not None:
        raise InputError(f"--backbone is {backbone_weights}, but {path} is no head ({architecture}): leave it out")
    if architecture == "head":
        if below == "squeezenet":
            weights = load_weights(backbone_weights if start else "random")
        elif backbone_weights is None:
            raise InputError(f"{path} needs the {below} that it was trained on; give its weights as --backbone FILE")
        else:
            weights = load_backbone(f"{below}:{backbone_weights}")
        if weights.sha256 != start:
            wanted = metadata.get("weights", "that one")
            raise InputError(f"{path} needs a backbone with SHA-256 {start}, not {weights.sha256}; give {wanted}")
        net = torch.nn.Sequential(backbone(weights, seed), NormalisedFeatures(), net)
    return net.eval(), metadata


def load_network(path: str | Path, model: str, size: int | None = None) -> tuple[torch.nn.Module, dict]:
    """A network of torchvision's, or of ``module:function``, with the weights of a file: ``(net, metadata)``.

    size  side of an image in pixels; where the file says nothing, 224 and ImageNet's normalisation
    Raises InputError for a file that is not the network's.
    """
    check_model(model)
    if model in MODELS:
        raise InputError(f"model '{model}' is the kit's own, and its file says so: give --weights alone")
    state, metadata = read_state(Path(path))
    net, classes = with_weights(model, state, size)
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise InputError(f"{path} is damaged: it has weights that are not finite; get it again")
    count = len([*net.parameters()][-1])
    grades = parse_json(metadata["grades"]) if "grades" in metadata else classes
    said = parse_json(metadata["preprocessing"]) if "preprocessing" in metadata else {}
    if not (isinstance(said, dict) and (not grades or isinstance(grades, list | tuple) and len(grades) == count)):
        raise InputError(
            f"{path}: in its metadata, preprocessing must be a JSON object and grades a list of {count} names; leave "
            "out what it does not know"
        )
    preprocessing = {"size": size or 224, "mean": IMAGENET[0], "std": IMAGENET[1]} | said
    if not all(isinstance(value, float | int) and value > 0 for value in np.ravel(preprocessing["std"]).tolist()):
        raise InputError(
            f"{path}: its preprocessing has std {preprocessing['std']}, but colours are divided by it: > 0"
        )
    return net, {"grades": list(grades or (f"class {i}" for i in range(count))), "preprocessing": preprocessing}
