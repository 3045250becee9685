//! Whatever has come is read to its end, though nothing more announces it: a read takes no more than there is room for.

use std::io::{ErrorKind, Write};

use kit::net::{connect, hold, local, spawn};
use portcullis::{Config, Context, Framing, Handler, Outcome, Server};

/// Says nothing, whatever comes.
struct Silent;

impl Handler for Silent {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

#[test]
fn several_reads_that_came_at_once() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        // Room in the kernel for more than one read.
        let listen = local().with(|listen| {
            listen.framing = Framing::Raw;
            listen.socket.recv_buffer = Some(1 << 20);
        });
        server
            .listen(listen, |_: &mut (), _| Silent)
            .expect("listen");
        (server, ())
    });
    let mut client = connect(server.addr());
    server.until("it is in", |stats| stats.opened == 1);
    client.set_nonblocking(true).expect("non-blocking");
    let mut sent = 0;
    for limit in [1, 64 * 1024, 128 * 1024, 200_000, usize::MAX] {
        let still = hold(&server.handle);
        let mut left = limit.min(1 << 20);
        while left > 0 {
            match client.write(&vec![7; left]) {
                Ok(count) => (left, sent) = (left - count, sent + count as u64),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        drop(still);
        server.until("all is read", |stats| stats.traffic.bytes_in == sent);
    }
}
