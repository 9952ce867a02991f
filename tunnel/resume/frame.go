package resume

import (
	"bufio"
	"encoding/binary"
	"io"

	"culvert/tunnel"
)

// What travels on a carrier stream (PROTOCOL.md 4.3):
//
//	+----------+--------------+--------------------+
//	| kind (8) | length (16)  | body, length bytes |
//	+----------+--------------+--------------------+
const (
	frameData  = 0 // bytes of the stream
	frameAck   = 1 // how many have been taken here (64); the end counts as one
	frameEnd   = 2 // the sender writes no more
	frameStop  = 3 // the sender reads no more
	frameReset = 4 // both directions are over; the code

	headBytes = 3
	ackBytes  = 8
	maxCode   = 40
)

func putHead(b []byte, kind byte, n int) {
	b[0] = kind
	binary.BigEndian.PutUint16(b[1:], uint16(n))
}

func appendAck(b []byte, offset uint64) []byte {
	b = append(b, frameAck, 0, ackBytes)
	return binary.BigEndian.AppendUint64(b, offset)
}

func appendReset(b []byte, code tunnel.Code) []byte {
	code = code[:min(len(code), maxCode)]
	return append(append(b, frameReset, 0, byte(len(code))), code...)
}

// a frame is what has been read of one; of data, only the head.
type frame struct {
	kind   byte
	length int
	ack    uint64
	code   tunnel.Code
}

// readFrame reads the next frame. It takes nothing from r unless the whole
// frame, or the head of data, is there, so that it may be called again after a
// timeout.
func readFrame(r *bufio.Reader) (f frame, err error) {
	head, err := r.Peek(headBytes)
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	f.kind, f.length = head[0], int(binary.BigEndian.Uint16(head[1:]))
	switch {
	case f.kind == frameData && f.length > 0:
		r.Discard(headBytes)
		return f, nil
	case f.kind == frameAck && f.length == ackBytes, (f.kind == frameEnd || f.kind == frameStop) && f.length == 0, f.kind == frameReset && f.length <= maxCode:
	default:
		return frame{}, errFrame
	}
	body, err := r.Peek(headBytes + f.length)
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	switch f.kind {
	case frameAck:
		f.ack = binary.BigEndian.Uint64(body[headBytes:])
	case frameReset:
		f.code = tunnel.Code(body[headBytes:])
		for _, c := range []byte(f.code) {
			if c != '_' && (c < 'a' || c > 'z') {
				f.code = tunnel.Internal
			}
		}
	}
	r.Discard(headBytes + f.length)
	return f, nil
}

var errFrame = tunnel.Errorf(tunnel.Internal, "the other end broke the rules of a stream; update the older side")
