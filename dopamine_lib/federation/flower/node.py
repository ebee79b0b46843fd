"""A hospital's program that is its own node: it takes Flower's messages from the SuperLink itself, and runs no code.

A stock SuperNode starts a process for every message, which runs the code that the run brought. This one answers letters
and nothing else, in the program that holds the patients: ten seconds an exchange become less than one, which is what
masks and long runs need. It stands on the parts of Flower that a SuperNode is made of; they are no public interface, so
the extra "flower" names one minor version.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from dopamine_lib.errors import InputError
from dopamine_lib.federation.flower.box import Box

#: Seconds between two looks for a message.
LOOK = 0.1


def read_node_key(path: str | Path) -> tuple:
    """A node's key pair, registered by ``flwr supernode register``. Raises InputError for a file that holds none."""
    try:
        private = load_ssh_private_key(Path(path).read_bytes(), None)
        return private, private.public_key()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--node-key {path} cannot be used ({error}): make one with ssh-keygen -t ecdsa -b 384"
        ) from None


@contextmanager
def answering(
    box: Box, number: int, superlink: str, key: tuple, roots: str, say: Callable[[str], object]
) -> Iterator[None]:
    """Answer the SuperLink's messages for hospital ``number``, until the program ends.

    superlink  its HOST:PORT, over TLS
    key        the node's, as ``read_node_key`` gives it
    roots      PEM file of the authority that signed the SuperLink's certificate
    say        is told, in a line, of messages that are no letters, or that were lost
    """
    ends = threading.Event()

    def answer_one(receive, send, pull, push, confirm) -> bool:
        found = receive()
        if found is None:
            return False
        message, tree = found
        metadata = message.metadata
        wanted = [part.object_id for part in iterate_object_tree(tree)]
        contents = pull_objects(wanted, pull_object_fn=partial(pull, metadata.run_id))
        confirm(metadata.run_id, metadata.message_id)
        asked = inflate_object_from_contents(metadata.message_id, contents).content["carried"]
        carried = {"number": number} if "who" in asked else {"letter": box.answer(asked["letter"])}
        with no_object_id_recompute():
            reply = Message(RecordDict({"carried": ConfigRecord(carried)}), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id  # as a SuperNode does
            parts, tree = get_all_nested_objects(reply), get_object_tree(reply)
        wanted, session = send(reply, tree, 0.0)
        push_objects(parts, push_object_fn=partial(push, metadata.run_id, session), object_ids_to_push=wanted)
        return True

    def answer() -> None:
        with http_request_response(superlink, False, roots, key) as (_, receive, send, _, _, *objects):
            while True:
                try:
                    if answer_one(receive, send, *objects):
                        continue
                except Exception as error:  # it is written again, or the server takes this hospital for lost
                    said = str(error).partition("\n")[0]
                    say(f"a message of the SuperLink's was not answered: {type(error).__name__}: {said}")
                if ends.wait(LOOK):
                    return

    thread = threading.Thread(target=answer, name="letters", daemon=True)
    thread.start()
    yield
    ends.set()
    thread.join(30.0)  # the last letter says that the program has ended
