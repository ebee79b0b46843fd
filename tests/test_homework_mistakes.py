"""The other homework: each usual mistake, planted into the solution, costs points."""

from functools import cache

import nbformat
import pytest
from homework_marks import marks

from dopamine_lib.course.homework import SOURCES

#: By homework and exercise: what is right, and a mistake.
MISTAKES = {
    ("00_start_here", "batch"): [
        ("q * sum(sizes)", "q * len(sizes)"),
        ("0 < q <= 1", "0 < q"),
        (" or min(sizes) < 0", ""),
    ],
    ("00_start_here", "steps"): [("(1 - q) ** rounds", "1 - q * rounds"), ("return q * rounds", "return q")],
    ("00_start_here", "claim"): [
        ("e <= epsilon and d <= delta for", "e <= epsilon or d <= delta for"),
        ("sum(d for _, d in models)", "max(d for _, d in models)"),
    ],
    ("00_start_here", "missing"): [('in (None, "")', "is None"), ('in (None, "")', 'in (None, "", 0)')],
    ("01_differential_privacy", "silent"): [("range(n + 1)", "range(n)"), ("range(n + 1)", "range(1, n + 1)")],
    ("01_differential_privacy", "size"): [("math.ceil(", "round("), ("-epsilon * n * error", "-epsilon * error")],
    ("02_gaussian_mechanism", "short"): [("sigma / math.sqrt(len(shares))", "sigma"), ("0.65 * due", "0.2 * due")],
    ("02_gaussian_mechanism", "split"): [("mu * weight)", "mu)"), ("weight**2 for weight", "weight for weight")],
    ("07_patient_app", "admit"): [
        ("len(first) == 24 and ", ""),
        ("width and height", "True"),
        ('== b"IHDR"', '!= b"JHDR"'),
        ("width * height > most_pixels", "width * height % 2**32 > most_pixels"),
        ('"big"), int.', '"little"), int.'),
    ],
    ("07_patient_app", "scan"): [
        ("image / 257", "image // 257"),
        ("image / 257", "image / 256"),
        ("8: 1, 3: 2, 6: 3", "6: 1, 3: 2, 8: 3"),
    ],
    ("07_patient_app", "memory"): [
        ("== address:", "<= address:"),
        ("run.find(wanted, at + 1)", "run.find(wanted, at + len(wanted))"),
        ("len(form) < 8", "len(form) < 2"),
    ],
    ("07_patient_app", "holder"): [
        ('"scan minus its mask": ["patient", "provider"]', '"scan minus its mask": ["provider"]')
    ],
    ("07_patient_app", "log"): [(r"(?<![\d.])0", "0"), (", re.IGNORECASE", ""), ("name.lower() for", "name for")],
    ("07_patient_app", "wait"): [
        ("compute + rounds * rtt + 8 * size", "compute + rounds * rtt + size"),
        ("max(parts", "min(parts"),
    ],
    ("09_fairness_and_reporting", "groups"): [
        ('if name != "" and len(own) >= least:', "if len(own) >= least:"),
        ("len(own) >= least", "len(own) > 1"),
        ("if len(found) < 2:", "if len(found) < 1:"),
        ("max(accuracies) - min(accuracies)", "max(accuracies) - sum(accuracies) / len(accuracies)"),
        ("rng.choice(own, len(own))", "rng.choice(own, len(own), replace=False)"),
        ("rng.choice(own, len(own))", "rng.choice(own, 30)"),
        ("(0.025, 0.975)", "(0.16, 0.84)"),
    ],
    ("09_fairness_and_reporting", "chance"): [
        ("(1 + np.sum(", "(np.sum("),
        ("> true - 1e-9", "> true + 1e-9"),
        ("group[order]", "group"),
    ],
    ("09_fairness_and_reporting", "price"): [
        ("sigma_for(target, b * q, steps)", "sigma_for(target, q, steps)"),
        ("1 <= b <= 1 / q", "b <= 1 / q"),
        ("math.expm1(1 / sigma**2)", "(1 / sigma**2)"),
    ],
    ("09_fairness_and_reporting", "report"): [
        ("math.sqrt(variance + shares[g][1])", "math.sqrt(variance)"),
        ("math.floor(1.96**2 * variance / gap**2) + 1", "math.floor(1.96 * variance / gap**2) + 1"),
        ("max(0.0, hits / n - half), min(1.0, hits / n + half)", "hits / n - half, hits / n + half + 1e-3"),
    ],
    ("09_fairness_and_reporting", "loss"): [
        ("+ np.log(share)", "- np.log(share)"),
        ("most = adjusted.max(axis=1)", "most = 0 * adjusted.max(axis=1)"),
        (", 1 / total)", ", 0)"),
        ("found[grades == c] == c", "grades[found == c] == c"),
    ],
    ("09_fairness_and_reporting", "verdict"): [
        (' or model["seeded"]', ""),
        ("if delta < 1 else None", ""),
        (" or verdict(good)[1] > delta", ""),
    ],
    ("10_five_settings", "mu"): [("math.expm1(1 /", "(1 /"), ('if setting["steps"] == 0:', "if False:")],
    ("10_five_settings", "epsilon"): [
        ("e + log_ndtr(-mu", "log_ndtr(-mu"),
        ("> 1e-11 * high", "> 1e-2 * high"),
        ("math.exp(first) - math.exp(second)", "math.exp(first)"),
    ],
    ("10_five_settings", "worst"): [
        ("sum(found) / hospitals", "sum(found) / max(1, np.count_nonzero(found))"),
        ("max(found)", "min(found)"),
    ],
    ("10_five_settings", "folder"): [
        ("one**2 for", "one for"),
        (" * (1 + 1e-9)", ""),
        ("(settings[name], name)", "settings[name]"),
    ],
    ("10_five_settings", "empty"): [
        ("max(-math.log1p(-q), ", "max(0, "),
        ("math.log(full / without)", "0"),
        ("told(q, n) > most", "told(q, n + 1) > most"),
    ],
    ("10_five_settings", "batch"): [("1 / b**2 for", "1 / b for"), ("np.argmin", "np.argmax")],
    ("10_five_settings", "plan"): [(">= 1]", ">= 0.5]"), ("min(good, default=None)", "max(good, default=None)")],
}


@cache
def source(name):
    return nbformat.read(SOURCES / f"{name}_homework.ipynb", 4)


@cache
def most(name) -> dict[str, int]:
    """Its points; that the solutions have them all is tested in test_homework.py."""
    own = [cell.metadata.nbgrader for cell in source(name).cells if cell.metadata.nbgrader.grade]
    return {one.grade_id.removesuffix("-test"): one.points for one in own}


@pytest.mark.parametrize(
    "name, exercise, right, wrong",
    [(*where, *mistake) for where, mistakes in MISTAKES.items() for mistake in mistakes],
    ids=lambda part: part[:40],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_mistake_costs_points(name, exercise, right, wrong):
    given = marks(source(name), (exercise, right, wrong))
    assert given[exercise] < most(name)[exercise]
