"""Models of patients in a table, whose rows of p numbers have norm 1 at most (``data.table``).

Both start where nothing is known of anybody. The gradient of ``linear`` has a closed form, so that ``privacy.head``
trains it as it trains a head on frozen features.
"""

from torch import nn

#: Hidden units of the ``mlp``.
HIDDEN = 32


def linear(inputs: int, classes: int) -> nn.Linear:
    """Logistic regression on (B, inputs): it starts at zero.

    >>> linear(29, 2).weight.shape
    torch.Size([2, 29])
    """
    net = nn.Linear(inputs, classes)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def mlp(inputs: int, classes: int) -> nn.Sequential:
    """A network with one hidden layer on (B, inputs)."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


#: Each model's maker, from the numbers of inputs and classes.
TABLE_MODELS = {"linear": linear, "mlp": mlp}
