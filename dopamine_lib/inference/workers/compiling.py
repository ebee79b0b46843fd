"""A model compiled in a process of its own: what that takes, torch above all, the provider then does not keep.

What comes back are the public plan and the provider's integer weights, over a pipe and through no file.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network.plan import Plan, Weights
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.pool import Child, Parent


def compile_apart(
    weights: str | Path,
    backbone: str | Path | None,
    size: int | None,
    answer: str,
    model: str | None,
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[Plan, Weights, list[str], dict | None, dict[str, float]]:
    """``serving.load``, ``row_inputs`` and ``thresholds`` in a child process, while ``meanwhile`` is called here.

    Raises InputError as ``load`` does, ChannelError where the child ended without a word.
    """
    paths = {"weights": str(weights), "backbone": None if backbone is None else str(backbone)}
    child = Child(__name__)
    try:
        child.say(paths | {"size": size, "answer": answer, "model": model})
        meanwhile()
        told = child.hear()
        plan, integers = Plan.from_json(told["plan"]), Weights({}, {})
        for number, shapes, bias in told["weights"]:
            integers.matrices[number] = [child.take(np.empty(*shape)) for shape in shapes]
            integers.biases[number] = child.take(np.empty(*bias))
    except EOFError:
        raise ChannelError("the process that compiles the model ended without a word; has it enough memory?") from None
    finally:
        child.close()
    return plan, integers, told["grades"], told["inputs"], told["thresholds"]


def _arrays(weights: Weights) -> Iterator[tuple[int, list[np.ndarray], np.ndarray]]:
    return ((number, *weights.of(number)) for number in weights.matrices)


def main(descriptor: str) -> None:
    """Compile one model for the parent."""
    from dopamine_lib.inference.network.serving import load, row_inputs, thresholds

    def shape(array: np.ndarray) -> tuple[tuple[int, ...], str]:
        return array.shape, array.dtype.str

    parent = Parent(int(descriptor))
    try:
        asked = parent.hear()
        plan, weights, grades = load(**asked)
        inputs, beyond = None, {}
        if asked["model"] is None:  # a file of reproduce's
            inputs, beyond = row_inputs(asked["weights"]), thresholds(asked["weights"])
        shapes = [(number, [*map(shape, matrices)], shape(bias)) for number, matrices, bias in _arrays(weights)]
        parent.say(plan=plan.to_json(), grades=grades, inputs=inputs, thresholds=beyond, weights=shapes)
        for _, matrices, bias in _arrays(weights):
            for array in (*matrices, bias):
                parent.give(array)
    except InputError as error:
        parent.say(**{"wrong input": str(error)})
    except EOFError:  # the parent has ended, and so do we
        pass


if __name__ == "__main__":
    main(sys.argv[1])
