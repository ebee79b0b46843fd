"""An aggregation and an optimiser of one's own, for tests that name them as ``own_code:NAME``."""

import torch


def median(messages):
    """The median, number by number (of two the lower one), times how many messages there are."""
    return len(messages) * messages.median(0).values


def adam(parameters):
    """Adam on the server."""
    return torch.optim.Adam(parameters, lr=0.01)
