//! Addresses from text and from other types.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::path::Path;
use std::str::FromStr;

use super::{Addr, UnixAddr};

const A_HOST: &str =
    "names a host, and looking that up would block: resolve it first, with std::net::ToSocketAddrs \
     on another thread, and give the address";

impl Addr {
    /// Makes the address of a Unix socket's file.
    pub fn unix(path: impl AsRef<Path>) -> Self {
        UnixAddr::pathname(path.as_ref()).into()
    }

    /// Makes an address in Linux's abstract namespace, from the name without its leading zero.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    pub fn unix_abstract(name: impl AsRef<[u8]>) -> Self {
        UnixAddr::abstract_name(name.as_ref()).into()
    }
}

/// Parses `127.0.0.1:2222`, `[::1]:2222`, `unix:/run/server.sock` or `unix:@abstract`. Host names
/// are refused: see [`AddrError`].
impl FromStr for Addr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let wrong = |problem| AddrError {
            given: text.to_owned(),
            problem,
        };
        if let Some(name) = text.strip_prefix("unix:") {
            return match name.strip_prefix('@') {
                _ if name.is_empty() => Err(wrong("has no path")),
                #[cfg(any(target_os = "linux", target_os = "android"))]
                Some(name) => Ok(Self::unix_abstract(name)),
                _ => Ok(Self::unix(name)),
            };
        }
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return Ok(addr.into());
        }
        if text.parse::<IpAddr>().is_ok() {
            return Err(wrong(
                "has no port: give IP:PORT, with an IPv6 address in brackets",
            ));
        }
        Err(match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => wrong(A_HOST),
            _ => wrong("is neither IP:PORT nor unix:PATH"),
        })
    }
}

impl TryFrom<&str> for Addr {
    type Error = AddrError;

    fn try_from(text: &str) -> Result<Self, AddrError> {
        text.parse()
    }
}

impl TryFrom<String> for Addr {
    type Error = AddrError;

    fn try_from(text: String) -> Result<Self, AddrError> {
        text.parse()
    }
}

impl TryFrom<&String> for Addr {
    type Error = AddrError;

    fn try_from(text: &String) -> Result<Self, AddrError> {
        text.parse()
    }
}

impl From<&Self> for Addr {
    fn from(addr: &Self) -> Self {
        addr.clone()
    }
}

/// The sources of a [`SocketAddr`].
macro_rules! from_socket_addr {
    ($($parts:ty),*) => {$(
        impl From<$parts> for Addr {
            fn from(addr: $parts) -> Self {
                SocketAddr::from(addr).into()
            }
        }
    )*};
}

from_socket_addr!(
    SocketAddrV4,
    SocketAddrV6,
    (IpAddr, u16),
    (Ipv4Addr, u16),
    (Ipv6Addr, u16)
);

impl From<&SocketAddr> for Addr {
    fn from(addr: &SocketAddr) -> Self {
        (*addr).into()
    }
}

/// An IP address as text, without brackets, and a port. Host names are refused: see [`AddrError`].
impl TryFrom<(&str, u16)> for Addr {
    type Error = AddrError;

    fn try_from((host, port): (&str, u16)) -> Result<Self, AddrError> {
        host.parse::<IpAddr>()
            .map(|ip| (ip, port).into())
            .map_err(|_| AddrError {
                given: host.to_owned(),
                problem: if host.is_empty() {
                    "is no IP address"
                } else {
                    A_HOST
                },
            })
    }
}

/// Why a text is no [`Addr`]. A host name is refused too: a lookup (`getaddrinfo(3)`) can block for
/// a minute, and with it a running server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddrError {
    given: String,
    problem: &'static str,
}

impl fmt::Display for AddrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.given, self.problem)
    }
}

impl StdError for AddrError {}

/// A value that is an address already.
impl From<Infallible> for AddrError {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_what_it_displays_as() {
        let mut addrs = vec![
            "127.0.0.1:80",
            "[::1]:65535",
            "unix:/run/a b.sock",
            "unix:relative",
        ];
        if cfg!(any(target_os = "linux", target_os = "android")) {
            addrs.push("unix:@name");
        }
        for text in addrs {
            assert_eq!(text.parse::<Addr>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_std_takes_for_an_address_is_one() {
        let v4: Addr = "127.0.0.1:80".parse().expect("an address");
        let v6: Addr = "[::1]:80".parse().expect("an address");
        let four: SocketAddrV4 = "127.0.0.1:80".parse().expect("an address");
        let six: SocketAddrV6 = "[::1]:80".parse().expect("an address");
        let fours: [Addr; 3] = [
            four.into(),
            (*four.ip(), 80).into(),
            (IpAddr::from(*four.ip()), 80).into(),
        ];
        assert!(fours.iter().all(|addr| *addr == v4), "{fours:?}");
        let sixes: [Addr; 3] = [
            six.into(),
            (*six.ip(), 80).into(),
            (&SocketAddr::from(six)).into(),
        ];
        assert!(sixes.iter().all(|addr| *addr == v6), "{sixes:?}");
        assert_eq!(Addr::try_from(("127.0.0.1", 80)), Ok(v4));
        assert_eq!(Addr::try_from(("::1", 80)), Ok(v6));
        let host = Addr::try_from(("localhost", 80)).expect_err("a host");
        assert!(
            host.to_string().contains("\"localhost\" names a host"),
            "{host}"
        );
        let none = Addr::try_from(("", 80)).expect_err("nothing");
        assert_eq!(none.to_string(), "\"\" is no IP address");
    }

    #[test]
    fn what_is_none_says_what_to_do() {
        let words = |text: &str| text.parse::<Addr>().expect_err(text).to_string();
        for name in ["localhost:80", "example.org:443", "a:1"] {
            assert!(words(name).contains("resolve it first"), "{name}");
        }
        for bare in ["127.0.0.1", "::1"] {
            assert!(words(bare).contains("has no port"), "{bare}");
        }
        for other in ["", ":80", "localhost", "1.2.3.4:99999", "/run/a.sock"] {
            assert!(words(other).contains("neither"), "{other}");
        }
        assert!(words("unix:").contains("no path"));
    }

    /// `Control::connect` takes every value that converts to an address.
    #[test]
    fn an_address_can_be_lent() {
        let addr = Addr::unix("/run/a.sock");
        let taken: Addr = (&addr).into();
        assert_eq!(taken, addr);
    }
}
