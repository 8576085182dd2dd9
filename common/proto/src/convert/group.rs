//! Words between a coordinator and the nodes of a group.

use super::task::{peaks_from_wire, peaks_to_wire};
use super::{at_most, job_from_wire, job_to_wire, present, shards_from_wire, shards_to_wire, shortened};
use crate::{WireError, wire};
use halfstep_work::{GroupAnswer, GroupOrder, LayerId, Round};

/// Bytes of a group's name.
const ID_MAX: usize = 4096;
/// Members of a group.
const SIZE_MAX: u32 = 1 << 16;

/// An order of one epoch.
impl From<(u64, GroupOrder)> for wire::GroupOrder {
    fn from((epoch, order): (u64, GroupOrder)) -> Self {
        use wire::group_order::Kind;
        let kind = match order {
            GroupOrder::Name => Kind::Name(wire::Empty {}),
            GroupOrder::Join { id, rank, size } => {
                Kind::Join(wire::JoinGroup { id: id.to_vec(), rank, size })
            }
            GroupOrder::Round(round) => Kind::Round(wire::GroupRound {
                job: job_to_wire(round.job),
                number: round.number,
                layer: round.layer.0,
                shards: shards_to_wire(&round.shards),
                peaks: peaks_to_wire(&round.peaks),
            }),
            GroupOrder::Leave => Kind::Leave(wire::Empty {}),
        };
        Self { epoch, kind: Some(kind) }
    }
}

impl TryFrom<wire::GroupOrder> for (u64, GroupOrder) {
    type Error = WireError;

    fn try_from(order: wire::GroupOrder) -> Result<Self, WireError> {
        use wire::group_order::Kind;
        let kind = match present(order.kind, "kind of a group's order")? {
            Kind::Name(_) => GroupOrder::Name,
            Kind::Join(join) => {
                at_most("name of a group, in bytes", join.id.len(), ID_MAX)?;
                if join.size > SIZE_MAX || join.rank >= join.size {
                    let problem = format!(
                        "expected less than the size, and that at most {SIZE_MAX}, found {} of {}",
                        join.rank, join.size
                    );
                    return Err(WireError::new("rank in a group", problem));
                }
                GroupOrder::Join { id: join.id.into(), rank: join.rank, size: join.size }
            }
            Kind::Round(round) => GroupOrder::Round(Round {
                job: job_from_wire(&round.job)?,
                number: round.number,
                layer: LayerId(round.layer),
                shards: shards_from_wire(round.shards)?,
                peaks: peaks_from_wire(round.peaks)?,
            }),
            Kind::Leave(_) => GroupOrder::Leave,
        };
        Ok((order.epoch, kind))
    }
}

/// An answer of one epoch.
impl From<(u64, GroupAnswer)> for wire::GroupAnswer {
    fn from((epoch, answer): (u64, GroupAnswer)) -> Self {
        use wire::group_answer::Kind;
        let kind = match answer {
            GroupAnswer::Named(id) => Kind::Named(id.to_vec()),
            GroupAnswer::Joined => Kind::Joined(wire::Empty {}),
            GroupAnswer::Added(number) => Kind::Added(number),
            GroupAnswer::Failed(why) => Kind::Failed(shortened(why)),
        };
        Self { epoch, kind: Some(kind) }
    }
}

impl TryFrom<wire::GroupAnswer> for (u64, GroupAnswer) {
    type Error = WireError;

    fn try_from(answer: wire::GroupAnswer) -> Result<Self, WireError> {
        use wire::group_answer::Kind;
        let kind = match present(answer.kind, "kind of a group's answer")? {
            Kind::Named(id) => {
                at_most("name of a group, in bytes", id.len(), ID_MAX)?;
                GroupAnswer::Named(id.into())
            }
            Kind::Joined(_) => GroupAnswer::Joined,
            Kind::Added(number) => GroupAnswer::Added(number),
            Kind::Failed(why) => GroupAnswer::Failed(shortened(why)),
        };
        Ok((answer.epoch, kind))
    }
}
