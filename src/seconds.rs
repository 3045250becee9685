//! Durations in serde's data: a number of seconds, `null` for never.

use std::time::Duration;

use serde::{de::Error, Deserialize, Deserializer, Serialize, Serializer};

pub(crate) fn serialize<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let is_never = *duration == Duration::MAX;
    let seconds = (!is_never).then_some(duration.as_secs_f64());
    seconds.serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    match Option::<f64>::deserialize(deserializer)? {
        Some(seconds) => Duration::try_from_secs_f64(seconds).map_err(D::Error::custom),
        None => Ok(Duration::MAX),
    }
}
