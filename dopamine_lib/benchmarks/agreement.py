"""``bench inference --images N``: how many of N pictures get the class that plain torch gives them, and how near it is.

SqueezeNet has its embedded weights; torchvision's networks, whose ImageNet weights are a download, have random ones
with the statistics of trained ones. The pictures are synthetic patients' whom the scales have not seen.
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

#: Pictures of these are given to the workers at once, and to torch.
AT_ONCE = 10


def agreement(model: str, size: int, images: int) -> list[dict]:
    """Rows for one network on ``images`` pictures of ``size`` pixels: top classes, and errors over each range."""
    check_whole("images", images, 1, 10_000, "pictures to grade")
    same, errors = 0, []
    with tempfile.TemporaryDirectory(prefix="dopamine-") as name:
        folder, served = Path(name), None if model == "squeezenet" else model
        file, net, normalise = _saved(folder, model, size)
        with Workers(file, model=served, size=size, ahead=3) as workers:
            for start in range(0, images, AT_ONCE):
                drawn, *_ = make_population(min(AT_ONCE, images - start), size, 1000 + start, threads=1)
                with torch.inference_mode():
                    wanted = net(to_input(drawn, *normalise)).numpy()
                answers = workers.infer_all(_pictures(folder, drawn))
                got = np.array([answer["logits"] for _, answer in answers])
                same += int((got.argmax(1) == wanted.argmax(1)).sum())
                errors += (np.abs(got - wanted).max(1) / np.ptp(wanted, axis=1)).tolist()
    name = f"{model}, {size} px, {images} pictures"
    return [
        row(f"{name}: top class as in plain torch", same, "pictures", target="all", holds=same == images),
        at_most(f"{name}: largest error of a logit, of the logits' range", max(errors), "of 1", 1e-3),
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
