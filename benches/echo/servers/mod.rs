//! The servers: the same echo in each way.

pub mod on_mio;
pub mod on_tokio;

use std::net::SocketAddr;

use clap::ValueEnum;
use message_io::network::{NetEvent, Transport};
use portcullis::{Config, Framing, Listen, Server};

use crate::common::site::Site;
use crate::common::{raise_descriptor_limit, Echo};

/// Least capacity of a connection's input buffer with tokio by hand, in bytes.
pub const TASK_BUFFER: usize = 4_096;

/// The kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum Kind {
    /// A loop on mio, for this one job. The reference.
    Mio,
    /// This crate.
    Portcullis,
    /// This crate, recording without payloads. With `--recorded` alone.
    #[cfg(feature = "record")]
    Recorded,
    /// `programs/epoll_echo.c`.
    Epoll,
    /// tokio, reading and writing buffers of its own.
    TokioHand,
    /// tokio with the codec of tokio-util, and `send` for each frame.
    TokioCodec,
    /// The same, but `feed` for each frame of a read, and then one `flush`.
    TokioFeed,
    /// message-io returning what it reads, unframed: its own framing writes header and payload one
    /// by one and lets TCP wait for acknowledgements in between.
    MessageIo,
    /// `programs/gen_tcp_echo.erl`.
    Erlang,
    /// The loop on mio, with rustls. The reference over TLS.
    MioTls,
    /// This crate over TLS.
    PortcullisTls,
    /// tokio-rustls, with the code of `TokioHand`.
    TokioTls,
    /// tokio-rustls, with the code of `TokioCodec`.
    TokioTlsCodec,
}

impl Kind {
    /// Plain TCP. The first is the reference.
    pub const PLAIN: [Self; 8] = [
        Self::Mio,
        Self::Portcullis,
        Self::Epoll,
        Self::TokioHand,
        Self::TokioCodec,
        Self::TokioFeed,
        Self::MessageIo,
        Self::Erlang,
    ];
    /// TLS 1.3. The first is the reference.
    pub const TLS: [Self; 4] = [
        Self::MioTls,
        Self::PortcullisTls,
        Self::TokioTls,
        Self::TokioTlsCodec,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mio => "mio by hand",
            Self::Portcullis | Self::PortcullisTls => "portcullis",
            #[cfg(feature = "record")]
            Self::Recorded => "portcullis, recorded",
            Self::Epoll => "C, bare epoll",
            Self::TokioHand => "tokio by hand",
            Self::TokioCodec => "tokio codec, send",
            Self::TokioFeed => "tokio codec, feed + flush",
            Self::MessageIo => "message-io, unframed",
            Self::Erlang => "Erlang gen_tcp, packet 2",
            Self::MioTls => "mio and rustls by hand",
            Self::TokioTls => "tokio-rustls by hand",
            Self::TokioTlsCodec => "tokio-rustls codec, send",
        }
    }

    pub fn is_tls(self) -> bool {
        Self::TLS.contains(&self)
    }

    pub fn is_portcullis(self) -> bool {
        matches!(self, Self::Portcullis | Self::PortcullisTls)
    }
}

/// Serves until the process ends. Panics for a kind that is a program of its own.
pub fn serve(kind: Kind) {
    match kind {
        Kind::Mio => on_mio::plain(),
        Kind::Portcullis => by_portcullis(Server::new(config()).expect("a server"), None),
        #[cfg(feature = "record")]
        Kind::Recorded => by_portcullis(crate::common::recorded::server(config()), None),
        Kind::TokioHand => on_tokio::by_hand(),
        Kind::TokioCodec => on_tokio::codec_send(),
        Kind::TokioFeed => on_tokio::codec_feed(),
        Kind::MessageIo => by_message_io(),
        Kind::MioTls => on_mio::tls(Site::new()),
        Kind::PortcullisTls => {
            let server = Server::new(config()).expect("a server");
            by_portcullis(server, Some(Site::new()));
        }
        Kind::TokioTls => on_tokio::tls_by_hand(Site::new()),
        Kind::TokioTlsCodec => on_tokio::tls_codec_send(Site::new()),
        Kind::Epoll | Kind::Erlang => panic!("{} is a program of its own", kind.name()),
    }
}

/// Prints the address, and over TLS the certificate in hexadecimal.
pub fn print_addr(addr: SocketAddr, site: Option<&Site>) {
    println!("{addr}");
    if let Some(site) = site {
        let digits = site.certificate.iter().map(|byte| format!("{byte:02x}"));
        println!("{}", digits.collect::<String>());
    }
}

pub fn config() -> Config {
    Config::max_connections(raise_descriptor_limit().saturating_sub(50) as usize)
}

fn by_portcullis(mut server: Server, site: Option<Site>) {
    let mut listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).name("echo");
    if let Some(site) = &site {
        listen = listen.tls(site.server.clone());
    }
    server.listen(listen, |_app, _peer| Echo).expect("a port");
    let addr = server.control().listener("echo").expect("there").addr;
    print_addr(addr.as_tcp().expect("TCP"), site.as_ref());
    server.run(&mut ()).expect("it runs");
}

/// Length of the complete frames at the start of `bytes`.
pub fn whole(bytes: &[u8]) -> usize {
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

fn by_message_io() {
    let (handler, listener) = message_io::node::split::<()>();
    let (_, addr) = handler
        .network()
        .listen(Transport::Tcp, "127.0.0.1:0")
        .expect("a port");
    print_addr(addr, None);
    listener.for_each(move |event| {
        if let NetEvent::Message(endpoint, data) = event.network() {
            handler.network().send(endpoint, data);
        }
    });
}
