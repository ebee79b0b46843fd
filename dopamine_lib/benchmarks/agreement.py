"""``bench inference --images N``: how many of N pictures get the class that plain torch gives them, and how near it is.

SqueezeNet has its embedded weights; torchvision's networks, whose ImageNet weights are a download, have random ones
with the statistics of trained ones. The pictures are synthetic patients' whom the scales have not seen. A class may
differ where plain torch's two best logits are nearly equal: nearer than the errors of both, at most ``ERROR`` each.
"""

import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dopamine_lib.benchmarks.measure import at_most, row
from dopamine_lib.data.synthetic import make_population
from dopamine_lib.errors import InputError, check_whole
from dopamine_lib.inference.workers.processes import Workers
from dopamine_lib.models.checkpoints import load_network, save_model
from dopamine_lib.models.networks import IMAGENET, build, to_input
from dopamine_lib.models.weights import load_weights

#: The largest error of a logit that is allowed, of the range of the picture's logits.
ERROR = 1e-3
#: Pictures of these are given to the workers at once, and to torch.
AT_ONCE = 10


def agreement(model: str, size: int, images: int) -> list[dict]:
    """Rows for one network on ``images`` pictures of ``size`` pixels: top classes, and errors over each range."""
    check_whole("images", images, 1, 10_000, "pictures to grade")
    wanted, got = [], []
    with tempfile.TemporaryDirectory(prefix="dopamine-") as name:
        folder, served = Path(name), None if model == "squeezenet" else model
        file, net, normalise = _saved(folder, model, size)
        with Workers(file, model=served, size=size, ahead=3) as workers:
            for start in range(0, images, AT_ONCE):
                drawn, *_ = make_population(min(AT_ONCE, images - start), size, 1000 + start, threads=1)
                with torch.inference_mode():
                    wanted += net(to_input(drawn, *normalise)).tolist()
                got += [answer["logits"] for _, answer in workers.infer_all(_pictures(folder, drawn))]
    return compared(f"{model}, {size} px, {images} pictures", np.array(got), np.array(wanted))


def compared(name: str, got: np.ndarray, wanted: np.ndarray) -> list[dict]:
    """Rows from private and plain logits, both (pictures, classes).

    >>> plain = np.array([[0, 0, 1], [0, 0.9999, 1], [0, 0.9, 1]])
    >>> [row["value"] for row in compared("net", plain[:, [0, 2, 1]], plain)][:3]       # all three classes differ
    [0, 1, 2]
    """
    span = np.ptp(wanted, axis=1)
    best, errors = np.sort(wanted, axis=1), np.abs(got - wanted).max(1) / span
    same, near = got.argmax(1) == wanted.argmax(1), best[:, -1] - best[:, -2] <= 2 * ERROR * span
    return [
        row(f"{name}: top class as in plain torch", int(same.sum()), "pictures", target="all", holds=bool(same.all())),
        row(f"{name}: two best logits in plain torch within twice the error allowed", int(near.sum()), "pictures"),
        at_most(f"{name}: another class than plain torch's, of the rest", int((~same & ~near).sum()), "pictures", 0),
        at_most(f"{name}: largest error of a logit, of the logits' range", float(errors.max()), "of 1", ERROR),
        row(f"{name}: median of the largest errors", float(np.median(errors)), "of 1"),
    ]


def _pictures(folder: Path, drawn: np.ndarray) -> list[Path]:
    from PIL import Image

    files = [folder / f"{i}.png" for i in range(len(drawn))]
    for file, picture in zip(files, drawn, strict=True):
        Image.fromarray(picture).save(file)
    return files


def _saved(folder: Path, model: str, size: int) -> tuple[Path, nn.Module, tuple]:
    """A network's file, the network, and its pictures' mean and standard deviation."""
    from torchvision import models

    file, classes = folder / "model.safetensors", [f"class {i}" for i in range(5)]
    if model == "squeezenet":
        weights = load_weights()
        net, normalise = build(model, len(classes), weights, 0).eval(), (weights.mean, weights.std)
        about = {"architecture": model, "preprocessing": {"size": size, "mean": weights.mean, "std": weights.std}}
        save_model(file, net, about | {"grades": classes})
        return file, net, normalise
    if model not in models.list_models(models):
        raise InputError(f"model is '{model}', but must be squeezenet or one of torchvision's networks")
    torch.manual_seed(0)
    drawn, *_ = make_population(64, size, 1, threads=1)
    net = like_trained(models.get_model(model, weights=None), to_input(drawn, *IMAGENET))
    save_model(file, net, {})
    return file, load_network(file, model, size)[0], IMAGENET


def like_trained(net: nn.Module, x: Tensor) -> nn.Module:
    """A random network with the statistics of a trained one: each batch normalisation normalises what arrives at it.

    Most of what reaches a ReLU is positive: else a random network makes forty times as much of a small error.

    x  pictures (B, C, H, W) that the statistics are of
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 1, 0.5)
    for name, module in net.named_modules():
        if re.search(r"bn3|layer\d\.\d\.bn2|conv\.3$", name):  # a block adds little to its input, as after training
            module.weight.data *= 0.3
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.inference_mode():
        net(x)
    return net.eval()
