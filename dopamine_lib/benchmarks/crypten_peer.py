"""One party of CrypTen 0.4.1, a peer of ``bench inference``: a ``pool.Child`` that answers with its seconds.

The kit does not depend on CrypTen: it is installed for the benchmark only, in its own folder,

    pip install --no-deps --target DIR crypten==0.4.1 omegaconf antlr4-python3-runtime==4.9.3

and ``DOPAMINE_CRYPTEN=DIR`` names that folder. Its requirements are left out: its ONNX converter needs modules
that torch no longer has, and nothing is converted here, so a stand-in takes the converter's place. The network is built
from CrypTen's own layers. Party 0 holds the image, party 1 the model, and the correlated randomness comes from
CrypTen's default, a trusted first party: the faster of its two ways (at 64x64 6.4 s against 9.8 s with a third
process), so the comparison errs in its favour.
"""

import contextlib
import os
import sys
import time
import types
import warnings
from importlib.metadata import version

from dopamine_lib.pool import Parent


def _import_crypten():
    stand_in = types.ModuleType("crypten.nn.onnx_converter")
    stand_in.from_onnx = stand_in.from_pytorch = stand_in.from_tensorflow = None
    stand_in.TF_AND_TF2ONNX = False
    sys.modules[stand_in.__name__] = stand_in
    import crypten

    return crypten


def _encrypted(crypten, conv):
    layer = crypten.nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding, bias=True
    )
    layer.set_parameter("weight", conv.weight.detach())
    layer.set_parameter("bias", conv.bias.detach())
    return layer.encrypt(src=1)


def _forward(crypten, net, convolutions, x):
    """The layers of a torchvision SqueezeNet in order, on shares."""
    from torch import nn
    from torchvision.models.squeezenet import Fire

    for layer in (*net.features, *net.classifier):
        if isinstance(layer, nn.Conv2d):
            x = convolutions[layer](x)
        elif isinstance(layer, nn.ReLU):
            x = x.relu()
        elif isinstance(layer, nn.MaxPool2d):
            x = x.max_pool2d(layer.kernel_size, stride=layer.stride, ceil_mode=layer.ceil_mode)
        elif isinstance(layer, Fire):
            squeezed = convolutions[layer.squeeze](x).relu()
            both = [convolutions[expand](squeezed).relu() for expand in (layer.expand1x1, layer.expand3x3)]
            x = crypten.cat(both, dim=1)
    return x.mean((2, 3))


def main(rank: str, folder: str, rendezvous: str, model: str, image: str, descriptor: str) -> None:
    """Answer every message of the parent's with the seconds of one inference, party 0 also with the logits.

    folder  CrypTen's, or empty
    image   file of an array (1, 3, H, W), of which party 1 uses the shape alone
    """
    parent = Parent(int(descriptor))
    sys.path[:0] = [folder] if folder else []
    import numpy as np
    import torch

    from dopamine_lib.models.checkpoints import load_model

    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "RENDEZVOUS": f"file://{rendezvous}"}
    os.environ |= {"DISTRIBUTED_BACKEND": "gloo"}
    warnings.simplefilter("ignore")
    crypten = _import_crypten()
    torch.set_num_threads(1)
    crypten.init()
    net, _ = load_model(model)
    picture = torch.from_numpy(np.load(image))
    if rank != "0":
        picture = torch.zeros_like(picture)
    with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(EOFError):
        convolutions = {
            layer: _encrypted(crypten, layer) for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)
        }
        parent.say(seconds=0.0, name=f"crypten {version('crypten')}, 2 parties, 64 bits of which 16 fraction")  # ready
        while True:
            parent.hear()
            begin = time.perf_counter()
            logits = _forward(crypten, net, convolutions, crypten.cryptensor(picture, src=0)).get_plain_text(dst=0)
            taken = time.perf_counter() - begin
            parent.say(seconds=taken, logits=logits[0].tolist() if rank == "0" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
