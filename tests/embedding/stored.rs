//! What a program holds fits into its own types, whatever its state is: in structs and enums, printed, and chosen while it runs.

use std::collections::HashMap;
use std::fmt::Debug;

use kit::net::{connect, ping, read_to_end, tcp, Echo, PATIENCE};
use portcullis::{
    try_accept, Config, Conn, Connect, Context, Control, Framing, Handle, Listen, ListenerId,
    ListenerRef, Peer, Refuse, Server, Service, Shards, Spawned,
};

/// Has no trait at all.
struct State;

#[derive(Debug)]
#[allow(dead_code, clippy::large_enum_variant)]
enum Held {
    Here {
        server: Server<State>,
        listeners: Vec<ListenerId>,
        name: String,
    },
    OnAThread(Spawned<State>),
    OnThreads(Spawned<State>),
    Elsewhere(Handle<State>, Option<Handle<State>>),
    NotYet(Config, Listen, Connect, Shards),
}

#[test]
fn all_is_printed_whatever_the_state_is() {
    fn printed<T: Debug>() {}
    printed::<Held>();
    printed::<Context<'_, State>>();
    printed::<Conn<'_, State>>();
    printed::<Control<'_, State>>();
    let mut server: Server<State> = Server::new(Config::new()).expect("a server");
    let name = String::from("games");
    let held = Held::Elsewhere(server.handle(), None);
    assert_eq!(format!("{held:?}"), "Elsewhere(Handle { .. }, None)");
    let by_name = ListenerRef::from(&name);
    assert_eq!(by_name, ListenerRef::from("games"));
    assert!(server.control().listener(&name).is_err());
}

/// From a table of protocols, by name: closures and others alike.
#[test]
fn services_are_chosen_while_the_program_runs() {
    let server = Server::spawn(|| {
        let mut protocols: HashMap<&str, Box<dyn Service>> = HashMap::new();
        protocols.insert("echo", Box::new(|_: &mut (), _: Peer| Echo));
        let nobody = try_accept(|_: &mut (), _: Peer| Err::<Echo, _>(Refuse::with_farewell("no")));
        protocols.insert("nobody", Box::new(nobody));
        let mut server = Server::new(Config::new())?;
        for name in ["echo", "nobody"] {
            let service = protocols.remove(name).expect("it is in the table");
            server.listen_with(
                Listen::tcp("127.0.0.1:0", Framing::Packet2).name(name),
                service,
            )?;
        }
        Ok((server, ()))
    })
    .expect("it listens");
    let addr = |name| {
        tcp(&server
            .handle
            .listener(name, PATIENCE)
            .expect("it listens")
            .addr)
    };
    ping(&mut connect(addr("echo")), b"hello");
    assert_eq!(read_to_end(&mut connect(addr("nobody"))), b"no");
    server.handle.drain(PATIENCE).expect("it runs");
    server.join().expect("no error");
}
