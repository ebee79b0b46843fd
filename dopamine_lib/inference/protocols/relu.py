"""ReLU and truncation in one: shares of x at a fine scale become shares of max(x, 0) >> shift at a coarse one.

    1 to 3. Compare x with 0 (``comparison``): opened m = x + r and beta, with [x >= 0] = beta ^ rho.
    4. Where x >= 0, x >> shift is (m >> shift) + s with s = -(r >> shift), plus 2^(32 - shift) if m wrapped around,
       which for x >= 0 is the case where msb(r) = 1 and msb(m) = 0. So s depends on msb(m) only: s[0] or s[1].
       Shares of all four u[beta][msb m] = (beta ^ rho) s[msb m] come from the crypto-provider;
       y = (m >> shift) (beta ^ rho) + u[beta][msb m]. No message.

Why this hides x: nothing is opened beyond the comparison, and u is shared afresh.

The result is x / 2^shift rounded down or up, at random with the right mean. Truncating each share on its own would
be wrong by 2^(32 - shift) with probability |x| / 2^32. A negative x above -2^15 may come out as x >> shift instead
of 0: at most 2^(15 - shift) units. Needs |x| < 2^31 - 2^15.
"""

import numpy as np

from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.comparison import Comparison
from dopamine_lib.inference.protocols.operation import Party


class ReLUOperation(Comparison):
    """max(x, 0) >> shift for ``count`` elements."""

    def __init__(self, count: int, shift: int):
        super().__init__(count, extra=4)
        self.shift = shift

    def deal_extra(self, r, rho, patient, corrections) -> None:
        kernels.active().deal_relu(r, rho, self.shift, patient.extra, corrections.extra)

    def finish(self, number: int, m: np.ndarray, beta: np.ndarray, own, out: np.ndarray) -> np.ndarray:
        """Step 4: this party's share (n,) of the result."""
        kernels.active().finish_relu(number, m, beta, own.rho, own.extra, self.shift, out)
        return out

    def run(self, party: Party, tag: int, x: np.ndarray, own) -> np.ndarray:
        """Shares of max(x, 0) >> shift, of x's shape."""
        m, beta = self.compare(party, tag, x.reshape(-1), own)
        out = np.empty(self.padded, np.uint32)
        return self.finish(party.number, m, beta, own, out)[: self.count].reshape(x.shape)
