"""A torch model as a list of layers, in the order they work in."""

import torch
from torch import Tensor, nn
from torchvision.models import SqueezeNet
from torchvision.models.squeezenet import Fire


class Branches(nn.ModuleList):
    """Modules that read one input; their outputs are concatenated by channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, sum of C_i, H', W')."""
        return torch.cat([branch(x) for branch in self], 1)


def leaves(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a sequential model in order; a fire module becomes four of them."""
    if isinstance(module, Fire):
        expand = Branches([module.expand1x1, module.expand3x3])
        parts = [("squeeze", module.squeeze), ("relu", nn.ReLU()), ("expand", expand), ("relu", nn.ReLU())]
        return [(f"{name}.{part}", child) for part, child in parts]
    if not isinstance(module, nn.Sequential | SqueezeNet):
        return [(name or type(module).__name__, module)]
    prefix = f"{name}." if name else ""
    parts = [leaf for child, part in module.named_children() for leaf in leaves(prefix + child, part)]
    return parts + [(prefix + "flatten", nn.Flatten())] if isinstance(module, SqueezeNet) else parts


def pair(value) -> tuple[int, int]:
    """An option of a layer, given as one number or two, as (rows, columns)."""
    return (value, value) if isinstance(value, int) else tuple(value)
