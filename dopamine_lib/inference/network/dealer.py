"""The crypto-provider: a hospital that hands out correlated randomness and sees neither image nor model nor answer.

It needs the public plan and nothing else. It must not join forces with either party: with the patient's seed the
provider could read the image, with the provider's seed the patient could read the model.
"""

from collections.abc import Iterator

import numpy as np

from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.network.program import Program
from dopamine_lib.inference.protocols.buffers import Workspace
from dopamine_lib.inference.protocols.operation import TAGS
from dopamine_lib.inference.protocols.randomness import SESSION, draw, fresh_seed, query_key


class Dealer:
    """One session: two fresh seeds, one mask of the model, then corrections query by query.

    patient_seed   16 bytes for the patient only: all it ever needs
    provider_seed  16 bytes for the provider only

    Queries count up and cannot be asked for again, so no randomness is handed out twice; a session that broke is
    replaced by a new one with new seeds, never continued. ``seed`` is for teaching and tests.
    """

    def __init__(self, plan: Plan, seed: int | None = None):
        self.program = Program(plan)
        self.patient_seed, self.provider_seed = fresh_seed(seed, "patient"), fresh_seed(seed, "provider")
        self._queries = 0
        self._space = Workspace()
        key = query_key(self.provider_seed, SESSION)
        self._masks = {i: draw(self.program.operations[i][1].session, key, i) for i in self.program.weighted}

    def deal(self) -> Iterator[tuple[int, np.ndarray]]:
        """The next query's corrections: (number of the operation, bytes) for each; valid until the next one."""
        query, self._queries = self._queries, self._queries + 1
        return self._deal(query_key(self.patient_seed, query), query_key(self.provider_seed, query))

    def _deal(self, patient_key: bytes, provider_key: bytes) -> Iterator[tuple[int, np.ndarray]]:
        for i, (_, operation) in enumerate(self.program.operations):
            patient = draw(operation.patient, patient_key, i, self._scratch("patient", operation.patient))
            provider = draw(operation.provider, provider_key, i, self._scratch("provider", operation.provider))
            out = self._scratch("corrections", operation.corrections)
            operation.deal(patient, provider, operation.corrections.views(out), self._masks.get(i), self._space)
            yield i, out

    def send(self, provider) -> None:
        """Send the next query's corrections to the provider over a channel."""
        for i, corrections in self.deal():
            provider.send(TAGS * i, corrections)

    def _scratch(self, name: str, layout) -> np.ndarray:
        return self._space.array(name, (layout.nbytes,), np.uint8)
