"""A session's BFV keys in TenSEAL, the parties that hold them, and ciphertexts made with them.

One hospital makes the Group and seals it for each of the others: they all hold the same secret key (the paper's
section 3.2), so one hospital and the server together read everything (register, row 6); ``masks`` shares no key.
A Group travels in two forms: ``server_bytes`` has no key, which is enough to add; ``hospital_bytes`` has the secret
key, and is always sealed.
"""

import hashlib
import hmac
import os
import struct

import numpy as np

from dopamine_lib.encryption.codec import LAYOUTS, SLOTS, Layout, find_layout
from dopamine_lib.encryption.messages import Header, MessageError
from dopamine_lib.errors import InputError, check_within, not_installed

try:
    import tenseal
except ModuleNotFoundError:  # said here for ranks and workers, too
    raise not_installed("tenseal") from None

#: The noise bound of ``make_group`` covers no more additions than this.
MAX_HOSPITALS = 1000
#: The class beneath tenseal.bfv_vector, which copies its list once more and takes twice as long.
BFVVector = tenseal._ts_cpp.BFVVector

_GROUP = struct.Struct("<8s16s16sBHI32s")
_MAGIC = b"DOPAKEY2"
_SUM = 16  # bytes of the checksum at the end
_NO_KEY = bytes(32)


class Group:
    """One session's BFV key and its use.

    session    16 bytes, new for each set of keys
    layout     the codec's layout
    hospitals  K, all that may take part
    d          number of values in an update
    key_id     16 bytes that name the key, in every message
    check_key  32 bytes for the hospitals' check sums; None at the server
    context    the TenSEAL context: with the secret key at a hospital, without any key at the server
    """

    def __init__(
        self,
        session: bytes,
        layout: Layout,
        hospitals: int,
        d: int,
        key_id: bytes,
        check_key: bytes | None,
        context: bytes,
    ):
        self.session, self.layout, self.hospitals, self.d = session, layout, hospitals, d
        self.key_id, self.check_key, self._with_keys = key_id, check_key, context
        self.context = tenseal.context_from(context, n_threads=1)
        # both forms are kept as bytes: a context that has been used serialises differently
        self._without_keys = self.context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
        )

    def __repr__(self) -> str:
        role = "hospital" if self.check_key else "server"
        return f"<Group {self.layout.name}, {self.hospitals} hospitals, d = {self.d}, {role}>"

    def server_bytes(self) -> bytes:
        """For the server: parameters and names, without any key."""
        return self._bytes(_NO_KEY, self._without_keys)

    def hospital_bytes(self) -> bytes:
        """For hospitals: everything, the secret key included, so only ever sent sealed."""
        if self.check_key is None:
            raise MessageError("the server has no secret key to hand on: ask a hospital")
        return self._bytes(self.check_key, self._with_keys)

    def header(self, kind: int, sender: int, round_number: int, check: int = 0) -> Header:
        """The header of a message of this session."""
        return Header(kind, self.layout.number, sender, round_number, self.session, self.key_id, self.d, check)

    def encrypt(self, slots: np.ndarray) -> bytes:
        """A ciphertext of up to 4096 slots (n,)."""
        return BFVVector(self.context.data, slots.tolist()).serialize()

    def ciphertext(self, data: bytes, size: int) -> BFVVector:
        """The ciphertext of ``size`` slots in ``data``, to add or decrypt. Raises MessageError for anything else."""
        try:
            vector = BFVVector(self.context.data, data)
        except (ValueError, RuntimeError):
            raise MessageError("a ciphertext cannot be read: it is damaged, or under other parameters") from None
        if vector.size() != size:
            raise MessageError(f"a ciphertext holds {vector.size()} values, but {size} belong there: it is refused")
        return vector

    def _bytes(self, check_key: bytes, context: bytes) -> bytes:
        head = (_MAGIC, self.session, self.key_id, self.layout.number, self.hospitals, self.d, check_key)
        return _summed(_GROUP.pack(*head) + context)


def make_group(layout: str, hospitals: int, d: int) -> Group:
    """New keys for K hospitals with updates of d values; the randomness is SEAL's and the operating system's.

    Decryption fails if the noise of K fresh ciphertexts, K * (21 + 1/2) at most in a coefficient, passes q / 2t.
    For "packed" and "wide" that bound is 2^11, which 95 hospitals never pass. 1,000 pass it in a coefficient with
    probability under 2^-160, by Hoeffding's inequality on the 42,000 fair bits whose sum is the noise.

    Raises InputError for a layout without encryption, K outside [2, 1000], or d outside [1, 2^31].
    """
    found = find_layout(layout)
    if found.plain_modulus is None:
        raise InputError(
            f"layout {layout!r} is for masks: take {', '.join(n for n in LAYOUTS if LAYOUTS[n].plain_modulus)}"
        )
    check_within("hospitals", hospitals, 2, MAX_HOSPITALS, "the noise bound covers no others", low_open=False)
    check_within("d", d, 1, 2**31, "it is the number of a model's parameters", low_open=False)
    context, check_key = _new_context(found), os.urandom(32)
    return Group(os.urandom(16), found, hospitals, d, _key_id(check_key, context), check_key, context)


def read_group(data: bytes) -> Group:
    """A Group from ``server_bytes`` or ``hospital_bytes``. Raises MessageError where they are damaged."""
    data, whole = data[:-_SUM], data
    if len(data) < _GROUP.size or data[: len(_MAGIC)] != _MAGIC or whole != _summed(data):
        raise MessageError(f"{len(data)} bytes are not keys of this kit: they were cut off or changed on the way")
    _, session, key_id, number, hospitals, d, check_key = _GROUP.unpack_from(data)
    context = data[_GROUP.size :]
    if check_key == _NO_KEY:
        check_key = None
    elif not hmac.compare_digest(_key_id(check_key, context), key_id):
        raise MessageError("a secret key does not fit its name: it was changed on the way")
    layout = next((layout for layout in LAYOUTS.values() if layout.number == number), None)
    try:
        if layout is None:
            raise ValueError(number)
        return Group(session, layout, hospitals, d, key_id, check_key, context)
    except (ValueError, RuntimeError):
        raise MessageError("keys cannot be read: they were changed on the way, or made by another version") from None


def _new_context(layout: Layout) -> bytes:
    kind = tenseal.ENCRYPTION_TYPE
    context = tenseal.context(
        tenseal.SCHEME_TYPE.BFV,
        SLOTS,
        plain_modulus=layout.plain_modulus,
        coeff_mod_bit_sizes=list(layout.modulus_bits),
        encryption_type=kind.ASYMMETRIC if layout.public_key else kind.SYMMETRIC,
        n_threads=1,
    )
    return context.serialize(
        save_public_key=layout.public_key, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )


def _summed(data: bytes) -> bytes:
    """Keys with a checksum behind them: the server, which cannot check their name, would find no damage otherwise."""
    return data + hashlib.blake2b(data, digest_size=_SUM).digest()


def _key_id(check_key: bytes, context: bytes) -> bytes:
    return hashlib.blake2b(b"dopamine key " + context, key=check_key, digest_size=16).digest()
