//! AIMET encodings files: literal files, round trips of all versions, and what is refused.

use halfstep_quant::aimet::{Layout, ParamEncoding, Version, from_json, to_json};
use halfstep_quant::{Encodings, Granularity, GridSpec, QuantError, RangeEstimator, Scheme, estimate};
use serde_json::{Value, json};

fn encodings(scheme: Scheme, granularity: Granularity, bits: u8, rows: usize, cols: usize) -> Encodings {
    let w: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 0.7).collect();
    let spec = GridSpec { bits, scheme, granularity, range: RangeEstimator::MinMax };
    estimate(&spec, &w, rows, cols, None).expect("a valid grid of finite weights")
}

fn param(encodings: Encodings) -> ParamEncoding {
    ParamEncoding {
        name: "conv.weight".into(),
        encodings,
        tensor_axis: 0,
        tensor_rank: 2,
        kernel_positions: 1,
    }
}

fn symmetric_int4() -> ParamEncoding {
    param(Encodings {
        bits: 4,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerChannel,
        rows: 2,
        cols: 3,
        scale: vec![0.5, 0.25],
        zero_point: vec![0, 0],
    })
}

#[test]
fn version_0_6_1_is_the_documented_file() {
    assert_eq!(
        to_json(Version::V0_6_1, &[symmetric_int4()]).unwrap(),
        json!({
            "version": "0.6.1",
            "activation_encodings": {},
            "param_encodings": { "conv.weight": [
                { "bitwidth": 4, "dtype": "int", "is_symmetric": "True",
                  "min": -4.0, "max": 3.5, "offset": -8, "scale": 0.5 },
                { "bitwidth": 4, "dtype": "int", "is_symmetric": "True",
                  "min": -2.0, "max": 1.75, "offset": -8, "scale": 0.25 },
            ]}
        })
    );
}

#[test]
fn version_1_0_0_is_the_documented_file() {
    let mut file = to_json(Version::V1_0_0, &[symmetric_int4()]).unwrap();
    assert_eq!(file["producer"]["name"], "halfstep");
    file["producer"] = json!({});
    assert_eq!(
        file,
        json!({
            "version": "1.0.0",
            "activation_encodings": [],
            "param_encodings": [{
                "name": "conv.weight", "bw": 4, "dtype": "INT", "enc_type": "PER_CHANNEL", "is_sym": true,
                "offset": [-8, -8], "scale": [0.5, 0.25],
            }],
            "producer": {},
            "quantizer_args": {},
        })
    );
}

#[test]
fn version_2_0_0_leaves_a_zero_point_of_zero_out() {
    assert_eq!(
        to_json(Version::V2_0_0, &[symmetric_int4()]).unwrap(),
        json!({ "version": "2.0.0", "encodings": [
            { "name": "conv.weight", "axis": 0, "output_dtype": "int4", "y_scale": [0.5, 0.25] },
        ]})
    );
    let asymmetric = param(encodings(Scheme::Asymmetric, Granularity::PerTensor, 8, 2, 3));
    let entry = &to_json(Version::V2_0_0, std::slice::from_ref(&asymmetric)).unwrap()["encodings"][0];
    assert_eq!(entry["output_dtype"], "uint8");
    assert_eq!(entry["y_zero_point"], json!(asymmetric.encodings.zero_point[0]));
    assert!(entry["y_scale"].is_number() && entry.get("axis").is_none());
}

#[test]
fn asymmetric_offset_is_minus_the_zero_point() {
    let asymmetric = param(encodings(Scheme::Asymmetric, Granularity::PerChannel, 8, 3, 20));
    assert!(asymmetric.encodings.zero_point.iter().all(|&z| z > 0), "the data must exercise the sign");
    let file = to_json(Version::V1_0_0, std::slice::from_ref(&asymmetric)).unwrap();
    let expect: Vec<i32> = asymmetric.encodings.zero_point.iter().map(|z| -z).collect();
    assert_eq!(file["param_encodings"][0]["offset"], json!(expect));
    assert_eq!(file["param_encodings"][0]["is_sym"], json!(false));
}

#[test]
fn blocks_follow_the_tensors_axes() {
    let grouped = encodings(Scheme::Symmetric, Granularity::PerGroup { group_size: 4 }, 4, 2, 10);
    let s: Vec<f64> = grouped.scale.iter().map(|&s| f64::from(s)).collect();
    let mut stored_kn = ParamEncoding { tensor_axis: 1, ..param(grouped) };
    let v1 = to_json(Version::V1_0_0, std::slice::from_ref(&stored_kn)).unwrap();
    assert_eq!(v1["param_encodings"][0]["enc_type"], "PER_BLOCK");
    assert_eq!(v1["param_encodings"][0]["block_size"], 4);
    assert_eq!(v1["param_encodings"][0]["scale"], json!([s[0], s[3], s[1], s[4], s[2], s[5]]));
    let v2 = to_json(Version::V2_0_0, std::slice::from_ref(&stored_kn)).unwrap();
    assert_eq!(v2["encodings"][0]["axis"], 0);
    assert_eq!(v2["encodings"][0]["y_scale"], json!([[s[0], s[3]], [s[1], s[4]], [s[2], s[5]]]));
    stored_kn.tensor_axis = 0;
    let v2 = to_json(Version::V2_0_0, &[stored_kn]).unwrap();
    assert_eq!(v2["encodings"][0]["axis"], 1);
    assert_eq!(v2["encodings"][0]["y_scale"], json!([[s[0], s[1], s[2]], [s[3], s[4], s[5]]]));
}

#[test]
fn convolution_blocks_are_counted_in_input_channels() {
    let grouped = encodings(Scheme::Symmetric, Granularity::PerGroup { group_size: 18 }, 4, 2, 36);
    let mut conv = ParamEncoding { tensor_rank: 4, kernel_positions: 9, ..param(grouped) };
    let file = to_json(Version::V2_0_0, std::slice::from_ref(&conv)).unwrap();
    assert_eq!(file["encodings"][0]["block_size"], 2);
    assert!(file["encodings"][0]["y_scale"][1][1][0][0].is_number());
    conv.kernel_positions = 4;
    assert!(matches!(to_json(Version::V1_0_0, &[conv]), Err(QuantError::NotExpressible { .. })));
}

#[test]
fn every_version_reads_back_bit_for_bit() {
    let granularities =
        [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup { group_size: 4 }];
    for version in [Version::V0_6_1, Version::V1_0_0, Version::V2_0_0] {
        for scheme in [Scheme::Symmetric, Scheme::Asymmetric] {
            for granularity in granularities {
                for (bits, axis) in [(4, 0), (8, 1), (16, 0)] {
                    let blocks = matches!(granularity, Granularity::PerGroup { .. });
                    let wanted = encodings(scheme, granularity, bits, 3, 10);
                    let written = ParamEncoding { tensor_axis: axis, ..param(wanted.clone()) };
                    let file = to_json(version, std::slice::from_ref(&written));
                    if blocks && version == Version::V0_6_1 {
                        assert!(matches!(file, Err(QuantError::NotExpressible { .. })));
                        continue;
                    }
                    // Through text, as a file would go.
                    let text = serde_json::to_string(&file.unwrap()).unwrap();
                    let (read, params) = from_json(&serde_json::from_str(&text).unwrap()).unwrap();
                    assert_eq!((read, params.len(), params[0].name.as_str()), (version, 1, "conv.weight"));
                    let back = params[0].to_encodings(3, 10, axis, 1).unwrap();
                    assert_eq!(back, wanted, "{version} {scheme} {granularity} {bits}");
                }
            }
        }
    }
}

#[test]
fn strict_grids_read_back_as_symmetric_with_the_same_values() {
    let strict = encodings(Scheme::SymmetricStrict, Granularity::PerChannel, 4, 3, 10);
    let file = to_json(Version::V1_0_0, &[param(strict.clone())]).unwrap();
    let back = from_json(&file).unwrap().1[0].to_encodings(3, 10, 0, 1).unwrap();
    assert_eq!((back.scheme, &back.scale), (Scheme::Symmetric, &strict.scale));
}

#[test]
fn three_bits_have_no_type_in_version_2() {
    let three = param(encodings(Scheme::Symmetric, Granularity::PerChannel, 3, 3, 10));
    assert!(to_json(Version::V1_0_0, std::slice::from_ref(&three)).is_ok());
    assert!(matches!(to_json(Version::V2_0_0, &[three]), Err(QuantError::NotExpressible { .. })));
}

#[test]
fn malformed_files_are_refused_not_believed() {
    let good = to_json(Version::V1_0_0, &[symmetric_int4()]).unwrap();
    assert_eq!(from_json(&good).unwrap().1[0].layout, Layout::PerChannel);
    let broken = |key: &str, value: Value| {
        let mut file = good.clone();
        file["param_encodings"][0][key] = value;
        from_json(&file).expect_err(key)
    };
    broken("scale", json!([0.5, -1.0]));
    broken("scale", json!([0.5, "x"]));
    broken("scale", json!([0.5]));
    broken("offset", json!([-8, -7]));
    broken("offset", json!([-8, 1e300]));
    broken("offset", json!([i64::MIN, i64::MAX]));
    broken("bw", json!(300));
    broken("bw", json!(0));
    broken("enc_type", json!("PER_MOON"));
    broken("is_sym", json!("True"));
    broken("name", json!(null));
    for file in
        [json!(null), json!([]), json!({}), json!({ "version": "3.0.0" }), json!({ "version": "1.0.0" })]
    {
        assert!(from_json(&file).is_err(), "{file}");
    }
    let (_, params) = from_json(&good).unwrap();
    assert!(matches!(params[0].to_encodings(3, 3, 0, 1), Err(QuantError::Length { .. })));
}
