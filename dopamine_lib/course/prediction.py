"""A prediction to make before a result: choose, then run the next cell, which compares it with what comes out.

Without widgets (on a page, in a printed copy) the question and its answers are a text to think about.
"""

import math
from typing import Any

from dopamine_lib.errors import InputError


class Prediction:
    """A question with answers to choose from; the result decides which is right, and nobody writes that down.

    question  in plain text
    answers   each with the result it stands for: a number, where the nearest one is right, or any other value

    In a notebook the object shows itself as buttons. ``chosen`` is what was chosen last, None so far.

    >>> guess = Prediction("How much noise do ten hospitals need?", {"as much each": 1.0, "a third each": 0.32})
    >>> print(guess.compare(1 / 10**0.5))
    No prediction was made. It is 0.316: a third each.
    """

    def __init__(self, question: str, answers: dict[str, Any]):
        if len(answers) < 2 or len(set(answers.values())) < len(answers):
            raise InputError(f"answers are {list(answers.values())}, but must be two or more that differ")
        self.question, self.answers, self.chosen = question, answers, None
        self._buttons = None

    def __repr__(self) -> str:
        return "\n".join([self.question, *(f"  - {answer}" for answer in self.answers)])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict:
        """The buttons where there are widgets, and the text for wherever there are none."""
        answers = "".join(f"\n- {answer}" for answer in self.answers)
        text = {"text/plain": repr(self), "text/markdown": f"**Predict.** {self.question}\n{answers}"}
        try:
            import ipywidgets
        except ModuleNotFoundError:
            return text
        if self._buttons is None:
            self._buttons = ipywidgets.RadioButtons(
                options=list(self.answers), index=None, layout=ipywidgets.Layout(width="max-content")
            )
            self._buttons.observe(lambda change: setattr(self, "chosen", change["new"]), names="value")
        label = ipywidgets.HTMLMath(value=f"<b>Predict.</b> {self.question}")
        return ipywidgets.VBox([label, self._buttons])._repr_mimebundle_() | text

    def compare(self, result: Any) -> str:
        """One line on what was predicted and what came out; from here on the prediction stands.

        result  a number, or one of the answers' values
        Raises InputError for a result that no answer stands for.
        """
        result = result.item() if hasattr(result, "item") else result  # NumPy's numbers and truth values
        right = self._standing_for(result)
        if self._buttons is not None:
            self._buttons.disabled = True
        said = right
        if _is_number(result):
            said = f"{result:,}: {right}" if isinstance(result, int) else f"{result:.3g}: {right}"
        if self.chosen is None:
            return f"No prediction was made. It is {said}."
        if self.chosen == right:
            return f"As you predicted, it is {said}."
        return f"You predicted: {self.chosen}. It is {said}."

    def _standing_for(self, result: Any) -> str:
        """The answer whose value the result is, or is nearest to: by ratio, where all are positive."""
        for answer, value in self.answers.items():
            if type(value) is type(result) and value == result:
                return answer
        values = list(self.answers.values())
        if not all(map(_is_number, [*values, result])):
            raise InputError(f"the result is {result!r}, but no answer stands for it: {', '.join(map(repr, values))}")
        ratios = min(*values, result) > 0
        distance = (lambda one: abs(math.log(one / result))) if ratios else (lambda one: abs(one - result))
        return min(self.answers, key=lambda answer: distance(self.answers[answer]))


def _is_number(value: Any) -> bool:
    """A real number; True and False are answers of their own."""
    return not isinstance(value, bool | str) and hasattr(value, "__float__")
