"""What the patient's page says and shows: as HTML without resources from outside, and as a picture for readers.

Every function here is plain: values in, text out. Whatever comes from a file or another process is escaped. Colours
have a contrast of at least 4.5 to 1 on the page's own background, whatever the theme around it.
"""

import base64
import html
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dopamine_lib.data.dataset import GRADES
from dopamine_lib.inference.protocols.room import EXCEEDED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dopamine_lib.inference.workers.answer import Answer
    from dopamine_lib.page.consultation import Grading

BLUE, INK, GREY, RED = "#00557f", "#1a1a1a", "#595959", "#9c2a00"
PREVIEW = 320  # pixels of the longer side of the picture that is shown
CHOOSE = "Choose a photograph"

#: What a grade means (International Clinical Diabetic Retinopathy scale), for readers who are not physicians.
MEANINGS = dict(
    zip(
        GRADES,
        (
            "No signs of diabetic retinopathy.",
            "Microaneurysms only: tiny bulges of the smallest vessels.",
            "More than microaneurysms, such as small bleeds or deposits, but less than the severe grade.",
            "Many bleeds, or vessels that have changed markedly; no new vessels yet.",
            "New, fragile vessels grow, or blood has entered the eye: the most advanced grade.",
        ),
        strict=True,
    )
)

#: What is screened for (``federation.metrics.SCREENING``), in a patient's words.
DISEASES = {"referable": "moderate disease or worse", "sight_threatening": "severe disease or worse"}

STYLE = f"""<style>
.dopamine-page {{ background: #fff; max-width: 74rem; width: 100%; box-sizing: border-box; padding: 0.5rem 1rem; }}
.dopamine-page, .dopamine-page .widget-html-content {{ font: 1rem/1.5 sans-serif; color: {INK}; }}
.dopamine-page .widget-html, .dopamine-page .jupyter-widgets {{ max-width: 100%; overflow: visible;
  margin-left: 0 !important; margin-right: 0 !important; }}
.dopamine-page .widget-html-content {{ width: 100%; overflow-wrap: anywhere; }}
.dopamine-page h1, .dopamine-page h2, .dopamine-page h3 {{ line-height: 1.25; margin: 0.6em 0 0.3em; color: {INK}; }}
.dopamine-page p, .dopamine-page ul {{ margin: 0.4em 0; max-width: 44rem; }}
.dopamine-page .columns {{ flex-wrap: wrap; gap: 0.5rem 2rem; align-items: flex-start; overflow: visible; }}
.dopamine-page .columns > * {{ flex: 1 1 22rem; min-width: min(100%, 22rem); width: auto; overflow: visible; }}
/* the control would say how many files were chosen */
.dopamine-page .widget-upload {{ font-size: 0 !important; }}
.dopamine-page .widget-upload::after {{ content: "{CHOOSE}" / ""; font-size: 1rem; }}
.dopamine-page img {{ max-width: 100%; height: auto; }}
.dopamine-page progress {{ width: 100%; height: 1.2rem; accent-color: {BLUE}; }}
.dopamine-page table {{ border-collapse: collapse; width: 100%; }}
.dopamine-page caption {{ text-align: left; font-weight: bold; padding: 0.3em 0; }}
.dopamine-page th, .dopamine-page td {{ text-align: left; vertical-align: top; padding: 0.25em 0.5em 0.25em 0;
  font-size: 0.95rem; color: {INK}; background: #fff; overflow-wrap: break-word; }}
.dopamine-page pre {{ white-space: pre-wrap; word-break: normal; }}
.dopamine-page .bar {{ background: {BLUE}; height: 0.8rem; min-width: 1px; }}
.dopamine-page .track {{ width: 40%; }}
.dopamine-page .said {{ border-left: 0.3rem solid {BLUE}; padding-left: 0.7rem; }}
.dopamine-page .wrong {{ border-left: 0.3rem solid {RED}; padding-left: 0.7rem; color: {RED}; font-weight: bold; }}
.dopamine-page .small {{ color: {GREY}; font-size: 0.9rem; }}
.dopamine-page .pictures {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.dopamine-page figure {{ margin: 0; flex: 1 1 14rem; max-width: min(100%, {PREVIEW}px); }}
.dopamine-page summary {{ cursor: pointer; font-weight: bold; }}
.dopamine-page .jupyter-button, .dopamine-page select {{ font-size: 1rem; height: auto; min-height: 2.75rem; }}
.dopamine-page .jupyter-button:disabled {{ opacity: 0.6; }}
.dopamine-page .widget-dropdown, .dopamine-page .widget-label {{ height: auto; font-size: 1rem; color: {INK}; }}
.dopamine-page :focus-visible {{ outline: 3px solid {RED} !important; outline-offset: 2px; }}
</style>"""


def introduction(heading: int = 2) -> str:
    """What the page is for and what stays private; ``heading`` is the level of its first heading."""
    return f"""<h{heading}>A grade for your retina scan, and nobody sees the scan</h{heading}>
<p>Choose a photograph of the back of an eye. A model grades it for diabetic retinopathy.</p>
<ul>
<li><b>Your scan</b> stays with this page. Only numbers that look like noise leave it.</li>
<li><b>The model</b> stays with the service provider. This page never has it.</li>
<li><b>The answer</b> is put together here, and only here.</li>
</ul>
<p class="small">A third worker, the crypto-provider, makes the random numbers; this is safe as long as it does not side
with the provider and all three do as agreed. Here all three run on <b>one machine</b>, as three processes: anyone
who controls the machine could look into each of them. In a real deployment each has a machine of its own.</p>
<p><b>Not a diagnosis.</b> This is for teaching. Whatever it says, ask a physician about your eyes.</p>"""


def about(model: dict) -> str:
    """What is known about the model, from ``served_model.facts``."""
    said = []
    if model.get("trained_on"):
        said.append(f"It was trained on {model['trained_on']}.")
    if model.get("accuracy") is not None:
        tested = f" of {model['test_patients']}" if model.get("test_patients") else ""
        said.append(f"It graded {model['accuracy']:.0%}{tested} synthetic test patients correctly.")
    if model.get("sight_threatening_sensitivity") is not None:
        said.append(
            f"Averaged over the grades, it recognised {model['balanced_accuracy']:.0%} of a grade's patients. It found "
            f"{model['referable_sensitivity']:.0%} of those with moderate disease or worse, with "
            f"{1 - model['referable_specificity']:.0%} false alarms among the others, and "
            f"{model['sight_threatening_sensitivity']:.0%} of those with severe disease or worse, with "
            f"{1 - model['sight_threatening_specificity']:.0%} false alarms."
        )
    if model.get("operating_point"):
        found = (
            f"{own['sensitivity']:.0%} of those with {DISEASES.get(what, what)}, with {1 - own['specificity']:.0%} "
            "false alarms"
            for what, own in model["operating_point"].items()
        )
        said.append(f"Its thresholds call {', and '.join(found)}.")
    if model.get("loss") == "balanced":
        said.append(
            "It was trained as if all grades were equally common, so that severe disease is found: its percentages say "
            "how well a scan fits a grade, not how likely the grade is among patients."
        )
    epsilon = (model.get("epsilon") or {}).get("prv")
    if epsilon is not None:
        said.append(
            f"What it tells about its training patients is bounded by differential privacy: epsilon {epsilon:.2f} at "
            f"delta {model['delta']:g}, setting {model['setting']}. A bound above 5 excludes hardly any attack."
        )
    statement = f"<pre>{html.escape(model['statement'])}</pre>"
    return (
        f"<details><summary>About the model</summary><p>{html.escape(' '.join(said))}</p>"
        f"<p>Its privacy statement:</p>{statement}</details>"
    )


def preview(image: Image.Image, name: str, warning: str | None = None, grading: "Grading | None" = None) -> str:
    """The chosen picture, a warning where it may not be a retina scan, and beside it what the provider received."""
    picture = _tag(image, f"Preview of {name}, {image.width} by {image.height} pixels")
    said = f"<p class='wrong' role='alert'>{html.escape(warning)}</p>" if warning else ""
    shown = f"<figure>{picture}<figcaption class='small'>{html.escape(name)}</figcaption></figure>"
    if grading is not None:
        received = _tag(noise(grading), "Coloured noise: what the provider received of the scan")
        said_of_it = "<figcaption class='small'>the same scan, as the provider received it</figcaption>"
        shown += f"<figure>{received}{said_of_it}</figure>"
    return f"<div class='pictures'>{shown}</div>{said}"


def progress(done: int, steps: int, text: str) -> str:
    """A bar that shows how far the protocol has come."""
    return (
        f"<label>Progress of the computation <progress max='{steps}' value='{done}'></progress></label>"
        f"<p class='small'>{html.escape(text)}</p>"
    )


def note(text: str, *, wrong: bool = False) -> str:
    """One sentence, which a screen reader reads out unasked."""
    return f"<p class='{'wrong' if wrong else 'said'}' role='{'alert' if wrong else 'status'}'>{html.escape(text)}</p>"


def result(grading: "Grading", heading: int = 2, drawn: str | None = None) -> str:
    """The grade, its meaning, and what was opened; ``drawn``: the grade a synthetic sample was drawn with."""
    answer = grading.answer
    if answer.probabilities is None:
        table, opened = "", "the grade alone; how sure the model was, nobody was told"
    else:
        opened = f"a score for each of the {len(answer.grades)} grades, with a little noise of the provider's"
        rows = "".join(
            f"<tr><th scope='row'>{html.escape(grade)}</th><td>{probability:.1%}</td>"
            f"<td class='track' aria-hidden='true'><div class='bar' style='width: {100 * probability:.1f}%'></div></td>"
            "</tr>"
            for grade, probability in zip(answer.grades, answer.probabilities, strict=True)
        )
        table = f"<table><caption>What the model thinks of each grade</caption>{rows}</table>"
        table += _calls(answer)
    warning = note(f"Take care: {EXCEEDED}.", wrong=True) if answer.exceeded else ""
    sample = f"<p>This sample is synthetic; it was drawn as: {html.escape(drawn)}.</p>" if drawn else ""
    return f"""<div role="status"><h{heading}>Grade: {html.escape(answer.grade)}</h{heading}>
<p>{html.escape(MEANINGS.get(answer.grade, ""))}</p></div>
{warning}{table}<p class="small">Opened to this page, and to nobody else: {opened}.</p>{sample}
<p><b>Not a diagnosis.</b> The model is for teaching, and can be confident and wrong. Ask a physician.</p>"""


def _calls(answer: "Answer") -> str:
    """What is called at a screening programme's thresholds, if the provider has any."""
    if not answer.called:
        return ""
    said = f"Expected grade: {answer.severity:.2f} of 0 to {len(answer.grades) - 1}. " + " ".join(
        f"Beyond {answer.thresholds[what]:.2f} a scan is called {what.replace('_', '-')}: this one is"
        f"{'' if called else ' not'}."
        for what, called in answer.called.items()
    )
    own = (
        "The thresholds are the provider's, the same for everybody. This page has made the comparison, and nobody else "
        "learns the outcome."
    )
    return f"<p>{html.escape(said)}</p><p class='small'>{own}</p>"


def workers(grading: "Grading") -> list[tuple[str, int, str, str]]:
    """Each worker's role, process number, what it held, and what it saw."""
    amount = grading.answer.bytes
    return [
        (
            "patient (this page)",
            grading.pids["patient"],
            "your scan, and now the answer",
            f"masked weights, {amount['setup_to_patient'] / 1e6:.1f} MB, and shares of values inside the network, "
            f"{amount['online_received'] / 1e6:.1f} MB; both look like noise. Of the model only the answer, and its "
            "public plan: layers, sizes, scales.",
        ),
        (
            "provider",
            grading.pids["provider"],
            "the model",
            f"that somebody asked, and {amount['online_sent'] / 1e6:.1f} MB from this page that look like noise. "
            "Neither the scan nor the answer.",
        ),
        (
            "crypto-provider",
            grading.pids["crypto-provider"],
            f"random numbers: a seed for this page, and {amount['offline_to_provider'] / 1e6:.1f} MB for the provider",
            "the plan, and that randomness for one query was asked for. Nothing of scan, weights or answer.",
        ),
    ]


def curious(grading: "Grading") -> str:
    """What each of the three workers saw, how much was sent, and how long it took, folded away."""
    answer, amount = grading.answer, grading.answer.bytes
    rows = "".join(
        f"<tr><th scope='row'>{role}<br><span class='small'>process {pid}</span></th><td>{held}</td><td>{saw}</td></tr>"
        for role, pid, held, saw in workers(grading)
    )
    online = (amount["online_sent"] + amount["online_received"]) / 1e6
    return f"""<details><summary>For the curious: what each of the three saw</summary>
<table><caption>The three workers</caption>
<tr><th scope="col">worker</th><th scope="col">held</th><th scope="col">saw</th></tr>{rows}</table>
<p>From your request to the grade {grading.seconds:.2f} s: {answer.seconds_online:.2f} s online, with {answer.rounds}
rounds between page and provider and {online:.1f} MB; {answer.seconds_offline:.2f} s of preparation before, partly
while you looked at the picture.</p></details>"""


def noise(grading: "Grading") -> Image.Image:
    """The masked picture as the provider received it: the upper byte of each number, as colours."""
    upper = (grading.seen >> np.uint32(24)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(upper[:3].transpose(1, 2, 0)))


def draw_result(grading: "Grading", image: Image.Image) -> "Figure":
    """For readers without widgets, a Figure: the scan, what the provider received of it, and what was opened."""
    from matplotlib.figure import Figure

    answer = grading.answer
    figure = Figure(figsize=(8.4, 2.8), dpi=72, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    for axes, picture, title in ((left, image, "the scan"), (middle, noise(grading), "what the provider received")):
        axes.imshow(picture)
        axes.set_title(title)
        axes.set_axis_off()
    right.set_title(f"grade: {answer.grade}")
    if answer.probabilities is None:
        right.set_axis_off()
        return figure
    bars = right.barh(answer.grades, answer.probabilities, color=BLUE)
    right.bar_label(bars, [f"{probability:.1%}" for probability in answer.probabilities], padding=3)
    right.set(xlim=(0, 1.25), xticks=(0, 0.5, 1), xlabel="probability")
    right.invert_yaxis()
    return figure


def _tag(image: Image.Image, said: str) -> str:
    """An image as a tag that carries its pixels; small ones are enlarged, so that they can be seen."""
    small = image.copy()
    if max(image.size) > PREVIEW:
        small.thumbnail((PREVIEW, PREVIEW))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    side = f"width: {min(PREVIEW, PREVIEW * small.width // max(small.size))}px"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(said, quote=True)}' style='{side}' src='data:image/png;base64,{data}'>"
