"""Writes the golden inputs of tests/goldens.rs: what numpy's legacy generator gives for seed 0.

`python make.py` next to this file. The expected values are AIMET's own test assertions, quoted in the test.
"""

import pathlib

import numpy as np

here = pathlib.Path(__file__).parent


def write(name, values):
    """One value per line, with the digits that bring an f64 back exactly."""
    (here / name).write_text("".join(f"{value!r}\n" for value in map(float, values.ravel())))


np.random.seed(0)
write("rand_1x3x12x12.txt", np.random.rand(1, 3, 12, 12))
np.random.seed(0)
write("rand_32x3x12x12_first.txt", np.random.rand(32, 3, 12, 12)[:1, :1, :1, :4])
