//! Histograms: fixed buckets, one per power of two.

use std::fmt;
use std::time::Duration;

const BUCKETS: usize = u64::BITS as usize;

/// Counts of values, in one bucket for each power of two. Fixed in size; counting costs a few
/// instructions and no memory.
///
/// ```
/// use std::time::Duration;
/// use portcullis::{Config, Server};
///
/// # fn main() -> portcullis::Result<()> {
/// # let mut server: Server = Server::new(Config::new())?;
/// let sizes = server.control().metrics().histograms.frame_size_in;
/// println!("{} frames, half of them of at most {} bytes", sizes.count(), sizes.quantile(0.5));
/// # Ok(()) }
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    sum: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            sum: 0,
        }
    }
}

impl Histogram {
    /// Counts a value.
    #[inline]
    pub(crate) fn record(&mut self, value: u64) {
        // 0 to 2, 3 and 4, 5 to 8: bounds are inclusive.
        let bucket = (value.saturating_sub(1) | 1).ilog2() as usize;
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum = self.sum.wrapping_add(value);
    }

    /// Counts a time, in microseconds.
    pub(crate) fn record_time(&mut self, time: Duration) {
        self.record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Returns each bucket's upper bound, included, and its number of values. The bounds are 2, 4,
    /// 8 and so on; `None` for the last bucket, which has none.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        let bounded = |bucket: usize| (bucket < BUCKETS - 1).then_some(2 << bucket);
        self.counts
            .iter()
            .enumerate()
            .map(move |(bucket, &count)| (bounded(bucket), count))
    }

    /// Adds the values of another histogram.
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, count) in self.counts.iter_mut().zip(&other.counts) {
            *sum += count;
        }
        self.sum = self.sum.wrapping_add(other.sum);
    }

    /// Returns the number of values.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the sum of the values, modulo 2⁶⁴.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// Returns an upper bound of the quantile `part` (0.0 to 1.0): the bound of its bucket. This is
    /// at most twice the quantile, or 2. 0 without values, `u64::MAX` for the last bucket.
    pub fn quantile(&self, part: f64) -> u64 {
        let count = self.count();
        // A cast of NaN is 0.
        let rank = ((part.clamp(0.0, 1.0) * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut below = 0;
        for (bound, count) in self.buckets() {
            below += count;
            if below >= rank {
                return bound.unwrap_or(u64::MAX);
            }
        }
        0
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.buckets().filter(|&(_, count)| count > 0))
            .finish()
    }
}

/// The histograms of a server since its start. They are not part of [`Stats`](crate::Stats), which
/// is copied in every iteration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Histograms {
    /// Time from accept, or from the request of an outgoing connection, to the end: of every
    /// connection with a slot. In microseconds.
    pub connection_age: Histogram,
    /// Time from accept to open, of connections that begin with a TLS handshake or a PROXY header.
    /// In microseconds.
    pub handshake_time: Histogram,
    /// Payloads given to handlers, in bytes. With [`Framing::Raw`](crate::Framing::Raw) each piece
    /// counts.
    pub frame_size_in: Histogram,
    /// Payloads sent to peers, in bytes.
    pub frame_size_out: Histogram,
    /// Duration of each iteration without its poll, in microseconds. A socket that becomes ready
    /// meanwhile waits for the remainder. Time between two calls of
    /// [`Server::poll_once`](crate::Server::poll_once) does not count.
    pub iteration_time: Histogram,
}

impl Histograms {
    /// Adds the values of another server.
    pub(crate) fn add(&mut self, other: &Self) {
        self.connection_age.add(&other.connection_age);
        self.handshake_time.add(&other.handshake_time);
        self.frame_size_in.add(&other.frame_size_in);
        self.frame_size_out.add(&other.frame_size_out);
        self.iteration_time.add(&other.iteration_time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_falls_into_the_first_bucket_that_holds_it() {
        for value in (0..70_000).chain([u64::MAX, 1 << 63, (1 << 63) + 1]) {
            let mut histogram = Histogram::default();
            histogram.record(value);
            let (bound, _) = histogram
                .buckets()
                .find(|&(_, count)| count > 0)
                .expect("counted");
            match bound {
                Some(2) => assert!(value <= 2),
                Some(bound) => assert!(value <= bound && value > bound / 2, "{value} in {bound}"),
                None => assert!(value > 1 << 63),
            }
            assert_eq!((histogram.count(), histogram.sum()), (1, value));
        }
    }

    #[test]
    fn a_quantile_is_a_bound_not_twice_too_large() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), 0);
        for value in 1..=1000 {
            histogram.record(value);
        }
        for part in [0.001, 0.1, 0.5, 0.9, 0.99, 1.0] {
            let (said, truth) = (histogram.quantile(part), (part * 1000.0) as u64);
            assert!(
                said >= truth && said <= 2 * truth.max(1),
                "{part}: {said}, {truth}"
            );
        }
        assert_eq!(
            (histogram.quantile(-3.0), histogram.quantile(f64::NAN)),
            (2, 2)
        );
        assert_eq!(histogram.quantile(7.0), 1024);
    }

    #[test]
    fn only_buckets_in_use_are_shown() {
        let mut histogram = Histogram::default();
        for value in [3, 4, 100] {
            histogram.record(value);
        }
        assert_eq!(format!("{histogram:?}"), "{Some(4): 2, Some(128): 1}");
    }
}
