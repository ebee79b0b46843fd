"""What a query gives the patient: the grade, what is called at thresholds, and what it cost."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Answer:
    """What the patient learns, and what it cost.

    grade            the most probable one of ``grades``, whose order probabilities and logits follow
    probabilities    None, like the logits, where the provider lets the grade alone be opened (``Plan.answer``)
    seconds_offline  spent on preparing this query; seconds_online: from the image to the answer
    rounds           times the patient waited for the provider, online
    bytes            ``online_sent`` and ``online_received`` by the patient; ``offline_to_provider`` from the
                     crypto-provider, and once per session ``offline_to_patient``, the seed, and ``setup_to_patient``;
                     without a crypto-provider both offline ones are between the two, for each query
    exceeded         whether the image drove some value near the ring's end (``protocols.room``), so that the answer may
                     be wrong
    together         how many queries shared the rounds and the seconds online; the bytes are this one's
    thresholds       severities beyond which a disease is called, by its name: the provider's, the same for all patients
    """

    grade: str
    grades: list[str]
    probabilities: list[float] | None
    logits: list[float] | None
    seconds_offline: float
    seconds_online: float
    rounds: int
    bytes: dict[str, int]
    exceeded: bool
    together: int = 1
    thresholds: dict[str, float] = field(default_factory=dict)

    @property
    def severity(self) -> float | None:
        """The expected grade, a number from 0 on, which thresholds are for; None where the grade alone was opened."""
        if self.probabilities is None:
            return None
        return sum(grade * probability for grade, probability in enumerate(self.probabilities))

    @property
    def called(self) -> dict[str, bool]:
        """For each disease with a threshold whether it is called, worked out here: nobody else knows the severity."""
        if self.severity is None:
            return {}
        return {what: self.severity > threshold for what, threshold in self.thresholds.items()}

    def record(self) -> dict:
        """As plain data for JSON."""
        return asdict(self) | {"severity": self.severity, "called": self.called}
