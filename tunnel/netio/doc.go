// Package netio moves UDP datagrams around package net, whose calls wait on a
// full socket and allocate addresses.
//
//	s, err := netio.NewSender(conn)
//	err = s.Send(p, to)                 // tunnel.ErrBlocked: the socket is full
//
//	b := netio.NewBatch(16, 2048)       // Linux
//	n, err := b.Read(raw)               // waits; TryRead(fd) does not
//	for i := range n { use(b.At(i)) }
//
//	s, err := poller.Packet(conn, r)    // thousands of sockets on few goroutines
//	err = s.Start()                     // r.Take(p, from), r.Flush()
//
// It promises that sending never waits, neither for the network nor for another
// goroutine's write to the same socket, that neither direction allocates once it
// has warmed up, and that what is received is bounded by the batch's own buffers.
// A polled socket that is idle costs no goroutine and no buffer, and one that is
// flooded takes turns with the others.
//
// It does not open or tune sockets, does not queue or repeat what a full
// socket has refused, and does not read a socket's error queue. Batches exist on
// Linux alone; elsewhere a Sender uses package net, cannot choose the local
// address, and may wait a millisecond, and a Poller has a goroutine and a buffer
// for each socket.
package netio
