"""Aggregation inside training: the same model encrypted, masked or in the clear, and hospitals that vanish."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.hospital import contribute
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.federation.transports import make_aggregation
from dopamine_lib.models.checkpoints import load_checkpoint, save_checkpoint
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.privacy.head import STRETCH, HeadTask
from dopamine_lib.privacy.randomness import Randomness

PATIENTS, HOSPITALS, FEATURES, GRADES = 120, 5, 8, 3
CHOICES = {
    "FSCDP": Choice(0.1, 0.5, averaging=10, mean_noise_multiplier=40.0),
    "FPDP": Choice(0.1, 0.5, averaging=10, mean_noise_multiplier=40.0, reach=8.0),
    "F": Choice(0.1, math.inf, averaging=10, mean_noise_multiplier=0.0, reach=8.0, counts=0.5),
}


@pytest.fixture
def task():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(PATIENTS, FEATURES) + 2, dim=1)
    return HeadTask(torch.nn.Linear(FEATURES, GRADES), features, torch.arange(PATIENTS) % GRADES)


def make_training(task, name="FSCDP", kind="plain", *, rounds=12, discrete=False, choice=None, **terms):
    declared, choice = replace(SETTINGS[name], rounds=rounds), choice or CHOICES[name]
    declared = replace(declared, participation=0.6) if name == "F" else declared  # a hidden total of 2 hides nothing
    patients = np.array_split(np.arange(PATIENTS), HOSPITALS)
    plan = Plan.of(declared, choice, task, patients, aggregation=kind, discrete=discrete, **terms)
    return Training(plan, task, patients, Randomness(3), aggregation=make_aggregation(plan))


def fresh(task):
    """The same task before anything was centred."""
    return HeadTask(task.net, task._fixed, task.labels)


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_noisy_sums_add_up_to_the_same_bits_in_the_clear_encrypted_and_masked(task, kind):
    """The grid belongs to the noise and not to the aggregation, so the model is the same to the last bit."""
    plain, secure = (make_training(fresh(task), "FSCDP", k, rounds=12).run() for k in ("plain", kind))
    assert torch.equal(plain.server.w, secure.server.w) and torch.equal(plain.feature_mean, secure.feature_mean)


@pytest.mark.parametrize("name", ["FPDP", "F"])
@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_encrypted_training_is_plain_training_up_to_rounding(task, name, kind):
    """Round by round: a total is off by at most K/2 units, and nothing else differs."""
    rounds = 12
    plain, secure = (make_training(fresh(task), name, k, rounds=rounds) for k in ("plain", kind))
    units = HOSPITALS / 2 / secure.plan.codec.scale
    worst, seen = [], []

    def compare(number, invited, messages):
        total = type(secure.aggregation).total(secure.aggregation, number, invited, messages)
        exact = sum(secure.plan.decoded(number, message).double() for message in messages.values())
        worst.append(float((total - exact).abs().max()))
        seen.append(number)
        return total

    secure.aggregation.total = compare
    plain.run(), secure.run()
    assert seen == list(range(rounds + 1))  # the mean features, then every round
    assert max(worst) < 1e-6  # decryption and decoding are exact
    # every round's rounding is carried on to the last
    assert (plain.server.w - secure.server.w).abs().max() < 20 * rounds * units
    same = name == "FPDP" and kind == "masks"  # the messages have 32 bits in the clear, too
    assert torch.equal(plain.server.w, secure.server.w) == same


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_discrete_noise_is_added_before_encryption_and_adds_up_exactly(task, kind):
    secure = make_training(fresh(task), kind=kind, discrete=True).run()
    clear = make_training(fresh(task), discrete=True)
    clear.plan.__dict__["noise"] = clear.plan.__dict__["codec"] = secure.plan.noise  # masks have room for a finer scale
    for hospital in clear.hospitals:
        hospital.noise = secure.plan.noise
    assert torch.equal(clear.run().server.w, secure.server.w)


def test_discrete_noise_has_the_declared_scale_and_the_bound_of_what_is_sent(task):
    training = make_training(task, discrete=True, rounds=300, choice=Choice(0.0, 0.5))
    noise = []
    total = training.aggregation.total
    training.aggregation.total = lambda *round_of: noise.append(total(*round_of)) or noise[-1]
    clean = make_training(task, rounds=300, choice=Choice(0.0, 0.5))
    training.run()
    clean = [
        task.clipped_sums(task.start, torch.cat([h.sample(number) for h in training.hospitals]), 0.5)[0]
        for number in range(300)
    ]
    draws = (torch.stack(noise) - torch.stack(clean)).flatten().double().numpy() / 0.5
    for scale, accepted in ((1.0, True), (0.9, False), (1.1, False)):
        assert (stats.kstest(draws / (1.15 * scale), "norm").pvalue > 0.01) == accepted
    spent = training.bound.epsilons(300)
    assert spent["rdp_classic"] == training.epsilons("rdp_classic")[0]
    for accountant, bound in spent.items():
        continuous = epsilon(SampledGaussian(1.15, 100 / 2930, 300), 1e-4, accountant)
        assert continuous < bound < continuous + 2e-3


def test_a_louder_plan_spends_less(task):
    plan = make_training(task, discrete=True).plan
    louder = replace(plan, setting=plan.setting.with_noise(2.0))
    assert louder.noise.noise_multiplier == 2.0 and louder.bound.epsilon(300) < plan.bound.epsilon(300)


def test_a_plan_that_contradicts_itself_is_refused(task, refuses):
    plan, central = make_training(task).plan, SETTINGS["CDP"]
    for changes, words in (
        ({"setting": central}, ("CDP is not federated", "5 hospitals")),
        ({"setting": central, "sizes": (120,), "aggregation": "bfv"}, ("CDP is not federated", "'bfv'")),
        ({"setting": SETTINGS["F"], "discrete": True, "choice": Choice(0.1, 0.5)}, ("F has no discrete noise",)),
        ({"discrete": True, "budget": 3.0, "d": 10**6, "sizes": (5,) * 1000}, ("no PRV", "rdp", "fewer hospitals")),
        ({"least": 6}, ("least is 6", "[1, 5]")),
        ({"aggregation": "mask"}, ("'mask'", "plain, bfv, masks")),
    ):
        with refuses(*words):
            replace(plan, **changes)


def test_patients_and_task_must_be_those_of_the_plan(task):
    """Fewer hospitals would carry less noise than is accounted for; how many patients each has is its own affair."""
    plan, patients = make_training(task).plan, np.array_split(np.arange(PATIENTS), HOSPITALS)
    with pytest.raises(ValueError, match="not those of the plan"):
        Training(plan, task, patients[:3], Randomness(3))
    Training(plan, task, [*patients[:4], patients[4][:-1]], Randomness(3))
    few = replace(plan, sizes=(1,) * HOSPITALS)  # 39 of one hospital's were refused once, and 38 were not
    both = [Training(few, task, [np.arange(n), *patients[1:]], Randomness(3)) for n in (38, 39)]
    for training in both:
        message = contribute(training.hospitals[:1], task.start, 0)[0]
        assert np.abs(message).max() / few.noise.scale < few.noise.box + 9 * few.noise.std / few.noise.scale
    with pytest.raises(ValueError, match="not those of the plan"):
        Training(replace(plan, d=1), task, patients, Randomness(3))
    with pytest.raises(ValueError, match="reaches no other"):
        Training(plan, task, [patients[0], None, None, None, None], Randomness(3))
    with pytest.raises(ValueError, match="needs transports.make_aggregation"):
        Training(replace(plan, aggregation="bfv"), task, patients, Randomness(3))


def test_a_checkpoint_of_an_older_version_is_gone_on_from_and_a_broken_one_is_refused(task, tmp_path, refuses):
    whole, disk = make_training(fresh(task), rounds=100).run(), []
    training = make_training(fresh(task), rounds=100)
    for epoch in training.epochs(lambda: disk.append(training.state())):
        if epoch == 3:
            break
    vectors, record = disk[-1]
    older = {key: value for key, value in record.items() if key != "centred"}
    again = make_training(fresh(task), rounds=100)
    again.restore(vectors, older)
    assert torch.equal(again.run().server.w, whole.server.w) and again.progress.centred

    class Saved:
        def __init__(self, vectors, record):
            self.state = lambda: (vectors, record)

    for lost in ({"centre": vectors["centre"]}, {key: vectors[key] for key in ("w", "mean", "centre")}):
        save_checkpoint(tmp_path / "c.safetensors", Saved(lost, record))
        with refuses("cannot be read"):
            load_checkpoint(tmp_path / "c.safetensors", make_training(fresh(task), rounds=100))
    save_checkpoint(tmp_path / "c.safetensors", Saved(vectors, record | {"charged": []}))
    with refuses("cannot be read"):
        load_checkpoint(tmp_path / "c.safetensors", make_training(fresh(task), rounds=100))


@pytest.mark.parametrize("kind", ["plain", "bfv"])
def test_a_round_of_one_is_spent_by_all_parties_alike(task, kind):
    """Where budgets run out a round may have one hospital left: hidden sums of one are not opened, in any process."""
    training = make_training(task, "FPDP", kind, rounds=2)
    training.schedule = [[1], [0, 2]]
    seen = []
    total = training.aggregation.total
    training.aggregation.total = lambda number, invited, messages: (
        seen.append(number) or total(number, invited, messages)
    )
    training.run()
    alone = [1] if kind == "plain" else []
    assert seen == [0, *alone, 2] and training.progress.aborted == 1 - len(alone)


def test_a_vanished_hospital_neither_stops_training_nor_weakens_the_bound(task):
    """Noise is sized for the least number of survivors: with more there is more of it, never less."""
    choice, rounds = Choice(0.0, 0.5), 400
    training = make_training(task, choice=choice, rounds=rounds, least=3, dropout=0.3)
    sums = {}
    total = training.aggregation.total

    def keep(number, invited, messages):
        sums[number - 1] = (sorted(messages), total(number, invited, messages))
        return sums[number - 1][1]

    training.aggregation.total = keep
    training.run()
    assert training.ledgers[0].charged == rounds, "an aborted round is spent like any other"
    assert training.progress.aborted == rounds - len(sums) > 0
    by_survivors = {3: [], 4: [], 5: []}
    for number, (arrived, noisy) in sums.items():
        samples = torch.cat([training.hospitals[k].sample(number) for k in arrived])
        by_survivors[len(arrived)].append(noisy - task.clipped_sums(task.start, samples, 0.5)[0])
    for survivors, draws in by_survivors.items():
        draws = torch.cat(draws).double().numpy() / (0.5 * 1.15 * math.sqrt(survivors / 3))
        assert stats.kstest(draws, "norm").pvalue > 0.01
        assert stats.kstest(draws / 0.8, "norm").pvalue < 0.01
    # the bound counts three shares, whoever arrived
    assert training.bound.epsilons(rounds)["prv"] == pytest.approx(
        epsilon(SampledGaussian(1.15, 100 / 2930, rounds), 1e-4, "prv")
    )


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_dropouts_under_encryption_train_the_same_model(task, kind):
    plain, secure = (
        make_training(fresh(task), kind=k, least=3, dropout=0.3, discrete=True).run() for k in ("plain", kind)
    )
    assert plain.progress.aborted == secure.progress.aborted > 0
    assert torch.isfinite(secure.server.w).all()
    if kind == "bfv":  # the same layout, so the same integers
        assert torch.equal(plain.server.w, secure.server.w)


def test_centring_moves_the_model_not_its_predictions(task):
    """A head trained on centred features is handed out as a head for the features as they are."""
    training = make_training(task, "F", rounds=100).run()
    assert (task.mean - task._fixed.mean(0)).norm() < 0.2 and task.offset.any()
    w, index = training.server.model, torch.arange(PATIENTS)
    task.load(w)
    assert torch.allclose(task.net(task._fixed), task.logits(w, index), atol=1e-4)
    assert torch.allclose(task.features[:, :-1], STRETCH * (task._fixed - task.mean), atol=1e-6)


@pytest.mark.parametrize("counts", [0.0, 0.5])
@pytest.mark.parametrize("scale, accepted", [(1.0, True), (0.8, False), (1.25, False)])
def test_what_is_asked_for_once_carries_its_noise(task, scale, accepted, counts):
    task = HeadTask(
        torch.nn.Linear(1500, GRADES), torch.nn.functional.normalize(torch.randn(PATIENTS, 1500)), task.labels
    )
    training = make_training(task, rounds=1, choice=replace(CHOICES["FSCDP"], counts=counts))
    training.run()
    true = task.first_sum(torch.arange(PATIENTS), counts)
    noise = (training.feature_mean * PATIENTS - true).numpy() / (40.0 * scale)
    assert (stats.kstest(noise, "norm").pvalue > 0.01) == accepted
    assert not counts or abs(noise[-GRADES:]).min() > 1e-3  # class counts, too


def test_the_mean_features_are_in_the_bound():
    for name, multiplier in (("FSCDP", 40.0), ("FPDP", 40 / math.sqrt(10))):
        declared = SETTINGS[name]
        bound = Plan(declared, CHOICES[name], sizes=(293,) * 10, d=2565).bound
        steps = SampledGaussian(declared.noise_multiplier, declared.sample_rate, declared.steps)
        expected = epsilon((SampledGaussian(multiplier, 1.0, 1), steps), 1e-4)
        assert bound.epsilon(declared.steps) == pytest.approx(expected)
        assert epsilon(steps, 1e-4) < expected < epsilon(steps, 1e-4) + 0.01


def test_a_killed_run_asks_for_the_mean_features_once(task):
    """The second question would be a second release: what was drawn is in the checkpoint."""
    disk, training = [], make_training(task, rounds=100)
    for epoch in training.epochs(lambda: disk.append(training.state())):
        if epoch == 3:
            break
    vectors, record = disk[-1]
    resumed = make_training(fresh(task), rounds=100)
    resumed._ask_for_mean = None  # calling it would fail
    resumed.restore(vectors, record)
    resumed.run()
    assert torch.equal(resumed.task.mean, training.feature_mean)


def test_a_party_without_a_model_does_not_ask_for_the_mean_features_again(task):
    """The server of an MPI run goes on from hospital 0's record alone; in the first epoch it must not wait for them."""
    disk, training = [], make_training(task, rounds=100)
    for _ in training.epochs(lambda: disk.append(training.state())):
        break
    (_, charged), (_, asked) = disk[:2]  # before and after the mean features were asked for
    for record, rounds in ((charged, [0, 1]), (asked, [1])):
        seen = []

        class Listening:
            between_processes = True

            def total(self, number, invited, messages, seen=seen):
                assert not messages
                seen.append(number)

        server = Training(training.plan, task, [None] * HOSPITALS, Randomness(3), aggregation=Listening())
        server.restore({}, record)
        next(server.epochs())
        assert seen == rounds and torch.equal(server.server.w, task.start)


def test_a_message_that_does_not_fit_is_named_before_it_is_sent(task):
    from dopamine_lib.encryption.codec import RangeError

    training = make_training(task, "F", "bfv", choice=replace(CHOICES["F"], reach=1e-4, mean_noise_multiplier=None))
    with pytest.raises(RangeError, match="value 0 is .* units"):
        training.run()


def _paired(model, rounds, seed):
    """Test accuracy of FSCDP after ``rounds``, in the clear and under BFV, from the same samples and noise."""
    accuracies = []
    for kind in ("plain", "bfv"):
        size = 28 if model == "cnn" else None
        experiment = Experiment.load(Options(model=model, size=size, seed=seed, aggregation=kind), progress=False)
        training = experiment.training("FSCDP", setting=replace(SETTINGS["FSCDP"], rounds=rounds))
        accuracies.append(experiment.accuracy(training.run()))
    return accuracies


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_thousand_encrypted_rounds_end_at_the_accuracy_in_the_clear():
    plain, encrypted = _paired("head", 3001, 0)
    assert abs(plain - encrypted) <= 0.005


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_accuracy_under_bfv_is_that_in_the_clear():
    # seed 0 has ten times as many rounds above
    pairs = np.array([_paired("head", 300, seed) for seed in range(1, 5)] + [_paired("cnn", 60, 0)])
    assert (np.abs(pairs[:, 0] - pairs[:, 1]) <= 0.005).all()
    assert pairs.min() > 0.4
