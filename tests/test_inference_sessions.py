"""Plans and sessions of private inference: what is refused, what ends a session, what is never used twice."""

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dopamine_lib.inference.network.compiler import compile_model
from dopamine_lib.inference.network.crypto_provider import CryptoProvider
from dopamine_lib.inference.network.parties import Patient, Provider
from dopamine_lib.inference.network.plan import MOST_BYTES, Plan
from dopamine_lib.inference.network.rehearsal import Rehearsal, at_once
from dopamine_lib.inference.protocols.channel import ChannelError, local_pair
from dopamine_lib.models.networks import HALF, squeezenet, to_input

IMAGE = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    pooled = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4)
    return compile_model(nn.Sequential(*pooled), 8, torch.from_numpy(IMAGE)[None], *HALF)


def test_a_plan_survives_its_text(small):
    plan, weights = small
    assert Plan.from_json(plan.to_json()) == plan and Plan.from_json(plan.to_json()).digest() == plan.digest()
    assert "array" not in repr(weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(steps=[]),
        lambda plan: plan["steps"][0].update(kind="os.system"),
        lambda plan: plan["steps"][0].update(shape=[6, 8, 9]),
        lambda plan: plan["steps"][0].update(sources=[3]),
        lambda plan: plan["steps"][0].update(scale=-1.0),
        lambda plan: plan["steps"][1].update(shift=40),
        lambda plan: plan["steps"][0]["branches"][0].update(stride=[0, 1]),
        lambda plan: plan["steps"][0]["branches"][0].update(groups=2),
        lambda plan: plan["steps"][0]["branches"][0].update(groups=0),
        lambda plan: plan["steps"].append(layer("Sum", plan["steps"][-1]["shape"], len(plan["steps"]), shifts=[1, 1])),
        lambda plan: plan["steps"].append(layer("Sum", [3, 8, 8], 0, shifts=[-1])),
        lambda plan: plan.update(shape=[3, 8000, 8000]),
        lambda plan: plan.update(shape=[3, 8.0, 8.0]),
        lambda plan: plan["steps"][0].update(sources=[0.0]),
        lambda plan: plan.update(std=[1, 1, 0]),
        lambda plan: plan.pop("mean"),
    ],
)
def test_a_damaged_plan_is_refused(small, change, refuses):
    record = json.loads(small[0].to_json())
    change(record)
    with refuses():
        Plan.from_json(json.dumps(record))


def layer(kind, shape, source=0, **fields):
    return {"kind": kind, "name": kind, "sources": [source], "shape": shape, "scale": 1.0} | fields


def convolution(shape, kernel, padding=0):
    branch = {"channels": shape[0], "kernel": kernel, "stride": [1, 1], "padding": [padding, padding]}
    return layer("Convolution", shape, flat=False, branches=[branch])


WINDOWS = [[0, 2**12]] * 2**12


@pytest.mark.parametrize(
    ("shape", "layers", "said"),
    [
        ([1, 1024, 1024], [convolution([2**25, 1, 1], [1024, 1024])], "bytes of memory"),  # 128 TiB of masked weights
        ([1, 512, 512], [convolution([2**13, 1, 1], [512, 512])], "bytes of memory"),
        (
            [1, 1, 2**20],
            [layer("MaxPool", [1, 1, 1], kernel=[1, 2**20], stride=[1, 1], padding=[0, 0], ceil=False)],
            "both together",
        ),
        ([1, 8, 8], [layer("MaxPool", [1, 1, 1], kernel=[9, 9], stride=[9, 9], padding=[5, 5], ceil=False)], "padding"),
        ([1, 4096, 8192], [layer("ReLU", [1, 4096, 8192], i, shift=0) for i in range(50)], "bytes of memory"),
        ([1, 4096, 8192], [layer("Raise", [1, 4096, 8192], i, shift=0) for i in range(4000)], "bytes of memory"),
        ([64, 512, 512], [convolution([64, 512, 512], [127, 127], 63)], "unfolds"),
        ([1, 4096, 4096], [convolution([1, 4096, 4096], [33, 33], 16)], "unfolds"),  # 64 GB of scratch
        ([2**15, 32, 32], [convolution([1, 77, 77], [45, 45], 44)], "unfolds"),  # the padding alone is 2 GB
        ([2048, 128, 128], [convolution([2048, 128, 128], [1, 1])], "multiplications"),
        (
            [1, 4096, 8192],
            [layer("Sum", [1, 4096, 8192], shifts=[0] * 600) | {"sources": [0] * 600}],
            "multiplications",
        ),
        ([1, 4096, 4096], [layer("AveragePool", [1, 4096, 4096], rows=WINDOWS, columns=WINDOWS)], "multiplications"),
    ],
)
def test_a_plan_that_would_cost_too_much_is_refused_before_anything_is_allocated(shape, layers, said, refuses):
    channels = shape[0] * [0.5]
    record = {"shape": shape, "scale": 256.0, "mean": channels, "std": channels, "noise_bits": 3, "steps": layers}
    text = json.dumps(record)
    tracemalloc.start()
    try:
        with refuses(said):
            Plan.from_json(text)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_squeezenet_at_the_largest_size_is_not_too_much():
    plan, _ = compile_model(squeezenet(5), 224, torch.rand(1, 3, 224, 224))
    assert max(plan.held()) * (1024 / 224) ** 2 < 0.9 * MOST_BYTES


def test_pixels_out_of_range_are_refused_and_cost_no_randomness(small, refuses):
    plan, weights = small
    x = IMAGE
    with Rehearsal(plan, weights) as session:
        session.prepare()
        for value in (1.1, -1.1, np.nan, np.inf):
            bad = x.copy()
            bad[0, 0, 0] = value
            with refuses("outside [0, 1]"):
                session.patient.infer(bad)
        with refuses("needs (3, 8, 8)"):
            session.patient.infer(x[:, :7])
        assert session.patient.ready == 1
        session.online(x)
        assert session.patient.ready == session.provider.ready == 0


def test_pictures_are_normalised_as_in_training(small, refuses):
    plan, _ = small
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.allclose(plan.to_input(picture), to_input(picture[None], *HALF)[0].numpy(), atol=1e-6)
    with refuses("resize it"):
        plan.to_input(picture[:7])


# sessions


def test_queries_run_ahead_and_randomness_is_used_once(small):
    plan, weights = small
    x = IMAGE
    with Rehearsal(plan, weights) as session:
        for _ in range(3):
            session.prepare()
        answers = [session.online(x) for _ in range(3)]
        assert np.ptp(answers, axis=0).max() < 1e-2
        with pytest.raises(ChannelError, match="prepare first"):
            session.patient.infer(x)
        sent = [data for direction, tag, data in session.patient_end.log if direction == "sent" and tag == 0]
        assert len(set(sent)) == 3  # one image, three masks


def test_after_an_error_a_session_is_over(small):
    plan, weights = small
    x = IMAGE
    with Rehearsal(plan, weights) as session:
        session.prepare()
        session.prepare()
        session.provider._begin(1)  # the provider lost a query: the two are out of step
        with pytest.raises(ChannelError, match="out of step|closed the connection"):
            session.online(x)
        for again in (session.provider.serve, lambda: session.patient.infer(x)):
            with pytest.raises(ChannelError, match="is over"):
                again()


def test_two_plans_do_not_mix(small):
    plan, weights = small
    other = replace(plan, mean=(0.4,) * 3)
    one, two = local_pair()
    with pytest.raises(ChannelError, match="another plan|closed the connection|broke"):
        at_once(Patient(other, bytes(16), one).setup, Provider(plan, weights, bytes(16), two).setup)


def test_sessions_never_share_randomness(small):
    plan, _ = small
    crypto_providers = [CryptoProvider(plan) for _ in range(3)]
    seeds = {seed for one in crypto_providers for seed in (one.patient_seed, one.provider_seed)}
    first = [b"".join(c.tobytes() for _, c in crypto_providers[0].deal()) for _ in range(2)]
    assert len(seeds) == 6 and first[0] != first[1]


def test_the_crypto_provider_does_without_torch(small):
    code = (
        "import sys; from dopamine_lib.inference.network import crypto_provider as c, plan; "
        "list(c.CryptoProvider(plan.Plan.from_json(sys.stdin.read())).deal()); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=small[0].to_json(),
        env=os.environ | {"DOPAMINE_KERNELS": "numpy"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "False\n", done.stderr
