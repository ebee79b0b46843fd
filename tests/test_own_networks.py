"""Networks of torchvision's and of one's own: batch normalisation replaced, clipped sums, a whole run, a backbone."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_clipping import clipped_sums_by_loop
from safetensors.torch import save_file
from torch import nn

from dopamine_lib.__main__ import main
from dopamine_lib.benchmarks import dp
from dopamine_lib.federation import settings
from dopamine_lib.federation.options import Options
from dopamine_lib.models.architectures import make, without_batch_statistics
from dopamine_lib.models.checkpoints import load_model
from dopamine_lib.models.networks import build, parameter_count, replaced_layers
from dopamine_lib.models.weights import load_backbone, load_weights
from dopamine_lib.privacy.dpsgd import Task
from dopamine_lib.report.verification import read_results, verify

PAGE = (Path(__file__).parents[1] / "notebooks" / "pages" / "own_network.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, pixels",
    [
        pytest.param("resnet18", 32, marks=pytest.mark.slow),
        ("mobilenet_v3_small", 32),
        pytest.param("efficientnet_b0", 32, marks=pytest.mark.slow),
        pytest.param("densenet121", 32, marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x0_5", 32, marks=pytest.mark.slow),
    ],
)
def test_torchvisions_networks_equal_the_loop(name, pixels):
    net = build(name, 3, None, 0).double()
    x = torch.randn(3, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).double()
    y, group = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 0])
    task = Task(net, lambda index: x[index], y)
    own = task.clipped_sums(task.start, torch.arange(3), 0.05, group, 3)
    loop = clipped_sums_by_loop(net, x, y, 0.05, group, 3)
    assert torch.allclose(own.to(loop), loop, atol=1e-10, rtol=0)
    assert own[0].norm() > 0.01 and len(task._keeper.layers) > 10  # layer by layer, not the whole net at once


def test_batch_normalisation_becomes_group_normalisation_with_its_weights():
    net = nn.Sequential(
        nn.Conv2d(3, 30, 3), nn.BatchNorm2d(30, eps=1e-3), nn.Sequential(nn.BatchNorm2d(30, affine=False)), nn.Flatten()
    )
    nn.init.normal_(net[1].weight)
    weight = net[1].weight
    assert without_batch_statistics(net) == ("1", "2.0")
    assert net[1].weight is weight and net[1].eps == 1e-3 and net[1].num_groups == 6
    assert not net[2][0].affine
    assert without_batch_statistics(net) == ()


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 24, 40, 72, 88, 960, 1280])
def test_a_group_has_enough_channels_for_a_map_of_one_position(channels):
    """One channel at one position would be normalised to nothing."""
    net = nn.Sequential(nn.BatchNorm2d(channels))
    without_batch_statistics(net)
    assert channels % net[0].num_groups == 0 and (channels // net[0].num_groups >= 4 or net[0].num_groups == 1)


def test_replaced_layers_and_parameters_are_counted_without_drawing_any():
    before = torch.random.get_rng_state()
    assert len(replaced_layers("resnet18", 5)) == 20 and parameter_count("resnet18", 7) == 11_180_103
    assert torch.equal(before, torch.random.get_rng_state())


OWN = """
import functools

import torch
from torch import nn

def net(classes, channels, size):
    torch.rand(3)
    return nn.Sequential(nn.Conv2d(channels, 8, size), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes))

def frozen(classes):
    return net(classes, 3, 8).requires_grad_(False)

def text(classes):
    return "a network"

def seven(classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))

def lazy(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def kept(classes):
    layer = nn.utils.weight_norm(nn.Linear(4, classes))
    return nn.Sequential(nn.Flatten(), layer)

@functools.cache
def always(classes):
    return net(classes, 3, 8)

def fails(classes):
    raise OSError("no such disk\\nat all")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_told_what_it_asks_for_and_draws_from_the_seed(own_module):
    before = torch.random.get_rng_state()
    one, same, other = (build("nets_of_a_test:net", 5, None, seed, size=8) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    assert one(torch.zeros(2, 3, 8, 8)).shape == (2, 5) and isinstance(one[1], nn.GroupNorm)
    assert parameter_count("nets_of_a_test:net", 5, size=8) == sum(p.numel() for p in one.parameters())


@pytest.mark.parametrize(
    "model, said",
    [
        ("nowhere_to_be_found:net", ("nowhere_to_be_found", "PYTHONPATH")),
        ("nets_of_a_test:none", ("'none'",)),
        ("nets_of_a_test:text", ("returned str", "Module")),
        ("nets_of_a_test:fails", ("no such disk",)),
        ("nets_of_a_test:frozen", ("are trained", "buffer")),
        ("nets_of_a_test:lazy", ("nn.LazyLinear", "number of inputs")),
        pytest.param(
            "nets_of_a_test:kept", ("cannot be copied",), marks=pytest.mark.filterwarnings("ignore:.*weight_norm")
        ),
    ],
)
def test_a_function_that_gives_no_network_is_refused(own_module, refuses, model, said):
    with refuses(*said):
        make(model, 5)


def test_a_function_that_returns_the_same_network_again_starts_anew(own_module):
    first = build("nets_of_a_test:always", 5, None, 0)
    start = first[3].weight.detach().clone()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert torch.equal(build("nets_of_a_test:always", 5, None, 1)[3].weight, start)
    assert replaced_layers("nets_of_a_test:always", 5) == ("1",)  # not only the first time


@pytest.mark.parametrize("source", [None, "random"])
def test_the_start_of_a_function_is_whatever_it_makes(source):
    assert load_weights(source, "nets:pretrained").source == "as nets:pretrained makes it"
    assert load_weights(source, "cnn").source == "random start"


def test_an_unknown_name_is_refused_before_anything_is_read(refuses):
    with refuses("model 'resnet81'", "resnet18", "module:function"):
        Options(model="resnet81")


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("model, shape", [("inception_v3", (3, 28, 28)), ("nets_of_a_test:net", (29,))])
def test_images_that_a_network_cannot_take_are_refused_in_every_setting(own_module, refuses, model, shape, clip):
    task = Task(build(model, 5, None, 0, size=8), lambda index: torch.zeros(len(index), *shape), torch.zeros(2).long())
    with refuses("does not take", str(shape)):
        task.clipped_sums(task.start, torch.arange(2), clip)
    with refuses("does not take", str(shape)):
        task.logits(task.start, torch.arange(2))


@pytest.fixture
def short(monkeypatch):
    """FSCDP in 100 rounds."""
    monkeypatch.setitem(settings.SETTINGS, "FSCDP", replace(settings.SETTINGS["FSCDP"], rounds=100))


def run(make_aptos, tmp_path, *more):
    folder, out = make_aptos(tmp_path / "data"), tmp_path / "out"
    words = (
        "--data",
        "aptos",
        "--data-dir",
        str(folder),
        "--size",
        "16",
        "--hospitals",
        "2",
        "--runs",
        "1",
        "--seed",
        "0",
    )
    main(["reproduce", *words, "--patients", "60", "--settings", "FSCDP", "--out", str(out), *more])
    return read_results(out)


def test_the_page_s_network_is_trained_and_told_of(make_aptos, tmp_path, monkeypatch, short, refuses):
    """The page's worked example, whole: its file, and its option."""
    source, option = re.search(r"```python\n# mynets\.py\n(.*?)```.*?--model (mynets:\w+)", PAGE, re.DOTALL).groups()
    (tmp_path / "mynets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    results, folder = run(make_aptos, tmp_path, "--model", option)
    assert results["parameters"] == parameter_count(option, 5) and results["group_norm_for_batch_norm"]
    assert "group normalisation in" in results["settings"]["FSCDP"]["statement"]
    assert verify(results, folder)["FSCDP"].bound is not None
    with refuses("mynets", "runs no code"):
        load_model(folder / "FSCDP-0.safetensors")
    main(["report", str(folder), "--model", option])
    assert "Severe" in (folder / "report.md").read_text()
    monkeypatch.setattr("dopamine_lib.models.architectures._own", lambda *_: pytest.fail("a report ran foreign code"))
    main(["report", str(folder)])
    assert f"--model {option}" in (folder / "report.md").read_text()


def test_a_head_on_another_backbone_is_trained_saved_and_read(make_aptos, tmp_path, short, refuses):
    torch.manual_seed(0)
    published = make_published("resnet18")
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    backbone = f"resnet18:{tmp_path / 'w.safetensors'}"
    results, folder = run(make_aptos, tmp_path, "--backbone", backbone)
    assert results["parameters"] == 513 * 5 and verify(results, folder)["FSCDP"].bound is not None
    assert "resnet18" in results["weights"]
    net, metadata = load_model(folder / "FSCDP-0.safetensors", tmp_path / "w.safetensors")
    assert metadata["backbone"] == "resnet18"
    published.fc = nn.Identity()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(net[0](x), published(x), atol=1e-5)  # batch normalisation with its own statistics
    with refuses("resnet18", "--backbone"):
        load_model(folder / "FSCDP-0.safetensors")


def test_another_number_of_scores_than_grades_is_refused_before_training(
    own_module, make_aptos, tmp_path, capsys, refuses
):
    with refuses("does not exist"):  # no results
        run(make_aptos, tmp_path, "--model", "nets_of_a_test:seven")
    error = capsys.readouterr().err
    assert "returns (3, 7)" in error and "(3, 5)" in error and "Traceback" not in error


def test_another_number_of_scores_is_refused_before_it_is_measured(own_module, refuses):
    with refuses("returns (3, 7)", "(3, 5)"):
        dp.run(model="nets_of_a_test:seven", size=8, repeats=1)


def make_published(name):
    from torchvision import models

    net = models.get_model(name, weights=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_weights_of_any_network_are_read_from_a_file(tmp_path, suffix):
    state = make_published("resnet18").state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    elif suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        save_file(state, path)
    net = build("resnet18", 5, load_weights(path, "resnet18"), 0)
    assert torch.equal(net.bn1.weight, state["bn1.weight"]) and isinstance(net.bn1, nn.GroupNorm)
    assert torch.equal(net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert load_backbone(f"resnet18:{path}").features == 512


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layer1.0.bn1.running_mean": None}, "has no 'layer1.0.bn1.running_mean'"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, "has shape (64, 3, 3, 3)"),
        ({"bn1.running_var": torch.full((64,), float("nan"))}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_a_backbone_are_refused(tmp_path, refuses, change, said):
    state = {
        key: value for key, value in (make_published("resnet18").state_dict() | change).items() if value is not None
    }
    save_file(state, tmp_path / "w.safetensors")
    with refuses("w.safetensors", said):
        load_backbone(f"resnet18:{tmp_path / 'w.safetensors'}")


@pytest.mark.parametrize(
    "backbone, said",
    [
        ("resnet18", "names no weights"),
        ("resnet81:w.pth", "not one of torchvision's"),
        ("squeezenet1_0:w.pth", "linear layer"),
        ("resnet18:none.pth", "does not exist"),
        ("resnet18:imagenet", "download"),
    ],
)
def test_other_backbones_are_refused(tmp_path, refuses, monkeypatch, backbone, said):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with refuses(said):
        load_backbone(backbone)


def test_a_backbone_is_for_the_head(refuses):
    for options in ({"model": "cnn"}, {"weights": "random"}):
        with refuses("backbone", "head"):
            Options(backbone="resnet18:w.pth", **options)
