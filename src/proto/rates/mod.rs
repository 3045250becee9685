//! How fast bytes and frames may arrive.

mod bucket;
mod throttle;

pub(crate) use bucket::Bucket;
pub use bucket::Rate;
pub(crate) use throttle::SharedMeters;
pub(super) use throttle::Throttle;
