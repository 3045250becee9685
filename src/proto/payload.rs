//! What a handler sends as one frame: borrowed, given away, shared, or in parts.

use std::sync::Arc;

/// The payload of one frame, for [`Conn::send`](crate::Conn::send) and its like.
///
/// | kind | types |
/// |---|---|
/// | borrowed | a reference to bytes: `&[u8]`, `"text"`, `&Vec<u8>`, `b"bytes"` |
/// | given away | `Vec<u8>`, `String`, `Box<[u8]>`, `[u8; N]` |
/// | shared | `Arc<[u8]>`, `Arc<str>` |
/// | in parts | a tuple of two to four of these, which are sent as one frame |
///
/// Bytes that the socket takes at once are never copied, if the frame has 32 KiB or more. Of the
/// remainder, 4 KiB or more of a payload that was given away or is shared are kept as they are;
/// all else is copied. A shared payload counts once for
/// [`Config::memory_limit`](crate::Config::memory_limit), however many connections of the server
/// keep it.
///
/// ```
/// # use std::sync::Arc;
/// # use portcullis::{Context, Outcome};
/// fn answer(cx: &mut Context<'_>, page: &Arc<[u8]>, row: Vec<u8>) -> Outcome {
///     cx.conn.send("borrowed")?;
///     cx.conn.send(row)?;
///     cx.conn.send(Arc::clone(page))?;
///     cx.conn.send(("one frame: ", Arc::clone(page), "\r\n"))?;
///     Ok(())
/// }
/// ```
pub trait Payload: sealed::Chunks {}

impl<P: sealed::Chunks> Payload for P {}

/// Parts of a payload, at most.
pub(crate) const MAX_PARTS: usize = 4;

/// A part of a payload.
#[derive(Debug)]
pub enum Chunk<'a> {
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
    Shared(Arc<[u8]>),
    /// Shared by several commands of a handle, of which another one is charged with it.
    Counted(Arc<[u8]>),
}

impl Chunk<'_> {
    /// Returns the same bytes once more.
    pub(crate) fn again(&self) -> Chunk<'_> {
        match self {
            Self::Borrowed(bytes) => Chunk::Borrowed(bytes),
            Self::Owned(bytes) => Chunk::Borrowed(bytes),
            Self::Shared(bytes) => Chunk::Shared(Arc::clone(bytes)),
            Self::Counted(bytes) => Chunk::Counted(Arc::clone(bytes)),
        }
    }

    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Shared(bytes) | Self::Counted(bytes) => bytes,
        }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Returns the memory that it takes beside its parts' own.
    pub(crate) fn memory(&self) -> usize {
        match self {
            Self::Borrowed(_) | Self::Counted(_) => 0,
            Self::Owned(bytes) => bytes.capacity(),
            Self::Shared(bytes) => bytes.len(),
        }
    }

    /// Counts the bytes in any case.
    pub(crate) fn count(self) -> Self {
        match self {
            Self::Counted(bytes) => Self::Shared(bytes),
            chunk => chunk,
        }
    }

    /// Returns spare capacity, if that is more than the bytes.
    pub(crate) fn shrink(&mut self) {
        match self {
            Self::Owned(bytes) if bytes.capacity() / 2 > bytes.len() => bytes.shrink_to_fit(),
            _ => {}
        }
    }
}

/// Returns the length of a payload.
pub(crate) fn length(chunks: &[Chunk<'_>]) -> usize {
    chunks.iter().map(Chunk::len).fold(0, usize::saturating_add)
}

/// Appends a payload to `out`.
pub(crate) fn join(chunks: &[Chunk<'_>], out: &mut Vec<u8>) {
    for chunk in chunks {
        out.extend_from_slice(chunk.bytes());
    }
}

/// A payload for many connections: what is long is shared, what is short is copied by each.
pub(crate) fn shared<'a>(chunks: &'a mut [Chunk<'_>], joint: &'a mut Vec<u8>) -> Chunk<'a> {
    match chunks {
        [Chunk::Shared(bytes)] => return Chunk::Shared(Arc::clone(bytes)),
        [Chunk::Owned(bytes)] => std::mem::swap(bytes, joint),
        chunks => join(chunks, joint),
    }
    if joint.len() < MIN_SHARED {
        return Chunk::Borrowed(joint);
    }
    Chunk::Shared(std::mem::take(joint).into())
}

/// Turns a payload into one that outlives the caller: copies what is borrowed or in parts.
pub(crate) fn kept(chunks: &mut [Chunk<'_>]) -> Chunk<'static> {
    match chunks {
        [Chunk::Owned(bytes)] => Chunk::Owned(std::mem::take(bytes)),
        [Chunk::Shared(bytes)] => Chunk::Shared(Arc::clone(bytes)),
        chunks => {
            let mut all = Vec::with_capacity(length(chunks));
            join(chunks, &mut all);
            Chunk::Owned(all)
        }
    }
}

/// A shorter payload of a broadcast is not shared: a copy costs less.
const MIN_SHARED: usize = 1024;

impl From<Chunk<'_>> for Arc<[u8]> {
    fn from(chunk: Chunk<'_>) -> Self {
        match chunk {
            Chunk::Borrowed(bytes) => bytes.into(),
            Chunk::Owned(bytes) => bytes.into(),
            Chunk::Shared(bytes) | Chunk::Counted(bytes) => bytes,
        }
    }
}

mod sealed {
    use std::sync::Arc;

    use super::Chunk;

    /// Any payload.
    pub trait Chunks {
        #[doc(hidden)]
        fn lend<R>(self, take: impl FnOnce(&mut [Chunk<'_>]) -> R) -> R;

        /// Returns the bytes, if they are borrowed: the usual case.
        #[doc(hidden)]
        #[inline(always)]
        fn borrowed(&self) -> Option<&[u8]> {
            None
        }
    }

    /// A payload that is not in parts.
    pub trait Whole {
        #[doc(hidden)]
        fn chunk<'a>(self) -> Chunk<'a>
        where
            Self: 'a;

        #[doc(hidden)]
        #[inline(always)]
        fn borrowed(&self) -> Option<&[u8]> {
            None
        }
    }

    impl<T: AsRef<[u8]> + ?Sized> Whole for &T {
        #[inline]
        fn chunk<'a>(self) -> Chunk<'a>
        where
            Self: 'a,
        {
            Chunk::Borrowed(self.as_ref())
        }

        #[inline(always)]
        fn borrowed(&self) -> Option<&[u8]> {
            Some((*self).as_ref())
        }
    }

    impl<const N: usize> Whole for [u8; N] {
        #[inline]
        fn chunk<'a>(self) -> Chunk<'a> {
            Chunk::Owned(self.into())
        }

        #[inline(always)]
        fn borrowed(&self) -> Option<&[u8]> {
            Some(self)
        }
    }

    macro_rules! owned {
        ($($whole:ty => $kind:ident),*) => {$(
            impl Whole for $whole {
                #[inline]
                fn chunk<'a>(self) -> Chunk<'a> {
                    Chunk::$kind(self.into())
                }
            }
        )*};
    }

    owned!(Vec<u8> => Owned, String => Owned, Box<[u8]> => Owned);
    owned!(Arc<[u8]> => Shared, Arc<str> => Shared);

    impl<T: Whole> Chunks for T {
        #[inline]
        fn lend<R>(self, take: impl FnOnce(&mut [Chunk<'_>]) -> R) -> R {
            take(&mut [self.chunk()])
        }

        #[inline(always)]
        fn borrowed(&self) -> Option<&[u8]> {
            Whole::borrowed(self)
        }
    }

    macro_rules! parts {
        ($($part:ident)*) => {
            impl<$($part: Whole),*> Chunks for ($($part,)*) {
                #[inline]
                #[allow(non_snake_case)]
                fn lend<Out>(self, take: impl FnOnce(&mut [Chunk<'_>]) -> Out) -> Out {
                    let ($($part,)*) = self;
                    take(&mut [$($part.chunk()),*])
                }
            }
        };
    }

    parts!(A B);
    parts!(A B C);
    parts!(A B C D);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: &[u8] = &[7; 5000];

    /// One of each kind, and the memory that another one of the same bytes takes.
    fn all() -> [(Chunk<'static>, usize); 4] {
        [
            (Chunk::Borrowed(BYTES), 0),
            (Chunk::Owned(BYTES.to_vec()), 0),
            (Chunk::Shared(BYTES.into()), BYTES.len()),
            (Chunk::Counted(BYTES.into()), 0),
        ]
    }

    #[test]
    fn the_same_bytes_once_more_are_charged_only_if_they_were_shared() {
        for (chunk, memory) in all() {
            let again = chunk.again();
            assert_eq!(again.bytes(), BYTES);
            assert_eq!(again.bytes().as_ptr(), chunk.bytes().as_ptr(), "no copy");
            assert_eq!(again.memory(), memory);
        }
    }

    #[test]
    fn a_payload_that_another_is_charged_with_can_be_counted() {
        for (chunk, _) in all() {
            let is_borrowed = matches!(chunk, Chunk::Borrowed(_));
            let counted = chunk.count();
            assert_eq!(counted.bytes(), BYTES);
            assert_eq!(counted.memory(), if is_borrowed { 0 } else { BYTES.len() });
        }
    }

    #[test]
    fn a_payload_that_is_shared_stays_the_same() {
        for (chunk, _) in all() {
            let is_shared = matches!(chunk, Chunk::Shared(_) | Chunk::Counted(_));
            let before = chunk.bytes().as_ptr();
            let shared: Arc<[u8]> = chunk.into();
            assert_eq!(&*shared, BYTES);
            assert_eq!(shared.as_ptr() == before, is_shared, "copied unless it is");
        }
    }
}
