"""Networks of any shape, evaluated privately: torchvision's, and small ones that hold what theirs are made of."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_inference_network import error, images, private_and_plain, seeded
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from dopamine_lib.benchmarks.agreement import like_trained
from dopamine_lib.inference.network import quantise
from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.kinds import REFUSED
from dopamine_lib.inference.network.plan import LAYERS, evaluate
from dopamine_lib.inference.network.rehearsal import Rehearsal
from dopamine_lib.inference.network.serving import load
from dopamine_lib.inference.protocols.pooling import AveragePool
from dopamine_lib.inference.protocols.truncation import Sum
from dopamine_lib.inference.workers.printing import print_answers
from dopamine_lib.inference.workers.processes import Workers
from dopamine_lib.models.networks import IMAGENET, to_input
from dopamine_lib.models.tables import TABLE_MODELS

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


class Written(nn.Module):
    """A network with a ``forward`` of its own."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._written = forward
        for name, module in modules.items():
            setattr(self, name, module)
        self.first, self.last = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        """(B, 3, H, W) to (B, 4)."""
        return self.last(self._written(self, self.first(x)).mean((2, 3)))


def residual(net, x):
    x = F.max_pool2d(F.relu(net.norm(x)), 3, 2, 1)
    x = torch.relu(net.norm2(net.conv(x)) + x)
    return F.relu(x + net.joining(torch.cat([net.conv(x), x], 1)))


def overwritten(net, x):
    y = F.relu(x, inplace=True)
    y += net.conv(x)  # reads what ReLU left in x
    return net.idle(y)


def loud(module):
    """Results of which many are above 6."""
    module.weight.data *= 20
    return module


def inverted(net, x):
    x = F.relu6(net.wide(x))
    return net.narrow(net.clip(net.deep(x))) + net.narrow(x)


def dense(net, x):
    y = net.conv(F.relu(net.norm(x)))
    z = net.conv2(torch.relu(net.norm2(torch.cat([x, y], 1))))
    return F.avg_pool2d(net.transition(torch.cat([x, y, z], 1)), 2)


def added_to_others(net, x):
    """Sums of values whose gains no weight has aligned: joined ones, an average, and a value with itself."""
    joined = torch.cat([net.one_half(x), net.other_half(x)], 1)
    return torch.add(F.adaptive_avg_pool2d(joined + x, 3), net.strided(x)) + net.strided(F.relu(x + x))


def pooled_beside(net, x):
    """A pooling whose output is as large as its input, which is read again."""
    return F.max_pool2d(x, 5, 1, 2) + x


SMALL = {
    "residual blocks": lambda: Written(
        residual, norm=nn.BatchNorm2d(8), norm2=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 8, 3, padding=1),
        joining=nn.Conv2d(16, 8, 1, bias=False),
    ),
    "written in place": lambda: Written(
        overwritten, conv=nn.Conv2d(8, 8, 3, padding=1), idle=nn.Sequential(nn.Identity(), StochasticDepth(0.5, "row"))
    ),
    "groups, by channel, and ReLU6": lambda: Written(
        inverted, wide=loud(nn.Conv2d(8, 16, 1, groups=2)), clip=nn.ReLU6(inplace=True), narrow=nn.Conv2d(16, 8, 1),
        deep=loud(nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16)),
    ),
    "dense blocks": lambda: Written(
        dense, norm=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 4, 3, padding=1), norm2=nn.BatchNorm2d(12),
        conv2=nn.Conv2d(12, 4, 1), transition=nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)),
    ),
    "sums of what has other gains": lambda: Written(
        added_to_others, strided=nn.Conv2d(8, 8, 3, stride=3), one_half=nn.Conv2d(8, 4, 1),
        other_half=nn.Conv2d(8, 4, 1),
    ),
    "pooling beside what it pools": lambda: Written(pooled_beside),
}  # fmt: skip


def small(name):
    return seeded(lambda: like_trained(SMALL[name](), images((3, 18, 18), 16, seed=2)))


@pytest.mark.parametrize("name", SMALL)
def test_a_network_s_private_logits_are_the_plain_ones(name):
    net, x = small(name), images((3, 18, 18))
    wanted = net(x).detach().numpy()
    got, plain = private_and_plain(net, x, images((3, 18, 18), 8, seed=1))
    assert np.array_equal(plain, wanted)  # compiling changes nothing in the network
    assert error(got, wanted) < 1.5e-3


def kinds(plan):
    return [type(layer).__name__ for layer in plan.layers]


def test_what_is_no_work_of_its_own_takes_no_message():
    x = images((3, 18, 18))
    found = kinds(compile_model(small("residual blocks"), 18, x)[0])
    assert found[:4] == ["Convolution", "MaxPool", "ReLU", "Convolution"]
    assert found.count("Sum") == 2 and found.count("Convolution") == 5 and "Truncate" not in found[:6]
    gained = compile_model(small("sums of what has other gains"), 18, x)[0]
    assert sum(layer.name.endswith("(gains)") for layer in gained.layers) > 0


def test_hidden_gains_of_residual_blocks_leave_only_exponents_in_the_plan():
    """A network whose hidden values are three times as large, and whose sums are, has the same public plan."""
    net, x = small("residual blocks"), images((3, 18, 18))
    plan = compile_model(net, 18, x)[0]
    for module in (net.norm, net.norm2):
        module.weight.data *= 3
        module.bias.data *= 3
    net.norm2.running_mean *= 3  # of what is now three times as large
    net.norm2.running_var.mul_(9).add_(8 * net.norm2.eps)
    net.conv.bias.data *= 3
    louder = compile_model(net, 18, x)[0]
    assert plan.layers[:-1] == louder.layers[:-1] and plan.layers[-1].scale != louder.layers[-1].scale


#: The largest error of a logit, as a share of the logits' range.
ALLOWED = 1e-3


def pictures(count, size, seed):
    """Colours that run into one another, coarse and fine."""
    generator, shape = torch.Generator().manual_seed(seed), (size, size)
    layers = [torch.rand(count, 3, n, n, generator=generator) for n in (2, 4, 8, 16)]
    return sum(F.interpolate(one, shape, mode="bilinear") for one in layers) / 2 - 1


def published(name, size):
    """One of torchvision's networks with 1,000 classes, pictures that set its scales, and others."""
    net = seeded(lambda: like_trained(models.get_model(name, weights=None, num_classes=1000), pictures(64, size, 1)))
    return net, pictures(24, size, 2), pictures(3, size, 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_s_networks_of_a_thousand_classes(name, monkeypatch):
    """Scores, and the class alone; most weights are rounded one by one, which saves time and loses a bit."""
    monkeypatch.setattr(quantise, "MOST_TOGETHER", 64)
    net, calibration, x = published(name, 64)
    plain, answers = net(x).detach().numpy(), {}
    for answer in ("scores", "grade"):
        with Rehearsal(*compile_model(net, 64, calibration, answer=answer), seed=1) as session:  # or roundings vary
            answers[answer] = np.array([session.infer(picture) for picture in x.numpy()])
    assert answers["scores"].shape == (3, 1000) and error(answers["scores"], plain) < ALLOWED
    assert np.array_equal(answers["scores"].argmax(1), plain.argmax(1))
    assert np.array_equal(answers["grade"][:, 0], plain.argmax(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vgg11"])
def test_larger_networks(name, monkeypatch):
    monkeypatch.setattr(quantise, "MOST_TOGETHER", 64)
    net, calibration, x = published(name, 64)
    plain, (plan, weights) = net(x).detach().numpy(), compile_model(net, 64, calibration)
    found = [evaluate(plan, weights, picture) for picture in x.numpy()]
    got = np.array([logits for logits, _ in found])
    print(f"{name}: error {error(got, plain):.1e}, {plan.costs()}")
    assert error(got, plain) < ALLOWED and np.array_equal(got.argmax(1), plain.argmax(1))
    assert max(max(room.values()) for _, room in found) < 0.9


@pytest.mark.parametrize("name", TABLE_MODELS)
def test_the_models_of_a_table_s_rows(name):
    """A row of 29 numbers, of norm 1 at most, is an image of 29 channels and one pixel."""
    torch.manual_seed(3)
    model = TABLE_MODELS[name](29, 2)
    nn.init.normal_(model.weight if name == "linear" else model[2].weight)
    rows = F.normalize(torch.randn(40, 29))[:, :, None, None] * torch.rand(40, 1, 1, 1)
    net = nn.Sequential(nn.Flatten(), model)
    got, wanted = private_and_plain(net, rows[:5], rows[5:])
    assert error(got, wanted) < 1e-3 and np.array_equal(got.argmax(1), wanted.argmax(1))
    plan, weights = compile_model(net, 1, rows[5:], answer="grade")
    with Rehearsal(plan, weights) as session:
        assert [int(session.infer(row)[0]) for row in rows[:5].numpy()] == wanted.argmax(1).tolist()


# refusals


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("efficientnet_b0", ("layer 'features.1.0.block.1.mul'", "squeeze-and-excitation", "such as resnet50")),
        ("convnext_tiny", ("layer 'features.0.1.permute'", "'permute' cannot be evaluated")),
        ("vit_b_32", ("cannot be",)),
    ],
)
def test_a_network_of_torchvision_s_that_is_refused(name, said, refuses):
    with torch.device("meta"):
        net = models.get_model(name, weights=None)
    with refuses(*said):
        compile_model(net, 224, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("written", "modules", "said"),
    [
        (lambda net, x: net.norm(x), {"norm": nn.GroupNorm(2, 8)}, ("layer 'norm' (GroupNorm)", "spread of secret")),
        (lambda net, x: x * torch.relu(x), {}, ("layer 'mul'", "a product of two secret values")),
        (lambda net, x: x if x.sum() > 0 else -x, {}, ("cannot be followed",)),
        (lambda net, x: x + 1, {}, ("layer 'add'", "'add' cannot be evaluated")),
        (lambda net, x: torch.sin(x), {}, ("layer 'sin'", "'sin' cannot be evaluated")),
        (lambda net, x: torch.cat([x, x], 2), {}, ("layer 'cat'", "cannot be evaluated")),
        (lambda net, x: x + net.pool(x), {"pool": nn.MaxPool2d(2)}, ("layer 'add'", "equal size")),
        (lambda net, x: torch.cat([x, net.pool(x)], 1), {"pool": nn.MaxPool2d(2)}, ("layer 'cat'", "must match")),
        (lambda net, x: net.act(x), {"act": nn.SiLU()}, ("layer 'act' (SiLU)", "neither", "use a network with ReLU")),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(written, modules, said, refuses):
    with refuses(*said):
        compile_model(Written(written, **modules), 18, images((3, 18, 18)))


def test_relu6_of_values_far_below_six():
    """Six, as a ring element, left the ring where what arrives is small, as in a network that was never trained."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 16 * 16, 3))
    x = images((3, 18, 18))
    with torch.no_grad():
        net[0].weight *= 1e-2
    plan, weights = compile_model(net, 18, x)
    assert weights.biases[1].max() <= 2**30
    with torch.inference_mode():
        wanted = net(x[:1])[0].numpy()
    with Rehearsal(plan, weights) as session:
        assert error(session.infer(x[0].numpy()), wanted) < 5e-3
        assert not session.patient.exceeded


def test_the_page_s_table_of_layers_is_the_code_s():
    text = (ROOT / "notebooks" / "pages" / "own_network.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (exact|refused)[^|]*\| ([^|]+) \|", text, re.M)
    named = {kind: {name for how, names in rows if how == kind for name in re.findall(r"`(\w+)`", names)}
             for kind in ("exact", "refused")}  # fmt: skip
    known = {kind for layer in LAYERS for kind in layer.torch_layers} - {"Add", "Join"}
    assert known | {"BatchNorm2d", "BatchNorm1d", "Flatten", "Dropout", "Identity"} == named["exact"]
    assert set(REFUSED) == named["refused"]


# weights that reproduce did not write


def five(classes):
    """What ``test_inference_graph:five`` names on a command line."""
    net = Written(lambda net, x: F.relu(net.norm(x)), norm=nn.BatchNorm2d(8))
    net.last = nn.Linear(8, classes)
    return net


@pytest.fixture
def weights_of(tmp_path):
    def write(net, name="net.pth"):
        torch.save(net.state_dict(), tmp_path / name)
        return tmp_path / name

    return write


def test_published_weights_are_served_under_imagenet_s_names(weights_of, monkeypatch):
    monkeypatch.setattr(quantise, "MOST_TOGETHER", 64)
    net = like_trained(models.resnet18(num_classes=1000), pictures(16, 32, 1))
    plan, weights, grades = load(weights_of(net), model="resnet18", size=32)
    assert len(grades) == 1000 and grades[0] == "tench" and plan.mean == IMAGENET[0]
    x = pictures(1, 32, 3)
    with torch.inference_mode():
        assert error(evaluate(plan, weights, x[0].numpy())[0], net(x)[0].numpy()) < 5e-3
    assert load(weights_of(five(5)), model=f"{__name__}:five", size=32)[2] == [f"class {i}" for i in range(5)]
    one = models.resnet18(num_classes=3)
    assert load(weights_of(one), model="resnet18", size=32, answer="grade")[2] == ["class 0", "class 1", "class 2"]


def test_weights_that_are_not_the_network_s_are_refused(weights_of, refuses):
    net = models.resnet18(num_classes=3)
    for model, said in (
        ("resnet34", ("do not fit resnet34", "layer1.2.conv1.weight")),
        ("vgg11", ("have no 'classifier.6.bias'", "vgg11")),
        ("squeezenet", ("the kit's own", "--weights alone")),
        ("nosuch", ("'nosuch' is unknown",)),
    ):
        with refuses(*said):
            load(weights_of(net), model=model, size=32)
    file = weights_of(net).with_name("net.safetensors")
    for said, metadata in (
        (("preprocessing must be a JSON object",), {"preprocessing": "[1]"}),
        (("grades a list of 3 names",), {"grades": "7"}),
        (("grades a list of 3 names",), {"grades": '["a"]'}),
        (("std [0, 0, 0]",), {"preprocessing": '{"std": [0, 0, 0]}'}),
    ):
        save_file(net.state_dict(), file, metadata)
        with refuses(*said):
            load(file, model="resnet18", size=32)
    net.bn1.weight.data[0] = float("inf")
    with refuses("not finite"):
        load(weights_of(net), model="resnet18", size=32)


def test_a_plan_cannot_make_a_party_hold_more_than_was_counted(refuses):
    """A sum of one value 300 times, which had been held 300 times; windows whose common multiple took seconds."""
    value = np.ones((1, 256, 512), np.uint64)
    many = Sum("sum", (0,) * 300, value.shape, 1.0, shifts=(1,) * 300)
    tracemalloc.start()
    assert many.plain([value] * 300, None).max() == 600
    assert tracemalloc.get_traced_memory()[1] < 4 * value.nbytes
    tracemalloc.stop()
    growing = tuple((0, i) for i in range(1, 801))
    pool = AveragePool("pool", (0,), (1, 800, 800), 1.0, growing, growing)
    with refuses("no common multiple below"):
        pool.output_shape((1, 800, 800))


def test_of_a_thousand_classes_five_are_printed(capsys):
    odds, classes = np.arange(1000) / 999 / 500, [f"class {i}" for i in range(1000)]
    amounts = dict.fromkeys(("online_sent", "online_received", "offline_to_provider", "offline_to_patient"), 0)
    answer = {"grades": classes, "probabilities": odds.tolist(), "grade": "class 999", "bytes": amounts, "rounds": 1}
    answer |= {"seconds_online": 1, "seconds_offline": 1, "called": {}}
    print_answers([("eye.png", answer | {"exceeded": False})], 1.0, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("class 999") and lines[0].endswith("<")
    print_answers([("eye.png", answer | {"exceeded": True})], 1.0, as_json=False)
    assert "the answer may be wrong" in capsys.readouterr().out.splitlines()[5]
    screened = {"called": {"referable": True, "sight_threatening": False}, "severity": 500.0, "exceeded": False}
    screened |= {"thresholds": {"referable": 400.0, "sight_threatening": 600.0}, "together": 2}
    print_answers([("eye.png", answer | screened)], 1.0, as_json=False)
    said = "severity 500.00, of 999 at most: referable (threshold 400.00), not sight-threatening (threshold 600.00)"
    assert capsys.readouterr().out.splitlines()[5] == said
    print_answers([("eye.png", answer | screened)] * 2, 1.0, as_json=False)
    assert capsys.readouterr().out.startswith("eye.png: class 999, 0.2 %, referable, not sight-threatening\n")


@pytest.mark.slow
def test_three_processes_answer_with_a_network_of_torchvision_s(weights_of, tmp_path):
    net = like_trained(models.resnet18(num_classes=5), pictures(16, 32, 1))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "x.png")
    with Workers(weights_of(net), model="resnet18", size=32, quiet=True) as workers:
        answer = workers.infer(tmp_path / "x.png")
    with torch.inference_mode():
        wanted = net(to_input(image[None], *IMAGENET))[0].numpy()
    assert answer["grades"] == [f"class {i}" for i in range(5)]
    assert error(np.array(answer["logits"]), wanted) < 5e-3 and answer["grade"] == f"class {wanted.argmax()}"
