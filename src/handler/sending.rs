//! How a handler sends: to its own connection, to another, to many.

use super::conn::{Conn, ConnOps};
#[cfg(doc)]
use super::Handler;
use crate::id::ConnId;
use crate::proto::{shared, Chunk, FrameBuf, FrameError, Machine, Payload, SendError};

/// The result of a broadcast: how many connections it reached.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Broadcast {
    /// Number of connections that took the frame.
    pub sent: usize,
    /// Number of ids that name no connection any more, or one that takes no more output
    /// ([`SendError::Closed`]). They were skipped.
    pub gone: usize,
    /// Connections that refused the frame, and why: most often a slow peer ([`SendError::Full`]).
    pub refused: Vec<(ConnId, SendError)>,
}

/// Sends one frame to many connections.
pub(crate) fn broadcast<A>(
    ops: &mut (impl ConnOps<A> + ?Sized),
    ids: impl IntoIterator<Item = ConnId>,
    frame: impl Payload,
) -> Broadcast {
    frame.lend(|chunks| {
        let (mut done, mut joint) = (Broadcast::default(), Vec::new());
        let frame = shared(chunks, &mut joint);
        for id in ids {
            match ops
                .send_chunks(id, &mut [frame.again()])
                .map_err(|error| *error)
            {
                Ok(()) => done.sent += 1,
                Err(SendError::Closed) => done.gone += 1,
                Err(error) => done.refused.push((id, error)),
            }
        }
        done
    })
}

impl<A> Conn<'_, A> {
    /// Queues one frame.
    ///
    /// One write at the end of the turn sends all frames of that turn. Pending output is written
    /// before if this frame has 32 KiB or more, or would reach the high watermark. In the clear, a
    /// frame of 32 KiB or more is then written at once, and only the remainder is queued. Once the
    /// server has written 64 MiB in an iteration, frames are only queued, so that every callback
    /// ends.
    ///
    /// `frame` is any kind of bytes ([`Payload`]): borrowed like `&[u8]` and `"text"`, given away
    /// like a `Vec<u8>`, shared like an `Arc<[u8]>`, or a tuple of parts of one frame. Line framing
    /// adds no delimiter: send it with the line.
    ///
    /// At the high watermark, reading from this connection stops until the peer has taken enough. A
    /// handler that only answers needs nothing else, unless its clients write all their requests
    /// before they read an answer ([`ConnConfig::full_duplex`](crate::ConnConfig::full_duplex)).
    ///
    /// # Errors
    ///
    /// [`SendError`]: the connection is closing or not open, its peer is too slow (the output
    /// limit), or the framing refuses the frame. No part of the frame was queued.
    #[inline]
    pub fn send(&mut self, frame: impl Payload) -> Result<(), SendError> {
        let sent = match frame.borrowed() {
            Some(frame) => self.ops.send(self.id, frame),
            None => frame.lend(|chunks| self.ops.send_chunks(self.id, chunks)),
        };
        sent.map_err(|error| *error)
    }

    pub(crate) fn send_chunk(&mut self, frame: Chunk<'_>) -> Result<(), SendError> {
        let sent = self.ops.send_chunks(self.id, &mut [frame]);
        sent.map_err(|error| *error)
    }

    /// Queues one frame whose payload `write` appends, in place: without a buffer of its own.
    ///
    /// The frame is written as by [`Conn::send`], but from the queue. After an error or a panic in
    /// `write`, and if the frame is refused, no part of it was queued.
    ///
    /// ```
    /// use std::io::Write;
    /// use portcullis::{Context, FrameError, Outcome};
    ///
    /// fn answer(cx: &mut Context<'_>, names: &[String]) -> Outcome {
    ///     cx.conn.send_with(|out| {
    ///         for name in names {
    ///             writeln!(out, "{name}").map_err(FrameError::new)?;
    ///         }
    ///         Ok(())
    ///     })?;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`Conn::send`], and [`SendError::Refused`] with the error of `write`.
    pub fn send_with(
        &mut self,
        write: impl FnOnce(&mut FrameBuf<'_>) -> Result<(), FrameError>,
    ) -> Result<(), SendError> {
        let mut write = Some(write);
        let mut once = |out: &mut FrameBuf<'_>| write.take().map_or(Ok(()), |write| write(out));
        let sent = self.ops.send_with(self.id, &mut once);
        sent.map_err(|error| *error)
    }

    /// Sends one frame to each of these connections, this one possibly included. Each takes it as
    /// by [`Conn::send`], in its own framing. The payload is stored once, however many connections
    /// keep it.
    ///
    /// ```
    /// use portcullis::{ConnId, Context, Handler, Outcome, SendError};
    ///
    /// #[derive(Default)]
    /// struct Room { members: Vec<ConnId> }
    ///
    /// struct Member;
    /// impl Handler<Room> for Member {
    ///     fn on_frame(&mut self, cx: &mut Context<'_, Room>, words: &[u8]) -> Outcome {
    ///         let said = cx.conn.broadcast(cx.app.members.iter().copied(), words);
    ///         for (id, error) in said.refused {
    ///             // A slow consumer. Others only miss a message.
    ///             if let (SendError::Full { .. }, Some(mut slow)) = (error, cx.conn.peer(id)) {
    ///                 slow.abort();
    ///             }
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    #[doc(alias = "fan-out")]
    pub fn broadcast(
        &mut self,
        ids: impl IntoIterator<Item = ConnId>,
        frame: impl Payload,
    ) -> Broadcast {
        broadcast(&mut *self.ops, ids, frame)
    }

    /// Requests one call of [`Handler::on_flushed`], when all that was sent before this call has
    /// left to the kernel. If nothing is pending, that is soon after this callback. Of several
    /// calls before `on_flushed` the last counts. [`Conn::close_after_input`] and the defaults of
    /// [`Handler::on_finish`] and [`Handler::on_drain`] wait for it, as for a [`Conn::hold`]: an
    /// answer in pieces is not cut off. Over TLS 1.2 the peer's end closes in any case (see
    /// [`Handler::on_finish`]).
    ///
    /// Without effect once the connection closes, or can send nothing more: then the reason of
    /// [`Handler::on_close`] says whether output was lost. Before an accepted connection is open it
    /// has no effect either. That the peer has received the bytes is not known: only its answer
    /// says so.
    ///
    /// A peer that takes a long answer sends nothing meanwhile, and the idle timeout does not stop
    /// for pending output below the high watermark. Pause the connection ([`Conn::pause`]), so that
    /// a slow download is not cut off.
    ///
    /// ```
    /// # use std::{fs::File, io::Read};
    /// # use portcullis::{Context, Handler, Outcome};
    /// /// Sends a file, a piece at a time: at most one piece is in memory.
    /// struct Download { file: File }
    /// impl Download {
    ///     fn send_piece(&mut self, cx: &mut Context<'_>) -> Outcome {
    ///         let mut piece = vec![0; 64 * 1024];
    ///         let length = self.file.read(&mut piece)?;
    ///         if length == 0 {
    ///             cx.conn.close();
    ///             return Ok(());
    ///         }
    ///         piece.truncate(length);
    ///         cx.conn.send(piece)?;
    ///         cx.conn.notify_flushed();
    ///         Ok(())
    ///     }
    /// }
    /// impl Handler for Download {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, _request: &[u8]) -> Outcome {
    ///         cx.conn.pause();
    ///         self.send_piece(cx)
    ///     }
    ///     fn on_flushed(&mut self, cx: &mut Context<'_>) -> Outcome {
    ///         self.send_piece(cx)
    ///     }
    /// }
    /// ```
    pub fn notify_flushed(&mut self) {
        self.change(|machine, _, _| Machine::notify_flushed(machine));
    }
}
