"""Correlated randomness without a crypto-provider: patient and provider make it themselves, ahead of a query.

    transfer      oblivious transfer: 128 by X25519, any number more by AES
    correlations  from those, what comparisons, truncations and the head need
    products      from BFV, shares of a convolution of the patient's mask with the provider's weights (compiled_ring)
    parties       the two sides of a session; online they do what they do with a crypto-provider

What there is to be made for one query of SqueezeNet-1.1 at 64 pixels:

    comparisons   236,000 elements, 30 transfers each (20 bits of r, rho, 8 mask bits; one back): 16 bytes a transfer to
                  the provider, 0.28 kilobytes an element of masked words back, 0.76 in all: 179 MB, 3 s of
                  processor time. Tables of 2^16 entries instead of four of 2^4 would be 65 kilobytes an element, and
                  gates of 31-bit adders on triples 1.5 kilobytes and 31 rounds.
    convolutions  21.5 million products, as 895 products of polynomials of 8192 coefficients; 193 ciphertexts to the
                  provider and 134 back, of 0.39 MB: 128 MB, 13 s of processor time, most of it in transforms (40 s
                  where numba cannot compile them).
                  By transfers, 32 bits of every mask with a word for every weight it meets, it would be 2.7 GB.

Semi-honest: both parties follow the protocol. What it rests on besides: ring-LWE, Diffie-Hellman on Curve25519, and AES
as an ideal cipher. An active patient could learn the provider's bits from inconsistent columns, or weights from a
ciphertext with noise of its own choice; an active provider, from whether a query succeeds, bits of the patient's key.
"""
