// Go's crypto/tls.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"os"
	"time"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	pem, err := os.ReadFile(os.Args[2])
	check(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	version := map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}[os.Args[3]]
	conn, err := tls.Dial("tcp", "127.0.0.1:"+os.Args[1], &tls.Config{
		RootCAs: roots, ServerName: "localhost", MinVersion: version, MaxVersion: version,
	})
	check(err)
	check(conn.SetDeadline(time.Now().Add(20 * time.Second)))
	data := bytes.Repeat([]byte("0123456789"), 10000)

	_, err = conn.Write(data)
	check(err)
	back := make([]byte, len(data))
	_, err = io.ReadFull(conn, back)
	check(err)
	if !bytes.Equal(back, data) {
		log.Fatal("other data came back")
	}

	_, err = conn.Write(data)
	check(err)
	check(conn.CloseWrite())
	// An end without close_notify is io.ErrUnexpectedEOF.
	back, err = io.ReadAll(conn)
	check(err)
	if !bytes.Equal(back, data) {
		log.Fatal("other data came back after close_notify")
	}
	check(conn.Close())
}
