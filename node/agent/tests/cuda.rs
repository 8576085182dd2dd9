//! Jobs on CUDA devices: the same roundings from any fleet, as good as the CPU's; on machines without a device the host
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
use halfstep_work::{LayerId, SegmentId};
use support::{Fleet, Graph, Roundings, Settings, Setup, alone, setup};

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
fn any_fleet_on_devices_gives_the_same_roundings_as_good_as_the_cpus() {
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
    // Bits differ between kinds of devices, and so may which of several near optima is found; how good they are may not.
    let of_cpu = alone(job());
    for ((chunk, found), (other, on_cpu)) in expected.iter().zip(&of_cpu) {
        assert_eq!(chunk, other);
        let (found, on_cpu) = (&found.report, &on_cpu.report);
        let nearest = found.objective_nearest / on_cpu.objective_nearest;
        println!("{chunk:?}: nearest {nearest} of the CPU's");
        // Behind the first layer nearest rounding has other inputs: those that other optima leave.
        assert!(chunk.0 != LayerId(0) || (nearest - 1.0).abs() < 1e-2, "{chunk:?}: nearest {nearest}");
        assert!(found.objective <= found.objective_nearest, "{chunk:?}");
    }
    let total = |all: &Roundings| all.values().map(|found| found.report.objective).sum::<f64>();
    let ratio = total(&expected) / total(&of_cpu);
    println!("objective {ratio} of the CPU's");
    assert!((0.95..1.05).contains(&ratio), "objective {ratio} of the CPU's");
}
