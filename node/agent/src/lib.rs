//! The node: executes leased tasks against its carries and statistics.
