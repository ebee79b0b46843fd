"""Whole runs over threads in which parties are killed and started again, and a record of what each total held."""

import json
import threading
import time
from pathlib import Path

from dopamine_lib.encryption.certificates import Credentials
from dopamine_lib.encryption.messages import SERVER
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.flower.box import DONE, Box, Boxed
from dopamine_lib.federation.flower.post import Lost, Post
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.remote.dial import Dialled
from dopamine_lib.federation.remote.service import Service, longest_message
from dopamine_lib.federation.wires import party
from dopamine_lib.federation.wires.identities import party_name
from dopamine_lib.federation.wires.threads import LocalCalls, Threads, Vanished
from dopamine_lib.federation.wires.wire import Wire


class Doomed:
    """A life of a hospital that may end before any message."""

    def __init__(self, run, number):
        self.calls = run.threads.dial(number) if hasattr(run.threads, "dial") else LocalCalls(run.threads, number)
        self._run, self._number, self.instance = run, number, self.calls.instance
        self.get, self.attach = self.calls.get, getattr(self.calls, "attach", None)

    def join(self):
        """As ``Calls.join``; a run that is over is as a server whose port is closed."""
        if self._run.results is not None:
            raise InputError("the run is over")
        return self.calls.join()

    def put(self, session, count, peer, message):
        """As ``Calls.put``."""
        if self._run.doomed(self._number, self._run.lives[self._number], message):
            getattr(self.calls, "close", lambda: None)()
            raise Vanished
        self.calls.put(session, count, peer, message)


class Wired(Threads):
    """The same parties, whose calls go over gRPC on this machine, each through a channel of its own."""

    def __init__(self, hospitals, d, **terms):
        super().__init__(hospitals, **terms)
        self.credentials = {number: Credentials.make(party_name(number), always=True) for number in self.publics}
        self.d, self.address = d, "127.0.0.1:0"
        self._listen()

    def close(self):
        """Answer no more calls."""
        self.service.close()

    def _listen(self):
        certificates = {k: own.certificate for k, own in self.credentials.items() if k != SERVER}
        limit = longest_message(self.d)
        self.service = Service(self.relay, self.address, self.credentials[SERVER], certificates, limit, 0.5)
        self.address = self.service.address

    def dial(self, number, credentials=None, server=SERVER, patience=30.0, times=1):
        """A life of a hospital; it would send messages ``times`` as long as the longest."""
        certificate = self.credentials[server].certificate
        own = credentials or self.credentials[number]
        return Dialled(self.address, own, certificate, times * longest_message(self.d), patience)

    def vanish(self, number, instance=b""):
        """A server that is killed leaves its port; that a hospital is gone shows by itself."""
        if number == SERVER:
            self.service.close()
            super().vanish(number)
            self._listen()


class Lettered(Threads):
    """The same parties, whose calls go by letters, as Flower carries them; here nothing is between."""

    def __init__(self, hospitals, **terms):
        super().__init__(hospitals, **terms)
        self.boxes = {}
        self._write()

    def close(self):
        """Write no more letters."""
        self.post.close(5.0)

    def _write(self):
        self.post = Post(self.relay, self._carry, pause=0.02, say=self.say)

    def _carry(self, number, letter):
        if number not in self.boxes:
            raise Lost("nobody listens")
        return self.boxes[number].answer(letter)

    def dial(self, number):
        """A life of a hospital."""
        self.boxes[number] = Box(self.patience)
        return self.boxes[number]

    def connect(self, number, calls=None):
        """As ``Threads.connect``."""
        if number == SERVER:
            return super().connect(number)
        end = Boxed(number, self.hospitals, calls or self.dial(number), self.patience)
        return Wire(end, self.identities[number], self.publics)

    def vanish(self, number, instance=b""):
        """A program that is killed leaves the letter that it was to answer; nobody is told more."""
        if number == SERVER:
            self.post.close(0.0)
            super().vanish(number)
            self._write()
        else:
            self.boxes.pop(number).close("it was killed")

    def ended(self, number):
        """A program that has come to its end says so in its last letter."""
        self.boxes[number].close(DONE)


class Run:
    """One run over threads.

    options   as ``Options`` takes them; ``out`` gets a folder for each party
    doomed    called as ``doomed(number, life, message)`` before a hospital sends: whether it is killed there; its lives
              count from 0
    back      seconds after which a party that was killed is started again; None for never
    wired     how calls go: "" within the process, over "gRPC", or by "letters", as Flower carries them
    """

    def __init__(self, options, out, *, doomed=lambda *what: False, back=0.0, wired=""):
        options = Options(**options | {"settings": tuple(options["settings"])})
        (self.name,), self.hospitals = options.settings, options.hospitals
        self.numbers = [*range(self.hospitals), SERVER]
        self.experiments = {n: Experiment.load(options, party=n, progress=False) for n in self.numbers}
        self.plan = self.experiments[0].plan(self.name)
        self.out, self.doomed, self.back = Path(out), doomed, back
        self.lives, self.results = dict.fromkeys(self.numbers, 0), None
        self.said, self.errors, self.included, self.most = [], {}, [], {}
        least = party.needed(self.plan)
        terms = dict(needed=least, gather=0.05, patience=300.0, say=self.say)
        if wired == "gRPC":
            self.threads = Wired(self.hospitals, self.plan.d, **terms)
        else:
            self.threads = (Lettered if wired else Threads)(self.hospitals, **terms)

    def say(self, line):
        """What the server is told."""
        self.said.append(line)
        if self.doomed(SERVER, self.lives[SERVER], line.encode()):
            raise Vanished

    def run(self, seconds=500.0):
        """Run all parties to their end; returns itself. Fails where one has not ended within ``seconds``."""
        workers = [threading.Thread(target=self._lives, args=(number,), daemon=True) for number in self.numbers]
        for worker in workers:
            worker.start()
        end = time.monotonic() + seconds
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        self.threads.relay.close("the run is over")
        if hasattr(self.threads, "close"):
            self.threads.close()
        assert not any(worker.is_alive() for worker in workers), (self.said, self.errors, self.lives)
        return self

    def charged(self, number):
        """The epochs that a hospital has on its own disk."""
        path = self.out / str(number) / "runs" / f"{self.name}-0-hospital-{number}.json"
        return json.loads(path.read_text())["record"]["reserved"] if path.exists() else 0

    def _lives(self, number):
        """All lives of one party, one after the other."""
        while True:
            calls = None if number == SERVER else Doomed(self, number)
            try:
                found = party.take_part(
                    self.experiments[number],
                    lambda calls=calls: self.threads.connect(number, calls),
                    self.out / str(number),
                    party=number,
                    resume=self.lives[number] > 0,
                    say=self.say if number == SERVER else lambda line: None,
                )
                if number == SERVER:
                    self.results = found
                    self.threads.relay.drain(5.0)
                    self.threads.relay.close("the run is over")
                elif hasattr(self.threads, "ended"):
                    self.threads.ended(number)
                return
            except Vanished:
                self.threads.vanish(number, b"" if calls is None else calls.instance)
                self.lives[number] += 1
                if self.back is None:
                    return
                time.sleep(self.back)
            except Exception as error:
                if isinstance(error, InputError) and number != SERVER and "the run is over" in str(error):
                    return
                self.errors[number] = error
                if number == SERVER:
                    self.threads.relay.close(f"the server gave up: {error}")
                else:
                    self.threads.relay.gone(number, calls.instance, f"gave up: {error}")
                return


def note_totals(patch, run_of):
    """Have every total that a hospital opens noted in the run that ``run_of()`` gives: (hospital, round, who is in it).
    Also checked there: its own epoch is charged on its disk before a message of it exists."""
    from dopamine_lib.federation.training import Training
    from dopamine_lib.federation.wires import sums

    checks, plain = sums._Side._check, Training._round

    def check(self, hospitals, invited, round_number):
        checks(self, hospitals, invited, round_number)
        run_of().included.append((self.wire.number, round_number, tuple(hospitals)))

    def one_round(self, number):
        for hospital in self.hospitals if hasattr(self.aggregation, "wire") else ():
            on_disk, most = run_of().charged(hospital.number), run_of().most
            assert on_disk == self.progress.epoch + 1, "noise is drawn before it is charged"
            assert on_disk >= most.get(hospital.number, 0), "a charge was lost"
            most[hospital.number] = on_disk
        return plain(self, number)

    patch.setattr(sums._Side, "_check", check)
    patch.setattr(Training, "_round", one_round)
