//! Golden decoders on a CUDA device against the CPU; on machines without one the host pretends to be one.
//!
//! `HALFSTEP_CUDA_LIBRARIES` names folders of CUDA's libraries, as for the binary. Not here: single operators
//! (`halfstep_compute`, `tests/cuda_decoder.rs`).
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]
#![expect(clippy::unwrap_used, reason = "a test may stop")]

mod decoders;
#[path = "../../compute/tests/device/mod.rs"]
mod device;

use decoders::{Golden, RELATIVE_ERROR_MAX, cases, folder, open, relative_error};
use halfstep_compute::Host;
use halfstep_compute::cuda::{CudaPlace, Precision};
use halfstep_compute::decoder::Place;
use halfstep_exec::{
    Carried, CarryKey, CarryStore, DecoderSession, ExecError, Session, Stream, without_kernel,
};
use halfstep_model::decoder::{CarryPrecision, DescribeOptions, LOGITS, Op, TOKENS};
use halfstep_model::{Data, Tensor, cut};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Largest relative error of a tensor where products read factors of 11 bits (bfloat16 has 8: eight times that): of the first product 2^-11 at most, and more
/// behind softmaxes and further layers.
const ROUGH_ERROR_MAX: f64 = 2e-2;

/// The first device, or why there is none.
fn place(precision: Precision) -> Option<Arc<CudaPlace>> {
    let place = CudaPlace::new([&device::cuda_of(precision)?]).unwrap();
    place.let_stay((1, 4)).unwrap();
    Some(Arc::new(place))
}

fn session<P: Place>(place: &Arc<P>, golden: &Golden, nodes: &[usize]) -> DecoderSession<P> {
    session_of(place, golden, nodes, CarryPrecision::F32)
}

fn session_of<P: Place>(
    place: &Arc<P>,
    golden: &Golden,
    nodes: &[usize],
    factors: CarryPrecision,
) -> DecoderSession<P> {
    let mut constants =
        |name: &str| -> Result<Tensor, ExecError> { Ok(golden.checkpoint.tensor(name).unwrap()) };
    DecoderSession::load_at(Arc::clone(place), &golden.decoder, nodes, factors, &mut constants).unwrap()
}

fn all_nodes(golden: &Golden) -> Vec<usize> {
    (0..golden.decoder.nodes.len()).collect()
}

fn goldens() -> impl Iterator<Item = Golden> {
    let all = cases().into_iter().map(|case| open(&case, DescribeOptions::default()));
    all.filter(|golden| without_kernel(&golden.decoder).is_none())
}

/// Every f32 tensor that the decoder writes, in order.
fn written(golden: &Golden) -> Vec<&str> {
    let outputs = golden.decoder.nodes.iter().map(|node| node.outputs[0].as_str());
    outputs.collect()
}

fn has_router(golden: &Golden) -> bool {
    golden.decoder.nodes.iter().any(|node| matches!(node.op, Op::Route(_)))
}

#[test]
fn every_tensor_of_every_family_is_the_cpus_and_logits_are_those_of_transformers() {
    let Some(cuda) = place(Precision::F32) else { return };
    let (host, mut wrong, mut seen) = (Arc::new(Host::default()), Vec::new(), 0);
    for golden in goldens() {
        let (nodes, names) = (all_nodes(&golden), written(&golden));
        let inputs = [(TOKENS, &golden.tokens)];
        let ours = session(&cuda, &golden, &nodes).run(&inputs, &names).unwrap();
        let theirs = session(&host, &golden, &nodes).run(&inputs, &names).unwrap();
        let mut largest = 0f64;
        for ((name, ours), theirs) in names.iter().zip(&ours).zip(&theirs) {
            let subject = format!("{}: {name}", golden.name);
            let mut error = relative_error(ours, theirs, &subject);
            if let Some(expected) = golden.expected.get(*name) {
                error = error.max(relative_error(ours, expected, &subject));
                seen += 1;
            }
            largest = if error.is_nan() { f64::INFINITY } else { largest.max(error) };
            if error.is_nan() || error >= RELATIVE_ERROR_MAX {
                wrong.push(format!("{subject}: relative error {error:.1e}"));
            }
        }
        println!("{}: {} tensors, largest relative error {largest:.1e}", golden.name, names.len());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 200, "{seen} tensors of goldens");
}

#[test]
fn products_of_rough_factors_stay_near() {
    let Some(cuda) = place(Precision::Tf32) else { return };
    for (factors, most) in
        [(CarryPrecision::F32, ROUGH_ERROR_MAX), (CarryPrecision::Bf16, 8.0 * ROUGH_ERROR_MAX)]
    {
        for golden in goldens().filter(|golden| !has_router(golden)) {
            let session = session_of(&cuda, &golden, &all_nodes(&golden), factors);
            let ours = session.run(&[(TOKENS, &golden.tokens)], &[LOGITS]).unwrap();
            let error = relative_error(&ours[0], &golden.expected[LOGITS], &golden.name);
            println!("{}, {factors:?}: relative error of the logits {error:.1e}", golden.name);
            assert!(error < most, "{}, {factors:?}: {error:.1e}", golden.name);
        }
    }
}

/// Experts that get every token, and a choice that was given, as on the CPU.
#[test]
fn experts_with_all_tokens_or_a_given_choice_are_the_cpus() {
    let Some(cuda) = place(Precision::F32) else { return };
    let host = Arc::new(Host::default());
    for all in [false, true] {
        for name in ["mixtral", "qwen3_moe"] {
            let golden = open(&folder().join(name), DescribeOptions { calibrate_all_experts: all });
            let router = golden.decoder.nodes.iter().find(|node| matches!(node.op, Op::Route(_))).unwrap();
            let chosen = router.outputs[0].as_str();
            let experts = match &router.op {
                Op::Route(route) => route.experts,
                _ => unreachable!(),
            };
            let tokens = golden.tokens.as_i64().unwrap().iter().filter(|id| **id >= 0).count();
            // Everything to the last expert.
            let last = (0..tokens * experts).map(|i| f32::from(u8::from(i % experts == experts - 1)));
            let last = Tensor::f32(vec![tokens, experts], last.collect()).unwrap();
            for inputs in [vec![(TOKENS, &golden.tokens)], vec![(TOKENS, &golden.tokens), (chosen, &last)]] {
                let names = written(&golden);
                let nodes = all_nodes(&golden);
                let ours = session(&cuda, &golden, &nodes).run(&inputs, &names).unwrap();
                let theirs = session(&host, &golden, &nodes).run(&inputs, &names).unwrap();
                for ((name, ours), theirs) in names.iter().zip(&ours).zip(&theirs) {
                    let subject = format!("{}, all {all}, {} given: {name}", golden.name, inputs.len());
                    let error = relative_error(ours, theirs, &subject);
                    assert!(error < RELATIVE_ERROR_MAX, "{subject}: {error:.1e}");
                }
            }
        }
    }
}

#[test]
fn segments_one_after_the_other_compute_the_same_bits_as_the_whole() {
    let Some(cuda) = place(Precision::Tf32) else { return };
    for golden in goldens() {
        let (layers, _) = golden.decoder.layers();
        let cut = cut(&golden.decoder, &layers, &vec![true; layers.len()]).unwrap();
        let whole = session(&cuda, &golden, &all_nodes(&golden));
        let mut carry = BTreeMap::from([(TOKENS.to_owned(), golden.tokens.clone())]);
        for segment in &cut.segments {
            let inputs: Vec<(&str, &Tensor)> =
                segment.inputs.iter().map(|name| (name.as_str(), &carry[name])).collect();
            let names: Vec<&str> = segment.outputs.iter().map(String::as_str).collect();
            let outputs = session(&cuda, &golden, &segment.nodes).run(&inputs, &names).unwrap();
            let expected = whole.run(&[(TOKENS, &golden.tokens)], &names).unwrap();
            for ((name, ours), theirs) in names.iter().zip(outputs).zip(expected) {
                assert!(ours.data == theirs.data, "{}: {name}", golden.name);
                carry.insert((*name).to_owned(), ours);
            }
            carry.retain(|name, _| segment.live_after.contains(name));
        }
    }
}

/// A session that leaves it to the host to round, pack and unpack what is carried.
struct Plain<'a>(&'a dyn Session);

impl Session for Plain<'_> {
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError> {
        self.0.run(inputs, outputs)
    }
}

fn carries_as_the_host_would<P: Place>(place: &Arc<P>, golden: &Golden, precision: CarryPrecision) {
    let (layers, _) = golden.decoder.layers();
    let cut = cut(&golden.decoder, &layers, &vec![true; layers.len()]).unwrap();
    let mut carry = BTreeMap::from([(TOKENS.to_owned(), Carried::Whole(Arc::new(golden.tokens.clone())))]);
    for segment in &cut.segments {
        let inputs: Vec<(&str, &Carried)> =
            segment.inputs.iter().map(|name| (name.as_str(), &carry[name])).collect();
        // The last twice: it is read again after it was asked for.
        let names: Vec<&str> =
            segment.outputs.iter().chain(segment.outputs.last()).map(String::as_str).collect();
        let session = session(place, golden, &segment.nodes);
        let ours = session.run_carried(&inputs, &names, precision).unwrap();
        let theirs = Plain(&session).run_carried(&inputs, &names, precision).unwrap();
        for ((name, ours), theirs) in names.iter().zip(ours).zip(theirs) {
            assert_eq!(ours.dtype(), theirs.dtype(), "{}: {name}", golden.name);
            assert!(
                ours.clone().tensor().unwrap().data == theirs.tensor().unwrap().data,
                "{}: {name}",
                golden.name
            );
            carry.insert((*name).to_owned(), ours);
        }
        carry.retain(|name, _| segment.live_after.contains(name));
    }
}

#[test]
fn what_is_carried_is_rounded_and_widened_on_the_device_as_on_the_host() {
    for precision in [CarryPrecision::F32, CarryPrecision::Bf16] {
        goldens().for_each(|golden| carries_as_the_host_would(&Arc::<Host>::default(), &golden, precision));
        let Some(cuda) = place(Precision::Tf32) else { return };
        goldens().for_each(|golden| carries_as_the_host_would(&cuda, &golden, precision));
    }
}

/// More threads than there are lanes, all on one session.
#[test]
fn any_lane_and_any_number_of_threads_compute_the_same_bits() {
    let Some(cuda) = place(Precision::Tf32) else { return };
    for name in ["llama", "gemma3", "mixtral"] {
        let golden = open(&folder().join(name), DescribeOptions::default());
        let session = session(&cuda, &golden, &all_nodes(&golden));
        let run = || session.run(&[(TOKENS, &golden.tokens)], &[LOGITS]).unwrap().remove(0);
        let first = run();
        std::thread::scope(|scope| {
            let all: Vec<_> =
                (0..12).map(|_| scope.spawn(|| (0..5).map(|_| run()).collect::<Vec<_>>())).collect();
            for thread in all {
                for again in thread.join().unwrap() {
                    assert!(again.data == first.data, "{name}");
                }
            }
        });
    }
}

/// Numbers beyond the parts in which they travel, and none at all.
#[test]
fn long_and_empty_batches_arrive_whole() {
    let Some(cuda) = place(Precision::F32) else { return };
    let host = Arc::new(Host::default());
    let golden = open(&cases()[0], DescribeOptions::default());
    let add = golden.decoder.nodes.iter().position(|node| matches!(node.op, Op::Add)).unwrap();
    let node = &golden.decoder.nodes[add];
    let width = golden.decoder.hidden;
    for rows in [0, 1, (5 << 20) / width + 3] {
        let x = |factor: f32| {
            let values = (0..rows * width).map(|i| i as f32 * factor).collect();
            Tensor::f32(vec![rows, width], values).unwrap()
        };
        let (a, b) = (x(0.5), x(-0.25));
        let inputs = [(node.inputs[0].as_str(), &a), (node.inputs[1].as_str(), &b)];
        let names = [node.outputs[0].as_str()];
        let ours = session(&cuda, &golden, &[add]).run(&inputs, &names).unwrap();
        let theirs = session(&host, &golden, &[add]).run(&inputs, &names).unwrap();
        assert!(ours[0].shape == theirs[0].shape && ours[0].data == theirs[0].data, "{rows} rows");
    }
}

#[test]
fn a_batch_that_has_no_room_is_out_of_memory_and_the_next_one_runs() {
    let Some(cuda) = place(Precision::F32) else { return };
    let mut golden = open(&folder().join("mixtral"), DescribeOptions::default());
    let all = all_nodes(&golden);
    let run = |golden: &Golden| session(&cuda, golden, &all).run(&[(TOKENS, &golden.tokens)], &[LOGITS]);
    let before = run(&golden).unwrap();
    // Weights of a head that would fill any device; they are never made.
    let head = golden.decoder.nodes.iter().rposition(|node| matches!(node.op, Op::Linear(_))).unwrap();
    let node = golden.decoder.nodes[head].clone();
    let Op::Linear(linear) = &node.op else { unreachable!() };
    let rows = 1usize << 22;
    let wide = Tensor::new(vec![rows, linear.cols], Data::F32(vec![0.0; rows * linear.cols])).unwrap();
    if let Op::Linear(linear) = &mut golden.decoder.nodes[head].op {
        linear.rows = rows;
        linear.weight = "wide".into();
    }
    let input = Tensor::f32(vec![1 << 17, linear.cols], vec![0.0; linear.cols << 17]).unwrap();
    let mut constants = |_: &str| Ok(wide.clone());
    let wide = DecoderSession::load_at(
        Arc::clone(&cuda),
        &golden.decoder,
        &[head],
        CarryPrecision::F32,
        &mut constants,
    )
    .unwrap();
    // 2^39 numbers: 2 TiB.
    let error = wide.run(&[(node.inputs[0].as_str(), &input)], &[node.outputs[0].as_str()]).unwrap_err();
    assert!(error.to_string().contains("out of memory, 2199023255552 bytes asked for"), "{error}");
    drop(wide);
    let golden = open(&folder().join("mixtral"), DescribeOptions::default());
    assert!(run(&golden).unwrap()[0].data == before[0].data);
}

#[test]
fn what_stays_on_a_device_leaves_it_for_the_host_and_is_the_same_there() {
    let Some(cuda) = place(Precision::Tf32) else { return };
    let golden = open(&folder().join("llama"), DescribeOptions::default());
    let session = session(&cuda, &golden, &all_nodes(&golden));
    let names = written(&golden);
    let tokens = Carried::Whole(Arc::new(golden.tokens.clone()));
    let run = || session.run_carried(&[(TOKENS, &tokens)], &names, CarryPrecision::Bf16).unwrap();
    let folder = tempfile::tempdir().unwrap();
    // Room for some of them: the others go on to files.
    let store = CarryStore::with_precision(4000, folder.path(), CarryPrecision::Bf16);
    let key = |name: &str| CarryKey { lane: 0, stream: Stream::FullPrecision, tensor: name.into(), shard: 0 };
    let before = run();
    assert!(before.iter().all(|carried| matches!(carried, Carried::OnDevice(_))));
    for (name, carried) in names.iter().zip(run()) {
        store.put_carried(key(name), carried).unwrap();
    }
    assert_eq!((store.usage().resident, store.usage().spilled), (0, 0));
    store.leave_devices().unwrap();
    assert!(store.usage().resident > 0 && store.usage().resident <= 4000 && store.usage().spilled > 0);
    for (name, carried) in names.iter().zip(&before) {
        let here = store.carried(&key(name)).unwrap();
        assert!(!matches!(here, Carried::OnDevice(_)), "{name}");
        let peaks = (here.peak().to_bits(), carried.peak().to_bits());
        assert_eq!((peaks.0, here.dims()), (peaks.1, carried.dims()), "{name}");
        assert_eq!(here.tensor().unwrap(), carried.clone().tensor().unwrap(), "{name}");
    }
}
