//! How much of a socket's output its peer's system has taken, where the system tells.

#[cfg(target_os = "linux")]
use std::ffi::OsString;
use std::os::fd::BorrowedFd;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;

#[cfg(target_os = "linux")]
use nix::errno::Errno;

/// Sizes of a socket's buffers: SO_MEMINFO, since Linux 4.12 (`linux/sock_diag.h`).
#[cfg(target_os = "linux")]
#[derive(Clone, Copy)]
struct MemInfo;

#[cfg(target_os = "linux")]
nix::getsockopt_impl!(
    MemInfo,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; 6],
    nix::sys::socket::sockopt::GetStruct<[u32; 6]>
);

/// The length of the answer to SO_MEMINFO. nix's getter of a structure panics if that is short: of
/// qemu's user mode, which answers options that it does not know with one `int`.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy)]
struct MemInfoLength;

#[cfg(target_os = "linux")]
struct NoZeros([u8; size_of::<[u32; 6]>()]);

#[cfg(target_os = "linux")]
impl AsMut<[u8]> for NoZeros {
    /// Without zeros nix returns a string as long as the answer.
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.fill(1);
        &mut self.0
    }
}

#[cfg(target_os = "linux")]
nix::getsockopt_impl!(
    MemInfoLength,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    OsString,
    nix::sys::socket::sockopt::GetOsString<NoZeros>
);

/// Whether the system answers SO_MEMINFO in full. Asked until there is an answer: it allocates.
#[cfg(target_os = "linux")]
fn has_mem_info(socket: BorrowedFd<'_>) -> bool {
    static FULL: OnceLock<bool> = OnceLock::new();
    if let Some(&full) = FULL.get() {
        return full;
    }
    let full = match nix::sys::socket::getsockopt(&socket, MemInfoLength) {
        Ok(answer) => answer.len() == size_of::<[u32; 6]>(),
        Err(Errno::ENOPROTOOPT) => false,
        // Of this socket, or for now.
        Err(_) => return false,
    };
    *FULL.get_or_init(|| full)
}

/// The memory of output that the peer has not acknowledged, or on a Unix socket not read.
#[cfg(target_os = "linux")]
pub(super) fn unsent(socket: BorrowedFd<'_>, is_unix: bool) -> Option<usize> {
    if !has_mem_info(socket) {
        return None;
    }
    let found = nix::sys::socket::getsockopt(&socket, MemInfo).ok()?;
    let [_, _, wmem_alloc, _, _, wmem_queued] = found;
    usize::try_from(if is_unix { wmem_alloc } else { wmem_queued }).ok()
}

/// What the kernel knows of a TCP connection: TCP_INFO (`tcp(7)`), up to `tcpi_bytes_acked`, since
/// Linux 4.1.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy)]
struct TcpInfo;

#[cfg(target_os = "linux")]
nix::getsockopt_impl!(
    TcpInfo,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u64; 16],
    nix::sys::socket::sockopt::GetStruct<[u64; 16]>
);

/// Number of bytes that the peer has acknowledged, FIN included. It stays after a reset.
#[cfg(target_os = "linux")]
pub(super) fn acknowledged(socket: BorrowedFd<'_>) -> Option<u64> {
    // nix panics where the system knows less than is asked for. One that answers this is new enough.
    if !has_mem_info(socket) {
        return None;
    }
    let info = nix::sys::socket::getsockopt(&socket, TcpInfo).ok()?;
    info.last().copied()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn acknowledged(_socket: BorrowedFd<'_>) -> Option<u64> {
    None
}

/// Number of bytes in the send buffer (SO_NWRITE).
#[cfg(target_vendor = "apple")]
#[derive(Clone, Copy)]
struct NWrite;

#[cfg(target_vendor = "apple")]
nix::getsockopt_impl!(
    NWrite,
    libc::SOL_SOCKET,
    libc::SO_NWRITE,
    libc::c_int,
    nix::sys::socket::sockopt::GetStruct<libc::c_int>
);

#[cfg(target_vendor = "apple")]
pub(super) fn unsent(socket: BorrowedFd<'_>, _is_unix: bool) -> Option<usize> {
    let unsent = nix::sys::socket::getsockopt(&socket, NWrite);
    usize::try_from(unsent.ok()?).ok()
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub(super) fn unsent(_socket: BorrowedFd<'_>, _is_unix: bool) -> Option<usize> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::{self, Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use socket2::SockRef;

    use super::*;

    /// Whether the peer's system has taken `sent` bytes is known after its reset too.
    #[test]
    fn a_reset_hides_nothing_of_what_was_taken() {
        for reads in [true, false] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
            let addr = listener.local_addr().expect("an address");
            let mut peer = std::net::TcpStream::connect(addr).expect("it listens");
            let (stream, _) = listener.accept().expect("a client");
            stream.set_nonblocking(true).expect("set");
            let mut written = 0;
            while written < 60_000 || !reads {
                match (&stream).write(&[7; 60_000]) {
                    Ok(count) => written += count as u64,
                    Err(_) => break,
                }
            }
            if reads {
                let mut all = vec![0; usize::try_from(written).expect("small")];
                peer.read_exact(&mut all).expect("all of it");
            }
            SockRef::from(&peer)
                .set_linger(Some(Duration::ZERO))
                .expect("set");
            drop(peer);
            let error = loop {
                match (&stream).read(&mut [0; 16]) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        std::thread::yield_now();
                    }
                    ended => break ended.expect_err("a reset"),
                }
            };
            assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET));
            let acknowledged = acknowledged(stream.as_fd()).expect("Linux tells");
            assert_eq!(
                acknowledged >= written,
                reads,
                "{acknowledged} of {written}"
            );
        }
    }

    /// As an answer of qemu's user mode, of which nix's getter of structures would panic.
    #[test]
    fn the_length_of_an_answer_is_known() {
        #[derive(Clone, Copy)]
        struct Short;
        nix::getsockopt_impl!(
            Short,
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            OsString,
            nix::sys::socket::sockopt::GetOsString<NoZeros>
        );
        let (socket, _peer) = UnixStream::pair().expect("a pair");
        let length = |answer: nix::Result<OsString>| answer.expect("an answer").len();
        assert_eq!(length(nix::sys::socket::getsockopt(&socket, Short)), 4);
        let full = nix::sys::socket::getsockopt(&socket, MemInfoLength);
        assert_eq!(length(full), 24);
    }
}
