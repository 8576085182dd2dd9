//! Micro and system benchmarks.
