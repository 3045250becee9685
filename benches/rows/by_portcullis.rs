//! Servers by this crate.

use std::time::Duration;

use portcullis::{
    Closed, Config, ConnId, Context, Decoded, FrameBuf, FrameError, Framer, Framing, Handler,
    Listen, Outcome, Server, Shards,
};

use crate::common::fan_out::SUBSCRIBE;
use crate::common::process::commands;
use crate::common::Echo;
use crate::servers::{config, print_addr};
use crate::turns::{processor_time, Turns};

/// Longest payload of a row, and more.
const MAX_FRAME: usize = 1 << 20;
/// The time that a drain may take.
const GRACE: Duration = Duration::from_secs(10);

fn listen(framing: Framing) -> Listen {
    Listen::tcp("127.0.0.1:0", framing)
        .name("row")
        .with(|listen| {
            listen.conn.max_frame = Some(MAX_FRAME);
            listen.conn.high_watermark = MAX_FRAME;
            listen.conn.output_limit = 4 * MAX_FRAME;
        })
}

fn print_port<A>(server: &mut Server<A>) {
    let addr = server.control().listener("row").expect("there").addr;
    print_addr(addr.as_tcp().expect("TCP"), None);
}

/// Echoes with this framing.
pub fn echo(framing: Framing) {
    let mut server = Server::new(config()).expect("a server");
    let listen = listen(framing);
    server.listen(listen, |_app, _peer| Echo).expect("a port");
    print_port(&mut server);
    server.run(&mut ()).expect("it runs");
}

/// Packet-4, as a framer of the user's.
struct Packet4;

impl Framer for Packet4 {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let Some(header) = input.first_chunk::<4>() else {
            return Ok(Decoded::More);
        };
        let end = u32::from_be_bytes(*header) as usize + 4;
        Ok(if end <= input.len() {
            Decoded::Frame {
                payload: 4..end,
                consumed: end,
            }
        } else {
            Decoded::Need(end)
        })
    }

    fn header(&mut self, length: usize, out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        let length = u32::try_from(length).map_err(FrameError::new)?;
        out.put(&length.to_be_bytes());
        Ok(())
    }
}

/// As [`echo`] with packet-4, through a framer of the user's.
pub fn custom() {
    echo(Framing::custom(|| Packet4));
}

/// Sends to all subscribers: the state of the server.
struct FanOut;

impl Handler<Vec<ConnId>> for FanOut {
    fn on_frame(&mut self, cx: &mut Context<'_, Vec<ConnId>>, packet: &[u8]) -> Outcome {
        if packet == SUBSCRIBE {
            cx.app.push(cx.conn.id());
            cx.conn.send(packet)?;
        } else {
            let sent = cx.conn.broadcast(cx.app.iter().copied(), packet);
            assert!(sent.refused.is_empty(), "within the output limit");
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Vec<ConnId>>, _: &Closed) {
        let id = cx.conn.id();
        cx.app.retain(|&subscriber| subscriber != id);
    }
}

pub fn fan_out() {
    let mut server = Server::new(config()).expect("a server");
    let listen = listen(Framing::Packet4);
    server.listen(listen, |_app, _peer| FanOut).expect("a port");
    print_port(&mut server);
    server.run(&mut Vec::new()).expect("it runs");
}

/// Echoes packet-2, and notes the processor time of each iteration.
pub fn iteration(turns: &Turns) {
    let mut server = Server::new(config()).expect("a server");
    let listen = listen(Framing::Packet2);
    server.listen(listen, |_app, _peer| Echo).expect("a port");
    print_port(&mut server);
    loop {
        let begun = processor_time();
        server.poll_once(&mut (), None).expect("it runs");
        turns.note(processor_time() - begun);
    }
}

/// Echoes packet-2 on two threads.
pub fn shards() {
    let shards = Shards::new(Config::max_connections(10_000)).threads(2);
    let running = shards
        .spawn(|_shard, server| {
            server.listen(listen(Framing::Packet2), |_app, _peer| Echo)?;
            Ok(())
        })
        .expect("two threads");
    let addr = running.listeners[0].addr.as_tcp().expect("TCP");
    print_addr(addr, None);
    running.join().expect("they run");
}

/// Echoes packet-2. Drains at the command, and prints a line at the end.
pub fn drain() {
    let mut server = Server::new(config()).expect("a server");
    let listen = listen(Framing::Packet2);
    server.listen(listen, |_app, _peer| Echo).expect("a port");
    let handle = server.handle();
    commands(move |_| handle.drain(GRACE).expect("it runs"));
    print_port(&mut server);
    server.run(&mut ()).expect("it runs");
    println!("ended");
}
