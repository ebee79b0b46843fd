"""The functions behind chapter 2's sliders: right numbers, refusals, and a reaction at once."""

import numpy as np
import pytest

from dopamine_lib import pictures
from dopamine_lib.course.schematic import dopamine_schematic
from dopamine_lib.privacy import explorer
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon


def test_calibration_shows_where_definition_2_fails():
    proven, beyond = explorer.calibration(1.0, 1e-4), explorer.calibration(20.0, 1e-4)
    assert proven["classic"] > proven["analytic"] and proven["delta_classic"] < 1e-4
    assert beyond["classic"] < beyond["analytic"] and beyond["delta_classic"] > 1e-2
    for one in (proven, beyond):
        assert one["delta_analytic"] == pytest.approx(1e-4, rel=1e-9)


def test_budget_is_the_accountants():
    spent = explorer.budget(1.15, 100 / 2930, 3001, 1e-4)
    assert spent["steps"][0] == 0 and spent["steps"][-1] == 3001 and spent["rdp"][0] == 0
    assert np.all(np.diff(spent["rdp_classic"]) > 0) and np.all(spent["rdp"] <= spent["rdp_classic"])
    for at in (1, 20, -1):
        event = SampledGaussian(1.15, 100 / 2930, int(spent["steps"][at]))
        for accountant in ("rdp_classic", "rdp"):
            assert spent[accountant][at] == pytest.approx(epsilon(event, 1e-4, accountant), rel=1e-9)
    assert spent["rdp_classic"][-1] == pytest.approx(10.832, abs=0.001)


def test_budget_of_no_steps_is_nothing():
    assert explorer.budget(1.0, 0.1, 0, 1e-5)["rdp"].tolist() == [0]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: explorer.calibration(0, 1e-5), ("epsilon is 0",)),
        (lambda: explorer.calibration(1, 0), ("delta is 0",)),
        (lambda: explorer.budget(0, 0.1, 10, 1e-5), ("noise multiplier is 0",)),
        (lambda: explorer.budget(1.0, 1.1, 10, 1e-5), ("sample rate is 1.1",)),
        (lambda: explorer.budget(1.0, 0.1, 2.5, 1e-5), ("number of steps is 2.5",)),
        (lambda: explorer.budget(1.0, 0.1, 10, 1), ("delta is 1",)),
    ],
)
def test_bad_input_is_refused(refuses, call, said):
    with refuses(*said):
        call()


@pytest.mark.parametrize(
    "draw, settings",
    [
        (explorer.draw_calibration, [(e, d) for e in (0.3, 1.0, 8.0, 20.0) for d in (1e-4, 1e-6, 1e-9)]),
        (explorer.draw_budget, [(s, q, 3001) for s in (0.5, 0.9, 1.2, 3.0) for q in (0.01, 0.05, 0.2)]),
    ],
)
def test_the_sliders_are_followed_at_once(reacts, draw, settings):
    """At settings not seen before."""
    reacts(draw, settings)


def test_the_explorer_redraws_when_a_slider_moves():
    widgets = pytest.importorskip("ipywidgets")
    slider = widgets.FloatSlider(1.0, min=0.1, max=40)
    box = pictures.explorer(explorer.draw_calibration, epsilon=slider)
    before = bytes(box.children[-1].value)
    slider.value = 20.0
    after = bytes(box.children[-1].value)
    assert before.startswith(b"\x89PNG") and after.startswith(b"\x89PNG") and after != before


@pytest.mark.parametrize("hospitals", [2, 3, 4])
def test_the_schematic_names_every_party(hospitals):
    texts = [text.get_text() for axes in dopamine_schematic(hospitals).axes for text in axes.texts]
    for party in ("Server", "Hospital 1", "Hospital K", "Patient", "Service provider", "Crypto-provider (a hospital)"):
        assert party in texts
    assert sum(text.startswith("Hospital") for text in texts) == hospitals
