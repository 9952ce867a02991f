//go:build !linux

package tunneltls

import (
	"net"
	"time"
)

const unsent = 16 << 10

// Go sets TCP_NODELAY by itself; the rest is Linux's.

func tune(net.Conn) {}

func keepShort(net.Conn, int, time.Duration) {}

func keepUnsent(net.Conn, int) {}

func roundTrip(net.Conn) time.Duration { return 0 }

func waited(net.Conn) time.Duration { return 0 }

func ask(net.Conn) (progress, bool) { return progress{}, false }

func bbr() bool { return false }
