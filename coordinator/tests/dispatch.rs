//! The dispatch's rules, one by one, on a simulated fleet.

mod fleet;

use fleet::{Fleet, Shape, limits};
use halfstep_coordinator::dispatch::Outcome;
use halfstep_work::{Objective, Propagation, TaskPhase};

#[test]
fn one_node_walks_every_phase_in_order() {
    let mut fleet = Fleet::with_nodes(&Shape::new(2, 3), 1, 1);
    let mut phases = Vec::new();
    while fleet.dispatch.outcome() == Outcome::Running {
        let node = *fleet.nodes.keys().next().unwrap();
        phases.push(fleet.nodes[&node].hand[0].lease.task.phase());
        fleet.answer(node, 0, true);
    }
    use TaskPhase::{Accumulate as A, Capture as C, Reduce as R, Solve as S};
    assert_eq!(phases, [[C, C, C, A, A, A, R, R, S, S]; 2].concat());
    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
    assert_eq!(fleet.committed.len(), 4);
}

#[test]
fn any_number_of_nodes_does_every_task_once() {
    for propagation in [Propagation::Sequential, Propagation::Independent] {
        for objective in [Objective::Gram, Objective::Samples] {
            for ranges in [vec![4], vec![2, 2], vec![1, 2, 1]] {
                for nodes in [1, 2, 3, 5, 9] {
                    let forwards = (ranges.len() - 1) * 5;
                    let shape = Shape { ranges: ranges.clone(), propagation, objective, ..Shape::new(4, 5) };
                    let mut fleet = Fleet::with_nodes(&shape, nodes, 2);
                    assert_eq!(fleet.run(), forwards + 4 * (5 + 5 + 2 + 2), "{ranges:?}, {nodes} nodes");
                    assert_eq!(fleet.dispatch.outcome(), Outcome::Finished);
                    assert_eq!(fleet.dispatch.counts(), Default::default());
                    assert_eq!(limits().first_lease_id, 1 << 32);
                }
            }
        }
    }
}
