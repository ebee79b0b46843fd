"""Homework 3 takes points off nearly right answers: each usual mistake, planted into the solution, costs some."""

import nbformat
import pytest
from homework_marks import marks

from dopamine_lib.course.homework import SOURCES

SOURCE = nbformat.read(SOURCES / "03_bfv_homework.ipynb", 4)
POINTS = {"expand": 5, "ring": 5, "scheme": 9, "noise": 6, "slots": 6, "range": 7, "last": 4, "prime": 4}


def test_the_solution_has_full_marks():
    assert marks(SOURCE) == POINTS


@pytest.mark.parametrize(
    "fault",
    [
        ("expand", "low = -(b // 2)", "low = -((b - 1) // 2)"),
        ("expand", "sign = -1 if u < 0 else 1", "sign = 1"),
        ("expand", "if b < 2:", "if False:"),
        ("ring", "product[i + j - n] -= x * y", "product[i + j - n] += x * y"),
        ("ring", "return [centred(c, q) for c in product]", "return [c % q for c in product]"),
        ("ring", "return [centred(c, q) for c in product]", "return [centred(round(c * 1.0), q) for c in product]"),
        ("ring", "if len(b) != n:", "if False:"),
        ("scheme", "[centred(-c, q)", "[centred(c, q)"),
        ("scheme", "q // t * c", "round(q / t) * c"),
        ("scheme", "(2 * t * x + q) // (2 * q)", "t * x // q"),
        ("scheme", "(2 * t * x + q) // (2 * q)", "round(t / q * x)"),
        ("scheme", "// (2 * q), t)", "// (2 * q), q)"),
        ("scheme", "add(multiply(pk[1], u, q), e2, q)", "multiply(pk[1], u, q)"),
        ("noise", "x - q // t * c", "x"),
        ("noise", " + q % t * t", ""),
        ("noise", "(q - 1) //", "q //"),
        ("noise", "(1 + 2 * n)", "(2 * n)"),
        ("slots", "if len(found) != n:", "if False:"),
        ("slots", "scale = scale * (x - other) % t", "scale = 1"),
        ("slots", "== t - 1]", "== 1]"),
        ("range", "np.rint(np.asarray(weights, dtype=float) * scale)", "np.trunc(np.asarray(weights) * scale)"),
        ("range", "np.rint(np.asarray(weights, dtype=float) * scale)", "np.trunc(np.round(weights, 3) * scale)"),
        ("range", "not np.all(np.abs(integers) <= limit(hospitals, t))", "np.any(integers > limit(hospitals, t))"),
        ("range", "not np.all(np.abs(integers) <= ", "np.any(np.abs(integers) > "),
        ("range", "return (t - 1) // 2 // hospitals", "return (t - 1) // 2"),
        ("range", "/ (scale * hospitals)", "/ scale"),
        ("last", "low, high = 0, most + 1", "low, high = 0, most"),
        ("last", "low, high = 0, most + 1", "low, high = 1, most + 1"),
        ("prime", "< 2 * hospitals * largest + 1", "< 2 * hospitals * largest - 2 * n"),
        ("prime", "range(2, int(t**0.5) + 1)", "range(2, int(t**0.5))"),
        ("prime", "t += 2 * n", "t += n"),
    ],
    ids=lambda fault: f"{fault[0]}: {fault[2][:40]}",
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_mistake_costs_points(fault):
    given = marks(SOURCE, fault)
    assert given[fault[0]] < POINTS[fault[0]]
