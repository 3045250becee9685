//! Bugs to plant in the library, one of each kind of fault that the campaign must find.
//!
//! `cargo run --bin plant` plants each in a copy of the repository and runs the campaign there.

/// A change of one line, and what the campaign says of it.
#[derive(Debug)]
pub struct Bug {
    pub kind: &'static str,
    /// From the root of the repository.
    pub file: &'static str,
    /// Found once in the file.
    pub line: &'static str,
    pub planted: &'static str,
    /// In the campaign's report of the world that breaks.
    pub found: &'static str,
    pub tls: bool,
}

pub const BUGS: &[Bug] = &[
    Bug {
        kind: "stale time: a timer counts from before the callback's work",
        file: "src/reactor/control.rs",
        line: "        self.core.refresh()\n",
        planted: "        self.core.now\n",
        found: "has fired by",
        tls: false,
    },
    Bug {
        kind: "stalled progress: each byte restarts the whole timeout",
        file: "src/proto/deadlines.rs",
        line: "deadline.max(now).after(worth).min(self.begin(now))",
        planted: "deadline.max(now.after(worth)).max(self.begin(now))",
        found: "moved by",
        tls: false,
    },
    Bug {
        kind: "foreign code: a panic of the logger is not caught",
        file: "src/logs.rs",
        line: "let _ = $crate::catch::catch_logger(|| $write);",
        planted: "let _ = Some(()).map(|()| $write);",
        found: "a panic has left the server",
        tls: false,
    },
    Bug {
        kind: "counting: a panic is not counted",
        file: "src/reactor/panic_guard.rs",
        line: "        self.count += 1;\n",
        planted: "",
        found: "panics, planned and counted",
        tls: false,
    },
    Bug {
        kind: "counting: frames of a ClientHello reach a handler",
        file: "src/proto/machine/input.rs",
        line: "hello::may_begin(bytes) && self.tls.is_none()",
        planted: "hello::may_begin(bytes) && self.tls.is_some()",
        found: "of a ClientHello was delivered",
        tls: false,
    },
    Bug {
        kind: "silent loss: what a handle could not deliver is not counted",
        file: "src/reactor/commands.rs",
        line: "core.stats.undeliverable += u64::from(!matches!(sent, Ok(Some(Ok(())))));",
        planted: "",
        found: "were not delivered",
        tls: false,
    },
    Bug {
        kind: "bounded steps: a chain of certificates is not bounded",
        file: "src/proto/tls/chain.rs",
        line: "if self.steps > MAX_STEPS {",
        planted: "if self.steps > 1_000_000 {",
        found: "a chain was verified in",
        tls: true,
    },
    Bug {
        kind: "silent connections: one that has sent a frame is evicted",
        file: "src/proto/machine.rs",
        line: "self.traffic.frames_in == 0 && !self.status.life.is_closing()",
        planted: "!self.status.life.is_closing()",
        found: "it was evicted, and had sent a frame",
        tls: false,
    },
    Bug {
        kind: "bans: a ban does not end",
        file: "src/reactor/bans.rs",
        line: "end.is_some_and(|&end| end > now)",
        planted: "end.is_some_and(|&end| end > Time::ZERO.max(now.min(Time::ZERO)))",
        found: "ended as",
        tls: false,
    },
    Bug {
        kind: "memory: a connection that had to wait for memory is never read again",
        file: "src/reactor/memory_budget.rs",
        line: "conn.paused_for_memory = false;",
        planted: "",
        found: "nothing will make it read again",
        tls: false,
    },
    Bug {
        kind: "orderly ends: the linger runs while the peer still takes bytes",
        file: "src/proto/machine/output.rs",
        line: "let taken = self.wake_unpooled().ending.delivery.note(unsent, queued);",
        planted:
            "let taken = self.wake_unpooled().ending.delivery.note(unsent.map(|_| 0), queued);",
        found: "ended in order",
        tls: false,
    },
    Bug {
        kind: "gone peers: a paused connection does not look for the end",
        file: "src/reactor/mod.rs",
        line: "conn.hang_up = HangUp::New;",
        planted: "conn.hang_up = HangUp::Known;",
        found: "its peer is gone",
        tls: false,
    },
];
