"""The head: logits = W x^ + b for shared features x, where x^ is x centred and divided by its norm. In Z_2^64.

W's rows are centred first, which centres x: W (x - mean x) = (W - mean of each row) x. With n features let
Q(x, y) = n x.y - sum(x) sum(y); then Q(x, x) = n |x - mean x|^2, and x^ = sqrt(n / Q(x, x)) (x - mean x).

Set-up: a mask B of W for the session, known to the provider, which sends F = W - B (as in ``convolution``).
From the crypto-provider, once an image: masks a (n) and k (one number) known to the patient, g (n) and h (classes)
known to the provider, and shares of the products B a, 2 Q(a, g) and k h.

    1. The shares x_0, x_1 are in Z_2^64 (``truncation``). The patient sends E = x_0 - a, the provider G = x_1 - g.
    2. Shares of u = W x:      patient F a + (B a)_0               provider W (E + x_1) + (B a)_1
       Shares of q = Q(x, x):  patient Q(x_0, x_0) + 2 Q(a, G) + (2 Q(a, g))_0
                               provider Q(x_1, x_1) + 2 Q(E, x_1) + (2 Q(a, g))_1
    3. The provider sends q_1 + d and H = u_1 - h, with fresh noise d (``opening``). The patient learns q + d, which it
       takes for q, and puts t = sqrt(n / q), in fixed point.
    4. The patient sends e = t - k. Shares of t u + b, by u = u_0 + u_1 with t u_0 known to the patient:
       patient t u_0 + k H + (k h)_0        provider e u_1 + (k h)_1 + b

Why this hides: E, G, H, e are masked by uniform numbers that the receiver does not know and that are used once.
What it does not hide: the patient learns q, the spread of its own image's features under the provider's network: one
number besides the answer, to a millionth of the largest on public images. The provider learns nothing.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.opening import noise
from dopamine_lib.inference.protocols.operation import BufferLayout, Layer, Operation, Own, Party, Run, Shape, Workspace
from dopamine_lib.inference.protocols.sharing import decode, encode
from dopamine_lib.inference.protocols.truncation import TruncationOperation

#: Bits of the patient's 1 / norm.
INVERSE_PRECISION = 16
#: Bits of the largest q on public images above its noise.
SPREAD_PRECISION = 20


def form(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Q(x, y) mod 2^64, an array (1,), for ring vectors of one length."""
    total, total_x, total_y = (v.sum(dtype=np.uint64, keepdims=True) for v in (x * y, x, y))
    return np.uint64(len(x)) * total - total_x * total_y


class NormalisedOperation(Operation):
    """W x^ + b for ``features`` inputs and ``classes`` outputs."""

    rounds = 3
    messages = ("E = x_0 - a and G = x_1 - g", "q_1 + d and H = u_1 - h", "e = t - k")

    def __init__(self, features: int, classes: int, inverse_bits: int):
        self.features, self.classes, self.inverse_bits = features, classes, inverse_bits
        largest = 2 * (inverse_bits - INVERSE_PRECISION) + math.log2(features)  # bits of q, see ``NormalisedLinear``
        self.spread_noise = min(max(1, round(largest) - SPREAD_PRECISION), 58)
        products = {"u": ("u8", (classes,)), "q": ("u8", (1,)), "last": ("u8", (classes,))}
        self.patient = BufferLayout(a=("u8", (features,)), k=("u8", (1,)), **products)
        self.provider = BufferLayout(g=("u8", (features,)), h=("u8", (classes,)))
        self.corrections = BufferLayout(**products)
        self.weight_masks = BufferLayout(b0=("u8", (classes, features)))
        self.sent_by_patient, self.sent_by_provider = 8 * (features + 1), 8 * (features + 1 + classes)

    def deal(self, patient: Own, provider: Own, corrections: Own, weight_masks: list, space: Workspace) -> None:
        corrections.u[:] = (weight_masks[0] * patient.a).sum(1, dtype=np.uint64) - patient.u
        corrections.q[:] = np.uint64(2) * form(patient.a, provider.g) - patient.q
        corrections.last[:] = patient.k * provider.h - patient.last

    def prepare(self, own: Own, masked_weights: list[np.ndarray], space: Workspace) -> None:
        """The patient's share of u, in place of its share of B a."""
        own.u += (masked_weights[0] * own.a).sum(1, dtype=np.uint64)

    def run_patient(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """The patient's share of the logits (classes,)."""
        x, g = x.reshape(-1), np.empty(self.features, np.uint64)
        party.channel.exchange(tag, x - own.a, g)  # 1
        q = form(x, x) + np.uint64(2) * form(own.a, g) + own.q  # 2
        received = np.empty(1 + self.classes, np.uint64)
        party.channel.receive(tag + 1, received)  # 3
        q += received[:1]
        # features that are all alike have no direction: x^ is 0, as in the plain network
        inverse = math.sqrt(self.features / int(q[0])) if q[0] else 0
        t = np.array([round(2**self.inverse_bits * inverse)], np.uint64)
        party.channel.send(tag + 2, t - own.k)  # 4
        return t * own.u + own.k * received[1:] + own.last

    def run_provider(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """The provider's share of the logits (classes,)."""
        x, e = x.reshape(-1), np.empty(self.features, np.uint64)
        party.channel.exchange(tag, x - own.g, e)  # 1
        u = (own.weights[0] * (e + x)).sum(1, dtype=np.uint64) + own.u  # 2
        q = form(x, x) + np.uint64(2) * form(e, x) + own.q
        party.channel.send(tag + 1, np.concatenate([q + noise(self.spread_noise, (1,)), u - own.h]))  # 3
        masked = np.empty(1, np.uint64)
        party.channel.receive(tag + 2, masked)  # 4
        return masked * u + own.last + own.bias


@dataclass(frozen=True)
class NormalisedLinear(Layer):
    """W x^ + b in Z_2^64, where x^ is x (C, 1, 1) centred over its channels and divided by its norm.

    weight_bits   scale of W is 2^weight_bits
    inverse_bits  the patient's 1 / norm is rounded to a multiple of 2^-inverse_bits, in units of the ring
    """

    weight_bits: int
    inverse_bits: int

    bits = 64
    input_limit = 2**30
    torch_layers, on_normalised = ("Linear",), True

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        """Features whose q might leave the ring, with the room that all values have, are truncated first."""
        x = compiler.value.images
        compiler.check_weights(name, module, x.shape[1])
        weight = module.weight.double() - module.weight.double().mean(1, keepdim=True)
        bias = module.bias.double() if module.bias is not None else weight.new_zeros(len(weight))
        centred = x.flatten(1).double() - x.flatten(1).double().mean(1, keepdim=True)
        norm = float(centred.norm(dim=1).max())
        spread = 2 * (compiler.margin + math.log2(max(norm * compiler.value.scale, 1.0))) + math.log2(x.shape[1])
        if spread > 63:
            compiler.narrow(name, compiler.value.bits - max(2, math.ceil((spread - 63) / 2)))
        norm *= compiler.value.scale
        inverse_bits = INVERSE_PRECISION + math.ceil(compiler.margin + math.log2(max(norm, 1.0)))
        largest = float((weight.norm(dim=1) + bias.abs()).max())  # no logit can be larger
        weight_bits = 62 - inverse_bits - math.ceil(math.log2(max(largest, 2.0**-8)))
        scale = 2.0 ** (weight_bits + inverse_bits)
        weights = [encode(weight.numpy(), 2.0**weight_bits, 64)], encode(bias.numpy(), scale, 64)
        images = (centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-9)) @ weight.T + bias
        images, gain = images.float()[:, :, None, None], x.new_full((len(weight),), scale)
        bits = {"weight_bits": weight_bits, "inverse_bits": inverse_bits}
        compiler.append(cls, name, images, gain=gain, scale=scale, weights=weights, **bits)

    def output_shape(self, *inputs: Shape) -> Shape:
        if not (0 <= self.weight_bits < 63 and 0 <= self.inverse_bits < 63):
            raise InputError(
                f"layer '{self.name}' has {self.weight_bits} and {self.inverse_bits} bits; each must be 0 to 62"
            )
        if inputs[0][1:] != (1, 1):
            raise InputError(f"layer '{self.name}': it needs features (C, 1, 1), not {inputs[0]}")
        return self.shape

    def work(self, input_shape: Shape) -> int:
        return input_shape[0] * self.shape[0]

    def operations(self, input_shape: Shape) -> list[Operation]:
        lift = TruncationOperation(input_shape, 0, bits=64)
        return [lift, NormalisedOperation(input_shape[0], self.shape[0], self.inverse_bits)]

    def private(self, inputs: list[np.ndarray], runs: list[Run]) -> np.ndarray:
        lift, head = runs
        return head(lift(inputs[0])).reshape(self.shape)

    def plain(self, inputs: list[np.ndarray], weights: tuple[list[np.ndarray], np.ndarray]) -> np.ndarray:
        (matrix,), bias = weights
        centred = inputs[0].reshape(-1) - inputs[0].mean()
        norm = max(float(np.linalg.norm(centred)), 1e-12)
        logits = decode(matrix, 2**self.weight_bits) @ (centred / norm) + decode(bias, self.scale)
        return (logits * self.scale).reshape(self.shape)
