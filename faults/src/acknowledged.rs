//! What the coordinator has acknowledged: commits in its log, artefacts on its disk.
//!
//! It writes a line when a rounding is durable, before the node that brought it is answered. So a place (layer, chunk)
//! that is committed again later, by this process or the next, was acknowledged and lost.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::damage::files_below;

/// Name of the folder that holds artefacts.
const FOLDER: &str = "artefacts";
/// What the line says.
const COMMITTED: &str = "rounding committed ";

/// Commits of roundings over the whole life of a job: hashes by layer and chunk, in order of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged(BTreeMap<(u32, u32), Vec<String>>);

impl Acknowledged {
    /// Adds what one process of a coordinator has logged, to be called in the order of their lives.
    pub fn add(&mut self, log: &str) {
        for (_, fields) in log.lines().filter_map(|line| line.split_once(COMMITTED)) {
            let field = |name: &str| {
                let mut words = fields.split_whitespace();
                words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=').map(str::to_string))
            };
            let number = |name: &str| field(name).and_then(|text| text.parse().ok());
            // The last line of a killed process may be cut off.
            if let (Some(layer), Some(chunk), Some(hash)) = (number("layer"), number("chunk"), field("hash"))
            {
                self.0.entry((layer, chunk)).or_default().push(hash);
            }
        }
    }

    /// Roundings that were committed.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Places that were committed more than once, one sentence each.
    pub fn lost(&self) -> Vec<String> {
        let again = self.0.iter().filter(|(_, hashes)| hashes.len() > 1);
        again
            .map(|((layer, chunk), hashes)| format!("layer {layer}, chunk {chunk}: committed {hashes:?}"))
            .collect()
    }
}

/// Artefacts in a coordinator's state folder.
///
/// # Errors
/// If it cannot be read.
pub fn artefacts(state_dir: &Path) -> Result<Vec<PathBuf>> {
    let named =
        |path: &PathBuf| path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'));
    Ok(files_below(&state_dir.join(FOLDER))?.into_iter().filter(named).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_committed_twice_is_lost_and_a_line_cut_off_is_nothing() {
        let mut acknowledged = Acknowledged::default();
        acknowledged.add("INFO x: rounding committed layer=3 chunk=0 node=1 hash=aa\nINFO x: job over\n");
        acknowledged
            .add("INFO x: rounding committed layer=3 chunk=1 node=1 hash=aa\nrounding committed layer=3");
        assert_eq!((acknowledged.len(), acknowledged.lost().len()), (2, 0));
        acknowledged.add("INFO x: rounding committed layer=3 chunk=1 node=2 hash=bb");
        assert_eq!(acknowledged.lost(), [r#"layer 3, chunk 1: committed ["aa", "bb"]"#]);
    }
}
