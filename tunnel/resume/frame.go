package resume

import (
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

// A framer reads frames from a carrier stream, byte by byte no more than they
// hold: what follows the head of data is read straight to where it belongs.
type framer struct {
	r   io.Reader
	buf [headBytes + maxCode]byte
	n   int // bytes of buf that have come of the frame being read
}

// next reads the next frame; of data, only the head. After an error it may be
// called again: what had come of a frame is kept.
func (r *framer) next() (f frame, err error) {
	if err := r.fill(headBytes); err != nil {
		return frame{}, err
	}
	f.kind, f.length = r.buf[0], int(binary.BigEndian.Uint16(r.buf[1:]))
	switch {
	case f.kind == frameData && f.length > 0:
		r.n = 0
		return f, nil
	case f.kind == frameAck && f.length == ackBytes, (f.kind == frameEnd || f.kind == frameStop) && f.length == 0, f.kind == frameReset && f.length <= maxCode:
	default:
		return frame{}, errFrame
	}
	if err := r.fill(headBytes + f.length); err != nil {
		return frame{}, err
	}
	body := r.buf[headBytes : headBytes+f.length]
	r.n = 0
	switch f.kind {
	case frameAck:
		f.ack = binary.BigEndian.Uint64(body)
	case frameReset:
		f.code = tunnel.Code(body)
		for _, c := range body {
			if c != '_' && (c < 'a' || c > 'z') {
				f.code = tunnel.Internal
			}
		}
	}
	return f, nil
}

// fill reads until there are n bytes.
func (r *framer) fill(n int) error {
	for r.n < n {
		m, err := r.r.Read(r.buf[r.n:n])
		r.n += m
		if err != nil && r.n < n {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

var errFrame = tunnel.Errorf(tunnel.Internal, "the other end broke the rules of a stream; update the older side")
