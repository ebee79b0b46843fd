"""One party of SecretFlow's SPU, a peer of ``bench inference``: a ``pool.Child`` that answers with its seconds.

The kit does not depend on SPU, which wants an older NumPy: for the benchmark it has an environment of its own, by
Python 3.11,

    python3.11 -m venv DIR && DIR/bin/pip install spu==0.9.5 jax==0.4.34 jaxlib==0.4.34

and ``DOPAMINE_SPU=DIR/bin/python`` names its Python. The settings are SPU's defaults for its ring of 64 bits, and
SEMI2K has its triples from a trusted first party, as CrypTen has. Party 0 holds the image and is told the logits,
party 1 the weights; what ABY3's third holds is shares. They talk over TCP in the clear, and neither a session's set-up
(base transfers, compiling the network) nor the sharing of the weights is counted: the comparison errs in SPU's favour.
"""

import contextlib
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from dopamine_lib.pool import Parent

if TYPE_CHECKING:  # where the kit is, SPU and JAX are not
    import numpy as np
    import spu
    from jax import Array

PATIENT, PROVIDER = 0, 1
BITS, FRACTION = 64, 18
PATIENCE = 600  # seconds that one party waits for another
#: SqueezeNet-1.1 between its first convolution and its last: pooling and fire modules.
BODY = "PFFPFFPFFFF"


def network(x: "Array", weights: "list[Array]") -> "Array":
    """SqueezeNet-1.1 in JAX: logits (B, classes) of pictures (B, H, W, 3).

    weights  kernels (height, width, from, to) and biases (to,) in turns, in torchvision's order
    """
    from jax import lax
    from jax import numpy as jnp

    arrays = iter(weights)

    def convolved(x, stride=1, padding=0):
        edges, axes = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, next(arrays), (stride, stride), edges, dimension_numbers=axes)
        return jnp.maximum(x + next(arrays), 0)

    x = convolved(x, stride=2)
    for module in BODY:
        if module == "P":
            short = [(0, (side - 1) % 2) for side in x.shape[1:3]]  # what the last window lacks; after a ReLU, zeros do
            x = jnp.pad(x, [(0, 0), *short, (0, 0)])
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        else:
            squeezed = convolved(x)
            x = jnp.concatenate([convolved(squeezed), convolved(squeezed, padding=1)], -1)
    return convolved(x).mean((1, 2))


class Party:
    """One of ``addresses``: what it holds becomes everybody's shares, and what is computed its share.

    protocol   "ABY3", "SEMI2K" or "Cheetah"
    addresses  of all parties, in their order, such as "127.0.0.1:4711"
    """

    def __init__(self, rank: int, protocol: str, addresses: list[str]):
        import spu

        description = spu.link.Desc()
        description.recv_timeout_ms, description.connect_retry_times = 1000 * PATIENCE, PATIENCE
        for number, address in enumerate(addresses):
            description.add_party(str(number), address)
        config = spu.RuntimeConfig(spu.api.parse_protocol_kind(protocol.upper()), spu.FieldType.FM64, FRACTION)
        self.rank, self.parties = rank, len(addresses)
        self._others = [other for other in range(self.parties) if other != rank]
        self._link, self._io = spu.link.create_brpc(description, rank), spu.Io(len(addresses), config)
        self._runtime = spu.Runtime(self._link, config)

    def agree(self, program: "spu.Executable | None") -> "spu.Executable":
        """The provider's program, at everybody."""
        import spu

        if self.rank == PROVIDER:
            for other in self._others:
                self._link.send(other, program.SerializeToString())
            return program
        heard = spu.Executable()
        heard.ParseFromString(self._link.recv(PROVIDER))
        return heard

    def share(self, owner: int, names: list[str], values: "list[np.ndarray] | None") -> None:
        """The owner's ``values`` become variables of everybody's; others hold None."""
        import spu

        for number, name in enumerate(names):
            if self.rank == owner:
                shares = self._io.make_shares(values[number], spu.Visibility.VIS_SECRET)
                for other in self._others:
                    self._send(other, shares[other])
            self._runtime.set_var(name, shares[owner] if self.rank == owner else self._receive(owner))

    def run(self, program: "spu.Executable") -> list[float] | None:
        """The patient's logits; None at everybody else."""
        self._runtime.run(program)
        mine = self._runtime.get_var(program.output_names[0])
        if self.rank != PATIENT:
            self._send(PATIENT, mine)
            return None
        return self._io.reconstruct([mine, *map(self._receive, self._others)])[0].tolist()

    def _send(self, to: int, share: "spu.libspu.Share") -> None:
        self._link.send(to, share.meta)
        self._link.send(to, *share.share_chunks)  # one chunk up to 128 MB

    def _receive(self, sender: int) -> "spu.libspu.Share":
        import spu

        share = spu.libspu.Share()
        share.meta, share.share_chunks = self._link.recv(sender), [self._link.recv(sender)]
        return share


def main(rank: str, protocol: str, addresses: str, file: str, size: str, descriptor: str) -> None:
    """Answer every message of the parent's with the seconds of one inference, party 0 also with the logits.

    addresses  of all parties, with commas between
    file       what the party holds, of NumPy's: the image (1, 3, size, size), the weights, or "" for nothing
    """
    parent, rank = Parent(int(descriptor)), int(rank)
    import numpy as np
    import spu
    from jax import ShapeDtypeStruct
    from spu.utils import frontend

    image = weights = program = None
    if rank == PATIENT:
        image = [np.load(file).transpose(0, 2, 3, 1)]
    elif rank == PROVIDER:
        with np.load(file) as held:
            weights = [held[name].transpose(2, 3, 1, 0) if held[name].ndim == 4 else held[name] for name in held.files]
        shapes = ShapeDtypeStruct((1, int(size), int(size), 3), np.float32), weights
        names = [f"input {number}" for number in range(1 + len(weights))]
        secret = [spu.Visibility.VIS_SECRET] * len(names)
        program, _ = frontend.compile(frontend.Kind.JAX, network, shapes, {}, names, secret, lambda out: ["logits"])
    party = Party(rank, protocol, addresses.split(","))
    program = party.agree(program)
    picture, *rest = program.input_names
    party.share(PROVIDER, rest, weights)
    settings = f"{protocol}, {party.parties} parties, {BITS} bits of which {FRACTION} fraction"
    parent.say(seconds=0.0, name=f"spu {version('spu')}, {settings}")  # ready
    with contextlib.suppress(EOFError):
        while True:
            parent.hear()
            begin = time.perf_counter()
            party.share(PATIENT, [picture], image)
            logits = party.run(program)
            parent.say(seconds=time.perf_counter() - begin, logits=logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
