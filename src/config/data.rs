//! Options as serde's data, where it is not derived.

use std::fmt;
use std::str::FromStr;

use serde::{de::Error, Deserialize, Deserializer, Serialize, Serializer};

use super::{Connect, Listen, Retry};
use crate::access::AccessRules;
use crate::addr::Addr;
use crate::proto::{Framing, Rate};

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

impl Listen {
    pub(super) fn nowhere() -> Self {
        Self::at(Vec::new(), Framing::default())
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

/// The addresses of a listener.
pub(super) mod addrs {
    use super::*;
    use crate::config::listen::Addrs;

    pub(in crate::config) fn serialize<S: Serializer>(
        addrs: &Addrs,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        addrs.as_deref().unwrap_or_default().serialize(serializer)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Addrs, D::Error> {
        Vec::deserialize(deserializer).map(Ok)
    }
}
