"""Section 3.2's seven steps as an exchange, drawn from a real round: three hospitals, a model of two weights.

Clipping, noise, keys, ciphertexts and seals are the library's; the gradients are the explorer's, made up.
"""

import numpy as np
from matplotlib.figure import Figure

from dopamine_lib.encryption.bfv_sum import set_up
from dopamine_lib.encryption.codec import LAYOUTS
from dopamine_lib.exchange import Event, draw_exchange
from dopamine_lib.federation.algorithm1 import contribute, step
from dopamine_lib.federation.explorer import PATIENTS, gradients_in_a_plane
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian, most_in_a_sum

HOSPITALS = 3
C, SIGMA, Q, ETA = 1.5, 1.15, 0.3, 0.5


def seven_steps() -> list[Event]:
    """One round under BFV with fresh keys, samples and noise: what each party does, and what goes over the wire.

    Correcting the paper, the hospitals send noisy gradient sums and not models (register, row 19), and no hospital
    sends its model in clear at the end (row 5).
    """
    layout, each = LAYOUTS["packed"], PATIENTS // HOSPITALS
    hospitals, server = set_up(HOSPITALS, 2)
    noise = RoundedGaussian(
        SIGMA, C, HOSPITALS, 2, total_range=layout.total_range, sample_rate=Q, patients=most_in_a_sum(Q, each)
    )
    gradients, randomness, w = gradients_in_a_plane(), Randomness(), np.zeros(2)
    server.begin(0)
    sums, integers, sent = [], [], []
    for k, hospital in enumerate(hospitals):
        own = np.arange(k, PATIENTS, HOSPITALS)
        batch = own[(randomness.stream("sample", k).uniform(len(own)) < Q).numpy()]
        (drawn,) = noise.draw(randomness.stream("noise", k))
        sums.append(contribute(w, batch, lambda _, i: gradients[i], C, lambda total: total))
        integers.append(noise.combine(sums[-1], drawn))
        sent.append(hospital.message(0, integers[-1]))
        server.add(sent[-1])
    aggregate = server.aggregate()
    total = hospitals[0].open(0, aggregate).total
    after, _ = step(w, np.zeros(2), noise.decode(total), Q * PATIENTS, ETA, 0.0)
    first, *others = names = tuple(f"hospital {k + 1}" for k in range(HOSPITALS))
    return [
        Event(1, first, "makes the keys"),
        Event(1, first, "keys, sealed", tuple(others), True),
        Event(2, "server", "the model, (0, 0)", names),
        *(Event(3, name, f"clips and sums:\n{_pair(one)}") for name, one in zip(names, sums, strict=True)),
        *(Event(4, name, f"noise, rounding:\n{_pair(one)}") for name, one in zip(names, integers, strict=True)),
        *(
            Event(4, name, f"ciphertext, {len(m):,} bytes", ("server",), True)
            for name, m in zip(names, sent, strict=True)
        ),
        Event(5, "server", "adds up what\nit cannot read"),
        Event(5, "server", f"the encrypted sum, {len(aggregate):,} bytes", names, True),
        *(Event(6, name, f"decrypts {_pair(total)},\nsteps to {_pair(after)}") for name in names),
        *(Event(7, name, "again from 3") for name in names),
    ]


def draw_seven_steps(step: int = 7) -> Figure:
    """``seven_steps`` up to one of them. Raises InputError for another step."""
    names = [f"hospital {k + 1}" for k in range(HOSPITALS)]
    return draw_exchange(["server", *names], seven_steps(), step, width=9.6)


def _pair(values: np.ndarray) -> str:
    if values.dtype.kind == "i":
        return f"({values[0]:,}, {values[1]:,})"
    return f"({values[0]:.2f}, {values[1]:.2f})"
