"""Homework 8 takes points off what is nearly right: each usual mistake, planted into the solution, costs some."""

import nbformat
import pytest
from homework_marks import marks

from dopamine_lib.course.homework import SOURCES

SOURCE = nbformat.read(SOURCES / "08_auditing_homework.ipynb", 4)
POINTS = {"roc": 6, "lira": 6, "bound": 7, "empirical": 6, "invert": 6, "bare": 4, "runs": 4}


def test_the_solution_has_full_marks():
    assert marks(SOURCE) == POINTS


@pytest.mark.parametrize(
    "fault",
    [
        ("roc", "np.unique(-scores, return_inverse=True)", "np.unique(scores, return_inverse=True)"),
        ("roc", "values, group = np.unique(-scores, return_inverse=True)", "group = values = np.argsort(-scores)"),
        ("roc", "/ np.sum(~members)", "/ len(members)"),
        ("roc", "f * np.sum(~np.asarray(members, dtype=bool)) < 10", "f * len(members) < 10"),
        ("roc", "true[false <= f].max()", "true[false < f].max()"),
        ("roc", "true[false <= f].max()", "true[false >= f].min()"),
        ("roc", "(true[1:] + true[:-1]) / 2", "true[1:]"),
        ("lira", "most = others.max(axis=-1)", "most = np.zeros(others.shape[:-1])"),
        ("lira", "np.where(mine, -np.inf, logits)", "logits"),
        ("lira", "ddof=1", "ddof=0"),
        ("lira", "np.sqrt(np.mean(np.var(shadows, axis=0, ddof=1)))", "np.std(shadows, axis=0, ddof=1)"),
        ("lira", "np.sqrt(np.mean(np.var(shadows, axis=0, ddof=1)))", "np.std(shadows, ddof=1)"),
        ("lira", "np.mean(shadows, axis=0)) /", "np.mean(shadows)) /"),
        ("lira", "if len(shadows) < 2:", "if False:"),
        ("bound", "1 - np.exp(-epsilon) * (1 - f - delta), ", ""),
        ("bound", "np.exp(epsilon) * f + delta", "np.exp(epsilon) * (f + delta)"),
        ("bound", ", 1.0)", ")"),
        ("bound", "((t - delta, f), (1 - f - delta, 1 - t))", "((t - delta, f),)"),
        ("bound", "((t - delta, f), (1 - f - delta, 1 - t))", "((t, f), (1 - f, 1 - t))"),
        ("bound", "if less > 0 else np.inf", "if less > 0 else 0"),
        ("bound", "found = 0.0", "found = -1.0"),
        ("bound", "(1 - prior) * f)", "f)"),
        ("empirical", "trials - hits + 1)", "trials - hits)"),
        ("empirical", "beta.ppf(1 - risk, hits + 1, trials - hits)", "beta.ppf(1 - risk, hits, trials - hits + 1)"),
        ("empirical", "if hits > 0 else 0.0", "if hits > 0 else risk"),
        ("empirical", "limits(hits_in, n_in, risk / 2)", "limits(hits_in, n_in, risk)"),
        ("empirical", "_, f = limits(hits_out, n_out, risk / 2)", "f = hits_out / n_out"),
        ("empirical", "(t - delta) / f", "t / f"),
        ("empirical", "max(1.0, (t - delta) / f)", "abs(t - delta) / f"),
        ("empirical", "> claimed", "< claimed"),
        ("invert", "np.argmin(bias_gradient)", "np.argmax(bias_gradient)"),
        ("invert", "np.argmax(np.abs(bias_gradient))", "np.argmax(bias_gradient)"),
        ("invert", "np.argmax(np.abs(bias_gradient))", "np.flatnonzero(bias_gradient)[0]"),
        ("invert", "if bias_gradient[row] == 0:", "if False:"),
        ("invert", "same[j].sum() >= 2", "same[j].sum() >= 1"),
        ("invert", " and not same[j, :j].any()", ""),
        ("invert", "told = bias_gradient != 0", "told = bias_gradient > 0"),
        ("bare", "if one[k] == again[k] != without[k]", "if one[k] == again[k]"),
        ("bare", "if one[k] == again[k] != without[k]", "if one[k] != without[k]"),
        ("runs", "(risk / 2) ** (1 / runs)", "risk ** (1 / runs)"),
        ("runs", "max(0.0, float(np.log(t / (1 - t))))", "float(np.log(t / (1 - t)))"),
        ("runs", "< epsilon:", "<= epsilon + 0.01:"),
    ],
    ids=lambda fault: f"{fault[0]}: {fault[2][:40]}",
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_mistake_costs_points(fault):
    given = marks(SOURCE, fault)
    assert given[fault[0]] < POINTS[fault[0]]
