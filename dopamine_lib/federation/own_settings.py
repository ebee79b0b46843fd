"""Settings of one's own: a TOML file declares what the paper's five fix.

A table is a setting. It says which setting it is like, and what differs:

    [FSCDP-150]
    like = "FSCDP"
    rounds = 150
    sample_rate = 0.34
    noise_multiplier = 2.7
    learning_rate = 3.0

Its keys are the fields of ``settings.Setting`` and of ``settings.Choice`` (as in ``results.json``). Epsilon follows
from them like that of the five: every accountant, statement and check is the same.
"""

import json
import re
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path

from dopamine_lib.errors import InputError, check_whole, check_within
from dopamine_lib.federation.rounds import takes_local_steps
from dopamine_lib.federation.settings import EPOCHS, SETTINGS, Choice, Setting, choice_for, setting
from dopamine_lib.privacy.accounting import MAX_DRAWS

#: What a table may say beside ``like``: fields of a Setting, and those of a Choice as they are recorded.
OF_SETTING = tuple(field.name for field in fields(Setting) if field.name != "name")
OF_CHOICE = tuple(Choice(0.0, 0.0).record())


def read_file(path: str | Path, model: str) -> dict[str, dict]:
    """The settings that a TOML file declares. Raises InputError as ``read_settings``, and where there are none."""
    tables = read_toml(path)
    if not tables:
        raise InputError(f'{path} declares no setting; begin a table with [NAME], and say in it like = "FSCDP"')
    return read_settings(tables, model, str(path))


def read_toml(path: str | Path) -> dict:
    """The tables of a TOML file. Raises InputError where it cannot be read, with the line."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from error


def read_settings(tables: dict, model: str, where: str) -> dict[str, dict]:
    """Own settings as plain data, by name, from the tables of ``where``: ``{"setting": {…}, "choice": {…}}`` each.

    model  whose choices hold where a table is like one of the five and does not say its own
    Raises InputError for an unknown key, a missing one, or a value out of bounds.

    >>> own = read_settings({"FSCDP-150": {"like": "FSCDP", "rounds": 150, "learning_rate": 3.0}}, "head", "my.toml")
    >>> declared, choice = from_record("FSCDP-150", own["FSCDP-150"])
    >>> declared.steps, declared.noise_multiplier, choice.learning_rate, choice.max_grad_norm
    (150, 1.15, 3.0, 0.5)
    """
    if not isinstance(tables, dict):
        raise InputError(f"{where} says setting = {tables!r}, but settings are tables: [setting.NAME]")
    found = {}
    for name, table in tables.items():
        try:
            found[name] = _read(name, table, model)
            from_record(name, found[name])
        except InputError as error:
            raise InputError(f"{where}, [{name}]: {error}") from error
    return found


def as_toml(name: str, declared: Setting, choice: Choice) -> str:
    """A setting and its choice as the table that ``read_settings`` reads; what is None is left out.

    Of a title, characters that no text file holds (half of one, in a file's name) become question marks.

    >>> print(as_toml("mine", SETTINGS["C"], Choice(0.5, float("inf"))))  # doctest: +ELLIPSIS
    [mine]
    title = "non-private, centralised"
    sample_rate = 0.0170...
    rounds = 5862
    ...
    """
    said = vars(declared) | choice.record()
    lines = [
        f"{key} = {json.dumps(said[key], ensure_ascii=False)}"
        for key in (*OF_SETTING, *OF_CHOICE)
        if said[key] is not None
    ]
    text = "\n".join([f"[{name}]", *lines, ""]).replace("\x7f", "\\u007f")  # which JSON has as it is, and TOML has not
    return text.encode(errors="replace").decode()


def _read(name: str, table: object, model: str) -> dict:
    if not isinstance(table, dict):
        raise InputError(f"{name} stands outside a table; begin a setting's table with [NAME]")
    unknown = [key for key in table if key not in ("like", *OF_SETTING, *OF_CHOICE)]
    if unknown:
        known = ", ".join(("like", *OF_SETTING, *OF_CHOICE))
        raise InputError(f"{unknown[0]} is unknown; choose from {known}")
    if "like" in table:
        base = setting(str(table["like"]))
        known = asdict(replace(base, title=f"like {base.name}")) | choice_for(model, base.name).record()
    else:
        known = dict.fromkeys(("noise_multiplier", "max_grad_norm", "averaging", "centre", "reach"))
        known |= {"epochs": EPOCHS, "title": "declared in a file", "momentum": 0.9, "counts": 0.0}
        known |= {"trajectories": False}
    said = known | {key: value for key, value in table.items() if key != "like"}
    missing = [key for key in (*OF_SETTING, *OF_CHOICE) if key not in said]
    if missing:
        raise InputError(f'it does not say {", ".join(missing)}; say it, or say like = "FSCDP"')
    if "epochs" not in table and isinstance(said["rounds"], int):
        said["epochs"] = min(said["epochs"], max(1, said["rounds"]))
    return {"setting": {key: said[key] for key in OF_SETTING}, "choice": {key: said[key] for key in OF_CHOICE}}


def from_record(name: str, record: dict) -> tuple[Setting, Choice]:
    """A setting and its choice from their plain data. Raises InputError where that is not a setting's."""
    try:
        declared, choice = Setting(name=name, **record["setting"]), Choice.from_record(record["choice"])
    except (KeyError, TypeError) as error:
        raise InputError(f"setting '{name}' is not one that was declared: {error}") from error
    _check(name, declared, choice)
    return declared, choice


def _check(name: str, declared: Setting, choice: Choice) -> None:
    """Raise InputError for what cannot be trained, or would have no bound."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", name) or name.upper() in SETTINGS:
        raise InputError(
            f"a setting is called '{name}', but its name must begin with a letter, have at most 32 letters, digits, _ "
            f"and -, and not be one of {', '.join(SETTINGS)}, in small letters neither"
        )
    for key in ("federated", "shared_noise", "trajectories"):
        if not isinstance(getattr(declared, key), bool):
            raise InputError(f"{key} is {getattr(declared, key)!r}, but must be true or false")
    if not isinstance(declared.title, str):
        raise InputError(f"title is {declared.title!r}, but must be text in quotation marks")
    for key, value in (vars(declared) | vars(choice)).items():
        if isinstance(value, (bool, str)) and key not in ("name", "title", "federated", "shared_noise", "trajectories"):
            raise InputError(f"{key} is {value!r}, but must be a number, without quotation marks")
    check_within("sample_rate", declared.sample_rate, 0, 1, "it is the probability q of being in a step's sample")
    check_whole("rounds", declared.rounds, 1, 10**6, "the paper's FSCDP has 3001")
    check_whole("local_steps", declared.local_steps, 1, 10**4, "Algorithm 1 has 1")
    check_whole("epochs", declared.epochs, 1, declared.rounds, "an epoch has a round at least; the five have 100")
    check_within("participation", declared.participation, 0, 1, "it is a share of the hospitals")
    if not declared.steps:
        raise InputError(
            f"participation is {declared.participation} in {declared.rounds} rounds, so that a hospital takes no step; "
            f"take at least {1 / declared.rounds:.2g}"
        )
    if declared.private:
        check_within("noise_multiplier", declared.noise_multiplier, 0, 1e6, 'say like = "C" or "F" for no noise')
        check_within("max_grad_norm", choice.max_grad_norm, 0, 1e6, "without a clip no noise bounds anything")
    check_within("learning_rate", choice.learning_rate, 0, 1e6, "the head's is 0.25")
    check_within("momentum", choice.momentum, 0, 1, "Algorithm 1's beta is 0.9", low_open=False, high_open=True)
    for key, value in (("averaging", choice.averaging), ("centre", choice.mean_noise_multiplier)):
        if value is not None:
            check_within(key, value, 0, 1e6, "leave it out for none", low_open=False)
    if choice.reach is not None:
        check_within("reach", choice.reach, 0, 1e6, "leave it out for what no noisy change exceeds")
    check_within("counts", choice.counts, 0, 1, "it is the class counts' part of the first release", low_open=False)
    if choice.counts and choice.mean_noise_multiplier is None:
        raise InputError(f"counts is {choice.counts:g}, but centre, the noise of that release, is not said: say both")
    if declared.private and choice.mean_noise_multiplier == 0:
        raise InputError("centre is 0, but noise of 0 bounds nothing: the head's is 40; or leave it out")
    together = declared.shared_noise or not declared.federated
    several = declared.local_steps > 1 and not (declared.private and declared.federated)
    if together and (several or declared.participation != 1):
        raise InputError(
            f"local_steps is {declared.local_steps} and participation {declared.participation}, but noise that is "
            "shared, or a curator's, has a bound for single steps of everybody alone: take 1 and 1.0, or "
            "shared_noise = false with federated = true (local steps of private hospitals have a bound, too)"
        )
    if declared.trajectories and not (takes_local_steps(declared) and declared.local_steps > 1):
        raise InputError(
            "trajectories is true, but they are several local steps of private hospitals' patients under shared noise: "
            "say local_steps, with federated and shared_noise true, or leave it out"
        )
    if declared.draws > MAX_DRAWS:
        raise InputError(f"local_steps is {declared.local_steps}, but under shared noise at most {MAX_DRAWS}")
    if not declared.federated and not declared.shared_noise:
        raise InputError("shared_noise is false, but a curator's noise is everybody's: say true, or federated = true")
