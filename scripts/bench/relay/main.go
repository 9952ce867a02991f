// Relay passes datagrams on and their answers back, with nothing around them.
// Two of them in a row are what any tunnel does at the least: the yardstick for
// the CPU time of a packet.
//
//	relay -listen 127.0.0.1:7001 -to 127.0.0.1:9000 &
//	relay -listen 127.0.0.1:7000 -to 127.0.0.1:7001
//
// Each sender gets a socket of its own towards the next hop, which it keeps
// until the end: it is a yardstick, not a service.
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"net/netip"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("relay: ")
	listen := flag.String("listen", "127.0.0.1:7000", "where datagrams come in, `address:port`")
	to := flag.String("to", "127.0.0.1:9000", "where they go, `address:port`")
	flag.Parse()
	log.Fatal(relay(*listen, *to))
}

// buffer of the kernel for each socket, so that bursts pass.
const buffer = 4 << 20

func relay(listen, to string) error {
	at, err := net.ResolveUDPAddr("udp", listen)
	if err != nil {
		return err
	}
	next, err := net.ResolveUDPAddr("udp", to)
	if err != nil {
		return err
	}
	front, err := net.ListenUDP("udp", at)
	if err != nil {
		return err
	}
	// What the kernel gives is its own decision (net.core.rmem_max).
	_ = front.SetReadBuffer(buffer)
	_ = front.SetWriteBuffer(buffer)
	fmt.Println("ready")
	senders := map[netip.AddrPort]*net.UDPConn{}
	b := make([]byte, 65536)
	for {
		n, from, err := front.ReadFromUDPAddrPort(b)
		if err != nil {
			return err
		}
		out := senders[from]
		if out == nil {
			if out, err = net.DialUDP("udp", nil, next); err != nil {
				return err
			}
			_ = out.SetReadBuffer(buffer)
			senders[from] = out
			go back(front, out, from)
		}
		// A refused datagram is a lost one, here and in back.
		_, _ = out.Write(b[:n])
	}
}

// back carries the answers to one sender.
func back(front, out *net.UDPConn, to netip.AddrPort) {
	b := make([]byte, 65536)
	for {
		if n, err := out.Read(b); err == nil {
			_, _ = front.WriteToUDPAddrPort(b[:n], to)
		}
	}
}
