"""The integer network without shares: what the protocols must give, and how near its values come to the ring's end.

Exact integers in float64 (all stay below 2^53), so an overflow of the ring shows instead of wrapping around. Roundings
are to the nearest, and no bit is dropped in comparisons: the protocols differ from this in the last places only.
"""

import numpy as np

from dopamine_lib.inference.network import plan as steps
from dopamine_lib.inference.network.parties import Weights
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.protocols.buffers import Workspace
from dopamine_lib.inference.protocols.convolution import unfold
from dopamine_lib.inference.protocols.pooling import average_pool, max_pool
from dopamine_lib.inference.protocols.sharing import decode, signed


def evaluate(plan: Plan, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Logits float64 (classes,) of a normalised image, and for each step the share of its room that is used.

    Above 1 the protocols would give a wrong answer without a warning.
    """
    values, room = [signed(plan.encode(x)).astype(np.float64)], {}
    for number, step in enumerate(plan.steps):
        inputs = [values[source] for source in step.sources]
        value, used = _step(plan, weights, number, step, inputs)
        values.append(value)
        room[f"{number} {step.name}"] = used
    return values[-1].reshape(-1) / plan.steps[-1].scale, room


def _step(plan: Plan, weights: Weights, number: int, step, inputs) -> tuple[np.ndarray, float]:
    """A step's value, and its largest absolute value as a share of what the protocol allows."""
    x = inputs[0]
    largest = float(np.abs(x).max())
    if isinstance(step, steps.Convolution):
        x, space = x.reshape(step.read_shape(x.shape)), Workspace()
        matrices = [signed(matrix).astype(np.float64) for matrix in weights.matrices[number]]
        parts = [matrix @ unfold(x, branch, space) for matrix, branch in zip(matrices, step.branches, strict=True)]
        z = np.concatenate(parts) + signed(weights.biases[number]).astype(np.float64)[:, None]
        return z.reshape(step.shape), float(np.abs(z).max()) / 2**31
    if isinstance(step, steps.ReLU):
        return np.rint(np.maximum(x, 0) / 2**step.shift), largest / (2**31 - 2**15)
    if isinstance(step, steps.MaxPool):
        # the room is for differences within a window, and no window spreads more than the whole channel
        spread = float((x.max((1, 2)) - x.min((1, 2))).max())
        return max_pool(x, step.kernel, step.stride, step.ceil, np.maximum), spread / (2**31 - 2**15)
    if isinstance(step, steps.Truncate):
        return np.rint(x / 2**step.shift), largest / 2**30
    if isinstance(step, steps.Raise):
        return x * 2**step.shift, largest * 2**step.shift / 2**31
    if isinstance(step, steps.AveragePool):
        y = average_pool(x, step.rows, step.columns)
        return y, float(np.abs(y).max()) / 2**31
    if isinstance(step, steps.Concatenate):
        y = np.concatenate([value * 2**shift for value, shift in zip(inputs, step.shifts, strict=True)])
        return y, float(np.abs(y).max()) / 2**31
    centred = x.reshape(-1) - x.mean()
    norm = max(float(np.linalg.norm(centred)), 1e-12)
    weight = decode(weights.matrices[number][0], 2**step.weight_bits)
    logits = weight @ (centred / norm) + decode(weights.biases[number], step.scale)
    return (logits * step.scale).reshape(step.shape), largest / 2**30
