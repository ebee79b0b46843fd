"""The public plan of a network: what is computed on what, at which scale. It holds no weight and no pixel.

Patient, provider and crypto-provider each hold the same plan; every size of every message follows from it. Values are
numbered: 0 is the image, i + 1 the output of layer i. A value with ``scale`` s stands for ring / s.

The plan makes public the architecture, the input's size and normalisation, and each layer's scale. A hidden layer's
scale is a label, since its channels have secret gains (``quantise``). Where residual branches meet, though, shifts and
scales tell by which powers of two the branches' largest activations differ (``gains``). And the last layers' scales,
and the size of the noise that scores are opened with, tell the largest activation on public images to a factor of two,
because nothing follows them in which a gain could be hidden.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.convolution import Convolution
from dopamine_lib.inference.protocols.normalised import NormalisedLinear
from dopamine_lib.inference.protocols.opening import GRADE, SCORES, ArgMax
from dopamine_lib.inference.protocols.operation import TAGS, Layer, Operation, Shape
from dopamine_lib.inference.protocols.pooling import AveragePool, MaxPool
from dopamine_lib.inference.protocols.relu import ReLU, ReLU6
from dopamine_lib.inference.protocols.room import RoomOperation
from dopamine_lib.inference.protocols.sharing import encode, signed
from dopamine_lib.inference.protocols.truncation import (
    Concatenate,
    Raise,
    RangeOperation,
    Sum,
    Truncate,
    TruncationOperation,
)

#: Every kind of layer there is.
LAYERS: tuple[type[Layer], ...] = (
    Convolution, ReLU, ReLU6, Truncate, Raise, MaxPool, AveragePool, Sum, Concatenate, NormalisedLinear, ArgMax,
)  # fmt: skip

#: A plan arrives over the network, so its costs are bounded before anything is allocated: elements of a layer, layers,
#: bytes that a party holds for one query and the session, and multiplications and additions of a query. SqueezeNet at
#: 1024 pixels takes two thirds of the bytes.
MOST_ELEMENTS = 2**25
MOST_LAYERS = 2**12
MOST_BYTES = 2**32
MOST_WORK = 2**34
#: Tags of the messages that belong to no operation. Tags from 0xC000 on are free for other uses of the channel.
DIGEST, MODEL, QUERY, ANSWER = 0xBFFC, 0xBFFD, 0xBFFE, 0xBFFF
#: To be raised by a change of the protocols after which parties would misunderstand messages of the same sizes.
PROTOCOL = 1
_NAMES = {DIGEST: "plan's digest", MODEL: "masked weights", QUERY: "query's number", ANSWER: "answer's share"}


@dataclass(frozen=True)
class Weights:
    """The provider's secret: for each weighted layer of the plan its matrices and its bias, as ring elements."""

    matrices: dict[int, list[np.ndarray]] = field(repr=False)
    biases: dict[int, np.ndarray] = field(repr=False)

    def of(self, number: int) -> tuple[list[np.ndarray], np.ndarray] | None:
        """Matrices and bias of a layer, None where it has none."""
        return (self.matrices[number], self.biases[number]) if number in self.matrices else None


@dataclass(frozen=True)
class Plan:
    """A network's layers. ``mean`` and ``std`` normalise a picture's channels; ``scale`` is the image's.

    noise_bits  scores are opened with noise of the standard deviation 2^noise_bits, in ring units; 0 where the last
                layer is an ``ArgMax``, and nothing but the grade's number is opened
    Raises InputError where a layer's shape does not follow from its inputs, or a number is out of bounds.
    """

    shape: Shape
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layers: tuple[Layer, ...]
    noise_bits: int

    def __post_init__(self):
        if not 0 < len(self.layers) <= MOST_LAYERS:
            raise InputError(f"a plan has {len(self.layers)} layers, but must have 1 to {MOST_LAYERS}")
        if len(self.shape) != 3 or not len(self.mean) == len(self.std) == self.shape[0]:
            raise InputError(f"the input's shape is {self.shape}; it must be (C, H, W) with a mean and std per channel")
        if not all(math.isfinite(m) and 0 < s < 1e6 for m, s in zip(self.mean, self.std, strict=True)):
            raise InputError("the input's mean and std must be finite and std positive")
        shapes = [self.shape]
        for i, layer in enumerate(self.layers):
            if not layer.sources or not all(0 <= source <= i for source in layer.sources):
                raise InputError(f"layer '{layer.name}' reads the values {layer.sources}; only 0 to {i} exist by then")
            if tuple(layer.output_shape(*(shapes[source] for source in layer.sources))) != layer.shape:
                raise InputError(f"layer '{layer.name}': its shape {layer.shape} does not follow from its inputs")
            shapes.append(layer.shape)
        for shape, scale in zip(shapes, [self.scale, *(layer.scale for layer in self.layers)], strict=True):
            if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
                raise InputError(f"a value of the shape {shape}: each side must be positive, {MOST_ELEMENTS} in all")
            if not 0 < scale < 2.0**64:
                raise InputError(f"a value's scale is {scale}; it must be positive and below 2^64")
        least, most = (0, 0) if self.answer == GRADE else (1, self.layers[-1].bits - 6)
        if not least <= self.noise_bits <= most:
            raise InputError(f"the answer's noise has {self.noise_bits} bits; it must have {least} to {most}")
        held = max(self.held())
        if held > MOST_BYTES:
            raise InputError(
                f"a query takes {held} bytes of memory, more than the {MOST_BYTES} allowed; use a smaller size"
            )
        work = sum(layer.work(shapes[layer.sources[0]]) for layer in self.layers)
        if work > MOST_WORK:
            raise InputError(f"a query takes {work} multiplications and additions, more than the {MOST_WORK} allowed")

    @cached_property
    def operations(self) -> list[tuple[int, Operation]]:
        """All operations in order, each with the number of its layer; the last ones are no layer's.

        They ask whether values came near the ring's end: those ``watched``, which are truncated by nothing for that;
        then those of every truncation; and then any at all (``room``).

        Raises InputError for too many.
        """
        shapes = [self.shape, *(layer.shape for layer in self.layers)]
        operations = [
            (number, operation)
            for number, layer in enumerate(self.layers)
            for operation in layer.operations(shapes[layer.sources[0]])
        ]
        if self.watched:
            count = sum(math.prod(shapes[self.layers[number].sources[0]]) for number in self.watched)
            operations.append((len(self.layers), TruncationOperation((count,), 0)))
        truncated = [one.watched for _, one in operations if isinstance(one, TruncationOperation)]
        if truncated:
            operations.append((len(self.layers), RangeOperation(truncated)))
        if any(operation.watched for _, operation in operations):
            operations.append((len(self.layers), RoomOperation()))
        if len(operations) * TAGS > DIGEST:
            raise InputError(f"the network takes {len(operations)} operations; the most is {DIGEST // TAGS}")
        return operations

    @cached_property
    def watched(self) -> list[int]:
        """Numbers of the layers that neither compare nor truncate what they read, which must fit all the same."""
        return [number for number, layer in enumerate(self.layers) if layer.uncompared]

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """For each value the number of the last layer that reads it."""
        return {source: number for number, layer in enumerate(self.layers) for source in layer.sources}

    @cached_property
    def weighted(self) -> list[int]:
        """Numbers of the operations that use the provider's weights."""
        return [i for i, (_, operation) in enumerate(self.operations) if operation.weight_masks.nbytes]

    @property
    def answer(self) -> str:
        """What the patient is told, one of ``opening.ANSWERS``."""
        return GRADE if isinstance(self.layers[-1], ArgMax) else SCORES

    @property
    def classes(self) -> int:
        """Number of logits."""
        last = self.layers[-1]
        return math.prod(self.layers[last.sources[0] - 1].shape if self.answer == GRADE else last.shape)

    def held(self) -> tuple[int, int]:
        """Bytes that the patient and the provider hold for one query and the session, at most."""
        operations = [operation for _, operation in self.operations]
        values = sum(layer.bits // 8 * math.prod(layer.shape) for layer in self.layers)
        both = values + sum(operation.weight_masks.nbytes for operation in operations)
        patient = sum(operation.patient.nbytes for operation in operations)
        provider = sum(operation.provider.nbytes + operation.corrections.nbytes for operation in operations)
        return both + patient, both + provider

    def costs(self) -> dict[str, int]:
        """Payload bytes and rounds of one query, and the bytes of a session's set-up.

        online_to_provider, online_to_patient, rounds, offline_to_provider, offline_to_patient (nothing: its seed of
        16 bytes serves the whole session), setup_to_patient, comparisons
        """
        operations = [operation for _, operation in self.operations]
        answer = self.layers[-1].bits // 8 * math.prod(self.layers[-1].shape)
        return {
            "online_to_provider": sum(operation.sent_by_patient for operation in operations) + 8,
            "online_to_patient": sum(operation.sent_by_provider for operation in operations) + answer,
            "rounds": sum(operation.rounds for operation in operations) + 1,
            "offline_to_provider": sum(operation.corrections.nbytes for operation in operations),
            "offline_to_patient": 0,
            "setup_to_patient": sum(operation.weight_masks.nbytes for operation in operations) + 32,
            "comparisons": sum(operation.comparisons for operation in operations),
        }

    def describe(self, tag: int) -> str:
        """What the message with this tag is, in words: for transcripts."""
        if tag >= DIGEST:
            return _NAMES[tag]
        number, operation = self.operations[tag // TAGS]
        name = "range" if number == len(self.layers) else self.layers[number].name
        return f"{name}: {operation.messages[tag % TAGS]}"

    def to_input(self, image: np.ndarray) -> np.ndarray:
        """A picture, uint8 (H, W, C), as the normalised float32 (C, H, W) the network reads.

        Raises InputError for another type or size.
        """
        wanted = (*self.shape[1:], self.shape[0])
        if image.dtype != np.uint8 or image.shape != wanted:
            raise InputError(f"the image is {image.dtype} {image.shape}; this network needs uint8 {wanted}: resize it")
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std

    def encode(self, x: np.ndarray) -> np.ndarray:
        """A normalised image as ring elements. Raises InputError for another shape and for what no picture gives."""
        if x.shape != self.shape:
            raise InputError(f"the image has the shape {x.shape}; this network needs {self.shape}: resize it")
        mean, std = (np.array(values)[:, None, None] for values in (self.mean, self.std))
        pixels = x * std + mean
        if not ((pixels > -1e-3) & (pixels < 1 + 1e-3)).all():
            raise InputError("a pixel is outside [0, 1] or NaN: normalise a picture by the plan's mean and std")
        return encode(x, self.scale)

    def to_json(self) -> str:
        """The plan as text."""
        fields = asdict(self)
        layers = zip(self.layers, fields.pop("layers"), strict=True)
        steps = [{"kind": type(layer).__name__, **record} for layer, record in layers]
        return json.dumps(fields | {"steps": steps}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that ``to_json`` wrote. Raises InputError for anything else."""
        try:
            fields = _tuples(json.loads(text))
            kinds = {kind.__name__: kind for kind in LAYERS}
            layers = [kinds[record.pop("kind")].from_record(record) for record in fields.pop("steps")]
            return cls(**fields, layers=tuple(layers))
        except InputError:
            raise
        except Exception as error:  # whatever is wrong with a text from elsewhere, it is not a plan
            raise InputError(f"this is no network's plan ({type(error).__name__}): get it from the provider") from None

    def digest(self) -> bytes:
        """32 bytes that two parties compare to know that they hold the same plan, and mean the same by it.

        Another version of the library may draw, deal or send something else for the same layers.
        """
        steps = [operation.signature() for _, operation in self.operations]
        return hashlib.sha256("\n".join([str(PROTOCOL), self.to_json(), *steps]).encode()).digest()


def _tuples(value, name: str = ""):
    """JSON's lists as tuples. Raises InputError for a fraction where only whole numbers belong."""
    if isinstance(value, float) and name not in ("scale", "mean", "std"):
        raise InputError(f"{name} is {value}, but must be a whole number: get the plan from the provider")
    if isinstance(value, list):
        return tuple(_tuples(v, name) for v in value)
    if isinstance(value, dict):
        return {key: _tuples(v, key) for key, v in value.items()}
    return value


def evaluate(plan: Plan, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """The integer network without shares: what the protocols must give, and how near its values come to the ring's end.

    Returns logits float64 (classes,) of a normalised image (C, H, W), or the grade's number (1,), and for each layer
    the share of its room that is used: above 1 the protocols may give a wrong answer, with a warning (``room``). Exact
    integers in float64 (all stay below 2^53), so an overflow of the ring shows instead of wrapping around. It rounds
    to the nearest, compares all bits and adds no noise; the protocols differ from it in the last places only.
    """
    values, room = [signed(plan.encode(x)).astype(np.float64)], {}
    for number, layer in enumerate(plan.layers):
        inputs = [values[source] for source in layer.sources]
        values.append(layer.plain(inputs, weights.of(number)))
        room[f"{number} {layer.name}"] = layer.room(inputs, values[-1])
    return values[-1].reshape(-1) / plan.layers[-1].scale, room
