"""Scores by subgroup against scikit-learn, and intervals and gaps that are as wide as they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score, recall_score, roc_auc_score

from dopamine_lib.data.dataset import GRADES, Dataset, Datasheet
from dopamine_lib.fairness import scores as scores_module
from dopamine_lib.fairness.paired import BALANCED, gains
from dopamine_lib.fairness.scores import BINS, METRICS, cannot_say, gap, scores, subgroup_table, subgroups


def guesses(rng, runs, n, skill=1.0, classes=5):
    """Labels of every grade and probabilities (runs, n, classes), rounded so that there are ties."""
    labels = rng.permutation(np.arange(n) % classes)
    logits = rng.normal(size=(runs, n, classes)) + skill * np.eye(classes)[labels]
    odds = np.round(np.exp(logits), 1) + 0.1
    return labels, odds / odds.sum(2, keepdims=True)


def made_dataset(n=400, attributes=True, seed=0):
    rng = np.random.default_rng(seed)
    index = np.arange(n)
    known = {
        "camera": rng.choice(["A", "B"], n, p=[0.8, 0.2]),
        "eye": rng.choice(["left", "right"], n),
    }
    return Dataset(
        name="made",
        images=rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8),
        labels=index % 5,
        grades=GRADES,
        person=index,
        train=index[: n // 2],
        validation=index[: n // 10],
        test=index[n // 2 :],
        sheet=Datasheet("made", "CC0", "none:0"),
        attributes=known if attributes else {},
    )


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(12, 60), classes=st.integers(3, 5), skill=st.floats(0, 3))
def test_scores_are_scikit_learns_with_weights(seed, n, classes, skill):
    rng = np.random.default_rng(seed)
    labels, probabilities = guesses(rng, 2, n, skill, classes)
    weights = np.array([np.ones(n), rng.integers(1, 4, n), rng.integers(0, 3, n)])
    for grade in range(classes):  # every grade has some weight: else scikit-learn has a smaller set of grades
        weights[2, np.flatnonzero(labels == grade)[0]] += 1
    found = scores(labels, probabilities, weights)
    for b, w in enumerate(weights):
        for r, p in enumerate(probabilities):
            grade = p.argmax(1)
            assert found["accuracy"][b, r] == pytest.approx(accuracy_score(labels, grade, sample_weight=w))
            kappa = cohen_kappa_score(labels, grade, weights="quadratic", sample_weight=w)
            assert found["quadratic_kappa"][b, r] == pytest.approx(kappa, abs=1e-9)
            recall = recall_score(labels, grade, labels=range(classes), average=None, sample_weight=w)
            assert found["recall_per_grade"][b, r] == pytest.approx(recall)
            area = roc_auc_score(labels, p, multi_class="ovr", average="macro", sample_weight=w)
            assert found["auroc"][b, r] == pytest.approx(area, abs=1e-9)


def calibration_error(labels, probabilities):
    """ECE as written: a loop over bins."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for b in range(BINS):
        inside = (confidence >= b / BINS) & ((confidence < (b + 1) / BINS) | (b == BINS - 1))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_calibration_error_is_that_of_the_loop_and_zero_where_confidence_is_accuracy():
    labels, probabilities = guesses(np.random.default_rng(1), 3, 300)
    for error, run in zip(scores(labels, probabilities)["ece"][0], probabilities, strict=True):
        assert error == pytest.approx(calibration_error(labels, run))
    # nine of ten are right at a confidence of 0.9; at 0.6 the same nine are too timid by 0.3
    labels = np.array([0] * 9 + [1])
    for confidence, error in ((0.9, 0.0), (0.6, 0.3)):
        timid = np.tile([confidence, 1 - confidence], (1, 10, 1))
        assert scores(labels, timid)["ece"][0, 0] == pytest.approx(error)


def test_a_weight_of_two_is_a_patient_twice():
    rng = np.random.default_rng(2)
    labels, probabilities = guesses(rng, 2, 40)
    times = rng.integers(0, 3, 40)
    weighted = scores(labels, probabilities, times[None])
    repeated = scores(np.repeat(labels, times), np.repeat(probabilities, times, axis=1))
    for metric in (*METRICS, "recall_per_grade"):
        assert weighted[metric] == pytest.approx(repeated[metric])


def test_one_grade_has_no_kappa_and_no_curve():
    _, probabilities = guesses(np.random.default_rng(3), 2, 20)
    found = scores(np.full(20, 3), probabilities)
    assert np.isnan(found["quadratic_kappa"]).all() and np.isnan(found["auroc"]).all()
    assert np.isfinite(found["accuracy"]).all()


def test_groups_are_those_recorded_with_pairs_grade_and_sharpness():
    data = made_dataset()
    groups = subgroups(data, data.test, least=15)
    assert list(groups) == ["camera", "eye", "camera x eye", "grade", "sharpness"]
    assert set(groups["camera x eye"]) == {"A, left", "A, right", "B, left", "B, right"}
    for division in groups.values():
        assert all(mask.sum() >= 15 for mask in division.values())
        assert np.sum(list(division.values()), axis=0).max() == 1  # nobody is in two groups of a division
    assert np.array_equal(groups["camera"]["B"], data.attributes["camera"][data.test] == "B")
    grey = data.images[data.test[7]].mean(2)
    step = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    assert scores_module.sharpness(data.images, data.test)[7] == pytest.approx(step, rel=1e-5)


def test_groups_that_are_too_small_are_left_out():
    data = made_dataset()
    least = int((data.attributes["camera"][data.test] == "B").sum()) + 1
    groups = subgroups(data, data.test, least=least)
    assert "camera" not in groups and "eye" in groups  # one group left is no division
    assert "camera" in subgroups(data, data.test, least=least - 1)


def test_what_the_data_cannot_support_is_said():
    bare = made_dataset(attributes=False)
    assert list(subgroups(bare, bare.test)) == ["grade", "sharpness"]
    assert "age, sex" in cannot_say(bare) and "camera, eye are recorded" in cannot_say(made_dataset())


def test_the_table_has_a_row_for_every_group_and_none_where_a_score_is_undefined():
    data = made_dataset()
    _, probabilities = guesses(np.random.default_rng(4), 3, len(data.test))
    table = subgroup_table(data, data.test, probabilities, least=15, bootstraps=40)
    assert (table[0]["by"], table[0]["group"], table[0]["patients"]) == ("all", "everybody", len(data.test))
    assert len(table) == 1 + sum(map(len, subgroups(data, data.test, least=15).values()))
    for row in table:
        assert all(row["accuracy"][end] is not None for end in ("mean", "low", "high"))
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
        if row["by"] == "grade":
            assert row["quadratic_kappa"] is None and row["auroc"] is None
            assert sum(recall is not None for recall in row["recall_per_grade"]) == 1
    everybody = scores(data.labels[data.test], probabilities)
    assert table[0]["auroc"]["mean"] == pytest.approx(everybody["auroc"].mean())


def half_width(probabilities):
    data = made_dataset(800)
    row = subgroup_table(data, data.test, probabilities, bootstraps=1000, least=250)[0]["accuracy"]
    return (row["high"] - row["low"]) / 2


def right_with(rng, chance, runs=1, n=400, shared=True):
    """Probabilities that are right for a share of the patients; the same ones in every run, or others."""
    labels = made_dataset(2 * n).labels[n:]
    right = rng.random((1 if shared else runs, n)) < chance
    graded = np.where(right, labels, (labels + 1) % 5)
    return np.eye(5)[np.broadcast_to(graded, (runs, n))]


def test_the_interval_over_patients_is_the_binomials():
    """Patients are drawn again: the half-width is 1.96 sqrt(p (1 - p) / n), within 10 %."""
    probabilities = right_with(np.random.default_rng(5), 0.7)
    share = scores(made_dataset(800).labels[400:], probabilities)["accuracy"].mean()
    assert half_width(probabilities) == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 400), rel=0.1)


def test_images_of_one_person_are_drawn_together():
    """Four equal images are one patient: the interval is twice as wide as if they were four."""
    probabilities = np.repeat(right_with(np.random.default_rng(6), 0.7, n=400)[:, ::4].argmax(2), 4, axis=1)
    labels = np.repeat(made_dataset(800).labels[400::4], 4)
    data = made_dataset(800)
    labels = np.concatenate([data.labels[:400], labels])
    widths = []
    for person in (np.arange(800), np.arange(800) // 4):
        grouped = Dataset(**(vars(data) | {"person": person, "labels": labels}))
        row = subgroup_table(grouped, data.test, np.eye(5)[probabilities], bootstraps=1000, least=250)[0]["accuracy"]
        widths.append(row["high"] - row["low"])
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.15)


def test_runs_that_differ_widen_the_interval():
    """Two kinds of runs, all right and all wrong: patients do not matter, runs do."""
    rng = np.random.default_rng(7)
    both = np.concatenate([right_with(rng, 1.0, 3), right_with(rng, 0.0, 3)])
    assert half_width(both) > 0.3
    assert half_width(right_with(rng, 1.0, 6)) < 0.01


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_where_all_are_right_or_none_the_interval_is_the_exact_one(chance):
    """No draw varies then, and a percentile interval would be a point: "26 of 26: 100 (100 to 100)"."""
    data, rng = made_dataset(800), np.random.default_rng(9)
    exact = stats.binomtest(int(400 * chance), 400).proportion_ci(method="exact")
    found = subgroup_table(data, data.test, right_with(rng, chance, 2), least=250)[0]["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high))
    groups = {"few": np.arange(400) < 30, "many": np.arange(400) >= 30}
    probabilities = right_with(rng, 1.0)
    probabilities[:, :30] = right_with(rng, 0.0)[:, :30]
    few = gap(data.labels[data.test], probabilities, groups, bootstraps=20)["worst_score"]
    assert few["high"] == pytest.approx(stats.binomtest(0, 30).proportion_ci(method="exact").high)
    twice = gap(data.labels[data.test], probabilities, groups, person=np.arange(400) // 2, bootstraps=20)["worst_score"]
    assert twice["high"] == pytest.approx(stats.binomtest(0, 15).proportion_ci(method="exact").high)


def test_a_gap_that_is_there_is_found_and_one_of_chance_is_not():
    """Groups that do not matter have p < 0.05 in at most 5 %: of 60, more than 9 would be a chance of 1 in 500."""
    rng, found = np.random.default_rng(8), 0
    labels = made_dataset(800).labels[400:]
    groups = {"few": np.arange(400) < 80, "many": np.arange(400) >= 80}
    for _ in range(60):
        nothing = gap(labels, right_with(rng, 0.7), groups, bootstraps=60)
        found += nothing["p_value"] < 0.05
    assert found <= 9
    worse = right_with(rng, 0.8)
    worse[:, :80] = right_with(rng, 0.5)[:, :80]
    there = gap(labels, worse, groups, bootstraps=100)
    assert there["worst"] == "few" and there["p_value"] < 0.05
    assert there["gap"]["mean"] > there["by_chance"] and there["gap"]["low"] > 0.1
    assert there["gap"]["low"] < 0.3 < there["gap"]["high"]


def test_the_worst_calibration_error_is_the_largest():
    labels = made_dataset(800).labels[400:]
    groups = {"first": np.arange(400) < 200, "second": np.arange(400) >= 200}
    timid = right_with(np.random.default_rng(9), 1.0) * 0.5 + 0.1
    timid[:, :200] = right_with(np.random.default_rng(9), 1.0)[:, :200]
    found = gap(labels, timid, groups, metric="ece", bootstraps=40)
    assert (found["worst"], found["best"]) == ("second", "first")
    assert found["worst_score"]["mean"] == pytest.approx(0.4) and found["gap"]["mean"] == pytest.approx(0.4)


def test_bad_input_is_refused(refuses):
    data = made_dataset()
    labels, probabilities = guesses(np.random.default_rng(0), 1, 200)
    groups = {"a": np.arange(200) < 100, "b": np.arange(200) >= 100}
    with refuses("199", "200"):
        scores(labels[:-1], probabilities)
    with refuses("least number of patients is 1"):
        subgroups(data, data.test, least=1)
    with refuses("bootstraps is 3", "[20"):
        subgroup_table(data, data.test, probabilities, bootstraps=3)
    with refuses("metric 'f1'", "accuracy"):
        gap(labels, probabilities, groups, metric="f1")
    with refuses("at least two"):
        gap(labels, probabilities, {"a": groups["a"]})
    with refuses("undefined", "accuracy"):
        gap(labels, probabilities, {"0": labels == 0, "1": labels == 1}, metric="auroc")


# two ways to train, on the same patients


def test_a_gain_is_found_and_chance_is_not():
    """One grade in five is called right twice as often; in the others the two ways differ by chance alone."""
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        labels = np.arange(400) % 5
        hard = rng.random(400)  # what both ways find hard: most of what a score's own interval is made of
        right = [hard[None] + 0.1 * rng.random((3, 400)) < np.where(labels == 4, skill, 0.6) for skill in (0.3, 0.6)]
        called = [np.where(own, labels, (labels + 1) % 5) for own in right]
        before, after = (np.eye(5)[own] for own in called)
        groups = {str(grade): labels == grade for grade in range(5)}
        rows = {row["group"]: row for row in gains(labels, before, after, groups, bootstraps=100)}
        assert rows["4"]["finding"] and rows["4"]["gain"]["mean"] == pytest.approx(0.3, abs=0.15)
        assert rows[BALANCED]["gain"]["mean"] == pytest.approx(np.mean([rows[key]["gain"]["mean"] for key in groups]))
        found += [rows[key]["finding"] for key in "0123"]
        low, high = (rows["0"]["gain"][end] for end in ("low", "high"))
        alone = np.std(right[0][0][labels == 0]) / math.sqrt(80)
        assert high - low < 2 * alone  # less than either score's own interval, of 3.9 times that
    assert np.mean(found) < 0.25


def test_gains_are_of_the_same_patients(refuses):
    labels, probabilities = guesses(np.random.default_rng(0), 2, 40)
    with refuses("40 and 39 patients"):
        gains(labels, probabilities, probabilities[:, 1:], {})
    (row,) = gains(labels, probabilities, probabilities, {})
    assert row["group"] == BALANCED and row["gain"]["mean"] == 0 and not row["finding"]
