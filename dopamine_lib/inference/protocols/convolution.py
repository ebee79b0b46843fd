"""Convolution of a shared input with the provider's weights: X * W, where X = x_0 + x_1 and W is the provider's own.

Only x_0 * W needs both parties. * is any product that is linear in both factors.

Set-up, once a session:
    1. From the crypto-provider: a mask B of W's shape, known to the provider. The provider sends F = W - B.
Offline, once an image:
    2. From the crypto-provider: a mask A of X's shape, known to the patient, and shares of C = A * B.
    3. The patient computes its share of the result: z_0 = A * F + C_0.
Online:
    4. The patient sends E = x_0 - A.
    5. The provider computes z_1 = (E + x_1) * W + C_1 + bias.

z_0 + z_1 = A * (W - B) + A * B + (x_0 - A + x_1) * W = X * W. One convolution is left to do online, one message goes
one way, and the image itself is the case x_0 = X, x_1 = 0.

Why this hides both: the patient sees F, and B is uniform and unknown to it; the provider sees E, and A is uniform,
unknown to it, and used for this image only. C_1 is uniform because C_0 is. B stays for a session: W does not change, so
F is sent once, and no second difference can be compared with it. With one A for two images E - E' would be x_0 - x_0'.
"""

import math

import numpy as np

from dopamine_lib.inference.network import plan
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.buffers import Layout, Workspace
from dopamine_lib.inference.protocols.operation import Operation, Party


class ConvolutionOperation(Operation):
    """X * W for one step of a plan."""

    rounds = 1
    messages = ("E = x_0 - A",)

    def __init__(self, step: plan.Convolution, input_shape):
        self.step, self.input_shape = step, step.read_shape(input_shape)
        self.patient = Layout(a=("u4", self.input_shape), z=("u4", step.shape))
        self.corrections = Layout(c=("u4", step.shape))
        self.session = Layout(**{f"b{i}": ("u4", shape) for i, shape in enumerate(self.weight_shapes())})
        self.sent_by_patient = 4 * math.prod(self.input_shape)

    def weight_shapes(self) -> list[tuple[int, int]]:
        """Shape of each branch's weights as a matrix (channels out, channels in * kernel)."""
        return [(b.channels, self.input_shape[0] * math.prod(b.kernel)) for b in self.step.branches]

    def convolve(self, x: np.ndarray, weights, space: Workspace, out: np.ndarray) -> np.ndarray:
        """x * W mod 2^32 for x (C, H, W) and the branches' matrices; into ``out``, of the step's shape."""
        at = 0
        for branch, matrix in zip(self.step.branches, weights, strict=True):
            part = out[at : at + branch.channels].reshape(branch.channels, -1)
            kernels.active().multiply(matrix, unfold(x, branch, space), part)
            at += branch.channels
        return out

    def deal(self, patient, provider, corrections, session, space: Workspace) -> None:
        self.convolve(patient.a, list(vars(session).values()), space, corrections.c)
        corrections.c -= patient.z

    def prepare(self, own, masked_weights, space: Workspace) -> None:
        """Step 3: the patient's share, in place of C_0."""
        own.z += self.convolve(own.a, masked_weights, space, space.array("product", self.step.shape))

    def run_patient(self, party: Party, tag: int, x: np.ndarray, own) -> np.ndarray:
        """Step 4."""
        e = np.subtract(x.reshape(self.input_shape), own.a, out=party.workspace.array("e", self.input_shape))
        party.channel.send(tag, e)
        return own.z

    def run_provider(self, party: Party, tag: int, x, own, weights, bias: np.ndarray) -> np.ndarray:
        """Step 5."""
        e = party.workspace.array("e", self.input_shape)
        party.channel.receive(tag, e)
        e += x.reshape(self.input_shape)
        z = self.convolve(e, weights, party.workspace, np.empty(self.step.shape, np.uint32))
        z += own.c
        z += bias[:, None, None]
        return z


def unfold(x: np.ndarray, branch: plan.Branch, space: Workspace) -> np.ndarray:
    """x (C, H, W) as a matrix (C * kernel, positions), so that a convolution is a product of matrices."""
    (rows, columns), (down, right), (top, left) = branch.kernel, branch.stride, branch.padding
    if (rows, columns, down, right, top, left) == (1, 1, 1, 1, 0, 0):
        return x.reshape(len(x), -1)
    if top or left:
        padded = space.array("padded", (len(x), x.shape[1] + 2 * top, x.shape[2] + 2 * left), x.dtype)
        padded[:] = 0
        padded[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        x = padded
    windows = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), axis=(1, 2))[:, ::down, ::right]
    height, width = windows.shape[1:3]
    out = space.array("unfolded", (len(x), rows, columns, height, width), x.dtype)
    out[:] = windows.transpose(0, 3, 4, 1, 2)
    return out.reshape(len(x) * rows * columns, height * width)
