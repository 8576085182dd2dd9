//! Grids, encodings, range estimators, integer packing and metrics; pure.
