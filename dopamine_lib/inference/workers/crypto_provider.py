"""The crypto-provider's process: hands out seeds and corrections, and sees neither image nor model.

It learns which patient opened a session with the provider, when, and how many queries were prepared. It needs no
PyTorch and loads none. Every session has fresh random seeds, so nothing is ever dealt twice, not even after a
restart: seeds are forgotten with their session.
"""

import os
import threading

from dopamine_lib.encryption.certificates import Credentials
from dopamine_lib.errors import InputError
from dopamine_lib.inference.network.crypto_provider import CryptoProvider
from dopamine_lib.inference.network.plan import Plan
from dopamine_lib.inference.protocols.channel import Channel, ChannelError
from dopamine_lib.inference.workers import control
from dopamine_lib.inference.workers.control import Tag
from dopamine_lib.inference.workers.server import MAX_CONNECTIONS, MAX_OF_ONE, ThreadingServer, log
from dopamine_lib.inference.workers.tls import Address

PROVIDER = "provider"
IDLE_TIMEOUT = 600.0  # seconds a provider may leave a session unused


class CryptoProviderServer(ThreadingServer):
    """Serves the provider, one connection per session, and each patient once per session.

    address      (host, port) to listen on
    credentials  its own key
    provider     PEM certificate of the provider
    patients     PEM certificates of patients, by name
    """

    role = "crypto-provider"

    def __init__(self, address: Address, credentials: Credentials, provider: str, patients: dict[str, str]):
        super().__init__(address, credentials, {PROVIDER: provider} | patients)
        self._waiting: dict[bytes, tuple[bytes, str, bytes]] = {}
        self._waiting_lock = threading.Lock()

    def quota(self, name: str) -> int:
        """The provider needs a connection for every session; the rest is for patients, who join one and leave."""
        return MAX_CONNECTIONS - MAX_OF_ONE if name == PROVIDER else MAX_OF_ONE

    def talk(self, channel: Channel, name: str) -> None:
        """A provider opens a session, a patient joins one."""
        if name == PROVIDER:
            self._session(channel)
        else:
            self._join(channel, name)

    def _session(self, channel) -> None:
        patient = control.receive_bytes(channel, Tag.OPEN, control.FINGERPRINT_BYTES)
        try:
            plan = Plan.from_json(control.receive_text(channel, Tag.PLAN))
        except InputError:
            raise ChannelError("the provider sent a plan that cannot be read") from None
        crypto_provider, session = CryptoProvider(plan), os.urandom(control.SESSION_BYTES)
        with self._waiting_lock:
            self._waiting[session] = (patient, plan.digest(), crypto_provider.patient_seed)
        try:
            channel.send(Tag.SESSION, session)
            channel.send(Tag.SEED, crypto_provider.provider_seed)
            queries = 0
            channel.timeout = IDLE_TIMEOUT
            while control.receive_number(channel, Tag.NEXT):
                crypto_provider.send(channel)
                queries += 1
            log.info("%s: a session ended after %d queries", self.role, queries)
        finally:
            with self._waiting_lock:
                self._waiting.pop(session, None)

    def _join(self, channel, name: str) -> None:
        session = control.receive_bytes(channel, Tag.JOIN, control.SESSION_BYTES)
        digest = control.receive_bytes(channel, Tag.JOIN, control.DIGEST_BYTES)
        with self._waiting_lock:
            patient, plan_digest, seed = self._waiting.get(session, (None, None, None))
            if patient != self.fingerprints[name]:
                raise ChannelError("asked for a session that is not open for it")
            if plan_digest != digest:
                raise ChannelError(
                    "follows another plan than its provider, or another version of the protocols than we"
                )
            del self._waiting[session]  # a seed is handed out once
        channel.send(Tag.SEED, seed)
