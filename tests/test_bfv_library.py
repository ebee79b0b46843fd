"""The textbook BFV against the library used in training: SEAL's own keys and ciphertexts, and TenSEAL's sums."""

import numpy as np
import pytest
import tenseal
import tenseal.sealapi as seal

from dopamine_lib.encryption.bfv import Bfv, Parameters, SecretKey, paper_parameters
from dopamine_lib.encryption.encoding import Batching
from dopamine_lib.encryption.sampling import ERROR_BITS

PARAMETERS = paper_parameters()


@pytest.fixture(scope="module")
def textbook():
    """Randomness from the operating system, ten hospitals' slots and their ciphertexts."""
    scheme, batching = Bfv(PARAMETERS), Batching(PARAMETERS.n, PARAMETERS.t)
    secret = scheme.secret_key()
    slots = np.random.default_rng(4).integers(-20480, 20481, (10, PARAMETERS.n))
    return scheme, secret, batching, slots, scheme.encrypt(scheme.public_key(secret), batching.encode(slots))


class Seal:
    """SEAL with the textbook's own primes, through TenSEAL; its last prime is set aside for key switching."""

    def __init__(self, parameters):
        self.n = parameters.n
        settings = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        settings.set_poly_modulus_degree(parameters.n)
        settings.set_plain_modulus(parameters.t)
        settings.set_coeff_modulus([seal.Modulus(p) for p in parameters.primes])
        self.context = seal.SEALContext(settings, True, seal.SEC_LEVEL_TYPE.TC128)
        assert self.context.parameters_set()
        keys = seal.KeyGenerator(self.context)
        self.secret_key, self.public_key = keys.secret_key(), seal.PublicKey()
        keys.create_public_key(self.public_key)
        self.encoder = seal.BatchEncoder(self.context)
        self.decryptor = seal.Decryptor(self.context, self.secret_key)

    def numbers(self, thing, parts, rows):
        return np.array([thing[i] for i in range(parts * rows * self.n)]).reshape(parts, rows, self.n)

    def encrypt(self, slots):
        plaintext, ciphertext = seal.Plaintext(), seal.Ciphertext(self.context)
        self.encoder.encode(slots.tolist(), plaintext)
        seal.Encryptor(self.context, self.public_key).encrypt(plaintext, ciphertext)
        return ciphertext


def test_seals_keys_and_ciphertexts_are_the_textbooks(textbook):
    """The textbook opens SEAL's ciphertext with SEAL's secret key, and encrypts to its public key: Eqs. 4 to 6."""
    parameters, slots = PARAMETERS, textbook[3][0]
    library, ring = Seal(parameters), parameters.ring
    s = ring.inverse(library.numbers(library.secret_key.data(), 1, 4)[0])  # SEAL keeps keys transformed
    p0, p1 = (ring.inverse(part) for part in library.numbers(library.public_key.data(), 2, 4))
    minus_e = ring.lift(ring.add(p0, ring.multiply(p1, s)))
    assert set(ring.lift(s)) == {-1, 0, 1} and np.abs(minus_e).max() <= ERROR_BITS

    scheme, secret = Bfv(Parameters(4096, 40961, parameters.primes[:-1])), SecretKey(s[:-1])
    batching, theirs = Batching(4096, 40961), library.encrypt(slots)
    ciphertext = tuple(library.numbers(theirs, 2, 3))
    assert np.array_equal(batching.decode(scheme.decrypt(secret, ciphertext)), slots)
    counted = library.decryptor.invariant_noise_budget(theirs)  # from the bit lengths of q and of the noise
    assert abs(scheme.noise_budget(secret, ciphertext) - counted) <= 1
    ours = scheme.encrypt((p0[:-1], p1[:-1]), batching.encode(slots))
    assert np.array_equal(batching.decode(scheme.decrypt(secret, ours)), slots)


def test_sums_are_tenseals_slot_for_slot(textbook):
    scheme, secret, batching, slots, ciphertexts = textbook
    context = tenseal.context(tenseal.SCHEME_TYPE.BFV, 4096, 40961)
    total = tenseal.bfv_vector(context, slots[0].tolist())
    for values in slots[1:]:
        total = total + tenseal.bfv_vector(context, values.tolist())
    assert batching.decode(scheme.decrypt(secret, scheme.total(ciphertexts))).tolist() == total.decrypt()
