"""Operations of private inference that use weights, run by both parties."""

from dopamine_lib.inference.network.rehearsal import at_once, deal
from dopamine_lib.inference.protocols.channel import Recorded, local_pair
from dopamine_lib.inference.protocols.operation import PATIENT, PROVIDER, Party, Workspace
from dopamine_lib.inference.protocols.randomness import SESSION, fresh_seed, query_key


def seeds(seed):
    """The patient's and the provider's seed for an operation by itself."""
    return fresh_seed(seed, "patient"), fresh_seed(seed, "provider")


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
