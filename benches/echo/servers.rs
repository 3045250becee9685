//! The servers: the same echo in each way.

use std::io::{Read, Write};
use std::net::SocketAddr;

use clap::ValueEnum;
use message_io::network::{NetEvent, Transport};
use portcullis::{Config, Framing, Listen, Server};

use crate::common::Echo;

/// The kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Kind {
    /// A loop on mio, for this one job. The reference.
    Mio,
    /// Us.
    Portcullis,
    /// Us, recording without payloads. With `--recorded` alone.
    #[cfg(feature = "record")]
    Recorded,
    /// tokio, reading and writing buffers of its own.
    TokioHand,
    /// tokio with the codec of tokio-util.
    TokioCodec,
    /// message-io returning what it reads, unframed: its own framing writes header and payload one by one and lets TCP wait
    /// for acknowledgements in between.
    MessageIo,
}

impl Kind {
    pub const ALL: [Self; 5] = [
        Self::Mio,
        Self::Portcullis,
        Self::TokioHand,
        Self::TokioCodec,
        Self::MessageIo,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mio => "mio by hand",
            Self::Portcullis => "portcullis",
            #[cfg(feature = "record")]
            Self::Recorded => "portcullis, recorded",
            Self::TokioHand => "tokio by hand",
            Self::TokioCodec => "tokio codec",
            Self::MessageIo => "message-io, unframed",
        }
    }
}

/// Serves until the process ends.
pub fn serve(kind: Kind) {
    match kind {
        Kind::Mio => by_mio(),
        Kind::Portcullis => by_portcullis(Server::new(config()).expect("a server")),
        #[cfg(feature = "record")]
        Kind::Recorded => by_portcullis(crate::common::recorded::server(config())),
        Kind::TokioHand => by_tokio(false),
        Kind::TokioCodec => by_tokio(true),
        Kind::MessageIo => by_message_io(),
    }
}

fn tell(addr: SocketAddr) {
    println!("{addr}");
}

fn config() -> Config {
    Config::max_connections(4_000)
}

fn by_portcullis(mut server: Server) {
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).name("echo");
    server.listen(listen, |_app, _peer| Echo).expect("a port");
    let addr = server.control().listener("echo").expect("there").addr;
    tell(addr.as_tcp().expect("TCP"));
    server.run(&mut ()).expect("it runs");
}

/// The whole frames at the front of `bytes`: how long they are together.
fn whole(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(&[high, low]) = bytes.get(at..at + 2) {
        let end = at + 2 + usize::from(u16::from_be_bytes([high, low]));
        if end > bytes.len() {
            break;
        }
        at = end;
    }
    at
}

fn by_mio() {
    use mio::net::{TcpListener, TcpStream};
    use mio::{Events, Interest, Poll, Token};

    const LISTENER: Token = Token(usize::MAX);
    let mut poll = Poll::new().expect("a poll");
    let mut events = Events::with_capacity(1024);
    let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
    tell(listener.local_addr().expect("bound"));
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)
        .expect("a poll");
    // What is left of an incomplete frame, and what the kernel has not taken yet.
    let mut connections: slab::Slab<(TcpStream, Vec<u8>, Vec<u8>)> = slab::Slab::new();
    let mut scratch = vec![0; 64 * 1024];
    loop {
        poll.poll(&mut events, None).expect("a poll");
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.set_nodelay(true);
                    let both = Interest::READABLE | Interest::WRITABLE;
                    let entry = connections.vacant_entry();
                    poll.registry()
                        .register(&mut stream, Token(entry.key()), both)
                        .expect("a poll");
                    entry.insert((stream, Vec::new(), Vec::new()));
                }
                continue;
            }
            let Some((stream, held, owed)) = connections.get_mut(event.token().0) else {
                continue;
            };
            let alive = (|| {
                if !owed.is_empty() && event.is_writable() {
                    let count = stream.write(owed).unwrap_or(0);
                    owed.drain(..count);
                }
                while event.is_readable() {
                    let count = match stream.read(&mut scratch) {
                        Ok(0) => return false,
                        Ok(count) => count,
                        Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
                    };
                    let mut bytes = &scratch[..count];
                    if !held.is_empty() {
                        held.extend_from_slice(bytes);
                        bytes = held;
                    }
                    let (frames, rest) = bytes.split_at(whole(bytes));
                    if owed.is_empty() {
                        let taken = if frames.is_empty() {
                            0
                        } else {
                            stream.write(frames).unwrap_or(0)
                        };
                        owed.extend_from_slice(&frames[taken..]);
                    } else {
                        owed.extend_from_slice(frames);
                    }
                    *held = rest.to_vec();
                    if count < scratch.len() {
                        break;
                    }
                }
                true
            })();
            if !alive {
                connections.remove(event.token().0);
            }
        }
    }
}

fn by_tokio(codec: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .expect("a runtime");
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        tell(listener.local_addr().expect("bound"));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                continue;
            };
            let _ = stream.set_nodelay(true);
            if codec {
                tokio::spawn(through_codec(stream));
            } else {
                tokio::spawn(by_hand(stream));
            }
        }
    });
}

async fn through_codec(stream: tokio::net::TcpStream) -> std::io::Result<()> {
    use futures_util::{SinkExt, StreamExt};
    use tokio_util::codec::LengthDelimitedCodec;

    let mut framed = LengthDelimitedCodec::builder()
        .length_field_length(2)
        .max_frame_length(65_535)
        .new_framed(stream);
    while let Some(frame) = framed.next().await {
        framed.send(frame?.freeze()).await?;
    }
    Ok(())
}

async fn by_hand(mut stream: tokio::net::TcpStream) -> std::io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let mut input = Vec::with_capacity(4_096);
    loop {
        input.reserve(4_096);
        if stream.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        let frames = whole(&input);
        if frames > 0 {
            stream.write_all(&input[..frames]).await?;
            input.drain(..frames);
        }
    }
}

fn by_message_io() {
    let (handler, listener) = message_io::node::split::<()>();
    let (_, addr) = handler
        .network()
        .listen(Transport::Tcp, "127.0.0.1:0")
        .expect("a port");
    tell(addr);
    listener.for_each(move |event| {
        if let NetEvent::Message(endpoint, data) = event.network() {
            handler.network().send(endpoint, data);
        }
    });
}
