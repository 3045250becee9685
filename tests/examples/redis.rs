//! The commands of the Redis example, on raw sockets.

mod clients;
mod limits;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use kit::net::{await_end, connect, eventually, example, ChildProcess};

pub fn start(options: &[&str]) -> (ChildProcess, SocketAddr) {
    let mut command = Command::new(example("redis"));
    command.args(["--listen", "127.0.0.1:0"]).args(options);
    let child = ChildProcess::start(&mut command);
    let addr = child.address();
    (child, addr)
}

/// Ends the server in order. No handler has panicked.
pub fn terminate(server: ChildProcess) {
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
}

/// A client on a raw socket.
pub struct Client(pub BufReader<TcpStream>);

impl Client {
    pub fn new(addr: SocketAddr) -> Self {
        Self(BufReader::new(connect(addr)))
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).expect("sent");
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        line.strip_suffix("\r\n").expect("CR LF").to_owned()
    }

    /// The next reply as text: `+OK`, `:1`, `-ERR ...`, a bulk string as it is, `nil`, `[a b]`.
    pub fn reply(&mut self) -> String {
        let line = self.line();
        let number = line.get(1..).and_then(|number| number.parse::<i64>().ok());
        match (line.as_bytes()[0], number) {
            (b'$' | b'*', Some(-1)) => "nil".to_owned(),
            (b'$', Some(length)) => {
                let mut bytes = vec![0; length as usize + 2];
                self.0.read_exact(&mut bytes).expect("a bulk string");
                assert!(bytes.ends_with(b"\r\n"));
                String::from_utf8_lossy(&bytes[..length as usize]).into_owned()
            }
            (b'*', Some(count)) => {
                let items: Vec<_> = (0..count).map(|_| self.reply()).collect();
                format!("[{}]", items.join(" "))
            }
            _ => line,
        }
    }

    /// Sends a command, its words split at blanks, and returns the reply.
    pub fn ask(&mut self, words: &str) -> String {
        self.send(command(&words.split(' ').collect::<Vec<_>>()));
        self.reply()
    }

    #[track_caller]
    pub fn expect(&mut self, dialogue: &[(&str, &str)]) {
        for (words, reply) in dialogue {
            assert_eq!(self.ask(words), *reply, "{words}");
        }
    }

    /// A number of INFO.
    pub fn info(&mut self, field: &str) -> u64 {
        let info = self.ask("INFO");
        let value = info
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("{field}: {info}"))
    }
}

/// A command on the wire.
pub fn command(words: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let mut wire = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        let word = word.as_ref();
        wire.extend(format!("${}\r\n", word.len()).bytes());
        wire.extend(word);
        wire.extend(b"\r\n");
    }
    wire
}

const WRONG_TYPE: &str = "-WRONGTYPE Operation against a key holding the wrong kind of value";
const NOT_INTEGER: &str = "-ERR value is not an integer or out of range";

#[test]
fn strings_and_counters() {
    let (server, addr) = start(&[]);
    let mut client = Client::new(addr);
    client.expect(&[
        ("SET k v", "+OK"),
        ("get k", "v"),
        ("GET none", "nil"),
        ("SET k w NX", "nil"),
        ("SET k w XX", "+OK"),
        ("SET none w XX", "nil"),
        ("SET k x GET", "w"),
        ("SET k y NX XX", "-ERR syntax error"),
        ("SET k y EX", "-ERR syntax error"),
        ("SET k y EX 1 KEEPTTL", "-ERR syntax error"),
        ("SET k y EX 0", "-ERR invalid expire time in 'set' command"),
        (
            "SET k y EX 9223372036854775807",
            "-ERR invalid expire time in 'set' command",
        ),
        ("SET k y PX one", NOT_INTEGER),
        ("SETNX k z", ":0"),
        ("SETNX l z", ":1"),
        ("GETSET l y", "z"),
        ("MSET a 1 b 2", "+OK"),
        (
            "MSET a 1 b",
            "-ERR wrong number of arguments for 'mset' command",
        ),
        ("MGET a none b", "[1 nil 2]"),
        ("APPEND a 23", ":3"),
        ("APPEND new 1", ":1"),
        ("STRLEN a", ":3"),
        ("STRLEN none", ":0"),
        ("INCR a", ":124"),
        ("DECR a", ":123"),
        ("INCRBY a -23", ":100"),
        ("DECRBY a 100", ":0"),
        ("INCR fresh", ":1"),
        ("INCR k", NOT_INTEGER),
        ("INCRBY a 1.5", NOT_INTEGER),
        ("INCRBY a 01", NOT_INTEGER),
        ("INCRBY a -0", NOT_INTEGER),
        ("INCRBY a +1", NOT_INTEGER),
        ("INCRBY a -", NOT_INTEGER),
        ("INCRBY a 9223372036854775808", NOT_INTEGER),
        ("INCRBY a -9223372036854775808", ":-9223372036854775808"),
        ("SET a 9223372036854775807", "+OK"),
        ("INCR a", "-ERR increment or decrement would overflow"),
        (
            "DECRBY b -9223372036854775808",
            "-ERR decrement would overflow",
        ),
        ("EXISTS a a none", ":2"),
        ("TYPE a", "+string"),
        ("TYPE none", "+none"),
        ("DBSIZE", ":6"),
        ("KEYS f[a-z]*h", "[fresh]"),
        ("KEYS [^a-k]", "[l]"),
        ("UNLINK a b none", ":2"),
        ("DEL k", ":1"),
        ("RPUSH list 1", ":1"),
        ("GET list", WRONG_TYPE),
        ("INCR list", WRONG_TYPE),
        ("APPEND list x", WRONG_TYPE),
        ("SET list x GET", WRONG_TYPE),
        ("MGET list", "[nil]"),
        ("SET list x", "+OK"),
        ("FLUSHALL", "+OK"),
        ("DBSIZE", ":0"),
    ]);
    assert_eq!(client.info("used_memory"), 0);
    drop(client);
    terminate(server);
}

#[test]
fn lists() {
    let (server, addr) = start(&[]);
    let mut client = Client::new(addr);
    client.expect(&[
        ("RPUSH l c d", ":2"),
        ("LPUSH l b a", ":4"),
        ("LLEN l", ":4"),
        ("TYPE l", "+list"),
        ("LRANGE l 0 -1", "[a b c d]"),
        ("LRANGE l -2 100", "[c d]"),
        ("LRANGE l 3 1", "[]"),
        (
            "LRANGE l -9223372036854775808 9223372036854775807",
            "[a b c d]",
        ),
        ("LRANGE none 0 -1", "[]"),
        ("LRANGE l 0 x", NOT_INTEGER),
        ("LINDEX l 0", "a"),
        ("LINDEX l -1", "d"),
        ("LINDEX l 4", "nil"),
        ("LINDEX l -5", "nil"),
        ("LPOP l", "a"),
        ("RPOP l", "d"),
        ("RPOP l 0", "[]"),
        ("RPOP l -1", "-ERR value is out of range, must be positive"),
        ("LPOP l 10", "[b c]"),
        ("EXISTS l", ":0"),
        ("LPOP l", "nil"),
        ("LPOP l 1", "nil"),
        ("RPUSH l x a x b x", ":5"),
        ("LREM l -1 x", ":1"),
        ("LRANGE l 0 -1", "[x a x b]"),
        ("LREM l 1 x", ":1"),
        ("LRANGE l 0 -1", "[a x b]"),
        ("LREM l 0 x", ":1"),
        ("LREM none 0 x", ":0"),
        ("LTRIM l 1 -1", "+OK"),
        ("LRANGE l 0 -1", "[b]"),
        ("LTRIM l 5 10", "+OK"),
        ("EXISTS l", ":0"),
        ("SET s x", "+OK"),
        ("LPUSH s x", WRONG_TYPE),
        ("LPOP s", WRONG_TYPE),
        ("LRANGE s 0 1", WRONG_TYPE),
        ("DEL s", ":1"),
    ]);
    assert_eq!(client.info("used_memory"), 0);
    drop(client);
    terminate(server);
}

#[test]
fn keys_expire_when_used_and_by_themselves() {
    let (server, addr) = start(&[]);
    let mut client = Client::new(addr);
    client.expect(&[
        ("SET k v EX 1000", "+OK"),
        ("PERSIST k", ":1"),
        ("PERSIST k", ":0"),
        ("TTL k", ":-1"),
        ("TTL none", ":-2"),
        ("EXPIRE k 500", ":1"),
        ("APPEND k w", ":2"),
        ("SET k v KEEPTTL", "+OK"),
    ]);
    let [seconds, millis] = ["TTL k", "PTTL k"].map(|words| {
        let left = client.ask(words);
        left[1..].parse::<u64>().expect("a number")
    });
    assert!((400..=500).contains(&seconds), "{seconds}");
    assert!((400_000..=500_000).contains(&millis), "{millis}");
    client.expect(&[
        ("SET k v", "+OK"),
        ("PTTL k", ":-1"),
        ("EXPIRE none 1", ":0"),
        (
            "EXPIRE k 9223372036854775807",
            "-ERR invalid expire time in 'expire' command",
        ),
        ("EXPIREAT k 99999999999", ":1"),
        ("PEXPIRE k 9000000000000000000", ":1"),
        ("EXPIRE k -1", ":1"),
        ("EXISTS k", ":0"),
        ("SETEX k 100 v", "+OK"),
        ("SETEX k 0 v", "-ERR invalid expire time in 'setex' command"),
        ("EXPIREAT k 1", ":1"),
        ("GET k", "nil"),
        ("SET l v PX 1", "+OK"),
    ]);
    eventually("a used key expires", || client.ask("GET l") == "nil");
    // No client uses these, and none waits for them.
    let keys: Vec<u8> = (0..2000)
        .flat_map(|key| command(&["SET", &key.to_string(), "v", "PX", "1"]))
        .collect();
    client.send(keys);
    for _ in 0..2000 {
        assert_eq!(client.reply(), "+OK");
    }
    eventually("unused keys expire", || client.ask("DBSIZE") == ":0");
    assert_eq!(client.info("expired_keys"), 2001);
    assert_eq!(client.info("used_memory"), 0);
    drop(client);
    terminate(server);
}

#[test]
fn commands_about_the_connection() {
    let (server, addr) = start(&["--maxmemory", "5000000"]);
    let mut client = Client::new(addr);
    client.expect(&[
        ("PING", "+PONG"),
        ("PING hi", "hi"),
        ("ECHO hi", "hi"),
        ("SELECT 0", "+OK"),
        ("SELECT 1", "-ERR DB index is out of range"),
        ("CLIENT ID", ":1"),
        ("CLIENT GETNAME", "nil"),
        ("CLIENT SETNAME ada", "+OK"),
        ("CLIENT SETINFO LIB-NAME x", "+OK"),
        ("CLIENT GETNAME", "ada"),
        (
            "CLIENT NONSENSE",
            "-ERR unknown subcommand 'NONSENSE'. Try CLIENT HELP.",
        ),
        ("HELLO 3", "-NOPROTO unsupported protocol version"),
        ("CONFIG GET maxm*", "[maxmemory 5000000]"),
        ("CONFIG GET save appendonly", "[appendonly no save ]"),
        (
            "COMMAND DOCS",
            "-ERR unknown subcommand 'DOCS'. Try COMMAND HELP.",
        ),
        ("RESET", "+RESET"),
        ("CLIENT GETNAME", "nil"),
        (
            "NONSENSE a b",
            "-ERR unknown command 'NONSENSE', with args beginning with: 'a' 'b' ",
        ),
    ]);
    assert!(client.ask("HELLO 2 SETNAME bob").contains("proto :2 id :1"));
    assert!(client.ask("CLIENT LIST").contains(" name=bob "));
    assert!(client.ask("TIME").starts_with("[1"));
    // An inline command, an empty one, and a quit with commands behind it.
    client.send("set k v\r\n\r\n*0\r\nGET k\nQUIT\r\nGET k\r\n");
    assert_eq!(
        [client.reply(), client.reply(), client.reply()],
        ["+OK", "v", "+OK"]
    );
    await_end(&mut client.0);
    drop(client);
    terminate(server);
}

/// Each command, with each number of arguments: a reply, and no panic.
#[test]
fn every_command_checks_its_arguments() {
    let (server, addr) = start(&[]);
    let names = Client::new(addr).ask("COMMAND");
    let names: Vec<_> = names
        .split("[")
        .filter_map(|entry| entry.split_once(" :-1"))
        .collect();
    assert!(names.len() > 50, "{names:?}");
    for (name, _) in names {
        for count in 0..6 {
            let mut client = Client::new(addr);
            client.send(command(&[&[name][..], &["1"; 6][..count]].concat()));
            let reply = client.reply();
            assert!(!reply.contains("unknown command"), "{name}: {reply}");
            if name == "get" && count != 1 {
                assert_eq!(reply, "-ERR wrong number of arguments for 'get' command");
            }
        }
    }
    assert_eq!(Client::new(addr).ask("PING"), "+PONG");
    terminate(server);
}

#[test]
fn subscribers_get_messages_of_channels_and_patterns() {
    let (server, addr) = start(&[]);
    let mut publisher = Client::new(addr);
    let mut subscribers: Vec<_> = (0..20).map(|_| Client::new(addr)).collect();
    for subscriber in &mut subscribers {
        assert_eq!(
            subscriber.ask("SUBSCRIBE news other"),
            "[subscribe news :1]"
        );
        assert_eq!(subscriber.reply(), "[subscribe other :2]");
    }
    let mut pattern = Client::new(addr);
    assert_eq!(
        pattern.ask("PSUBSCRIBE n[a-f]w?"),
        "[psubscribe n[a-f]w? :1]"
    );
    publisher.expect(&[
        ("PUBLISH news hello", ":21"),
        ("PUBLISH none hello", ":0"),
        ("PUBSUB CHANNELS", "[news other]"),
        ("PUBSUB CHANNELS o*", "[other]"),
        ("PUBSUB NUMSUB news none", "[news :20 none :0]"),
        ("PUBSUB NUMPAT", ":1"),
    ]);
    for subscriber in &mut subscribers {
        assert_eq!(subscriber.reply(), "[message news hello]");
    }
    assert_eq!(pattern.reply(), "[pmessage n[a-f]w? news hello]");

    let subscriber = &mut subscribers[0];
    let error = "-ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / \
                 RESET are allowed in this context";
    subscriber.expect(&[
        ("GET k", error),
        ("PING", "[pong ]"),
        ("UNSUBSCRIBE other", "[unsubscribe other :1]"),
        ("UNSUBSCRIBE", "[unsubscribe news :0]"),
        ("UNSUBSCRIBE", "[unsubscribe nil :0]"),
        ("GET k", "nil"),
    ]);
    assert_eq!(pattern.ask("RESET"), "+RESET");
    drop(subscribers.split_off(1));
    eventually("the others have left", || {
        publisher.ask("PUBLISH news x") == ":0"
    });
    assert_eq!(publisher.info("used_memory"), 0);
    drop((publisher, subscribers, pattern));
    terminate(server);
}
