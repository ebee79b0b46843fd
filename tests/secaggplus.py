"""A round of this kit's masks beside one of Flower's SecAgg+, ten hospitals in one process, taken in turns.

    python tests/secaggplus.py [PARAMETERS] [ROUNDS]      by default 725,061, SqueezeNet's, and 5

Needs Flower, so an environment of its own (notebooks/pages/hospitals.md). SecAgg+ is Flower's own workflow and mod, at
their defaults, with a grid that hands a message to the mod at once: neither is timed with a network.
"""

import copy
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
from flwr.app import Context, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Message, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common import recorddict_compat as compat
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.supercore.task_identity import TaskIdentity

from dopamine_lib.benchmarks.aggregation_rounds import MaskedRound

HOSPITALS, WEIGHT = 10, 1000  # of at most 1,000, which is SecAgg+'s default: what is quantised most finely


class SecAggPlus:
    """Each call runs a round, and keeps its seconds, the mean, and the bytes that a hospital sends."""

    def __init__(self, updates: list[np.ndarray]):
        self.updates, self.seconds = updates, []
        self.states = {k: self._context(k) for k in range(len(updates))}

    def _context(self, number: int) -> Context:
        return Context(run_id=1, node_id=number, node_config={}, state=RecordDict(), run_config={})

    def __call__(self) -> None:
        begin, self.sent, self.mean = time.perf_counter(), 0, None
        fit = FitIns(ndarrays_to_parameters([np.zeros(1, np.float32)]), {})
        proxies = [SimpleNamespace(node_id=k) for k in self.states]
        self.context = SimpleNamespace(
            state=SimpleNamespace(
                config_records={"config": {"current_round": 1}},
                array_records={"parameters": compat.parameters_to_arrayrecord(fit.parameters, True)},
            ),
            client_manager=SimpleNamespace(num_available=lambda: len(proxies)),
            strategy=SimpleNamespace(
                configure_fit=lambda *_: [(proxy, FitIns(fit.parameters, {})) for proxy in proxies],
                aggregate_fit=self._aggregated,
            ),
        )
        workflow, state = SecAggPlusWorkflow(1.0, 0.6, clipping_range=8.0), WorkflowState()
        steps = (
            workflow.setup_stage,
            workflow.share_keys_stage,
            workflow.collect_masked_vectors_stage,
            workflow.unmask_stage,
        )
        assert all(step(self, self.context, state) for step in steps)
        self.seconds.append(time.perf_counter() - begin)

    def _aggregated(self, _round: int, results: list, _failures: list) -> tuple[None, dict]:
        self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        """As Flower's grid, with the mod at the other end."""
        replies = []
        for message in map(copy.deepcopy, messages):  # which are one, and each mod changes its own
            k = message.metadata.dst_node_id
            replies.append(secaggplus_mod(message, self.states[k], self._fitted))
            configs = replies[-1].content.config_records[RECORD_KEY_CONFIGS]
            self.sent += sum(map(size, configs.values())) / len(self.states)
        return replies

    def _fitted(self, message: Message, context: Context) -> Message:
        own = ndarrays_to_parameters([self.updates[message.metadata.dst_node_id]])
        found = FitRes(Status(Code.OK, ""), own, WEIGHT, {})
        return Message(compat.fitres_to_recorddict(found, False), reply_to=message)


def size(value: object) -> int:
    """Bytes of a field of a message."""
    return sum(map(size, value)) if isinstance(value, list) else len(value) if isinstance(value, bytes) else 8


if __name__ == "__main__":
    d, rounds = (int(word) for word in [*sys.argv[1:], *("725061", "5")[len(sys.argv) - 1 :]])
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # messages name a run
    masks = MaskedRound(d, HOSPITALS)
    theirs = SecAggPlus(masks.updates)
    for _ in range(rounds + 1):
        masks()
        theirs()
    exact = np.mean([update.astype(np.float64) for update in masks.updates], axis=0)
    wrong = np.abs(theirs.mean - exact).max()
    for name, seconds, sent in (
        ("masks", [own * HOSPITALS for own in masks.seconds[1:]], masks.bytes),
        ("SecAgg+", theirs.seconds[1:], theirs.sent),
    ):
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        print(f"{name}: {middle:.2f} s a round ({low:.2f} to {high:.2f}), {sent / 1e6:.2f} MB from a hospital")
    print(f"SecAgg+'s mean is off by up to {wrong:.1e}; {d:,} parameters, {HOSPITALS} hospitals, {rounds} rounds each")
