"""The inner loops of ``kernels``, compiled by numba: the same functions, the same bits, several times faster.

numba widens sums of uint32 to uint64, hence the casts. It compiles them for these types only, on import, in memory.
"""

import numpy as np
from numba import int64, njit, uint8, uint16, uint32, uint64, void

_U = np.uint32
_ROW, _ROWS = uint32[::1], uint32[:, ::1]
_TILE = 512  # columns whose sums stay in the first-level cache


@njit(void(_ROWS, _ROWS, _ROWS))
def multiply(w, x, out):
    """Blocks of four rows of w and four of x: sixteen products for every sum loaded and stored."""
    rows, depth = w.shape
    columns = x.shape[1]
    sum_0, sum_1, sum_2, sum_3 = np.empty(_TILE, _U), np.empty(_TILE, _U), np.empty(_TILE, _U), np.empty(_TILE, _U)
    for start in range(0, columns, _TILE):
        n = min(_TILE, columns - start)
        for i_0 in range(0, rows, 4):
            # beyond the last row, the last row is done again, with the same result
            i_1, i_2, i_3 = min(i_0 + 1, rows - 1), min(i_0 + 2, rows - 1), min(i_0 + 3, rows - 1)
            for j in range(n):
                sum_0[j], sum_1[j], sum_2[j], sum_3[j] = 0, 0, 0, 0
            for k in range(0, depth - 3, 4):
                x_0, x_1, x_2, x_3 = x[k, start:], x[k + 1, start:], x[k + 2, start:], x[k + 3, start:]
                a_0, a_1, a_2, a_3 = w[i_0, k], w[i_0, k + 1], w[i_0, k + 2], w[i_0, k + 3]
                b_0, b_1, b_2, b_3 = w[i_1, k], w[i_1, k + 1], w[i_1, k + 2], w[i_1, k + 3]
                c_0, c_1, c_2, c_3 = w[i_2, k], w[i_2, k + 1], w[i_2, k + 2], w[i_2, k + 3]
                d_0, d_1, d_2, d_3 = w[i_3, k], w[i_3, k + 1], w[i_3, k + 2], w[i_3, k + 3]
                for j in range(n):
                    p, q, r, s = x_0[j], x_1[j], x_2[j], x_3[j]
                    sum_0[j] = _U(sum_0[j] + a_0 * p + a_1 * q + a_2 * r + a_3 * s)
                    sum_1[j] = _U(sum_1[j] + b_0 * p + b_1 * q + b_2 * r + b_3 * s)
                    sum_2[j] = _U(sum_2[j] + c_0 * p + c_1 * q + c_2 * r + c_3 * s)
                    sum_3[j] = _U(sum_3[j] + d_0 * p + d_1 * q + d_2 * r + d_3 * s)
            for k in range(depth - depth % 4, depth):
                x_0, a_0, b_0, c_0, d_0 = x[k, start:], w[i_0, k], w[i_1, k], w[i_2, k], w[i_3, k]
                for j in range(n):
                    p = x_0[j]
                    sum_0[j] = _U(sum_0[j] + a_0 * p)
                    sum_1[j] = _U(sum_1[j] + b_0 * p)
                    sum_2[j] = _U(sum_2[j] + c_0 * p)
                    sum_3[j] = _U(sum_3[j] + d_0 * p)
            for j in range(n):
                out[i_0, start + j], out[i_1, start + j] = sum_0[j], sum_1[j]
                out[i_2, start + j], out[i_3, start + j] = sum_2[j], sum_3[j]


@njit(uint64(uint64))
def _transposed(x):
    """An 8 x 8 matrix of bits, rows and columns exchanged: single bits, then pairs, then fours are swapped."""
    t = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
    x ^= t ^ (t << np.uint64(7))
    t = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
    x ^= t ^ (t << np.uint64(14))
    t = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
    return x ^ t ^ (t << np.uint64(28))


@njit(void(_ROW, uint16[:, ::1], uint8[:, ::1]))
def look_up(m, thermometer, planes):
    """Seven bits an element into one byte, then eight bytes turned into one byte of each plane."""
    block = np.empty(_TILE, np.uint8)
    bytes_of = block.view(np.uint64)
    for start in range(0, len(m), _TILE):
        # slices: a sum of two indices might be negative, as far as the compiler knows
        n, here, t_0, t_1 = min(_TILE, len(m) - start), m[start:], thermometer[0, start:], thermometer[1, start:]
        t_2, t_3 = thermometer[2, start:], thermometer[3, start:]
        for j in range(n):
            x = here[j]
            w_0 = _U(t_0[j] >> (x >> 15 & 15))
            w_1 = _U(t_1[j] >> (x >> 19 & 15))
            w_2 = _U(t_2[j] >> (x >> 23 & 15))
            w_3 = _U(t_3[j] >> (x >> 27 & 15))
            # bit 1 of a word is [m < r] of its nibble, bit 0 is [m <= r]; both together give [m = r]
            bits = w_0 >> 1 & 1
            bits |= (w_1 & 1 ^ w_1 >> 1 & 1) << 1 | (w_1 & 2) << 1
            bits |= (w_2 & 1 ^ w_2 >> 1 & 1) << 3 | (w_2 & 2) << 3
            bits |= (w_3 & 1 ^ w_3 >> 1 & 1) << 5 | (w_3 & 2) << 5
            block[j] = np.uint8(bits)
        for k in range(n // 8):
            bytes_of[k] = _transposed(bytes_of[k])
        for p in range(7):
            for k in range(n // 8):
                planes[p, start // 8 + k] = block[8 * k + p]


@njit(void(int64, _ROW, uint16[:, ::1], _ROW, uint8[:, ::1], uint8[::1]))
def look_up_end(number, m, thermometer, rho, planes, rest):
    """As ``look_up``, three bits an element."""
    block = np.empty(_TILE, np.uint8)
    bytes_of = block.view(np.uint64)
    own = _U(1 - number)
    for start in range(0, len(m), _TILE):
        n, here, its_rho = min(_TILE, len(m) - start), m[start:], rho[start:]
        t_2, t_3 = thermometer[0, start:], thermometer[1, start:]
        for j in range(n):
            x = _U(here[j] + _U(2**30))
            w_2 = _U(t_2[j] >> (x >> 23 & 15))
            w_3 = _U(t_3[j] >> (x >> 27 & 15))
            bits = (w_3 ^ w_3 >> 1) & 1 | w_2 & 2
            block[j] = np.uint8(bits | ((w_3 >> 1 ^ its_rho[j] ^ (x >> 31) * own) & 1) << 2)
        for k in range(n // 8):
            bytes_of[k] = _transposed(bytes_of[k])
            planes[0, start // 8 + k] = block[8 * k]
            planes[1, start // 8 + k] = block[8 * k + 1]
            rest[start // 8 + k] = block[8 * k + 2]


@njit(void(int64, _ROW, uint8[::1], _ROW, _ROWS, uint16[:, ::1], int64, _ROW))
def finish_relu(number, m, beta, rho, extra, tops, shift, out):
    """Step 5 of ``relu``."""
    products, words, products_of_top, top = extra[0], extra[1], tops[0], tops[1]
    two, by, rest = _U(2 - number), _U(shift), _U(31 - shift)
    for i in range(len(m)):
        # all bits of a word or none: a branch for every element would be guessed wrongly every other time
        chosen, clear = _U(_U(0) - _U(beta[i])), _U((m[i] >> _U(31)) - _U(1))
        selected = _U((rho[i] ^ chosen) + (two & chosen))  # rho, or one minus rho
        product = _U(products[i] + (_U(_U(_U(products_of_top[i]) << rest) << _U(1)) & clear))
        s = _U(words[i] + (_U(_U(_U(top[i]) << rest) << _U(1)) & clear))
        out[i] = _U(_U(m[i] >> by) * selected) + (product ^ (product ^ _U(s - product)) & chosen)


@njit(void(_ROW, uint32, _ROW, uint16[::1], uint8[::1]))
def pack_masked(x, rest, r, lower, upper):
    """The upper 20 bits of each element."""
    half, by = len(upper), _U(12)
    for i in range(len(x)):
        lower[i] = np.uint16(_U(_U(x[i] + rest) >> by) + (r[i] >> by))
    for i in range(len(x), len(r)):
        lower[i] = np.uint16(r[i] >> by)
    r_1, x_1 = r[half:], x[half:]
    for i in range(len(x_1)):
        four_0, four_1 = _U(_U(x[i] + rest) >> by) + (r[i] >> by), _U(_U(x_1[i] + rest) >> by) + (r_1[i] >> by)
        upper[i] = np.uint8(four_0 >> 16 & 15 | (four_1 >> 16 & 15) << 4)
    for i in range(len(x_1), half):
        four_0 = (_U(_U(x[i] + rest) >> by) if i < len(x) else _U(0)) + (r[i] >> by)
        upper[i] = np.uint8(four_0 >> 16 & 15 | (r_1[i] >> 28) << 4)


@njit(void(uint16[::1], uint8[::1], uint16[::1], uint8[::1], _ROW))
def open_upper(lower_0, upper_0, lower_1, upper_1, m):
    """The sum of what both parties packed."""
    half = len(upper_0)
    for i in range(half):
        m[i] = _U(_U(lower_0[i]) + _U(lower_1[i])) << _U(12)
        m[half + i] = _U(_U(lower_0[half + i]) + _U(lower_1[half + i])) << _U(12)
    for i in range(half):
        m[i] = _U(m[i] + (_U(_U(upper_0[i]) + _U(upper_1[i])) << _U(28)))
        m[half + i] = _U(m[half + i] + (_U(_U(upper_0[i] >> 4) + _U(upper_1[i] >> 4)) << _U(28)))


@njit(void(int64, _ROW, _ROW, uint8[::1], _ROW, _ROW, _ROW, int64, _ROW))
def finish_maximum(number, b, m, beta, r, rho, rho_r, coarse, out):
    """Step 4 of ``pooling``."""
    one, by = _U(1 - number), _U(coarse)
    for i in range(len(b)):
        selected = _U(one - rho[i]) if beta[i] else rho[i]
        masked = _U((r[i] >> by << by) - rho_r[i]) if beta[i] else rho_r[i]
        out[i] = _U(b[i] + _U(m[i] * selected)) - masked


@njit(void(_ROW, _ROW, uint8[::1], uint16[:, ::1], _ROW, _ROW, uint8[::1], uint16[:, ::1], _ROW, int64))
def deal_comparison(r_0, r_1, sigma, thermometer_0, rho_0, r, rho, thermometer, rho_1, coarse):
    """What the crypto-provider deals for ``comparison``."""
    less = _U(coarse)
    for i in range(len(r)):
        x = _U(_U((r_0[i] >> less) + (r_1[i] >> less)) << less)
        bit = _U(x >> _U(31)) ^ _U(sigma[i])
        r[i], rho[i], rho_1[i] = x, np.uint8(bit), _U(bit - rho_0[i])
    for k in range(4):
        before, after, by = thermometer_0[k], thermometer[k], _U(15 + 4 * k)
        for i in range(len(r)):
            after[i] = before[i] ^ np.uint16(_U(_U(2) << (_U(r[i] >> by) & _U(15))) - _U(1))


@njit(void(_ROW, uint8[::1], int64, _ROWS, uint16[:, ::1], _ROWS, uint16[:, ::1]))
def deal_relu(r, rho, shift, extra_0, tops_0, extra, tops):
    """What it deals on top for a ReLU."""
    by = _U(shift)
    for i in range(len(r)):
        s, top = _U(_U(0) - _U(r[i] >> by)), np.uint16(r[i] >> _U(31))
        extra[0, i], extra[1, i] = _U(s * rho[i] - extra_0[0, i]), _U(s - extra_0[1, i])
        tops[0, i], tops[1, i] = np.uint16(top * rho[i] - tops_0[0, i]), np.uint16(top - tops_0[1, i])


@njit(void(_ROW, uint8[::1], _ROW, _ROW))
def deal_maximum(r, rho, rho_r_0, rho_r):
    """What it deals on top for a maximum."""
    for i in range(len(r)):
        rho_r[i] = _U((r[i] if rho[i] else _U(0)) - rho_r_0[i])
