"""The service provider's process: holds the model, serves many patients, and sees no image and no answer.

It learns who asked, when, and how often. Each patient has a session of its own (its own masks, seeds and thread);
what goes wrong in one stays in it. The memory that patients can make it use is bounded: so many sessions at once,
so many patients waiting for one, and so many queries prepared ahead over all sessions together, besides the one
that every session may always have.
"""

import json
import threading

from dopamine_lib.inference.network.parties import Provider
from dopamine_lib.inference.protocols.channel import ChannelError
from dopamine_lib.inference.workers import messages, tls
from dopamine_lib.inference.workers.messages import Command, Status, Tag
from dopamine_lib.inference.workers.server import Server, log

IDLE_TIMEOUT = 120.0  # seconds a patient may leave a session unused
WAIT_FOR_SEAT = 30.0  # seconds a patient waits for another's session to end


class ProviderServer(Server):
    """Serves patients.

    address, identity  where to listen, and its own key
    patients           PEM certificates of the patients let in, by name
    hospital           (address, PEM certificate) of the crypto-provider
    plan, weights      the compiled model
    grades             names of the model's answers, in the order of its logits
    sessions           patients served at once; as many again may wait
    ahead              queries prepared ahead, over all sessions, besides one a session

    A query of a SqueezeNet at 224 pixels takes about 0.1 GB; a session keeps the buffers it once had until it ends,
    so ``sessions * (1 + ahead)`` of them are the most.
    """

    role = "provider"

    def __init__(
        self, address, identity, patients, hospital, plan, weights, grades, *, sessions: int = 4, ahead: int = 2
    ):
        super().__init__(address, identity, patients)
        self._identity, self._hospital = identity, hospital
        self._plan, self._weights = plan, weights
        self._card = json.dumps({"plan": plan.to_json(), "grades": list(grades)})
        self._seats, self._places = threading.Semaphore(sessions), threading.Semaphore(2 * sessions)
        self._spare = threading.Semaphore(ahead)

    def talk(self, channel, name: str) -> None:
        """One patient's session, if there is a seat for it."""
        if not self._places.acquire(blocking=False):
            messages.send_number(channel, Tag.STATUS, Status.BUSY)
            return
        try:
            if not self._seats.acquire(timeout=WAIT_FOR_SEAT):
                messages.send_number(channel, Tag.STATUS, Status.BUSY)
                return
            try:
                self._seated(channel, name)
            finally:
                self._seats.release()
        finally:
            self._places.release()

    def _seated(self, channel, name: str) -> None:
        address, certificate = self._hospital
        try:
            hospital = tls.connect(address, self._identity, certificate, "hospital")
            hospital.send(Tag.OPEN, self.fingerprints[name])
            messages.send_text(hospital, Tag.PLAN, self._plan.to_json())
            session_id = messages.receive_bytes(hospital, Tag.SESSION, messages.SESSION_BYTES)
            seed = messages.receive_bytes(hospital, Tag.SEED, messages.SEED_BYTES)
        except ChannelError:
            messages.send_number(channel, Tag.STATUS, Status.NO_HOSPITAL)
            raise
        try:
            messages.send_number(channel, Tag.STATUS, Status.WELCOME)
            channel.send(Tag.SESSION, session_id)
            messages.send_text(channel, Tag.CARD, self._card)
            session = _Session(channel, hospital, Provider(self._plan, self._weights, seed, channel), self._spare)
            served = session.run()
            messages.send_number(hospital, Tag.NEXT, 0)
            log.info("%s: %s ended its session after %d queries", self.role, name, served)
        finally:
            hospital.close()


class _Session:
    """One patient's commands, in order; ``run`` returns how many queries were answered."""

    def __init__(self, channel, hospital, provider, spare):
        self._channel, self._hospital, self._provider = channel, hospital, provider
        self._spare = spare
        self._ready = 0

    def run(self) -> int:
        served, patience = 0, self._channel.timeout
        try:
            self._provider.setup()
            while True:
                self._channel.timeout = IDLE_TIMEOUT  # between commands a patient may think
                command = messages.receive_number(self._channel, Tag.COMMAND)
                self._channel.timeout = patience
                if command == Command.PREPARE:
                    # the first query of a session needs no spare place, so nobody is locked out
                    granted = self._ready == 0 or self._spare.acquire(blocking=False)
                    messages.send_number(self._channel, Tag.GRANTED, granted)
                    if granted:
                        self._prepare()
                elif command == Command.INFER and self._ready:
                    self._provider.serve()
                    self._forget_one()
                    served += 1
                elif command == Command.END:
                    return served
                else:
                    raise ChannelError(f"sent command {command} where {self._ready} queries are prepared")
        finally:
            while self._ready:
                self._forget_one()

    def _prepare(self) -> None:
        self._ready += 1
        messages.send_number(self._hospital, Tag.NEXT, 1)
        self._provider.prepare(self._hospital)
        messages.send_number(self._channel, Tag.READY, self._ready)

    def _forget_one(self) -> None:
        self._ready -= 1
        if self._ready:
            self._spare.release()
