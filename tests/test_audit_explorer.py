"""Chapter 8's explorer: what it says is Eq. 1's, and it answers at once."""

import functools
import itertools
import math

import numpy as np
import pytest

from dopamine_lib.auditing import explorer
from dopamine_lib.auditing.explorer import RATES, allowed

MEASURED = {"an attack": (np.linspace(0, 1, 5000), np.linspace(0, 1, 5000) ** 0.5)}


def test_what_a_bound_allows():
    said = allowed(math.log(2), 1e-10, 0.5, 0.01)
    assert said["most"] == pytest.approx(0.02) and said["belief"] == pytest.approx(2 / 3)
    assert 0.01 < said["gaussian"] < said["most"]
    weak, strong = allowed(100.0, 1e-4), allowed(0.01, 1e-10)
    assert weak["most"] == 1 and strong["most"] == pytest.approx(0.01 * math.exp(0.01))
    assert allowed(0.01, 0.1, 0.5, 0.01)["most"] > 0.1, "delta alone gives a tenth of all patients away"


def test_the_gaussian_curve_touches_the_bound_and_never_passes_it():
    for epsilon, delta in itertools.product((0.1, 1.0, 8.0), (1e-6, 1e-3, 0.05)):
        rates = np.geomspace(1e-4, 1, 300)
        pairs = [(allowed(epsilon, delta, 0.5, rate)[key] for key in ("gaussian", "most")) for rate in rates]
        ratio = np.array([gaussian / most for gaussian, most in pairs])
        assert ratio.max() <= 1 + 1e-9
        # it touches at two rates; one of them is on the axis
        assert ratio[rates < 0.999].max() > 0.99


def test_the_explorer_answers_at_once(reacts):
    settings = list(itertools.product((0.1, 1.0, 10.0), (1e-6, 1e-4, 1e-2)))
    assert len(set(reacts(functools.partial(explorer.draw_allowed, measured=MEASURED), settings))) == 9


def test_a_measured_curve_is_drawn_where_it_was_measured():
    false, true = MEASURED["an attack"]
    axes = explorer.draw_allowed(measured=MEASURED).axes[0]
    (line,) = (line for line in axes.lines if line.get_label() == "an attack")
    assert np.array_equal(line.get_xdata(), RATES)
    assert np.allclose(line.get_ydata()[RATES > 0.01], RATES[RATES > 0.01] ** 0.5, rtol=0.05)
    part = {"an attack": (false[50:], true[50:])}  # measured from a rate of 1 % on
    (line,) = (one for one in explorer.draw_allowed(measured=part).axes[0].lines if one.get_label() in part)
    assert np.isnan(line.get_ydata()[RATES < 0.01]).all() and np.isfinite(line.get_ydata()[RATES > 0.0101]).all()


@pytest.mark.parametrize(
    "values, said",
    [
        ({"epsilon": 0.0}, "epsilon is 0"),
        ({"delta": 0.5}, "delta is 0.5"),
        ({"prior": 1.0}, "prior is 1"),
        ({"rate": 0.0}, "false-positive rate is 0"),
    ],
)
def test_bad_input_is_refused(refuses, values, said):
    with refuses(said):
        allowed(**values)


def test_too_many_curves_are_refused(refuses):
    with refuses("6 measured curves", "at most 5"):
        explorer.draw_allowed(measured={str(i): MEASURED["an attack"] for i in range(6)})
