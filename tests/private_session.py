"""A private-inference session within the test's process, and single operations run by both parties."""

import threading

from dopamine_lib.inference.network.parties import CryptoProvider, Patient, Provider
from dopamine_lib.inference.network.rehearsal import deal
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Party, Workspace
from dopamine_lib.inference.protocols.randomness import SESSION, fresh_seed, query_key


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
        self.crypto_provider = CryptoProvider(plan, seed)
        self.patient_end, self.provider_end = (Recorded(channel) for channel in local_pair())
        self.offline, self.dealt = local_pair()
        self.patient = Patient(plan, self.crypto_provider.patient_seed, self.patient_end)
        self.provider = Provider(plan, weights, self.crypto_provider.provider_seed, self.provider_end)
        at_once(self.patient.setup, self.provider.setup)

    def prepare(self):
        at_once(
            self.patient.prepare,
            lambda: self.provider.prepare(self.offline),
            lambda: self.crypto_provider.send(self.dealt),
        )

    def infer(self, x):
        self.prepare()
        return self.online(x)

    def online(self, x):
        return at_once(lambda: self.patient.infer(x), self.provider.serve)[0]

    def close(self):
        for channel in (self.patient_end, self.provider_end, self.offline, self.dealt):
            channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def seeds(seed):
    """The patient's and the provider's seed for an operation by itself."""
    return fresh_seed(seed, "patient"), fresh_seed(seed, "provider")


def both(operation, *shares, seed=None):
    """Both parties run an operation on shares ((x_0, x_1), …); the sum of what they end with."""
    patient, provider = deal(operation, seeds(seed))
    one, other = local_pair()
    results = at_once(
        lambda: operation.run(Party(PATIENT, one), 0, patient, *(share[0] for share in shares)),
        lambda: operation.run(Party(PROVIDER, other), 0, provider, *(share[1] for share in shares)),
    )
    one.close()
    other.close()
    return results[0] + results[1]


def with_weights(operation, shares, weights, bias, seed=None):
    """Set-up and one run of an operation that uses the provider's weights; the sum of what both end with.

    With a seed, what the patient sent and received instead: bytes by (direction, tag).
    """
    masks = list(operation.weight_masks.draw(query_key(fresh_seed(seed, "session"), SESSION), 0).values())
    patient, provider = deal(operation, seeds(seed), masks)
    provider.weights, provider.bias = weights, bias
    operation.prepare(patient, [w - b for w, b in zip(weights, masks, strict=True)], Workspace())
    one, other = (Recorded(channel) for channel in local_pair())
    results = at_once(
        lambda: operation.run(Party(PATIENT, one), 0, patient, shares[0]),
        lambda: operation.run(Party(PROVIDER, other), 0, provider, shares[1]),
    )
    one.close()
    other.close()
    if seed is None:
        return results[0] + results[1]
    return {(way, tag): data for way, tag, data in one.log}
