//! The file of a Unix socket: bound only if no server listens there, with its permissions before
//! the first connect, and removed at the end if it is still the same.
//!
//! Of several servers that start at the same moment over a stale file one gets it. From the look at
//! the file to the listening socket each holds a lock of the folder (`flock(2)`), so that none
//! removes the file of another that is about to listen. A process that dies in between leaves a
//! stale file and no lock. A system for which nix is not built here has no lock.

#[cfg(any(
    target_os = "linux",
    target_os = "android",
    target_os = "freebsd",
    target_os = "dragonfly",
    target_vendor = "apple"
))]
mod lock;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::logs;

/// Device and inode. While a socket is open, no other file gets its inode.
type Identity = (u64, u64);

/// A file that this server has made. Removed on drop, which must be before its socket's.
#[derive(Debug)]
pub(super) struct SocketFile {
    /// Absolute: the process may change its directory.
    path: PathBuf,
    identity: Identity,
    /// Another process may serve it as well: it is not removed.
    handed_out: AtomicBool,
    /// The process that has made it: a forked child does not remove it.
    process: u32,
}

impl SocketFile {
    /// Binds and listens. An existing file is removed only if it is a socket that refuses
    /// connections.
    pub(super) fn listen(
        socket: &Socket,
        path: &Path,
        mode: Option<u32>,
        backlog: i32,
    ) -> io::Result<Self> {
        let addr = SockAddr::unix(path)?;
        #[cfg(any(
            target_os = "linux",
            target_os = "android",
            target_os = "freebsd",
            target_os = "dragonfly",
            target_vendor = "apple"
        ))]
        let _lock = lock::FolderLock::of(path);
        if let Err(error) = socket.bind(&addr) {
            if error.kind() != io::ErrorKind::AddrInUse {
                return Err(error);
            }
            remove_stale(path)?;
            socket.bind(&addr)?;
        }
        let path = std::path::absolute(path)?;
        let file = Self {
            identity: identity(&fs::symlink_metadata(&path)?),
            path,
            handed_out: AtomicBool::new(false),
            process: std::process::id(),
        };
        // A socket refuses clients until it listens, so no client connects under wider permissions.
        if let Some(mode) = mode {
            fs::set_permissions(&file.path, fs::Permissions::from_mode(mode))?;
        }
        socket.listen(backlog)?;
        // Until then it looked stale to a server that knows no lock and started at the same moment.
        if !file.is_ours() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(file)
    }

    pub(super) fn hand_out(&self) {
        self.handed_out.store(true, Ordering::Relaxed);
    }

    fn is_ours(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_copy = std::process::id() != self.process;
        if is_copy || self.handed_out.load(Ordering::Relaxed) || !self.is_ours() {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            logs::warning!(target: logs::LISTENER, "cannot remove the socket {:?}: {error}", self.path);
        }
    }
}

fn identity(metadata: &fs::Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

/// Removes a socket that refuses connections; an error for everything else.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is a file that is no socket",
        ));
    }
    let refused = refuses(path)?;
    let same = fs::symlink_metadata(path).is_ok_and(|again| identity(&again) == identity(&found));
    if !refused || !same {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    logs::info!(
        target: logs::LISTENER,
        "the socket {path:?} refuses connections: no server uses it, and it is removed"
    );
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whether the file is stale. EAGAIN and EACCES mean that a server is listening; only ECONNREFUSED
/// means that none is.
fn refuses(path: &Path) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    let answer = probe.connect(&SockAddr::unix(path)?);
    Ok(answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}
