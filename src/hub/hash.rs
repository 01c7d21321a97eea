//! The two hashes that the hub knows contents by: sha256 (large files) and git's blob id (the others).

use super::repo::is_hex;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::io::{self, Read};

pub(super) enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Hasher {
    /// Git hashes `blob`, the size and the content.
    pub fn git_blob(size: u64) -> Self {
        Self::GitBlob(Sha1::new().chain_update(format!("blob {size}\0")))
    }

    /// For a content of `size` bytes with the hash `identity`.
    pub fn like(identity: &str, size: u64) -> Self {
        if identity.len() == 64 { Self::Sha256(Sha256::new()) } else { Self::git_blob(size) }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::GitBlob(hasher) => hasher.update(bytes),
        }
    }

    /// Takes all that is left of `content` and returns how many bytes that was.
    pub fn update_from(&mut self, content: &mut impl Read) -> io::Result<u64> {
        let mut buffer = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            match content.read(&mut buffer) {
                Ok(0) => return Ok(total),
                Ok(count) => {
                    self.update(&buffer[..count]);
                    total += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// In hexadecimal.
    pub fn finish(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::GitBlob(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// Whether `text` can be a git id or a sha256; mirrors may send other ETags.
pub(super) fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && is_hex(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_sha256sum() -> io::Result<()> {
        let hash = |identity: &str, text: &str| {
            let mut hasher = Hasher::like(identity, text.len() as u64);
            hasher.update_from(&mut text.as_bytes()).map(|count| (count, hasher.finish()))
        };
        // printf 'hi\n' | git hash-object --stdin; printf 'hi\n' | sha256sum
        for (text, expected) in [
            ("hi\n", "45b983be36b73c0788dc9cbcb76cbb80fc7bb057"),
            ("", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            ("hi\n", "98ea6e4f216f2fb4b69fff9b3a44842c38686ca685f3f55dc48c5d3fb1107be4"),
        ] {
            assert!(is_hash(expected));
            assert_eq!(hash(expected, text)?, (text.len() as u64, expected.to_string()));
        }
        Ok(())
    }
}
