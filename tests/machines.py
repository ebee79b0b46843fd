"""A run between machines: a network namespace with an address of its own for each party, deaths and cut lines.

    python tests/machines.py [HOSPITALS] [bfv|masks|plain] [NAME VALUE …]     as root, on Linux; further options

Every few seconds a hospital is killed and started again, or its line is cut for longer than the server waits. Where the
kernel has netem, each line delays packets by 20 ms and loses one in a hundred.
"""

import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from dopamine_lib.federation.wires.identities import make_identity

BRIDGE, NETWORK, LOST_AFTER = "dopamine", "10.77.0", 2.0


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@contextmanager
def machines(names):
    """A namespace for each name, the server's first, all on one bridge; the last byte of its address counts from 1."""
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"{BRIDGE}{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{BRIDGE}{number}", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{1 + number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            netem = ["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "20ms", "loss", "1%"]
            slow = ip("netns", "exec", name, *netem, check=False).returncode == 0
        print("lines delay and lose packets" if slow else "this kernel has no netem: lines are only cut", flush=True)
        yield
    finally:
        for number, name in enumerate(names):
            ip("link", "del", f"{BRIDGE}{number}", check=False)  # a namespace's own is gone only some time after it
            ip("netns", "del", name, check=False)
        ip("link", "del", BRIDGE, check=False)


def ended(party, seconds=30.0):
    """Whether a party ends well within this many seconds."""
    with suppress(subprocess.TimeoutExpired):
        return party.wait(seconds) == 0


def run(hospitals, kind, more, folder, seed=0):
    """The whole run: how often a hospital was killed, and how often a line was cut."""
    names, chance = ["server", *(f"hospital-{k}" for k in range(hospitals))], random.Random(seed)
    for name in names:
        make_identity(folder / "keys", name)
    options = ["--hospitals", str(hospitals), "--least", str(hospitals - 1), "--aggregation", kind, *more]

    def start(number, *resume):
        who = ["server", "--address", f"{NETWORK}.1:50051", "--lost-after", str(LOST_AFTER)]
        if number:
            who = ["hospital", str(number - 1), "--server", f"{NETWORK}.1:50051"]
        own = ["--identities", str(folder / "keys"), "--out", str(folder / names[number]), *options, *resume]
        python = ["ip", "netns", "exec", names[number], sys.executable, "-m", "dopamine_lib.federation.remote"]
        return subprocess.Popen([*python, *who, *own], stdout=None if number == 0 else subprocess.DEVNULL)

    with machines(names):
        parties = [start(number) for number in range(len(names))]
        killed = cut = 0
        try:
            while parties[0].poll() is None:
                time.sleep(chance.uniform(6.0, 12.0))
                victim = chance.randrange(1, len(names))
                if parties[0].poll() is not None or any(party.poll() is not None for party in parties[1:]):
                    break
                if chance.random() < 0.5:
                    parties[victim].kill()
                    parties[victim].wait()
                    parties[victim], killed = start(victim, "--resume"), killed + 1
                else:
                    ip("link", "set", f"{BRIDGE}{victim}", "down")
                    time.sleep(2 * LOST_AFTER)
                    ip("link", "set", f"{BRIDGE}{victim}", "up")
                    cut += 1
            away = [name for name, party in zip(names, parties, strict=True) if not ended(party)]
        finally:
            for party in parties:
                party.kill()
    assert "server" not in away and len(away) <= 1, away  # one may be away when the run ends, and calls nobody
    assert (folder / "server" / "results.json").exists()
    return killed, cut


if __name__ == "__main__":
    count, kind = int((sys.argv[1:] or ["10"])[0]), (sys.argv[2:] or ["masks"])[0]
    with tempfile.TemporaryDirectory() as place:
        begin = time.monotonic()
        killed, cut = run(count, kind, sys.argv[3:], Path(place))
        print(f"{killed} deaths, {cut} cut lines, {time.monotonic() - begin:.0f} s")
