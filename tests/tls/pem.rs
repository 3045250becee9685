//! `tls::server_config` loads what OpenSSL and certificate authorities write, and names the file and the fault of what it cannot.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kit::net::{have, local, packet2, spawn_echo};
use kit::tls::{exchange, secure, Authority, Folder, Identity, Site, NAME, VERSIONS};
use portcullis::tls::server_config;
use portcullis::Config;
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair, PKCS_ED25519};

/// A good chain and key on disk.
struct Desk {
    folder: Folder,
    site: Site,
    chain: PathBuf,
    key: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let (folder, site) = (Folder::new(), Site::new());
        let chain = folder.file("chain.pem", &site.identity.chain_pem);
        let key = folder.file("key.pem", &site.identity.key_pem);
        Self {
            folder,
            site,
            chain,
            key,
        }
    }
}

/// The error, which must name `file` and this fault.
#[track_caller]
fn refused(chain: &Path, key: &Path, file: &Path, fault: &str) {
    let error = server_config(chain, key).expect_err("it cannot be used");
    let words = error.to_string();
    assert!(words.starts_with(&file.display().to_string()), "{words}");
    assert!(words.contains(fault), "{words}");
    assert!(
        !words.contains('\n') && words.len() < 400,
        "one line: {words}"
    );
}

/// A client that trusts `site` is served with this chain and key.
#[track_caller]
fn works(site: &Site, chain: &Path, key: &Path) {
    let config = server_config(chain, key).expect("a configuration");
    let server = spawn_echo(Config::new(), local().tls(config));
    for version in VERSIONS {
        let client = secure(server.addr(), &site.client(version));
        assert_eq!(exchange(client, &packet2(b"hello")), packet2(b"hello"));
    }
}

/// `openssl` with these arguments, in this folder.
#[track_caller]
fn openssl(folder: &Folder, arguments: &[&str]) {
    let output = Command::new("openssl")
        .current_dir(folder.path())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("openssl runs");
    assert!(
        output.status.success(),
        "openssl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_chain_with_its_authority_after_it_works() {
    let desk = Desk::new();
    works(&desk.site, &desk.chain, &desk.key);
}

/// Both in one file, in either order, with words around them, as some tools write.
#[test]
fn chain_and_key_may_share_a_file() {
    let desk = Desk::new();
    let Identity {
        chain_pem, key_pem, ..
    } = &desk.site.identity;
    for (at, text) in [
        format!("{chain_pem}{key_pem}"),
        format!("{key_pem}{chain_pem}"),
        format!("Bag Attributes\n    friendlyName: x\n{key_pem}subject=CN = x\n{chain_pem}"),
        format!("{chain_pem}{key_pem}").replace('\n', "\r\n"),
    ]
    .into_iter()
    .enumerate()
    {
        let both = desk.folder.file(&format!("both{at}.pem"), text);
        works(&desk.site, &both, &both);
    }
}

#[test]
fn what_is_not_there_is_named() {
    let desk = Desk::new();
    let missing = desk.folder.path().join("missing.pem");
    refused(&missing, &desk.key, &missing, "No such file");
    refused(&desk.chain, &missing, &missing, "No such file");
    let folder = desk.folder.path();
    refused(folder, &desk.key, folder, "directory");
    refused(&desk.chain, folder, folder, "directory");
}

#[test]
fn what_holds_nothing_is_named() {
    let desk = Desk::new();
    let rubbish = [
        ("empty", &b""[..]),
        ("text", b"not a certificate\n"),
        ("binary", &[0xff, 0, 0x80, b'\n', 0xfe]),
    ];
    for (name, content) in rubbish {
        let file = desk.folder.file(name, content);
        refused(&file, &desk.key, &file, "no certificate in PEM form");
        refused(&desk.chain, &file, &file, "no private key");
    }
    // DER, which some tools write by default.
    let der = desk.folder.file("chain.der", &desk.site.identity.chain[0]);
    refused(&der, &desk.key, &der, "no certificate in PEM form");
}

/// The two arguments exchanged, the commonest slip of all.
#[test]
fn the_wrong_kind_of_file_is_named() {
    let desk = Desk::new();
    refused(
        &desk.key,
        &desk.chain,
        &desk.key,
        "no certificate in PEM form",
    );
    refused(&desk.chain, &desk.chain, &desk.chain, "no private key");
}

#[test]
fn a_key_of_another_certificate_is_named() {
    let desk = Desk::new();
    let other = desk
        .folder
        .file("other.pem", Authority::new("other").server().key_pem);
    refused(&desk.chain, &other, &other, "does not belong to");
    let words = server_config(&desk.chain, &other)
        .expect_err("mismatched")
        .to_string();
    assert!(words.contains("chain.pem"), "both files are named: {words}");
    // The right two, with the authority's certificate first.
    let Identity { chain, .. } = &desk.site.identity;
    assert_eq!(chain.len(), 2);
    let pem = &desk.site.identity.chain_pem;
    let second = pem
        .match_indices("-----BEGIN")
        .nth(1)
        .expect("two certificates")
        .0;
    let reversed = desk.folder.file(
        "reversed.pem",
        format!("{}{}", &pem[second..], &pem[..second]),
    );
    refused(
        &reversed,
        &desk.key,
        &desk.key,
        "does not belong to the first certificate",
    );
}

#[test]
fn a_damaged_file_is_named() {
    let desk = Desk::new();
    for (which, text) in [
        ("chain", &desk.site.identity.chain_pem),
        ("key", &desk.site.identity.key_pem),
    ] {
        let lines: Vec<&str> = text.lines().collect();
        let end = text.find("-----END").expect("an end");
        let unusable = if which == "chain" {
            "not valid"
        } else {
            "no key that can be used"
        };
        for (at, (content, fault)) in [
            // A copy that was interrupted; a line that is no base64; a piece missing; all in one line.
            (text[..end].to_owned(), "cut off"),
            (text.replacen(lines[1], "!!!!", 1), "not valid base64"),
            (text.replacen(&lines[1][..32], "", 1), unusable),
            (text.replace('\n', ""), "lost its line breaks"),
        ]
        .into_iter()
        .enumerate()
        {
            let file = desk.folder.file(&format!("{which}{at}.pem"), content);
            if which == "chain" {
                refused(&file, &desk.key, &file, fault);
            } else {
                refused(&desk.chain, &file, &file, fault);
            }
        }
    }
}

/// Errors go to logs and terminals: nothing of a key is in them, whatever became of its lines.
#[test]
fn an_error_never_shows_the_key() {
    let desk = Desk::new();
    let text = &desk.site.identity.key_pem;
    let secret = text.lines().nth(1).expect("a line of the key");
    let bytes = format!("{:?}", &secret.as_bytes()[..8]);
    for (at, content) in [
        text.replace('\n', ""),
        text.replace('\n', " "),
        text.replace("KEY-----\n", "KEY"),
        text.replace("-----END", "END"),
        text.replacen("-----\n", "\n", 1),
        text.replacen("-----\n", "", 1),
    ]
    .into_iter()
    .enumerate()
    {
        let file = desk.folder.file(&format!("key{at}.pem"), content);
        let error = server_config(&desk.chain, &file).expect_err("it cannot be used");
        let words = format!("{error} {error:?}");
        assert!(!words.contains(&secret[..8]), "{words}");
        assert!(!words.contains(bytes.trim_matches(['[', ']'])), "{words}");
    }
}

/// Keys as `openssl` writes them: PKCS #8, PKCS #1 for RSA, SEC1 for elliptic curves.
#[test]
fn every_form_of_key_works() {
    if !have("openssl", "version") {
        return;
    }
    let folder = Folder::new();
    let subject = ["-subj", "/CN=server", "-days", "30"];
    let name = format!("subjectAltName=DNS:{NAME}");
    for (kind, algorithm) in [
        (
            "rsa",
            &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"][..],
        ),
        (
            "p256",
            &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
        ),
        (
            "p384",
            &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
        ),
        ("ed25519", &["-algorithm", "ED25519"]),
    ] {
        let (key, certificate, traditional) = (
            format!("{kind}.key"),
            format!("{kind}.pem"),
            format!("{kind}.traditional.key"),
        );
        openssl(
            &folder,
            &[&["genpkey", "-out", &key][..], algorithm].concat(),
        );
        let request = [
            "req",
            "-x509",
            "-key",
            &key,
            "-out",
            &certificate,
            "-addext",
            &name,
        ];
        openssl(&folder, &[&request[..], &subject].concat());
        let path = |file: &str| folder.path().join(file);
        let config = server_config(path(&certificate), path(&key));
        config.unwrap_or_else(|error| panic!("{kind} in PKCS #8: {error}"));
        if kind != "ed25519" {
            openssl(
                &folder,
                &["pkey", "-in", &key, "-traditional", "-out", &traditional],
            );
            let text = std::fs::read_to_string(path(&traditional)).expect("a key");
            assert!(
                text.contains("RSA PRIVATE KEY") || text.contains("EC PRIVATE KEY"),
                "{text}"
            );
            let config = server_config(path(&certificate), path(&traditional));
            config.unwrap_or_else(|error| panic!("{kind}, traditional: {error}"));
        }
    }
    // With the curve's parameters in front, as `openssl ecparam -genkey` writes them.
    openssl(
        &folder,
        &[
            "ecparam",
            "-name",
            "prime256v1",
            "-genkey",
            "-out",
            "ecparam.key",
        ],
    );
    let request = [
        "req",
        "-x509",
        "-key",
        "ecparam.key",
        "-out",
        "ecparam.pem",
        "-addext",
        &name,
    ];
    openssl(&folder, &[&request[..], &subject].concat());
    let path = |file: &str| folder.path().join(file);
    assert!(std::fs::read_to_string(path("ecparam.key"))
        .expect("a key")
        .contains("EC PARAMETERS"));
    server_config(path("ecparam.pem"), path("ecparam.key")).expect("a configuration");
}

/// An encrypted key is told from none at all: its user must decrypt it first.
#[test]
fn an_encrypted_key_is_named() {
    if !have("openssl", "version") {
        return;
    }
    let desk = Desk::new();
    for (name, form) in [
        ("pkcs8", &["pkcs8", "-topk8"][..]),
        ("sec1", &["ec", "-aes128"]),
    ] {
        let file = format!("{name}.key");
        let secret = ["-in", "key.pem", "-out", &file, "-passout", "pass:secret"];
        openssl(&desk.folder, &[form, &secret].concat());
        let file = desk.folder.path().join(file);
        assert!(std::fs::read_to_string(&file)
            .expect("a key")
            .contains("ENCRYPTED"));
        refused(
            &desk.chain,
            &file,
            &file,
            "encrypted private key: decrypt it",
        );
    }
}

/// Every certificate of the file reaches the client, however the files were joined.
#[test]
fn no_certificate_is_lost() {
    let desk = Desk::new();
    let Identity {
        chain_pem, key_pem, ..
    } = &desk.site.identity;
    let joined = chain_pem.replace("-----\n-----BEGIN", "----------BEGIN");
    assert!(joined.contains("----------BEGIN"));
    let mark = '\u{FEFF}';
    for (at, content) in [
        joined.clone(),
        format!("{}{}", key_pem.trim_end(), joined),
        format!(
            "{mark}{}",
            chain_pem.replace("-----BEGIN", &format!("{mark}-----BEGIN"))
        ),
        chain_pem.replace('\n', "\r"),
        chain_pem.replace('\n', "\n    "),
        chain_pem.replace("CERTIFICATE", "X509 CERTIFICATE"),
        format!(
            "{chain_pem}-----BEGIN DH PARAMETERS-----\nMAYCAQUCAQI=\n-----END DH PARAMETERS-----"
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let chain = desk.folder.file(&format!("joined{at}.pem"), &content);
        let config = server_config(&chain, &desk.key);
        let config = config.unwrap_or_else(|error| panic!("{content}: {error}"));
        let server = spawn_echo(Config::new(), local().tls(config));
        let mut client = secure(server.addr(), &desk.site.client(VERSIONS[0]));
        kit::net::ping(&mut client, b"hello");
        let shown = client.conn.peer_certificates().expect("a chain").len();
        assert_eq!(shown, 2, "{content}");
    }
}

/// A certificate that OpenSSL or another reader would skip in silence is an error with its line.
#[test]
fn a_certificate_that_cannot_be_read_is_named_by_its_line() {
    let desk = Desk::new();
    let pem = &desk.site.identity.chain_pem;
    let second = pem.match_indices("-----BEGIN").nth(1).expect("two").0;
    let (first, second) = pem.split_at(second);
    let begins = first.lines().count() + 1;
    let cut = &second[..second.find("-----END").expect("an end")];
    for (at, (content, fault)) in [
        (cut.to_owned(), "cut off"),
        (format!("{cut}{second}"), "no END line"),
        (second.replacen("-----BEGIN", "----BEGIN", 1), "BEGIN line"),
        (second.replacen("TE-----", "TE----", 1), "BEGIN line"),
        (
            second.replace("END CERTIFICATE", "END PRIVATE KEY"),
            "END line",
        ),
        (
            second.replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
            "trust settings",
        ),
        (
            second.replace("CERTIFICATE", "PKCS7"),
            "no certificate of a known kind",
        ),
        (
            second.replace("CERTIFICATE", "certificate"),
            "no certificate of a known kind",
        ),
        (second.replacen("MII", "MI!", 1), "not valid base64"),
        (second.replacen("MII", "MMI", 1), "not valid"),
        (
            "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n".to_owned(),
            "not valid",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let file = desk
            .folder
            .file(&format!("part{at}.pem"), format!("{first}{content}"));
        refused(&file, &desk.key, &file, fault);
        refused(&file, &desk.key, &file, &format!("line {begins}"));
        // Where certificates are trusted, too.
        let roots = portcullis::tls::client_config(&file).expect_err("it cannot be used");
        assert!(roots.to_string().contains(fault), "{content}: {roots}");
    }
    let utf16: Vec<u8> = pem.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let file = desk
        .folder
        .file("utf16.pem", [b"\xFF\xFE", &utf16[..]].concat());
    refused(&file, &desk.key, &file, "UTF-16");
    let other = desk.folder.file(
        "ssh.key",
        desk.site
            .identity
            .key_pem
            .replace("PRIVATE", "OPENSSH PRIVATE"),
    );
    refused(
        &desk.chain,
        &other,
        &other,
        "line 1, a private key in a form",
    );
}

/// DER writes the length of a short certificate in one byte, of others in two.
#[test]
fn certificates_of_every_size_work() {
    let folder = Folder::new();
    for (name, length, kind) in [("short", 0, 0x81), ("common", 300, 0x82)] {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if length > 0 {
            let id = [1, 3, 6, 1, 4, 1, 99_999, 1];
            let extension = CustomExtension::from_oid_content(&id, vec![5; length]);
            params.custom_extensions.push(extension);
        }
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        assert_eq!(certificate.der()[..2], [0x30, kind], "{name}");
        let chain = folder.file(&format!("{name}.pem"), certificate.pem());
        let key = folder.file(&format!("{name}.key"), key.serialize_pem());
        server_config(&chain, &key).expect(name);
    }
}

/// A sequence with one number.
#[test]
fn der_that_is_no_certificate_is_named() {
    let desk = Desk::new();
    let pem = "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n";
    let file = desk.folder.file("number.pem", pem);
    refused(
        &file,
        &desk.key,
        &file,
        "begins with a certificate that is not valid",
    );
}

/// rustls reads no certificate of more than 64 KiB as the first, and any behind it.
#[test]
fn a_long_certificate_may_stand_behind_the_first() {
    let desk = Desk::new();
    let mut params = CertificateParams::default();
    let id = [1, 3, 6, 1, 4, 1, 99_999, 1];
    let extension = CustomExtension::from_oid_content(&id, vec![5; 70_000]);
    params.custom_extensions.push(extension);
    let key = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
    let long = params.self_signed(&key).expect("a certificate");
    assert_eq!(long.der()[..2], [0x30, 0x83], "three bytes of length");
    let content = format!("{}{}", desk.site.identity.chain_pem, long.pem());
    let chain = desk.folder.file("long.pem", content);
    server_config(&chain, &desk.key).expect("a configuration");
}
