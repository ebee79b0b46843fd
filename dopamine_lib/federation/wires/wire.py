"""Sealed messages between the parties of a run, whatever carries them: four verbs, send, receive, arrivals, barrier.

A ``Carrier`` moves bytes between parties and says who is lost: MPI (``mpi.ranks``), mailboxes at the server for threads
of one process (``relay``) or, through gRPC, for hospitals that dial out (``remote``). Above it each message is sealed
for its receiver (``encryption/links.py``) and counted: one that is changed, repeated, left out or moved raises
MessageError. What remains visible is who sends how many bytes to whom, and when.

A *session* is what one set of keys lasts for. While keys are made and results compared every member must be there.
In the rounds between, the server leaves a hospital out that is lost, silent or lies, and goes on with the rest as long
as they are enough; if not, the session is over, and so it is where a hospital that was away comes back after an epoch.
All then meet in the next session, which goes on from the last epoch's end. Nothing of a session is used in another.

Buffers, never pickles: a message is bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, Protocol

from dopamine_lib.encryption.keys import Identity
from dopamine_lib.encryption.links import Handshake, check_hello
from dopamine_lib.encryption.messages import SERVER, MessageError, pack_numbers, unpack_numbers

#: Kinds of messages: keys, a state to go on from, to and from the server in a round, a round's total, the final model,
#: that a party has come this far, and what all must agree on beforehand.
KEYS, STATE, UP, DOWN, TOTAL, MODEL, DONE, TERMS = range(1, 9)


class Silence(RuntimeError):
    """A party has not answered within the patience of another, and the run is given up."""


class SessionOver(RuntimeError):
    """The session has ended for this party, which may meet the others in the next one; says why."""


class Carrier(Protocol):
    """Moves bytes between the parties of one session, in order and each once.

    number     this party's: a hospital's, from 0, or SERVER
    hospitals  K, those of this session and all others
    members    the hospitals of this session, in order
    patience   seconds without an answer after which a party is taken for silent
    reopens    whether a session that is over is followed by another
    """

    number: int
    hospitals: int
    members: tuple[int, ...]
    patience: float
    reopens: bool

    def who(self, number: int) -> str:
        """A party in an error message."""

    def send(self, peer: int, message: bytes) -> None:
        """Hand a message over; returns when it is on its way. Raises SessionOver, or Silence."""

    def here(self, peers: Sequence[int]) -> list[int]:
        """Those of ``peers`` whose next message has arrived."""

    def take(self, peer: int) -> bytes:
        """The next message of a peer that is ``here``."""

    def lost(self, peers: Sequence[int]) -> dict[int, str]:
        """Those of ``peers`` that are known to be gone, and why; known to the server alone."""

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Sleep until ``done()`` is true, or the time is over; returns which. Raises SessionOver."""

    def leave_out(self, peer: int, why: str, for_good: bool) -> None:
        """At the server: have nothing more to do with a hospital in this session, or ever. It is told why."""

    def newcomers(self) -> list[int]:
        """At the server: the hospitals that wait for another session."""

    def close(self, why: str) -> None:
        """At the server: end the session for all hospitals, which are told why."""


class Wire:
    """One party's end of a session.

    carrier   what moves the bytes
    identity  this party's key pair; ``publics`` holds everybody's public keys, the server's under ``SERVER``
    say       is told, in a line, of hospitals that are left out
    members   the hospitals of this session; ``present`` those that are not known to have left it
    fewest    how many of them a hospital lets the server call present: all, unless it is set lower
    sent, received  bytes so far, seals included
    All members make theirs at the same time: they greet each other.
    """

    def __init__(
        self,
        carrier: Carrier,
        identity: Identity,
        publics: dict[int, bytes],
        say: Callable[[str], object] = lambda line: None,
    ):
        self.carrier, self.number, self.hospitals = carrier, carrier.number, carrier.hospitals
        self.members = self.present = tuple(carrier.members)
        self.fewest = len(self.members)
        self.identity, self.say = identity, say
        self.publics = {number: publics[number] for number in [*self.members, SERVER]}
        self.sent = self.received = 0
        self._out, self._in, self._needed = Counter(), Counter(), None
        handshake = Handshake(self.number, identity, self.publics)
        self._links = handshake.links(self._greet(handshake.hello()))

    def send(self, peer: int, kind: int, body: bytes) -> None:
        """Seal ``body`` for a hospital or ``SERVER`` and hand it over; to one that was left out, nothing."""
        if peer == SERVER or peer in self.present:
            self._out[peer] += 1
            sealed = self._links[peer].seal(kind, self._out[peer], bytes(body))
            self.carrier.send(peer, sealed)
            self.sent += len(sealed)

    def receive(self, peer: int, kind: int) -> bytes:
        """The next message of ``peer``, which must be of this kind."""
        ((_, body),) = self.arrivals([peer], kind)
        return body

    def arrivals(self, peers: Iterable[int], kind: int) -> Iterator[tuple[int, bytes]]:
        """(number, body) of one message of each of ``peers``, as they arrive.

        In a server's rounds those that are lost, silent or send no genuine message are left out; otherwise they raise
        SessionOver, Silence or MessageError.
        """
        for peer in self._coming(list(peers)):
            try:
                body = self._take(peer, kind)
            except MessageError as error:
                self.refuse(peer, error)
            else:
                yield peer, body

    def refuse(self, peer: int, error: MessageError) -> None:
        """Leave a hospital out for good whose message was refused; raise the error where nobody can be left out."""
        if self._needed is None and not (self.number == SERVER and self.carrier.reopens):
            raise error
        self._leave_out({peer: f"lies: {error}"}, for_good=True)

    def barrier(self, *, pause: bool = False) -> None:
        """Wait until all who are present are here, and learn who that is.

        pause  whether hospitals that were away may come in now; then the session is over
        """
        if self.number != SERVER:
            self.send(SERVER, DONE, b"")
            present = unpack_numbers(self.receive(SERVER, DONE))
            known = self.number in present and set(present) <= set(self.members)
            if not known or len(set(present)) < self.fewest:  # whom one takes for gone, one compares nothing with
                raise MessageError(
                    f"the server calls hospitals {list(present)} present, of which {self.fewest} must be: it is refused"
                )
            self.present = present
            return
        for _ in self.arrivals(self.present, DONE):
            pass
        back = self.carrier.newcomers() if pause else []
        if back:
            self.end(f"{self.names(back)} {'is' if len(back) == 1 else 'are'} back")
        for k in self.present:
            self.send(k, DONE, pack_numbers(self.present))

    def tolerate(self, needed: int | None) -> None:
        """Go on without hospitals as long as ``needed`` are left, from now on; with None, without none."""
        self._needed = needed

    def end(self, why: str) -> NoReturn:
        """End the session for all."""
        self.carrier.close(why)
        raise SessionOver(why)

    def names(self, numbers: Iterable[int]) -> str:
        """Parties in an error message."""
        return " and ".join(map(self.carrier.who, numbers))

    def _greet(self, own: bytes) -> list[bytes]:
        """All parties' hellos. The server sees them first, so that one that is none ends no hospital's program."""
        if self.number != SERVER:
            self.carrier.send(SERVER, own)
            (hellos,) = (self.carrier.take(peer) for peer in self._coming([SERVER]))
            return [hellos[i : i + len(own)] for i in range(0, len(hellos), len(own))]
        hellos = [own]
        for peer in self._coming(list(self.members)):
            hellos.append(self.carrier.take(peer))
            try:
                check_hello(peer, hellos[-1])
            except MessageError as error:
                self.refuse(peer, error)
        for peer in self.members:
            self.carrier.send(peer, b"".join(hellos))
        return hellos

    def _coming(self, left: list[int]) -> Iterator[int]:
        """Each of these peers once its next message is here; those that are left out never."""
        left = [peer for peer in left if peer == SERVER or peer in self.present]
        while left:
            here = []

            def look(left=left, here=here):
                here[:] = self.carrier.here(left)
                return here or self._lost(left)

            missing = {}
            if not self.carrier.wait(look, self.carrier.patience):
                missing = dict.fromkeys(left, f"has not answered for {self.carrier.patience:g} s")
                if self._needed is None:
                    verb = "does" if len(left) == 1 else "do"
                    raise Silence(
                        f"{self.names(left)} {verb} not answer for {self.carrier.patience:g} s: the run is given up; "
                        "see whether that party still runs"
                    )
            for peer in here:
                left.remove(peer)
                yield peer
            missing |= {peer: why for peer, why in self._lost(left).items() if peer not in missing}
            if missing:
                self._leave_out(missing)
                left = [peer for peer in left if peer not in missing]

    def _lost(self, awaited: list[int]) -> dict[int, str]:
        """Who is gone, and why; where all members must be there, whoever is awaited may wait for any of them."""
        return self.carrier.lost(self.present if self._needed is None else awaited)

    def _leave_out(self, missing: dict[int, str], *, for_good: bool = False) -> None:
        """Go on without these hospitals, or end the session where too few are left."""
        for peer, why in missing.items():
            self.say(f"{self.carrier.who(peer)} {why}")
            self.carrier.leave_out(peer, why, for_good)
        self.present = tuple(k for k in self.present if k not in missing)
        if self._needed is None:
            self.end(f"{self.names(missing)} left while keys were made or results compared")
        if len(self.present) < self._needed:
            self.end(f"{len(self.present)} of the {self._needed} hospitals that are needed are left")

    def _take(self, peer: int, kind: int) -> bytes:
        sealed = self.carrier.take(peer)
        self._in[peer] += 1
        self.received += len(sealed)
        return self._links[peer].open(kind, self._in[peer], sealed)
