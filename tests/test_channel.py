"""Channels: bytes arrive as sent, and everything else ends in one clear error on both sides, never in a hang."""

import contextlib
import datetime
import gc
import socket
import ssl
import stat
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.encryption import certificates as pinned
from dopamine_lib.encryption.certificates import Credentials, fingerprint, read_certificate
from dopamine_lib.inference.protocols.channel import CHUNK, FIRST, ChannelError, Recorded, SocketChannel, local_pair
from dopamine_lib.inference.workers.tls import Listener, connect


def both(one, other):
    """Run two functions at once; returns their results, or what they raised."""
    results = [None, None]

    def call(i, function):
        try:
            results[i] = function()
        except Exception as error:
            results[i] = error

    thread = threading.Thread(target=call, args=(1, other))
    thread.start()
    call(0, one)
    thread.join(20)
    assert not thread.is_alive(), "one side hangs"
    return results


@pytest.fixture
def pair():
    one, other = local_pair(timeout=5)
    yield one, other
    one.close(), other.close()


@pytest.fixture(scope="module")
def identities():
    return {name: Credentials.make(name) for name in ("patient", "provider", "stranger")}


@pytest.fixture
def tls_pair(identities):
    """A channel from a patient to a provider over TLS on loopback."""
    listener = Listener(("127.0.0.1", 0), identities["provider"], {"patient 1": identities["patient"].certificate})
    ends = both(
        lambda: connect(
            listener.address, identities["patient"], identities["provider"].certificate, "provider", timeout=5
        ),
        lambda: listener.welcome(listener.accept(), timeout=5),
    )
    patient, (provider, name) = ends
    assert name == "patient 1"
    yield patient, provider
    patient.close(), provider.close(), listener.close()


SIZES = st.one_of(
    st.integers(0, 40), st.sampled_from([FIRST - 9, FIRST - 8, FIRST - 7, CHUNK, CHUNK + 1, 2 * CHUNK + FIRST, 3**12])
)


@settings(deadline=None, max_examples=40)
@given(there=SIZES, back=SIZES, tag=st.integers(0, 2**32 - 1))
def test_messages_of_any_size_cross(there, back, tag):
    one, other = local_pair(timeout=5)
    rng = np.random.default_rng(there)
    a, b = rng.integers(0, 256, there, dtype=np.uint8), rng.integers(0, 256, back, dtype=np.uint8)
    got_a, got_b = np.zeros_like(a), np.zeros_like(b)
    assert both(lambda: one.exchange(tag, a, got_b), lambda: other.exchange(tag, b, got_a)) == [None, None]
    assert np.array_equal(a, got_a) and np.array_equal(b, got_b)
    assert (one.sent, one.received) == (there, back) == (other.received, other.sent)
    one.close(), other.close()


@pytest.mark.parametrize("kind", ["pair", "tls_pair"])
def test_a_large_exchange_and_both_directions(kind, request):
    one, other = request.getfixturevalue(kind)
    x = np.random.default_rng(0).integers(0, 2**32, (3, 2**19), dtype=np.uint32)
    y, z = np.zeros_like(x), np.zeros_like(x)
    assert both(lambda: one.exchange(1, x, y), lambda: other.exchange(1, x, z)) == [None, None]
    assert np.array_equal(x, y) and np.array_equal(x, z)
    assert both(lambda: one.send(2, b"seed"), lambda: other.receive(2, y.reshape(-1)[:1])) == [None, None]
    assert y.reshape(-1)[:1].tobytes() == b"seed"


def test_no_deadlock_in_small_kernel_buffers():
    """The kernel may grant far less than asked for: whoever cannot send reads, and the other can go on."""

    class Stingy(socket.socket):
        def setsockopt(self, level, option, value):
            if (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF):
                value = 8192
            super().setsockopt(level, option, value)

    ends = [SocketChannel(Stingy(fileno=end.detach()), timeout=5) for end in socket.socketpair()]
    x = np.random.default_rng(1).integers(0, 256, 3_000_000, dtype=np.uint8)
    y, z = np.zeros_like(x), np.zeros_like(x)
    assert both(lambda: ends[0].exchange(1, x, y), lambda: ends[1].exchange(1, x, z)) == [None, None]
    assert np.array_equal(x, y) and np.array_equal(x, z)
    for end in ends:
        end.close()


def test_neither_direction_of_an_exchange_waits_for_the_other(pair):
    """In lock-step a line's length came on top of every 128 KB: 20 ms halved what 100 Mbit/s carry."""
    one, other = pair[0], pair[1]._sock
    x = np.zeros(4 * CHUNK, np.uint8)
    size = 8 + x.nbytes

    def second():  # reads all before it sends anything
        other.setblocking(True)
        other.settimeout(5)
        got = 0
        while got < size:
            got += len(other.recv(size))
        other.sendall(struct.pack("<II", 1, x.nbytes) + bytes(x.nbytes))

    assert both(lambda: one.exchange(1, x, x.copy()), second) == [None, None]


def test_rounds_count_waits_not_messages(pair):
    one, other = pair
    out = bytearray(4)

    def first():
        one.send(1, b"abcd")
        one.send(2, b"abcd")
        one.exchange(3, b"abcd", out)

    def second():
        other.receive(1, bytearray(4))
        other.receive(2, bytearray(4))
        other.exchange(3, b"abcd", bytearray(4))

    assert both(first, second) == [None, None]
    assert (one.rounds, other.rounds) == (1, 2)  # two messages in a row are one wait


def test_recorded_keeps_what_passed(pair):
    one, other = Recorded(pair[0]), Recorded(pair[1])
    both(
        lambda: (one.exchange(7, b"ab", bytearray(2)), one.send(8, np.arange(2, dtype=np.uint8))),
        lambda: (other.exchange(7, b"cd", bytearray(2)), other.receive(8, bytearray(2))),
    )
    assert one.log == [("sent", 7, b"ab"), ("received", 7, b"cd"), ("sent", 8, b"\0\1")]
    assert other.log == [("sent", 7, b"cd"), ("received", 7, b"ab"), ("received", 8, b"\0\1")]
    assert (one.sent, one.received, other.rounds) == (4, 2, 2)


@pytest.mark.parametrize("kind", ["pair", "tls_pair"])
@pytest.mark.parametrize(
    "sent, said",
    [((4, b"abcd"), "message 4 where message 3 is due"), ((3, b"abc"), "with 3 bytes where 4 are due")],
)
def test_wrong_order_and_wrong_size_end_both_sides(kind, sent, said, request):
    one, other = request.getfixturevalue(kind)

    def talk():
        other.send(*sent)
        other.receive(9, bytearray(1))

    mine, theirs = both(lambda: one.receive(3, bytearray(4)), talk)
    assert isinstance(mine, ChannelError) and said in str(mine)
    assert isinstance(theirs, ChannelError) and "abc" not in f"{mine}{theirs}"
    with pytest.raises(ChannelError):  # closed for good: nothing used up is used again
        one.send(3, b"abcd")


@pytest.mark.parametrize("kind", ["pair", "tls_pair"])
def test_a_peer_that_disappears(kind, request):
    one, other = request.getfixturevalue(kind)
    big = np.zeros(8_000_000, dtype=np.uint8)

    def vanish():
        other.receive(1, bytearray(4))
        other.close()

    def talk():
        one.send(1, b"abcd")
        one.exchange(2, big, big.copy())

    mine, theirs = both(talk, vanish)
    assert isinstance(mine, ChannelError) and theirs is None
    assert "closed" in str(mine) or "broke" in str(mine)


@pytest.mark.parametrize("kind", ["pair", "tls_pair"])
def test_a_silent_peer_is_given_up(kind, request):
    one, _ = request.getfixturevalue(kind)
    one.timeout = 0.2
    begin = time.monotonic()
    with pytest.raises(ChannelError, match="did not go on within 0.2 s"):
        one.receive(1, bytearray(4))
    assert time.monotonic() - begin < 3


def test_single_bytes_do_not_prolong_the_time(pair):
    one, other = pair
    one.timeout = 0.5

    def drip():
        raw = struct.pack("<II", 1, 100) + bytes(100)
        with contextlib.suppress(OSError):
            for i in range(len(raw)):
                other._sock.sendall(raw[i : i + 1])
                time.sleep(0.05)

    begin = time.monotonic()
    mine, _ = both(lambda: one.receive(1, bytearray(100)), drip)
    assert isinstance(mine, ChannelError) and "0.5 s" in str(mine)
    assert time.monotonic() - begin < 4


def test_a_reader_that_never_reads_is_given_up(pair):
    one, _ = pair
    one.timeout = 0.3
    with pytest.raises(ChannelError, match=r"0\.3 s"):
        one.send(1, np.zeros(50_000_000, dtype=np.uint8))


def test_close_wakes_a_waiting_thread(tls_pair):
    one, _ = tls_pair
    threading.Timer(0.2, one.close).start()
    begin = time.monotonic()
    with pytest.raises(ChannelError):
        one.receive(1, bytearray(4))
    assert time.monotonic() - begin < 3
    one.close()


def test_errors_leave_no_socket_open():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        one, other = local_pair(timeout=1)
        other.close()
        with pytest.raises(ChannelError):
            one.receive(1, bytearray(4))
        assert one._sock.fileno() == -1
        gc.collect()


# TLS


def test_only_tls_1_3_and_no_plain_bytes_on_the_wire(identities):
    """A man in the middle who copies everything sees no payload, in either direction."""
    listener = Listener(("127.0.0.1", 0), identities["provider"], {"patient": identities["patient"].certificate})
    door = socket.create_server(("127.0.0.1", 0))
    wire = bytearray()

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                wire.extend(data)
                sink.sendall(data)

    def middle():
        client, server = door.accept()[0], socket.create_connection(listener.address)
        back = threading.Thread(target=pump, args=(server, client), daemon=True)
        back.start()
        pump(client, server)

    threading.Thread(target=middle, daemon=True).start()
    secret = np.frombuffer(b"canary in the coal mine " * 100, dtype=np.uint8)

    def serve():
        channel, _ = listener.welcome(listener.accept(), timeout=5)
        channel.exchange(1, secret, np.empty_like(secret))
        version = channel._sock.version()
        channel.close()
        return version

    def ask():
        channel = connect(
            door.getsockname(), identities["patient"], identities["provider"].certificate, "provider", timeout=5
        )
        got = np.empty_like(secret)
        channel.exchange(1, secret, got)
        channel.close()
        return got

    got, version = both(ask, serve)
    assert np.array_equal(got, secret) and version == "TLSv1.3"
    assert len(wire) > 2 * secret.nbytes and b"canary" not in wire
    listener.close(), door.close()


@pytest.mark.parametrize(
    "client, pinned", [("stranger", "provider"), ("patient", "stranger")], ids=["the client", "the server"]
)
def test_strangers_are_refused(identities, client, pinned):
    listener = Listener(("127.0.0.1", 0), identities["provider"], {"patient": identities["patient"].certificate})

    def ask():
        channel = connect(listener.address, identities[client], identities[pinned].certificate, "provider", timeout=5)
        channel.receive(1, bytearray(4))  # TLS 1.3: a client hears of its refusal with the first message

    mine, theirs = both(ask, lambda: listener.welcome(listener.accept(), timeout=5))
    assert isinstance(mine, ChannelError) and isinstance(theirs, ChannelError), (mine, theirs)
    listener.close()


def test_a_client_without_certificate_and_an_old_tls_are_refused(identities):
    listener = Listener(("127.0.0.1", 0), identities["provider"], {"patient": identities["patient"].certificate})
    for maximum in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
        context = ssl.create_default_context(cadata=identities["provider"].certificate)
        context.check_hostname, context.maximum_version = False, maximum

        def ask(context=context):
            with socket.create_connection(listener.address) as raw, context.wrap_socket(raw) as sock:
                return sock.recv(1)

        mine, theirs = both(ask, lambda: listener.welcome(listener.accept(), timeout=5))
        assert isinstance(mine, OSError) and isinstance(theirs, ChannelError), (mine, theirs)
    listener.close()


def test_an_unreachable_worker_is_reported(identities):
    listener = Listener(("127.0.0.1", 0), identities["provider"], {"patient": identities["patient"].certificate})
    listener.close()
    with pytest.raises(ChannelError, match="the provider cannot be reached at 127.0.0.1"):
        connect(listener.address, identities["patient"], identities["provider"].certificate, "provider")


def test_credentials_are_kept_private_and_read_back(tmp_path, refuses):
    path = tmp_path / "keys" / "provider.pem"
    made = Credentials.at(path, "provider")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Credentials.at(path, "provider")
    assert again.fingerprint == made.fingerprint == fingerprint(read_certificate(path.with_suffix(".crt")))
    assert "PRIVATE" not in repr(made) and "PRIVATE" not in path.with_suffix(".crt").read_text()
    path.write_text("no key")
    with refuses(str(path), "does not hold a private key"):
        Credentials.at(path, "provider")
    other = tmp_path / "other.pem"
    other.write_bytes(made.key + Credentials.make("x").certificate.encode())
    other.chmod(0o644)
    with refuses(str(other), "read by others"):
        Credentials.at(other, "provider")
    other.chmod(0o600)
    with refuses(str(other), "does not belong"):
        Credentials.at(other, "provider")


def test_credentials_never_overwrite_a_certificate_or_a_key(tmp_path, refuses):
    theirs = tmp_path / "provider.crt"
    theirs.write_text("another worker's")
    for path in (tmp_path / "provider.pem", tmp_path / "mine.crt"):
        with refuses(str(path), "name another file"):
            Credentials.at(path, "provider")
    assert theirs.read_text() == "another worker's" and list(tmp_path.iterdir()) == [theirs]
    with refuses(str(tmp_path), "name another"):
        Credentials.at(tmp_path, "provider")


def test_a_listener_takes_an_ipv6_address(identities):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    listener = Listener(("::1", 0), identities["provider"], {})
    assert listener.address[0] == "::1"
    listener.close()


def test_what_cannot_be_a_machine_s_name_is_refused(identities, refuses):
    with refuses("cannot listen on a..b:0", "choose another address"):
        Listener(("a..b", 0), identities["provider"], {})
    with pytest.raises(ChannelError, match="provider cannot be reached at a..b:1"):
        connect(("a..b", 1), identities["patient"], identities["provider"].certificate, "provider")


def test_certificates_that_cannot_be_read(tmp_path, refuses):
    with refuses("no.crt", "cannot be read"):
        read_certificate(tmp_path / "no.crt")
    file = tmp_path / "picture.crt"
    file.write_bytes(b"\x89PNG\xff")
    with refuses("picture.crt", "not a PEM certificate"):
        read_certificate(file)


def test_the_key_leaves_no_file(identities, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    Listener(("127.0.0.1", 0), identities["provider"], {"patient": identities["patient"].certificate}).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("year", [1971, 2100])
def test_workers_that_were_started_by_another_clock_still_meet(year, monkeypatch):
    """A clock that is set while the page runs: its certificates were over, or not valid yet, until it was restarted."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(year, 6, 1, tzinfo=tz)

    with monkeypatch.context() as patch:
        clock = SimpleNamespace(datetime=Clock, UTC=datetime.UTC)
        patch.setattr("dopamine_lib.encryption.certificates.datetime", clock)
        patient, provider = (Credentials.make(name, always=True) for name in ("patient", "provider"))
    listener = Listener(("127.0.0.1", 0), provider, {"patient": patient.certificate})
    with ThreadPoolExecutor(1) as server:
        welcome = server.submit(lambda: listener.welcome(listener.accept(), timeout=5))
        channel = connect(listener.address, patient, provider.certificate, "provider", timeout=5)
        met, name = welcome.result()
    assert name == "patient"
    channel.close(), met.close(), listener.close()


def test_a_port_in_use_is_reported(identities, refuses):
    peers = {"patient": identities["patient"].certificate}
    listener = Listener(("127.0.0.1", 0), identities["provider"], peers)
    with refuses("cannot listen on 127.0.0.1", "choose another"):
        Listener(listener.address, identities["provider"], peers)
    listener.close()


@pytest.fixture
def expired(tmp_path, monkeypatch):
    """A worker's credentials, kept in a file until their certificate was over."""
    with monkeypatch.context() as patch:
        patch.setattr(pinned, "LIFETIME", -pinned.BACKDATED / 2)
        return tmp_path / "old.pem", Credentials.at(tmp_path / "old.pem", "old")


def test_files_of_an_expired_certificate_say_so(expired, refuses):
    path, _ = expired
    with refuses(str(path), "expired on 20", "new ones are made"):
        Credentials.at(path, "old")
    with refuses("old.crt", "expired on 20", "ask the other worker"):
        read_certificate(path.with_suffix(".crt"))


@pytest.mark.parametrize("whose", ["provider", "patient"])
def test_a_handshake_with_an_expired_certificate_says_so(expired, identities, whose):
    """It said that verification failed, and asked whether certificates had been exchanged."""
    own = identities | {whose: expired[1]}
    listener = Listener(("127.0.0.1", 0), own["provider"], {"patient": own["patient"].certificate})
    said = []

    def welcome():
        try:
            channel, _ = listener.welcome(listener.accept(), timeout=5)
        except ChannelError as error:
            said.append(str(error))
        else:
            channel.close()

    thread = threading.Thread(target=welcome)
    thread.start()
    try:
        channel = connect(listener.address, own["patient"], own["provider"].certificate, "provider", timeout=5)
        channel.receive(1, bytearray(4))
    except ChannelError as error:
        said.append(str(error))
    thread.join(10)
    listener.close()
    mine = [line for line in said if "expired" in line]
    # who speaks first is chance
    assert mine and (whose == "patient" or any("the provider's certificate has expired" in line for line in mine)), said
