"""Writes layouts.json: packed matrices made from the formats' descriptions alone, one bit at a time, with numpy.

Run: python layouts.py > layouts.json

Element i of a stream occupies bits [i*b, i*b + b) counted from bit 0 of word 0, in 32-bit words.
compressed-tensors (pack-quantized): weights one stream per row; zero points one stream down the rows per group.
GPTQ: weights one stream down the inputs per output; zero points one stream along the outputs per group, less one in v1.
"""

import json
import sys

import numpy as np

ROWS, COLS, GROUP = 32, 64, 32


def stream(values, bits):
    """Bits of all fields in order, least significant first, cut into words."""
    fields = np.array([[(int(v) >> k) & 1 for k in range(bits)] for v in values], dtype=np.uint64).ravel()
    fields = np.concatenate([fields, np.zeros(-len(fields) % 32, dtype=np.uint64)])
    return (fields.reshape(-1, 32) << np.arange(32, dtype=np.uint64)).sum(axis=1)


def along(matrix, axis, bits):
    """Streams along an axis of a matrix of unsigned fields."""
    return np.apply_along_axis(stream, axis, matrix, bits)


def case(bits, symmetric):
    i = np.arange(ROWS * COLS)
    fields = ((i * i * 7 + i * 13 + bits) % 251 % 2**bits).reshape(ROWS, COLS)
    g = np.arange(ROWS * COLS // GROUP)
    zeros = 2 ** (bits - 1) + 0 * g if symmetric else (g * 5 + 3) % 2**bits
    zeros = np.where(zeros == 0, 1, zeros).reshape(ROWS, COLS // GROUP)
    words = lambda a: [int(w) for w in a.ravel()]
    return {
        "bits": bits,
        "symmetric": symmetric,
        "q": words(fields - 2 ** (bits - 1) if symmetric else fields),
        "zero_point": words(0 * zeros if symmetric else zeros),
        "compressed_weight": words(along(fields, 1, bits)),
        "compressed_zero_point": None if symmetric else words(along(zeros, 0, bits)),
        "gptq_weight": words(along(fields.T, 0, bits)),
        "gptq_zero_point_v1": words(along(zeros.T - 1, 1, bits)),
        "gptq_zero_point_v2": words(along(zeros.T, 1, bits)),
    }


cases = [case(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
json.dump({"rows": ROWS, "cols": COLS, "group_size": GROUP, "cases": cases}, sys.stdout, separators=(",", ":"))
