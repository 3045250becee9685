//! Options as serde's data, where it is not derived.

use std::fmt;
use std::str::FromStr;

use serde::{de::Error, Deserialize, Deserializer, Serialize, Serializer};

use super::{AtCapacity, Connect, Listen, ProxyProtocol, Retry, SocketOptions, SourceLimits};
use crate::access::AccessRules;
use crate::addr::Addr;
use crate::proto::{ConnConfig, Framing, Rate};

/// Reads a value from the text that it prints.
fn parse<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr<Err: fmt::Display>,
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(D::Error::custom)
}

/// Reads values from the texts that they print.
macro_rules! texts {
    ($($type:ty)*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                parse(deserializer)
            }
        }
    )*};
}

texts! { AccessRules Addr Framing Rate }

impl Serialize for AccessRules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A framing of the user's own is `custom`, which cannot be read.
impl Serialize for Framing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:?}"))
    }
}

impl Retry {
    pub(super) fn forever() -> Self {
        Self::new(u32::MAX)
    }
}

impl Connect {
    pub(super) fn packet2() -> Self {
        Self::new(Framing::default())
    }
}

/// Bytes, as a text where they are one.
pub(super) mod bytes {
    use super::*;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Bytes {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub(in crate::config) fn serialize<S: Serializer>(
        bytes: &[u8],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(bytes) {
            Ok(text) => text.serialize(serializer),
            Err(_) => bytes.serialize(serializer),
        }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        Ok(match Bytes::deserialize(deserializer)? {
            Bytes::Text(text) => text.into_bytes(),
            Bytes::Bytes(bytes) => bytes,
        })
    }
}

/// The options of a listener that are data: all but TLS and an adopted socket.
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ListenData {
    addrs: Vec<Addr>,
    name: Option<String>,
    framing: Framing,
    conn: ConnConfig,
    socket: SocketOptions,
    max_connections: Option<usize>,
    reserved: usize,
    at_capacity: AtCapacity,
    evict_silent: bool,
    access_rules: AccessRules,
    proxy_protocol: ProxyProtocol,
    trusted_proxies: Option<AccessRules>,
    accept_rate: Option<Rate>,
    source_limits: SourceLimits,
    total_read_rate: Option<Rate>,
    total_frame_rate: Option<Rate>,
}

impl Default for ListenData {
    fn default() -> Self {
        Self::of(Listen::at(Vec::new(), Framing::default()))
    }
}

impl ListenData {
    fn of(listen: Listen) -> Self {
        let Listen {
            addrs,
            adopted: _,
            tls: _,
            name,
            framing,
            conn,
            socket,
            max_connections,
            reserved,
            at_capacity,
            evict_silent,
            access_rules,
            proxy_protocol,
            trusted_proxies,
            accept_rate,
            source_limits,
            total_read_rate,
            total_frame_rate,
        } = listen;
        Self {
            addrs: addrs.unwrap_or_default(),
            name,
            framing,
            conn,
            socket,
            max_connections,
            reserved,
            at_capacity,
            evict_silent,
            access_rules,
            proxy_protocol,
            trusted_proxies,
            accept_rate,
            source_limits,
            total_read_rate,
            total_frame_rate,
        }
    }

    fn listen(self) -> Listen {
        Listen {
            name: self.name,
            conn: self.conn,
            socket: self.socket,
            max_connections: self.max_connections,
            reserved: self.reserved,
            at_capacity: self.at_capacity,
            evict_silent: self.evict_silent,
            access_rules: self.access_rules,
            proxy_protocol: self.proxy_protocol,
            trusted_proxies: self.trusted_proxies,
            accept_rate: self.accept_rate,
            source_limits: self.source_limits,
            total_read_rate: self.total_read_rate,
            total_frame_rate: self.total_frame_rate,
            ..Listen::at(self.addrs, self.framing)
        }
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        ListenData::of(self.clone()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let data = ListenData::deserialize(deserializer)?;
        if data.addrs.is_empty() {
            return Err(D::Error::missing_field("addrs"));
        }
        Ok(data.listen())
    }
}
