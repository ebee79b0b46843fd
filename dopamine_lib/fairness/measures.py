"""What helps the worst-off group, each measure accounted for and at the same epsilon: FSCDP as it is, and three more.

group-aware sampling   one group's patients are sampled at a larger q (``group_sampling``). The bound is the one at
                       that q: sigma is calibrated for it, and all others, who are sampled less, have a smaller
                       epsilon.
adaptive clipping      C follows a quantile of the gradients' norms; the bits it needs share each step's noise
                       (``adaptive_clipping``).
class-balanced loss    grades count alike, by noisy class counts that share the first release with the mean features
                       (``privacy.balanced``).

Which group is favoured, and how far, is decided by looking at validation patients; that looking is not in epsilon.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.fairness.adaptive_clipping import AdaptiveClip, AdaptiveHead, AdaptiveServer
from dopamine_lib.fairness.group_sampling import ThinnedHospital
from dopamine_lib.fairness.utility import at_epsilon, probabilities
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon


@dataclass(frozen=True)
class Measure:
    """A way to train FSCDP: its setting, its choice, and a function that makes a run, by number, not yet begun."""

    name: str
    setting: Setting
    choice: Choice
    make: Callable[[int], Training]


def measures(
    experiment: Experiment, target: float, *, favoured: np.ndarray, boost: float = 2.0, shorter: float = 1
) -> dict[str, Measure]:
    """FSCDP at epsilon ``target`` as it is and with each measure, by name.

    favoured  bool (N,), images that group-aware sampling draws ``boost`` times as often as the others
    shorter   as in ``utility.at_epsilon``
    Raises InputError for any model but the head, a boost below 1, or nobody or everybody favoured.
    """
    if experiment.options.model != "head":
        raise InputError(f"model is {experiment.options.model}, but these measures are for the head: use model head")
    check_within("boost", boost, 1, 10, "2 samples a group twice as often", low_open=False)
    if not 0 < favoured.sum() < len(favoured):
        raise InputError(f"{favoured.sum()} of {len(favoured)} images are favoured: name a group and leave others")
    clip, features, labels = AdaptiveClip(), experiment.features, experiment.labels

    def measure(name, parts=lambda net: {}, unit=None, loss=experiment.options.loss, **tailoring):
        asked = replace(experiment, options=replace(experiment.options, loss=loss))
        setting, choice = at_epsilon(asked, "FSCDP", target, shorter=shorter, **tailoring)
        choice = choice if unit is None else replace(choice, max_grad_norm=unit)

        def training(run):
            own = parts(experiment.task(run).net)
            return experiment.training("FSCDP", run, setting=setting, choice=choice, budget=target, **own)

        return Measure(name, setting, choice, training)

    keep = torch.where(torch.from_numpy(np.asarray(favoured)), 1.0, 1 / boost)
    made = [
        measure("as it is"),
        measure("group-aware sampling", lambda net: {"hospital": partial(ThinnedHospital, keep=keep)}, boost=boost),
        measure(
            "adaptive clipping",
            lambda net: {
                "task": AdaptiveHead(net, features, labels, clip),
                "server": partial(AdaptiveServer, clip=clip),
            },
            unit=1.0,  # in which messages are written; C itself is learned
        ),
        measure("class-balanced loss", loss="balanced"),
    ]
    return {each.name: each for each in made}


def graded(experiment: Experiment, measure: Measure) -> np.ndarray:
    """Probabilities (R, N, classes) of ``options.runs`` runs' models on the experiment's test images."""
    runs = [measure.make(run).run() for run in range(experiment.options.runs)]
    return np.array([probabilities(experiment, training) for training in runs])


def group_epsilons(measure: Measure, boost: float, delta: float, accountant: str = "prv") -> dict[str, float | None]:
    """Epsilon of the patients whom group-aware sampling favours, and of the others, who are drawn at q / boost."""
    setting, first = measure.setting, SampledGaussian(measure.choice.mean_noise_multiplier, 1.0, 1)

    def at(rate):
        return epsilon((first, SampledGaussian(setting.noise_multiplier, rate, setting.steps)), delta, accountant)

    return {"favoured": at(setting.sample_rate), "others": at(setting.sample_rate / boost)}
