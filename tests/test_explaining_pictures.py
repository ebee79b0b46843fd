"""Pictures that explain show what really happened, stay where they are from step to step, and can be read."""

import functools
import itertools
import math
import re
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

from dopamine_lib.data.pictures import hospital_split
from dopamine_lib.encryption import explorer as bfv
from dopamine_lib.encryption.bfv import paper_parameters, predicted_budget, predicted_product_budget
from dopamine_lib.encryption.mask_explorer import PAIRS, VALUES, draw_masks, masked_round
from dopamine_lib.exchange import Event, draw_exchange
from dopamine_lib.federation.exchange import draw_seven_steps, seven_steps
from dopamine_lib.federation.trust import SHOWN, View, draw_trust, views
from dopamine_lib.inference import exchange as inference
from dopamine_lib.pictures import describe, explorer, panels
from dopamine_lib.privacy.explorer import draw_losses
from dopamine_lib.privacy.pld import loss_distribution, pld_epsilon

#: Each picture, and the steps to draw it at.
PICTURES = {
    "seven steps": (draw_seven_steps, range(1, 8)),
    "Beaver product": (lambda step: inference.draw_beaver(-88, 97, step), range(1, 6)),
    "five steps": (lambda step: inference.draw_five_steps(0, step), range(1, 6)),
    "masks": (lambda step: draw_masks(None, step), range(1, 5)),
    "masks, one gone": (lambda step: draw_masks(2, step), range(1, 5)),
    "noise budget": (bfv.draw_budget, range(1, 7)),
    "trust": (draw_trust, SHOWN),
    "losses": (draw_losses, (1, 30, 3001)),
}


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    monkeypatch.setenv("DOPAMINE_KERNELS", "numpy")  # the compiled kernels would take longer to compile


@functools.cache
def drawn(name: str) -> list[Figure]:
    draw, steps = PICTURES[name]
    return [draw(step) for step in steps]


def unreadable(figure: Figure) -> list[str]:
    """Texts that are small, are cut off at the edge, or lie on one another."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")) if text.get_text()]
    texts = [text for text in texts if text.get_visible() and text.get_window_extent().width > 1]
    wrong = [f"small: {text.get_text()}" for text in texts if text.get_fontsize() < 8]
    boxes = [text.get_window_extent().padded(-1) for text in texts]
    edge = figure.bbox.padded(1)
    wrong += [
        f"cut off: {text.get_text()}"
        for text, box in zip(texts, boxes, strict=True)
        if not (edge.contains(box.x0, box.y0) and edge.contains(box.x1, box.y1))
    ]
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        wrong += [f"overlap: {one.get_text()} / {other.get_text()}"] * bool(a.overlaps(b))
    return wrong


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_be_read_stays_put_and_says_what_it_shows(name):
    figures = drawn(name)
    for figure in figures:
        assert not unreadable(figure)
    places = {(*f.get_size_inches(), *(bound for axes in f.axes for bound in axes.viewLim.extents)) for f in figures}
    assert len(places) == 1, "axes stay put"
    told = [describe(figure) for figure in figures]
    assert len(set(told)) == len(told) and all(50 < len(one) < 2000 for one in told)


def test_what_cannot_be_read_is_found():
    figure = Figure(figsize=(2, 1))
    for x, size, text in ((0.1, 7, "small"), (0.9, 10, "too far right"), (0.1, 10, "on it")):
        figure.text(x, 0.5, text, fontsize=size)
    assert [found.partition(":")[0] for found in unreadable(figure)] == ["small", "cut off", "overlap"]


def number(event: Event, name: str) -> int:
    """A number modulo 2^32 that stands after its name in an event's text."""
    return int(re.search(rf"{name} = (?:[a-z][^=]*= )?([\d,]+)", " ".join(event.text.split()))[1].replace(",", ""))


def test_a_beaver_product_is_a_run_of_the_protocol():
    masked, runs = set(), [inference.beaver_product(-88, 97) for _ in range(2)]
    for events in runs:
        sums = {}
        for name, at in (("x", (0, 1)), ("y", (0, 1)), ("a", (2, 3)), ("b", (2, 3)), ("c", (2, 3)), ("z", (6, 7))):
            sums[name] = sum(number(events[i], f"{name}{half}") for i, half in zip(at, "₀₁", strict=True)) % 2**32
        assert (sums["x"], sums["y"]) == (2**32 - 88, 97) and sums["c"] == sums["a"] * sums["b"] % 2**32
        assert sums["z"] == -88 * 97 % 2**32 and "x y = -8536" in events[-1].text
        opened = [number(event, name) for event, name in ((events[4], "e₀"), (events[5], "e₁"))]
        assert sum(opened) % 2**32 == (sums["x"] - sums["a"]) % 2**32
        masked.add(sum(opened) % 2**32)
    assert len(masked) == 2, "a mask is used once"


def test_the_five_steps_have_the_bytes_of_the_plan():
    events, (plan, _, _) = inference.five_steps(), inference.network()
    said = " ".join(event.text for event in events)
    assert f"{plan.costs()['setup_to_patient'] / 1e6:.1f} MB" in said and f"{plan.costs()['comparisons']:,}" in said
    assert [event.step for event in events if event.sender == "patient" and event.to == ("provider",)] == [3, 4]
    assert "49 kB" in said  # 3 x 64 x 64 ring elements of 4 bytes


def test_the_seven_steps_add_up():
    events = seven_steps()
    pairs = {step: [] for step in (4, 6)}
    for event in events:
        if event.step in pairs and not event.to:
            pairs[event.step].append(
                [int(n.replace(",", "")) for n in re.search(r"\((\S+), (\S+)\)", event.text).groups()]
            )
    assert len(pairs[4]) == 3 and np.sum(pairs[4], axis=0).tolist() == pairs[6][0]
    assert sorted({event.step for event in events}) == list(range(1, 8))
    assert all(event.hidden for event in events if "ciphertext" in event.text or "encrypted" in event.text)
    assert seven_steps() != events, "keys, samples and noise are fresh"


@pytest.mark.parametrize("gone", [None, 0, 1, 2, 3])
def test_masks_cancel_unless_a_hospital_vanishes_and_are_rebuilt_then(gone):
    seen = masked_round(gone)
    left = seen.masks[list(seen.arrived)].sum(axis=0, dtype=np.uint32)
    assert set(np.flatnonzero(left[:-1])) == {column for column, pair in enumerate(PAIRS) if gone in pair}
    assert np.array_equal(left, seen.rebuilt) and left[-1], "what is taken off is what stayed"
    assert seen.total == sum(value for i, value in enumerate(VALUES) if i != gone)
    assert len(set(seen.sent.tolist()) & {value % 2**32 for value in VALUES}) == 0
    assert not np.array_equal(masked_round(gone).sent, seen.sent)


def test_the_five_settings_trust_as_the_accountants_say():
    assert views("C")["server or curator"] == views("CDP")["server or curator"] == View("images")
    assert set(views("F").values()) == {View("no bound")}
    told = {name: [round(view.epsilon, 2) for view in views(name).values()] for name in ("FPDP", "FSCDP")}
    assert told["FSCDP"][:2] == [10.83, 10.83] and 10.83 < told["FSCDP"][2] < 12
    assert len(set(told["FPDP"])) == 1 and told["FPDP"][0] > 19
    assert views("FSCDP", SHOWN[1])["server or curator"].epsilon > 200


def test_noise_fills_the_budget_as_predicted():
    used, bits = bfv.noise_used(), math.log2(paper_parameters().q)
    assert bits - used["fresh"] == pytest.approx(predicted_budget(paper_parameters())[0], abs=1)
    assert bits - used["product of two"] == pytest.approx(predicted_product_budget(paper_parameters()), abs=1)
    assert bits - used["eighth power"] < 0.1 < 10 < bits - used["fourth power"]


@pytest.mark.parametrize("sigma, q, steps", [(1.15, 100 / 2930, 30), (1.15, 100 / 2930, 3001), (1.0, 0.2, 10)])
def test_the_losses_are_the_accountants(sigma, q, steps):
    losses, masses = loss_distribution(sigma, q, steps)
    spent = pld_epsilon(((sigma, q, steps),), 1e-4)
    assert masses.sum() == pytest.approx(1, abs=1e-9)
    assert masses @ np.maximum(0, 1 - np.exp(spent - losses)) == pytest.approx(1e-4, rel=2e-3)
    first, one = loss_distribution(sigma, q, 1)
    assert losses @ masses == pytest.approx(steps * (first @ one), rel=1e-5), "losses add up"


def test_a_notebook_keeps_a_description_of_every_figure():
    """As a kernel displays them: an alternative text in the output's metadata, and the same as plain text."""
    from nbclient import NotebookClient

    code = nbformat.v4.new_code_cell
    draw = "from dopamine_lib.pictures import panels\nfigure, (axes,) = panels()\naxes.set(xlabel='steps')\nfigure"
    small = "from dopamine_lib.pictures import as_image\nas_image(figure)"
    notebook = nbformat.v4.new_notebook(cells=[code("%load_ext dopamine_lib.pictures"), code(draw), code(small)])
    NotebookClient(notebook).execute()
    assert notebook.cells[2].outputs[0].metadata["image/png"]["alt"] == "A picture. Panel: steps."
    (shown,) = notebook.cells[1].outputs
    assert shown.metadata["image/png"]["alt"] == shown.data["text/plain"] == "A picture. Panel: steps."


def test_an_explorer_has_no_tooltip():
    """JupyterLab shows an error in the place of an Image, or a box, that has one."""
    widgets = pytest.importorskip("ipywidgets")
    step = widgets.IntSlider(1, 1, 4)
    box = explorer(lambda step: draw_masks(None, step), step=step)
    before = box.children[-1].value
    step.value = 4
    assert box.children[-1].value != before and box.tooltip is None and box.children[-1].tooltip is None


def test_a_figure_without_a_label_is_described_by_what_is_written_on_it():
    figure, (left, right) = panels(2)
    left.plot([1, 2], label="spent")
    left.set(title="budget", xlabel="steps", ylabel="epsilon")
    right.set_xlabel("C")
    assert describe(figure) == 'A picture. Panel "budget": epsilon against steps; shown: spent. Panel: C.'
    figure, _ = panels(3)
    figure.axes[1].set_title("mild")
    assert describe(figure) == 'A picture. Panel "mild". 2 panels with nothing written on them.'


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: draw_seven_steps(8), ("step is 8", "no more")),
        (lambda: draw_exchange(["A"], [Event(1, "A", "asks", to=("B",))], 1), ("B takes part", "add it")),
        (lambda: inference.draw_beaver(101, 2), ("x is 101",)),
        (lambda: masked_round(4), ("vanishes is 4",)),
        (lambda: draw_masks(None, 5), ("step is 5",)),
        (lambda: bfv.draw_budget(0), ("step is 0",)),
        (lambda: views("FSCDP", "nothing"), ("'nothing'", "totals alone")),
        (lambda: draw_losses(0), ("steps is 0",)),
    ],
)
def test_refusals(refuses, call, said):
    with refuses(*said):
        call()


def test_stacked_grades_are_told_apart_without_colours():
    """From light to dark: a print in grey, and eyes that do not tell red from green, keep the order of the legend."""
    grades = [f"grade {number}" for number in range(5)]
    dataset = SimpleNamespace(grades=grades, labels=np.arange(50) % 5)
    bars = [container.patches[0] for container in hospital_split(dataset, [np.arange(50)]).axes[0].containers]
    light = [float(np.dot(bar.get_facecolor()[:3], (0.2126, 0.7152, 0.0722))) for bar in bars]
    assert len(light) == 5 and all(before - after > 0.1 for before, after in zip(light, light[1:], strict=False)), light
