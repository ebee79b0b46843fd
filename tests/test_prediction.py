"""Predictions: what is chosen is kept, the result decides, and without widgets there is a text."""

import sys

import nbformat
import numpy as np
import pytest

from dopamine_lib.course.prediction import Prediction

ANSWERS = {"about 1": 1, "about 10": 10, "about 100": 100}


def choose(guess: Prediction, answer: str) -> None:
    """As a reader does who sees the buttons."""
    assert "application/vnd.jupyter.widget-view+json" in guess._repr_mimebundle_()
    guess._buttons.value = answer


def test_what_was_chosen_is_compared_with_what_came_out():
    guess = Prediction("How large is it?", ANSWERS)
    assert guess.compare(40.0) == "No prediction was made. It is 40: about 100."  # nearest by ratio
    choose(guess, "about 10")
    assert guess.chosen == "about 10" and guess.compare(np.float64(10.83)) == "As you predicted, it is 10.8: about 10."
    assert guess.compare(2565) == "You predicted: about 10. It is 2,565: about 100."
    assert guess.compare(0.5) == "You predicted: about 10. It is 0.5: about 1."


def test_after_the_comparison_a_prediction_stands():
    guess = Prediction("How large is it?", ANSWERS)
    choose(guess, "about 1")
    assert not guess._buttons.disabled
    guess.compare(2)
    assert guess._buttons.disabled
    guess._repr_mimebundle_()  # shown again, it is the same
    assert guess._buttons.value == "about 1"


@pytest.mark.parametrize(
    "answers, result, right",
    [
        ({"yes": True, "no": False}, np.bool_(True), "yes"),
        ({"yes": True, "no": False}, False, "no"),
        ({"falls": -1, "stays": 0, "grows": 1}, 0.3, "stays"),
        ({"Laplace": "laplace", "Gauss": "gauss"}, "gauss", "Gauss"),
    ],
)
def test_the_result_decides(answers, result, right):
    assert Prediction("Which?", answers).compare(result).endswith(f" {right}.")


def test_without_widgets_there_is_a_text_to_think_about(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = Prediction("How large is it?", ANSWERS)._repr_mimebundle_()
    assert shown["text/markdown"] == "**Predict.** How large is it?\n\n- about 1\n- about 10\n- about 100"
    assert set(shown) == {"text/plain", "text/markdown"} and "about 100" in shown["text/plain"]


def test_a_notebook_runs_without_anybody_who_chooses():
    from nbclient import NotebookClient

    code = nbformat.v4.new_code_cell
    first = (
        "from dopamine_lib.course.prediction import Prediction\nguess = Prediction('How?', {'so': 1, 'not': 2})\nguess"
    )
    notebook = nbformat.v4.new_notebook(cells=[code(first), code("print(guess.compare(2))")])
    NotebookClient(notebook).execute()
    assert notebook.cells[1].outputs[0].text == "No prediction was made. It is 2: not.\n"
    assert {"application/vnd.jupyter.widget-view+json", "text/markdown"} <= set(notebook.cells[0].outputs[0].data)


def test_refusals(refuses):
    with refuses("answers are [1]", "two or more"):
        Prediction("How?", {"so": 1})
    with refuses("differ"):
        Prediction("How?", {"so": 1, "not": 1})
    with refuses("result is 'maybe'", "no answer stands for it"):
        Prediction("How?", {"so": "yes", "not": "no"}).compare("maybe")
