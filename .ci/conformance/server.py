"""The echo example over TLS, and its certificates."""

import os
import pathlib
import re
import signal
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent.parent / "target")).resolve()

EXTENSIONS = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
subjectKeyIdentifier = hash
"""


def make_certificates(folder):
    """Two authorities, and chains of the first one: with ECDSA, and with RSA."""
    folder.mkdir(exist_ok=True)
    (folder / "extensions").write_text(EXTENSIONS)
    ecdsa = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]

    def issue(name, words, kind, key, issuer=None):
        command = ["openssl", "req", "-x509", *key, "-nodes", "-days", "7", "-subj", f"/CN={words}"]
        command += ["-config", "extensions", "-extensions", kind, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        if issuer:
            command += ["-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    issue("ca", "conformance CA", "authority", ecdsa)
    issue("other-ca", "other CA", "authority", ecdsa)
    issue("middle", "intermediate CA", "authority", ecdsa, "ca")
    issue("leaf", "localhost", "server", ecdsa, "middle")
    issue("rsa", "localhost", "server", ["-newkey", "rsa:2048"], "ca")
    (folder / "chain.pem").write_text((folder / "leaf.pem").read_text() + (folder / "middle.pem").read_text())
    (folder / "leaf.key").rename(folder / "key.pem")
    return folder


class Server:
    """A running echo example, killed at the end of the block."""

    def __init__(self, chain, key, framing="raw"):
        echo = TARGET / "release" / "examples" / "echo"
        command = [echo, "--listen", "127.0.0.1:0", "--tls-cert", chain, "--tls-key", key]
        command += ["--framing", framing]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.port = re.match(r"listening on 127\.0\.0\.1:(\d+) ", self.process.stdout.readline()).group(1)

    def stop(self):
        """Drains it, and returns its summary."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, output
        return next(line for line in output.splitlines() if " accepted (" in line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
