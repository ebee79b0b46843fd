"""Two exchanges of private inference, drawn from real runs: a Beaver product, and section 5's five steps."""

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.errors import check_within
from dopamine_lib.exchange import Event, draw_exchange
from dopamine_lib.inference.explorer import network, transcript
from dopamine_lib.inference.protocols.beaver import deal_triple, mask, multiply
from dopamine_lib.inference.protocols.sharing import encode, share, signed

PARTIES = ("patient", "crypto-provider", "provider")
#: The largest factor that a slider offers.
LARGEST = 100


def beaver_product(x: int, y: int) -> list[Event]:
    """A product of two shared whole numbers in Z_2^32, with fresh shares and a fresh triple: who sends what.

    Raises InputError for factors beyond +-100.

    >>> beaver_product(6, -7)[-1].text.splitlines()[-1]
    'so x y = -42'
    """
    check_within("x", x, -LARGEST, LARGEST, "the picture is of small numbers", low_open=False)
    check_within("y", y, -LARGEST, LARGEST, "the picture is of small numbers", low_open=False)
    shares = [share(encode([value], 1)) for value in (x, y)]
    triples = deal_triple((1,), bits=32)
    (x_0, x_1), (y_0, y_1) = shares
    (e_0, f_0), (e_1, f_1) = (mask(*own, triple) for own, triple in zip(((x_0, y_0), (x_1, y_1)), triples, strict=True))
    e, f = e_0 + e_1, f_0 + f_1
    z_0, z_1 = (multiply(number, e, f, triple) for number, triple in enumerate(triples))
    patient, dealer, provider = PARTIES
    dealt = [
        "\n".join(f"{name}{number} = {_number(value)}" for name, value in vars(triple).items())
        for number, triple in zip("₀₁", triples, strict=True)
    ]
    events = [
        Event(1, patient, f"x₀ = {_number(x_0)}\ny₀ = {_number(y_0)}"),
        Event(1, provider, f"x₁ = {_number(x_1)}\ny₁ = {_number(y_1)}"),
        Event(2, dealer, dealt[0], (patient,), True),
        Event(2, dealer, dealt[1], (provider,), True),
        Event(3, patient, f"e₀ = x₀ - a₀ = {_number(e_0)},  f₀ = y₀ - b₀ = {_number(f_0)}", (provider,), True),
        Event(3, provider, f"e₁ = x₁ - a₁ = {_number(e_1)},  f₁ = y₁ - b₁ = {_number(f_1)}", (patient,), True),
        Event(4, patient, f"z₀ = e f + e b₀ + f a₀ + c₀\n= {_number(z_0)}"),
        Event(4, provider, f"z₁ = e b₁ + f a₁ + c₁\n= {_number(z_1)}"),
        Event(5, provider, f"z₁ = {_number(z_1)}", (patient,), True),
        Event(5, patient, f"z₀ + z₁ modulo 2³²\nso x y = {signed(z_0 + z_1)[0]}"),
    ]
    return events


def draw_beaver(x: int = 6, y: int = -7, step: int = 5) -> Figure:
    """``beaver_product`` up to one of its five steps: shares, triple, opening, local products, the answer.

    Every call shares and deals anew, so all numbers but x y change. Raises InputError as that does, and for another
    step.
    """
    return draw_exchange(PARTIES, beaver_product(x, y), step, width=8.4)


def five_steps(image: int = 0) -> list[Event]:
    """Section 5's five steps about one of the explorer's images, with what each really sends.

    The network is a SqueezeNet-1.1 at 64 pixels, run by its three parties in this process. Raises InputError for an
    image that is not there.
    """
    plan, _, _ = network()
    messages = [message for message in transcript(image) if message.content]
    first = next(m for m in messages if m.sender == "patient" and len(m.content) > 8)  # the query's number has 8 bytes
    last = messages[-1]
    inner = messages[messages.index(first) + 1 : -1]
    sent = {who: sum(len(m.content) for m in inner if m.sender == who) for who in ("patient", "provider")}
    costs = plan.costs()
    patient, dealer, provider = PARTIES
    return [
        Event(1, patient, "has an image"),
        Event(1, dealer, "makes random numbers"),
        Event(1, provider, "has the model"),
        Event(2, dealer, "a seed, 16 bytes", (patient,), True),
        Event(2, dealer, f"a seed, and {_size(costs['offline_to_provider'])}", (provider,), True),
        Event(2, provider, f"the model under a mask, F = W - B: {_size(costs['setup_to_patient'])}", (patient,), True),
        Event(3, patient, f"the image under a mask, E = X - A: {_size(len(first.content))}", (provider,), True),
        Event(4, patient, f"masked values and bits: {_size(sent['patient'])}", (provider,), True),
        Event(4, provider, f"masked values and bits: {_size(sent['provider'])}", (patient,), True),
        Event(4, provider, f"{len(inner)} messages\nof {costs['comparisons']:,} comparisons"),
        Event(5, provider, f"its share of the answer: {len(last.content)} bytes", (patient,), True),
        Event(5, patient, "adds its own share:\nfive scores"),
    ]


def draw_five_steps(image: int = 0, step: int = 5) -> Figure:
    """``five_steps`` up to one of them. Raises InputError as that does, and for another step."""
    return draw_exchange(PARTIES, five_steps(image), step, width=8.4)


def _number(value: np.ndarray) -> str:
    return f"{int(value[0]):,}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
