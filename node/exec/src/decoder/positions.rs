//! Rotary tables: which frequencies a sequence has, kept from run to run.
//!
//! Not here: the tables themselves, turning (`compute`).

use halfstep_model::decoder::{Rotary, Rotation};
use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};

/// Tables that are kept: a rotation that depends on the length has one for each.
const HELD_MAX: usize = 8;

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

/// Tables of each rotation of a segment on one device, those used last.
#[derive(Debug)]
pub(super) struct Tables<T> {
    held: Mutex<Vec<Held<T>>>,
}

#[derive(Debug)]
struct Held<T> {
    rotation: usize,
    variant: Variant,
    /// Positions it has.
    positions: usize,
    table: Arc<T>,
}

impl<T> Default for Tables<T> {
    fn default() -> Self {
        Self { held: Mutex::default() }
    }
}

impl<T> Tables<T> {
    /// The table of the segment's rotation `index`, for a sequence of `length`; `make` makes it of frequencies, a factor and a
    /// count of positions.
    ///
    /// # Errors
    /// What `make` says.
    pub(super) fn get<E>(
        &self,
        index: usize,
        rotary: &Rotary,
        length: usize,
        make: impl FnOnce(&[f32], f32, usize) -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let variant = variant(&rotary.rotation, length);
        // Whoever wants the same meanwhile waits for it.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = held.iter().position(|held| held.rotation == index && held.variant == variant) {
            // Used last: at the end.
            let found = held.remove(at);
            if found.positions >= length {
                let table = Arc::clone(&found.table);
                held.push(found);
                return Ok(table);
            }
        }
        let (frequencies, factor) = frequencies_of(rotary, variant);
        let table = Arc::new(make(&frequencies, factor, length)?);
        if held.len() >= HELD_MAX {
            held.remove(0);
        }
        held.push(Held { rotation: index, variant, positions: length, table: Arc::clone(&table) });
        Ok(table)
    }
}

/// Whether sequences of these lengths turn alike.
pub(super) fn alike(rotary: &Rotary, a: usize, b: usize) -> bool {
    variant(&rotary.rotation, a) == variant(&rotary.rotation, b)
}

fn variant(rotation: &Rotation, length: usize) -> Variant {
    match rotation {
        Rotation::ByLength { after, .. } if length > *after => Variant::Long,
        Rotation::Dynamic { after, .. } if length > *after => Variant::Of(length),
        _ => Variant::Short,
    }
}

/// The frequencies of a variant, and the factor of sine and cosine.
fn frequencies_of(rotary: &Rotary, variant: Variant) -> (Cow<'_, [f32]>, f32) {
    match &rotary.rotation {
        Rotation::Fixed { frequencies, factor } => (frequencies.into(), *factor),
        Rotation::ByLength { short, long, factor, .. } => {
            let frequencies = if variant == Variant::Long { long } else { short };
            (frequencies.into(), *factor)
        }
        Rotation::Dynamic { after, base, scaling } => {
            let grown = match variant {
                Variant::Of(length) => {
                    grown(f64::from(*base), f64::from(*scaling), *after, length, rotary.width)
                }
                _ => f64::from(*base),
            };
            (frequencies(grown, rotary.width).into(), 1.0)
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
    use halfstep_compute::cpu::RotaryTable;
    use std::convert::Infallible;

    fn table(frequencies: &[f32], factor: f32, length: usize) -> RotaryTable {
        RotaryTable::new(frequencies, factor, length)
    }

    fn get(tables: &Tables<RotaryTable>, index: usize, rotary: &Rotary, length: usize) -> RotaryTable {
        let make = |frequencies: &[f32], factor, positions| {
            Ok::<_, Infallible>(table(frequencies, factor, positions))
        };
        let Ok(found) = tables.get(index, rotary, length, make);
        found.as_ref().clone()
    }

    #[test]
    fn a_table_is_made_again_when_it_is_too_short_or_of_other_frequencies() {
        let rotation =
            Rotation::ByLength { after: 4, short: vec![1.0, 0.5], long: vec![0.1, 0.2], factor: 1.25 };
        let rotary = Rotary { width: 4, rotation };
        let tables = Tables::default();
        assert_eq!(get(&tables, 1, &rotary, 3), table(&[1.0, 0.5], 1.25, 3));
        assert_eq!(get(&tables, 1, &rotary, 2), table(&[1.0, 0.5], 1.25, 3));
        assert_eq!(get(&tables, 1, &rotary, 4), table(&[1.0, 0.5], 1.25, 4));
        assert_eq!(get(&tables, 1, &rotary, 5), table(&[0.1, 0.2], 1.25, 5));
        assert_eq!(get(&tables, 1, &rotary, 1), table(&[1.0, 0.5], 1.25, 4));
        assert!(alike(&rotary, 1, 4) && alike(&rotary, 5, 9) && !alike(&rotary, 4, 5));
    }

    #[test]
    fn dynamic_rotation_grows_its_base_with_the_length() {
        let rotary = Rotary { width: 4, rotation: Rotation::Dynamic { after: 8, base: 100.0, scaling: 2.0 } };
        let tables = Tables::default();
        assert_eq!(get(&tables, 0, &rotary, 8), table(&[1.0, 0.1], 1.0, 8));
        // 2 * 12 / 8 - 1 = 2; squared: the base is 400.
        assert_eq!(get(&tables, 0, &rotary, 12), table(&[1.0, 0.05], 1.0, 12));
    }

    #[test]
    fn only_the_tables_used_last_are_kept() {
        let rotary = Rotary { width: 4, rotation: Rotation::Dynamic { after: 1, base: 100.0, scaling: 2.0 } };
        let tables = Tables::default();
        for length in 2..100 {
            get(&tables, 0, &rotary, 1);
            get(&tables, 0, &rotary, length);
        }
        assert_eq!(tables.held.lock().unwrap().len(), HELD_MAX);
        let again = tables.get(0, &rotary, 1, |_, _, _| Err("made again"));
        assert!(again.is_ok(), "{again:?}");
    }
}
