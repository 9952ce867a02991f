package tunneltls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"culvert/tunnel"
)

// The control stream is the first yamux stream, opened by the side that
// dialled. Both sides send on it, and only this:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+---------------+-------------------------------+
//	|   what (8)    |  length (8)   |                               |
//	+---------------+---------------+    yamux stream (32)          +
//	|                               |                               |
//	+-------------------------------+                               +
//	|                          total (64)                           |
//	+                               +-------------------------------+
//	|                               |  code, length bytes ...
//	+-------------------------------+-------------------------------
//
// total is the number of bytes that the sender has written to that stream, from
// its beginning to its end: a reader has reached the end when it has read them
// all. So an end may overtake the bytes, needs no frame among them, and an abort
// never waits for a window: the control stream's own is always read empty. code
// is a tunnel.Code, or empty.
type message struct {
	what   byte
	stream uint32
	total  uint64
	code   tunnel.Code
}

// What a message says of its sender. A stronger end may follow a weaker one.
const (
	saysNothing = iota
	saysFinish  // it writes no more
	saysClose   // nor does it read any more: what is still written to it is lost
	saysAbort   // both ends are over, and what has not been read yet is lost
)

const (
	messageHeader = 1 + 1 + 4 + 8
	maxCode       = 40
)

var errControl = errors.New("malformed message on the control stream")

func (m message) append(b []byte) []byte {
	code := m.code[:min(len(m.code), maxCode)]
	b = append(b, m.what, byte(len(code)))
	b = binary.BigEndian.AppendUint32(b, m.stream)
	b = binary.BigEndian.AppendUint64(b, m.total)
	return append(b, code...)
}

func readMessage(r io.Reader) (m message, err error) {
	var b [messageHeader + maxCode]byte
	head := b[:messageHeader]
	if _, err := io.ReadFull(r, head); err != nil {
		return m, err
	}
	m = message{what: head[0], stream: binary.BigEndian.Uint32(head[2:]), total: binary.BigEndian.Uint64(head[6:])}
	n := int(head[1])
	if m.what < saysFinish || m.what > saysAbort || n > maxCode {
		return m, errControl
	}
	code := b[messageHeader:][:n]
	if _, err := io.ReadFull(r, code); err != nil {
		return m, fmt.Errorf("%w: %w", errControl, err)
	}
	for _, c := range code {
		if (c < 'a' || c > 'z') && c != '_' {
			return m, errControl
		}
	}
	m.code = tunnel.Code(code)
	return m, nil
}
