"""The report's words: from the facts that ``collect`` gathered to Markdown."""

from dopamine_lib.federation.bounds import accounted_mean_noise
from dopamine_lib.federation.metrics import LEAST, SCREENING
from dopamine_lib.federation.results_table import on_the_papers_task
from dopamine_lib.federation.statement import ACCOUNTANT_NAMES, APART, HOW, in_words, not_covered, once_summed, unit
from dopamine_lib.privacy.accounting import ACCOUNTANTS
from dopamine_lib.report.markup import bullets, markdown_table, plain


def markdown(facts: dict) -> str:
    """The report as Markdown, from ``report.collect``."""
    parts = ["# Privacy statement and model card", _opening(facts), "## Is it private?", _verdicts(facts)]
    if called := _called(facts["results"]["settings"]):
        parts += ["## Whom its thresholds call", called]
    bounded = [one for one in facts["accounted"].values() if one.bound is not None]
    if bounded:
        parts += [
            "## What the bound says",
            _bounds(facts, bounded),
            "## What an adversary sees",
            _adversaries(facts, bounded),
        ]
    parts += ["## Audit", _audits(facts), "## For whom it works", _subgroups(facts)]
    parts += ["## Data sheet", _sheet(facts), "## Versions and seeds", _versions(facts)]
    return "\n\n".join(parts) + "\n"


def _opening(facts: dict) -> str:
    results, options = facts["results"], facts["options"]
    known = "counted" if results["patients"]["counted"] else "declared"
    return (
        f"{plain(results['data'])}, {plain(results['model'])} on {plain(results['weights'])}; "
        f"{results['patients']['train']} {known} training patients in {len(results['hospitals'])} hospitals "
        f"({plain(options.split)} split), {results['patients']['test']} test {_ones(results)}, runs of each setting: "
        f"{options.runs}. "
        "Intended for teaching and for reproducing the paper's Figure 1: not a medical device, not for diagnosis."
    )


def _ones(results: dict) -> str:
    """What the data are of."""
    return "rows" if results.get("inputs") else "images"


def _label(results: dict) -> str:
    """What a label is called: only diabetic retinopathy has grades."""
    return "grade" if on_the_papers_task(results) else "class"


def _verdicts(facts: dict) -> str:
    rows, settings = [], facts["results"]["settings"].values()
    screened = [what for what in SCREENING if any(f"{what}_sensitivity" in result for result in settings)]
    for name, one in facts["accounted"].items():
        result, accuracy = facts["results"]["settings"][name], facts["results"]["settings"][name]["test_accuracy"]
        over_runs = f" ± {100 * accuracy['std']:.1f}" if len(accuracy["runs"]) > 1 else ""
        said = "**private**" if one.private else f"**not private**: {plain(one.why)}"
        rows.append(
            [
                plain(name),
                said,
                _epsilons(one.epsilon)
                + (f"; mean over hospitals {_epsilons(result['epsilon'])}" if "epsilon_worst" in result else ""),
                f"{result['delta']:g}" if one.epsilon else "none",
                f"{100 * accuracy['mean']:.1f}{over_runs} %",
                _mean(result, "balanced_accuracy", ".1%"),
                _mean(result, "quadratic_kappa", ".2f"),
                *(
                    f"{_mean(result, f'{what}_sensitivity', '.0%')} at {_mean(result, f'{what}_specificity', '.0%')}"
                    for what in screened
                ),
            ]
        )
    names = ", ".join(ACCOUNTANT_NAMES[key] for key in ACCOUNTANTS)
    columns = ["setting", "verdict", f"epsilon of one run ({names})", "delta", "accuracy"]
    columns += ["balanced accuracy", "kappa"]
    columns += [f"{what.replace('_', '-')}: sensitivity at specificity" for what in screened]
    note = (
        "Epsilon is that of the worst-off hospital's patients, against an outsider. Each one was computed again from "
        "noise multiplier, sample rate, steps and delta, and agrees with what the run had written. *Private* means: at "
        "that epsilon, of one run. Beyond about 10 it promises little."
    )
    if screened:
        note += " *Referable* is grade 2 and above, *sight-threatening* grade 3 and above: what accuracy hides."
    if any(one.epsilon and not one.private for one in facts["accounted"].values()):
        note += " Where the verdict is *not private*, epsilon is what the noise would buy if nobody could predict it."
    return f"**This folder as a whole.** {plain(_folder(facts))}\n\n" + markdown_table(columns, rows) + "\n\n" + note


def _called(settings: dict) -> str:
    """What the thresholds of the settings find among the test patients, by what is screened for; "" without any."""
    rows = [
        [plain(name), plain(what.replace("_", "-")), _mean(own, "threshold", ".2f")]
        + [_mean(own, score, ".0%") for score in ("sensitivity", "specificity")]
        for name, result in settings.items()
        for what, own in result.get("operating_point", {}).items()
    ]
    if not rows:
        return ""
    note = (
        "A patient is called whose severity, the expected class as a number from 0, exceeds the threshold. Thresholds "
        "come from counts that the last tenth of the rounds asked for, so a private setting's are in its epsilon. "
        "Means over the runs, each with its own threshold, on the test patients."
    )
    return markdown_table(["setting", "called", "beyond", "sensitivity", "specificity"], rows) + "\n\n" + note


def _mean(result: dict, score: str, digits: str) -> str:
    """A score's mean over runs; "none" where it is undefined, or the results are of an older version."""
    mean = result[score]["mean"] if score in result else None
    return "none" if mean is None else format(mean, digits).replace("%", " %")


def _folder(facts: dict) -> str:
    """The verdict on the folder: its own, which a seed has gone into, unless one of its bounds was lost since."""
    options = facts["options"]
    lost = [
        f"{one.name}: {one.why}"
        for one in facts["accounted"].values()
        if options.bounded(options.setting(one.name))
        and not one.private
        and (one.bound is None or options.seed is None)
    ]
    return f"Not private: {'; '.join(lost)}." if lost else facts["results"]["folder"]["verdict"]


def _epsilons(epsilon: dict | None) -> str:
    if epsilon is None:
        return "none"
    return ", ".join("none" if epsilon[key] is None else f"{epsilon[key]:.2f}" for key in ACCOUNTANTS)


def _steps(one) -> str:
    setting = one.bound.setting
    several = setting.draws > 1 or setting.trajectories
    return f"{one.steps} rounds of {setting.local_steps} local steps" if several else f"{one.steps} steps"


def _bounds(facts: dict, bounded: list) -> str:
    patients, model = facts["results"]["patients"]["train"], facts["options"].model
    table = facts["results"]["inputs"] > 0 if "inputs" in facts["results"] else None
    rows = {
        "unit": lambda one: unit(facts["options"].data, facts["results"].get("persons"), table),
        "adjacency": lambda one: "one patient added or removed",
        "sampler": lambda one: f"Poisson, rate {one.bound.setting.sample_rate:.5g}, {_steps(one)}",
        "mechanism": _mechanism,
        "accountants": lambda one: in_words(one.epsilon),
        "delta": lambda one: f"{one.bound.delta:g} = {one.bound.delta * patients:.2g} / n, n = {patients}",
        "assumed": lambda one: "honest hospitals, noise that nobody can predict",
        "not covered": lambda one: "; ".join(not_covered(model, one.name in (facts["options"].own or {}))),
    }
    cells = {key: [row(one) for one in bounded] for key, row in rows.items()}
    header = ["", *(one.name for one in bounded)]
    # what all settings share is said once
    shared = [f"**{key}** {own[0]}" for key, own in cells.items() if len(set(own)) == 1 and len(own) > 1]
    own = [[key, *values] for key, values in cells.items() if len(set(values)) > 1 or len(values) == 1]
    return markdown_table(header, own) + ("\n\n" + "For all: " + "; ".join(shared) + "." if shared else "")


def _mechanism(one) -> str:
    setting, choice = one.bound.setting, one.bound.choice
    kind = "Skellam" if one.bound.noise.discrete else "Gaussian"
    what = "gradients clipped to" if setting.draws == 1 else "sums of local steps' gradients, for each draw within"
    if setting.trajectories:
        what = "mean gradients of patients' own trajectories clipped to"
    told = f"{what} {choice.max_grad_norm:g}, {kind} noise {setting.noise_multiplier:.5g} times that"
    told += f", sent as multiples of {1 / one.bound.noise.scale:.3g}"
    mean = accounted_mean_noise(setting, choice, one.bound.shares)
    return told + (f"; once, {once_summed(choice.counts)} with noise {mean:.4g}" if mean else "")


def _adversaries(facts: dict, bounded: list) -> str:
    rows, aggregation, apart = [], facts["options"].aggregation, "processes" in facts["results"]
    in_clear = apart and aggregation == "plain"
    for one in bounded:
        views = one.bound.adversaries(one.steps, in_clear)
        declared = one.bound.setting
        if not declared.federated:
            server = "a trusted curator: it holds the data"
        elif declared.shared_noise and in_clear:
            server = f"every message in the clear, with one share of noise: {_epsilons(views['server'])}"
        elif declared.shared_noise:
            alone = one.bound.epsilon(one.steps, colluding=one.bound.shares - 1)
            sees = "sums behind secure aggregation"
            if aggregation == "plain":
                sees = "every message in the clear in this run, a simulation; behind secure aggregation sums"
            server = (
                f"{sees}, then the same: {_epsilons(views['server'])}; computational, and "
                f"{alone:.2f} (classic RDP) for whoever sees single messages"
            )
        else:
            server = f"every hospital's message, noised by itself: {_epsilons(views['server'])}"
        if not declared.federated:
            hospital = "there is none"
        elif views["hospital"] is None:
            hospital = "nothing is left for it to hide behind"
        else:
            subtracts = "subtracts its own noise: " if declared.shared_noise else "sees what the outsider sees: "
            hospital = subtracts + _epsilons(views["hospital"])
        rows.append([one.name, f"every model of the training: {_epsilons(views['outsider'])}", server, hospital])
    federated = any(one.bound.setting.federated for one in bounded)
    how = (APART if apart else HOW).get(aggregation, f"{plain(aggregation)} reads every message.") if federated else ""
    return markdown_table(["epsilon against", "an outsider", "the server", "one curious hospital"], rows) + "\n\n" + how


def _audits(facts: dict) -> str:
    if not facts["audits"]:
        return "None was made: `report --audit` trains once more with canaries and says what that proves."
    rows = [
        [
            plain(row["setting"]),
            f"at least {row['epsilon']:.2f} at delta {row['delta']:g} ({100 * row['confidence']:g} %)",
            f"{row['correct']} of {row['guesses']} guesses right, {row['canaries']} canaries",
            plain(row["source"]),
        ]
        for row in facts["audits"]
    ]
    note = "A lower bound below the accounted epsilon proves no fault; it does not prove that there is none."
    return markdown_table(["setting", "empirical epsilon", "from one training run", "source"], rows) + "\n\n" + note


def _subgroups(facts: dict) -> str:
    tables = facts["subgroups"]
    if tables is None:
        return f"Subgroups were not computed: {plain(facts['missing'])}."
    names, results = list(tables), facts["results"]
    shown = [i for i, row in enumerate(tables[names[0]]) if " x " not in row["by"]]
    rows = []
    for i in shown:
        first = tables[names[0]][i]
        by = _label(results) if first["by"] == "grade" else first["by"].replace("_", " ")
        group = f"{by}: {first['group']}" if first["by"] != "all" else "everybody"
        rows.append([plain(group), str(first["patients"]), *(_interval(tables[name][i]["accuracy"]) for name in names)])
    worst = [f"{name}: {found}" for name in names if (found := _worst(tables[name], _ones(results)))]
    told = f"Worst group by what is recorded: {'; '.join(worst)}. " if worst else ""
    left_out, small = list(results.get("groups_left_out", [])), _few(facts["sheet"]["grades"])
    if small:
        left_out.append(f"{_label(results)}: {', '.join(small)} (fewer than {LEAST} test {_ones(results)})")
    if left_out:
        told += f"Without a score of their own: {plain('; '.join(left_out))}. "
    cannot = plain(facts["sheet"]["cannot"])
    header = ["accuracy in %, 95 % interval", _ones(results), *map(plain, names)]
    return markdown_table(header, rows) + f"\n\n{told}{cannot}"


def _few(grades: dict[str, int]) -> list[str]:
    """The grades that too few test images have for a score, a rare one often among them."""
    return [grade for grade, count in grades.items() if count < LEAST]


def _interval(score: dict | None) -> str:
    if score is None:
        return "none"
    return f"{100 * score['mean']:.0f} ({100 * score['low']:.0f} to {100 * score['high']:.0f})"


def _worst(rows: list[dict], ones: str) -> str | None:
    recorded = [row for row in rows if row["by"] not in ("all", "grade", "sharpness") and row["accuracy"] is not None]
    if not recorded:
        return None
    worst = min(recorded, key=lambda row: row["accuracy"]["mean"])
    return f"{plain(worst['group'])} ({_interval(worst['accuracy'])} %, {worst['patients']} {ones})"


def _sheet(facts: dict) -> str:
    sheet, results = facts["sheet"], facts["results"]
    if sheet is None:
        return f"{plain(results['data'])}; its sheet could not be read: {plain(facts['missing'])}."
    label = _label(results)
    counts = ", ".join(f"{plain(grade)} {count}" for grade, count in sheet["grades"].items())
    return bullets(
        f"source: {plain(sheet['source'])}; licence: {plain(sheet['licence'])}; checksum: {plain(sheet['checksum'])}",
        f"test {_ones(results)} by {label}: {counts}; how many training patients have which {label} is not released",
        *map(plain, sheet["notes"]),
    )


def _versions(facts: dict) -> str:
    options, results = facts["options"], facts["results"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    replaced = results.get("group_norm_for_batch_norm", [])
    shown = replaced if len(replaced) < 5 else [*replaced[:2], "…", replaced[-1]]
    layers = "; group normalisation in the place of batch normalisation, layers: "
    layers += f"{len(replaced)} ({plain(', '.join(shown))})"
    return bullets(
        f"this report was written with {versions}",
        f"randomness of noise and samples: {plain(results['randomness'])}; split, initial weights and the draw of "
        f"participants: public seed {options.public_seed}",
        f"aggregation: {plain(options.aggregation)}, noise: {plain(options.noise)}; weights SHA-256 "
        f"{plain(results['weights_sha256'])}; results SHA-256 {facts['sha256']}" + (layers if replaced else ""),
    )
