package tunneltls

import (
	"encoding/binary"
	"errors"
)

// A lane's connection carries records and nothing else, both ways:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-------------------------------+-------------------------------+
//	|          length (16)          |         send time (16)        |
//	+-------------------------------+-------------------------------+
//	|  datagram, length - 2 bytes ...
//	+---------------------------------
//
// length counts what follows it. send time is the sender's monotonic clock in
// milliseconds, modulo 65,536, from any origin.
const (
	sizeLength   = 2
	sizeSendTime = 2
	recordHeader = sizeLength + sizeSendTime
	maxLength    = 1<<16 - 1
	maxDatagram  = maxLength - sizeSendTime
	maxRecord    = sizeLength + maxLength
	wrap         = 1 << 16 // of the send time
)

var errRecord = errors.New("malformed record on a lane")

// appendRecord appends a record with a datagram of at most maxDatagram bytes.
func appendRecord(b []byte, sent uint16, datagram []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(sizeSendTime+len(datagram)))
	b = binary.BigEndian.AppendUint16(b, sent)
	return append(b, datagram...)
}

// nextRecord takes the first record from b. size is how many bytes it took; 0:
// it is not complete yet. datagram is a part of b.
func nextRecord(b []byte) (sent uint16, datagram []byte, size int, err error) {
	if len(b) < sizeLength {
		return 0, nil, 0, nil
	}
	n := int(binary.BigEndian.Uint16(b))
	if n < sizeSendTime {
		return 0, nil, 0, errRecord
	}
	size = sizeLength + n
	if len(b) < size {
		return 0, nil, 0, nil
	}
	return binary.BigEndian.Uint16(b[sizeLength:]), b[recordHeader:size:size], size, nil
}
