//! Packed layouts against words made by an independent script, bit by bit (`golden/layouts.py`).

use halfstep_quant::layouts::{Compressed, Form, Gptq, GptqVersion};
use halfstep_quant::{Encodings, Granularity, Scheme};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    rows: usize,
    cols: usize,
    group_size: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    bits: u8,
    symmetric: bool,
    q: Vec<i32>,
    zero_point: Vec<i32>,
    compressed_weight: Vec<u32>,
    compressed_zero_point: Option<Vec<u32>>,
    gptq_weight: Vec<u32>,
    gptq_zero_point_v1: Vec<u32>,
    gptq_zero_point_v2: Vec<u32>,
}

#[test]
fn words_are_those_of_the_formats() {
    let goldens: Goldens = serde_json::from_str(include_str!("golden/layouts.json")).unwrap();
    let Goldens { rows, cols, group_size, .. } = goldens;
    assert_eq!(goldens.cases.len(), 14);
    for case in &goldens.cases {
        let scheme = if case.symmetric { Scheme::Symmetric } else { Scheme::Asymmetric };
        let granularity = Granularity::PerGroup { group_size };
        let form = Form { bits: case.bits, scheme, granularity, rows, cols };
        let scale: Vec<f32> = (1..=case.zero_point.len()).map(|i| i as f32).collect();
        let zero_point = case.zero_point.clone();
        let encodings = Encodings { bits: case.bits, scheme, granularity, rows, cols, scale, zero_point };

        let compressed = Compressed::pack(&encodings, &case.q).unwrap();
        assert_eq!(compressed.weight, case.compressed_weight, "{form:?}");
        assert_eq!(compressed.zero_point, case.compressed_zero_point, "{form:?}");
        assert_eq!(compressed.unpack(form).unwrap(), (encodings.clone(), case.q.clone()));

        for (version, zero_point) in
            [(GptqVersion::V1, &case.gptq_zero_point_v1), (GptqVersion::V2, &case.gptq_zero_point_v2)]
        {
            let gptq = Gptq::pack(&encodings, &case.q, version).unwrap();
            assert_eq!(gptq.weight, case.gptq_weight, "{form:?} {version:?}");
            assert_eq!(gptq.zero_point, *zero_point, "{form:?} {version:?}");
            assert_eq!(gptq.scale[1], 3.0, "output 1 of group 0: scales are turned");
            assert_eq!(gptq.unpack(form, version).unwrap(), (encodings.clone(), case.q.clone()));
        }
    }
}
