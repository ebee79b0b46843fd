"""Flower's ServerApp and ClientApp: they carry letters, and the parties' programs do what they do on every wire.

    server   runs the kit's server with the run-config's options; its letters are Flower's messages
    client   hands a letter to this hospital's program and its reply back. It holds no patient, key or ledger

Needs Flower (``pip install "dopamine-kit[flower]"``, in an environment of its own); nothing else imports this.
"""

import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from dopamine_lib.errors import InputError
from dopamine_lib.federation.arguments import Parser
from dopamine_lib.federation.flower.__main__ import SOCKET
from dopamine_lib.federation.flower.box import hand_in
from dopamine_lib.federation.flower.config import flower_arguments, hospital_words, words
from dopamine_lib.federation.flower.post import Lost, Post
from dopamine_lib.federation.wires.program import complain, ended, load_party, serve, show, tell

#: Seconds that a session after the first waits for hospitals that come back: several exchanges of stock Flower.
LATE = 60.0
#: Seconds between two looks for replies, and for a hospital's program to start: it reads its data first.
LOOK, START = 0.2, 600.0

server = ServerApp()  # Flower looks for each name on its own
client = ClientApp()


class Nodes:
    """Letters as Flower's messages. One thread speaks to the grid, and finds which node is which hospital."""

    def __init__(self, grid: Grid):
        self._grid, self._asked, self._nodes = grid, queue.SimpleQueue(), {}
        self._finding, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._speak, name="grid", daemon=True).start()

    def carry(self, number: int, letter: bytes) -> bytes:
        """The reply of hospital ``number``. Raises Lost."""
        if number not in self._nodes:
            self._find()
        if number not in self._nodes:
            raise Lost("no node says that it is this hospital's")
        try:
            return self._ask(self._nodes[number], {"letter": letter}, "letter", bytes).result()
        except Lost:  # another node may be this hospital's by now
            self._nodes.pop(number, None)
            raise

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _ask(self, node: int, what: dict[str, bytes | str], key: str, kind: type) -> Future:
        """What a node replies under ``key``, of type ``kind``; Lost for anything else."""
        answer = Future()
        self._asked.put((node, what, (answer, key, kind)))
        return answer

    def _find(self) -> None:
        """Ask all nodes that are there, and are not known, which hospital's they are."""
        with self._finding:
            here = set(self._grid.get_node_ids())
            known = {number: node for number, node in self._nodes.items() if node in here}
            new = {node: self._ask(node, {"who": "are you"}, "number", int) for node in here - set(known.values())}
            for node, answer in new.items():
                try:
                    known.setdefault(answer.result(), node)
                except Lost:  # it is asked again
                    continue
            self._nodes = known

    def _speak(self) -> None:
        """In a thread: push what is asked, and pull what is answered."""
        waiting: dict[str, tuple[Future, str, type]] = {}
        while not self._closed.wait(LOOK):
            asked = []
            while not self._asked.empty():
                asked.append(self._asked.get())
            try:
                if asked:
                    messages = [
                        Message(RecordDict({"carried": ConfigRecord(what)}), node, "query") for node, what, _ in asked
                    ]
                    for found, (_, _, answer) in zip(self._grid.push_messages(messages), asked, strict=True):
                        if found is None:
                            answer[0].set_exception(Lost("Flower took no message for its node"))
                        else:
                            waiting[found] = answer
                    asked = []
                for reply in self._grid.pull_messages([*waiting]) if waiting else ():
                    answer, key, kind = waiting.pop(reply.metadata.reply_to_message_id)
                    if reply.has_error():
                        answer.set_exception(Lost(reply.error.reason or f"Flower's error {reply.error.code}"))
                        continue
                    carried = reply.content.get("carried")  # a node may reply anything: it is its own hospital's loss
                    found = carried.get(key) if isinstance(carried, ConfigRecord) else None
                    if type(found) is kind:
                        answer.set_result(found)
                    else:
                        answer.set_exception(Lost("its node replied with something else"))
            except Exception as error:  # whoever waits must hear of it
                for answer, *_ in [*waiting.values(), *(answer for _, _, answer in asked)]:
                    answer.set_exception(Lost(f"the SuperLink does not answer ({type(error).__name__})"))
                waiting.clear()


def _serve(grid: Grid, config: dict) -> None:
    from dopamine_lib.encryption.messages import SERVER
    from dopamine_lib.federation.wires.relay import Relay

    parser = Parser(prog="run-config")
    flower_arguments(parser)
    parser.set_defaults(runs=1)
    arguments = parser.parse_args(words(config))
    experiment, *keys = load_party(arguments, SERVER)
    relay, nodes = Relay(len(experiment.sizes)), Nodes(grid)
    post = Post(relay, nodes.carry, say=tell)
    try:
        results = serve(arguments, experiment, keys, relay, LATE, tell)
        post.close()
        show(results, arguments.out)
    finally:
        relay.close("the server has ended")
        post.close()
        nodes.close()


@server.main()
def run_server(grid: Grid, context: Context) -> None:
    """The kit's server, with the options of the run-config."""
    status, line = ended(lambda: _serve(grid, context.run_config))
    complain(line)
    if status:
        raise InputError(line)


@client.query()
def carry(message: Message, context: Context) -> Message:
    """What this hospital's program replies to a letter; or which hospital this node is."""
    asked = message.content["carried"]
    if "who" in asked:
        found = {"number": int(hospital_words({}, context.node_config)[0])}
    else:
        path = Path(context.node_config["out"]) / SOCKET
        try:
            reply = hand_in(path, asked["letter"])
        except (FileNotFoundError, ConnectionRefusedError):  # no program listens
            start(path, context)
            reply = hand_in(path, asked["letter"])
        found = {"letter": reply}
    return Message(RecordDict({"carried": ConfigRecord(found)}), reply_to=message)


def start(path: Path, context: Context) -> None:
    """Start this hospital's program, and wait until it listens; its words go to ``hospital.log`` in its folder.

    Raises InputError, with the last of them, where it ends before.
    """
    out, run = path.parent, str(context.run_id)
    out.mkdir(parents=True, exist_ok=True)
    begun, log = out / "flower-run.txt", out / "hospital.log"
    again = begun.exists() and begun.read_text(encoding="utf-8") == run  # in this run it was started before
    begun.write_text(run, encoding="utf-8")
    command = [sys.executable, "-m", "dopamine_lib.federation.flower", "hospital"]
    command += hospital_words(context.run_config | ({"resume": True} if again else {}), context.node_config)
    with log.open("ab") as said:
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, env=_environment()
        )
    end = time.monotonic() + START
    while time.monotonic() < end:
        time.sleep(0.1)
        if program.poll() is not None:
            lines = log.read_text(encoding="utf-8").splitlines()
            raise InputError(f"hospital's program ended: {lines[-1] if lines else 'it said nothing'}")
        try:
            from multiprocessing.connection import Client

            Client(str(path), "AF_UNIX").close()
            return
        except OSError:
            continue
    raise InputError(f"hospital's program does not listen after {START:g} s; see {log}")


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
