"""Whole networks evaluated privately, against the same networks in torch."""

import numpy as np
import pytest
import torch
from torch import nn

from dopamine_lib import data
from dopamine_lib.data.synthetic import make_population
from dopamine_lib.inference.network import kinds as kinds_module
from dopamine_lib.inference.network import plan as network_plan
from dopamine_lib.inference.network import quantise as quantise_file
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.graph import Branches
from dopamine_lib.inference.network.plan import Plan, evaluate
from dopamine_lib.inference.network.quantise import MOST_TOGETHER, quantise, round_together
from dopamine_lib.inference.network.rehearsal import Rehearsal
from dopamine_lib.inference.network.serving import calibration_images
from dopamine_lib.inference.protocols.operation import Layer
from dopamine_lib.models.features import NormalisedFeatures, backbone
from dopamine_lib.models.networks import build, cnn, to_input
from dopamine_lib.models.weights import load_weights

torch.set_num_threads(1)


def images(shape, count=4, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)  # seed 0 draws the weights: images must not resemble them
    return torch.rand(count, *shape, generator=generator) * 2 - 1


def private_and_plain(net, x, calibration=None, mean=None, std=None):
    """Logits of a batch, privately and in torch, each (N, classes)."""
    plan, weights = compile_model(net, x.shape[2:], x if calibration is None else calibration, mean, std)
    with Rehearsal(plan, weights) as session, torch.inference_mode():
        return np.array([session.infer(image) for image in x.numpy()]), net(x).flatten(1).numpy()


def error(private, wanted):
    """The largest logit error relative to the logits' range."""
    return np.abs(private - wanted).max() / np.ptp(wanted)


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def layers(*make):
    """A network of layers whose weights are drawn when it is called."""
    return lambda: nn.Sequential(*(one() for one in make))


def conv(*options, **more):
    return lambda: nn.Conv2d(*options, **more)


def average(pool):
    return layers(conv(3, 6, 3, padding=1), nn.ReLU, pool, nn.Dropout, nn.Flatten, lambda: nn.Linear(96, 4))


def branching():
    inner = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.ReLU())
    parallel = Branches([inner, nn.MaxPool2d(1), nn.Conv2d(6, 2, 1)])
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), parallel, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 4)
    )


NETWORKS = {
    "linear": ((3, 4, 4), layers(nn.Flatten, lambda: nn.Linear(48, 3))),
    "two linear": ((3, 4, 4), layers(nn.Flatten, lambda: nn.Linear(48, 8), lambda: nn.Linear(8, 3))),
    "no bias": ((1, 6, 6), layers(conv(1, 4, 3, bias=False), nn.ReLU, nn.Flatten, lambda: nn.Linear(64, 3))),
    "relu on the image": ((3, 6, 6), layers(nn.ReLU, conv(3, 5, 3, stride=2, padding=1), nn.Flatten)),
    "pool on the image": ((3, 7, 7), layers(lambda: nn.MaxPool2d(3, 2), conv(3, 5, 2), nn.Flatten)),
    "average pool": ((3, 8, 8), average(lambda: nn.AvgPool2d(2))),
    "uneven averages": ((3, 7, 7), average(lambda: nn.AdaptiveAvgPool2d(4))),
    "pool, then relu": (
        (3, 9, 9),
        layers(
            conv(3, 6, 3), lambda: nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU, nn.Flatten, lambda: nn.Linear(54, 4)
        ),
    ),
    "branches": ((3, 8, 8), branching),
    "the kit's small network": ((3, 28, 28), cnn),
    "SqueezeNet, 5 classes": ((3, 64, 64), lambda: build("squeezenet", 5, load_weights(), 0)),
}


def margins(logits):
    """By how much the largest of each row leads: an answer's noise may decide between two that are nearly equal."""
    top = np.sort(logits, axis=1)
    return top[:, -1] - top[:, -2]


@pytest.mark.parametrize("name", NETWORKS)
def test_private_logits_are_the_plain_ones(name):
    shape, make = NETWORKS[name]
    net = seeded(make)
    got, wanted = private_and_plain(net, images(shape), images(shape, 8, seed=1))
    assert error(got, wanted) < 1.5e-3
    clear = margins(wanted) > 2 * 1.5e-3 * np.ptp(wanted)
    assert np.array_equal(got.argmax(1)[clear], wanted.argmax(1)[clear]) and clear.any()


def test_a_thousand_classes():
    net = seeded(lambda: build("squeezenet", 1000, load_weights(), 0))
    got, wanted = private_and_plain(net, images((3, 64, 64), 1), images((3, 64, 64)))
    assert got.shape == (1, 1000) and error(got, wanted) < 1.5e-3


def head_on(start, classes=5, seed=0):
    """A head with plausible weights on a backbone."""
    torch.manual_seed(seed)
    return nn.Sequential(backbone(start), NormalisedFeatures(), nn.Linear(512, classes)).eval()


def test_a_normalised_head_on_its_backbone():
    start = load_weights()
    pictures = make_population(4, 64, 3)[0]
    net, x = head_on(start), to_input(pictures, start.mean, start.std)
    net[2].weight.data *= 100  # logits as far apart as trained ones
    got, wanted = private_and_plain(
        net, x, to_input(calibration_images(64), start.mean, start.std), start.mean, start.std
    )
    assert error(got, wanted) < 1e-3 and np.array_equal(got.argmax(1), wanted.argmax(1))


def test_pooling_comes_before_relu_and_hidden_scales_say_nothing():
    net = seeded(lambda: build("squeezenet", 5, load_weights(), 0))
    x = images((3, 64, 64))
    plan, _ = compile_model(net, 64, x)
    kinds = [type(layer).__name__ for layer in plan.layers]
    assert kinds[:3] == ["Convolution", "MaxPool", "ReLU"] and kinds.count("ReLU") == 18
    with torch.no_grad():
        for parameter in net.features[3].squeeze.parameters():
            parameter *= 7
        net.features[6].squeeze.weight *= 3
    louder, _ = compile_model(net, 64, x)
    assert plan.layers[:-3] == louder.layers[:-3] and louder.layers[-1].scale != plan.layers[-1].scale


def test_costs_equal_the_bytes_on_the_channels():
    shape, make = NETWORKS["branches"]
    x = images(shape)
    plan, weights = compile_model(seeded(make), shape[1:], x)
    costs = plan.costs()
    with Rehearsal(plan, weights) as session:
        assert session.patient_end.received == costs["setup_to_patient"]
        session.prepare()
        assert session.offline.received == costs["offline_to_provider"]
        sent, received, rounds = session.patient_end.sent, session.patient_end.received, session.patient_end.rounds
        session.online(x[0].numpy())
        assert session.patient_end.sent - sent == costs["online_to_provider"]
        assert session.patient_end.received - received == costs["online_to_patient"]
        assert 0 < session.patient_end.rounds - rounds <= costs["rounds"]
        names = {plan.describe(tag) for _, tag, _ in session.patient_end.log}
    assert {"query's number", "answer's share", "masked weights", "0: E = x_0 - A", "1: beta"} <= names


def test_squeezenet_at_224_stays_within_the_promised_bytes():
    net = build("squeezenet", 5, load_weights(), 0).eval()
    plan, _ = compile_model(net, 224, images((3, 224, 224), 1))
    costs = plan.costs()
    assert costs["online_to_provider"] + costs["online_to_patient"] <= 60e6
    assert costs["offline_to_provider"] <= 100e6 and costs["offline_to_patient"] == 0
    assert costs["rounds"] <= 110


class Double(Layer):
    """2 x, in place of nn.Softsign: a layer as somebody might add one."""

    torch_layers = ("Softsign",)

    @classmethod
    def from_torch(cls, compiler, name, module):
        compiler.append(cls, name, 2 * compiler.value.images)

    def plain(self, inputs, weights):
        return inputs[0] * 2


def test_a_new_layer_is_a_class_and_a_name_in_the_list(monkeypatch):
    kinds = (*network_plan.LAYERS, Double)
    for module in (network_plan, kinds_module):
        monkeypatch.setattr(module, "LAYERS", kinds)
    net = seeded(layers(conv(3, 5, 2), nn.ReLU, nn.Softsign, nn.Flatten, lambda: nn.Linear(45, 3)))
    x = images((3, 4, 4))
    plan, weights = compile_model(net, 4, x)
    assert type(plan.layers[2]) is Double and Plan.from_json(plan.to_json()) == plan
    net[2].forward = lambda y: 2 * y
    with Rehearsal(plan, weights) as session, torch.inference_mode():
        assert error(session.infer(x[0].numpy()), net(x)[0].numpy()) < 1.5e-3


# refusals


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), "track_running_stats=True"),
        (nn.BatchNorm1d(3), "must follow a Linear layer"),
        (nn.Softplus(), "Softplus"),
        (nn.Conv2d(3, 3, 3, dilation=2), "dilation=1"),
        (nn.Conv2d(3, 3, 3, padding="same"), "padding='same'"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "padding_mode"),
        (nn.Conv2d(5, 3, 1), "reads 5 channels, but 3 arrive"),
        (nn.MaxPool2d(3, dilation=2), "dilation=1"),
        (nn.MaxPool2d(30), "use larger images"),
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode=False"),
        (nn.Linear(192, 3), "needs Flatten"),
        (nn.Flatten(2), "must join all dimensions"),
        (NormalisedFeatures(), "one value per channel"),
    ],
)
def test_an_unknown_layer_or_option_is_refused_by_name(layer, said, refuses):
    with refuses("layer '1'", said):
        compile_model(nn.Sequential(nn.ReLU(), layer), 8, images((3, 8, 8)))


def test_other_unsuitable_models_are_refused(refuses):
    x = images((3, 8, 8))
    with refuses("no layer"):
        compile_model(nn.Sequential(), 8, x)
    with refuses("(N, C, 9, 9)"):
        compile_model(nn.ReLU(), 9, x)
    broken = nn.Conv2d(3, 2, 3)
    broken.weight.data[0, 0, 0, 0] = float("nan")
    with refuses("layer 'Conv2d'", "not finite"):
        compile_model(broken, 8, x)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), NormalisedFeatures())
    with refuses("followed by a Linear layer"):
        compile_model(nn.Sequential(*pooled), 8, x)
    with refuses("layer '3' (ReLU)"):
        compile_model(nn.Sequential(*pooled, nn.ReLU()), 8, x)
    with refuses("layer '1' (Conv2d) follows Flatten"):
        compile_model(nn.Sequential(nn.Flatten(), nn.Conv2d(3, 2, 1)), 8, x)


# room left in the ring


def test_an_overflow_shows_in_the_plain_integers_and_spoils_the_answer():
    """Scales set on nearly black pictures, then a white one: the margin is there to prevent this."""
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3, bias=False))
    )
    dark, white = torch.full((1, 1, 4, 4), 0.01), torch.ones(1, 1, 4, 4)
    plan, weights = compile_model(net, 4, dark, (0.0,), (1.0,))
    assert max(evaluate(plan, weights, dark[0].numpy())[1].values()) < 0.4
    exact, room = evaluate(plan, weights, white[0].numpy())
    wanted = net(white)[0].detach().numpy()
    assert max(room.values()) > 1 and np.abs(exact - wanted).max() < 0.02 * np.ptp(wanted)
    with Rehearsal(plan, weights) as session:
        assert error(session.infer(white[0].numpy()), wanted) > 0.1


def smooth(count, seed, channels=6):
    """Pictures as a network reads them: neighbours are correlated; one channel is dead."""
    torch.manual_seed(seed)
    pictures = nn.functional.avg_pool2d(torch.rand(count, channels, 16, 16), 5, stride=1)
    pictures[:, 2] = 0
    return pictures


@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_rounding_weights_together_loses_less_than_rounding_each_to_its_nearest(kind, monkeypatch):
    public, other, out = smooth(40, 0), smooth(40, 1), torch.full((10,), 5e3)
    fine = torch.tensor([5.0, 10, 20, 40, 80, 160])
    torch.manual_seed(2)
    if kind == "convolution":
        layer, size = nn.Conv2d(6, 10, 3, stride=2, padding=1), 9
        u = nn.functional.unfold(other * fine[:, None, None], 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
    else:
        layer, size = nn.Linear(6 * 144, 10), 144
        u = (other * fine[:, None, None]).flatten(1)
    weight, bias = quantise(layer, public, fine, out)
    assert torch.equal(weight, weight.round())
    exact = layer.weight.detach().double().flatten(1) * 5e3 / fine.double().repeat_interleave(size)

    def lost(rounded):
        return float((u.double() @ (rounded - exact).T).square().mean())

    assert lost(weight) < lost(exact.round()) / 5
    added = u.double() @ (exact.round() - exact).T  # where each is rounded by itself, the bias takes its mean off
    with monkeypatch.context() as patch:
        patch.setattr(quantise_file, "MOST_TOGETHER", 0)
        moved = quantise(layer, public, fine, out)[1] - layer.bias.detach().double() * 5e3
    assert torch.allclose(moved, -added.mean(0), rtol=0.3, atol=2)
    assert (added + moved).square().mean() < added.square().mean() / 3
    assert (weight - exact).abs().max() < 3


def test_uncorrelated_inputs_leave_nothing_to_gain():
    exact = 10 * torch.randn(4, 20, dtype=torch.float64)
    for rows in (exact, exact[:1]):
        before = rows.clone()
        assert torch.equal(round_together(rows, torch.eye(20, dtype=torch.float64)), before.round())
        assert torch.equal(rows, before)
    layer, one = nn.Linear(MOST_TOGETHER + 1, 2), torch.ones(1)
    x = torch.rand(2, MOST_TOGETHER + 1, 1, 1)
    weight, _ = quantise(layer, x, one.expand(MOST_TOGETHER + 1), 1e3 * one.expand(2))
    assert torch.equal(weight, (1e3 * layer.weight.detach().double()).round())


def trained_head(start, pictures, labels):
    """A head trained by full-batch gradient descent on normalised features."""
    features = NormalisedFeatures()(
        torch.cat([backbone(start)(to_input(part, start.mean, start.std)) for part in np.array_split(pictures, 8)])
    )
    layer, labels = nn.Linear(512, 5), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(300):
        loss = nn.functional.cross_entropy(layer(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("weights_file", "count"), [("squeezenet1_1_features_imagenet.npz", 200), (None, 100)])
def test_top_class_and_error_on_many_real_eyes(shared_data, weights_file, count):
    start = load_weights(weights_file and shared_data / weights_file)
    eyes = data.load("aptos", shared_data / "aptos2019", size=224)
    torch.manual_seed(0)
    layer = trained_head(start, eyes.images[-400:], eyes.labels[-400:])
    net = nn.Sequential(backbone(start), NormalisedFeatures(), layer).eval()
    x = to_input(eyes.images[:count], start.mean, start.std)
    got, wanted = private_and_plain(
        net, x, to_input(calibration_images(224), start.mean, start.std), start.mean, start.std
    )
    stated = 1e-3 * np.ptp(wanted)
    clear = margins(wanted) > 2 * stated
    print(f"error {error(got, wanted):.2e} of the range, {clear.sum()} of {count} with a clear margin")
    assert error(got, wanted) < 1e-3
    assert np.array_equal(got.argmax(1)[clear], wanted.argmax(1)[clear]) and clear.mean() > 0.95
