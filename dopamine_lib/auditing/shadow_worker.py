"""One process of the pool that trains targets: ``python -m dopamine_lib.auditing.shadow_worker``, see ``pool``."""

import torch

from dopamine_lib.auditing.shadow_models import target_record
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment, Options
from dopamine_lib.pool import Worker


def main() -> None:
    """Make the experiment of the introduction, then train one target after another until standard input ends."""
    worker = Worker()
    torch.set_num_threads(1)
    options = worker.hear()["options"]
    try:
        experiment = Experiment(Options(**options | {"settings": tuple(options["settings"])}), progress=False)
        while True:
            worker.say(answer=target_record(experiment, *worker.hear()["target"]))
    except InputError as error:
        worker.say(**{"wrong input": str(error)})


if __name__ == "__main__":
    main()
