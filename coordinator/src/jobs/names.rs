//! Names of files as somebody else gives them: relative, plain, and without a way out of their folder.

use std::path::{Path, PathBuf};

const NAME_BYTES_MAX: usize = 1024;

/// The path below a folder that a foreign name stands for. Parts are divided by `/` on every system.
///
/// # Errors
/// One sentence about what is wrong with the name.
pub(super) fn relative(name: &str) -> Result<PathBuf, String> {
    let refuse = |what: &str| Err(format!("file name `{}`: {what}", name.escape_debug()));
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return refuse(&format!("has {} bytes, expected 1 to {NAME_BYTES_MAX}", name.len()));
    }
    if name.chars().any(|c| c.is_control() || c == '\\' || c == ':') {
        return refuse("has a control character, `\\` or `:`");
    }
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    if !name.split('/').all(plain) {
        return refuse("leaves its folder, expected a plain relative path");
    }
    Ok(name.split('/').collect())
}

/// The name of a file relative to a root, as it travels.
///
/// # Errors
/// If it is not inside, or not text.
pub(super) fn travelling(root: &Path, file: &Path) -> Result<String, String> {
    let inside = file
        .strip_prefix(root)
        .map_err(|_| format!("{}: is not inside {}", file.display(), root.display()))?;
    let parts: Option<Vec<&str>> = inside.iter().map(|part| part.to_str()).collect();
    let name = parts.ok_or_else(|| format!("{}: its name is not UTF-8", file.display()))?.join("/");
    relative(&name).map(|_| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_relative_names_pass() {
        for name in ["model.onnx", "a/b/c.npy", "a b/ü.png", ".hidden", "..."] {
            assert_eq!(relative(name).unwrap(), Path::new(name), "{name}");
        }
    }

    #[test]
    fn ways_out_are_refused() {
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for name in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "./a",
            "a/",
            "a\\b",
            "C:x",
            "a\0b",
            "a\nb",
            &long,
        ] {
            assert!(relative(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn files_get_names_relative_to_their_root() {
        assert_eq!(travelling(Path::new("/d"), Path::new("/d/a/b.npy")).unwrap(), "a/b.npy");
        assert_eq!(travelling(Path::new(""), Path::new("b.npy")).unwrap(), "b.npy");
        assert!(travelling(Path::new("/d"), Path::new("/e/b.npy")).is_err());
    }
}
