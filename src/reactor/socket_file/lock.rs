//! The folder of a socket file, locked against other servers that start.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::logs;

/// Number of attempts, a millisecond apart. A start holds the lock for less, but any process may
/// lock a folder that it can read: then the start goes on without.
const ATTEMPTS: usize = 1000;

/// Released on drop, and by the end of the process. `None` where there is no lock: without the
/// permission to read the folder, and on file systems that have none.
pub(super) struct FolderLock(Option<Flock<File>>);

impl FolderLock {
    pub(super) fn of(path: &Path) -> Self {
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        let Ok(mut folder) = File::open(folder.unwrap_or(Path::new("."))) else {
            return Self(None);
        };
        for _ in 0..ATTEMPTS {
            match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Self(Some(lock)),
                Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) => folder = again,
                Err(_) => return Self(None),
            }
            thread::sleep(Duration::from_millis(1));
        }
        logs::info!(
            target: logs::LISTENER,
            "another process keeps the folder of the socket {path:?} locked"
        );
        Self(None)
    }
}

impl Drop for FolderLock {
    /// Not left to the end of the descriptor, of which a child process may have a copy.
    fn drop(&mut self) {
        if let Some(Err((lock, _))) = self.0.take().map(Flock::unlock) {
            // Its own destructor panics where the system cannot unlock.
            std::mem::forget(lock);
        }
    }
}
