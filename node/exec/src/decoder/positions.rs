//! Rotary tables: which frequencies a sequence has, kept from layer to layer.
//!
//! Not here: turning (`compute::cpu::rotary`).

use halfstep_compute::cpu::RotaryTable;
use halfstep_model::decoder::{Rotary, Rotation};

/// Which frequencies of a rotation a sequence takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    /// Those of every, or of short sequences.
    Short,
    /// Those of long ones.
    Long,
    /// Those of this length.
    Of(usize),
}

/// The table last used for each rotation of a segment.
#[derive(Debug, Default)]
pub(super) struct Tables {
    held: Vec<Option<(Variant, RotaryTable)>>,
}

impl Tables {
    /// The table of the segment's rotation `index`, for a sequence of `length`.
    pub(super) fn get(&mut self, index: usize, rotary: &Rotary, length: usize) -> &RotaryTable {
        if self.held.len() <= index {
            self.held.resize_with(index + 1, || None);
        }
        let variant = variant(&rotary.rotation, length);
        let slot = &mut self.held[index];
        if !matches!(slot, Some((held, table)) if *held == variant && table.positions() >= length) {
            *slot = None;
        }
        &slot.get_or_insert_with(|| (variant, build(rotary, variant, length))).1
    }
}

fn variant(rotation: &Rotation, length: usize) -> Variant {
    match rotation {
        Rotation::ByLength { after, .. } if length > *after => Variant::Long,
        Rotation::Dynamic { after, .. } if length > *after => Variant::Of(length),
        _ => Variant::Short,
    }
}

fn build(rotary: &Rotary, variant: Variant, length: usize) -> RotaryTable {
    match &rotary.rotation {
        Rotation::Fixed { frequencies, factor } => RotaryTable::new(frequencies, *factor, length),
        Rotation::ByLength { short, long, factor, .. } => {
            let frequencies = if variant == Variant::Long { long } else { short };
            RotaryTable::new(frequencies, *factor, length)
        }
        Rotation::Dynamic { after, base, scaling } => {
            let grown = match variant {
                Variant::Of(length) => {
                    grown(f64::from(*base), f64::from(*scaling), *after, length, rotary.width)
                }
                _ => f64::from(*base),
            };
            RotaryTable::new(&frequencies(grown, rotary.width), 1.0, length)
        }
    }
}

/// `base * (scaling * L / after - (scaling - 1))^(width / (width - 2))`.
fn grown(base: f64, scaling: f64, after: usize, length: usize, width: usize) -> f64 {
    let growth = scaling * length as f64 / after as f64 - (scaling - 1.0);
    base * growth.powf(width as f64 / (width as f64 - 2.0))
}

/// `base^(-2 i / width)` for each pair.
fn frequencies(base: f64, width: usize) -> Vec<f32> {
    (0..width / 2).map(|pair| base.powf(-(2.0 * pair as f64) / width as f64) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(frequencies: &[f32], factor: f32, length: usize) -> RotaryTable {
        RotaryTable::new(frequencies, factor, length)
    }

    #[test]
    fn a_table_is_made_again_when_it_is_too_short_or_of_other_frequencies() {
        let rotation =
            Rotation::ByLength { after: 4, short: vec![1.0, 0.5], long: vec![0.1, 0.2], factor: 1.25 };
        let rotary = Rotary { width: 4, rotation };
        let mut tables = Tables::default();
        assert_eq!(*tables.get(1, &rotary, 3), table(&[1.0, 0.5], 1.25, 3));
        assert_eq!(*tables.get(1, &rotary, 2), table(&[1.0, 0.5], 1.25, 3));
        assert_eq!(*tables.get(1, &rotary, 4), table(&[1.0, 0.5], 1.25, 4));
        assert_eq!(*tables.get(1, &rotary, 5), table(&[0.1, 0.2], 1.25, 5));
        assert_eq!(*tables.get(1, &rotary, 1), table(&[1.0, 0.5], 1.25, 1));
    }

    #[test]
    fn dynamic_rotation_grows_its_base_with_the_length() {
        let rotary = Rotary { width: 4, rotation: Rotation::Dynamic { after: 8, base: 100.0, scaling: 2.0 } };
        let mut tables = Tables::default();
        assert_eq!(*tables.get(0, &rotary, 8), table(&[1.0, 0.1], 1.0, 8));
        // 2 * 12 / 8 - 1 = 2; squared: the base is 400.
        assert_eq!(*tables.get(0, &rotary, 12), table(&[1.0, 0.05], 1.0, 12));
    }
}
