"""The steps that ``bench dp`` measures: the kit's, the ordinary one, and Opacus's, each made by one function.

Each maker takes a network, images and labels, and gives a function that takes one step.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dopamine_lib.models.networks import CPU, build
from dopamine_lib.models.weights import load_weights
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian

CLIP, RATE, SIGMA, HOSPITALS = 0.5, 0.01, 1.15, 10


@dataclass(frozen=True)
class Case:
    """A model on random images, and its targets; None for no target.

    most     the largest ratio of ours to the ordinary step
    least    the smallest ratio of Opacus's fastest mode to ours
    minutes  the longest time for 3,001 iterations
    """

    model: str
    pixels: int
    batch: int
    most: float | None = None
    least: float | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.pixels} px, batch {self.batch}"


def batch_of(case: Case, device: torch.device = CPU) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and a batch of random images and labels, always the same."""
    net = build(case.model, 5, load_weights("random"), seed=0).eval().to(device)
    x = torch.randn(case.batch, 3, case.pixels, case.pixels, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    return net, x.to(device), (torch.arange(case.batch) % 5).to(device)


def our_step(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A step with clipped gradients by book-keeping; it returns the new parameters."""
    task, index = Task(net, lambda index: x[index.to(x.device)], y, classes=5), torch.arange(len(x))
    w = task.start

    def step():
        nonlocal w
        w = w - RATE / len(x) * task.clipped_sums(w, index, CLIP)[0]
        return w

    return step


def plain_step(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """An ordinary SGD step."""
    return _stepping(net, torch.optim.SGD(net.parameters(), RATE), F.cross_entropy, x, y)


def opacus_hooks(
    net: nn.Module, x: Tensor, y: Tensor, noise_multiplier: float = 0.0, **options: bool
) -> Callable[[], None]:
    """Opacus's default: per-sample gradients of every layer by hooks; ``options`` are GradSampleModule's."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = GradSampleModule(_out_of_place(net).train(), **options)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), RATE),
        noise_multiplier=noise_multiplier,
        max_grad_norm=CLIP,
        expected_batch_size=len(x),
    )
    return _stepping(module, optimizer, F.cross_entropy, x if options else x.contiguous(), y)


def _out_of_place(net: nn.Module) -> nn.Module:
    """The net with activations that change nothing in place, which Opacus's hooks do not allow."""
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return net


def opacus_functorch(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Opacus with functorch for every layer."""
    return opacus_hooks(net, x, y, force_functorch=True)


def opacus_ghost(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Opacus's ghost clipping: two backward passes."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    module = GradSampleModuleFastGradientClipping(
        _out_of_place(net).train(), max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), RATE),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=len(x),
    )
    criterion = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())
    return _stepping(module, optimizer, criterion, x.contiguous(), y)


def _stepping(net: nn.Module, optimizer, criterion, x: Tensor, y: Tensor) -> Callable[[], None]:
    def step():
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()

    return step


def our_iteration(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """One pass over all hospitals' samples, each hospital's own noise, their total, and one step with it."""
    task, index = Task(net, lambda index: x[index], y), torch.arange(len(x))
    group, w, velocity = index * HOSPITALS // len(x), task.start, torch.zeros(task.d)
    terms = {"total_range": 2**15 - 1, "sample_rate": 1.0, "patients": len(x)}
    noise = RoundedGaussian(SIGMA, CLIP, HOSPITALS, task.d, **terms)
    streams = [Randomness().stream("noise", hospital) for hospital in range(HOSPITALS)]

    def step():
        nonlocal w, velocity
        sums = task.clipped_sums(w, index, CLIP, group, HOSPITALS)
        messages = [noise.combine(own, noise.draw(stream)[0]) for own, stream in zip(sums, streams, strict=True)]
        velocity = 0.9 * velocity + torch.from_numpy(noise.decode(sum(messages))).float() / len(x)
        w = w - RATE * velocity
        return w

    return step


def opacus_iteration(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """As in the reference implementation: one model and optimizer per hospital, one after another, then the mean."""
    nets = [copy.deepcopy(net) for _ in range(HOSPITALS)]
    parts = list(zip(x.tensor_split(HOSPITALS), y.tensor_split(HOSPITALS), strict=True))
    noise = SIGMA / HOSPITALS**0.5
    steps = [opacus_hooks(own, *part, noise_multiplier=noise) for own, part in zip(nets, parts, strict=True)]
    w = parameters_to_vector(net.parameters()).detach()

    def step():
        nonlocal w
        total = torch.zeros_like(w)
        for own, local_step in zip(nets, steps, strict=True):
            vector_to_parameters(w.clone(), own.parameters())
            local_step()
            total += parameters_to_vector(own.parameters()).detach()
        w = total / HOSPITALS
        return w

    return step
