"""What a private network is made of: layers, the operations they take, and the parties that run them.

An operation is one use of correlated randomness. Its layouts are public: what the patient draws from its seed, what the
provider draws from its own, and the corrections that the crypto-provider computes from both and sends to the provider,
so that together they have the right joint distribution. Either part alone is uniform.

A layer of a plan is public too. Its class knows everything about it: the shape of its output, its operations, what it
computes on plain integers, what either party does with its shares, and which layers of torch become it. A new layer is
a class like those in ``relu``, ``convolution``, ``pooling``, ``truncation`` and ``normalised``, and one name in
the list of ``network.plan``.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from dopamine_lib.inference.protocols.channel import Channel
from dopamine_lib.inference.protocols.randomness import fill

PATIENT, PROVIDER = 0, 1
HASH_BYTES = 8
#: Messages of operation number i have the tags 16 i … 16 i + 15.
TAGS = 16

Shape = tuple[int, int, int]
#: The arrays that a party holds for one operation, by name.
Own = SimpleNamespace


class BufferLayout:
    """Named arrays one behind the other in one buffer, each beginning at a multiple of 8 bytes.

    fields  name=(dtype, shape); integers are little-endian, as they travel

    >>> layout = BufferLayout(bits=("u1", (3,)), m=("u4", (2,)))
    >>> layout.nbytes, layout.arrays(bytes(16))["m"]
    (16, array([0, 0], dtype=uint32))
    """

    def __init__(self, **fields: tuple):
        self.fields = {
            name: (np.dtype(dtype).newbyteorder("<"), tuple(shape)) for name, (dtype, shape) in fields.items()
        }
        self.nbytes = sum(_rounded(dtype.itemsize * math.prod(shape)) for dtype, shape in self.fields.values())

    def arrays(self, buffer: np.ndarray | bytes) -> dict[str, np.ndarray]:
        """The arrays by name, as views of a buffer (nbytes,)."""
        arrays, at = {}, 0
        for name, (dtype, shape) in self.fields.items():
            arrays[name] = np.frombuffer(buffer, dtype, math.prod(shape), at).reshape(shape)
            at += _rounded(arrays[name].nbytes)
        return arrays

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {dtype.str} {'x'.join(map(str, shape))}" for name, (dtype, shape) in self.fields.items()
        )

    def draw(self, key: bytes, operation: int, buffer: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The arrays filled with one operation's stream of randomness, in ``buffer`` (nbytes,) where one is given."""
        buffer = np.empty(self.nbytes, np.uint8) if buffer is None else buffer
        fill(buffer, key, operation)
        return self.arrays(buffer)


def _rounded(size: int) -> int:
    return -(-size // 8) * 8


class Workspace:
    """Scratch arrays by name: asking again for a name gives the same memory, whatever it held.

    A fresh array of several megabytes costs more in page faults than in arithmetic. Memory begins as zeros, because
    the gaps between the arrays of a layout are sent as well.
    """

    def __init__(self):
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type = np.uint32) -> np.ndarray:
        """An array of this shape with undefined content, valid until the name is asked for again."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = np.zeros(size, np.uint8)
        return self._buffers[name][:size].view(dtype).reshape(shape)


class Party:
    """One of the two parties in one query: its number, its channel to the other, its scratch memory.

    outside  hash of its shares of the bits that say which values were near the ring's end: see ``room``
    asked    what ``truncation.RangeOperation`` opens at the end, of every truncation
    """

    def __init__(self, number: int, channel: Channel, workspace: Workspace | None = None):
        self.number, self.channel, self.workspace = number, channel, workspace or Workspace()
        self.outside, self.asked = hashlib.blake2b(digest_size=HASH_BYTES), []

    def open(self, tag: int, mine: np.ndarray, combine: np.ufunc = np.add) -> np.ndarray:
        """Swap shares and combine them: both parties end with the same array. One round."""
        theirs = self.workspace.array("opened", mine.shape, mine.dtype)
        self.channel.exchange(tag, mine, theirs)
        return combine(mine, theirs, out=self.workspace.array(f"opened {tag % TAGS}", mine.shape, mine.dtype))


class Operation:
    """One use of correlated randomness: its layouts, and the work of all three parties.

    patient, provider  what each draws from its seed, for every query
    corrections        what the crypto-provider sends to the provider, for every query
    weight_masks       what the provider draws once a session to mask its weights; empty where it has none
    """

    patient = provider = corrections = weight_masks = BufferLayout()
    #: Bytes sent online by each party, the rounds this takes, the comparisons in it, and how many values are watched.
    sent_by_patient = sent_by_provider = rounds = comparisons = watched = 0
    #: What its messages are called, in order of their tags.
    messages: tuple[str, ...] = ()

    def signature(self) -> str:
        """What is drawn, dealt and sent for it, in a line: parties whose libraries differ here must not meet."""
        layouts = self.patient, self.provider, self.corrections, self.weight_masks
        sent = f"{self.sent_by_patient}, {self.sent_by_provider}: {', '.join(self.messages)}"
        return "; ".join([type(self).__name__, *map(str, layouts), sent])

    def deal(
        self, patient: Own, provider: Own, corrections: Own, weight_masks: list[np.ndarray], space: Workspace
    ) -> None:
        """The crypto-provider's work: fill ``corrections`` from both parties' arrays."""

    def prepare(self, own: Own, masked_weights: list[np.ndarray], space: Workspace) -> None:
        """The patient's work ahead of a query, where the provider has weights."""

    def run(self, party: Party, tag: int, own: Own, *shares: np.ndarray) -> np.ndarray:
        """Online: this party's share of the result, from its shares of the inputs.

        own  the arrays it holds for this operation; the provider's ``weights`` and ``bias`` too, where there are any
        """
        side = self.run_patient if party.number == PATIENT else self.run_provider
        return side(party, tag, own, *shares)


#: An operation with party, tag and randomness filled in (by ``functools.partial``): shares in, share out.
Run = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Layer:
    """One layer of a plan: ``sources`` number its inputs; ``shape`` (C, H, W) and ``scale`` are its output's."""

    name: str
    sources: tuple[int, ...]
    shape: Shape
    scale: float

    #: Its output is in Z_2^bits.
    bits = 32
    #: Inputs must stay below this in absolute value; where it is None, the output must stay below 2^31.
    input_limit = None
    #: Whether its input must stay below 2^30 without being looked at by an operation: then it is at the end (``room``).
    uncompared = False
    #: Names in torch.nn of what becomes this layer, and whether it does so on normalised features or elsewhere.
    torch_layers, on_normalised = (), False

    @classmethod
    def from_record(cls, record: dict) -> "Layer":
        """The layer from its fields in a plan's JSON."""
        return cls(**record)

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        """Append the layer that a module of torch becomes, by means of ``network.compiler.Compiler``.

        Raises InputError for an option it cannot take. Patient and crypto-provider load no torch, so nothing here does.
        """
        raise NotImplementedError

    def output_shape(self, *inputs: Shape) -> Shape:
        """The output's shape from the inputs' shapes. Raises InputError for a field out of bounds."""
        return inputs[0]

    def operations(self, input_shape: Shape) -> list[Operation]:
        """The operations it takes, in order; none where each party computes on its own."""
        return []

    def work(self, input_shape: Shape) -> int:
        """Multiplications and additions of either party, at least: a plan's are bounded before it is believed."""
        return math.prod(self.shape)

    def private(self, inputs: list[np.ndarray], runs: list[Run]) -> np.ndarray:
        """Either party's share of the output, from its shares of the inputs: ``runs`` are the layer's operations.

        Most layers are one operation, or none: then a party computes on its share as on plain integers.
        """
        return runs[0](inputs[0]) if runs else self.plain(inputs, None)

    def plain(self, inputs: list[np.ndarray], weights: tuple[list[np.ndarray], np.ndarray] | None) -> np.ndarray:
        """The output on integers without shares, in float64: what the protocol must give, up to its roundings.

        weights  the provider's matrices and bias for this layer, as ring elements
        """
        raise NotImplementedError

    def room(self, inputs: list[np.ndarray], output: np.ndarray) -> float:
        """The largest value of ``plain`` as a share of what the protocol allows: above 1 the answer is wrong."""
        x, limit = (output, 2**31) if self.input_limit is None else (inputs[0], self.input_limit)
        return float(np.abs(x).max()) / limit
