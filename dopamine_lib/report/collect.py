"""``report``: a privacy statement and model card on one page, in Markdown and HTML, from what ``reproduce`` wrote.

Nothing is called private that was not accounted: every epsilon is computed again first (``verification``), a seeded
run is called what it is, and an audit that found more than was accounted overrules the accountant.
"""

import hashlib
import platform
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from dopamine_lib import __version__
from dopamine_lib.auditing.canaries import STANDSTILL, Plant, canary_run
from dopamine_lib.data.function import is_function
from dopamine_lib.errors import InputError, check_within
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.settings import Choice
from dopamine_lib.files import atomic_path
from dopamine_lib.models.weights import read_state
from dopamine_lib.progress import progress_bar
from dopamine_lib.report.markup import html
from dopamine_lib.report.text import markdown
from dopamine_lib.report.verification import Accounted, options_of, read_results, verify

#: Packages whose version may change a number in the report.
PACKAGES = ("torch", "opacus", "numpy", "scipy", "scikit-learn", "tenseal")
#: Hospitals in a short audit: more would only make it slower.
MOST_HOSPITALS = 20
#: Difference in a recomputed accuracy that is put down to another machine's rounding.
SAME_ACCURACY = 0.01


def write_report(
    path: str | Path,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    model: str | None = None,
    audit: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write ``report.md`` and ``report.html`` for a results file, or a folder with one; return their paths.

    out       folder for the report; by default that of the results
    data_dir  where the data is, if it has moved since the run
    model     the results' ``module:function``, whose code may be run: no file decides that
    audit     train once more in every private setting, with canaries, and report what that proves
    Raises InputError where there are no results, where their numbers do not agree with each other, or where ``out``
    cannot be written.
    """
    facts = collect(path, data_dir=data_dir, model=model, audit=audit, progress=progress)
    text = markdown(facts)
    out = read_results(path)[1] if out is None else Path(out)
    written = []
    try:
        for name, content in (("report.md", text), ("report.html", html(text))):
            with atomic_path(out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
            written.append(out / name)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); name another folder with --out") from error
    return written


def collect(
    path: str | Path,
    *,
    data_dir: str | Path | None = None,
    model: str | None = None,
    audit: bool = False,
    progress: bool = True,
) -> dict:
    """All that the report says, as plain data, which ``text`` puts into words."""
    results, folder = read_results(path)
    options = options_of(results)
    for name, value, idle, why in (
        ("data-dir", data_dir, options.data == "synthetic", "synthetic eyes are drawn, not read"),
        ("model", model, model != options.model, f"the results are of {options.model}"),
    ):
        if value is not None and idle:
            raise InputError(f"--{name} is {value}, but {why}: leave it out")
    accounted = verify(results, folder)
    audits = [_recorded(row) for row in results.get("audit", [])]
    if audit:
        # canaries are trained with Gaussian noise, which says nothing about discrete noise
        bounded = [one for one in accounted.values() if one.bound is not None]
        shown = progress_bar(bounded, title="audit", unit="setting", show=progress)
        audits += [short_audit(one, options) for one in shown if not one.bound.noise.discrete]
    if is_function(options.model) and options.model != model:
        rows, sheet, missing = None, None, f"its network's code is run only where --model {options.model} says so"
    else:
        rows, sheet, missing = _models(results, options, folder, data_dir, progress)
    source = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    return {
        "results": results,
        "options": options,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "accounted": {name: _overruled(one, audits) for name, one in accounted.items()},
        "audits": audits,
        "subgroups": rows,
        "sheet": sheet,
        "missing": missing,
        "versions": {"dopamine-kit": __version__, "Python": platform.python_version(), **_versions()},
    }


def short_audit(
    one: Accounted, options: Options, *, canaries: int = 400, seed: int | None = None, plant: Plant | None = None
) -> dict:
    """One training run of a setting at its own noise, rate and steps, on canaries alone (Steinke et al. 2023).

    The model stands still, so that every canary's gradient is clipped in every step: the worst that the bound allows
    these steps. The release of the mean features before them is not audited, and discrete noise cannot be.
    """
    declared = options.setting(one.name).with_noise(one.bound.setting.noise_multiplier)
    choice = Choice(STANDSTILL, one.bound.choice.max_grad_norm, momentum=one.bound.choice.momentum)
    ran = canary_run(
        declared,
        choice,
        canaries=canaries,
        hospitals=min(options.hospitals, MOST_HOSPITALS),
        strength=1000.0,
        delta=one.bound.delta,
        seed=seed,
        plant=plant,
    )
    return {"setting": one.name, **asdict(ran.audit()), "source": "run for this report"}


def _recorded(row: dict) -> dict:
    """An audit that results.json brings along. Raises InputError where it is not one."""
    known = {"setting": str, "epsilon": (int, float), "delta": (int, float), "confidence": (int, float)}
    known |= {"canaries": int, "guesses": int, "correct": int}
    for key, kind in known.items():
        if not isinstance(row, dict) or not isinstance(row.get(key), kind):
            raise InputError(f"results.json has an audit without {key}: take it out, or report with --audit")
    check_within("an audit's epsilon", row["epsilon"], 0, 1e3, "it is a lower bound", low_open=False)
    check_within("an audit's confidence", row["confidence"], 0, 1, "0.95 is usual", high_open=True)
    check_within("an audit's delta", row["delta"], 0, 1, "that of the training", high_open=True)
    return {key: row[key] for key in known} | {"source": "recorded in results.json, not repeated"}


def _overruled(one: Accounted, audits: list[dict]) -> Accounted:
    """The setting as accounted, or not private where an audit proves more than was accounted."""
    for row in audits:
        if row["setting"] == one.name and one.bound is not None:
            spent = replace(one.bound, delta=row["delta"]).epsilons(one.steps)
            if row["epsilon"] > min(value for value in spent.values() if value is not None):
                why = f"an audit found an epsilon of at least {row['epsilon']:.2f} at delta {row['delta']:g}"
                return replace(one, private=False, why=why)
    return one


def _models(results: dict, options: Options, folder: Path, data_dir, progress: bool):
    """Subgroups by setting and the data sheet, or None for what is not available, and why.

    Raises InputError where the models do not score what the results say.
    """
    from dopamine_lib.fairness.scores import cannot_say, subgroup_table

    names = [name for name in results["settings"] if name in options.settings]
    paths = {name: [folder / f"{name}-{run}.safetensors" for run in range(options.runs)] for name in names}
    absent = [path.name for own in paths.values() for path in own if not path.exists()]
    if absent:
        return None, None, f"{absent[0]} is not beside results.json"
    if is_function(options.data):
        return None, None, f"{options.data} is a function, and a report calls nobody's code"
    try:
        options = options if data_dir is None else replace(options, data_dir=str(data_dir))
        experiment = Experiment.load(options, progress=progress)
    except InputError as error:
        return None, None, str(error)
    if experiment.weights.sha256 != results["weights_sha256"]:
        return None, None, "the backbone's weights are not those of the run"
    rows = {}
    for name, own in paths.items():
        probabilities = np.stack([_probabilities(experiment, path, run) for run, path in enumerate(own)])
        for run, scored in enumerate(probabilities.argmax(2)):
            accuracy = float(np.mean(scored == experiment.dataset.labels[experiment.test]))
            stated = results["settings"][name]["test_accuracy"]["runs"][run]
            if abs(accuracy - stated) > SAME_ACCURACY:
                raise InputError(
                    f"{paths[name][run].name} is right on {accuracy:.1%} of what is tested on, but results.json says "
                    f"{stated:.1%}: model and results do not belong together, or the data is not the same"
                )
        rows[name] = subgroup_table(experiment.dataset, experiment.test, probabilities)
    dataset = experiment.dataset
    sheet = {
        "source": dataset.sheet.source,
        "licence": dataset.sheet.licence,
        "checksum": dataset.sheet.checksum,
        "notes": list(dataset.sheet.notes),
        "grades": dict(zip(dataset.grades, dataset.counts()["test"], strict=True)),
        "cannot": cannot_say(dataset),
    }
    return rows, sheet, None


def _probabilities(experiment: Experiment, path: Path, run: int) -> np.ndarray:
    """A saved model's probabilities of the grades, float64 (test images, grades)."""
    task = experiment.task(run)
    state, _ = read_state(path)
    try:
        task.net.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the model that results.json names; run reproduce again") from error
    w = parameters_to_vector(task.net.parameters()).detach()
    return torch.softmax(task.logits(w, torch.as_tensor(experiment.test)).double(), 1).numpy()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
