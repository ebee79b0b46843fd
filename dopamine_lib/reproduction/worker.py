"""One process of ``reproduce``'s pool: ``python -m dopamine_lib.reproduction.worker``, see ``pool``."""

from pathlib import Path

import torch

from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment, Options
from dopamine_lib.federation.run_folder import writing
from dopamine_lib.pool import Worker
from dopamine_lib.reproduction.run import do_job


def main() -> None:
    """Make the experiment of the introduction, then do one job after another until standard input ends."""
    worker = Worker()
    torch.set_num_threads(1)
    told = worker.hear()
    options, out = told["options"] | {"settings": tuple(told["options"]["settings"])}, Path(told["out"])
    try:
        # its features are in the cache: the process that asks has extracted them
        experiment = Experiment(Options(**options), progress=False)
        with writing(out):
            while True:
                job = worker.hear()
                worker.say(answer=do_job(experiment, out, job, lambda epochs: worker.say(epochs=epochs)))
    except InputError as error:
        worker.say(**{"wrong input": str(error)})


if __name__ == "__main__":
    main()
