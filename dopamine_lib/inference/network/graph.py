"""A torch network as the steps that are compiled, in order: torch.fx follows its ``forward``.

What is no work of its own goes. Batch normalisation, whose statistics are fixed after training, becomes part of the
convolution or linear layer before it, or a convolution of one weight per channel where there is none; dropout goes.
Convolutions that read the same value and whose outputs are joined become one step, as in SqueezeNet's fire modules:
their input is sent once. Max pooling comes before ReLU: both are increasing, and ReLU is then left less to do.
"""

import inspect
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops import StochasticDepth

from dopamine_lib.errors import InputError
from dopamine_lib.models.features import NormalisedFeatures

_BatchNorm, _Dropout = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd


class Branches(nn.ModuleList):
    """Modules that read one input; their outputs are concatenated by channel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, sum of C_i, H', W')."""
        return torch.cat([branch(x) for branch in self], 1)


class Add(nn.Module):
    """The sum of values of one shape, as at the end of a residual block."""

    def forward(self, *values: Tensor) -> Tensor:
        """Values (B, C, H, W) to their sum."""
        return torch.stack(values).sum(0)


class Join(nn.Module):
    """Values joined by channel."""

    def forward(self, *values: Tensor) -> Tensor:
        """Values (B, C_i, H, W) to (B, sum of C_i, H, W)."""
        return torch.cat(values, 1)


@dataclass(eq=False)
class Step:
    """A module and the steps whose results it reads; the image is a step that reads nothing."""

    name: str
    module: nn.Module
    sources: list["Step"]


def steps_of(model: nn.Module) -> list[Step]:
    """The steps of a network in evaluation, in order: the image first, last the one whose result is the output.

    Raises InputError where ``forward`` cannot be followed, and for an operation without a module; names it.
    """
    if not [*model.children()]:
        model = nn.Sequential() if isinstance(model, nn.Sequential) else _named(model)
    try:
        nodes = [*_Tracer().trace(model).nodes]
    except Exception as error:  # whatever a network's own code raises on values that are not there yet
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the network's forward cannot be followed ({why}); it must do the same whatever the image is"
        ) from error
    steps = _read(nodes, dict(model.named_modules()))
    for simplify in (_without_idle, _without_batch_norm, _convolutions_together, _pooling_first):
        steps = simplify(steps)
    return steps


def readers(steps: list[Step]) -> dict[Step, list[Step]]:
    """For each step those that read its result."""
    return {step: [later for later in steps if step in later.sources] for step in steps}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, NormalisedFeatures | StochasticDepth)
        return leaf or super().is_leaf_module(m, module_qualified_name)


def _named(module: nn.Module) -> nn.Sequential:
    """A single layer as a network in which it is called by its kind."""
    net = nn.Sequential()
    net.add_module(type(module).__name__, module)
    return net


def _read(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> list[Step]:
    """fx's nodes as steps; those that the output does not need are left out."""
    image, *others = (node for node in nodes if node.op == "placeholder")
    if any(node.users for node in others):
        raise InputError("the network reads more than an image; give one that takes a single tensor")
    found: dict[fx.Node, Step] = {image: Step("image", nn.Identity(), [])}
    steps = [found[image]]
    for node in nodes:
        if node.op == "output":
            out = found.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            if out is None:
                raise InputError("the network must return one tensor, its scores")
            return _needed(steps, out)
        if node.op == "placeholder" or node.target in _SHAPES:
            continue
        inputs, made = _modules(node, modules)
        name = str(node.target) if node.op == "call_module" else _place(node)
        if not inputs or not all(isinstance(one, fx.Node) and one in found for one in inputs):
            raise InputError(f"layer '{name}': {_unknown(node)}")
        step = None
        for module in made:
            step = Step(name, module, [found[one] for one in inputs] if step is None else [step])
            steps.append(step)
        found[node] = step
        if _in_place(node, modules):  # whoever reads the input from here on finds the result there
            found[inputs[0]] = step
    raise InputError("the network returns nothing")


def _needed(steps: list[Step], out: Step) -> list[Step]:
    needed = {out}
    for step in reversed(steps):
        if step in needed:
            needed.update(step.sources)
    return [step for step in steps if step in needed or step is steps[0]]


def _place(node: fx.Node) -> str:
    """The module in which an operation is written, and its name."""
    path = [*node.meta.get("nn_module_stack", {"": None})][-1]
    return f"{path}.{node.name}" if path else node.name


def _unknown(node: fx.Node) -> str:
    what = getattr(node.target, "__name__", str(node.target))
    if node.target in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
        return (
            "a product of two secret values, as in squeeze-and-excitation, is not computed privately here; use a "
            "network without, such as resnet50 or mobilenet_v2"
        )
    return f"the operation '{what}' cannot be evaluated privately here; use a module of torch.nn that is known"


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules[node.target] if node.op == "call_module" else None
    written = node.target is operator.iadd or (isinstance(node.target, str) and node.target.endswith("_"))
    return getattr(module, "inplace", False) or bool(node.kwargs.get("inplace")) or written and module is None


def _modules(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[list, list[nn.Module]]:
    """What a node reads, and the modules that do its work one after the other."""
    if node.op == "call_module":
        return list(node.args), [modules[node.target]]
    if node.target in _ADDITIONS:
        return ([] if node.kwargs else list(node.args)), [Add()]
    if node.target in (torch.cat, torch.concat):
        values, dim = [*node.args, *node.kwargs.values()][:2] if len(node.args) + len(node.kwargs) == 2 else ([], 0)
        return (list(values) if dim == 1 else []), [Join()]
    make = _FUNCTIONS.get(node.target)
    if make is None:
        return [], []
    try:
        options = inspect.signature(make).bind(*node.args[1:], **node.kwargs)
        return [node.args[0]], make(*options.args, **options.kwargs)
    except (TypeError, ValueError):
        return [], []


def _flatten(start_dim: int = 0, end_dim: int = -1) -> list[nn.Module]:
    return [nn.Flatten(start_dim, end_dim)]


def _reshape(*shape) -> list[nn.Module]:
    if len(shape) != 2 or shape[1] != -1:
        raise ValueError
    return [nn.Flatten()]


def _average(dim, keepdim: bool = False) -> list[nn.Module]:
    if sorted(d % 4 for d in dim) != [2, 3]:
        raise ValueError
    return [nn.AdaptiveAvgPool2d(1)] + ([] if keepdim else [nn.Flatten()])


def _max_pool(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False) -> list:
    return [nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)]


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
#: Nodes that give numbers for a ``view``; whatever else reads them is refused.
_SHAPES = ("size", getattr, operator.getitem)
#: Functions, and methods by name, as the modules that do the same; called with the arguments after the first.
_FUNCTIONS: dict[Callable | str, Callable[..., list[nn.Module]]] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), lambda inplace=False: [nn.ReLU()]),
    F.relu6: lambda inplace=False: [nn.ReLU6()],
    F.dropout: lambda p=0.5, training=True, inplace=False: [nn.Identity()],
    "contiguous": lambda: [nn.Identity()],
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.reshape, "reshape", "view"), _reshape),
    **dict.fromkeys((torch.mean, "mean"), _average),
    F.adaptive_avg_pool2d: lambda output_size: [nn.AdaptiveAvgPool2d(output_size)],
    F.avg_pool2d: lambda *options, **named: [nn.AvgPool2d(*options, **named)],
    F.max_pool2d: _max_pool,
}


def _without(steps: list[Step], gone: Step) -> list[Step]:
    """The steps without one, whose readers read what it read."""
    for step in steps:
        step.sources = [gone.sources[0] if source is gone else source for source in step.sources]
    return [step for step in steps if step is not gone]


def _without_idle(steps: list[Step]) -> list[Step]:
    for step in steps[1:]:
        if isinstance(step.module, nn.Identity | _Dropout | StochasticDepth):
            steps = _without(steps, step)
    return steps


def _without_batch_norm(steps: list[Step]) -> list[Step]:
    for step in [step for step in steps if isinstance(step.module, _BatchNorm)]:
        before = step.sources[0]
        if step.module.running_mean is None:
            raise InputError(
                f"layer '{step.name}': batch normalisation without running statistics depends on a batch; train it "
                "with track_running_stats=True"
            )
        alone = readers(steps)[before] == [step]
        if alone and isinstance(before.module, nn.Conv2d) and isinstance(step.module, nn.BatchNorm2d):
            before.module, steps = fuse_conv_bn_eval(before.module, step.module), _without(steps, step)
        elif alone and isinstance(before.module, nn.Linear) and isinstance(step.module, nn.BatchNorm1d):
            before.module, steps = fuse_linear_bn_eval(before.module, step.module), _without(steps, step)
        elif isinstance(step.module, nn.BatchNorm2d):
            step.module = fuse_conv_bn_eval(each_channel(step.module.num_features), step.module)
        else:
            raise InputError(f"layer '{step.name}' ({type(step.module).__name__}) must follow a Linear layer")
    return steps


def each_channel(channels: int) -> nn.Conv2d:
    """A convolution that multiplies each channel by a number of its own, at first one."""
    module = nn.Conv2d(channels, channels, 1, groups=channels, bias=False).eval()
    nn.init.ones_(module.weight)
    return module


def _convolutions_together(steps: list[Step]) -> list[Step]:
    for join in [step for step in steps if isinstance(step.module, Join)]:
        ends, reading = join.sources, readers(steps)
        relu = all(isinstance(end.module, nn.ReLU) for end in ends)
        convolutions = [end.sources[0] for end in ends] if relu else ends
        together = {*ends, *convolutions}
        if (
            all(isinstance(step.module, nn.Conv2d) for step in convolutions)
            and len({step.sources[0] for step in convolutions}) == 1
            and all(len(reading[step]) == 1 for step in together)
            and len(together) == (1 + relu) * len(ends)
        ):
            name = os.path.commonprefix([step.name for step in convolutions]).rstrip(".") or join.name
            one = Step(name, Branches(step.module for step in convolutions), [convolutions[0].sources[0]])
            steps = [one if step is join else step for step in steps if step not in together]
            if relu:
                steps.insert(steps.index(one) + 1, Step(f"{name}.relu", nn.ReLU(), [one]))
            for step in steps:
                step.sources = [steps[steps.index(one) + relu] if s is join else s for s in step.sources]
    return steps


def _pooling_first(steps: list[Step]) -> list[Step]:
    reading = readers(steps)
    for pool in _pools(steps):
        before = pool.sources[0]
        while isinstance(before.module, nn.ReLU | nn.ReLU6) and len(reading[before]) == 1:
            for attribute in ("name", "module"):
                first, second = getattr(before, attribute), getattr(pool, attribute)
                setattr(before, attribute, second), setattr(pool, attribute, first)
            pool, before = before, before.sources[0]
    return steps


def _pools(steps: list[Step]) -> Iterator[Step]:
    return (step for step in steps if isinstance(step.module, nn.MaxPool2d))
