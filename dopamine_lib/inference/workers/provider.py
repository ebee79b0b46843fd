"""The service provider's process: holds the model, serves many patients, and sees no image and no answer.

It learns who asked, when, and how often. Each patient has a session of its own (its own masks, seeds and thread);
what goes wrong in one stays in it. The memory that patients can make it use is bounded, by limits on the sessions at
once, on the patients waiting for one, and on the queries prepared ahead over all sessions together, besides the one
that every session may always have.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence

from dopamine_lib.inference.network.parties import Provider
from dopamine_lib.inference.network.plan import Plan, Weights
from dopamine_lib.inference.offline import parties as alone
from dopamine_lib.inference.protocols.channel import Channel, ChannelError
from dopamine_lib.inference.workers import control, tls
from dopamine_lib.inference.workers.control import Command, Status, Tag
from dopamine_lib.inference.workers.server import ThreadingServer, log

IDLE_TIMEOUT = 120.0  # seconds a patient may leave a session unused
WAIT_FOR_SEAT = 30.0  # seconds a patient waits for another's session to end
IDLE_WHILE_OTHERS_WAIT = 10.0  # seconds after which an unused session makes room for one who waits


class ProviderServer(ThreadingServer):
    """Serves patients.

    address, credentials  where to listen, and its own key
    patients              PEM certificates of the patients let in, by name
    crypto_provider       (address, PEM certificate); None: it makes the randomness with each patient alone
    plan, weights         the compiled model
    grades                names of the model's answers, in the order of its logits
    inputs                of a model of a table's rows: what is declared of each input (``data.table.encoded_rows``)
    thresholds            severities beyond which a disease is called, by its name: patients are told them, and compare
    sessions              patients served at once; as many again may wait. Where several patients are known, none of
                          them may have more than half as many
    ahead                 queries prepared ahead, over all sessions, besides one per session

    A query of a SqueezeNet at 224 pixels takes about 0.1 GB. A session keeps its buffers until it ends, so there are
    at most ``sessions * (1 + ahead)`` of them.
    """

    role = "provider"

    def __init__(
        self,
        address: tls.Address,
        credentials: tls.Credentials,
        patients: dict[str, str],
        crypto_provider: tls.Endpoint | None,
        plan: Plan,
        weights: Weights,
        grades: Sequence[str],
        inputs: dict | None = None,
        thresholds: dict[str, float] | None = None,
        *,
        sessions: int = 4,
        ahead: int = 2,
    ):
        super().__init__(address, credentials, patients)
        if crypto_provider is None:
            alone.check_plan(plan)
        self._credentials, self._crypto_provider = credentials, crypto_provider
        self._plan, self._weights = plan, weights
        card = {"plan": plan.to_json(), "grades": list(grades), "inputs": inputs, "thresholds": thresholds or {}}
        self._card = json.dumps(card)
        self._seats, self._places = threading.Semaphore(sessions), threading.Semaphore(2 * sessions)
        self._spare = threading.Semaphore(ahead)
        self._most_of_one = 2 * sessions if len(patients) == 1 else max(1, sessions // 2)
        self._places_of: Counter[str] = Counter()
        self._idle: dict[Channel, float] = {}  # sessions between two commands, and since when

    def talk(self, channel: Channel, name: str) -> None:
        """One patient's session, if there is a seat for it."""
        with self._lock:
            free = self._places_of[name] < self._most_of_one and self._places.acquire(blocking=False)
            self._places_of[name] += free
        if not free:
            control.send_number(channel, Tag.STATUS, Status.BUSY)
            return
        try:
            if not self._find_seat():
                control.send_number(channel, Tag.STATUS, Status.BUSY)
                return
            try:
                self._seated(channel, name)
            finally:
                self._seats.release()
        finally:
            with self._lock:
                self._places_of[name] -= 1
            self._places.release()

    def _find_seat(self) -> bool:
        """Wait for a seat; a session that nobody uses is ended for it, and its patient's next query opens a new one."""
        end = time.monotonic() + WAIT_FOR_SEAT
        while not self._seats.acquire(timeout=min(0.5, WAIT_FOR_SEAT)):
            now = time.monotonic()
            if now >= end:
                return False
            with self._lock:
                idle = dict(self._idle)  # sessions come and go meanwhile
                oldest = min(idle, key=idle.get, default=None)
                if oldest is not None and now - idle[oldest] > IDLE_WHILE_OTHERS_WAIT:
                    oldest.close()
        return True

    def _seated(self, channel, name: str) -> None:
        if self._crypto_provider is None:
            control.send_number(channel, Tag.STATUS, Status.ALONE)
            control.send_text(channel, Tag.CARD, self._card)
            self._serve(name, channel, alone.Provider(self._plan, self._weights, channel), None)
            return
        address, certificate = self._crypto_provider
        try:
            crypto_provider = tls.connect(address, self._credentials, certificate, "crypto-provider")
            crypto_provider.send(Tag.OPEN, self.fingerprints[name])
            control.send_text(crypto_provider, Tag.PLAN, self._plan.to_json())
            session_id = control.receive_bytes(crypto_provider, Tag.SESSION, control.SESSION_BYTES)
            seed = control.receive_bytes(crypto_provider, Tag.SEED, control.SEED_BYTES)
        except ChannelError:
            control.send_number(channel, Tag.STATUS, Status.NO_CRYPTO_PROVIDER)
            raise
        try:
            control.send_number(channel, Tag.STATUS, Status.WELCOME)
            channel.send(Tag.SESSION, session_id)
            control.send_text(channel, Tag.CARD, self._card)
            self._serve(name, channel, Provider(self._plan, self._weights, seed, channel), crypto_provider)
            control.send_number(crypto_provider, Tag.NEXT, 0)
        finally:
            crypto_provider.close()

    def _serve(self, name: str, channel, provider: Provider | alone.Provider, crypto_provider) -> None:
        served = _PatientSession(channel, crypto_provider, provider, self._spare, self._idle).run()
        log.info("%s: %s ended its session after %d queries", self.role, name, served)


class _PatientSession:
    """One patient's commands, in order; ``run`` returns how many queries were answered."""

    def __init__(self, channel, crypto_provider, provider, spare, idle):
        self._channel, self._crypto_provider, self._provider = channel, crypto_provider, provider
        self._spare, self._idle = spare, idle
        self._ready = 0

    def run(self) -> int:
        served, patience = 0, self._channel.timeout
        try:
            self._provider.setup()
            while True:
                self._channel.timeout = IDLE_TIMEOUT  # a patient may think between commands
                self._idle[self._channel] = time.monotonic()
                command = control.receive_number(self._channel, Tag.COMMAND)
                self._idle.pop(self._channel, None)
                self._channel.timeout = patience
                if command == Command.PREPARE:
                    # the first query of a session needs no spare place, so nobody is locked out
                    granted = self._ready == 0 or self._spare.acquire(blocking=False)
                    control.send_number(self._channel, Tag.GRANTED, granted)
                    if granted:
                        self._prepare()
                elif command == Command.INFER:
                    queries = control.receive_number(self._channel, Tag.COUNT)
                    self._provider.serve(queries)
                    for _ in range(queries):
                        self._forget_one()
                    served += queries
                elif command == Command.END:
                    return served
                else:
                    raise ChannelError(f"sent command {command}, which there is not")
        finally:
            self._idle.pop(self._channel, None)
            while self._ready:
                self._forget_one()

    def _prepare(self) -> None:
        self._ready += 1
        if self._crypto_provider is None:
            self._provider.prepare()
        else:
            control.send_number(self._crypto_provider, Tag.NEXT, 1)
            self._provider.prepare(self._crypto_provider)
        control.send_number(self._channel, Tag.READY, self._ready)

    def _forget_one(self) -> None:
        self._ready -= 1
        if self._ready:
            self._spare.release()
