// Node's tls.
const fs = require('node:fs');
const tls = require('node:tls');

const [port, roots, version] = process.argv.slice(2);
const data = Buffer.alloc(100_000, '0123456789');
const socket = tls.connect({
  host: '127.0.0.1',
  port,
  servername: 'localhost',
  ca: fs.readFileSync(roots),
  minVersion: `TLSv${version}`,
  maxVersion: `TLSv${version}`,
  allowHalfOpen: true,
});
const parts = [];
let ends = false;
socket.setTimeout(20_000, () => socket.destroy(new Error('nothing comes')));
socket.on('secureConnect', () => socket.write(data));
socket.on('data', (part) => {
  parts.push(part);
  if (!ends && Buffer.concat(parts).equals(data)) {
    ends = true;
    socket.end(data);
  }
});
socket.on('end', () => {
  if (!Buffer.concat(parts).equals(Buffer.concat([data, data]))) throw new Error('other data came back');
});
socket.on('close', (failed) => {
  if (failed || !ends) process.exitCode = 1;
});
