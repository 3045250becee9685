//! Addresses of sockets: an IP address with a port, or a Unix socket's name.

mod parse;

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net as unix;
use std::path::Path;
use std::sync::Arc;

use crate::escape::Escaped;
pub use parse::AddrError;

/// The address of one end of a connection, or of a listener.
///
/// ```
/// # use portcullis::Addr;
/// let addr = Addr::from(std::net::SocketAddr::from(([127, 0, 0, 1], 2222)));
/// assert_eq!(addr.to_string(), "127.0.0.1:2222");
/// assert_eq!(addr.port(), Some(2222));
/// ```
///
/// A TCP address fits where `ToSocketAddrs` is expected: `TcpStream::connect(&info.addr)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Addr {
    /// An IPv4 or IPv6 address with a port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(UnixAddr),
}

/// The process at the other end of a Unix socket, as the kernel noted it when that process
/// connected or listened (SO_PEERCRED, `unix(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Credentials {
    /// The effective user.
    pub uid: u32,
    /// The effective group.
    pub gid: u32,
    /// The process id. `None` if the kernel does not report it: on BSD and Apple's systems, and for
    /// a process outside this process's container. The process may have ended since, and its id may
    /// belong to another: decide by user and group.
    pub pid: Option<u32>,
}

/// The name of a Unix socket (`unix(7)`). A client's socket is unnamed, unless the client binds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnixAddr(Name);

/// Shared, so that an [`Addr`] is not larger than a `SocketAddr`: every connection has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Name {
    Unnamed,
    Path(Arc<Path>),
    Abstract(Arc<[u8]>),
}

impl Addr {
    /// Returns the TCP address; `None` for a Unix socket.
    pub fn as_tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            Self::Unix(_) => None,
        }
    }

    /// The Unix socket's name; `None` for TCP.
    pub(crate) fn as_unix(&self) -> Option<&UnixAddr> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(addr) => Some(addr),
        }
    }

    /// Returns the IP address; `None` for a Unix socket.
    pub fn ip(&self) -> Option<IpAddr> {
        Some(self.as_tcp()?.ip())
    }

    /// Returns the port; `None` for a Unix socket.
    pub fn port(&self) -> Option<u16> {
        Some(self.as_tcp()?.port())
    }

    /// Returns the memory that it takes beside its own size.
    pub(crate) fn memory(&self) -> usize {
        // The counts of `Arc`.
        const COUNTS: usize = 2 * size_of::<usize>();
        match self.as_unix().map(|name| &name.0) {
            None | Some(Name::Unnamed) => 0,
            Some(Name::Path(path)) => COUNTS + path.as_os_str().len(),
            Some(Name::Abstract(name)) => COUNTS + name.len(),
        }
    }

    /// Describes a connection that has ended.
    pub(crate) fn unspecified() -> Self {
        Self::Tcp(SocketAddr::from(([0, 0, 0, 0], 0)))
    }
}

/// A smaller [`Addr`] for nearly all cases: every connection has one.
#[derive(Clone, Debug)]
pub(crate) enum PackedAddr {
    V4(Ipv4Addr, u16),
    /// No flow and no scope.
    V6(Ipv6Addr, u16),
    Other(Box<Addr>),
}

impl From<Addr> for PackedAddr {
    fn from(addr: Addr) -> Self {
        match addr {
            Addr::Tcp(SocketAddr::V4(addr)) => Self::V4(*addr.ip(), addr.port()),
            Addr::Tcp(SocketAddr::V6(addr)) if addr.flowinfo() == 0 && addr.scope_id() == 0 => {
                Self::V6(*addr.ip(), addr.port())
            }
            addr => Self::Other(Box::new(addr)),
        }
    }
}

impl PackedAddr {
    pub(crate) fn unpacked(&self) -> Addr {
        match self {
            Self::V4(ip, port) => SocketAddr::from((*ip, *port)).into(),
            Self::V6(ip, port) => SocketAddr::from((*ip, *port)).into(),
            Self::Other(addr) => Addr::clone(addr),
        }
    }
}

impl UnixAddr {
    pub(crate) fn pathname(path: &Path) -> Self {
        Self(Name::Path(Arc::from(path)))
    }

    pub(crate) fn abstract_name(name: &[u8]) -> Self {
        Self(Name::Abstract(Arc::from(name)))
    }

    pub(crate) fn unnamed() -> Self {
        Self(Name::Unnamed)
    }

    /// The name as in `sun_path`: a leading zero is the mark of an abstract one.
    pub(crate) fn from_bytes(name: &[u8]) -> Self {
        match name {
            [] => Self::unnamed(),
            [0, name @ ..] => Self::abstract_name(name),
            path => Self::pathname(Path::new(OsStr::from_bytes(path))),
        }
    }

    /// Returns the path of the socket's file; `None` for an unnamed or abstract socket.
    pub fn as_pathname(&self) -> Option<&Path> {
        match &self.0 {
            Name::Path(path) => Some(path),
            Name::Unnamed | Name::Abstract(_) => None,
        }
    }

    /// Returns the name in Linux's abstract namespace, without its leading zero; `None` for an
    /// unnamed socket or a file.
    pub fn as_abstract_name(&self) -> Option<&[u8]> {
        match &self.0 {
            Name::Abstract(name) => Some(name),
            Name::Unnamed | Name::Path(_) => None,
        }
    }
}

impl From<SocketAddr> for Addr {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

impl From<unix::SocketAddr> for Addr {
    fn from(addr: unix::SocketAddr) -> Self {
        #[cfg(target_os = "android")]
        use std::os::android::net::SocketAddrExt;
        #[cfg(target_os = "linux")]
        use std::os::linux::net::SocketAddrExt;

        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Some(name) = addr.as_abstract_name() {
            return Self::Unix(UnixAddr::abstract_name(name));
        }
        Self::Unix(
            addr.as_pathname()
                .map_or_else(UnixAddr::unnamed, UnixAddr::pathname),
        )
    }
}

impl From<UnixAddr> for Addr {
    fn from(addr: UnixAddr) -> Self {
        Self::Unix(addr)
    }
}

impl PartialEq<SocketAddr> for Addr {
    fn eq(&self, other: &SocketAddr) -> bool {
        self.as_tcp() == Some(*other)
    }
}

impl PartialEq<Addr> for SocketAddr {
    fn eq(&self, other: &Addr) -> bool {
        other == self
    }
}

impl ToSocketAddrs for Addr {
    type Iter = std::option::IntoIter<SocketAddr>;

    fn to_socket_addrs(&self) -> io::Result<Self::Iter> {
        match self {
            Self::Tcp(addr) => addr.to_socket_addrs(),
            Self::Unix(name) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name} is a Unix socket, which has no IP address"),
            )),
        }
    }
}

/// `127.0.0.1:2222`, `[::1]:2222`, `unix:/run/server.sock`, `unix:@abstract`, `unix:` without a
/// name.
impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(name) => name.fmt(f),
        }
    }
}

/// As for [`Addr`]. Control characters, backslashes and bytes that are no UTF-8 are escaped, and at
/// most 1 KiB is printed. The reason: logs print names that clients choose.
impl fmt::Display for UnixAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mark, name) = match &self.0 {
            Name::Unnamed => ("", &[][..]),
            Name::Path(path) => ("", path.as_os_str().as_bytes()),
            Name::Abstract(name) => ("@", &**name),
        };
        write!(f, "unix:{mark}{}", Escaped::new(Bytes(name)))
    }
}

/// Bytes as text. No two names look the same.
struct Bytes<'a>(&'a [u8]);

impl fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            f.write_str(&chunk.valid().replace('\\', "\\\\"))?;
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_the_room_of_a_socket_addr() {
        assert_eq!(size_of::<Addr>(), size_of::<SocketAddr>());
    }

    #[test]
    fn packed_it_is_the_same() {
        assert!(size_of::<PackedAddr>() < size_of::<Addr>());
        for text in ["127.0.0.1:1", "[2001:db8::1]:65535", "[::ffff:10.0.0.1]:80"] {
            let addr = Addr::from(text.parse::<SocketAddr>().expect("an address"));
            let packed = PackedAddr::from(addr.clone());
            assert!(!matches!(packed, PackedAddr::Other(_)));
            assert_eq!(packed.unpacked(), addr);
        }
        let scoped = std::net::SocketAddrV6::new(Ipv6Addr::LOCALHOST, 7, 0, 3);
        let named = UnixAddr::abstract_name(b"name");
        for addr in [Addr::from(SocketAddr::from(scoped)), Addr::from(named)] {
            assert_eq!(PackedAddr::from(addr.clone()).unpacked(), addr);
        }
    }

    #[test]
    fn each_kind_says_what_it_is() {
        let tcp = SocketAddr::from(([127, 0, 0, 1], 2222));
        let addr = Addr::from(tcp);
        assert_eq!(
            (addr.as_tcp(), addr.ip(), addr.port()),
            (Some(tcp), Some(tcp.ip()), Some(2222))
        );
        assert_eq!(addr, tcp);
        assert_eq!(tcp, addr);
        assert_eq!(addr.as_unix(), None);
        assert_eq!(
            addr.to_socket_addrs().expect("one").collect::<Vec<_>>(),
            [tcp]
        );

        let unix = unix::SocketAddr::from_pathname("/run/x.sock").expect("short enough");
        let unix = Addr::from(unix);
        assert_eq!((unix.as_tcp(), unix.ip(), unix.port()), (None, None, None));
        assert!(unix != tcp);
        assert!(unix.to_socket_addrs().is_err());
        assert_eq!(unix.to_string(), "unix:/run/x.sock");
        assert_eq!(UnixAddr(Name::Unnamed).to_string(), "unix:");
        let strange = Name::Abstract(Arc::from(&b"x\n\0"[..]));
        assert_eq!(UnixAddr(strange).to_string(), "unix:@x\\n\\0");
        let bytes = Name::Abstract(Arc::from(&b"\xff\\\xfe"[..]));
        assert_eq!(UnixAddr(bytes).to_string(), r"unix:@\xff\\\xfe");
    }
}
