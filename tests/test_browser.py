"""The patient's page in a browser: what a patient does with a mouse, a keyboard, a phone, and what may go wrong."""

import io
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browsing import Watched, browser, contrasts, names_of_controls, running, spilling, tab_to, too_wide
from PIL import Image

from dopamine_lib.data.images import prepare
from dopamine_lib.data.synthetic import make_population
from dopamine_lib.data.uploads import MAX_UPLOAD, read_upload

ADDRESS = re.compile(r"the patient's page is at (http://127\.0\.0\.1:\d+/); Ctrl-C ends it")
READABLE = 4.5  # contrast of text, WCAG 2.1, 1.4.3
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

pytestmark = pytest.mark.timeout(1500)
pytest.importorskip("voila", reason="the page is served by Voila: pip install voila")


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory):
    """Where ``app`` serves the page with the model that is shipped."""
    folder = tmp_path_factory.mktemp("app")
    log, env = folder / "log", os.environ | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = ["-m", "dopamine_lib", "app", "--port", "0"]
    with running(arguments, log, is_up=lambda: ADDRESS.search(log.read_text()), cwd=folder, env=env):
        yield ADDRESS.search(log.read_text())[1]


@pytest.fixture
def visit(chromium, address):
    """A function that opens the page in a browser of its own; at the end nothing may have been amiss."""
    opened = []

    def open_page(connect=None, **options):
        watched = Watched(chromium, **options)
        opened.append(watched)
        if connect:
            watched.page.route_web_socket(re.compile("/channels"), connect)
        watched.page.goto(address)
        watched.page.get_by_role("button", name="Choose a photograph").wait_for()
        return watched.page

    yield open_page
    for watched in opened:
        watched.context.close()
        assert not watched.outside and not watched.errors


@pytest.fixture(scope="module")
def eyes():
    """Three synthetic eyes as JPEG files, and what the shipped model says of each in the clear."""
    import torch

    from dopamine_lib.models.checkpoints import load_model
    from dopamine_lib.models.networks import to_input
    from dopamine_lib.page.served_model import SERVED

    net, about = load_model(SERVED)
    preparing = about["preprocessing"]
    files = []
    for pixels in make_population(3, 200, 5, threads=1)[0]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        image = prepare(read_upload(buffer.getvalue()), preparing["size"])
        with torch.inference_mode():
            logits = net(to_input(image[None], preparing["mean"], preparing["std"]))[0]
        probabilities = 100 * torch.softmax(logits, 0).numpy()
        files.append(
            SimpleNamespace(
                data=buffer.getvalue(),
                percent=dict(zip(about["grades"], probabilities.tolist(), strict=True)),
                grade=about["grades"][int(logits.argmax())],
            )
        )
    return files


def upload(page, data: bytes | Path, name: str = "eye.jpg") -> None:
    """Choose a file, as with the mouse: one that lies on disk, or bytes under a name."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a photograph").click()
    file = data if isinstance(data, Path) else {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    chooser.value.set_files(file)


def ask(page) -> None:
    """Press the button that asks for the grade, once it can be pressed."""
    page.get_by_role("button", name="Grade this scan").click()


def answer(page) -> tuple[str, dict[str, float]]:
    """Wait for the answer: the grade, and the percentages by grade as they stand on the page."""
    heading = page.get_by_role("heading", name=re.compile("^Grade: "))
    heading.wait_for()
    rows = page.get_by_role("table", name="What the model thinks of each grade").get_by_role("row").all()
    percent = {
        row.get_by_role("rowheader").inner_text(): float(row.get_by_role("cell").first.inner_text().rstrip("%"))
        for row in rows
    }
    return heading.inner_text().removeprefix("Grade: "), percent


def check_answer(page, eye) -> None:
    """The page's answer is the plain model's, up to the rounding of what it shows and of the fixed point."""
    grade, percent = answer(page)
    assert grade == eye.grade and list(percent) == list(eye.percent)
    assert max(abs(percent[name] - eye.percent[name]) for name in percent) < 0.3


def test_upload_wait_and_read_the_grade(visit, eyes):
    page = visit()
    upload(page, eyes[0].data)
    page.get_by_role("img", name="Preview of eye.jpg, 200 by 200 pixels").wait_for()
    ask(page)
    check_answer(page, eyes[0])
    page.get_by_role("img", name="Coloured noise").wait_for()  # not behind a fold
    button, scan = (part.bounding_box() for part in (page.get_by_role("button").first, page.get_by_role("img").first))
    assert scan["x"] > button["x"] + button["width"] and scan["y"] < 700  # beside what is asked, on a desktop
    assert "Not a diagnosis" in page.inner_text("body")
    page.get_by_text("For the curious").click()
    seen = page.get_by_role("table", name="The three workers")
    assert len(set(re.findall(r"process (\d+)", seen.inner_text()))) == 3


@pytest.mark.slow
def test_bad_uploads_get_a_sentence_and_the_page_lives_on(visit, eyes):
    page = visit()
    grade = page.get_by_role("button", name="Grade this scan")
    gif = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(gif, "GIF")
    bad = {
        "text.png": (b"this is no picture", "not a PNG or JPEG image; give"),
        "moving.gif": (gif.getvalue(), "not a PNG or JPEG image; give"),
        "half.jpg": (eyes[0].data[: len(eyes[0].data) // 2], "not a readable"),
        "nothing.png": (b"", "an empty file"),
        "<img src=x onerror=alert(1)>.png": (b"x", "not a PNG or JPEG image; give"),
        "large.png": (bytes(MAX_UPLOAD + 1), "MiB is too much"),
    }
    for name, (data, said) in bad.items():
        upload(page, data, name)
        alert = page.get_by_role("alert").filter(has_text=f"{name}: ")
        alert.wait_for()
        assert said in alert.inner_text() and grade.is_disabled()
    upload(page, eyes[1].data)
    ask(page)
    check_answer(page, eyes[1])


@pytest.mark.slow
def test_a_file_larger_than_the_server_lets_through_is_refused_and_the_page_lives_on(visit, tmp_path):
    page, huge = visit(), tmp_path / "huge.png"
    with open(huge, "wb") as file:
        file.truncate(3 * MAX_UPLOAD)
    for data, name, said in ((huge, "huge.png", "MiB is too much"), (b"x", "next.png", "not a PNG or JPEG image")):
        upload(page, data, name)
        page.get_by_role("alert").filter(has_text=f"{name}: ").filter(has_text=said).wait_for()


@pytest.mark.slow
def test_what_was_said_while_a_browser_was_connecting_is_said_again(visit):
    visit().get_by_text("Ready. ").wait_for()  # the workers have started: a page is ready as soon as it is made
    states = []

    def connect(socket):
        def pass_on(message):
            if b"update_states" in message:  # what a browser begins with: as if it had been sent a little earlier
                message = message.replace(b"Ready. ", b"Older. ")
                states.append(message)
            socket.send(message)

        socket.connect_to_server().on_message(pass_on)

    visit(connect=connect).get_by_text("Ready. ").wait_for()
    assert states


@pytest.mark.slow
def test_twenty_megabytes_go_through_with_a_warning(visit):
    page = visit()
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (2600, 2700, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    assert 20e6 < len(buffer.getvalue()) < MAX_UPLOAD
    upload(page, buffer.getvalue(), "noise.png")
    page.get_by_role("img", name="Preview of noise.png, 2700 by 2600 pixels").wait_for()
    page.get_by_role("alert").filter(has_text="does not look like a photograph of the retina").wait_for()
    ask(page)
    answer(page)


@pytest.mark.slow
def test_keyboard_alone_is_enough(visit, eyes):
    page = visit()
    page.get_by_text("Ready. Choose a photograph").wait_for()
    # a sample: upload comes before the samples, and the button after them
    assert not any("sample" in at or "Grade" in at for at in tab_to(page, "Choose a photograph"))
    assert not any("Grade" in at for at in tab_to(page, "take a sample"))
    samples = page.get_by_label("or take a sample:")
    for _ in range(2):  # the first may only choose the hint that is shown
        if samples.input_value() != "Sample 1":
            page.keyboard.press("ArrowDown")
    page.get_by_role("img", name=re.compile("Preview of Sample 1")).wait_for()
    tab_to(page, "Grade this scan")
    page.keyboard.press("Enter")
    answer(page)
    # an upload, and then the folded part
    tab_to(page, "Choose a photograph", most=40)
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "eye.jpg", "mimeType": "image/jpeg", "buffer": eyes[2].data})
    page.get_by_role("img", name=re.compile("Preview of eye.jpg")).wait_for()
    tab_to(page, "Grade this scan", most=40)
    page.keyboard.press("Enter")
    check_answer(page, eyes[2])
    tab_to(page, "For the curious", most=40)
    page.keyboard.press("Enter")
    page.get_by_role("table", name="The three workers").wait_for()


@pytest.mark.slow
def test_a_phone_need_not_scroll_sideways(visit, eyes):
    page = visit(**PHONE)
    assert not too_wide(page) and not spilling(page)
    upload(page, eyes[0].data, "a-rather-long-file-name-without-any-space-in-it-0123456789.jpg")
    ask(page)
    check_answer(page, eyes[0])
    for folded in page.locator("summary").all():
        folded.click()
    page.get_by_role("table", name="The three workers").wait_for()
    assert not too_wide(page) and not spilling(page)
    for element in page.locator("th, .dopamine-page pre").all():  # words stay whole
        assert element.evaluate("e => getComputedStyle(e).wordBreak") == "normal"
    role = page.get_by_role("rowheader", name="provider").first
    assert role.bounding_box()["width"] > 55, "names of workers are broken into letters"
    page.add_style_tag(content=".dopamine-page button.widget-upload { margin-left: 8px !important; }")
    assert spilling(page) and not too_wide(page)  # what the page's own edge hides
    page.evaluate("document.querySelector('.dopamine-page').style.minWidth = '400px'")
    assert too_wide(page)  # the check sees what is too wide


@pytest.mark.slow
def test_every_control_has_a_name_and_every_text_contrast(visit, eyes):
    page = visit()
    page.get_by_text("Ready. Choose a photograph").wait_for()

    def check():
        names = names_of_controls(page)
        assert {"button", "combobox"} <= {role for role, _ in names} and all(name for _, name in names), names
        found = contrasts(page)
        assert len(found) > 10 and min(found.values()) >= READABLE, sorted(found.items(), key=lambda item: item[1])[:5]

    check()
    upload(page, b"no picture", "text.png")
    page.get_by_role("alert").wait_for()
    check()
    upload(page, eyes[0].data)
    page.get_by_role("img", name="Preview of eye.jpg").wait_for()
    check()
    ask(page)
    answer(page)
    for folded in page.locator("summary").all():
        folded.click()
    page.get_by_role("table", name="The three workers").wait_for()
    check()
    # both checks see a fault
    page.evaluate(
        """() => {
            const fault = document.createElement('div');
            fault.innerHTML = '<button></button><p style="color: #888; background: #fff">pale</p>';
            document.querySelector('.dopamine-page').append(fault);
        }"""
    )
    assert ("button", "") in names_of_controls(page)
    assert contrasts(page)["pale"] < READABLE


@pytest.mark.slow
def test_two_patients_at_once_are_both_answered(visit, eyes):
    pages = [visit(), visit()]
    for page, eye in zip(pages, eyes, strict=False):
        upload(page, eye.data)
    for page in pages:
        ask(page)
    for page, eye in zip(pages, eyes, strict=False):
        check_answer(page, eye)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options", [("patient_page", {"viewport": {"width": 1200, "height": 900}}), ("patient_page_phone", PHONE)]
)
def test_screenshots_for_the_readme(visit, tmp_path, name, options):
    """Kept where ``$DOPAMINE_FIGURES`` says, so that a run of the tests leaves no trace."""
    page = visit(**options)
    page.get_by_label("or take a sample:").select_option("Sample 3")
    page.get_by_role("img", name=re.compile("Preview of Sample 3")).wait_for()
    ask(page)
    answer(page)
    file = Path(os.environ.get("DOPAMINE_FIGURES") or tmp_path) / f"{name}.png"
    # the page scrolls within the window: make the window as high as the page
    height = page.locator(".dopamine-page").bounding_box()["height"]
    page.set_viewport_size(options["viewport"] | {"height": int(height) + 60})
    shot = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
    shot.convert("RGB").quantize(256, kmeans=3).save(file, optimize=True)
    assert shot.width == options["viewport"]["width"] and shot.height > height
    assert 5_000 < file.stat().st_size < 200_000


def test_the_watcher_sees_what_is_amiss(chromium):
    watched = Watched(chromium)
    watched.page.set_content("<img src='http://elsewhere.invalid/a.png'><script>console.error('planted')</script>")
    watched.page.evaluate("setTimeout(() => { throw new Error('not caught') })")
    watched.page.wait_for_timeout(200)
    watched.context.close()
    assert watched.outside == ["http://elsewhere.invalid/a.png"]
    for planted in ("planted", "not caught"):
        assert any(planted in error for error in watched.errors)
