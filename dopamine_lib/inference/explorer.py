"""The plain functions behind chapter 6's explorer: the messages between patient and provider, one by one.

A real SqueezeNet-1.1 at 64 pixels answers queries within this process. Its classifier is untrained, so its answers mean
nothing; the transcripts are those of any other weights.
"""

import functools

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.pictures import BLUE, GREY, RED

SIZE, IMAGES = 64, 6
#: What to look at: a message, or its difference from the same message about the next image.
VIEWS = ("the message", "minus another's, fresh masks", "minus another's, same masks")
#: A crypto-provider's seed: two sessions with it use every mask twice, which is the fault to be seen.
_SAME = 1
#: Bytes that a chi-square test over 256 values needs: five of each expected.
_ENOUGH = 5 * 256


@functools.lru_cache(maxsize=1)
def network() -> tuple:
    """Plan and weights of the network, and its images uint8 (6, 64, 64, 3)."""
    from dopamine_lib.data.synthetic import make_population
    from dopamine_lib.inference.network.compiler import compile_model
    from dopamine_lib.inference.network.serving import calibration_images
    from dopamine_lib.models.networks import build, to_input
    from dopamine_lib.models.weights import load_weights

    start = load_weights()
    calibration = to_input(calibration_images(SIZE), start.mean, start.std)
    plan, weights = compile_model(build("squeezenet", 5, start, 0), SIZE, calibration, start.mean, start.std)
    return plan, weights, make_population(IMAGES, SIZE, 5, threads=1)[0]


@functools.lru_cache(maxsize=2 * IMAGES)
def transcript(image: int, seed: int | None = None, session: int = 0) -> list:
    """All messages of one query about an image, in order; another ``session`` has masks of its own.

    seed  of the crypto-provider: sessions with the same one share their masks. Raises InputError for an unknown image.
    """
    from dopamine_lib.inference.network.rehearsal import Rehearsal

    check_within("image", image, 0, IMAGES - 1, "these are prepared", low_open=False)
    plan, weights, images = network()
    with Rehearsal(plan, weights, seed) as rehearsal:
        rehearsal.infer(plan.to_input(images[image]))
        return rehearsal.messages


def look(image: int = 0, message: int = 1, view: str = VIEWS[0]) -> dict:
    """What the receiver of a message can compute from it.

    Returns what, sender, messages (how many there are), bytes_so_far, numbers (a message's, or the difference of two:
    uint32, or uint8 of eight bits each), counts (256,) of its bytes, and p: how often uniform bytes would be spread as
    unevenly, None for too few of them. Raises InputError for an image, message or view that does not exist.
    """
    from scipy.stats import chisquare

    if view not in VIEWS:
        raise InputError(f"view '{view}' is unknown; choose one of: {', '.join(VIEWS)}")
    seed = _SAME if view == VIEWS[2] else None
    messages = transcript(image, seed)
    check_within("message", message, 0, len(messages) - 1, "a query has no more", low_open=False)
    chosen = messages[message]
    dtype = "u1" if chosen.what.endswith(("bits", "beta")) else "<u4"
    values = np.frombuffer(chosen.content, dtype)
    if view != VIEWS[0]:
        other = transcript((image + 1) % IMAGES, seed, session=1)[message].content
        other = np.frombuffer(other, dtype)
        values = values ^ other if dtype == "u1" else values - other
    counts = np.bincount(values.view("u1"), minlength=256)
    return {
        "what": chosen.what,
        "sender": chosen.sender,
        "messages": len(messages),
        "bytes_so_far": sum(len(earlier.content) for earlier in messages[: message + 1]),
        "numbers": values,
        "counts": counts,
        "p": float(chisquare(counts).pvalue) if counts.sum() >= _ENOUGH else None,
    }


def draw_message(image: int = 0, message: int = 1, view: str = VIEWS[0]) -> Figure:
    """The image, a message as a picture, and how often each byte occurs in it."""
    seen, images = look(image, message, view), network()[2]
    figure = Figure(figsize=(8.4, 3.0))
    left, middle, right = (
        figure.add_axes((x, 0.17, width, 0.6)) for x, width in ((0.0, 0.24), (0.26, 0.24), (0.56, 0.42))
    )
    left.imshow(images[image])
    left.set_title("the patient's image")
    picture = _picture(seen["numbers"])
    low, high = np.percentile(picture, (1, 99))
    middle.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1), interpolation="nearest")
    middle.set_title("what was received")
    for axes in (left, middle):
        axes.set_axis_off()
    uneven = seen["p"] is not None and seen["p"] < 1e-6
    right.stairs(seen["counts"] / seen["counts"].sum(), fill=True, color=RED if uneven else BLUE)
    right.axhline(1 / 256, color=GREY, linestyle=":")
    judged = "too few for a test" if seen["p"] is None else f"uniform? p = {seen['p']:.1g}"
    right.set(xlabel="value of a byte", xlim=(0, 256), yticks=(), title=f"its bytes: {judged}")
    right.set_xticks((0, 64, 128, 192))
    so_far = f"{seen['bytes_so_far'] / 1e6:.2f} MB so far"
    figure.text(0.01, 0.92, f"{message} of {seen['messages'] - 1}, by the {seen['sender']}: {seen['what']} ({so_far})")
    return figure


def _picture(numbers: np.ndarray) -> np.ndarray:
    """The first numbers as a square; of the message that hides the image, one colour channel."""
    values = np.unpackbits(numbers) if numbers.itemsize == 1 else numbers.view("<i4")
    side = min(SIZE, int(np.sqrt(len(values))))
    return values[: side * side].astype(float).reshape(side, side)
