"""Several queries that share their rounds: messages that are due at the same time cross as one.

    answers = side_by_side(channel, [first, second, third])        functions of a channel: each gets a ``Lane``

Every query is evaluated as if it were alone, in a thread of its own, with randomness of its own. When all of them want
to send or receive the message with the next tag, which is the same one since they follow one plan, it goes as a single
message, one query's part behind the other's. So three pictures wait for the other side as often as one does.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from dopamine_lib.inference.protocols.channel import Buffer, Channel, ChannelError

Result = TypeVar("Result")
#: Tag, what goes out and what is filled; None where nothing goes that way.
Request = tuple[int, memoryview | None, memoryview | None]


class _BrokenOff(ChannelError):
    """It was another lane that could not go on."""


class Lane(Channel):
    """One query's view of the channel; its counts are those of the whole."""

    def __init__(self, joint: "_Joint", number: int):
        self._joint, self._number = joint, number

    def send(self, tag: int, data: Buffer) -> None:
        self._joint.swap(self._number, (tag, memoryview(data).cast("B"), None))

    def receive(self, tag: int, out: Buffer) -> None:
        self._joint.swap(self._number, (tag, None, memoryview(out).cast("B")))

    def exchange(self, tag: int, outgoing: Buffer, incoming: Buffer) -> None:
        self._joint.swap(self._number, (tag, memoryview(outgoing).cast("B"), memoryview(incoming).cast("B")))

    def close(self) -> None:
        self._joint.close()

    sent = property(lambda self: self._joint.channel.sent)
    received = property(lambda self: self._joint.channel.received)
    rounds = property(lambda self: self._joint.channel.rounds)


class _Joint:
    """The channel, and what each lane wants of it next; the last lane that comes does it for all."""

    def __init__(self, channel: Channel, lanes: int):
        self.channel, self._requests = channel, [None] * lanes
        self._met = threading.Barrier(lanes, action=self._swap_all)

    def swap(self, number: int, request: Request) -> None:
        self._requests[number] = request
        try:
            self._met.wait()
        except threading.BrokenBarrierError:
            raise _BrokenOff("another query that shares these rounds broke off") from None

    def _swap_all(self) -> None:
        tags, outgoing, incoming = zip(*self._requests, strict=True)
        sends, receives = outgoing[0] is not None, incoming[0] is not None
        if len(set(tags)) > 1:
            raise ChannelError(f"queries that share their rounds want the messages {sorted(set(tags))} at once")
        out = b"".join(outgoing) if sends else None
        into = bytearray(sum(map(len, incoming))) if receives else None
        if sends and receives:
            self.channel.exchange(tags[0], out, into)
        elif sends:
            self.channel.send(tags[0], out)
        else:
            self.channel.receive(tags[0], into)
        start = 0
        for part in incoming if receives else ():
            part[:] = into[start : start + len(part)]
            start += len(part)

    def close(self) -> None:
        self._met.abort()
        self.channel.close()


def side_by_side(channel: Channel, works: Sequence[Callable[[Channel], Result]]) -> list[Result]:
    """What each work returns; it is called with a channel. Both sides must have equally many, in the same order.

    Raises what a work raises that breaks off; the others are ended with it, and so is the channel.

    >>> from dopamine_lib.inference.protocols.channel import local_pair
    >>> (one, other), out = local_pair(), bytearray(2)
    >>> _ = side_by_side(one, [lambda lane: lane.send(1, b"a"), lambda lane: lane.send(1, b"b")])
    >>> other.receive(1, out), bytes(out)
    (None, b'ab')
    """
    if len(works) == 1:
        return [works[0](channel)]
    joint = _Joint(channel, len(works))

    def guarded(work, number):
        try:
            return work(Lane(joint, number))
        except BaseException:
            joint.close()
            raise

    with ThreadPoolExecutor(len(works)) as threads:
        try:
            running = [threads.submit(guarded, work, number) for number, work in enumerate(works)]
            wait(running)
        except BaseException:  # an interrupt: whoever waits for a message must not keep this from ending
            joint.close()
            raise
    errors = [error for one in running if (error := one.exception())]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, _BrokenOff))
    return [one.result() for one in running]
