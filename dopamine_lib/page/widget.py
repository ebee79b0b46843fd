"""The patient's page: upload a scan or take a sample, see it, ask, and read the grade. In JupyterLab and by Voila.

    page = PatientPage()
    display(page.widget)
    page.choose(2), page.grade.click(), page.wait()       # by program: for tests, and where nobody clicks

The page is the patient's process and holds the scan. ``consultation`` has its backend, the other two processes, and
``html`` what is shown. Whatever takes time runs in a thread, so that the page stays responsive; a lock lets these
threads and what a browser asks for change the page one after the other, and no news wipes out an answer to the patient.
"""

import functools
import threading
from pathlib import Path

import ipywidgets as widgets
from PIL import Image

from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.decoding import open_apart
from dopamine_lib.data.retina_check import retina_warning
from dopamine_lib.data.synthetic import MAX_SIZE, MIN_SIZE, describe, make_population
from dopamine_lib.data.uploads import MAX_UPLOAD, read_upload
from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.page import html as show
from dopamine_lib.page.consultation import Backend, Consultation, Grading, SharedBackend, find_backend

SAMPLES = len(GRADES)
#: The samples are the first of each grade among these synthetic patients, whom no model of the kit has seen.
_PATIENTS, _SEED = 11, 6
STARTING = "Starting the provider and the crypto-provider ... you may choose a picture meanwhile."
PATIENCE = 120.0  # seconds that ``wait`` waits


@functools.lru_cache(maxsize=4)
def samples(size: int) -> tuple[tuple[Image.Image, str], ...]:
    """Five synthetic eyes of ``size`` pixels, and the grade each was drawn with; not in the order of the grades."""
    labels, severity, _ = describe(_PATIENTS, _SEED, "private")
    images = make_population(_PATIENTS, size, _SEED, threads=1)[0]
    first = [next(i for i in range(_PATIENTS) if labels[i] == severity[i] == grade) for grade in range(SAMPLES)]
    return tuple((Image.fromarray(images[i]), GRADES[labels[i]]) for i in sorted(first))


class PatientPage:
    """The page; ``widget`` is what to display.

    backend  what serves it (``consultation``); found or started if not given
    weights  a model that ``reproduce`` wrote, instead of the one that is shipped; for a page without given backend
    heading  level of the first heading: 1 for a page of its own

    For use by programs, ``upload``, ``sample`` and ``grade`` are the controls; ``image``, ``grading`` and ``failure``
    hold what was chosen, the last answer, and what went wrong instead.
    """

    def __init__(
        self,
        backend: Backend | SharedBackend | None = None,
        *,
        weights: str | Path | None = None,
        heading: int = 2,
    ):
        self._consultation = Consultation(backend or find_backend(weights))
        self._heading, self._model = heading, {}
        self._lock = threading.RLock()  # held while the page changes, so that browsers hear of changes in their order
        self._thread, self._busy, self._closed = None, False, False
        self._waiting = None  # what was chosen while an answer was being worked out
        self.image, self.name, self.drawn, self._warning = None, "", None, None
        self.grading, self.failure = None, None
        self._build()
        self._in_background(self._start)

    def _build(self) -> None:
        dark = {"button_color": show.BLUE, "text_color": "#ffffff", "font_size": "1rem"}
        wide = widgets.Layout(width="100%", max_width="24rem")
        self.upload = widgets.FileUpload(
            accept=".png,.jpg,.jpeg",
            description=show.CHOOSE,
            tooltip=f"A PNG or JPEG file of at most {MAX_UPLOAD >> 20} MiB; it stays with this page",
            icon="",
            style=dark,
            layout=wide,
        )
        options = [("choose ...", None), *((f"Sample {i + 1}", i) for i in range(SAMPLES))]
        self.sample = widgets.Dropdown(
            options=options,
            value=None,
            description="or take a sample:",
            tooltip="Synthetic eyes, drawn by this kit",
            style={"description_width": "9rem"},
            layout=wide,
        )
        self.grade = widgets.Button(
            description="Grade this scan",
            tooltip="Starts the private computation; takes a few seconds",
            disabled=True,
            style=dark,
            layout=wide,
        )
        self.status, self.preview, self.progress, self.result, self.curious = (
            widgets.HTML(layout=widgets.Layout(width="100%")) for _ in range(5)
        )
        self.status.value = show.note(STARTING)
        self.about = widgets.HTML()
        self.upload.observe(self._uploaded, "value")
        self.sample.observe(self._sampled, "value")
        self.grade.on_click(self._asked)
        asked = [self.upload, self.sample, self.grade, self.status, self.progress, self.result]
        columns = widgets.HBox([widgets.VBox(asked), self.preview])
        columns.add_class("columns")  # beside each other where there is room
        self.widget = widgets.VBox(
            [widgets.HTML(show.STYLE + show.introduction(self._heading)), columns, self.curious, self.about],
            layout=widgets.Layout(width="100%"),
            _view_count=0,  # from now on browsers tell when they show the page
        )
        self.widget.observe(self._viewed, "_view_count")
        self.widget.add_class("dopamine-page")

    def choose(self, sample: int) -> None:
        """Take a sample, 0 to 4, as a choice from the list does."""
        self.sample.value = sample

    def take(self, data: bytes, name: str = "") -> None:
        """Take an uploaded file's bytes. Bad ones are reported on the page, which is then without a picture."""
        try:
            image = read_upload(data, name, open_apart)
        except InputError as error:
            self.upload.value = ()  # so that the same file may be chosen again
            self._show(None, refusal=str(error))
            return
        self._show(image, name or "your photograph", warning=retina_warning(image))

    def wait(self) -> Grading | None:
        """Wait until nothing is going on; returns ``grading``, None where there is no answer. Raises TimeoutError."""
        thread = self._thread
        thread.join(PATIENCE)
        if thread.is_alive():
            raise TimeoutError(f"the page is still at work after {PATIENCE:g} s")
        return self.grading

    def close(self) -> None:
        """End the backend, if it is this page's own, and switch the controls off."""
        self._closed = True
        self._consultation.close()
        self._enable()

    def _uploaded(self, change) -> None:
        if change.new:
            self.sample.value = None
            file = change.new[0]
            self.take(bytes(file["content"]), file["name"])

    def _sampled(self, change) -> None:
        if change.new is not None:
            self.upload.value = ()
            size = min(max(self._model.get("size", 64), MIN_SIZE), MAX_SIZE)
            image, drawn = samples(size)[change.new]
            self._show(image, f"Sample {change.new + 1}, a synthetic eye", drawn=drawn)

    def _show(self, image, name: str = "", *, refusal: str = "", warning: str | None = None, drawn: str | None = None):
        """Another picture, or none: forget the last answer, and open a session while the patient looks."""
        with self._lock:
            if self._busy:  # sent before the browser knew that the controls are off: its turn comes after the answer
                self._waiting = functools.partial(
                    self._show, image, name, refusal=refusal, warning=warning, drawn=drawn
                )
                return
            self.image, self.name, self.drawn, self._warning = image, name, drawn, warning
            self.grading = self.failure = None
            self.status.value = show.note(refusal, wrong=True) if refusal else ""
            self.progress.value = self.result.value = self.curious.value = ""
            self._draw()
            self._enable()
            if image is not None:
                self._in_background(self._get_ready)

    def _asked(self, _=None) -> None:
        with self._lock:
            # a second click may arrive before the browser knows that the button is off
            if self.image is None or self._closed or self._busy:
                return
            self._busy = True
            self._enable()
            self.grading = self.failure = None
            self.result.value = self.curious.value = ""
            self._draw()
            self._say("Asking the provider ...")
            self.progress.value = show.progress(0, 1, "getting ready")
            self._in_background(self._ask)

    def _viewed(self, _) -> None:
        """Tell a browser everything again: while it was connecting, with an older state in hand, it missed updates."""
        with self._lock:
            for control in (self.upload, self.sample, self.grade):
                control.send_state("disabled")
            for text in (self.status, self.preview, self.progress, self.result, self.curious, self.about):
                text.send_state("value")

    # what runs in threads

    def _in_background(self, work) -> None:
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        try:
            model, failure = self._consultation.introduction().model, None
        except (InputError, ChannelError) as error:
            model, failure = {}, str(error)
        with self._lock:
            self._model = model
            if model:
                self.about.value = show.about(model)
            # whatever the patient was told meanwhile stands: only the notice of the start is replaced
            if self.status.value == show.note(STARTING):
                self._say(failure or "Ready. Choose a photograph or a sample.", wrong=failure is not None)
            elif failure and not self.status.value:
                self._say(failure, wrong=True)

    def _get_ready(self) -> None:
        try:
            self._consultation.get_ready()
        except (InputError, ChannelError):
            return  # reported when the patient asks: it is tried again then

    def _ask(self) -> None:
        try:
            grading = self._consultation.grade(self.image, self._step, self._retry)
        except (InputError, ChannelError) as error:
            with self._lock:
                self.failure = str(error)
                self.progress.value = ""
                self._say(f"No answer: {error}.", wrong=True)
        else:
            with self._lock:
                self.grading = grading
                self.status.value = ""
                self.result.value = show.result(grading, self._heading + 1, self.drawn)
                self.curious.value = show.curious(grading)
                self._draw()
        finally:
            with self._lock:
                self._busy = False
                self._enable()
                waiting, self._waiting = self._waiting, None
                if waiting:
                    waiting()

    def _step(self, done: int, steps: int, name: str) -> None:
        if done == steps or done * 25 // steps > (done - 1) * 25 // steps:  # a browser need not draw every step
            with self._lock:
                self.progress.value = show.progress(done, steps, f"step {done} of {steps} of the network")

    def _retry(self, error) -> None:
        self._say(f"{error}. Trying again ...", wrong=True)

    def _say(self, text: str, *, wrong: bool = False) -> None:
        with self._lock:
            self.status.value = show.note(text, wrong=wrong)

    def _draw(self) -> None:
        shown = "" if self.image is None else show.preview(self.image, self.name, self._warning, self.grading)
        if self.preview.value != shown:
            self.preview.value = shown

    def _enable(self) -> None:
        with self._lock:
            self.upload.disabled = self.sample.disabled = self._busy or self._closed
            self.grade.disabled = self.upload.disabled or self.image is None
