fn it_means_nothing() {
    use portcullis::sim::{Op, Script};

    let script = Script {
        ops: vec![
            Op::Connect,
            Op::Send {
                client: 0,
                bytes: b"add 5\nclear\nmean\n".to_vec(),
            },
        ],
    };
    play(&script);
}
