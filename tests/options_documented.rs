//! Every option of a listener says when a change of it takes effect, and every option of an outgoing connection its default.

#[test]
fn every_option_says_when_it_takes_effect() {
    let source = include_str!("../src/listen.rs");
    let (mut docs, mut options) = (String::new(), 0);
    for line in source.lines().map(str::trim) {
        if let Some(words) = line.strip_prefix("///") {
            docs.push_str(words);
            continue;
        }
        let is_option = line.starts_with("pub fn ") && line.contains("(mut self");
        if is_option {
            let says = docs.contains("*Live") || docs.contains("*Next connection") || docs.contains("*Next listen");
            let as_another = docs.contains("Else as [`Listen::");
            assert!(says || as_another, "{line} does not say when it takes effect");
            options += 1;
        }
        if !line.starts_with("#[") {
            docs.clear();
        }
    }
    assert!(options > 30, "{options} options were found");
}

/// The same options under the same names, as far as they are about a connection; each with its default.
#[test]
fn every_option_of_an_outgoing_connection_says_its_default() {
    let options = |source: &str| -> Vec<(String, String)> {
        let (mut docs, mut found) = (String::new(), Vec::new());
        for line in source.lines().map(str::trim) {
            if let Some(words) = line.strip_prefix("///") {
                docs.push_str(words);
            } else if let Some(name) = line.strip_prefix("pub fn ") {
                let name = name.split(['(', '<']).next().unwrap_or_default();
                found.push((name.to_owned(), std::mem::take(&mut docs)));
            } else if !line.starts_with("#[") {
                docs.clear();
            }
        }
        found
    };
    let source = include_str!("../src/connect.rs");
    let builder = source.split("impl fmt::Debug for Connect").next().unwrap_or_default();
    let ours = options(builder);
    for (name, docs) in ours.iter().filter(|(name, _)| name != "new") {
        assert!(docs.contains("Defaults to"), "{name} does not say its default");
    }
    let theirs = options(include_str!("../src/listen.rs"));
    let of_a_connection = theirs.iter().filter(|(name, docs)| {
        let shared = ["nodelay", "keepalive", "recv_buffer", "send_buffer"].contains(&name.as_str());
        let total = name.starts_with("total_") || name == "proxy_protocol";
        shared || (docs.contains("*Next connection.*") && !total)
    });
    let mut count = 0;
    for (name, _) in of_a_connection {
        assert!(ours.iter().any(|(own, _)| own == name), "Connect has no {name}");
        count += 1;
    }
    assert!(count > 14, "{count} options are shared");
}
