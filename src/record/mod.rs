//! Recordings: what each call of [`Os`](crate::reactor::os::Os) returned, in a file of fixed size.
//!
//! | part | owns |
//! |---|---|
//! | `format` | words, blocks, checksums |
//! | `recorder` | the file, and the block in memory |
//! | `values`, `note` | results as bytes, and as records |
//! | `os` | the calls |

pub(crate) mod format;
mod note;
mod os;
mod recorder;
pub(crate) mod values;

use std::path::PathBuf;

use crate::error::{Error, Result};
pub(crate) use os::RecordingOs;

/// Recordings smaller than this would hold a few thousand messages.
const MIN_BYTES: u64 = 256 * 1024;

/// The file to which a server records, for [`Server::recorded`](crate::Server::recorded). Feature
/// `record`.
///
/// See the section *Recordings* of the handbook's page [`testing`](crate::manual) for what is in
/// the file and how it is replayed.
///
/// ```
/// # use portcullis::{Config, Payloads, Recording, Server};
/// # fn main() -> portcullis::Result<()> {
/// # let folder = std::env::temp_dir().join(format!("recorded-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// let recording = Recording::new(folder.join("server.rec")).with(|recording| {
///     recording.max_bytes = 16 << 20;
///     recording.payloads = Payloads::Kept;
/// });
/// let server: Server = Server::recorded(Config::new(), recording)?;
/// # drop(server);
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Recording {
    /// The file. It must not exist, and is created with mode 0600. One server records to it.
    pub path: PathBuf,
    /// Maximum size of the file, in bytes. When it is reached, the oldest part is overwritten, and
    /// the file cannot be replayed exactly any more. At least 256 KiB; defaults to 64 MiB.
    pub max_bytes: u64,
    /// What is kept of the bytes that peers and handlers send. Defaults to [`Payloads::Dropped`].
    pub payloads: Payloads,
}

impl Recording {
    /// Returns the defaults for this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            max_bytes: 64 << 20,
            payloads: Payloads::Dropped,
        }
    }

    /// Changes options, within an expression.
    #[must_use]
    pub fn with(mut self, set: impl FnOnce(&mut Self)) -> Self {
        set(&mut self);
        self
    }

    fn check(&self) -> Result<()> {
        match self.max_bytes < MIN_BYTES {
            true => Err(Error::option(
                "max_bytes",
                format!("a recording needs at least {MIN_BYTES} bytes"),
            )),
            false => Ok(()),
        }
    }
}

/// What a [`Recording`] keeps of the bytes that peers and handlers send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Payloads {
    /// Only lengths.
    Dropped,
    /// Lengths, and a hash of each read and write. Short messages can be guessed from their hash.
    Hashed,
    /// Everything, passwords included.
    Kept,
}
