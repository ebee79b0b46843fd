"""The gradient of every sample at one layer: its norm, and what sums of clipped gradients need.

The bound on a patient is a bound on these sums as they are rounded. An instantiated gradient is the very vector that
is added, whatever was rounded before; what of a gradient is never made, and how its norm allows for that, is in
``linear_map``.
"""

import contextlib
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

#: Numbers that fit into a core's cache.
CACHED = 2**18
#: Squares of which float32 gives the sum to a millionth: 80 in each lane of a vector register.
MOST_SQUARES = 640


def accelerated(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU: there the processor must not ask what is in it, for it would wait for the answer.

    >>> accelerated(torch.zeros(3))
    False
    """
    return tensor.device.type != "cpu"


def matrix_norms(matrices: Tensor) -> Tensor:
    """Norms float64 (B,) of matrices (B, O, m), exact to a millionth whatever their size.

    >>> matrix_norms(torch.full((1, 100, 100), 1e30))
    tensor([1.0000e+32], dtype=torch.float64)
    """
    if not accelerated(matrices):  # at the price of float32
        rows = matrices.flatten(1)
        whole = rows.shape[1] - rows.shape[1] % MOST_SQUARES
        parts = [torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, MOST_SQUARES)), dim=2)] if whole else []
        parts.append(torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True))
        norms = torch.linalg.vector_norm(torch.cat(parts, dim=1).double(), dim=1)
        if norms.isfinite().all():
            return norms
    return torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64)  # where squares overflowed, too


def weighted_sum(factors: Tensor, rows: Tensor) -> Tensor:
    """The sum (m,) of ``factors`` (B,) times ``rows`` (B, m), in the factors' type: in pieces, to stay in the cache.

    >>> weighted_sum(torch.tensor([1.0, 2.0]).double(), torch.ones(2, 3))
    tensor([3., 3., 3.], dtype=torch.float64)
    """
    if factors.dtype == rows.dtype:
        return factors @ rows
    pieces = rows.split(max(1, CACHED // 4 // max(1, len(rows))), dim=1)
    return torch.cat([factors @ piece.to(factors.dtype) for piece in pieces])


def padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs (B, C, H, W) with the padding of this convolution around them, however it was given.

    >>> padded(nn.Conv2d(1, 1, 3, padding="same"), torch.zeros(1, 1, 4, 4)).shape
    torch.Size([1, 1, 6, 6])
    """
    pads = conv._reversed_padding_repeated_twice  # (left, right, top, bottom)
    return F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode) if any(pads) else x


@dataclass
class Kept:
    """What is kept of a layer: X as ``inputs`` (B, P, D) and G as ``outputs`` (B, P, O), or ``gradients`` (B, O D).

    squares      float64 (B,), the gradients' squared norms; not finite where a gradient is not, which is then kept as
                 zeros
    uncancelled  A, float64 (B,), where the products of X and G are left to the sum
    """

    squares: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    uncancelled: Tensor | None = None
    gradients: Tensor | None = None


class Layer:
    """A module with parameters, and their place in the flat vector: any module that maps one tensor to one tensor.

    start, end  its parameters, those of modules in it included, in the flat vector
    batched     whether vmap can do its samples at once, or they are differentiated one by one; None until it is tried
    """

    def __init__(self, name: str, module: nn.Module, start: int):
        self.name, self.module, self.start = name, module, start
        self.end = start + sum(parameter.numel() for parameter in module.parameters())
        self.batched: bool | None = None

    def keep(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor], views: int = 1) -> Kept:
        """Squared norms, and what the sums need.

        x (B A, ...)  the layer's inputs;  g (B A, ...)  the derivatives of the loss at its outputs
        parameters  of the layer, by name as in the module
        views       A: this many inputs in a row are one sample's, whose gradient is the sum of theirs
        """
        gradients = self.gradients(x, g, parameters)
        if views > 1:
            gradients = gradients.view(-1, views, gradients.shape[1]).sum(1)
        return self._instantiated(gradients, g.dtype)

    def add(self, total: Tensor, kept: Kept, factors: Tensor, rows: slice) -> None:
        """Add the clipped gradients of the samples ``rows`` to ``total`` (d,), computed in the type of ``factors``."""
        total[self.start : self.end] += weighted_sum(factors[rows], kept.gradients[rows])

    def in_order(self, gradients: Tensor) -> Tensor:
        """Instantiated gradients (B, O m), or sums of such, in the order of the flat vector: (B, n)."""
        return gradients

    def gradients(self, x: Tensor, g: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Each sample's gradient (B, n), in the order of the flat vector: the derivative of this layer alone."""

        def of_one(x: Tensor, g: Tensor) -> Tensor:
            _, pull_back = vjp(lambda own: functional_call(self.module, own, (x[None],)), parameters)
            return torch.cat([gradient.flatten() for gradient in pull_back(g[None])[0].values()])

        if self.batched is not False:
            refused = contextlib.nullcontext() if self.batched else contextlib.suppress(RuntimeError, ValueError)
            with refused, warnings.catch_warnings(), torch.enable_grad():  # an LSTM keeps less without
                warnings.simplefilter("ignore")  # vmap says which operations it does sample by sample
                gradients = vmap(of_one)(x, g)
                self.batched = True
                return gradients
        self.batched = False
        return torch.stack(list(map(of_one, x, g)))

    @staticmethod
    def _instantiated(gradients: Tensor, dtype: torch.dtype) -> Kept:
        """Gradients (B, O, m) or (B, m) as they are added: rounded, and zero where a sample's are not finite."""
        gradients = gradients.to(dtype)
        squares = matrix_norms(gradients if gradients.dim() == 3 else gradients[:, None]).square()
        if accelerated(squares) or not squares.isfinite().all():
            finite = squares.isfinite().view(-1, *[1] * (gradients.dim() - 1))
            gradients = torch.where(finite, gradients, 0)
        return Kept(squares, gradients=gradients.flatten(1))
