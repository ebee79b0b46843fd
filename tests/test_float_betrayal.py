"""Noise in floating point betrays the sum under it; what is sent on a grid does not (Mironov 2012).

An attacker knows two sums, with and without a patient, and sees the noisy one. Where floats were added, a world is
refuted by one coordinate that no noise can explain.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.server import Server
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.normal import Normals
from dopamine_lib.privacy.randomness import Randomness

HOSPITALS, PATIENTS, FEATURES, GRADES = 10, 300, 300, 3
NAMES = ["CDP's model", "CDP's sum", "FSCDP's message", "FPDP's step", "mean features"]


class FloatNoise:
    """The fault that the grid ended: float32 noise is added to a float32 sum, which is released as it is."""

    def __init__(self, noise):
        self.std, self.d, self.scale = noise.std / noise.scale, noise.d, 1.0

    def draw(self, stream, steps=1):
        values = Normals(stream, steps * self.d, self.std).values[: steps * self.d]
        return list(torch.from_numpy(values).float().view(steps, -1))

    def combine(self, clipped_sum, drawn):
        return clipped_sum.float() + drawn

    def decode(self, total):
        return np.asarray(total, np.float64)


class Scene:
    """One release, of a hospital's first step, with or without one patient whom the sample has in it."""

    def __init__(self, name, floats):
        torch.manual_seed(0)
        features = torch.randn(PATIENTS, FEATURES) + 0.8
        task = HeadTask(torch.nn.Linear(FEATURES, GRADES), features / features.norm(dim=1, keepdim=True), _labels())
        task.start = torch.zeros(task.d)
        setting = name.split("'")[0] if "'" in name else "FSCDP"
        declared = SETTINGS[setting]
        patients = np.array_split(np.arange(PATIENTS), HOSPITALS if declared.federated else 1)
        self.name, self.task, self.plan = name, task, Plan.of(declared, CHOICES["head"][setting], task, patients)
        if floats:
            noise, mean = FloatNoise(self.plan.noise), FloatNoise(self.plan.mean_noise)
            self.plan.__dict__.update(noise=noise, mean_noise=mean, codec=noise)
        self.everybody = torch.from_numpy(patients[0])

    def sums(self, index):
        """What the noise is added to, for the patients of a sample: what the attacker computes for every world."""
        if self.name == "mean features":
            total = self.task.feature_sum(index) * (self.plan.hospitals / self.plan.population)
            return torch.cat([total, total.new_zeros(self.task.d - len(total))]).float()
        return self.task.clipped_sums(self.task.start, index, self.plan.choice.max_grad_norm)[0]

    def released(self, index, randomness):
        """What the attacker sees, float32 (d,), for the patients of a sample."""
        hospital = Hospital(0, index.numpy(), self.task, self.plan, randomness)
        hospital._block = 1  # draws for one step are enough
        if self.name == "mean features":
            return self.plan.decoded(0, hospital.features())
        message = hospital.noised(self.sums(index), 0)
        total = torch.from_numpy(np.asarray(self.plan.noise.decode(message))).float()
        return self.step(total) if self.name == "CDP's model" else total

    def step(self, total):
        """The server's step on a total."""
        server = Server(self.task.start, self.plan.setting, self.plan.choice, self.plan.population)
        server.gradient_step(total / (self.plan.setting.sample_rate * self.plan.population))
        return server.w

    def impossible(self, released, clipped_sum):
        """How many coordinates no float32 noise explains, if ``clipped_sum`` is what it was added to."""
        if self.name != "CDP's model":
            return int((~explained(released, clipped_sum)).sum())
        gain = -self.plan.choice.learning_rate / (self.plan.setting.sample_rate * self.plan.population)
        ok, guess = torch.zeros(len(released), dtype=torch.bool), (released.double() / gain).float()
        for ulps in range(-2, 3):  # all totals that the model can have come from
            total = next_to(guess, ulps)
            ok |= (self.step(total) == released) & explained(total, clipped_sum)
        return int((~ok).sum())


def _labels():
    return torch.arange(PATIENTS) % GRADES


def next_to(x, ulps):
    """float32 numbers this many places further."""
    return (x.view(torch.int32) + ulps).view(torch.float32)


def explained(released, clipped_sum):
    """Coordinates for which clipped_sum + n is ``released`` for some float32 n."""
    n = (released.double() - clipped_sum.double()).float()
    return sum((clipped_sum + next_to(n, ulps)) == released for ulps in (-1, 0, 1)).bool()


def attack(name, floats, tries):
    """(tries in which one world was refuted and the other was not, tries in which fewer impossibilities were right)."""
    scene, refuted, right = Scene(name, floats), 0, 0
    rng = np.random.default_rng(1)
    sample = scene.everybody if name == "mean features" else scene.everybody[:10]
    worlds = [sample[1:], sample]
    sums = [scene.sums(world) for world in worlds]
    for number in range(tries):
        truth = int(rng.integers(2))
        released = scene.released(worlds[truth], Randomness(f"betrayal {number}"))
        found = [scene.impossible(released, clipped_sum) for clipped_sum in sums]
        refuted += min(found) == 0 < max(found)
        right += (found[1] < found[0]) == truth if found[0] != found[1] else rng.random() < 0.5
    return refuted, right


@pytest.mark.parametrize("name", NAMES)
def test_no_world_is_refuted_by_what_is_released_on_the_grid(name):
    """1,000 guesses by chance are right 420 to 580 times, but for 5 in 10^7; the noise itself allows hardly more."""
    refuted, right = attack(name, floats=False, tries=1000)
    assert refuted == 0 and 400 < right < 600


@pytest.mark.parametrize("name", NAMES)
def test_where_floats_are_released_the_wrong_world_is_refuted_every_time(name):
    """The positive control: the attack works on what was released before."""
    assert attack(name, floats=True, tries=200) == (200, 200)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", ["CDP", "FPDP", "FSCDP"])
def test_every_message_of_a_private_setting_is_whole_numbers(name, discrete):
    """The mean features' too, and in FPDP those of the changed model; what a local step works with is on the grid."""
    task = Scene("CDP's sum", floats=False).task
    declared = replace(SETTINGS[name], rounds=100 // SETTINGS[name].local_steps)
    patients = np.array_split(np.arange(PATIENTS), HOSPITALS if declared.federated else 1)
    plan = Plan.of(declared, CHOICES["head"][name], task, patients, discrete=discrete)
    training, sent = Training(plan, task, patients, Randomness(0)), []
    add_up = training.aggregation.total

    def total(number, invited, messages):
        sent.extend(messages.values())
        return add_up(number, invited, messages)

    training.aggregation.total = total
    training.run()
    assert len(sent) >= 20 and {(message.dtype, message.shape) for message in sent} == {(np.dtype(np.int64), (task.d,))}
    if plan.setting.local_steps > 1:
        hospital = training.hospitals[0]
        step = plan.noise.decode(hospital.noisy_sum(task.start, 0)) * plan.noise.scale
        assert np.abs(step - np.rint(step)).max() < 1e-6 and np.abs(sent[-1]).max() <= plan.codec.limit
