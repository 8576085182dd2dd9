//! Names of the pods of a Job: all alike but for the index.

use std::str::FromStr;

/// Stands for the index.
const PLACE: &str = "{}";
/// What a name of the DNS can have at most.
const NAME_MAX: usize = 253;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerNames(String);

impl PeerNames {
    /// The host name of the pod of this index.
    pub(crate) fn of(&self, index: u32) -> String {
        self.0.replace(PLACE, &index.to_string())
    }
}

impl FromStr for PeerNames {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self(text.into());
        let longest = names.of(u32::MAX);
        if longest.is_empty() || longest.len() > NAME_MAX {
            return Err(format!("expected a name of 1 to {NAME_MAX} characters, found {}", longest.len()));
        }
        let stray = longest.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '.'));
        match stray {
            Some(stray) => Err(format!(
                "expected a host name with {{}} for the index and no port, found {stray:?} in it"
            )),
            None => Ok(names),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_takes_the_place_of_the_braces() {
        let names: PeerNames = "halfstep-{}.halfstep".parse().unwrap();
        assert_eq!([0, 12].map(|index| names.of(index)), ["halfstep-0.halfstep", "halfstep-12.halfstep"]);
        assert_eq!("localhost".parse::<PeerNames>().unwrap().of(3), "localhost");
    }

    #[test]
    fn what_is_no_name_of_a_host_is_refused() {
        for wrong in ["", "a-{}:7421", "http://{}", "a{b}", "a {}", &"a".repeat(254)] {
            assert!(wrong.parse::<PeerNames>().is_err(), "{wrong}");
        }
    }
}
