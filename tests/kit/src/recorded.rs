//! A service whose recordings are replayed: the mean of some numbers, with a planted bug.

use portcullis::sim::{Script, Sim, Violation};
use portcullis::{Close, Config, Context, Framing, Handler, Listen, Outcome};

/// Keeps numbers, by lines: `add N`, `clear`, `mean`.
#[derive(Debug, Default)]
pub struct Mean {
    numbers: Vec<i64>,
    /// A number was added.
    begun: bool,
    /// The bug is mended.
    mended: bool,
}

impl Mean {
    /// The planted bug: `mean` looks at `begun`, and divides by 0 right after `clear`.
    pub fn buggy() -> Self {
        Self::default()
    }

    pub fn mended() -> Self {
        Self {
            mended: true,
            ..Self::default()
        }
    }
}

impl<A> Handler<A> for Mean {
    fn on_frame(&mut self, cx: &mut Context<'_, A>, line: &[u8]) -> Outcome {
        let line = std::str::from_utf8(line)?.trim_end();
        match line.split_once(' ').unwrap_or((line, "")) {
            ("add", number) => {
                self.numbers.push(number.parse()?);
                self.begun = true;
            }
            ("clear", "") => self.numbers.clear(),
            ("mean", "") if self.begun && !(self.mended && self.numbers.is_empty()) => {
                let sum: i64 = self.numbers.iter().sum();
                let mean = sum / self.numbers.len() as i64;
                cx.conn.send(format!("{mean}\n"))?;
            }
            ("mean", "") => cx.conn.send("none\n")?,
            _ => return Err(Close::because("no such command")),
        }
        Ok(())
    }
}

/// Its listener.
pub fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Line)
}

/// Plays a script against the service with its bug.
///
/// # Errors
///
/// A panic of the handler.
pub fn try_play(script: &Script) -> Result<(), Violation> {
    try_play_with(script, listen(), Mean::buggy)
}

/// Plays a script against handlers of any kind.
///
/// # Errors
///
/// A panic of a handler.
pub fn try_play_with<H: Handler + 'static>(
    script: &Script,
    listen: Listen,
    handler: impl Fn() -> H + 'static,
) -> Result<(), Violation> {
    let mut sim = Sim::new(0, Config::new(), ());
    let addr = sim
        .listen(listen, move |_: &mut (), _| handler())
        .map_err(|error| Violation::new(error.to_string()))?;
    let unbroken = |sim: &mut Sim, _: &[_]| match sim.stats().panics {
        0 => Ok(()),
        _ => Err(Violation::new("the handler panicked")),
    };
    sim.try_play(addr, script, unbroken)?;
    sim.settle();
    unbroken(&mut sim, &[])
}

/// As [`try_play`], for printed tests.
///
/// # Panics
///
/// If the handler does.
#[track_caller]
pub fn play(script: &Script) {
    if let Err(violation) = try_play(script) {
        panic!("{violation}");
    }
}
