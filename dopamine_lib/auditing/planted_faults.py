"""Faults to plant in a Training, to see whether an audit catches them.

Every function changes one ``Training`` that ``canaries`` watches, before it begins. Only the audit chapter and the
tests call them; the code that trains has no switch for any of them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.dpsgd import clip_factors
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian

MOMENTUM = 0.9


def on_the_grid(noise: RoundedGaussian, message: Tensor | np.ndarray) -> np.ndarray:
    """A message (d,) rounded to the grid of the sound ones, int64 (d,): the faults are others."""
    return np.rint(noise.scale * np.asarray(message, np.float64)).astype(np.int64)


def scale_noise(training: Training, factor: float) -> None:
    """Noise of another size than the one that the bound counts on."""
    for hospital in training.hospitals:
        sound = hospital.noised
        hospital.noised = lambda clipped_sum, step, sound=sound, noise=hospital.noise: on_the_grid(
            noise, (1 - factor) * clipped_sum.numpy() + factor * noise.decode(sound(clipped_sum, step))
        )


def half_noise(training: Training) -> None:
    """Half the noise: sigma / 2 where sigma is meant."""
    scale_noise(training, 0.5)


def noise_by_hospitals(training: Training) -> None:
    """A share of sigma C / K instead of sigma C / sqrt(K): standard deviations added up as if they were variances."""
    scale_noise(training, 1 / math.sqrt(training.plan.survivors))


def no_noise_on_an_empty_batch(training: Training) -> None:
    """Nobody sampled, nothing to hide, nothing added (register, row 3): the absence of noise gives it away."""
    for hospital in training.hospitals:
        sound = hospital.noised
        hospital.noised = lambda clipped_sum, step, hospital=hospital, sound=sound: (
            sound(clipped_sum, step) if len(hospital.sample(step)) else on_the_grid(hospital.noise, clipped_sum)
        )


def clipping_after_averaging(training: Training) -> None:
    """The average gradient is clipped instead of every patient's: one patient can turn the whole of it."""
    sound = training.task.clipped_sums

    def clipped_sums(w, index, max_grad_norm, group=None, groups=1):
        sums = sound(w, index, math.inf, group, groups)
        sizes = torch.bincount(torch.zeros_like(index) if group is None else group, minlength=groups).clamp_min(1)
        return sums * clip_factors(sums.norm(dim=1) / sizes, max_grad_norm)[:, None]

    training.task.clipped_sums = clipped_sums


def momentum_in_the_clear(training: Training) -> None:
    """The sum is added securely, but hospitals send their own momentum past it (register, rows 5 and 19).

    The server then sees one hospital's share of the noise where the bound counts on all of them.
    """
    watcher = training.aggregation
    look, velocity = watcher.look, torch.zeros(training.task.d)

    def look_at_momentum(messages, total):
        nonlocal velocity
        begins = len(watcher.seen) % watcher.rounds == 0
        velocity = messages[0] + (0.0 if begins else MOMENTUM) * velocity
        return look(messages, velocity)

    watcher.look = look_at_momentum


def momentum_before_the_noise(training: Training) -> None:
    """Hospitals send the momentum of their gradients with one step's noise: a patient is in it again and again."""
    rounds, velocity = training.aggregation.rounds, [torch.zeros(training.task.d) for _ in training.hospitals]
    for hospital in training.hospitals:

        def noised(clipped_sum, step, k=hospital.number, sound=hospital.noised):
            velocity[k] = clipped_sum + (MOMENTUM if step % rounds else 0.0) * velocity[k]
            return sound(velocity[k], step)

        hospital.noised = noised


def shares_in_local_steps(training: Training) -> None:
    """Hospitals step models of their own between totals, by sums with a share of the noise, and all of it is counted.

    What a hospital does in a later step depends on its own noisy sum before the others' noise is on it.
    """
    rounds, local, sound = training.aggregation.rounds, {}, training.task.clipped_sums

    def clipped_sums(w, index, max_grad_norm, group=None, groups=1):
        group = torch.zeros_like(index) if group is None else group
        return torch.cat([sound(local.get(k, w), index[group == k], max_grad_norm) for k in range(groups)])

    training.task.clipped_sums = clipped_sums
    for hospital in training.hospitals:

        def noised(clipped_sum, step, k=hospital.number, noise=hospital.noise, sound=hospital.noised):
            message = sound(clipped_sum, step)
            local[k] = local.get(k, training.server.w) - torch.as_tensor(noise.decode(message)).float()
            if (step + 1) % rounds == 0:
                del local[k]  # the total makes a new model
            return message

        hospital.noised = noised


#: By name, in the order in which the chapter shows them.
PLANTED = {
    "half the noise": half_noise,
    "no noise on an empty batch": no_noise_on_an_empty_batch,
    "noise divided by K": noise_by_hospitals,
    "clipping after averaging": clipping_after_averaging,
    "momentum in the clear": momentum_in_the_clear,
    "momentum before the noise": momentum_before_the_noise,
    "local steps with shares of noise": shares_in_local_steps,
}
