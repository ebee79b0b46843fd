"""The privacy statement: what a bound says, to whom it applies, and what it leaves out.

A figure for epsilon means nothing without its unit, its neighbours, its sampler and its adversary.
"""

from dopamine_lib.federation.bounds import Bound, accounted_mean_noise

HOW = {
    "plain": "This run added the messages in the clear, as a simulation.",
    "bfv": "Messages were added under BFV, all parties in one process. All hospitals share the secret key: one of them "
    "and the server together read every message.",
    "masks": "Messages were added behind pairwise masks, all parties in one process. Of K hospitals t, the larger of "
    "--least and K // 2 + 1, must collude with the server to read one; 2 t - K are enough if it tells different "
    "stories.",
}
APART = {
    kind: said.replace("all parties in one process", "each party a process of its own") for kind, said in HOW.items()
} | {"plain": "The server of this run added the messages in the clear: it saw every hospital's."}


def _line(bound: dict[str, float | None]) -> str:
    prv = "" if bound["prv"] is None else f", {bound['prv']:.2f} (PRV)"
    return f"epsilon {bound['rdp_classic']:.2f} (classic RDP), {bound['rdp']:.2f} (improved RDP){prv}"


def privacy_statement(
    bound: Bound, *, steps: int, patients: int, seeded: bool, aggregation: str = "plain", apart: bool = False
) -> str:
    """The statement that goes with every result, in plain words.

    steps     noisy steps of the worst-off hospital
    patients  N, training patients in all
    apart     whether every party was a process of its own

    >>> from dopamine_lib.federation.settings import CHOICES, SETTINGS
    >>> bound = Bound(SETTINGS["C"], CHOICES["head"]["C"], shares=1, delta=1e-4, noise=None)
    >>> privacy_statement(bound, steps=5862, patients=2931, seeded=True)
    'C is not private: no noise was added and nothing about any patient is bounded.'
    """
    setting, choice, hospitals, delta = bound.setting, bound.choice, bound.shares, bound.delta
    if not setting.private:
        return f"{setting.name} is not private: no noise was added and nothing about any patient is bounded."
    views, mean = bound.adversaries(steps), accounted_mean_noise(setting, choice, hospitals)
    kind = "Skellam (integer, the bound holds for what is sent)" if bound.noise.discrete else "Gaussian"
    once = f" Before that, once, all patients' features were summed, with noise of {mean or 0:.4g} times their norm."
    lines = [
        f"{setting.name}, {setting.title}. Unit: one patient's image. Neighbours: one image added or removed "
        "(replacing one counts twice).",
        f"Mechanism: gradients clipped to L2 norm {choice.max_grad_norm:g}, {kind} noise of "
        f"{setting.noise_multiplier:.6g} times that on their sum, Poisson samples at rate {setting.sample_rate:.6g}, "
        f"{steps} steps; the sum is divided by the public expected batch." + (once if mean else ""),
        f"delta = {delta:g}, which is {delta * patients:.2g} / n for n = {patients} training patients.",
        "Against an outsider, who sees every model of the training and knows all other patients: "
        f"{_line(views['outsider'])}.",
    ]
    if not setting.federated:
        lines.append("The server is a trusted curator: it holds the images, and nothing protects them from it.")
    elif setting.shared_noise:
        alone, how = bound.epsilon(steps, colluding=hospitals - 1), (APART if apart else HOW)[aggregation]
        lines.append(
            "Against the server: the same, if sums are aggregated securely; that part is computational (whoever breaks "
            f"the encryption sees single hospitals: epsilon {alone:.0f}, classic RDP). {how}"
        )
        if views["hospital"]:
            lines.append(
                f"Against one curious hospital, which can subtract its own noise: {_line(views['hospital'])}. "
                f"Against {hospitals - 1} hospitals together: one share of noise is left. Noise is sized for "
                f"{hospitals} hospitals; a round in which fewer arrive is spent and not opened."
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
        "patient (the bound is then for a group), hospital sizes"
        + ("." if bound.noise.discrete else ", and rounding of floating-point noise.")
    )
    return "\n".join(lines)
