//! Descriptions of nodes.

use super::{NAME_MAX, amount, at_most};
use crate::{WireError, wire};
use halfstep_work::NodeDescription;

/// Tasks at once that a node may claim.
const SLOTS_MAX: u64 = 4096;

impl From<&NodeDescription> for wire::NodeDescription {
    fn from(node: &NodeDescription) -> Self {
        Self {
            name: node.name.clone(),
            slots: node.slots as u64,
            device: node.device.clone(),
            engine: node.engine.clone(),
            flops_per_second: node.flops_per_second,
            memory_bytes: node.memory_bytes,
            exchange: node.exchange.clone(),
        }
    }
}

impl TryFrom<wire::NodeDescription> for NodeDescription {
    type Error = WireError;

    fn try_from(node: wire::NodeDescription) -> Result<Self, WireError> {
        for (subject, text) in [
            ("name of a node, in bytes", &node.name),
            ("device of a node, in bytes", &node.device),
            ("engine of a node, in bytes", &node.engine),
            ("exchange of a node, in bytes", &node.exchange),
        ] {
            at_most(subject, text.len(), NAME_MAX)?;
        }
        let wrong =
            || WireError::new("slots of a node", format!("expected 1 to {SLOTS_MAX}, found {}", node.slots));
        let slots = usize::try_from(node.slots).map_err(|_| wrong())?;
        if !(1..=SLOTS_MAX).contains(&node.slots) {
            return Err(wrong());
        }
        Ok(Self {
            slots,
            flops_per_second: amount("speed of a node", node.flops_per_second)?,
            name: node.name,
            device: node.device,
            engine: node.engine,
            memory_bytes: node.memory_bytes,
            exchange: node.exchange,
        })
    }
}
