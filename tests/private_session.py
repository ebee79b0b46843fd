"""A private-inference session within the test's process, and single operations run by both parties."""

import threading

import numpy as np

from dopamine_lib.inference.network.dealer import Dealer
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.protocols.buffers import Workspace
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Party
from dopamine_lib.inference.protocols.randomness import SESSION, draw, fresh_seed, query_key


def at_once(*works):
    """Run functions in threads of their own; their results, or the first error."""
    results, errors = [None] * len(works), []

    def run(i, work):
        try:
            results[i] = work()
        except BaseException as error:  # handed on below: a thread's own would be lost
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, work), daemon=True) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a party waits for ever"
    return results


class Session:
    """Patient, provider and crypto-provider of one session; ``infer`` is one query from beginning to end."""

    def __init__(self, plan, weights, seed=None):
        self.dealer = Dealer(plan, seed)
        self.patient_end, self.provider_end = (Recorded(channel) for channel in local_pair())
        self.from_dealer, self.to_provider = local_pair()
        self.patient = Patient(plan, self.dealer.patient_seed, self.patient_end)
        self.provider = Provider(plan, weights, self.dealer.provider_seed, self.provider_end)
        at_once(self.patient.setup, self.provider.setup)

    def prepare(self):
        at_once(
            self.patient.prepare,
            lambda: self.provider.prepare(self.from_dealer),
            lambda: self.dealer.send(self.to_provider),
        )

    def infer(self, x):
        self.prepare()
        return self.online(x)

    def online(self, x):
        return at_once(lambda: self.patient.infer(x), self.provider.serve)[0]

    def close(self):
        for channel in (self.patient_end, self.provider_end, self.from_dealer, self.to_provider):
            channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def materials(operation, seed=None, patient_seed=None, provider_seed=None, session=None):
    """What patient and provider hold for an operation, by a crypto-provider's work."""
    patient = draw(operation.patient, patient_seed or fresh_seed(seed, "patient"), 0)
    provider = draw(operation.provider, provider_seed or fresh_seed(seed, "provider"), 0)
    corrections = operation.corrections.views(np.empty(operation.corrections.nbytes, np.uint8))
    operation.deal(patient, provider, corrections, session, Workspace())
    vars(provider).update(vars(corrections))
    return patient, provider


def both(operation, *shares, seed=None):
    """Both parties run an operation on shares ((x_0, x_1), …); the sum of what they end with."""
    patient, provider = materials(operation, seed)
    one, other = local_pair()
    results = at_once(
        lambda: operation.run(Party(PATIENT, one), 0, *(share[0] for share in shares), patient),
        lambda: operation.run(Party(PROVIDER, other), 0, *(share[1] for share in shares), provider),
    )
    one.close()
    other.close()
    return results[0] + results[1]


def with_weights(operation, shares, weights, bias, seed=None):
    """Set-up and one run of an operation that uses the provider's weights; the sum of what both end with.

    With a seed, what the patient sent and received instead: bytes by (direction, tag).
    """
    session = draw(operation.session, query_key(fresh_seed(seed, "session"), SESSION), 0)
    patient, provider = materials(operation, seed, session=session)
    masked = [w - b for w, b in zip(weights, vars(session).values(), strict=True)]
    operation.prepare(patient, masked, Workspace())
    one, other = (Recorded(channel) for channel in local_pair())
    results = at_once(
        lambda: operation.run_patient(Party(PATIENT, one), 0, shares[0], patient),
        lambda: operation.run_provider(Party(PROVIDER, other), 0, shares[1], provider, weights, bias),
    )
    one.close()
    other.close()
    if seed is None:
        return results[0] + results[1]
    return {(way, tag): data for way, tag, data in one.log}
