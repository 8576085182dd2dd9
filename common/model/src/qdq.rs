//! Writes rounded weights as integers behind DequantizeLinear.
