"""The crypto-provider of a session: it hands out randomness, and sees neither image nor model nor answer."""

from collections.abc import Iterator

import numpy as np

from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.protocols.channel import Channel
from dopamine_lib.inference.protocols.operation import TAGS, Own, Workspace
from dopamine_lib.inference.protocols.randomness import SESSION, fresh_seed, query_key


class CryptoProvider:
    """Hands out correlated randomness for one session: two fresh seeds, then corrections query by query.

    It needs the public plan and nothing else, and sees neither image nor model nor answer. It must not collude with
    either party: with the patient's seed the provider could read the image, with the provider's seed the patient could
    read the model.

    patient_seed   16 bytes for the patient only: all it ever needs
    provider_seed  16 bytes for the provider only

    Queries count up and cannot be asked for again, so no randomness is handed out twice; a session that broke is
    replaced by a new one with new seeds, never continued. ``seed`` is for teaching and tests.
    """

    def __init__(self, plan: Plan, seed: int | None = None):
        self.plan = plan
        self.patient_seed, self.provider_seed = fresh_seed(seed, "patient"), fresh_seed(seed, "provider")
        self._queries = 0
        self._space = Workspace()
        key = query_key(self.provider_seed, SESSION)
        layouts = {i: plan.operations[i][1].weight_masks for i in plan.weighted}
        self._weight_masks = {i: list(layout.draw(key, i).values()) for i, layout in layouts.items()}

    def deal(self) -> Iterator[tuple[int, np.ndarray]]:
        """The next query's corrections: (number of the operation, bytes) for each; valid until the next one."""
        query, self._queries = self._queries, self._queries + 1
        return self._deal(query_key(self.patient_seed, query), query_key(self.provider_seed, query))

    def _deal(self, patient_key: bytes, provider_key: bytes) -> Iterator[tuple[int, np.ndarray]]:
        for i, (_, operation) in enumerate(self.plan.operations):
            patient = operation.patient.draw(patient_key, i, self._scratch("patient", operation.patient))
            provider = operation.provider.draw(provider_key, i, self._scratch("provider", operation.provider))
            buffer = self._scratch("corrections", operation.corrections)
            corrections = operation.corrections.arrays(buffer)
            masks = self._weight_masks.get(i, [])
            operation.deal(Own(**patient), Own(**provider), Own(**corrections), masks, self._space)
            yield i, buffer

    def send(self, provider: Channel) -> None:
        """Send the next query's corrections to the provider over a channel."""
        for i, corrections in self.deal():
            provider.send(TAGS * i, corrections)

    def _scratch(self, name: str, layout) -> np.ndarray:
        return self._space.array(name, (layout.nbytes,), np.uint8)
