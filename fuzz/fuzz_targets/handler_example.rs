//! A fuzz target for a handler of your own: the one in the documentation of `portcullis::sim::Script`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Script, Sim};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome};

/// Stands for your own: it keeps a running total, and must not be made to overflow it.
#[derive(Default)]
struct MyHandler {
    total: u32,
}

impl Handler for MyHandler {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        let number: u32 = std::str::from_utf8(frame)?.trim().parse()?;
        self.total = self.total.saturating_add(number);
        cx.conn.send(self.total.to_string())?;
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let mut sim = Sim::new(0, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line); // as in your program
    let addr = sim
        .listen(listen, |_app, _peer| MyHandler::default())
        .unwrap();
    sim.play(addr, &Script::from_bytes(input));
});
