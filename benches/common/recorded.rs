//! A server that is recorded without payloads.

use portcullis::{Config, Recording, Server};

/// The file has no name any more when this returns.
pub fn server(config: Config) -> Server {
    let path = std::env::temp_dir().join(format!("recorded-{}", std::process::id()));
    let server = Server::recorded(config, Recording::new(&path)).expect("a recording");
    std::fs::remove_file(path).expect("removed");
    server
}
