//! One end of a connection, and what the reactor knows of it.

/// The kernel's half, a few fields of it, and the readiness that the reactor has been told of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Socket {
    /// Arrived and not read yet.
    pub(super) inbox: Vec<u8>,
    fin: bool,
    reset: bool,
    broken: bool,
    /// Bytes that the kernel still takes; `u16::MAX` is any number.
    room: u16,
    pub(super) fin_sent: bool,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) hang_up: bool,
}

/// What a read finds when there are no bytes.
pub(super) enum Silence {
    Blocked,
    End,
    Error(i32),
}

impl Socket {
    pub(super) fn new() -> Self {
        Self {
            inbox: Vec::new(),
            fin: false,
            reset: false,
            broken: false,
            room: u16::MAX,
            fin_sent: false,
            readable: false,
            writable: true,
            hang_up: false,
        }
    }

    pub(super) fn arrive(&mut self, bytes: &[u8]) {
        if !self.fin && !self.reset && !bytes.is_empty() {
            self.inbox.extend_from_slice(bytes);
            self.readable = true;
        }
    }

    pub(super) fn finish(&mut self) {
        if !self.reset {
            self.fin = true;
            self.readable = true;
            self.hang_up = true;
        }
    }

    pub(super) fn reset(&mut self) {
        self.reset = true;
        self.broken = false;
        self.room = u16::MAX;
        self.readable = true;
        self.writable = true;
        self.hang_up = true;
    }

    pub(super) fn break_pipe(&mut self) {
        self.broken = !self.reset;
    }

    pub(super) fn make_room(&mut self, bytes: u16) {
        if !self.reset {
            self.room = bytes;
            self.writable |= bytes > 0;
        }
    }

    /// An event that means nothing.
    pub(super) fn spurious(&mut self) {
        self.readable = true;
        self.writable = true;
    }

    pub(super) fn silence(&self) -> Silence {
        if self.reset {
            Silence::Error(libc::ECONNRESET)
        } else if self.fin {
            Silence::End
        } else {
            Silence::Blocked
        }
    }

    pub(super) fn write_error(&self) -> Option<i32> {
        match (self.reset, self.broken) {
            (true, _) => Some(libc::ECONNRESET),
            (_, true) => Some(libc::EPIPE),
            _ => None,
        }
    }

    /// Takes as many of `count` bytes as there is room for; fewer means that the next edge says when there is more.
    pub(super) fn take(&mut self, count: usize) -> usize {
        let taken = match self.room {
            u16::MAX => count,
            room => {
                let taken = u16::try_from(count).unwrap_or(u16::MAX).min(room);
                self.room -= taken;
                usize::from(taken)
            }
        };
        self.writable = taken == count;
        taken
    }

    /// Sends FIN, if there is still somebody to send it to.
    pub(super) fn shutdown(&mut self) -> bool {
        self.fin_sent = true;
        !self.reset
    }
}
