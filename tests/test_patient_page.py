"""The patient's page without a browser: what a hand does, what is shown, and what happens when something breaks."""

import datetime
import io
import os
import re
import signal
import stat
import threading
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
from PIL import Image

from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.images import prepare
from dopamine_lib.inference.network.serving import load
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.inference.workers import tls
from dopamine_lib.models.checkpoints import save_model
from dopamine_lib.models.networks import HALF, build, to_input
from dopamine_lib.page import consultation, served_model, widget
from dopamine_lib.page import html as show
from dopamine_lib.page.consultation import (
    INTRODUCTION,
    Backend,
    Consultation,
    Introduction,
    SharedBackend,
    find_backend,
)
from dopamine_lib.page.widget import PatientPage, samples

SIZE = 28


@pytest.fixture(scope="module", autouse=True)
def _numpy_kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "active", lambda: kernels)
        patch.setenv("DOPAMINE_KERNELS", "numpy")  # for the processes
        patch.delenv(INTRODUCTION, raising=False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network with large weights, so that its answers differ, as a file and as ``plain``."""
    net = build("cnn", 5, None, 0).requires_grad_(False)
    net[-1].weight.mul_(20)
    path = tmp_path_factory.mktemp("page") / "model.safetensors"
    about = {
        "architecture": "cnn",
        "grades": GRADES,
        "preprocessing": {"size": SIZE, "mean": HALF[0], "std": HALF[1]},
        "setting": "FSCDP",
        "statement": "for a test <only>",
    }
    save_model(path, net, about)

    def plain(image):
        return net(to_input(prepare(image, SIZE)[None], *HALF))[0].numpy()

    return SimpleNamespace(path=path, plain=plain)


@pytest.fixture(scope="module")
def backend(model):
    """Provider and crypto-provider as threads of this process: real ones, without the seconds that processes take."""
    from dopamine_lib.inference.workers.crypto_provider import CryptoProviderServer
    from dopamine_lib.inference.workers.provider import ProviderServer

    at = ("127.0.0.1", 0)
    roles = ("patient", "provider", "crypto-provider")
    patient, provider, crypto_provider = (tls.Credentials.make(role) for role in roles)
    patients = {"patient": patient.certificate}
    with CryptoProviderServer(at, crypto_provider, provider.certificate, patients) as other:
        its = other.address, crypto_provider.certificate
        with ProviderServer(at, provider, patients, its, *load(model.path)) as server:
            pids = {"provider": 11, "crypto-provider": 12}
            known = Introduction(
                patient, (server.address, provider.certificate), its, pids, served_model.facts(model.path)
            )
            yield SimpleNamespace(introduction=lambda: known, close=lambda: None)


@pytest.fixture
def page(backend):
    page = PatientPage(backend)
    yield page
    page.close()


def check(model, page) -> None:
    """The page shows the answer that plain inference gives for its picture."""
    logits = model.plain(page.image)
    answer = page.grading.answer
    assert np.abs(np.array(answer.logits) - logits).max() < 1e-3 * np.ptp(logits)
    assert answer.grade == GRADES[int(logits.argmax())] and f"Grade: {answer.grade}" in page.result.value
    assert sum(answer.probabilities) == pytest.approx(1)
    for grade, probability in zip(GRADES, answer.probabilities, strict=True):
        assert re.search(rf"{grade}</th><td>{probability:.1%}</td>", page.result.value)
    assert "Opened to this page, and to nobody else: a score for each of the 5 grades" in page.result.value
    assert "Not a diagnosis" in page.result.value and show.MEANINGS[answer.grade] in page.result.value


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_browser_does(page, data: bytes, name: str) -> None:
    """What arrives when a file was chosen."""
    now = datetime.datetime.now(datetime.UTC)
    file = {"name": name, "type": "", "size": len(data), "content": memoryview(data), "last_modified": now}
    page.upload.value = (file,)


def test_a_sample_is_graded_and_shown(model, page):
    bars = []
    page.progress.observe(lambda change: bars.extend(re.findall(r"max='(\d+)' value='(\d+)'", change.new)), "value")
    assert page.grade.disabled  # there is no picture
    page.choose(3)
    assert page.image.size == (SIZE, SIZE) or page.image.size == (64, 64)
    assert "Sample 4" in page.preview.value and not page.grade.disabled
    page.grade.click()
    grading = page.wait()
    check(model, page)
    assert f"drawn as: {samples(page.image.width)[3][1]}" in page.result.value
    done = [int(value) for _, value in bars]
    assert done[0] == 0 and done == sorted(done) and len(done) > 5
    assert bars[-1][0] == bars[-1][1]  # the last step of the protocol
    # what the provider got of the scan: nothing like it, and all that was sent of it
    assert grading.seen.shape == (3, SIZE, SIZE) and grading.answer.bytes["online_sent"] > grading.seen.nbytes
    curious = page.curious.value
    for pid in (os.getpid(), *grading.pids.values()):
        assert f"process {pid}" in curious
    assert f"{grading.answer.rounds}" in curious and f"{grading.seconds:.2f} s" in curious
    assert grading.seconds > grading.answer.seconds_online > 0
    page.choose(1)  # another picture: the old answer is gone
    assert page.result.value == page.curious.value == "" and page.grading is None
    page.wait()


def test_an_upload_is_graded(model, page):
    scan = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    as_browser_does(page, png(scan), "my <eye>.png")
    assert "my &lt;eye&gt;.png" in page.preview.value and "my <eye>" not in page.preview.value
    page.grade.click()
    page.wait()
    check(model, page)
    assert page.image.size == (50, 40) and page.drawn is None
    page.choose(0)
    assert page.upload.value == ()  # so that the same file may be chosen again
    page.wait()


@pytest.mark.parametrize("data", [b"", b"no image <b>", png(Image.new("RGB", (30, 30)))[:-30]])
def test_a_bad_upload_is_refused_and_the_page_lives_on(model, page, data):
    page.choose(2)
    as_browser_does(page, data, "<b>bad.png")
    assert page.image is None and page.grade.disabled and not page.upload.disabled
    assert "&lt;b&gt;bad.png" in page.status.value and "<b>" not in page.status.value
    page.grade.click()  # nothing happens without a picture
    assert page.grading is None
    page.choose(2)
    page.grade.click()
    page.wait()
    check(model, page)


def test_a_picture_of_something_else_gets_a_warning_and_may_be_graded(page):
    as_browser_does(page, png(Image.new("RGB", (64, 64), "white")), "paper.png")
    assert "role='alert'" in page.preview.value and not page.grade.disabled
    page.choose(0)
    assert "role='alert'" not in page.preview.value
    page.wait()


def test_a_second_click_asks_nothing(page, monkeypatch):
    asked, ask, go_on = [], Consultation.grade, threading.Event()

    def slow(self, *arguments):
        asked.append(1)
        go_on.wait(30)
        return ask(self, *arguments)

    monkeypatch.setattr(Consultation, "grade", slow)
    page.choose(0)
    image = page.image
    page.grade.click()
    assert page.grade.disabled and page.upload.disabled and page.sample.disabled
    page.grade.click()
    assert page.image is image
    go_on.set()
    assert page.wait() and len(asked) == 1
    assert not page.grade.disabled and not page.upload.disabled and not page.sample.disabled


@pytest.mark.parametrize("good", [True, False])
def test_what_is_chosen_too_late_has_its_turn_after_the_answer(model, page, monkeypatch, good):
    ask, go_on = Consultation.grade, threading.Event()

    def slow(self, *arguments):
        go_on.wait(30)
        return ask(self, *arguments)

    monkeypatch.setattr(Consultation, "grade", slow)
    page.choose(0)
    image = page.image
    page.grade.click()
    scan = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    as_browser_does(page, png(scan) if good else b"", "late.png")  # sent before the browser heard
    assert page.image is image and page.grade.disabled and "Asking" in page.status.value
    go_on.set()
    page.wait()
    assert page.grading is None and page.result.value == ""  # no answer stands beside a picture it is not of
    assert not page.upload.disabled and page.grade.disabled != good
    if good:
        assert "Preview of late.png" in page.preview.value
        page.grade.click()
        page.wait()
        check(model, page)
    else:
        assert "late.png: an empty file" in page.status.value


def test_several_patients_at_once_are_all_answered(model, backend):
    pages = [PatientPage(backend) for _ in range(3)]
    for i, page in enumerate(pages):
        page.choose(i)
    for page in pages:
        page.grade.click()
    for page in pages:
        page.wait()
        check(model, page)
        page.close()


@pytest.mark.slow
def test_a_worker_that_died_is_started_again_and_a_closed_page_ends_them(model):
    page = PatientPage(weights=model.path)
    page.choose(4)
    page.wait()  # a session is open now
    for role in ("provider", "crypto-provider"):
        before = page._consultation.introduction().pids
        os.kill(before[role], signal.SIGKILL)
        for _ in range(2):  # an open session needs no crypto-provider any more; the next one does
            page.grade.click()
            page.wait()
            check(model, page)
        assert page.grading.pids[role] != before[role]
    pids = page.grading.pids
    page.close(), page.close()
    for role in ("provider", "crypto-provider"):
        assert not os.path.exists(f"/proc/{pids[role]}")
    assert page.grade.disabled and page.upload.disabled
    page.grade.click()
    with pytest.raises(ChannelError, match="closed"):
        page._consultation.introduction()


def test_an_idle_session_that_was_given_up_is_replaced_unnoticed(model, page):
    page.choose(1)
    page.wait()
    page._consultation._session[0]._channel.close()
    told = []
    page._retry = told.append
    page.grade.click()
    page.wait()
    check(model, page)
    assert not told


def test_a_backend_that_cannot_be_reached_is_reported_and_may_be_tried_again(model, backend, monkeypatch):
    monkeypatch.setattr(consultation, "PATIENCE", 0)
    broken = True

    def introduction():
        if broken:
            raise ChannelError("the <provider> cannot be reached")
        return backend.introduction()

    page = PatientPage(SimpleNamespace(introduction=introduction, close=lambda: None))
    page.choose(0)
    page.grade.click()
    assert page.wait() is None and page.failure == "the <provider> cannot be reached"
    assert "No answer: the &lt;provider&gt; cannot be reached" in page.status.value and page.progress.value == ""
    broken = False
    page.grade.click()
    assert page.wait() and page.failure is None
    check(model, page)
    page.close()


class Browser:
    """What a widget sends its updates to, and what ``wire`` makes of each of them before it arrives."""

    kernel, comm_id = True, "browser"

    def __init__(self, wire=lambda value: None):
        self.wire, self.shown = wire, {}

    def send(self, data, buffers=None):
        for value in data["state"].values():
            self.wire(value)
        self.shown |= data["state"]

    def on_msg(self, callback):
        """Nothing comes back."""

    close = on_msg


@pytest.fixture
def starting(backend):
    """A page whose workers have not started, and what lets them."""
    begin = threading.Event()
    page = PatientPage(SimpleNamespace(introduction=lambda: begin.wait(60) and backend.introduction(), close=list))
    assert "Starting" in page.status.value
    yield page, begin.set
    begin.set()
    page.close()


def test_the_page_says_when_it_is_ready(starting):
    page, begin = starting
    begin()
    page.wait()
    assert "Ready" in page.status.value and "for a test" in page.about.value


def test_news_of_the_start_wipes_out_no_answer_to_the_patient(starting):
    page, begin = starting
    as_browser_does(page, b"", "nothing.png")
    begin()
    page.wait()
    assert "nothing.png: an empty file" in page.status.value and page.about.value


@pytest.mark.parametrize("chosen", [False, True])
def test_a_start_that_failed_is_said_unless_the_patient_was_told_something(chosen):
    begin = threading.Event()

    def introduction():
        begin.wait(60)
        raise ChannelError("no workers")

    page = PatientPage(SimpleNamespace(introduction=introduction, close=list))
    start = page._thread
    if chosen:
        page.choose(0)
    begin.set()
    start.join()
    assert "role='alert'>no workers" in page.status.value
    as_browser_does(page, b"", "nothing.png")
    page._start()
    assert "nothing.png: an empty file" in page.status.value
    page.close()


def test_browsers_hear_of_changes_in_their_order(starting):
    page, begin = starting
    on_its_way, other = threading.Event(), threading.Event()

    def wire(value):  # the news of the start is on its way until something else has arrived, or cannot
        if "Ready" in value:
            on_its_way.set()
            other.wait(0.5)
        else:
            other.set()

    page.status.comm = browser = Browser(wire)
    begin()
    assert on_its_way.wait(60)
    as_browser_does(page, b"", "nothing.png")
    page.wait()
    assert "nothing.png: an empty file" in page.status.value == browser.shown["value"]


def test_a_browser_that_comes_to_show_the_page_is_told_everything(page):
    page.choose(0)
    page.wait()
    told = leaves(page.widget)[1:]
    browsers = []
    for child in told:
        child.comm = Browser()
        browsers.append(child.comm)
    page.widget.set_state({"_view_count": 1})  # as a browser does
    for child, browser in zip(told, browsers, strict=True):
        assert browser.shown == child.get_state("value" if isinstance(child, ipywidgets.HTML) else "disabled")


def test_a_file_that_holds_no_model_is_reported(tmp_path):
    wrong = tmp_path / "model.safetensors"
    wrong.write_bytes(b"nothing")
    page = PatientPage(weights=wrong)
    page.wait()
    assert "role='alert'" in page.status.value and "is not a model" in page.status.value
    page.choose(0)
    page.grade.click()
    assert page.wait() is None and "is not a model" in page.failure
    page.close()


def test_samples_are_one_of_each_grade_and_the_same_every_time():
    found = samples(64)
    assert sorted(grade for _, grade in found) == sorted(GRADES) and len(found) == widget.SAMPLES
    assert [grade for _, grade in found] != list(GRADES)  # the order tells nothing
    assert all(image.size == (64, 64) and image.mode == "RGB" for image, _ in found)
    assert [grade for _, grade in samples(28)] == [grade for _, grade in found]


# the introduction


def test_an_introduction_is_for_its_owner_only_and_comes_back_whole(backend, tmp_path, monkeypatch):
    path = tmp_path / "introduction.json"
    introduction = backend.introduction()
    for _ in range(2):
        introduction.write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]
    again = Introduction.read(path)
    assert again == introduction and "PRIVATE" not in repr(again) and "PRIVATE" in path.read_text()
    monkeypatch.setenv(INTRODUCTION, str(path))
    assert isinstance(find_backend(), SharedBackend) and isinstance(find_backend(tmp_path / "other"), Backend)
    guest = Consultation(find_backend())
    for _ in range(2):
        assert guest.grade(samples(64)[0][0]).pids["provider"] == introduction.pids["provider"]
        guest.close()  # this ends a session and nothing else


def test_closing_waits_for_no_start(monkeypatch):
    """Ctrl-C while the workers start: the server waited for them, up to five minutes; they end all the same."""
    begun, go_on, ended, said = threading.Event(), threading.Event(), [], []

    class Starting:
        pids, peers = {}, [None, None]

        def __init__(self, *model, **more):
            begun.set()
            assert go_on.wait(60)

        def close(self):
            ended.append(self)

    def start():
        with pytest.raises(ChannelError, match="was closed"):
            backend.introduction()
        said.append("closed")

    monkeypatch.setattr(consultation, "Workers", Starting)
    monkeypatch.setattr(served_model, "facts", lambda path: {"size": 28})
    backend = consultation.Backend("model.safetensors")
    starter = threading.Thread(target=start)
    starter.start()
    assert begun.wait(60)
    closing = threading.Thread(target=backend.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive() and not ended
    go_on.set()
    starter.join(60)
    assert len(ended) == 1 and said == ["closed"]


def test_a_shared_backend_waits_for_its_introduction_but_not_for_ever(backend, tmp_path, monkeypatch):
    path = tmp_path / "introduction.json"
    timer = threading.Timer(0.3, backend.introduction().write, (path,))
    timer.start()
    assert SharedBackend(path).introduction().pids == backend.introduction().pids
    timer.join()
    with pytest.raises(ChannelError, match="start it again"):
        SharedBackend(tmp_path / "gone" / "introduction.json").introduction()
    monkeypatch.setattr(consultation, "START_TIMEOUT", 0.2)
    with pytest.raises(ChannelError, match="start it again"):
        SharedBackend(tmp_path / "late.json").introduction()


# what is shown


class Outline(HTMLParser):
    """Checks that tags are balanced and pictures and links are what a page without outside resources may have."""

    VOID = ("img", "br", "meta")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def leaves(widget) -> list:
    """What is shown, without the boxes around it, in the order in which it is read."""
    return sum(map(leaves, widget.children), []) if isinstance(widget, ipywidgets.Box) else [widget]


def shown(page) -> list[str]:
    return [child.value for child in leaves(page.widget) if isinstance(child, ipywidgets.HTML)]


def test_what_the_provider_received_stands_beside_the_scan_until_another_is_chosen(backend):
    page = PatientPage(backend)
    page.choose(1)
    assert "Preview of Sample 2" in page.preview.value and "Coloured noise" not in page.preview.value
    page.grade.click()
    page.wait()
    assert page.preview.value.index("Preview of Sample 2") < page.preview.value.index("Coloured noise")
    page.choose(2)
    assert "Preview of Sample 3" in page.preview.value and "Coloured noise" not in page.preview.value


@pytest.fixture(scope="module")
def full(backend):
    """A page that shows everything it can."""
    page = PatientPage(backend, heading=1)
    page.choose(0)
    page.grade.click()
    page.wait()
    page.status.value = show.note("a note")
    return page


def test_the_page_is_sound_html_without_anything_from_outside(full):
    text = "".join(shown(full))
    outline = Outline(text)
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", re.sub(r"base64,[^']*'", "'", text))
    for tag, attributes in outline.attributes:
        if tag == "img":
            assert attributes["alt"].strip() and attributes["src"].startswith("data:image/png;base64,")
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert outline.tags.count("h1") == 1 and outline.tags.index("h1") < outline.tags.index("h2")
    assert outline.tags.count("details") == outline.tags.count("summary") == 2
    with pytest.raises(AssertionError):
        Outline("<p><b>unbalanced</p>")


def test_every_control_says_what_it_is_in_the_order_of_their_use(full):
    controls = [child for child in leaves(full.widget) if hasattr(child, "disabled")]
    assert controls == [full.upload, full.sample, full.grade]
    assert all(control.description and control.tooltip for control in controls)
    assert full.upload.icon == ""  # an icon would come from a font of elsewhere
    text = "".join(shown(full))
    assert re.search(r"<label>Progress[^<]*<progress max='\d+' value='\d+'></progress></label>", text)
    for said in ("one machine", "Not a diagnosis", "stays with this page", "crypto-provider"):
        assert said in text


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast(full):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#2196f3", "#ffffff") < 4.5  # the buttons' own blue would not do
    for colour in (show.BLUE, show.INK, show.GREY, show.RED):
        assert contrast(colour, "#ffffff") > 4.5
    used = set(re.findall(r"color: (#\w+)", show.STYLE))
    assert used <= {show.INK, show.GREY, show.RED, show.BLUE}
    for control in (full.upload, full.grade):
        assert contrast(control.style.text_color, control.style.button_color) > 4.5


def hostile():
    """A grading with markup wherever text comes from elsewhere."""
    from dopamine_lib.inference.workers.answer import Answer

    bad = "<script>x</script>"
    amounts = {"online_sent": 1, "online_received": 2, "offline_to_provider": 3, "setup_to_patient": 4}
    beyond = {bad: 0.2, "worse_still": 0.3}  # the severity is 0.25
    answer = Answer(bad, [bad, "B"], [0.75, 0.25], [1.0, 0.0], 0.1, 0.2, 7, amounts, exceeded=False, thresholds=beyond)
    model = {"statement": bad, "trained_on": bad, "setting": bad, "epsilon": {"prv": 1.0}, "delta": 1e-4}
    model["operating_point"] = {bad: {"sensitivity": 0.5, "specificity": 0.5}}
    seen = np.zeros((3, 8, 8), np.uint32)
    return consultation.Grading(answer, 1.0, seen, {"patient": 1, "provider": 2, "crypto-provider": 3}, model), bad


def test_text_from_elsewhere_is_escaped():
    grading, bad = hostile()
    image = Image.new("RGB", (8, 8))
    pieces = [
        show.result(grading, drawn=bad),
        show.curious(grading),
        show.preview(image, bad, bad, grading),
        show.about(grading.model),
        show.preview(image, bad, bad),
        show.note(bad),
        show.progress(1, 2, bad),
    ]
    for piece in pieces:
        assert "<script" not in piece
        Outline(piece)
    assert "&lt;script" in "".join(pieces) and "75.0%" in pieces[0] and "width: 75.0%" in pieces[0]


def test_where_the_grade_alone_was_opened_the_page_says_so_and_shows_no_probability():
    grading, _ = hostile()
    alone = replace(grading, answer=replace(grading.answer, probabilities=None, logits=None))
    said = show.result(alone)
    Outline(said)
    assert "<table" not in said and "the grade alone" in said and "Not a diagnosis" in said
    assert not show.draw_result(alone, Image.new("RGB", (8, 8))).axes[2].texts


def test_what_is_called_at_a_threshold():
    grading, _ = hostile()
    said = show.result(grading)
    assert "Expected grade: 0.25 of 0 to 1. Beyond 0.20" in said and said.count("this one is not") == 1
    assert "Beyond 0.30 a scan is called worse-still: this one is not." in said
    assert "nobody else learns the outcome" in said
    for silent in ({"thresholds": {}}, {"probabilities": None, "logits": None}):
        assert "Beyond" not in show.result(replace(grading, answer=replace(grading.answer, **silent)))


def test_a_picture_that_exceeds_the_room_is_answered_with_a_warning():
    grading, _ = hostile()
    warned = show.result(replace(grading, answer=replace(grading.answer, exceeded=True)))
    Outline(warned)
    assert "role='alert'" in warned and "may be wrong" in warned and "may be wrong" not in show.result(grading)


def test_about_says_only_what_the_file_says():
    assert "epsilon" not in show.about({"statement": "s", "setting": "C"})
    known = show.about(served_model.facts())
    assert "epsilon" in known and "synthetic test patients" in known and "no photograph of a real eye" in known


def test_the_picture_for_readers_without_widgets():
    grading, _ = hostile()
    figure = show.draw_result(grading, Image.new("RGB", (8, 8)))
    assert len(figure.axes) == 3
    assert [label.get_text() for label in figure.axes[2].texts] == ["75.0%", "25.0%"]
    assert show.noise(grading).size == (8, 8)
