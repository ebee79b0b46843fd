"""One patient is not one image: with several, too, one patient moves what is released no more than the bound says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dopamine_lib.auditing.shadow_models import _Crowd, train_heads
from dopamine_lib.fairness.group_sampling import ThinnedHospital
from dopamine_lib.fairness.output_perturbation import clip_rows, person_shares, sensitivity, solve
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import Hospital
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS, Choice
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness

PEOPLE, EACH = 12, 3


def head(person=None, seed=0):
    """A head for 12 persons with three images each, all images of a person alike and long."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(PEOPLE, 8, generator=rng).mul_(5).repeat_interleave(EACH, 0)
    task = HeadTask(nn.Linear(8, 5), features, torch.arange(PEOPLE).repeat_interleave(EACH) % 5)
    task.person = torch.arange(PEOPLE).repeat_interleave(EACH) - 6 if person is None else person
    return task


def hospital(task, name="FSCDP", kind=Hospital, **more):
    declared = replace(SETTINGS[name], sample_rate=0.3, federated=False)
    plan = Plan.of(declared, CHOICES["head"][name], task, [np.arange(36)])
    return kind(0, np.arange(36), task, plan, Randomness(1), **more)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", [Hospital, ThinnedHospital])
def test_a_step_holds_at_most_one_image_of_a_person_and_each_person_at_rate_q(name, kind):
    more = {"keep": torch.ones(36)} if kind is ThinnedHospital else {}
    own, steps, seen, images = hospital(head(), name, kind, **more), 2000, np.zeros(PEOPLE), np.zeros(36)
    for step in range(steps):
        sample = own.sample(step).numpy()
        people = sample // EACH
        assert len(np.unique(people)) == len(people)
        seen[people] += 1
        images[sample] += 1
    # seeded, so it never flakes; the bounds would fail by chance with probability below 1e-6
    low, high = stats.binom.ppf([1e-9, 1 - 1e-9], steps, 0.3)
    assert (low <= seen).all() and (seen <= high).all()
    low, high = stats.binom.ppf([1e-9, 1 - 1e-9], steps, 0.1)
    assert (low <= images).all() and (images <= high).all()


def test_one_person_moves_a_clipped_sum_by_c_at_most():
    task = head()
    own, clip = hospital(task), CHOICES["head"]["FSCDP"].max_grad_norm
    moved = 0.0
    for step in range(50):
        sample = own.sample(step)
        for person in range(PEOPLE):
            rest = sample[sample // EACH != person]
            both = [task.clipped_sums(task.start, which, clip)[0] for which in (sample, rest)]
            moved = max(moved, float((both[0] - both[1]).norm()))
    assert clip / 2 < moved <= clip * (1 + 1e-5)


@pytest.mark.parametrize("counts", [0.0, 0.4, 1.0])
def test_one_person_moves_what_is_asked_for_once_by_one_at_most(counts):
    task, everybody = head(), torch.arange(36)
    for person in range(PEOPLE):
        rest = everybody[everybody // EACH != person]
        moved = float((task.first_sum(everybody, counts) - task.first_sum(rest, counts)).norm())
        assert 0.99 < moved <= 1 + 1e-5


def test_one_person_moves_the_perturbed_answer_no_more_than_one_image_would():
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(PEOPLE, 3)), EACH, 0)
    labels, person = np.repeat(np.arange(PEOPLE) % 4, EACH), np.repeat(np.arange(PEOPLE), EACH)
    rows, most = clip_rows(features, 1.5), 0.0

    def answer(own):
        return solve(rows[own], labels[own], 4, 10.0, person_shares(person, own))

    everybody = np.arange(len(person))
    for one in range(PEOPLE):
        most = max(most, np.linalg.norm(answer(everybody) - answer(everybody[person != one])))
    assert most <= sensitivity(10.0, 1.5)
    # of images that count alone, one person's three move it farther
    alone = [solve(rows[own], labels[own], 4, 10.0) for own in (everybody, everybody[person != 0])]
    assert np.linalg.norm(alone[0] - alone[1]) > 1.5 * np.linalg.norm(
        answer(everybody) - answer(everybody[person != 0])
    )


def test_shadow_models_draw_persons_as_hospitals_do():
    """With everybody in every step, three equal images of one person among others train as one does."""
    once, task = np.arange(0, 36, EACH), head()
    some = np.concatenate([[0, 1, 2], once[1:]])
    declared = replace(SETTINGS["F"], sample_rate=1.0, rounds=3, local_steps=2, participation=1.0)
    found = [
        train_heads(
            task._fixed[own], task.labels[own], [[np.arange(len(own))]], declared, Choice(0.5, 1.0), person=whose
        )
        for own, whose in ((some, some // EACH), (once, None), (some, None))
    ]
    assert torch.allclose(found[0], found[1], atol=1e-6) and not torch.allclose(found[0], found[2], atol=1e-3)
    terms = declared, Choice(0.5, 1.0, mean_noise_multiplier=0.0), 5, 0
    crowd = _Crowd(task._fixed[some], task.labels[some], [[np.arange(len(some))]], *terms, some // EACH)
    alone = _Crowd(task._fixed[once], task.labels[once], [[np.arange(PEOPLE)]], *terms, None)
    assert torch.allclose(crowd.mean * len(some), alone.mean * PEOPLE, atol=1e-5)


def test_an_experiment_tells_every_task_whose_images_it_has(make_aptos, tmp_path):
    folder = make_aptos(tmp_path)
    experiment = Experiment.load(
        Options(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=2), progress=False
    )
    person = torch.from_numpy(np.array(experiment.dataset.person))
    given = HeadTask(nn.Linear(512, 5), experiment.features, experiment.labels)
    assert torch.equal(experiment.task().person, person)
    training = experiment.training("CDP", task=given)
    assert torch.equal(training.task.person, person)
