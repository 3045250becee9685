//! A file without a name, for functions that take a path.

use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A file that has a path for as long as it is open, and leaves nothing behind however the process ends.
pub struct Unlinked {
    file: File,
    path: PathBuf,
}

impl Unlinked {
    /// # Panics
    ///
    /// If no file can be created.
    pub fn new(name: &str) -> Self {
        let linked = path(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&linked);
        let file = file.expect("a file in the folder for temporary files");
        fs::remove_file(linked).expect("our own file");
        let path = PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd()));
        Self { file, path }
    }

    /// Replaces the content.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(bytes)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A path of this process, in memory if possible: a disk's file system would take most of a fuzzer's time.
pub fn path(name: &str) -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let folder = match memory.is_dir() {
        true => memory,
        false => std::env::temp_dir(),
    };
    folder.join(format!("portcullis-fuzz-{}-{name}", std::process::id()))
}
