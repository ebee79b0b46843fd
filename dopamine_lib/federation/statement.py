"""The privacy statement: what a bound says, to whom it applies, and what it leaves out.

A figure for epsilon means nothing without its unit, its neighbours, its sampler and its adversary. What no bound here
covers is said in this one place, for the statement inside every model and for the report alike.
"""

from collections.abc import Sequence

import numpy as np

from dopamine_lib.data import PATIENTS, is_table
from dopamine_lib.data.function import is_function
from dopamine_lib.federation.bounds import Bound, accounted_mean_noise
from dopamine_lib.privacy.accounting import ACCOUNTANTS
from dopamine_lib.privacy.operating_point import OperatingPoint

HOW = {
    "plain": "This run added the messages in the clear, as a simulation.",
    "bfv": "Messages were added under BFV, all parties in one process. All hospitals share the secret key: one of them "
    "and the server together read every message.",
    "masks": "Messages were added behind pairwise masks, all parties in one process. Of K hospitals t - 1 must collude "
    "with the server to read one, t the larger of --least and K // 2 + 1: it counts nobody else in; 2 t - K are enough "
    "if it tells different stories.",
}
APART = {
    kind: said.replace("all parties in one process", "each party a process of its own") for kind, said in HOW.items()
}
APART["plain"] = "The server of this run added the messages in the clear: it saw every hospital's."
ACCOUNTANT_NAMES = {"rdp_classic": "classic RDP", "rdp": "improved RDP", "prv": "PRV", "pld": "PLD"}
#: Who chose learning rate, clipping norm and averaging, which no epsilon includes.
TUNING = {
    "head": "learning rate, clip, averaging and the mean features' noise were chosen on validation patients of "
    "APTOS-2019 and RetinaMNIST, who are training patients held back and then trained on",
    "cnn": "learning rate and clip are starting values that nobody has tuned",
    "squeezenet": "learning rate and clip are the paper's authors', who do not say on whose images they chose them",
    "linear": "learning rate and clip were chosen by cross-validation among training patients of the UCI heart-disease "
    "data",
    "mlp": "learning rate and clip are starting values that nobody has tuned",
}
#: The same for a setting of one's own.
DECLARED = "what a file declared of sampling, rounds, learning rate and clip, whatever data they were chosen on; else "
SEEDED = (
    "THIS RUN WAS SEEDED and hides nothing: whoever knows or guesses the seed computes its noise and its samples. It "
    "is for teaching; each epsilon here is what the noise would buy if nobody could predict it."
)


def not_covered(model: str, own: bool = False) -> tuple[str, ...]:
    """What no epsilon of a run with this model includes, as phrases; ``own``: in a setting of one's own."""
    return (
        f"choices: {DECLARED if own else ''}{TUNING.get(model, TUNING['cnn'])}",
        "other models trained on the same patients, which spend theirs besides",
        "the weights that training starts from, if the same patients were in what those were trained on",
        "test patients: their scores, of every epoch too, are exact",
        "how long anything takes",
        *(() if model == "head" else ("how a network rounds one gradient beside others (measured: a millionth of C)",)),
    )


def once_summed(counts: float) -> str:
    """What all patients tell once, before training; ``counts`` as in a Choice.

    >>> once_summed(0.0), once_summed(0.5), once_summed(1.0)
    ('features', 'features and classes (0.5 of the squared norm)', 'classes')
    """
    if counts in (0, 1):
        return "classes" if counts else "features"
    return f"features and classes ({counts:g} of the squared norm)"


def counted_instead(point: OperatingPoint) -> str:
    """What the last rounds ask for in place of gradients."""
    return (
        " The last tenth of the rounds asks, in place of gradients, how many patients of which grade have which "
        f"severity, for thresholds with a specificity of {point.specificity:g}; in such a count a patient is of norm C "
        "at most, so these rounds spend what the others do."
    )


def unit(data: str, persons: str | None = None, table: bool | None = None) -> str:
    """Whom a bound on this data protects: a step samples persons, and takes one image of each.

    persons  who is one patient, by the data sheet; by default what is known of a built-in source
    table    whether the data are rows of a table; by default as far as the name of the data tells
    """
    table = is_table(data) if table is None else table
    one, persons = "row" if table else "image", persons or PATIENTS[data]
    return f"one patient, with all of their {one}s, of which a step takes one at most ({persons})"


def in_words(bound: dict[str, float | None]) -> str:
    """Epsilon by every accountant that has one, as in "10.83 (classic RDP), 9.85 (improved RDP)"."""
    return ", ".join(f"{bound[key]:.2f} ({ACCOUNTANT_NAMES[key]})" for key in ACCOUNTANTS if bound[key] is not None)


def _large(epsilon: float) -> str:
    """An epsilon that may be in the hundreds, where decimals say nothing; below, it has two, as others have.

    >>> _large(7.4), _large(232.03)
    ('7.40', '232')
    """
    return f"{epsilon:.{2 if epsilon < 100 else 0}f}"


def _mechanism(bound: Bound, steps: int) -> str:
    """What is noised: gradients clipped one by one, or the sum of those along local steps."""
    setting, clip = bound.setting, bound.choice.max_grad_norm
    kind = "Skellam" if bound.noise.discrete else "Gaussian"
    noise, grid = f"{kind} noise of {setting.noise_multiplier:.6g}", f"sent as multiples of {1 / bound.noise.scale:.3g}"
    if setting.trajectories:
        return (
            f"in each of {steps} rounds every patient of a Poisson sample at rate {setting.sample_rate:.6g} takes "
            f"{setting.local_steps} gradient steps alone, from the global model; the mean gradient of each such "
            f"trajectory is clipped to L2 norm {clip:g}, {noise} times that on their sum, {grid}"
        )
    if setting.draws == 1:
        return (
            f"gradients clipped to L2 norm {clip:g}, {noise} times that on their sum, {grid}, Poisson samples at rate "
            f"{setting.sample_rate:.6g}, {steps} steps"
        )
    return (
        f"in each of {steps} rounds hospitals take {setting.draws} local steps from the global model, each on a "
        f"Poisson sample at rate {setting.sample_rate:.6g}; inputs are shortened, so that whoever is in j of these "
        f"samples moves the sum of all gradients by j C at most, with C = {clip:g}; {noise} C on that sum, {grid}"
    )


def privacy_statement(
    bound: Bound,
    *,
    charged: Sequence[int],
    patients: int,
    seeded: bool,
    counted: bool = False,
    data: str = "synthetic",
    persons: str | None = None,
    table: bool | None = None,
    model: str = "head",
    replaced: int = 0,
    aggregation: str = "plain",
    apart: bool = False,
    own: bool = False,
    optimizer: str = "momentum",
    operating_point: OperatingPoint | None = None,
    by_own: tuple[str, float | None] | None = None,
) -> str:
    """The statement that goes with every result, in plain words.

    charged   noisy steps of each ledger: one for all patients where noise is shared, else one per hospital
    patients  N, declared training patients in all
    counted   whether that is their count, which the run then makes public
    data      what was trained on;  persons  who is one patient in it, by default as known of ``data.SOURCES``
    table     whether that is a table, by default as its name tells
    replaced  layers of batch normalisation in the model's place of which group normalisation was trained
    apart     whether every party was a process of its own
    own       whether the setting is one's own, declared in a file
    aggregation, optimizer  where they are ``module:function``, code of one's own, it says what that means for the bound
    operating_point  thresholds that the last rounds were spent on; None for none
    by_own    an accountant of one's own, and its epsilon

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> bound = Bound(SETTINGS["C"], CHOICES["head"]["C"], shares=1, delta=1e-4, noise=None)
    >>> privacy_statement(bound, charged=[], patients=2931, seeded=True)
    'C is not private: no noise was added and nothing about any patient is bounded.'
    """
    setting, choice, hospitals, delta = bound.setting, bound.choice, bound.shares, bound.delta
    if not setting.private:
        return f"{setting.name} is not private: no noise was added and nothing about any patient is bounded."
    if not bound.holds:
        alone = bound.epsilon(setting.steps, colluding=hospitals - 1)
        return (
            f"{setting.name} is not private here: {aggregation} takes the place of the sum of messages, and its noise "
            "is sized for that sum. A single message has one share of it, which bounds what is computed from messages "
            f"by epsilon {_large(alone)} (classic RDP), and no accountant here vouches for less."
        )
    steps, in_clear = max(charged), apart and aggregation == "plain"
    views, mean = bound.adversaries(steps, in_clear), accounted_mean_noise(setting, choice, hospitals)
    once = f" Before that, once, all patients' {once_summed(choice.counts)} were summed, with Gaussian noise of "
    once += f"{mean or 0:.4g} times their norm, rounded."
    outsider = f"epsilon {in_words(views['outsider'])}"
    if not setting.shared_noise:
        spread = np.mean([bound.epsilon(steps) for steps in charged])
        outsider += (
            f", for patients of the hospital that took part most often; {spread:.2f} (classic RDP) is the mean over "
            "hospitals, which bounds nobody"
        )
    lines = [
        f"{setting.name}, {setting.title}.{' ' + SEEDED if seeded else ''} Unit: {unit(data, persons, table)}. "
        "Neighbours: one patient added or removed (replacing one is two such changes).",
        f"Mechanism: {_mechanism(bound, steps)}; the sum is divided by the public expected batch."
        + (once if mean else "")
        + (counted_instead(operating_point) if operating_point else ""),
        f"delta = {delta:g}, which is {delta * patients:.2g} / n for n = {patients} declared training patients"
        + (", which is their count: this run makes it public." if counted else "."),
        f"Against an outsider, who sees every model of the training and knows all other patients: {outsider}.",
    ]
    if by_own is not None:
        told = "has no bound" if by_own[1] is None else f"says epsilon {by_own[1]:.2f}"
        lines.append(f"{by_own[0]}, an accountant of one's own, {told}: nobody has checked that here.")
    for code, does in ((aggregation, "is put in the place of the sum"), (optimizer, "steps on noised totals")):
        if is_function(code) and setting.federated | (code == optimizer):
            lines.append(
                f"{code}, code of one's own, {does}: post-processing of what is noised already, which spends nothing "
                "as long as it computes from that alone."
            )
    if replaced:
        lines.append(
            f"The network: {model} with group normalisation in {replaced} layers, where it had batch normalisation, "
            "which mixes patients."
        )
    if not setting.federated:
        lines.append("The server is a trusted curator: it holds the data, and nothing protects them from it.")
    elif setting.shared_noise:
        how = (APART if apart else HOW)[aggregation]
        if in_clear:
            lines.append(f"Against the server: epsilon {in_words(views['server'])}, that of one share of noise. {how}")
        else:
            alone = bound.epsilon(steps, colluding=hospitals - 1)
            lines.append(
                "Against the server: the same, if sums are aggregated securely; that part is computational (whoever "
                f"breaks the encryption sees single hospitals: epsilon {_large(alone)}, classic RDP). {how}"
            )
        if views["hospital"]:
            lines.append(
                f"Against one curious hospital, which can subtract its own noise: epsilon {in_words(views['hospital'])}"
                f". Against {hospitals - 1} hospitals together: one share of noise is left. Noise is sized for "
                f"{hospitals} hospitals; a round in which fewer arrive is spent and not opened."
            )
    else:
        lines.append(
            "Against the server and other hospitals: the same, since every hospital protects its own messages."
        )
    lines.append(
        "After training the bound on the released model does not rest on encryption. It assumes honest hospitals and "
        "noise that nobody can predict."
    )
    lines.append(f"Not covered: {'; '.join(not_covered(model, own))}.")
    return "\n".join(lines)
