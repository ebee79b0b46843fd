"""Every score of every run and epoch, a row each: ``metrics.csv``, and the same as events for TensorBoard."""

import csv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.federation.metrics import SCORES
from dopamine_lib.files import atomic_path

COLUMNS = ("setting", "run", "epoch", "score", "value")


#: A run's record (``results.run_record``) by setting and number of the run.
Records = dict[tuple[str, int], dict]


def tidy(records: Records) -> Iterator[tuple[str, int, int, str, float]]:
    """Rows of ``COLUMNS``, in the order of the records.

    With the last epoch stand the finished run's scores, among them three kinds that no other epoch has: "recall_2"
    is the recall of grade 2, "accuracy (camera: B)" a group's accuracy, and what ends in "(operating point)" is of the
    thresholds that the last rounds found. What is undefined, or what a record of an
    older version lacks, has no row.
    """
    for (name, run), record in records.items():
        for entry in record["history"]:
            found = {key: entry.get(key) for key in (*SCORES, "epsilon_rdp_classic")}
            if entry is record["history"][-1]:
                found |= {key: record[key] for key in SCORES if key in record}
                found |= {f"recall_{grade}": value for grade, value in enumerate(record.get("recall_per_grade", []))}
                for what, own in (record.get("operating_point") or {}).items():
                    found |= {f"{what} {key} (operating point)": value for key, value in own.items()}
                found |= {f"accuracy ({group})": value for group, value in record.get("group_accuracy", {}).items()}
            yield from (
                (name, run, entry["epoch"], score, value) for score, value in found.items() if value is not None
            )


def write_metrics(path: Path, records: Records) -> None:
    """Write ``tidy``'s rows as CSV, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(tidy(records))


def check_tensorboard() -> None:
    """Raise InputError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise InputError("tensorboard is not installed: pip install tensorboard, or leave --tensorboard out")


def write_events(folder: Path, records: Records) -> None:
    """Write ``tidy``'s rows for TensorBoard, a folder for each run: ``tensorboard --logdir FOLDER``."""
    from torch.utils.tensorboard import SummaryWriter

    runs = {}
    for name, run, *row in tidy(records):
        runs.setdefault(f"{name}-{run}", []).append(row)
    for run, rows in runs.items():
        place = folder / run
        with SummaryWriter(place) as writer:
            for epoch, score, value in rows:
                writer.add_scalar(score, value, epoch)
        for made in place.glob("*tfevents*"):  # its name tells the machine's, and one of an earlier call is replaced
            made.rename(place / "events.out.tfevents")
