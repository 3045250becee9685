//! The Redis example and the clients of others: redis-cli, redis-benchmark, redis-py.

use std::io::Write;
use std::process::Command;

use kit::net::{eventually, have, ChildProcess};

use super::{start, terminate};

#[test]
fn redis_cli_is_served() {
    if !have("redis-cli", "--version") {
        return;
    }
    let (server, addr) = start(&[]);
    let port = addr.port().to_string();
    let cli = |words: &[&str]| {
        let output = Command::new("redis-cli")
            .args(["-p", &port])
            .args(words)
            .output();
        String::from_utf8_lossy(&output.expect("redis-cli").stdout).into_owned()
    };
    assert_eq!(cli(&["set", "k", "a b"]), "OK\n");
    assert_eq!(cli(&["get", "k"]), "a b\n");
    assert_eq!(cli(&["incr", "n"]), "1\n");
    assert_eq!(cli(&["rpush", "l", "1", "2"]), "2\n");
    assert_eq!(cli(&["lrange", "l", "0", "-1"]), "1\n2\n");
    assert!(cli(&["get", "l"]).starts_with("WRONGTYPE"));
    assert_eq!(cli(&["-3", "get", "k"]), "a b\n");
    assert!(cli(&["info"]).contains("connected_clients:"));

    // Interactive: it waits for messages.
    let mut command = Command::new("redis-cli");
    let (subscriber, input) = ChildProcess::interactive(command.args(["-p", &port]));
    writeln!(&input, "subscribe news").expect("sent");
    let lines = || [subscriber.line(), subscriber.line(), subscriber.line()];
    assert_eq!(lines(), ["subscribe", "news", "1"]);
    eventually("the subscriber hears", || {
        cli(&["publish", "news", "hello"]) == "1\n"
    });
    assert_eq!(lines(), ["message", "news", "hello"]);
    drop((input, subscriber));
    terminate(server);
}

#[test]
fn redis_benchmark_is_served() {
    if !have("redis-benchmark", "--version") {
        return;
    }
    let (server, addr) = start(&[]);
    let tests = "ping_inline,ping_mbulk,set,get,incr,lpush,rpush,lpop,rpop,lrange_100,mset";
    let mut command = Command::new("redis-benchmark");
    command.args(["-p", &addr.port().to_string(), "-t", tests]);
    command.args(["-q", "-n", "1000", "-c", "20", "-P", "10", "-r", "100"]);
    let (status, out, log) = ChildProcess::start(&mut command).finish();
    assert!(status.success() && log.is_empty(), "{out}{log}");
    assert_eq!(out.matches("requests per second").count(), 12, "{out}");
    assert!(!out.contains("ERR"), "{out}");
    terminate(server);
}

/// A Python that has the package `redis`: Debian's, or the first one of the path.
fn python() -> Option<&'static str> {
    let has_redis = |python: &&str| {
        let output = Command::new(python).args(["-c", "import redis"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let found = ["/usr/bin/python3", "python3"].into_iter().find(has_redis);
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs redis-py (python3-redis) for this test"
        );
        eprintln!("SKIPPED: redis-py is not installed, this test did not run");
    }
    found
}

#[test]
fn redis_py_is_served() {
    let Some(python) = python() else { return };
    let (server, addr) = start(&[]);
    let script = r#"
import redis, sys
r = redis.Redis(port=int(sys.argv[1]), socket_timeout=30)
assert r.ping() and r.set("k", b"\0\r\n") and r.get("k") == b"\0\r\n"
assert r.set("k", "v", ex=100, xx=True) and r.set("k", "w", nx=True) is None
assert 90 <= r.ttl("k") <= 100
assert r.incr("n", 5) == 5 and r.decr("n") == 4 and r.mget("k", "none") == [b"v", None]
try:
    r.incr("k")
    assert False
except redis.ResponseError as error:
    assert str(error) == "value is not an integer or out of range"
assert r.rpush("l", *range(5)) == 5 and r.lpop("l", 2) == [b"0", b"1"]
assert r.lrange("l", 0, -1) == [b"2", b"3", b"4"]
assert r.lrem("l", 0, 3) == 1 and r.keys("[kn]") and r.dbsize() == 3
assert r.client_setname("py") and r.client_getname() == "py"
assert r.client_list()[0]["name"] == "py" and r.info()["connected_clients"] == 1

# It writes the whole pipeline before it reads.
pipe = r.pipeline(transaction=False)
for number in range(50000):
    pipe.get("k")
assert pipe.execute() == [b"v"] * 50000

hubs = [r.pubsub(ignore_subscribe_messages=True) for _ in range(3)]
for hub in hubs:
    hub.subscribe("a")
    hub.psubscribe("b*")
    for _ in range(2):
        assert hub.parse_response(timeout=30)
assert r.publish("a", "1") == 3 and r.publish("bb", "2") == 3
for hub in hubs:
    one, two = hub.get_message(timeout=30), hub.get_message(timeout=30)
    assert (one["type"], one["data"]) == ("message", b"1")
    assert (two["type"], two["pattern"], two["data"]) == ("pmessage", b"b*", b"2")
    hub.close()
"#;
    let mut command = Command::new(python);
    command.args(["-c", script, &addr.port().to_string()]);
    let (status, out, log) = ChildProcess::start(&mut command).finish();
    assert!(status.success(), "{out}{log}");
    terminate(server);
}
