//! Which peers understand each other.

/// Peers of different protocols refuse each other.
pub const PROTOCOL: u32 = 1;

/// This build, as shown to people and named in refusals.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
