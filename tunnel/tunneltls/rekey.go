package tunneltls

import (
	"net"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
)

const (
	// rekeyRate and rekeyBurst are how many records a second a peer may send that
	// hold no data of its own. TLS needs one in 2^24 records (RFC 8446 §5.5), and a
	// peer of this package sends none.
	rekeyRate, rekeyBurst = 1, 50
	// sizeRekey is a KeyUpdate's content (RFC 8446 §4.6.3), and recordCover what a
	// record has beside its content: a type and the tag of every cipher that
	// crypto/tls knows (§5.2).
	sizeRekey   = 5
	recordHead  = 5
	recordCover = 1 + 16
	// maxOpening is how much a peer may send before it has shown who it is, in
	// bytes. crypto/tls itself takes certificates of 256 KiB; ours have one of 500 bytes.
	maxOpening = 64 << 10
)

// errRekeys is why a connection ends whose peer changes keys without end.
var errRekeys = tunnel.Errorf(tunnel.LimitExceeded, "the peer sends TLS records that carry nothing, as KeyUpdates do, more than once a second; nothing of ours does that")

var errOpening = tunnel.Errorf(tunnel.LimitExceeded, "the peer's TLS handshake is longer than %d bytes", maxOpening)

// rekeyMeter is what TLS reads from. crypto/tls takes every KeyUpdate, answers
// those that ask for it, and bounds only how many come one after another: 16.
//
// When TLS reads on, it has dealt with every record that is here as a whole, and
// what was data has been handed out. The rest is what a peer makes work with.
// A record's padding is none: where a record was handed out it carried something.
//
// It is used by the one goroutine that reads.
type rekeyMeter struct {
	net.Conn
	idle *rate.Limiter

	head [recordHead]byte
	have int // bytes of head
	skip int // bytes of the record that follow

	opening int  // bytes that came before on
	on      bool // the handshake is done
	known   bool // every record since is counted
	records int  // that are whole, since TLS read last
	content int  // their bytes
	handed  int  // bytes that were handed out of them
	times   int  // how often some were
}

func newRekeyMeter(conn net.Conn) *rekeyMeter {
	return &rekeyMeter{Conn: conn, idle: rate.NewLimiter(rekeyRate, rekeyBurst)}
}

func (m *rekeyMeter) Read(p []byte) (int, error) {
	if err := m.settle(time.Now()); err != nil {
		return 0, err
	}
	n, err := m.Conn.Read(p)
	m.came(p[:n])
	if !m.on {
		if m.opening += n; m.opening > maxOpening {
			return 0, errOpening
		}
	}
	return n, err
}

// settle judges the records that TLS has dealt with.
func (m *rekeyMeter) settle(now time.Time) error {
	idle := min(m.records-m.times, (m.content-m.handed+sizeRekey-1)/sizeRekey)
	counted := m.known
	m.records, m.content, m.handed, m.times = 0, 0, 0, 0
	m.known = m.on // what came with the end of the handshake is not counted
	if counted && idle > 0 && !m.idle.AllowN(now, idle) {
		return errRekeys
	}
	return nil
}

// came follows the records (RFC 8446 §5.1).
func (m *rekeyMeter) came(p []byte) {
	for len(p) > 0 {
		if m.skip > 0 {
			n := min(m.skip, len(p))
			p = p[n:]
			if m.skip -= n; m.skip == 0 {
				m.records++
			}
			continue
		}
		n := copy(m.head[m.have:], p)
		m.have += n
		p = p[n:]
		if m.have < recordHead {
			return
		}
		m.have = 0
		m.skip = int(m.head[3])<<8 | int(m.head[4])
		m.content += max(0, m.skip-recordCover)
	}
}

// gave notes what TLS has handed out.
func (m *rekeyMeter) gave(n int) {
	m.on = true
	if n > 0 {
		m.handed += n
		m.times++
	}
}
