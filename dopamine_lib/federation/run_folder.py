"""The folder that ``reproduce`` writes into: claimed by one process, refused to another experiment."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path, make_folder, parse_json

#: Options that name files or folders: "scans", "./scans" and "/home/me/scans" may be one.
PLACES = ("data", "data_dir", "weights", "backbone")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` in one step. Raises ValueError for NaN and infinity."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_record(path: Path, record: dict) -> None:
    """Write what a run goes on from, with a checksum, in one step."""
    write_json(path, {"record": record, "sha256": _digest(record)})


def read_record(path: Path) -> dict:
    """What ``write_record`` wrote. Raises InputError where it is damaged: a ledger in it would be another."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if found and not {"record", "sha256"} & found.keys():  # of an older version
            return found
        if _digest(found["record"]) == found["sha256"]:
            return found["record"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} cannot be read or is damaged; the ledger in it is lost, so choose another --out")


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_out(out: Path, asked: dict, resume: bool) -> None:
    """Raise InputError where ``out`` holds another run, or this one without ``--resume``."""
    note = out / "options.json"
    if not note.exists():
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; choose a directory")
        return
    if not resume:
        raise InputError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    try:
        begun = dict(parse_json(note.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{note} cannot be read; choose another --out") from error
    for key in asked:
        if begun.get(key) != asked[key] and not (key in PLACES and _same_place(begun.get(key), asked[key])):
            raise InputError(
                f"{out} was begun with {key} = {begun.get(key)}, not {asked[key]}; resume with the same options"
            )


def _same_place(one: object, other: object) -> bool:
    """Whether two texts name one file or folder, seen from here; of "resnet50:FILE" the networks must be the same."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    (network, _, one), (same, _, other) = (text.rpartition(":") for text in (one, other))
    return network == same and Path(one).exists() and Path(one).resolve() == Path(other).resolve()


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what goes wrong with files in ``out`` into an InputError: the user can put it right."""
    try:
        yield
    except Timeout as error:
        raise InputError(f"another process is at work in {out}; wait for it, or choose another --out") from error
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}); choose another directory") from error


@contextlib.contextmanager
def claim(out: Path, asked: dict, resume: bool) -> Iterator[None]:
    """Keep ``out`` for this process: two that resume the same run would spend its budget twice."""
    make_folder(out)
    with FileLock(out / ".lock", timeout=0):
        check_out(out, asked, resume)
        for torn in [*out.glob(".dopamine-*"), *out.glob("runs/.dopamine-*")]:  # what a killed process was writing
            torn.unlink(missing_ok=True)
        write_json(out / "options.json", asked)
        yield


def run_files(out: Path, name: str, run: int) -> tuple[Path, Path, Path]:
    """Record, checkpoint and lock of one run."""
    return tuple(out / "runs" / f"{name}-{run}{suffix}" for suffix in (".json", ".safetensors", ".lock"))
