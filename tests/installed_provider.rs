//! The provider that the process has installed makes the configurations. One process of its own: there is one such provider.
#![cfg(feature = "tls")]

use kit::tls::{provider, Folder, Site};
use portcullis::tls::rustls::crypto::CryptoProvider;
use portcullis::tls::{client_config, server_config};

/// No version of TLS can do without cipher suites.
#[test]
fn an_installed_provider_that_cannot_be_used_is_named_with_the_file() {
    let mut installed = CryptoProvider::clone(&provider());
    installed.cipher_suites.clear();
    installed.install_default().expect("there is none");
    let (folder, site) = (Folder::new(), Site::new());
    let chain = folder.file("chain.pem", &site.identity.chain_pem);
    let key = folder.file("key.pem", &site.identity.key_pem);
    let server = server_config(&chain, &key).expect_err("no cipher suites");
    let client = client_config(&chain).expect_err("no cipher suites");
    for (error, file) in [(server, key), (client, chain)] {
        let expected = format!("{} cannot be used with this TLS provider", file.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
