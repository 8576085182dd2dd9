//! Devices behind one interface; the CPU reference.
