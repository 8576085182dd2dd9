//! Runs segments, taps layer inputs, accumulates statistics, holds carries.
