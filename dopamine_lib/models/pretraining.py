"""The embedded weights: SqueezeNet-1.1 trained without privacy on public synthetic patients.

No checkpoint may be downloaded in a test and none from elsewhere is shipped, so the kit makes its own. The
public population has other seeds and other cameras than the private one: no private patient is used here.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dopamine_lib.data.synthetic import describe, make_population
from dopamine_lib.errors import InputError
from dopamine_lib.machine import find_device, place_for
from dopamine_lib.models.features import normalise_features
from dopamine_lib.models.networks import FEATURES, HALF, squeezenet, to_input
from dopamine_lib.progress import progress_bar

PATIENTS, HELD_OUT, SIZE = 25_000, 1000, 64
EPOCHS, BATCH, PEAK_RATE, SCALE = 12, 64, 1e-3, 10.0


def pretrain(out: str | Path, *, seed: int = 0, device: str = "cpu") -> float:
    """Train on 25,000 public patients and write the features in half precision to ``out``.

    out  a .safetensors file with torchvision's keys ``features.*`` (722,496 parameters, 1.4 MB); its metadata
         names architecture, preprocessing, population and command
    device  as ``machine.find_device`` names it
    Returns the accuracy on public patients held out. Raises InputError for another suffix, or a place for none.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} ends in '{out.suffix}'; the weights are written as .safetensors")
    with place_for(out, "--out") as temporary:
        state, accuracy = _trained(seed, device)
        metadata = {
            "architecture": "squeezenet1_1",
            "preprocessing": "rgb / 255, mean 0.5, std 0.5",
            "size": str(SIZE),
            "population": f"{PATIENTS} public synthetic patients, seed {seed}",
            "made_by": "python -m dopamine_lib pretrain",
        }
        save_file(state, temporary, metadata)
    return accuracy


def _trained(seed: int, device: str) -> tuple[dict[str, torch.Tensor], float]:
    """The features in half precision, and their accuracy on patients held out."""
    images, _, _ = make_population(PATIENTS + HELD_OUT, SIZE, seed, "public")
    # the severity that was drawn, not one grader's opinion: as if a panel had graded the public images
    labels = torch.from_numpy(describe(PATIENTS + HELD_OUT, seed, "public")[1])
    # on processors with bfloat16 units this halves the time of a step; on others it would slow the step down
    place = find_device(device)
    half = place.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    torch.manual_seed(seed)
    # trained as it is used, under a linear layer on averaged, normalised features: SqueezeNet's own classifier
    # ends in a ReLU, and once that is dead for all classes, training stops
    features = squeezenet(5).features.to(place, memory_format=torch.channels_last)
    linear = nn.Linear(FEATURES, 5).to(place)

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        return linear(SCALE * normalise_features(features(x).float().mean((2, 3))))

    parameters = [*features.parameters(), *linear.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3)
    steps = PATIENTS // BATCH * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.15)
    bar = progress_bar(title="pretrain", unit="step", total=steps)
    for _ in range(EPOCHS):
        for index in torch.randperm(PATIENTS)[: PATIENTS // BATCH * BATCH].split(BATCH):
            x = _turned(to_input(images[index.numpy()], *HALF).to(place))
            with torch.autocast(place.type, torch.bfloat16, enabled=half):
                logits = logits_of(x)
            loss = F.cross_entropy(logits, labels[index].to(place))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    state = {f"features.{key}": value.half().contiguous() for key, value in features.state_dict().items()}
    with torch.inference_mode():
        held_out = torch.arange(PATIENTS, PATIENTS + HELD_OUT)
        right = [
            logits_of(to_input(images[part.numpy()], *HALF).to(place)).argmax(1).cpu() == labels[part]
            for part in held_out.split(200)
        ]
    return state, float(torch.cat(right).float().mean())


def _turned(x: torch.Tensor) -> torch.Tensor:
    """The batch turned by a random multiple of 90 degrees and perhaps mirrored: a lesion counts wherever it is."""
    x = torch.rot90(x, int(torch.randint(4, ())), (2, 3))
    return x.flip(3) if torch.randint(2, ()) else x
