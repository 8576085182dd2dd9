//! Jobs on CUDA devices: the same roundings from any fleet, nearly those of the CPU; on machines without a device the host
//! pretends to be one.
//!
//! Not here: what devices compute (`compute`, `exec`, `solver`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]

#[path = "../../compute/tests/device/mod.rs"]
mod device;
mod support;

use halfstep_agent::cuda::Precision;
use halfstep_agent::{DeviceChoice, Devices};
use halfstep_model::Model;
use halfstep_work::SegmentId;
use support::{Fleet, Graph, Settings, Setup, alone, setup};

fn devices() -> Devices {
    Devices::open(&DeviceChoice::Cuda(vec![0]), Precision::Tf32).unwrap()
}

/// Two layers whose statistics are summed on a device, of one stream and of two, and one that is too narrow. The first and the
/// last have chunks that are worth a device too.
fn wide_model() -> Model {
    Graph::default()
        .input("x", &[None, Some(420)])
        .weight("w1", &[420, 9])
        .weight("w2", &[9, 400])
        .weight("w3", &[400, 8])
        .node("MatMul", &["x", "w1"], "a")
        .node("Relu", &["a"], "b")
        .node("MatMul", &["b", "w2"], "c")
        .node("Tanh", &["c"], "d")
        .node("MatMul", &["d", "w3"], "y")
        .output("y")
        .model()
}

fn job() -> Setup {
    let settings = Settings { shards: 3, samples_per_shard: 40, sample: vec![420], ..Settings::default() };
    setup(wide_model(), &settings)
}

#[test]
fn any_fleet_on_devices_gives_the_same_roundings_nearly_those_of_the_cpu() {
    let Some(device) = device::cuda() else { return };
    let free = || device.memory().unwrap().0;
    let (before, mut fleet) = (free(), Fleet::on(devices, job(), 1, 0));
    fleet.capture(SegmentId(0));
    fleet.accumulate(SegmentId(0));
    assert!(free() + 420 * 421 / 2 * 8 <= before, "the sums are not on the device");
    drop(fleet);
    let expected = Fleet::on(devices, job(), 1, 0).run();
    for (nodes, seed) in [(1, 1), (2, 2), (3, 3)] {
        let mut fleet = Fleet::on(devices, job(), nodes, seed);
        (fleet.drop_once_in, fleet.withhold_once_in) = (8, 3);
        assert!(fleet.run() == expected, "seed {seed}, {nodes} nodes");
    }
    let (mut same, mut all) = (0, 0);
    for ((chunk, found), (other, of_cpu)) in expected.iter().zip(&alone(job())) {
        assert_eq!(chunk, other);
        same += found.q.iter().zip(&of_cpu.q).filter(|(a, b)| a == b).count();
        all += found.q.len();
    }
    println!("{same} of {all} integers are those of the CPU");
    assert!(same * 100 >= all * 97, "{same} of {all} integers are those of the CPU");
}
