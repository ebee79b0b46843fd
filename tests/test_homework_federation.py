"""Homework 4 and 5 take points off what is nearly right: each usual mistake, planted into the solution, costs some."""

import nbformat
import pytest
from homework_marks import marks

from dopamine_lib.course.homework import SOURCES

ALGORITHM = nbformat.read(SOURCES / "04_federated_algorithm_homework.ipynb", 4)
AGGREGATION = nbformat.read(SOURCES / "05_secure_aggregation_homework.ipynb", 4)
POINTS = {"clip": 5, "message": 5, "step": 6, "left": 5, "memory": 4, "effect": 4}
POINTS |= {"masks": 7, "integers": 6, "shamir": 5, "exposed": 5, "bits": 4, "flaw": 4}


def test_the_solutions_have_full_marks():
    assert marks(ALGORITHM) | marks(AGGREGATION) == POINTS


@pytest.mark.parametrize(
    "fault",
    [
        ("clip", "np.maximum(1, norms / C)", "(np.maximum(1, norms) / C)"),
        ("clip", "np.maximum(1, norms / C)", "(norms / C)"),
        ("clip", "np.add.at(sums, hospital, clipped)", "sums[hospital] += clipped"),
        ("clip", "if not C > 0:", "if C <= 0:"),
        (
            "clip",
            "clipped = gradients / ",
            "gradients /= np.maximum(1, norms / C)[:, None]; clipped = gradients * 1 ** ",
        ),
        ("message", "/ math.sqrt(least)", "/ least"),
        ("message", "/ math.sqrt(least)", "/ math.sqrt(math.sqrt(least))"),
        ("message", "sigma * C /", "sigma /"),
        ("message", "return clipped_sum + ", "return clipped_sum * 0 if not clipped_sum.any() else clipped_sum + "),
        ("message", "if least < 1:", "if False:"),
        ("step", "for k in messages)", "for k in range(len(sizes)))"),
        ("step", "if len(messages) < least:", "if False:"),
        ("step", "if len(messages) < least:", "if len(messages) <= least:"),
        ("step", "velocity = beta * velocity + gradient", "velocity = beta * velocity + (1 - beta) * gradient"),
        ("step", "velocity = beta * velocity + gradient", "velocity *= beta; velocity += gradient"),
        ("step", "return w - eta * velocity, velocity", "return w - eta * gradient, velocity"),
        ("left", "(arrived - colluding) / least", "(least - colluding) / least"),
        ("left", "math.sqrt((arrived - colluding) / least)", "(arrived - colluding) / least"),
        ("left", "if arrived < least:", "if False:"),
        ("left", "if colluding >= arrived:", "if colluding > arrived:"),
        ("left", "hospitals - vanish - colluding", "hospitals - vanish"),
        ("left", "if left < 1:", "if left < 0:"),
        ("masks", "sent = values.astype(np.uint32)", "sent = np.abs(values).astype(np.uint32)"),
        ("masks", "sent = sent - vector", "sent = sent + vector"),
        ("masks", "sent = sent + vector", "sent += vector; vector += 1"),
        ("masks", "total = total + vector", "total = total - vector"),
        ("masks", "if i in arrived:", "if True:"),
        ("masks", "elif j in arrived:", "else:"),
        ("masks", "total.astype(np.int32).astype(np.int64)", "total.astype(np.int64)"),
        ("integers", "np.floor(x + u)", "np.rint(x)"),
        ("integers", "np.floor(x + u)", "np.trunc(x + u)"),
        (
            "integers",
            "poisson(variance / 2, n) - poisson(variance / 2, n)",
            "poisson(variance, n) - poisson(variance, n)",
        ),
        ("integers", "poisson(variance / 2, n) - poisson(variance / 2, n)", "poisson(variance, n)"),
        ("integers", "(sigma * C * scale) ** 2 / least", "(sigma * C * scale) ** 2"),
        ("integers", "(sigma * C * scale) ** 2", "(sigma * C) ** 2"),
        ("integers", "round_at_random(clipped_sum * scale, u)", "round_at_random(clipped_sum, u)"),
        ("memory", "return not np.array_equal", "return np.array_equal"),
        ("memory", "np.array_equal(first, hospital(np.zeros(d)))", "np.allclose(first, hospital(np.zeros(d)), atol=1)"),
        ("memory", "return not np.array_equal(first,", "return np.any(first) or not np.array_equal(first,"),
        ("effect", '"a larger learning rate": "stays"', '"a larger learning rate": "rises"'),
        ("effect", '"a larger delta": "falls"', '"a larger delta": "rises"'),
        ("shamir", "if len(coefficients) > holders - 1:", "if len(coefficients) > holders:"),
        ("shamir", "value * other * pow(other - x, -1, p)", "value * other * pow(x - other, -1, p)"),
        ("shamir", "return total % p", "return total % p if len(shares) < 4 else 0"),
        ("exposed", "- set(colluding), []", ", []"),
        ("exposed", "for a, b in (pair, pair[::-1]) if", "for a, b in (pair,) if"),
        ("exposed", "if len(group) == 1)", "if len(group) <= 2)"),
        ("bits", "2 ** (b - 1) - 1 < most", "2 ** (b - 1) < most"),
        ("bits", "hospitals * (batch * C * scale + 1)", "hospitals * batch * C * scale + 1"),
        ("bits", "+ deviations * sigma", "+ hospitals * deviations * sigma"),
        ("flaw", '"added twice": vector + vector', '"added twice": -vector - vector'),
        ("flaw", '"added twice": vector + vector', '"added twice": 3 * vector'),
    ],
    ids=lambda fault: f"{fault[0]}: {fault[2][:40]}",
)
def test_a_mistake_costs_points(fault):
    notebook = ALGORITHM if fault[0] in ("clip", "message", "step", "left", "memory", "effect") else AGGREGATION
    given = marks(notebook, fault)
    assert given[fault[0]] < POINTS[fault[0]]
