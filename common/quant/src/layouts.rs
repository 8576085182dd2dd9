//! How checkpoints of quantized language models store one weight matrix: integers and zero points as packed words.
//!
//! Weights are `[rows, cols]` = `[out, in]`, groups run along the columns. All streams are dense and LSB-first
//! ([`crate::packing`]) and hold unsigned fields: symmetric integers are raised by `2^(bits-1)`, asymmetric ones are
//! unsigned already. Scales are left as they are, `[rows, groups]` as in [`Encodings`], or turned for GPTQ.
//! Not here: names and element types of tensors, configuration files.

use crate::encodings::{check_length, element_count};
use crate::packing::{dense_words, pack_lines, transpose, unpack_lines};
use crate::{Encodings, Granularity, QuantError, Scheme};

/// GPTQ packs whole words along both axes: rows and columns come in multiples of this.
pub const GPTQ_MULTIPLE: usize = 32;

/// A matrix as compressed-tensors stores it in format `pack-quantized`.
#[derive(Debug, Clone, PartialEq)]
pub struct Compressed {
    /// `[rows, dense_words(cols)]`: every row a stream.
    pub weight: Vec<u32>,
    /// `[rows, groups]`.
    pub scale: Vec<f32>,
    /// `[dense_words(rows), groups]`: every group a stream down the rows; none for symmetric grids.
    pub zero_point: Option<Vec<u32>>,
}

/// How GPTQ stores zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GptqVersion {
    /// One less than they are: 0 has no representation.
    V1,
    /// As they are.
    V2,
}

/// A matrix as GPTQ stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct Gptq {
    /// `[cols * bits / 32, rows]`: every output a stream down the inputs.
    pub weight: Vec<u32>,
    /// `[groups, rows]`.
    pub scale: Vec<f32>,
    /// `[groups, rows * bits / 32]`: every group a stream along the outputs.
    pub zero_point: Vec<u32>,
    /// `[cols]`: the group of each input.
    pub group_index: Vec<i32>,
}

/// What has to be known to read a matrix back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Bit width, 2 to 8.
    pub bits: u8,
    /// `Symmetric` or `Asymmetric`.
    pub scheme: Scheme,
    /// `PerChannel` or `PerGroup`.
    pub granularity: Granularity,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

impl Form {
    /// Groups of a row.
    ///
    /// # Errors
    /// `Bits`, `GroupSize`, `Empty`, `TooLarge`: such a matrix does not exist; `Groups` if the last group is shorter.
    pub fn groups(&self) -> Result<usize, QuantError> {
        if !(2..=8).contains(&self.bits) {
            return Err(QuantError::Bits { bits: self.bits });
        }
        if self.rows == 0 || self.cols == 0 {
            return Err(QuantError::Empty { rows: self.rows, cols: self.cols });
        }
        element_count(self.rows, self.cols)?;
        match self.granularity {
            Granularity::PerGroup { group_size: 0 } => Err(QuantError::GroupSize { group_size: 0 }),
            Granularity::PerGroup { group_size } if !self.cols.is_multiple_of(group_size) => {
                Err(QuantError::Groups { group_size, cols: self.cols })
            }
            Granularity::PerGroup { group_size } => Ok(self.cols / group_size),
            Granularity::PerChannel | Granularity::PerTensor => Ok(1),
        }
    }

    /// Adds to symmetric integers to make them unsigned.
    fn offset(&self) -> i32 {
        if self.scheme.is_symmetric() { 1 << (self.bits - 1) } else { 0 }
    }

    fn encodings(&self, scale: Vec<f32>, zero_point: Vec<i32>) -> Result<Encodings, QuantError> {
        let encodings = Encodings {
            bits: self.bits,
            scheme: self.scheme,
            granularity: self.granularity,
            rows: self.rows,
            cols: self.cols,
            scale,
            zero_point,
        };
        encodings.validate()?;
        Ok(encodings)
    }
}

/// The form, and scales and zero points as `[rows, groups]`: what holds for all rows is said for each.
fn spread(encodings: &Encodings, q: &[i32]) -> Result<(Form, Vec<f32>, Vec<i32>), QuantError> {
    encodings.validate()?;
    let Encodings { bits, scheme, granularity, rows, cols, .. } = *encodings;
    let scheme = if scheme.is_symmetric() { Scheme::Symmetric } else { scheme };
    let per_tensor = granularity == Granularity::PerTensor;
    let granularity = if per_tensor { Granularity::PerChannel } else { granularity };
    let form = Form { bits, scheme, granularity, rows, cols };
    form.groups()?;
    check_length("integer matrix", element_count(rows, cols)?, q.len())?;
    let copies = if per_tensor { rows } else { 1 };
    Ok((form, encodings.scale.repeat(copies), encodings.zero_point.repeat(copies)))
}

impl Compressed {
    /// Packs `q` (`[rows, cols]`). One scale for the whole tensor becomes one for each row.
    ///
    /// # Errors
    /// Encodings that [`Encodings::validate`] refuses; `Groups` if the last group of a row is shorter; `OutOfRange`
    /// with the first integer off the grid.
    pub fn pack(encodings: &Encodings, q: &[i32]) -> Result<Self, QuantError> {
        let (form, scale, zero_point) = spread(encodings, q)?;
        let groups = form.groups()?;
        let weight = pack_lines(q, form.cols, form.bits, form.offset())?;
        let zero_point = if form.scheme.is_symmetric() {
            None
        } else {
            let by_group = transpose(&zero_point, form.rows, groups)?;
            let words = pack_lines(&by_group, form.rows, form.bits, 0)?;
            Some(transpose(&words, groups, dense_words(form.rows, form.bits))?)
        };
        Ok(Self { weight, scale, zero_point })
    }

    /// The encodings and the integers `[rows, cols]`.
    ///
    /// # Errors
    /// `Length` if a part does not have the size that `form` says, whatever [`Encodings::validate`] finds.
    pub fn unpack(&self, form: Form) -> Result<(Encodings, Vec<i32>), QuantError> {
        let groups = form.groups()?;
        let q = unpack_lines(&self.weight, form.rows, form.cols, form.bits, form.offset())?;
        let zero_point = match &self.zero_point {
            None if form.scheme.is_symmetric() => vec![0; form.rows * groups],
            None => {
                return Err(QuantError::Length {
                    what: "zero points",
                    expected: form.rows * groups,
                    actual: 0,
                });
            }
            Some(words) => {
                let by_group = transpose(words, dense_words(form.rows, form.bits), groups)?;
                let by_group = unpack_lines(&by_group, groups, form.rows, form.bits, form.offset())?;
                transpose(&by_group, groups, form.rows)?
            }
        };
        Ok((form.encodings(self.scale.clone(), zero_point)?, q))
    }
}

impl Gptq {
    /// Packs `q` (`[rows, cols]`). One scale for the whole tensor becomes one for each row.
    ///
    /// # Errors
    /// As [`Compressed::pack`]; `Multiple` if rows or columns do not fill whole words; `ZeroPoint` if one is 0 and the
    /// version has no word for it.
    pub fn pack(encodings: &Encodings, q: &[i32], version: GptqVersion) -> Result<Self, QuantError> {
        let (form, scale, zero_point) = spread(encodings, q)?;
        let groups = form.groups()?;
        check_multiples(form.rows, form.cols)?;
        let weight = pack_lines(q, form.cols, form.bits, form.offset())?;
        let weight = transpose(&weight, form.rows, dense_words(form.cols, form.bits))?;
        let shift = form.offset() - i32::from(version == GptqVersion::V1);
        let by_group = transpose(&zero_point, form.rows, groups)?;
        if let Some(index) = by_group.iter().position(|zero_point| zero_point + shift < 0) {
            let (min, max) = (-shift, encodings.qmax());
            return Err(QuantError::ZeroPoint { index, value: by_group[index], min, max });
        }
        let group_cols = form.cols / groups;
        Ok(Self {
            weight,
            scale: transpose(&scale, form.rows, groups)?,
            zero_point: pack_lines(&by_group, form.rows, form.bits, shift)?,
            group_index: (0..groups as i32)
                .flat_map(|group| std::iter::repeat_n(group, group_cols))
                .collect(),
        })
    }

    /// The encodings and the integers `[rows, cols]`. Groups must be runs of columns in order.
    ///
    /// # Errors
    /// `Length` if a part does not have the size that `form` says, `Multiple`, `OutOfRange` with the first column that
    /// is in another group, whatever [`Encodings::validate`] finds.
    pub fn unpack(&self, form: Form, version: GptqVersion) -> Result<(Encodings, Vec<i32>), QuantError> {
        let groups = form.groups()?;
        check_multiples(form.rows, form.cols)?;
        let weight = transpose(&self.weight, dense_words(form.cols, form.bits), form.rows)?;
        let q = unpack_lines(&weight, form.rows, form.cols, form.bits, form.offset())?;
        let shift = form.offset() - i32::from(version == GptqVersion::V1);
        let by_group = unpack_lines(&self.zero_point, groups, form.rows, form.bits, shift)?;
        let zero_point = transpose(&by_group, groups, form.rows)?;
        check_length("list of groups", form.cols, self.group_index.len())?;
        check_groups(&self.group_index, form.cols / groups)?;
        let scale = transpose(&self.scale, groups, form.rows)?;
        Ok((form.encodings(scale, zero_point)?, q))
    }
}

fn check_multiples(rows: usize, cols: usize) -> Result<(), QuantError> {
    let whole = rows.is_multiple_of(GPTQ_MULTIPLE) && cols.is_multiple_of(GPTQ_MULTIPLE);
    if whole { Ok(()) } else { Err(QuantError::Multiple { rows, cols, multiple: GPTQ_MULTIPLE }) }
}

fn check_groups(index: &[i32], group_cols: usize) -> Result<(), QuantError> {
    for (group, run) in index.chunks(group_cols).enumerate() {
        let expected = group as i64;
        if let Some(at) = run.iter().position(|found| i64::from(*found) != expected) {
            let (index, value) = (group * group_cols + at, i64::from(run[at]));
            return Err(QuantError::OutOfRange { index, value, min: expected, max: expected });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matrix(form: Form, seed: u32) -> (Encodings, Vec<i32>) {
        let groups = form.groups().unwrap();
        let any = |i: usize| seed.wrapping_add(i as u32).wrapping_mul(0x9e37_79b9).rotate_left(11) >> 8;
        let (min, max) = form.scheme.integer_range(form.bits);
        let value = |i: usize| min + (any(i) % (max - min + 1) as u32) as i32;
        let zero = |i: usize| if form.scheme.is_symmetric() { 0 } else { value(i + 7).max(1) };
        let scale = (0..form.rows * groups).map(|i| (any(i) % 100 + 1) as f32 / 64.0).collect();
        let encodings = form.encodings(scale, (0..form.rows * groups).map(zero).collect()).unwrap();
        (encodings, (0..form.rows * form.cols).map(value).collect())
    }

    fn forms() -> impl Strategy<Value = Form> {
        let schemes = prop_oneof![Just(Scheme::Symmetric), Just(Scheme::Asymmetric)];
        (2_u8..=8, schemes, 1_usize..70, 1_usize..5, 1_usize..20, any::<bool>()).prop_map(
            |(bits, scheme, rows, groups, group_size, grouped)| {
                let granularity =
                    if grouped { Granularity::PerGroup { group_size } } else { Granularity::PerChannel };
                Form { bits, scheme, granularity, rows, cols: groups * group_size }
            },
        )
    }

    proptest! {
        #[test]
        fn compressed_matrices_come_back(form in forms(), seed in any::<u32>()) {
            let (encodings, q) = matrix(form, seed);
            let packed = Compressed::pack(&encodings, &q).unwrap();
            prop_assert_eq!(packed.unpack(form).unwrap(), (encodings, q));
        }

        #[test]
        fn gptq_matrices_come_back(form in forms(), seed in any::<u32>(), tall in 1_usize..4) {
            let (rows, wide) = (GPTQ_MULTIPLE * tall, GPTQ_MULTIPLE);
            let granularity = match form.granularity {
                Granularity::PerGroup { group_size } => Granularity::PerGroup { group_size: group_size * wide },
                other => other,
            };
            let form = Form { rows, cols: form.cols * wide, granularity, ..form };
            let (encodings, q) = matrix(form, seed);
            for version in [GptqVersion::V1, GptqVersion::V2] {
                let packed = Gptq::pack(&encodings, &q, version).unwrap();
                prop_assert_eq!(packed.unpack(form, version).unwrap(), (encodings.clone(), q.clone()));
            }
        }
    }

    const FORM: Form = Form {
        bits: 4,
        scheme: Scheme::Asymmetric,
        granularity: Granularity::PerGroup { group_size: 32 },
        rows: 32,
        cols: 64,
    };

    #[test]
    fn symmetric_zero_points_of_gptq_are_the_known_words() {
        for (bits, v1, v2) in
            [(2, 0x5555_5555, 0xaaaa_aaaa), (4, 0x7777_7777, 0x8888_8888), (8, 0x7f7f_7f7f, 0x8080_8080)]
        {
            let form = Form { bits, scheme: Scheme::Symmetric, ..FORM };
            let (encodings, q) = matrix(form, 1);
            let words = |version| Gptq::pack(&encodings, &q, version).unwrap().zero_point;
            assert!(words(GptqVersion::V1).iter().all(|word| *word == v1));
            assert!(words(GptqVersion::V2).iter().all(|word| *word == v2));
        }
    }

    #[test]
    fn one_scale_for_all_becomes_one_for_each_row() {
        let form = Form { granularity: Granularity::PerChannel, ..FORM };
        let (mut encodings, q) = matrix(form, 3);
        encodings.granularity = Granularity::PerTensor;
        encodings.scale.truncate(1);
        encodings.zero_point.truncate(1);
        let (back, integers) = Compressed::pack(&encodings, &q).unwrap().unpack(form).unwrap();
        assert_eq!(integers, q);
        assert_eq!(back.dequantize(&q).unwrap(), encodings.dequantize(&q).unwrap());
    }

    #[test]
    fn what_a_layout_cannot_hold_is_refused() {
        let (mut encodings, q) = matrix(FORM, 2);
        encodings.zero_point[5] = 0;
        assert!(Gptq::pack(&encodings, &q, GptqVersion::V2).is_ok());
        let error = Gptq::pack(&encodings, &q, GptqVersion::V1).unwrap_err();
        assert!(matches!(error, QuantError::ZeroPoint { value: 0, min: 1, max: 15, .. }), "{error}");
        let form = Form { rows: 3, ..FORM };
        let (encodings, q) = matrix(form, 2);
        assert!(Compressed::pack(&encodings, &q).is_ok());
        let error = Gptq::pack(&encodings, &q, GptqVersion::V2).unwrap_err();
        assert_eq!(error, QuantError::Multiple { rows: 3, cols: 64, multiple: 32 });
        let form = Form { granularity: Granularity::PerGroup { group_size: 48 }, ..FORM };
        assert_eq!(form.groups(), Err(QuantError::Groups { group_size: 48, cols: 64 }));
        for form in [Form { bits: 9, ..FORM }, Form { cols: 0, ..FORM }, Form { rows: usize::MAX, ..FORM }] {
            assert!(form.groups().is_err());
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let (encodings, q) = matrix(FORM, 4);
        let good = Compressed::pack(&encodings, &q).unwrap();
        let broken: [fn(&mut Compressed); 4] = [
            |c| c.weight.truncate(1),
            |c| c.scale.truncate(1),
            |c| c.zero_point = None,
            |c| c.scale[0] = f32::NAN,
        ];
        for spoil in broken {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(bad.unpack(FORM).is_err());
        }
        let good = Gptq::pack(&encodings, &q, GptqVersion::V1).unwrap();
        let broken: [fn(&mut Gptq); 5] = [
            |g| g.weight.truncate(1),
            |g| g.scale.truncate(1),
            |g| g.zero_point.truncate(1),
            |g| g.group_index[40] = 0,
            |g| g.group_index.truncate(3),
        ];
        for spoil in broken {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(bad.unpack(FORM, GptqVersion::V1).is_err());
        }
    }
}
