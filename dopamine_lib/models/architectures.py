"""Networks that are not the kit's own: torchvision's by name, and anybody's by ``module:function``.

Batch normalisation shares statistics over the patients of a batch, so that none has a gradient of its own. Such layers
become group normalisation (Wu and He, 2018), which knows one image only, and results and statement say so.
"""

import copy
from functools import cache

import torch
from torch import nn

from dopamine_lib.data.function import call_function, is_function
from dopamine_lib.errors import InputError

#: Of a group normalisation: the most groups, and the least channels of one, which may have a single position.
MOST_GROUPS, LEAST_CHANNELS = 32, 4


def torchvision_models() -> list[str]:
    """Names of torchvision's networks for images."""
    from torchvision import models

    return models.list_models(module=models)


def make(model: str, classes: int, inputs: int = 0, size: int | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A network of ``torchvision_models``, or what ``module:function`` returns, and the names of its layers replaced.

    classes  number of outputs
    inputs   numbers in a row of a table, for a function that takes it
    size     side of an image in pixels, likewise
    A function is called with the number of classes and, where it takes arguments called so, ``inputs``, ``channels``
    (3) and ``size``; it returns a module from images (B, 3, size, size), or rows (B, inputs), to scores (B, classes).
    Raises InputError where it cannot be found, fails or returns something else.
    """
    net = _own(model, classes, inputs, size) if is_function(model) else _torchvision(model, classes)
    return net, without_batch_statistics(net)


def without_batch_statistics(net: nn.Module) -> tuple[str, ...]:
    """Put GroupNorm in place of every BatchNorm in ``net``, with its weights; the names of what was replaced.

    >>> net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
    >>> without_batch_statistics(net), net[1].num_groups
    (('1',), 6)
    """
    names = [name for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for name in names:
        batch_norm, (parent, _, last) = net.get_submodule(name), name.rpartition(".")
        channels = batch_norm.num_features
        fitting = (g for g in range(2, MOST_GROUPS + 1) if channels % g == 0 and channels // g >= LEAST_CHANNELS)
        group_norm = nn.GroupNorm(max(fitting, default=1), channels, eps=batch_norm.eps, affine=batch_norm.affine)
        if batch_norm.affine:
            group_norm.weight, group_norm.bias = batch_norm.weight, batch_norm.bias
        setattr(net.get_submodule(parent), last, group_norm)
    return tuple(names)


def feature_network(name: str) -> nn.Module:
    """One of torchvision's networks as published, without its last linear layer: images to features (B, p).

    Its weights are random, until they are loaded. It is for use without training, in which batch normalisation has
    fixed statistics. Raises InputError for another name, and for a network that does not end in a linear layer.
    """
    net = _torchvision(name, 1000)
    parent, _, last = _last_linear(name, net)[0].rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())
    return net.eval()


@cache
def feature_count(name: str) -> int:
    """p, the features that a ``feature_network`` gives. Raises InputError as that does.

    >>> feature_count("resnet50"), feature_count("densenet121")
    (2048, 1024)
    """
    with torch.device("meta"):  # shapes without memory or draws
        return _last_linear(name, _torchvision(name, 1000))[1].in_features


def _last_linear(name: str, net: nn.Module) -> tuple[str, nn.Linear]:
    last, layer = [(own, module) for own, module in net.named_modules() if not [*module.children()]][-1]
    if not isinstance(layer, nn.Linear):
        raise InputError(f"backbone '{name}' does not end in a linear layer; resnet18 and densenet121 do")
    return last, layer


def imagenet_file(name: str) -> str:
    """Name of the file in which torchvision publishes a network's weights. Raises InputError where it has none."""
    from torchvision import models

    if name not in torchvision_models():
        raise InputError(f"weights 'imagenet' are torchvision's, which has no '{name}'; give a file")
    return models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]


def with_weights(
    model: str, state: dict[str, torch.Tensor], size: int | None = None
) -> tuple[nn.Module, tuple[str, ...] | None]:
    """A network as published, batch normalisation included, with its tensors; and ImageNet's classes if they are its.

    model  one of torchvision's, or ``module:function``, which is called as by ``make``
    state  whose last layer says how many classes there are
    Raises InputError where the tensors are not the network's.
    """

    def made(classes: int) -> nn.Module:
        if is_function(model):
            return _own(model, classes, 0, size)
        with torch.device("meta"):  # neither memory nor draws: its tensors are put in place
            return _torchvision(model, classes)

    last = [name for name, _ in made(2).named_parameters()][-1]
    if last not in state or not state[last].dim():
        raise InputError(f"the weights have no '{last}'; their keys must be those of {model}")
    net = made(len(state[last]))
    try:
        missing, unknown = net.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a heading, and then a line for each
        raise InputError(f"the weights do not fit {model}: {str(error).splitlines()[1].strip()}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # of use in training only
    if missing or unknown:
        said = f"lack '{missing[0]}'" if missing else f"have '{unknown[0]}', which it has not"
        raise InputError(f"the weights do not fit {model}: they {said}")
    classes = () if is_function(model) else imagenet_classes(model)
    return net.float().eval(), classes if len(classes) == len(state[last]) else None


def imagenet_classes(model: str) -> tuple[str, ...]:
    """The names of the classes that one of torchvision's networks was published with.

    >>> len(imagenet_classes("resnet18")), imagenet_classes("resnet18")[0]
    (1000, 'tench')
    """
    from torchvision import models

    return tuple(models.get_model_weights(model).DEFAULT.meta["categories"])


def _torchvision(model: str, classes: int) -> nn.Module:
    from torchvision import models

    if model not in torchvision_models():
        raise InputError(f"model '{model}' is not one of torchvision's; resnet18 and mobilenet_v3_small are")
    # their auxiliary classifiers and slow draws of weights are for training as in their papers
    plain = {"aux_logits": False, "init_weights": False} if model in ("googlenet", "inception_v3") else {}
    return models.get_model(model, weights=None, num_classes=classes, **plain)


def _own(model: str, classes: int, inputs: int, size: int | None) -> nn.Module:
    net = call_function(model, "model", classes, inputs=inputs, channels=3, size=size)
    if not isinstance(net, nn.Module):
        raise InputError(f"model {model} returned {type(net).__name__}, but it must return a torch.nn.Module")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*net.parameters(), *net.buffers())):
        raise InputError(
            f"model {model} has a layer without a size (such as nn.LazyLinear): give it its number of inputs, as "
            "nn.Linear takes it"
        )
    trained = [parameter.requires_grad for parameter in net.parameters()]
    if not trained or not all(trained):
        raise InputError(
            f"model {model} has {len(trained)} parameters, of which {sum(trained)} are trained; all must be, and there "
            "must be some: make what is fixed a buffer"
        )
    try:
        return copy.deepcopy(net)  # the function may return the same one again, and the next run starts anew
    except Exception as error:  # some layers' own; torch.nn.utils.weight_norm computes its weight too early
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model {model} cannot be copied ({why}); let every tensor that it keeps be a parameter or a buffer"
        ) from error
