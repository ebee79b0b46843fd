"""Algorithm 1: equal to the paper's text, sound where the text is not, and able to stop and go on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from dopamine_lib.federation import algorithm1
from dopamine_lib.federation.hospital import contribute
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, DELTA, EPOCHS, SETTINGS, Choice, choice_for
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.privacy.budget import noise_multiplier_for
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness

PATIENTS, HOSPITALS, FEATURES = 120, 5, 8


@pytest.fixture
def task():
    torch.manual_seed(0)
    features, labels = torch.randn(PATIENTS, FEATURES), torch.arange(PATIENTS) % 3
    return HeadTask(torch.nn.Linear(FEATURES, 3), features, labels)


def make_training(task, name="FSCDP", *, sizes=None, choice=None, seed=0, declared=None, run=0, **parts):
    declared = declared or SETTINGS[name]
    cuts = np.cumsum(sizes)[:-1] if sizes else HOSPITALS
    split = np.split if sizes else np.array_split
    patients = split(np.arange(PATIENTS), cuts) if declared.federated else [np.arange(PATIENTS)]
    choice = choice or replace(CHOICES["head"][name], mean_noise_multiplier=None)
    terms = {key: parts.pop(key) for key in ("dropout", "budget", "accountant") if key in parts}
    plan = Plan.of(declared, choice, task, patients, **terms)
    if "aggregation" in parts:
        parts["aggregation"].plan = plan
    return Training(plan, task, patients, Randomness(seed), run=run, **parts)


class Recorder:
    """An aggregation that keeps what it was sent, decoded."""

    def __init__(self):
        self.messages = []

    def total(self, round_number, invited, messages):
        self.messages.append(torch.stack([self.plan.decoded(round_number, message) for message in messages.values()]))
        return self.messages[-1].sum(0)


def short(name, rounds):
    return replace(SETTINGS[name], rounds=rounds)


@pytest.mark.parametrize("noisy", [False, True], ids=["without noise", "with noise"])
@pytest.mark.parametrize("sizes", [None, [2, 8, 10, 40, 60]], ids=["equal", "unequal"])
def test_the_fast_training_is_algorithm_1(task, noisy, sizes):
    """The page's patient-by-patient loop, given the same samples and noise, ends at the same model."""
    declared = short("FSCDP", 150) if noisy else replace(short("FSCDP", 150), noise_multiplier=None)
    choice, same = Choice(0.2, 0.5, momentum=0.9), make_training(task, sizes=sizes, declared=declared).hospitals
    training = make_training(task, sizes=sizes, declared=declared, choice=choice).run()
    x, y = task._fixed.double().numpy(), task.labels.tolist()
    w, rounds = algorithm1.train(
        task.start.double().numpy(),
        [hospital.patients for hospital in same],
        lambda w, i: algorithm1.softmax_gradient(w, x[i], y[i]),
        q=declared.sample_rate,
        sigma=declared.noise_multiplier or 0.0,
        C=choice.max_grad_norm,
        eta=choice.learning_rate,
        beta=choice.momentum,
        T=declared.rounds,
        sample=lambda k, t: same[k].sample(t).tolist(),
        noised=(lambda k, t, total: same[k].noised(total, t)) if noisy else None,
        s=training.plan.noise.scale if noisy else None,
    )
    # where float32 and float64 lie on either side of a half-integer, a message differs by one unit
    unit = 0.2 * 10 / (declared.sample_rate * PATIENTS) / training.plan.noise.scale if noisy else 0.0
    assert rounds == 150 and np.abs(training.server.w.numpy() - w).max() < 1e-5 + 3 * unit
    assert (training.server.w - task.start).norm() > 0.1


def test_the_page_draws_noise_of_the_declared_scale_and_stops_at_the_bound(task):
    """K shares make up sigma C, and lines 17 to 20 end training where the ledger does."""
    hospitals, d, seen = np.array_split(np.arange(PATIENTS), HOSPITALS), 4000, []

    def nothing(w, i):
        seen.append(i)
        return np.zeros_like(w)

    terms = dict(q=0.2, sigma=1.15, C=0.5, eta=1.0, beta=0.0, rng=np.random.default_rng(0))
    w, _ = algorithm1.train(np.zeros(d), hospitals, nothing, T=1, **terms)
    draws = w * (0.2 * PATIENTS) / (1.15 * 0.5)
    assert stats.kstest(draws, "norm").pvalue > 0.01 > stats.kstest(draws / 0.9, "norm").pvalue
    assert 0 < len(seen) < PATIENTS and len(set(seen)) == len(seen)

    def spent(steps):
        return epsilon(SampledGaussian(1.15, 100 / 2930, steps), DELTA)

    training = make_training(task, budget=5.0, accountant="rdp_classic")
    rounds = len(training.schedule)
    few = [own[:1] for own in hospitals]
    assert algorithm1.train(np.zeros(2), few, nothing, T=rounds + 9, spent=spent, most=5.0, **terms)[1] == rounds


@pytest.mark.parametrize("name", ["CDP", "FSCDP", "FPDP"])
def test_a_hospital_alone_sends_what_the_batched_pass_sends(task, name):
    recorder = Recorder()
    training = make_training(task, name, declared=short(name, 40), aggregation=recorder)
    for _ in training.epochs():
        break
    first = training.schedule[0]
    alone = make_training(task, name)
    for k, sent in zip(first, recorder.messages[0], strict=True):
        own = contribute([alone.hospitals[k]], task.start, 0)[k]
        assert np.abs(training.plan.decoded(1, own) - sent).max() <= 1.01 / training.plan.codec.scale


@pytest.mark.parametrize("name", ["F", "FPDP"])
def test_a_head_trains_like_any_other_model(task, name):
    hospitals, w = make_training(task, name, sizes=[1, 9, 10, 40, 60]).hospitals, task.start + 0.1
    features = task.features[:, :-1]
    other = Task(task.net, lambda index: features[index], task.labels)
    for own, same in zip(hospitals, make_training(other, name, sizes=[1, 9, 10, 40, 60]).hospitals, strict=True):
        change = own.local_change(w, 3)
        assert torch.allclose(same.local_change(w, 3), change, atol=1e-5) and change.norm() > 0.1


@pytest.mark.parametrize("clip", [0.3, math.inf])
def test_the_loop_over_patients_is_the_matrix_products(task, clip):
    """Groups empty or not, a patient twice, weights that differ by grade: with and without numba the same sums."""
    pytest.importorskip("numba")
    task.weights = torch.tensor([0.5, 1.0, 2.0])
    index, group = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6, 8]), torch.tensor([0, 0, 0, 0, 2, 3, 3, 3, 3])
    own, other = (sums(task.start, index, clip, group, 5) for sums in (task.clipped_sums, task.product_sums))
    assert own.shape == other.shape == (5, task.d)
    assert torch.allclose(own, other, atol=1e-5) and not own[[1, 4]].any() and own[[0, 2, 3]].any(1).all()
    assert not task.clipped_sums(task.start, index[:0], clip).any()
    for outside in ([PATIENTS], [-1]):
        with pytest.raises(IndexError):
            task.clipped_sums(task.start, torch.tensor(outside), clip)
    with pytest.raises(IndexError):
        task.clipped_sums(task.start, index, clip, group, 3)
    for w, groups in ((task.start[1:], group), (task.start, group[1:])):
        with pytest.raises(ValueError, match="length"):
            task.clipped_sums(w, index, clip, groups, 5)


@pytest.mark.parametrize("scale, accepted", [(1.0, True), (0.9, False), (1.1, False)])
def test_the_total_carries_noise_of_sigma_c(task, scale, accepted):
    """Rejects 0.9 and 1.1 times the declared scale: neither too little nor too much noise is added."""
    choice, recorder = Choice(0.0, 0.5), Recorder()  # a learning rate of 0 keeps the clean sum computable
    training = make_training(task, declared=short("FSCDP", 300), choice=choice, aggregation=recorder).run()
    clean = make_training(task, declared=replace(short("FSCDP", 300), noise_multiplier=None), choice=choice)
    noise = []
    for number, messages in enumerate(recorder.messages):
        noise.append(messages.sum(0) - sum(hospital.noisy_sum(task.start, number) for hospital in clean.hospitals))
    draws = torch.cat(noise).double().numpy() / (scale * training.plan.setting.noise_multiplier * 0.5)
    assert (stats.kstest(draws, "norm").pvalue > 0.01) == accepted


def test_an_empty_batch_is_noised_like_any_other(task):
    training = make_training(task, sizes=[1, 29, 30, 30, 30], choice=Choice(0.1, 1.0))
    hospital = training.hospitals[0]
    empty = [step for step in range(600) if len(hospital.sample(step)) == 0]
    assert len(empty) > 400  # one patient at q = 0.034
    draws = hospital.noise.decode(np.concatenate([hospital.noisy_sum(task.start, step) for step in empty]))
    share = 1.15 / math.sqrt(HOSPITALS)
    assert stats.kstest(draws / share, "norm").pvalue > 0.01
    assert stats.kstest(draws / (0.9 * share), "norm").pvalue < 0.01


def test_a_hospital_without_patients_sends_noise_like_any_other(task):
    """Whether its message comes must not tell whether its one patient is there."""
    training = make_training(task, sizes=[0, 30, 30, 30, 30], choice=Choice(0.1, 1.0))
    draws = training.hospitals[0].noise.decode(training.hospitals[0].noisy_sum(task.start, 0))
    assert len(draws) == task.d and draws.std() > 0


def test_a_person_with_two_images_is_drawn_or_not_without_an_error(task, monkeypatch):
    """In blocks of one step most are empty, and an image is to be chosen for nobody."""
    monkeypatch.setattr(task, "person", torch.arange(PATIENTS) // 2)
    training = make_training(task, sizes=[2, 28, 30, 30, 30], choice=Choice(0.1, 1.0))
    hospital = training.hospitals[0]
    hospital._block = 1
    assert {len(hospital.sample(step)) for step in range(200)} == {0, 1}


@pytest.mark.parametrize("sizes", [[24] * 5, [2, 8, 10, 40, 60]], ids=["equal", "unequal"])
def test_no_hospital_is_too_small_for_the_bound(task, sizes):
    """A patient moves the averaged gradient by at most C / (q N), wherever it is; the noise is sigma C / (q N)."""
    once = replace(SETTINGS["FSCDP"], sample_rate=1.0, rounds=1, noise_multiplier=None)
    training = make_training(task, declared=once, sizes=sizes, choice=Choice(1.0, 0.1, momentum=0.0)).run()
    # every patient has the same weight 1 / N in the step, whatever its hospital's size (register, row 2)
    step = task.clipped_sums(task.start, torch.arange(PATIENTS), 0.1)[0] / PATIENTS
    assert torch.allclose(training.server.w, task.start - step, atol=1e-6) and step.norm() > 1e-3
    noisy = make_training(task, sizes=sizes, choice=Choice(1.0, 0.1))
    assert noisy.plan.noise.hospitals == noisy.plan.noise.least == HOSPITALS
    # in FPDP the bound depends on q and on how often a hospital takes part, not on its size
    parallel = make_training(task, "FPDP", sizes=sizes)
    assert len({(ledger.noise_multiplier, ledger.sample_rate) for ledger in parallel.ledgers}) == 1


def test_dividing_by_its_own_batch_would_break_the_bound_of_a_small_hospital():
    """Register, row 2: with weights 1 / (K b_k) the small hospital's patient meets far less relative noise."""
    batches = np.array([2.0, 8, 10, 40, 60]) * 0.5
    sigma = 1.15
    noise = sigma / math.sqrt(5) * np.sqrt(np.sum((1 / (5 * batches)) ** 2))
    effective = noise / (1 / (5 * batches[0]))
    assert effective < 0.55 * sigma
    sound = epsilon(SampledGaussian(sigma, 0.034, 3001), 1e-4)
    assert epsilon(SampledGaussian(effective, 0.034, 3001), 1e-4) > 3 * sound


def test_fpdp_accounts_for_actual_participation(task):
    means = []
    for number in range(5):
        patients = np.array_split(np.arange(PATIENTS), 10)
        plan = Plan.of(SETTINGS["FPDP"], CHOICES["head"]["FPDP"], task, patients)
        training = Training(plan, task, patients, Randomness(0), run=number)
        took_part = np.bincount(np.concatenate(training.schedule), minlength=10)
        assert took_part.sum() == 500
        spent = [training.bound.epsilon(steps, "rdp_classic") for steps in (25 * took_part).tolist()]
        if number == 0:  # what is charged for one schedule is charged for all
            training.run()
            assert [ledger.charged for ledger in training.ledgers] == (25 * took_part).tolist()
            assert training.epsilons("rdp_classic") == spent
        means.append(np.mean(spent))
    assert 18.5 < np.mean(means) < 19.6


@pytest.mark.parametrize("name", ["CDP", "FSCDP", "FPDP"])
@pytest.mark.parametrize("accountant", ["rdp_classic", "rdp"])
def test_training_stops_before_the_step_that_would_exceed_the_budget(task, name, accountant):
    training = make_training(task, name, budget=5.0, accountant=accountant).run()
    assert max(training.epsilons(accountant)) <= 5.0
    charged = [ledger.charged for ledger in training.ledgers]
    more = [steps + training.plan.setting.local_steps for steps in charged]
    assert all(training.bound.epsilon(steps, accountant) > 5.0 for steps in more)
    assert max(charged) < training.plan.setting.steps
    assert np.isfinite(training.server.w).all()


class Killed(Exception):
    """Stands for a killed process."""


def killed_midway(task, name, seed, epochs):
    """A run that dies in an epoch, after its steps were charged; returns what was on disk then."""
    disk = []
    training = make_training(task, name, seed=seed)

    def save():
        vectors, record = training.state()
        disk.append(({key: value.clone() for key, value in vectors.items()}, record))
        if training.progress.reserved > epochs:
            raise Killed

    with pytest.raises(Killed):
        for epoch in training.epochs(save):
            training.progress.history.append({"epoch": epoch})
    return disk[-1]


@pytest.mark.parametrize("name", ["C", "CDP", "F", "FPDP", "FSCDP"])
def test_seeded_resume_gives_the_same_numbers_and_the_same_ledger(task, name):
    whole = make_training(task, name, seed=3).run()
    vectors, record = killed_midway(task, name, 3, epochs=37)
    resumed = make_training(task, name, seed=3)
    resumed.restore(vectors, record)
    resumed.run()
    assert torch.equal(whole.server.model, resumed.server.model)
    assert [ledger.charged for ledger in whole.ledgers] == [ledger.charged for ledger in resumed.ledgers]


@pytest.mark.parametrize("name", ["CDP", "FPDP", "FSCDP"])
def test_unseeded_resume_never_spends_twice(task, name):
    """Noise that may have been seen is not drawn again: the begun epoch stays charged and is skipped."""
    vectors, record = killed_midway(task, name, None, epochs=37)
    assert record["reserved"] == 38 and record["epoch"] == 37
    resumed = make_training(task, name, seed=None)
    resumed.restore(vectors, record)
    epochs = resumed.epochs()
    assert next(epochs) == 38 and torch.equal(resumed.server.w, vectors["w"])
    assert list(epochs) == list(range(39, EPOCHS + 1))
    whole = make_training(task, name, seed=None)
    whole.run()
    assert [ledger.charged for ledger in whole.ledgers] == [ledger.charged for ledger in resumed.ledgers]


def test_the_ledger_on_disk_is_never_behind_the_noise_in_use(task):
    training = make_training(task)
    on_disk = []

    class Watch(Recorder):
        def total(self, *round_of):
            super().total(*round_of)
            assert len(self.messages) <= on_disk[-1]
            return self.messages[-1].sum(0)

    training.aggregation = Watch()
    training.aggregation.plan = training.plan
    training.run(lambda: on_disk.append(training.state()[1]["charged"][0]))
    assert on_disk[-1] == 3001 == len(training.aggregation.messages)


def test_private_training_needs_a_clip(task):
    with pytest.raises(ValueError, match="finite max_grad_norm"):
        make_training(task, choice=Choice(0.1, math.inf))


def test_averaging_weighs_as_it_says(task):
    """With a = 0 the model handed out is the plain mean of the iterates."""
    iterates, training = [], make_training(task, declared=short("FSCDP", 100), choice=Choice(0.1, 1.0, averaging=0.0))
    for _ in training.epochs():
        iterates.append(training.server.w)
    assert torch.allclose(training.server.model, torch.stack(iterates).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["F", "FSCDP"])
def test_a_round_in_which_everybody_vanishes_opens_nothing(task, name):
    training = make_training(task, name, declared=short(name, 5), dropout=1 - 1e-12)
    training.run()
    assert training.progress.aborted == 5 and torch.equal(training.server.w, task.start)


@pytest.mark.parametrize("model, counts", [("head", 0.5), ("linear", 1.0), ("cnn", 1.0)])
def test_a_balanced_loss_is_charged_for_its_class_counts(model, counts):
    """What they are asked for with is an event of the bound, and --epsilon covers it."""
    for name, declared in SETTINGS.items():
        choice = Options(model=model, loss="balanced").choice(name)
        assert (choice.counts, choice.mean_noise_multiplier) == (counts, 20.0 if declared.private else 0.0)
        plain = CHOICES[model][name]
        assert choice.max_grad_norm * choice.learning_rate == plain.max_grad_norm * plain.learning_rate
        assert (choice.momentum, choice.averaging, choice.reach) == (plain.momentum, plain.averaging, plain.reach)
    for bound in (0.3, 1.0, 3.0):  # the counts leave most of a bound to training
        choice = Options(model=model, loss="balanced", epsilon=bound).choice("FSCDP")
        assert epsilon(SampledGaussian(choice.mean_noise_multiplier, 1.0, 1), DELTA, "prv") < bound / 3
    options = Options(model=model, loss="balanced", epsilon=3.0, accountant="rdp")
    plan = make_plan(options, "FSCDP", (293,) * 10, 2565)
    declared, first = plan.setting, SampledGaussian(plan.choice.mean_noise_multiplier, 1.0, 1)
    steps = SampledGaussian(declared.noise_multiplier, declared.sample_rate, declared.steps)
    together = epsilon((first, steps), DELTA, "rdp")
    assert plan.bound.epsilon(declared.steps, "rdp") == pytest.approx(together) and 2.98 < together <= 3.0
    assert epsilon(steps, DELTA, "rdp") < together - 0.01
    assert "classes" in privacy_statement(plan.bound, charged=[declared.steps], patients=2930, seeded=False)


@pytest.mark.parametrize("bound", [0.3, 1.0, 3.0, 10.0, 100.0])
def test_the_mean_features_leave_most_of_a_bound_to_training(bound):
    """Where the noise is shared their noise fits the bound: asked for alone, they spend less than a third of it."""
    for name in SETTINGS:
        fitted, chosen = choice_for("head", name, bound), CHOICES["head"][name]
        assert replace(fitted, mean_noise_multiplier=chosen.mean_noise_multiplier) == choice_for("head", name) == chosen
        if name not in ("CDP", "FSCDP"):
            assert fitted.mean_noise_multiplier == chosen.mean_noise_multiplier
    first = SampledGaussian(choice_for("head", "FSCDP", bound).mean_noise_multiplier, 1.0, 1)
    assert epsilon(first, DELTA, "prv") < bound / 3
    declared = SETTINGS["FSCDP"]
    with_it, alone_ = (
        noise_multiplier_for(bound, declared.sample_rate, declared.steps, DELTA, "rdp", before)
        for before in ((first,), ())
    )
    assert alone_ <= with_it < 1.1 * alone_
