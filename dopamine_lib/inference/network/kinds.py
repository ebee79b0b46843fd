"""Which modules of torch can be evaluated privately, by which layer of the plan, and why others cannot."""

from torch import nn

from dopamine_lib.errors import InputError
from dopamine_lib.inference.network import graph
from dopamine_lib.inference.network.graph import Step
from dopamine_lib.inference.network.plan import LAYERS
from dopamine_lib.inference.protocols.operation import Layer

#: Kinds that are no layer, and why; the remedy is the same for all.
REFUSED = {
    **dict.fromkeys(
        ("GroupNorm", "LayerNorm", "InstanceNorm2d", "LocalResponseNorm"),
        "it divides by the spread of secret values; published weights with batch normalisation can be served",
    ),
    **dict.fromkeys(
        ("SiLU", "GELU", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "ELU", "Softmax"),
        "it is made of neither comparisons nor sums",
    ),
}
REMEDY = "use a network with ReLU, such as resnet18, densenet121 or mobilenet_v2"


def check_known(step: Step, others: tuple[type[nn.Module], ...]) -> None:
    """Raise InputError for a step that neither becomes a layer nor is one of ``others``."""
    kinds = tuple(_module_class(kind) for layer in LAYERS for kind in layer.torch_layers)
    if isinstance(step.module, kinds + others):
        return
    kind = type(step.module).__name__
    why = next((why for refused, why in REFUSED.items() if isinstance(step.module, getattr(nn, refused))), None)
    if why:
        raise InputError(f"layer '{step.name}' ({kind}) cannot be evaluated privately: {why}; {REMEDY}")
    raise _unknown(step)


def layer_for(step: Step, normalised: bool) -> type[Layer]:
    """The layer that a step becomes, on ``normalised`` features or elsewhere. Raises InputError where there is none."""
    for layer in LAYERS:
        kinds = tuple(_module_class(kind) for kind in layer.torch_layers)
        if layer.on_normalised == normalised and isinstance(step.module, kinds):
            return layer
    raise _unknown(step)


def _unknown(step: Step) -> InputError:
    known = ", ".join(known for layer in LAYERS if not layer.on_normalised for known in layer.torch_layers)
    return InputError(
        f"layer '{step.name}' ({type(step.module).__name__}) cannot be evaluated privately here; known are "
        f"{known}, BatchNorm2d, Flatten, Dropout, and NormalisedFeatures before the last Linear"
    )


def _module_class(kind: str) -> type[nn.Module]:
    return getattr(nn, kind, None) or getattr(graph, kind)
