//! Documents cut into windows, and the counts that a person should see.
//!
//! Not here: where documents come from (`text`, `parquet`, `stored`), which windows are used (`choice`).

use super::{TokenOptions, WINDOWS_PER_SAMPLE};

/// Tokens that the end of a longer document must have to be a window.
const TAIL_TOKENS_MIN: usize = 64;
/// Ids held at most, 1 GiB.
const TOKENS_MAX: usize = 1 << 28;

/// Windows collected so far.
pub(super) struct Windows {
    length: usize,
    limit: usize,
    vocabulary: usize,
    /// Ids of all windows, one after the other.
    ids: Vec<i32>,
    /// Where each window ends in `ids`.
    ends: Vec<usize>,
    documents: usize,
    empty: usize,
    dropped: usize,
    full: bool,
}

impl Windows {
    pub(super) fn new(options: &TokenOptions) -> Self {
        Self {
            length: options.window(),
            limit: options.samples.map_or(usize::MAX, |n| n.saturating_mul(WINDOWS_PER_SAMPLE)),
            vocabulary: options.vocabulary,
            ids: Vec::new(),
            ends: Vec::new(),
            documents: 0,
            empty: 0,
            dropped: 0,
            full: false,
        }
    }

    /// Stored ids are held already: the choice is among all of them, in windows of `length`.
    pub(super) fn of_all(&mut self, length: usize) {
        (self.length, self.limit) = (length, usize::MAX);
    }

    /// Whether nothing more need be read.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// Tokens that fill it; `None` if it takes all.
    pub(super) fn tokens_max(&self) -> Option<usize> {
        (self.limit < usize::MAX).then(|| self.limit.saturating_mul(self.length))
    }

    pub(super) fn count(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn documents(&self) -> usize {
        self.documents
    }

    /// Says that more could have been read.
    pub(super) fn end_early(&mut self) {
        self.full = true;
    }

    /// Cuts one document's ids into windows.
    ///
    /// # Errors
    /// An id outside the vocabulary, by its position; more ids than are ever held.
    pub(super) fn add(&mut self, document: &[i64]) -> Result<(), String> {
        self.documents += 1;
        self.empty += usize::from(document.is_empty());
        let least = self.length.min(TAIL_TOKENS_MIN);
        for (index, window) in document.chunks(self.length).enumerate() {
            if self.ends.len() == self.limit {
                self.full = true;
                return Ok(());
            }
            if index > 0 && window.len() < least {
                self.dropped += window.len();
                continue;
            }
            if window.len() > TOKENS_MAX - self.ids.len() {
                return Err(format!("has more than {TOKENS_MAX} tokens, expected a limit by --samples"));
            }
            for (at, id) in window.iter().enumerate() {
                self.ids.push(self.checked(*id, index * self.length + at)?);
            }
            self.ends.push(self.ids.len());
        }
        Ok(())
    }

    fn checked(&self, id: i64, position: usize) -> Result<i32, String> {
        i32::try_from(id).ok().filter(|id| (0..self.vocabulary as i64).contains(&i64::from(*id))).ok_or_else(
            || {
                format!(
                    "document {}: token {position} is {id}, expected 0 to {}",
                    self.documents,
                    self.vocabulary - 1
                )
            },
        )
    }

    fn window(&self, index: usize) -> &[i32] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.ids[start..self.ends[index]]
    }

    /// `[chosen, longest of them]` little-endian i32, -1 behind the end of a shorter window.
    pub(super) fn take(&self, chosen: &[usize]) -> (Vec<usize>, Vec<u8>) {
        let longest = chosen.iter().map(|&index| self.window(index).len()).max().unwrap_or(0);
        let mut bytes = Vec::with_capacity(chosen.len() * longest * 4);
        for &index in chosen {
            let window = self.window(index);
            let padding = std::iter::repeat_n(-1i32, longest - window.len());
            bytes.extend(window.iter().copied().chain(padding).flat_map(i32::to_le_bytes));
        }
        (vec![chosen.len(), longest], bytes)
    }

    /// What was read and used, a sentence each.
    pub(super) fn notes(&self, wanted: Option<usize>, chosen: &[usize]) -> Vec<String> {
        let (count, used) = (self.count(), chosen.len());
        let tokens: usize = chosen.iter().map(|&index| self.window(index).len()).sum();
        let mut notes = vec![format!(
            "{}, {} of up to {} tokens, {used} used with {tokens} tokens",
            number_of(self.documents, "document"),
            number_of(count, "window"),
            self.length
        )];
        if self.full {
            notes.push(format!("reading ended after {count} windows, {WINDOWS_PER_SAMPLE} per sample"));
        }
        if let Some(wanted) = wanted.filter(|wanted| *wanted > used) {
            notes.push(format!("{wanted} samples were asked for, there are {used}"));
        }
        if self.empty > 0 {
            notes.push(format!("{} without text", number_of(self.empty, "document")));
        }
        if self.dropped > 0 {
            notes.push(format!(
                "{} at the ends of documents not used: fewer than {} are no window",
                number_of(self.dropped, "token"),
                self.length.min(TAIL_TOKENS_MIN)
            ));
        }
        notes
    }
}

/// `1 window`, `2 windows`.
fn number_of(count: usize, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}
