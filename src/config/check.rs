//! Finds values of a listener that cannot work, and changes that an open port cannot make.

use std::os::unix::ffi::OsStrExt;

use super::{AtCapacity, Listen, ProxyProtocol};
use crate::addr::{Addr, UnixAddr};
use crate::error::{Error, Result};
use crate::escape::is_escaped;
use crate::proto::check_rates;

impl Listen {
    pub(crate) fn check(&self) -> Result<()> {
        self.conn.check()?;
        self.framing.check(self.conn.max_frame)?;
        if let AtCapacity::Refuse { farewell } = &self.at_capacity {
            if farewell.len() > 4096 {
                return Err(Error::option(
                    "at_capacity",
                    "a farewell has at most 4096 bytes",
                ));
            }
        }
        let rates = [
            ("accept_rate", self.accept_rate),
            ("source_limits.rate", self.source_limits.rate),
            ("total_read_rate", self.total_read_rate),
            ("total_frame_rate", self.total_frame_rate),
        ];
        check_rates(&rates)?;
        if self.source_limits.connections == Some(0) {
            return Err(Error::option(
                "source_limits.connections",
                "0 would refuse every client; use at least 1, or None for no limit",
            ));
        }
        if !(1..=32).contains(&self.source_limits.prefixes.0)
            || !(1..=128).contains(&self.source_limits.prefixes.1)
        {
            return Err(Error::option(
                "source_limits.prefixes",
                "an IPv4 prefix has 1 to 32 bits, an IPv6 prefix 1 to 128",
            ));
        }
        if self.proxy_protocol != ProxyProtocol::Off && self.trusted_proxies.is_none() {
            return Err(Error::option(
                "trusted_proxies",
                "name the proxies that are believed; AccessRules::allow_all() is every host that can \
                 reach the port",
            ));
        }
        if self
            .name
            .as_ref()
            .is_some_and(|name| name.contains(is_escaped))
        {
            return Err(Error::option(
                "name",
                "a name has no line feeds, and no other control or invisible characters",
            ));
        }
        if self.name.as_deref() == Some("") {
            return Err(Error::option("name", "a name has at least one character"));
        }
        self.check_unix()?;
        self.socket.check()
    }

    /// Finds names and permissions that no Unix socket can have.
    fn check_unix(&self) -> Result<()> {
        if self.socket.mode.is_some_and(|mode| mode & !0o777 != 0) {
            return Err(Error::option("mode", "permissions go from 0o000 to 0o777"));
        }
        let Some(Addr::Unix(name)) = self.addrs.as_ref().ok().and_then(|addrs| addrs.first())
        else {
            return Ok(());
        };
        check_unix_name(name).map_err(|(option, problem)| Error::option(option, problem))?;
        if name.as_abstract_name().is_some() && self.socket.mode.is_some() {
            return Err(Error::option(
                "mode",
                "an abstract name has no file, and no permissions",
            ));
        }
        Ok(())
    }

    /// Finds options that an open port cannot change to those of `next`.
    pub(crate) fn check_change(&self, next: &Self) -> Result<()> {
        let (socket, wanted) = (&self.socket, &next.socket);
        let changed = [
            (next.addr_option(), self.addrs != next.addrs),
            ("mode", socket.mode != wanted.mode),
            ("name", self.name != next.name),
            // Its clients could not talk to the other kind, and TLS must not be lost by an
            // oversight.
            ("tls", self.tls.is_some() != next.tls.is_some()),
            ("backlog", socket.backlog != wanted.backlog),
            ("nodelay", socket.nodelay != wanted.nodelay),
            ("only_v6", socket.only_v6 != wanted.only_v6),
            (
                "reuse_address",
                socket.reuse_address != wanted.reuse_address,
            ),
            ("reuse_port", socket.reuse_port != wanted.reuse_port),
            ("keepalive", socket.keepalive != wanted.keepalive),
            (
                "source_limits.prefixes",
                self.source_limits.prefixes != next.source_limits.prefixes,
            ),
            ("recv_buffer", socket.recv_buffer != wanted.recv_buffer),
            ("send_buffer", socket.send_buffer != wanted.send_buffer),
        ];
        match changed.into_iter().find(|(_, changed)| *changed) {
            Some((option, _)) => Err(Error::option(
                option,
                "an open port cannot change it: close the listener and listen again",
            )),
            None => Ok(()),
        }
    }
}

/// Finds names that no Unix socket can have; returns the option that gave the name, and the
/// problem.
pub(crate) fn check_unix_name(name: &UnixAddr) -> std::result::Result<(), (&'static str, String)> {
    let room =
        size_of::<libc::sockaddr_un>() - std::mem::offset_of!(libc::sockaddr_un, sun_path) - 1;
    let (option, bytes) = match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => ("unix", path.as_os_str().as_bytes()),
        (None, name) => ("unix_abstract", name.unwrap_or_default()),
    };
    let problem = if bytes.is_empty() {
        "a name has at least one byte".to_owned()
    } else if bytes.len() > room {
        format!(
            "{name} has {} bytes, and the system takes at most {room}: use a shorter one, perhaps a \
             relative path",
            bytes.len()
        )
    } else if option == "unix" && bytes.contains(&0) {
        format!("{name} has a zero byte, which no path has")
    } else {
        return Ok(());
    };
    Err((option, problem))
}
