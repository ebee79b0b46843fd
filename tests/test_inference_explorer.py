"""Chapter 6's explorer: what it shows of a query is uniform, except where masks are used twice; it answers at once."""

import numpy as np
import pytest

from dopamine_lib.inference import explorer
from dopamine_lib.inference.network import rehearsal
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.pooling import MaximumOperation
from dopamine_lib.inference.protocols.relu import ReLUOperation
from dopamine_lib.inference.protocols.sharing import random_ring, signed

MESSAGE, FRESH, SAME = explorer.VIEWS


@pytest.fixture(scope="module", autouse=True)
def _numpy_kernels():
    """Compiling would take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "active", lambda: kernels)
        yield


def test_only_a_mask_used_twice_shows():
    """At most 400 tests of uniformity: chance fails one in 25,000 runs. With masks used twice most differences fail."""
    count, tested, uneven = explorer.look()["messages"], 0, 0
    for message in range(count):
        for view in (MESSAGE, FRESH):
            p = explorer.look(1, message, view)["p"]
            assert p is None or p > 1e-7, (message, view)
        if explorer.look(1, message, SAME)["p"] is not None:
            tested, uneven = tested + 1, uneven + (explorer.look(1, message, SAME)["p"] < 1e-7)
    assert tested > 100 and uneven > tested / 2


def test_with_one_mask_the_difference_is_the_images():
    plan, _, images = explorer.network()
    numbers = explorer.look(0, 1, SAME)["numbers"]
    one, other = (signed(plan.encode(plan.to_input(image))).astype(int) for image in images[:2])
    assert np.array_equal(signed(numbers), (one - other).ravel())
    assert not np.array_equal(signed(explorer.look(0, 1, FRESH)["numbers"]), (one - other).ravel())


def test_the_transcript_is_what_the_plan_says():
    plan, _, _ = explorer.network()
    costs, messages = plan.costs(), explorer.transcript(0)
    for sender, to in (("patient", "provider"), ("provider", "patient")):
        assert sum(len(m.content) for m in messages if m.sender == sender) == costs[f"online_to_{to}"]
    # the query's number and the reply before the answer are not waited for
    assert len({m.tag for m in messages}) == costs["rounds"] + 2
    assert "content" not in repr(messages[1])


def test_the_explorer_answers_at_once(reacts):
    explorer.transcript(2)  # the query itself is made once
    assert len(set(reacts(explorer.draw_message, [(2, message) for message in range(1, 10)]))) == 9


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: explorer.look(6), ("image is 6",)),
        (lambda: explorer.look(0, 1000), ("message is 1000",)),
        (lambda: explorer.look(view="the answer"), ("view 'the answer'", "choose one of")),
    ],
)
def test_bad_input_is_refused(refuses, call, said):
    with refuses(*said):
        call()


def test_single_operations():
    """ReLU and maximum on random numbers, away from the band in which bits are dropped."""
    x, y = (random_ring((1000,)) >> np.uint32(2) for _ in range(2))
    x[::2] = -x[::2]
    found = signed(rehearsal.run(ReLUOperation(1000, 8), x)).astype(int)
    clear = np.abs(signed(x).astype(int)) > 2**15
    assert np.abs(found - np.maximum(signed(x).astype(int), 0) / 2**8)[clear].max() <= 1
    largest = signed(rehearsal.run(MaximumOperation(1000), x, y)).astype(int)
    right = np.maximum(signed(x), signed(y)).astype(int)
    assert np.all(right - largest <= 2**15) and np.mean(right == largest) > 0.99


def test_an_error_of_one_worker_is_not_lost():
    with pytest.raises(ZeroDivisionError):
        rehearsal.at_once(lambda: 1, lambda: 1 / 0)
