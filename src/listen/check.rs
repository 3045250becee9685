//! What cannot work, and what an open port cannot change.

use std::os::unix::ffi::OsStrExt;

use super::{Listen, ProxyProtocol};
use crate::addr::{Addr, UnixAddr};
use crate::config::AtCapacity;
use crate::error::{Error, Result};
use crate::proto::{Limits, Rate};

impl Listen {
    pub(crate) fn check(&self) -> Result<()> {
        check_limits(&self.limits)?;
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
            ("source_rate", self.sources.rate),
        ];
        check_rates(&rates)?;
        if self.sources.connections == Some(0) {
            return Err(Error::option(
                "source_connections",
                "0 would refuse everybody; use at least 1, or None for no limit",
            ));
        }
        if !(1..=32).contains(&self.sources.prefixes.0)
            || !(1..=128).contains(&self.sources.prefixes.1)
        {
            return Err(Error::option(
                "source_prefixes",
                "an IPv4 prefix has 1 to 32 bits, an IPv6 prefix 1 to 128",
            ));
        }
        if self.proxy != ProxyProtocol::Off && self.trusted.is_none() {
            return Err(Error::option(
                "trusted_proxies",
                "say whose PROXY headers are believed; AccessRules::allow_all() is everybody who can reach the port",
            ));
        }
        if self
            .name
            .as_ref()
            .is_some_and(|name| name.contains(char::is_control))
        {
            return Err(Error::option(
                "name",
                "a name has no line feeds and no other control characters",
            ));
        }
        if self.name.as_deref() == Some("") {
            return Err(Error::option("name", "a name has at least one character"));
        }
        self.check_unix()?;
        self.socket.check()
    }

    /// What a Unix socket cannot be called.
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

    /// Whether a port that is open with these options can go on with `next`, which differs in none that belong to the socket.
    pub(crate) fn check_change(&self, next: &Self) -> Result<()> {
        let (socket, wanted) = (&self.socket, &next.socket);
        let changed = [
            ("tcp", self.addrs != next.addrs),
            ("mode", socket.mode != wanted.mode),
            ("name", self.name != next.name),
            // Clients of the one find nobody to talk to in the other, and nobody is to lose TLS by an oversight.
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
                "source_prefixes",
                self.sources.prefixes != next.sources.prefixes,
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

/// What no connection can live with, whoever made it.
pub(crate) fn check_limits(limits: &Limits) -> Result<()> {
    if limits.low_watermark >= limits.high_watermark {
        return Err(Error::option(
            "watermarks",
            format!(
                "low ({}) must be below high ({})",
                limits.low_watermark, limits.high_watermark
            ),
        ));
    }
    if limits.output_limit < limits.high_watermark {
        return Err(Error::option(
            "output_limit",
            format!(
                "{} is below the high watermark ({}), where reading stops; use at least that",
                limits.output_limit, limits.high_watermark
            ),
        ));
    }
    if limits.max_frame == Some(0) {
        return Err(Error::option(
            "max_frame",
            "0 admits no frame; use at least 1",
        ));
    }
    let timeouts = [
        ("handshake_timeout", limits.handshake_timeout),
        ("frame_timeout", limits.frame_timeout),
        ("idle_timeout", limits.idle_timeout),
        ("write_timeout", limits.write_timeout),
    ];
    for (option, timeout) in timeouts {
        if timeout.is_zero() {
            return Err(Error::option(
                option,
                "zero would close every connection at once; use Duration::MAX for never",
            ));
        }
    }
    check_rates(&[
        ("read_rate", limits.read_rate),
        ("frame_rate", limits.frame_rate),
        ("total_read_rate", limits.total_read_rate),
        ("total_frame_rate", limits.total_frame_rate),
    ])
}

fn check_rates(rates: &[(&'static str, Option<Rate>)]) -> Result<()> {
    for (option, rate) in rates {
        if let Some(problem) = rate.and_then(|rate| rate.problem()) {
            return Err(Error::option(option, problem));
        }
    }
    Ok(())
}

/// What a Unix socket cannot be called, and the option that called it so.
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
            "{name} has {} bytes, and the system takes at most {room}: use a shorter one, perhaps a relative path",
            bytes.len()
        )
    } else if option == "unix" && bytes.contains(&0) {
        format!("{name} has a zero byte, which no path has")
    } else {
        return Ok(());
    };
    Err((option, problem))
}
