"""Homework 6 takes points off what is nearly right: each usual mistake, planted into the solution, costs some."""

import nbformat
import pytest
from homework_marks import marks

from dopamine_lib.course.homework import SOURCES

SOURCE = nbformat.read(SOURCES / "06_private_inference_homework.ipynb", 4)
POINTS = {"share": 6, "beaver": 6, "fixed": 7, "layer": 6, "reuse": 6, "sees": 6, "dealer": 4, "traffic": 4}


def test_the_solution_has_full_marks():
    assert marks(SOURCE) == POINTS


@pytest.mark.parametrize(
    "fault",
    [
        ("share", "return mask.copy(), x - mask", "return mask.copy(), mask - x"),
        ("share", "pair[0] + c, pair[1].copy()", "pair[0] + c, pair[1] + c"),
        ("share", "pair[0] + c, pair[1].copy()", "np.add(pair[0], c, out=pair[0]), pair[1]"),
        ("share", ", dtype=np.uint32)", ")"),
        ("beaver", "(a, b, a * b)", "(a, b, a + b)"),
        ("beaver", "tuple(masks), ", "(masks[0], masks[1], masks[0] * masks[1]), "),
        ("beaver", "x[i] - halves[i][0]", "x[i] + halves[i][0]"),
        ("beaver", "x[i] - halves[i][0], y[i] - halves[i][1]", "x[i] - halves[i][1], y[i] - halves[i][0]"),
        ("beaver", "e * b + f * a + c", "e * a + f * b + c"),
        ("beaver", "product + e * f if number == 0 else product", "product + e * f"),
        ("beaver", "if number == 0", "if number == 1"),
        ("fixed", "np.rint(np.asarray(values, dtype=float) * 2.0**bits)", "np.trunc(np.asarray(values) * 2.0**bits)"),
        ("fixed", "(scaled < 2**31)", "(scaled <= 2**31)"),
        ("fixed", "(scaled >= -(2**31))", "(scaled > -(2**31))"),
        ("fixed", "if not np.all((scaled >= -(2**31)) & (scaled < 2**31))", "if np.any(np.abs(scaled) > 2**31)"),
        ("fixed", "x.view(np.int32)", "x"),
        ("fixed", "np.abs(weights).sum(axis=1).max()", "np.abs(weights.sum(axis=1)).max()"),
        ("fixed", "np.abs(weights).sum(axis=1).max()", "np.abs(weights).max()"),
        ("fixed", "worst * 2**bits < 2**31", "worst * 2**bits <= 2**31"),
        ("fixed", "range(21)", "range(32)"),
        ("layer", "return W - B", "return W + B"),
        ("layer", "return x - A", "return x"),
        ("layer", "F @ A + C_0", "F @ A"),
        ("layer", "W @ E + C_1", "W @ E"),
        ("reuse", ".astype(np.int64)", ""),
        ("reuse", ".view(np.int32)", ""),
        ("reuse", "E - E_again + known", "E_again - E + known"),
        ("reuse", "np.nonzero(F - F_again)", "np.nonzero(F > F_again)"),
        ("sees", ".view(np.uint8)", ""),
        ("sees", "minlength=256", "minlength=255"),
        ("sees", "table[:, table.sum(axis=0) > 0]", "table"),
        ("sees", "table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()", "table.mean(axis=0)"),
        ("sees", "> 255 + 6 * np.sqrt(2 * 255)", "< 255 + 6 * np.sqrt(2 * 255)"),
        ("sees", "> 255 + 6 * np.sqrt(2 * 255)", "> 255 * 10**6"),
        ("sees", "> 255 + 6 * np.sqrt(2 * 255)", "> 100"),
        ("dealer", "        seen[mask] = j\n", "        seen = {mask: j}\n"),
        ("dealer", "return seen[mask], j", "return j, seen[mask]"),
        ("traffic", "4 * m * n, 8 * m * images", "4 * m * n * images, 8 * m * images"),
        ("traffic", "8 * m * images", "4 * m * images"),
        ("traffic", "return m + 1", "return m"),
    ],
    ids=lambda fault: f"{fault[0]}: {fault[2][:40]}",
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_mistake_costs_points(fault):
    given = marks(SOURCE, fault)
    assert given[fault[0]] < POINTS[fault[0]]
