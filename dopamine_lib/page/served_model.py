"""The model that the patient's page serves by default, and what is known about it.

A linear head on the embedded SqueezeNet, trained by FSCDP on the synthetic hospitals with a balanced loss, so that it
finds severe disease, and with thresholds for a specificity of 90 %, which its last tenth of the rounds paid for: the
first run of ``reproduce`` in its default settings, not the best of several, with randomness from the operating system
(a seed would give its noise away). It is 12 kB, since the features it stands on are shipped
anyway. It is made again, always slightly different, by

    python -m dopamine_lib.page.served_model FILE
"""

import json
import sys
import tempfile
from pathlib import Path

from dopamine_lib.errors import InputError, table_model
from dopamine_lib.files import parse_json
from dopamine_lib.machine import place_for, safe_output

#: The file that is served by default; ``--weights`` of the command ``app`` names another.
SERVED = Path(__file__).parents[1] / "assets" / "served_model.safetensors"
#: A header holds a privacy statement and little more.
MAX_HEADER = 1_000_000
#: Of each threshold: nine of ten without the disease are not called.
SPECIFICITY = 0.9

#: Keys that ``make`` adds to the metadata that ``reproduce`` writes.
MEASURED = (
    "accuracy",
    "balanced_accuracy",
    "quadratic_kappa",
    "recall_per_grade",
    "referable_sensitivity",
    "referable_specificity",
    "sight_threatening_sensitivity",
    "sight_threatening_specificity",
    "operating_point",
    "test_patients",
    "epsilon",
    "epsilon_hospital",
    "delta",
    "train_patients",
    "trained_on",
)


def facts(path: str | Path | None = None) -> dict:
    """What a model written by ``reproduce`` says of itself; by default the one that is served.

    setting, grades, size, statement   of every model
    loss                               "balanced" where each grade counts alike; "cross-entropy" where nothing is said
    operating_point                    threshold, sensitivity and specificity of each disease that is called by severity
    accuracy … sight_threatening_specificity   ``metrics.evaluate``'s, on ``test_patients``, by the model in the clear
    epsilon, epsilon_hospital          against an outsider and against one curious hospital, by accountant
    delta, train_patients, trained_on  None, like the two lines above, where the file does not say

    Reads the header alone: no weight enters this process. Raises InputError for a file that is not such a model.
    """
    path = Path(path or SERVED)
    try:
        with open(path, "rb", buffering=0) as file:  # a buffer would read on, into the weights
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            metadata = parse_json(file.read(length))["__metadata__"]
        metadata = {key: parse_json(value) for key, value in metadata.items()}
        known = {key: metadata[key] for key in ("setting", "grades", "statement")}
        if "inputs" in metadata["preprocessing"]:
            raise table_model(path, metadata["architecture"])
        known["size"] = metadata["preprocessing"]["size"]
        known["loss"] = metadata.get("loss", "cross-entropy")
        measured = dict(metadata.get("measured", {}))
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"the model {path} cannot be read ({error.strerror}); give a file that reproduce wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a model written by reproduce; give one of its .safetensors files") from None
    return known | {key: measured.get(key) for key in MEASURED}


def make(out: str | Path, *, progress: bool = True) -> dict:
    """Train the model that is served and write it to ``out``, a .safetensors file; returns its facts.

    Half a minute on two cores. Raises InputError for another suffix, and where nothing can be written.
    """
    from safetensors.torch import save_file

    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out} ends in '{out.suffix}'; the model is written as .safetensors")
    with place_for(out, "the model") as temporary:
        state, metadata = _trained(progress)
        save_file(state, temporary, metadata)
    return facts(out)


def _trained(progress: bool) -> tuple[dict, dict]:
    """The model's arrays, and its metadata with what it achieves."""
    from dopamine_lib.federation.metrics import SCORES
    from dopamine_lib.federation.options import Options
    from dopamine_lib.models.weights import read_state
    from dopamine_lib.reproduction.run import reproduce

    with tempfile.TemporaryDirectory(prefix="dopamine-") as folder:
        results = reproduce(
            Options(settings=("FSCDP",), runs=1, loss="balanced", specificity=SPECIFICITY), folder, progress=progress
        )
        state, metadata = read_state(Path(folder) / "FSCDP-0.safetensors")
    result, patients = results["settings"]["FSCDP"], results["patients"]
    measured = {
        "accuracy": result["test_accuracy"]["runs"][0],
        **{key: result[key]["runs"][0] for key in MEASURED if key in SCORES and key != "accuracy"},
        "recall_per_grade": result["recall_per_grade"],
        "operating_point": {
            what: {score: values["runs"][0] for score, values in own.items()}
            for what, own in result["operating_point"].items()
        },
        "test_patients": patients["test"],
        "epsilon": result["epsilon"],
        "epsilon_hospital": result["adversaries"]["hospital"],
        "delta": result["delta"],
        "train_patients": patients["train"],
        "trained_on": f"{patients['train']} synthetic patients of {len(results['hospitals'])} hospitals; "
        "no photograph of a real eye",
    }
    return state, metadata | {"measured": json.dumps(measured)}


def main(arguments: list[str]) -> int:
    """``python -m dopamine_lib.page.served_model FILE``; returns the exit status."""
    safe_output()
    if len(arguments) != 1:
        print("usage: python -m dopamine_lib.page.served_model FILE", file=sys.stderr)
        return 2
    try:
        made = make(arguments[0])
    except InputError as error:
        print(f"dopamine: {error}", file=sys.stderr)
        return 2
    print(f"accuracy {made['accuracy']:.3f} on {made['test_patients']} synthetic test patients; {made['statement']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
