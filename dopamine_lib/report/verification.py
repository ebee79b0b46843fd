"""What ``reproduce`` wrote, checked by doing its accounting again: an epsilon is believed only if it comes out twice.

The declared numbers are taken from a results file (noise multiplier, sample rate, steps, delta, hospitals, seed); which
hospitals took part in which round follows from the public draw. Epsilons, adversaries and statements are computed anew
from these and must be what the file says. What cannot be seen here is a seed that was used and not recorded, or a file
about a training that never took place.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dopamine_lib.data import PATIENTS
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.folder import BOTH_EYES
from dopamine_lib.data.function import is_function
from dopamine_lib.errors import InputError, check_within
from dopamine_lib.federation.bounds import Bound
from dopamine_lib.federation.metrics import SCORES
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.release import release
from dopamine_lib.federation.results import spread
from dopamine_lib.federation.rounds import rescaled
from dopamine_lib.federation.settings import Choice
from dopamine_lib.federation.statement import privacy_statement
from dopamine_lib.files import parse_json
from dopamine_lib.models.networks import parameter_count, replaced_layers
from dopamine_lib.models.weights import read_state
from dopamine_lib.privacy.accounting import ACCOUNTANTS

#: Relative difference that is put down to rounding: the PRV accountant's last digits depend on the number of threads.
ROUNDING = 1e-6


@contextlib.contextmanager
def well_formed(path: str) -> Iterator[None]:
    """Turn the error of a missing or malformed value in a results file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{path} is not what reproduce writes ({reason}); run reproduce again") from error


def read_results(path: str | Path) -> tuple[dict, Path]:
    """The results in a file, or in ``results.json`` of a folder, and the folder that they are in.

    Raises InputError where there are none, or they are not JSON.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        inside = sorted(path.parent.glob("*/results.json"))
        also = f": {path.parent} has folders of results, such as {inside[0].parent}" if inside else ""
        raise InputError(f"{path} does not exist; give the folder or the results.json that reproduce wrote{also}")
    try:
        results = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON; run reproduce again") from error
    if isinstance(results, dict) and results.get("unfinished"):
        raise InputError(f"{path} was stopped by --minutes; let reproduce --resume finish it first")
    if not isinstance(results, dict) or not isinstance(results.get("settings"), dict) or not results["settings"]:
        raise InputError(f"{path} has no settings; give the results.json that reproduce wrote")
    return results, path.parent


@dataclass(frozen=True)
class Accounted:
    """Whether one setting may be called private, and what it spent.

    private   whether it may be called private;  why: if not, the reason
    bound     what its messages spend; None where nothing was accounted
    steps     noisy steps of the worst-off hospital
    epsilon   of the worst-off hospital, by accountant; None where nothing was accounted
    """

    name: str
    private: bool
    why: str
    bound: Bound | None = None
    steps: int = 0
    epsilon: dict[str, float | None] | None = None


def options_of(results: dict) -> Options:
    """The options that a results file was made with. Raises InputError for values that reproduce refuses."""
    with well_formed("results.json"):
        asked = {key: value for key, value in results["options"].items() if key != "weights_sha256"}
        options = Options.from_record(asked)
        sizes, _ = results["hospitals"], (results["weights"], results["weights_sha256"])
        if (
            len(sizes) != (options.hospitals or len(sizes))
            or sum(sizes) != results["patients"]["train"]
            or min(sizes) < 1
        ):
            raise InputError(
                f"results.json has hospitals of {sizes} patients, but they must be {options.hospitals} and have "
                f"{results['patients']['train']} together: run reproduce again"
            )
        for key, value in (("data", options.data), ("model", options.model), ("delta", options.delta)):
            _must_agree(f"the {key}", results[key], value)
        known = PATIENTS.get(options.data)
        if known and results.get("persons", known) != BOTH_EYES:  # EyePACS is read as APTOS is
            _must_agree("who is one patient", results.get("persons", known), known)
        check_within("number of test images", results["patients"]["test"], 0, 10**9, "run reproduce again")
        source = "operating systems of the parties" if "processes" in results else "operating system"
        seeded = source if options.seed is None else f"seeded with {options.seed}: for teaching only"
        _must_agree("the randomness", results["randomness"], seeded)
        return options


def verify(results: dict, folder: Path) -> dict[str, Accounted]:
    """Every setting of a results file, with whether it may be called private.

    folder  where models may be: their statements must agree as well
    Raises InputError where an epsilon, a statement, a delta or a sample rate is not what the file's own numbers give.
    No setting is believed then.
    """
    options = options_of(results)
    with well_formed("results.json"):
        found = {name: _verify(results, options, name, folder) for name in results["settings"]}
        if all(one.bound is not None or not options.bounded(options.setting(one.name)) for one in found.values()):
            _verify_folder(results, options)
        return found


def _verify(results: dict, options: Options, name: str, folder: Path) -> Accounted:
    declared, result = options.setting(name), results["settings"][name]
    scores = {score: result[score] for score in ("test_accuracy", "quadratic_kappa")}
    scores |= {score: result[score] for score in SCORES if score in result}  # an older version wrote fewer
    scores |= {f"accuracy of {group}": own for group, own in result.get("group_accuracy", {}).items()}
    for what, own in result.get("operating_point", {}).items():
        scores |= {f"{what} {key}": stated for key, stated in own.items()}
    for score, stated in scores.items():
        if len(stated["runs"]) != options.runs:
            raise InputError(
                f"{name} has {len(stated['runs'])} runs, but {options.runs} were asked for: run reproduce again"
            )
        found = spread(stated["runs"])
        _must_agree(f"{name}'s {score}", stated["mean"], found["mean"])
        _must_agree(f"{name}'s spread of {score}", stated["std"], found["std"])
    if "balanced_accuracy" in result:
        recalls = [value for value in result["recall_per_grade"] if value is not None]
        _must_agree(f"{name}'s balanced_accuracy", result["balanced_accuracy"]["mean"], float(np.mean(recalls)))
    if not declared.private:
        _must_agree(f"{name}'s epsilon", result["epsilon"], None)
        return Accounted(name, False, "no noise was added")
    if not options.bounded(declared):
        _must_agree(f"{name}'s epsilon", result["epsilon"], None)
        return Accounted(name, False, f"{options.aggregation} takes the place of the sum that its noise is sized for")
    if result["epsilon"] is None or result["noise_multiplier"] is None:
        return Accounted(name, False, "no epsilon was accounted")
    if not isinstance(result.get("statement"), str) or not result["statement"].strip():
        return Accounted(name, False, "it carries no privacy statement")
    _must_agree(f"{name}'s sample rate", result["sample_rate"], declared.sample_rate)
    _must_agree(f"{name}'s number of steps", result["steps"], declared.steps)
    _must_agree(f"{name}'s number of rounds", result.get("rounds", declared.rounds), declared.rounds)  # new in 2026
    _must_agree(f"{name}'s delta", result["delta"], options.delta)

    plan = _replayed(results, options, name)
    bound, charged = plan.bound, [plan.charged(run) for run in range(options.runs)]
    steps = sorted({steps for run in charged for steps in run})
    for accountant in ACCOUNTANTS:
        spent = {count: bound.epsilon(count, accountant) for count in steps}
        each = [spent[count] for run in charged for count in run]
        mean = None if None in each else float(np.mean(each))
        _must_agree(f"{name}'s epsilon ({accountant})", result["epsilon"][accountant], mean)
        if not declared.shared_noise:
            stated = result["epsilon_worst"][accountant]
            _must_agree(f"{name}'s epsilon of the worst-off hospital ({accountant})", stated, spent[steps[-1]])
    apart = "processes" in results
    adversaries = bound.adversaries(steps[-1], in_clear=apart and options.aggregation == "plain")
    _must_agree(f"{name}'s adversaries", result["adversaries"], adversaries)

    measured = result.get("own_accountant")  # as stated, since reading a file must run no code

    def statement(charged):
        return privacy_statement(
            bound,
            charged=charged,
            patients=results["patients"]["train"],
            counted=results["patients"]["counted"],
            seeded=options.seed is not None,
            data=options.data,
            persons=results.get("persons"),
            table=None if "inputs" not in results else results["inputs"] > 0,
            model=options.model,
            replaced=len(_replaced(results, options)),
            aggregation=options.aggregation,
            apart=apart,
            own=name in (options.own or {}),
            optimizer=options.optimizer,
            operating_point=plan.operating_point,
            by_own=measured and (measured["name"], measured["epsilon"]),
        )

    _must_agree(f"{name}'s statement", result["statement"], statement(sum(charged, [])))
    # a file may be wrong consistently: what no option changes must be what the kit trains with
    used = options.choice(name)
    if options.epsilon is not None:
        used = rescaled(used, options.declared(name), plan.setting)
    _must_agree(f"{name}'s clipping norm", plan.choice.max_grad_norm, used.max_grad_norm)
    told = plan.choice.mean_noise_multiplier
    _must_agree(f"{name}'s noise on the mean features", told, used.mean_noise_multiplier)
    _must_agree(f"{name}'s part of the class counts", plan.choice.counts, used.counts)
    if options.epsilon is None:
        _must_agree(f"{name}'s noise multiplier", result["noise_multiplier"], declared.noise_multiplier)
    for run, own in enumerate(charged):
        path = folder / f"{name}-{run}.safetensors"
        if path.exists():
            _must_agree(f"{name}'s statement in {path.name}", _statement_in(path), statement(own))
    seeded = "its noise follows from a seed: for teaching, it hides nothing" if options.seed is not None else ""
    return Accounted(name, not seeded, seeded, bound, steps[-1], bound.epsilons(steps[-1]))


def _verify_folder(results: dict, options: Options) -> None:
    """Raise InputError where what the folder spends as a whole is not what its runs together give."""
    plans = {name: _replayed(results, options, name) for name in results["settings"]}
    charged = {name: [plan.charged(run) for run in range(options.runs)] for name, plan in plans.items()}
    bounds = {name: plan.bound for name, plan in plans.items()}
    _must_agree("the folder", results["folder"], release(bounds, charged, seeded=options.seed is not None))


def _replayed(results: dict, options: Options, name: str) -> Plan:
    """The plan of a setting as its results state it; which hospitals took part follows from the public draw."""
    result, sizes = results["settings"][name], results["hospitals"]
    declared = options.setting(name).with_noise(result["noise_multiplier"])
    return Plan(
        declared,
        Choice.from_record(result["choice"]),
        tuple(sizes) if declared.federated else (sum(sizes),),
        _parameters(results, options, len(result["recall_per_grade"])),
        aggregation=options.aggregation if declared.federated else "plain",
        discrete=options.discrete(declared),
        least=options.shares(declared, len(sizes)),
        delta=result["delta"],
        budget=options.budget,
        accountant=options.accountant,
        seed=options.public_seed,
        operating_point=options.operating_point(results.get("grades", GRADES)),
    )


def _parameters(results: dict, options: Options, classes: int) -> int:
    """d, which must be the model's; of a ``module:function`` as stated, since reading a file must run no code."""
    if is_function(options.model):
        check_within("number of parameters", results["parameters"], 1, 10**12, "run reproduce again", low_open=False)
        return results["parameters"]
    counted = parameter_count(options.model, classes, results.get("inputs", 0), backbone=options.backbone)
    _must_agree("the number of parameters", results.get("parameters", counted), counted)
    return counted


def _replaced(results: dict, options: Options) -> list[str]:
    """Names of layers that the model has in place of others; of a ``module:function`` as stated."""
    stated = results.get("group_norm_for_batch_norm", [])
    if not is_function(options.model):
        _must_agree("the list of replaced layers", stated, list(replaced_layers(options.model, 5)))
    return stated


def _statement_in(path: Path) -> str:
    _, metadata = read_state(path)
    try:
        return parse_json(metadata["statement"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} says nothing about its privacy: it is not a model that reproduce wrote") from error


def _must_agree(what: str, stated, recomputed) -> None:
    """Raise InputError where what a file says is not what its numbers give."""
    if not _same(stated, recomputed):
        at = 0
        if isinstance(stated, str) and isinstance(recomputed, str):  # of long texts, where they part
            at = max(0, next((i for i, (a, b) in enumerate(zip(stated, recomputed, strict=False)) if a != b), 0) - 20)
        short = [repr(value[at : at + 60] if isinstance(value, str) else value)[:120] for value in (stated, recomputed)]
        raise InputError(
            f"{what} is stated as {short[0]}, but its own numbers give {short[1]}: the file was changed or made by "
            "another version; run reproduce again"
        )


def _same(one, other) -> bool:
    if isinstance(other, dict):
        return isinstance(one, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other)]
    if all(numbers):
        return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-12)
    return type(one) is type(other) and one == other
