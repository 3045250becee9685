//! Results of calls as bytes: addresses and credentials.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;

#[cfg(any(test, feature = "sim"))]
use crate::addr::UnixAddr;
use crate::addr::{Addr, Credentials};

const V4: u8 = 4;
const V6: u8 = 6;
const UNIX: u8 = 1;

/// Appends an address, which is the last value of its record.
pub(crate) fn put_addr(bytes: &mut Vec<u8>, addr: &Addr) {
    match addr {
        Addr::Tcp(SocketAddr::V4(addr)) => {
            bytes.push(V4);
            bytes.extend(addr.ip().octets());
            bytes.extend(addr.port().to_le_bytes());
        }
        Addr::Tcp(SocketAddr::V6(addr)) => {
            bytes.push(V6);
            bytes.extend(addr.ip().octets());
            bytes.extend(addr.port().to_le_bytes());
            bytes.extend(addr.flowinfo().to_le_bytes());
            bytes.extend(addr.scope_id().to_le_bytes());
        }
        Addr::Unix(name) => {
            bytes.push(UNIX);
            if let Some(path) = name.as_pathname() {
                bytes.extend(path.as_os_str().as_bytes());
            } else if let Some(name) = name.as_abstract_name() {
                bytes.push(0);
                bytes.extend(name);
            }
        }
    }
}

pub(crate) fn put_credentials(bytes: &mut Vec<u8>, credentials: &Credentials) {
    bytes.extend(credentials.uid.to_le_bytes());
    bytes.extend(credentials.gid.to_le_bytes());
    bytes.extend(credentials.pid.unwrap_or(0).to_le_bytes());
    bytes.push(u8::from(credentials.pid.is_some()));
}

/// Takes values from the front of a record's bytes.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy)]
pub(crate) struct Values<'a>(pub(crate) &'a [u8]);

#[cfg(any(test, feature = "sim"))]
impl<'a> Values<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn number(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn port(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn addr(&mut self) -> Option<Addr> {
        Some(match self.byte()? {
            V4 => {
                let ip = std::net::IpAddr::from(self.array::<4>()?);
                SocketAddr::new(ip, self.port()?).into()
            }
            V6 => {
                let (ip, port) = (self.array::<16>()?.into(), self.port()?);
                let (flow, scope) = (self.number()?, self.number()?);
                SocketAddr::from(std::net::SocketAddrV6::new(ip, port, flow, scope)).into()
            }
            UNIX => UnixAddr::from_bytes(std::mem::take(&mut self.0)).into(),
            _ => return None,
        })
    }

    pub(crate) fn credentials(&mut self) -> Option<Credentials> {
        let (uid, gid, pid) = (self.number()?, self.number()?, self.number()?);
        let pid = (self.byte()? != 0).then_some(pid);
        Some(Credentials { uid, gid, pid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_credentials_come_back() {
        let scoped = std::net::SocketAddrV6::new("fe80::1".parse().expect("an address"), 7, 5, 3);
        let addrs = [
            Addr::from(SocketAddr::from(([10, 0, 0, 1], 2222))),
            Addr::from(SocketAddr::from(scoped)),
            UnixAddr::unnamed().into(),
            UnixAddr::abstract_name(b"name").into(),
            UnixAddr::pathname(std::path::Path::new("/run/server.sock")).into(),
        ];
        for addr in addrs {
            let mut bytes = Vec::new();
            put_addr(&mut bytes, &addr);
            assert_eq!(Values(&bytes).addr(), Some(addr));
            assert_eq!(Values(&[9]).addr(), None);
        }
        for pid in [None, Some(7)] {
            let (uid, gid, mut bytes) = (1, 2, Vec::new());
            let credentials = Credentials { uid, gid, pid };
            put_credentials(&mut bytes, &credentials);
            assert_eq!(Values(&bytes).credentials(), Some(credentials));
            bytes.pop();
            assert_eq!(Values(&bytes).credentials(), None);
        }
    }
}
