"""Python's `ssl`. In memory, as its sockets cannot read after they have sent close_notify."""

import socket
import ssl
import sys

port, roots, version = sys.argv[1:]
context = ssl.create_default_context(cafile=roots)
context.minimum_version = context.maximum_version = {
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}[version]
data = bytes(range(251)) * 400
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
tcp = socket.create_connection(("127.0.0.1", int(port)), timeout=20)


def until_done(call, *arguments):
    """Calls until neither input nor output is missing."""
    while True:
        try:
            result = call(*arguments)
            tcp.sendall(outgoing.read())
            return result
        except ssl.SSLWantReadError:
            tcp.sendall(outgoing.read())
            received = tcp.recv(65536)
            incoming.write(received) if received else incoming.write_eof()


def read(length):
    received = b""
    while len(received) < length:
        received += until_done(tls.read, 65536)
    return received


until_done(tls.do_handshake)
assert tls.version() == "TLSv" + version, tls.version()
assert until_done(tls.write, data) == len(data)
assert read(len(data)) == data, "other data came back"

assert until_done(tls.write, data) == len(data)
try:
    tls.unwrap()
except ssl.SSLWantReadError:
    tcp.sendall(outgoing.read())
assert read(len(data)) == data, "other data came back after close_notify"
try:
    read(1)
    sys.exit("more came than was sent")
except ssl.SSLZeroReturnError:
    pass  # close_notify; an end without it is an SSLEOFError
