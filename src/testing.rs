//! What tests of several parts need.

/// Number of a test's `rounds` that are run: a hundredth of them in Miri, which is far slower.
pub(crate) fn rounds(rounds: usize) -> usize {
    match cfg!(miri) {
        true => rounds.div_ceil(100),
        false => rounds,
    }
}
