"""The privacy statement: what a bound says, to whom it applies, and what it leaves out.

A figure for epsilon means nothing without its unit, its neighbours, its sampler and its adversary.
"""

import math

from dopamine_lib.federation.settings import Choice, Setting
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon, epsilons


def adversaries(setting: Setting, steps: int, hospitals: int, delta: float) -> dict[str, dict[str, float] | None]:
    """Epsilon by three accountants against an outsider, the server, and one curious hospital.

    steps  noisy steps that touched the patient's hospital. None where the party holds the data anyway.
    Under shared noise a curious hospital subtracts its own share: sigma sqrt((K - 1) / K) is left.
    """
    bound = epsilons(SampledGaussian(setting.noise_multiplier, setting.sample_rate, steps), delta)
    if not setting.federated:
        return {"outsider": bound, "server": None, "hospital": bound}
    if not setting.shared_noise:
        return {"outsider": bound, "server": bound, "hospital": bound}
    if hospitals == 1:
        return {"outsider": bound, "server": bound, "hospital": None}
    left = setting.noise_multiplier * math.sqrt((hospitals - 1) / hospitals)
    curious = epsilons(SampledGaussian(left, setting.sample_rate, steps), delta)
    return {"outsider": bound, "server": bound, "hospital": curious}


def _line(bound: dict[str, float]) -> str:
    return (
        f"epsilon {bound['rdp_classic']:.2f} (classic RDP), {bound['rdp']:.2f} (improved RDP), {bound['prv']:.2f} (PRV)"
    )


def privacy_statement(
    setting: Setting, choice: Choice, *, steps: int, hospitals: int, patients: int, delta: float, seeded: bool
) -> str:
    """The statement that goes with every result, in plain words.

    steps     noisy steps of the worst-off hospital; patients  N, training patients in all
    """
    if not setting.private:
        return f"{setting.name} is not private: no noise was added and nothing about any patient is bounded."
    views = adversaries(setting, steps, hospitals, delta)
    lines = [
        f"{setting.name}, {setting.title}. Unit: one patient's image. Neighbours: one image added or removed "
        "(replacing one counts twice).",
        f"Mechanism: gradients clipped to L2 norm {choice.max_grad_norm:g}, Gaussian noise of "
        f"{setting.noise_multiplier:.6g} times that on their sum, Poisson samples at rate {setting.sample_rate:.6g}, "
        f"{steps} steps; the sum is divided by the public expected batch.",
        f"delta = {delta:g}, which is {delta * patients:.2g} / n for n = {patients} training patients.",
        "Against an outsider, who sees every model of the training and knows all other patients: "
        f"{_line(views['outsider'])}.",
    ]
    if not setting.federated:
        lines.append("The server is a trusted curator: it holds the images, and nothing protects them from it.")
    elif setting.shared_noise:
        alone = epsilon(
            SampledGaussian(setting.noise_multiplier / math.sqrt(hospitals), setting.sample_rate, steps),
            delta,
        )
        lines.append(
            "Against the server: the same, if sums are aggregated securely; that part is computational (whoever breaks "
            f"the encryption sees single hospitals: epsilon {alone:.0f}, classic RDP). This run added the messages in "
            "the clear, as a simulation."
        )
        if views["hospital"]:
            lines.append(
                f"Against one curious hospital, which can subtract its own noise: {_line(views['hospital'])}. "
                f"Against {hospitals - 1} hospitals together: one share of noise is left."
            )
    else:
        lines.append(
            "Against the server and other hospitals: the same, since every hospital protects its own messages."
        )
    lines.append(
        "After training the bound on the released model does not rest on encryption. It assumes honest hospitals, one "
        "image per patient, and noise that nobody can predict"
        + ("; THIS RUN WAS SEEDED, so its noise can be predicted: for teaching only." if seeded else ".")
    )
    lines.append(
        "Not covered: the choice of learning rate and clipping norm on validation patients, several images of one "
        "patient (the bound is then for a group), hospital sizes, and rounding of floating-point noise."
    )
    return "\n".join(lines)
