//! A whole job by the coordinator's `Dispatch` and one node, by plain calls: no services, no files, every task in view.
#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test may stop")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, mpsc};

use bytes::Bytes;
use halfstep_agent::LocalNode;
use halfstep_coordinator::dataset::Dataset;
use halfstep_coordinator::dispatch::{Action, Dispatch, Limits, News, Outcome as Ended};
use halfstep_coordinator::{CoordinatorError, Outcome, PlanSource, Prepared, Roundings};
use halfstep_work::{
    ChunkId, Cost, Done, Failure, FailureClass, Grant, Holding, InputTensor, Inventory, LayerId, Node,
    NodeId, Plan, Receipt, Rounding, ShardId, Source, SourceError, Unwatched, Wanted,
};

const NODE: NodeId = NodeId(0);
const LIMITS: Limits = Limits {
    heartbeat_ms: 1_000,
    lease_ms: u64::MAX,
    hung_ms: u64::MAX,
    no_nodes_ms: u64::MAX,
    first_lease_id: 1,
    speculate: false,
};

struct Here {
    planned: PlanSource,
    committed: Mutex<Committed>,
}

impl Source for Here {
    fn program(&self) -> Result<Bytes, SourceError> {
        self.planned.program()
    }

    fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        self.planned.constant(name)
    }

    fn inputs(&self, shard: ShardId) -> Result<Vec<InputTensor>, SourceError> {
        self.planned.inputs(shard)
    }

    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Arc<Rounding>>, SourceError> {
        let committed = self.committed.lock().unwrap();
        if committed.outcome.given_up.contains_key(&layer) {
            return Ok(None);
        }
        let found = committed.roundings.get(&(layer, chunk)).cloned();
        found
            .map(Some)
            .ok_or_else(|| SourceError::new(FailureClass::PeerLost, format!("{layer} {chunk}: not yet")))
    }

    fn held(&self, holder: &Holding, _: &Wanted) -> Result<Bytes, SourceError> {
        Err(SourceError::new(FailureClass::PeerLost, format!("{}: there is one node", holder.address)))
    }
}

/// What is committed, integers included.
#[derive(Default)]
pub struct Committed {
    pub outcome: Outcome,
    roundings: BTreeMap<(LayerId, ChunkId), Arc<Rounding>>,
}

impl Roundings for Committed {
    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Arc<Rounding>, CoordinatorError> {
        Ok(Arc::clone(&self.roundings[&(layer, chunk)]))
    }
}

/// Runs the whole plan; as many tasks at once as the node has slots.
pub fn drive(prepared: &Prepared, dataset: Dataset, node: &LocalNode) -> Committed {
    let plan: Arc<Plan> = Arc::new(prepared.plan.clone());
    let planned = PlanSource::new(Arc::clone(&plan), Arc::clone(&prepared.subject), dataset);
    let here = Arc::new(Here { planned, committed: Mutex::default() });
    node.open(Arc::clone(&plan), Arc::clone(&here) as Arc<dyn Source>).unwrap();
    let mut dispatch = Dispatch::new(plan, LIMITS, Vec::new(), BTreeMap::new());
    dispatch.join(NODE, &node.describe(), "here", Inventory::default(), 0);
    while dispatch.outcome() == Ended::Running {
        let grants = follow(&mut dispatch, &here, node);
        assert!(!grants.is_empty(), "nothing to do, yet not finished: {:?}", dispatch.explain(0));
        // Verdicts come while others still work: products wait for theirs, and may keep memory that another wants.
        let (done, finished) = mpsc::channel();
        std::thread::scope(|scope| {
            for grant in &grants {
                let done = done.clone();
                scope.spawn(move || done.send((grant, node.execute(grant, &Unwatched))));
            }
            drop(done);
            for (grant, result) in finished {
                settle(&mut dispatch, &here, node, grant, result);
            }
        });
    }
    follow(&mut dispatch, &here, node);
    assert_eq!(dispatch.outcome(), Ended::Finished);
    std::mem::take(&mut *here.committed.lock().unwrap())
}

fn follow(dispatch: &mut Dispatch, here: &Here, node: &LocalNode) -> Vec<Grant> {
    let mut grants = Vec::new();
    for action in dispatch.actions() {
        match action {
            Action::Grant { grant, .. } => grants.push(grant),
            Action::DropSums { segment, .. } => node.drop_sums(segment),
            Action::News(News::Failed { layer, failure }) => {
                here.committed.lock().unwrap().outcome.given_up.insert(layer, failure);
            }
            Action::Revoke { .. } | Action::TakeOver { .. } | Action::News(_) => {}
        }
    }
    grants
}

/// As the service does: a rounding is there for everybody before the state machine learns of it.
fn settle(
    dispatch: &mut Dispatch,
    here: &Here,
    node: &LocalNode,
    grant: &Grant,
    result: Result<(Done, Cost), Failure>,
) {
    let lease = &grant.lease;
    match result {
        Ok((done, cost)) => {
            if let Done::Solved(rounding) = &done {
                let key = (rounding.layer, rounding.chunk);
                let mut committed = here.committed.lock().unwrap();
                committed.outcome.receipts.insert(key, Receipt::of(rounding));
                committed.roundings.insert(key, Arc::clone(rounding));
            }
            let verdict = dispatch.complete(NODE, lease.id, lease.attempt, done, cost, 0);
            node.settle(lease.id, verdict);
        }
        Err(failure) => dispatch.fail(NODE, lease.id, failure, 0),
    }
}
