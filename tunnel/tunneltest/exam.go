package tunneltest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

// patience bounds everything that must happen. It is far more than that takes
// on a busy machine, because it only costs time when the carrier under
// examination is at fault.
const patience = time.Minute

// A Setup is one kind of carrier, ready to be examined.
type Setup struct {
	// Pair makes a new connection and returns its two ends. Everything it
	// starts must be gone once both ends, and what they turned into, are closed;
	// what serves all pairs belongs in the function that makes the Setup.
	Pair func(t *testing.T) (client, server tunnel.Candidate)
	// Key is the key that every client proves; nil where it proves none.
	Key ed25519.PublicKey
	// Datagrams says that carriers have a way of their own.
	Datagrams bool
	// Lanes says that candidates can become lanes.
	Lanes bool
	// CloseTimeout is how long the library below keeps a stream that is closed
	// in one direction; 0: for ever. The exam waits longer than that, so set
	// the library to a second or less.
	CloseTimeout time.Duration
}

// Exam examines one kind of carrier. make is called once.
func Exam(t *testing.T, make func(t *testing.T) Setup) {
	s := make(t)
	for _, q := range []struct {
		name string
		ask  func(*testing.T, Setup)
	}{
		{"greeting passes both ways and ends where it ends", examGreeting},
		{"peer key and exported keys are the same at both ends", examKeys},
		{"candidate closed before the greeting ends its peer", examClosedBeforeGreeting},
		{"candidate deadline ends a read", examCandidateDeadline},
		{"candidate close after carrier does nothing", examCandidateCloseAfterCarrier},
		{"carrier without a greeting works", examNoGreeting},
		{"either side opens streams", examEitherSideOpens},
		{"10 MiB each way at once arrive in order", examIntegrity},
		{"half-close leaves the other direction open", examHalfClose},
		{"close delivers what was written", examCloseDelivers},
		{"close ends the peer's write", examCloseEndsPeersWrite},
		{"close ends a blocked read and a blocked write", examCloseUnblocks},
		{"abort fails the peer promptly", examAbort},
		{"deadline ends a read and is not fatal", examReadDeadline},
		{"deadline ends a write and loses no byte", examWriteDeadline},
		{"stream close is idempotent", examStreamCloseTwice},
		{"cancelled context ends open and accept", examContext},
		{"200 streams at once", examManyStreams},
		{"slow reader stalls nobody else", examSlowReader},
		{"streams come and go without a trace", examChurn},
		{"carrier close ends everything and leaves nothing", examCarrierClose},
		{"carrier stats name kind and ends", examStats},
	} {
		t.Run(q.name, func(t *testing.T) { q.ask(t, s) })
	}
	if s.Datagrams {
		examWay(t, "carrier way", func(t *testing.T) (a, b tunnel.Way) {
			client, server := carriers(t, s)
			if client.Datagrams() == nil || server.Datagrams() == nil {
				t.Fatal("the carrier has no way for datagrams")
			}
			return client.Datagrams(), server.Datagrams()
		})
	} else {
		t.Run("carrier has no way for datagrams", func(t *testing.T) {
			client, server := carriers(t, s)
			if client.Datagrams() != nil || server.Datagrams() != nil {
				t.Fatal("the carrier has a way for datagrams; the setup says it has none")
			}
		})
	}
	if s.Lanes {
		examWay(t, "lane", func(t *testing.T) (a, b tunnel.Way) { return lanes(t, s) })
		t.Run("lane close ends both ends and leaves nothing", func(t *testing.T) { examLaneClose(t, s) })
	} else {
		t.Run("lane is refused", func(t *testing.T) {
			client, server := pair(t, s)
			for _, c := range []tunnel.Candidate{client, server} {
				if lane, err := c.Lane(); err == nil {
					lane.Close(nil)
					t.Error("Lane succeeded; the setup says that there are none")
				}
			}
		})
	}
}

// pair makes a connection whose ends are closed when the test is over.
func pair(t *testing.T, s Setup) (client, server tunnel.Candidate) {
	t.Helper()
	client, server = s.Pair(t)
	t.Cleanup(func() {
		client.Close()
		server.Close()
	})
	return client, server
}

// greet exchanges an opening as a session does: the client speaks first.
func greet(client, server tunnel.Candidate, hello, welcome []byte) error {
	for _, c := range []tunnel.Candidate{client, server} {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		defer c.SetDeadline(time.Time{})
	}
	answered := make(chan error, 1)
	go func() {
		got := make([]byte, len(hello))
		if _, err := io.ReadFull(server, got); err != nil {
			answered <- fmt.Errorf("server reads the greeting: %w", err)
			return
		}
		if !bytes.Equal(got, hello) {
			answered <- fmt.Errorf("server read %q; the client wrote %q", got, hello)
			return
		}
		_, err := server.Write(welcome)
		answered <- err
	}()
	if _, err := client.Write(hello); err != nil {
		return fmt.Errorf("client writes the greeting: %w", err)
	}
	got := make([]byte, len(welcome))
	_, err := io.ReadFull(client, got)
	if failed := <-answered; failed != nil {
		return failed
	}
	if err != nil {
		return fmt.Errorf("client reads the answer: %w", err)
	}
	if !bytes.Equal(got, welcome) {
		return fmt.Errorf("client read %q; the server wrote %q", got, welcome)
	}
	return nil
}

// carriers makes two carriers that are closed when the test is over.
func carriers(t *testing.T, s Setup) (client, server tunnel.Carrier) {
	t.Helper()
	cc, sc := pair(t, s)
	if err := greet(cc, sc, []byte("hello"), []byte("welcome")); err != nil {
		t.Fatal(err)
	}
	return upgrade(t, cc, sc)
}

func upgrade(t *testing.T, cc, sc tunnel.Candidate) (client, server tunnel.Carrier) {
	t.Helper()
	client, err := cc.Carrier()
	if err != nil {
		t.Fatal("client Carrier:", err)
	}
	t.Cleanup(func() { client.Close(nil) })
	server, err = sc.Carrier()
	if err != nil {
		t.Fatal("server Carrier:", err)
	}
	t.Cleanup(func() { server.Close(nil) })
	return client, server
}

// lanes makes two lanes that are closed when the test is over.
func lanes(t *testing.T, s Setup) (client, server tunnel.Lane) {
	t.Helper()
	cc, sc := pair(t, s)
	if err := greet(cc, sc, []byte("hello"), []byte("welcome")); err != nil {
		t.Fatal(err)
	}
	client, err := cc.Lane()
	if err != nil {
		t.Fatal("client Lane:", err)
	}
	t.Cleanup(func() { client.Close(nil) })
	server, err = sc.Lane()
	if err != nil {
		t.Fatal("server Lane:", err)
	}
	t.Cleanup(func() { server.Close(nil) })
	return client, server
}

// open opens a stream at from, says one byte so that it reaches the peer, and
// returns both ends.
func open(t *testing.T, from, to tunnel.Carrier) (a, b tunnel.Stream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a, err := from.OpenStream(ctx)
	if err != nil {
		t.Fatal("OpenStream:", err)
	}
	if _, err := a.Write([]byte{'!'}); err != nil {
		t.Fatal("first Write:", err)
	}
	b, err = to.AcceptStream(ctx)
	if err != nil {
		t.Fatal("AcceptStream:", err)
	}
	var first [1]byte
	if _, err := io.ReadFull(b, first[:]); err != nil || first[0] != '!' {
		t.Fatalf("first Read: %q, %v", first, err)
	}
	return a, b
}

// wait fails the test when what does not end soon, and returns its error.
func wait(t *testing.T, what string, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatalf("%s: not done after %v", what, patience)
		return nil
	}
}

// begin runs f on its own goroutine.
func begin(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// fill writes to a stream that nobody reads until Write blocks. The channel
// then gives the error that ended that Write.
func fill(t *testing.T, s tunnel.Stream) <-chan error {
	t.Helper()
	var n atomic.Int64
	done := begin(func() error {
		chunk := make([]byte, 16<<10)
		for {
			m, err := s.Write(chunk)
			n.Add(int64(m))
			if err != nil {
				return err
			}
		}
	})
	blocked(t, &n, done)
	return done
}

// blocked returns when n has stood still for a while.
func blocked(t *testing.T, n *atomic.Int64, done <-chan error) {
	t.Helper()
	end := time.Now().Add(patience)
	for last, still := int64(-1), 0; still < 6; {
		select {
		case err := <-done:
			t.Fatalf("a Write that nobody reads ended: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatalf("%d bytes were taken for a reader that does not read, and there is no end", n.Load())
		}
		if now := n.Load(); now == last {
			still++
		} else {
			last, still = now, 0
		}
	}
}

func examGreeting(t *testing.T, s Setup) {
	for _, n := range []int{1, 300, 16 << 10} {
		t.Run(fmt.Sprint(n, " bytes"), func(t *testing.T) {
			cc, sc := pair(t, s)
			hello, welcome := noise(1, n), noise(2, n)
			if err := greet(cc, sc, hello, welcome); err != nil {
				t.Fatal(err)
			}
			// The first stream follows the greeting at once: what belongs to
			// it must not have been read as greeting, nor the reverse.
			client, err := cc.Carrier()
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close(nil)
			a, err := client.OpenStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := a.Write([]byte("after")); err != nil {
				t.Fatal(err)
			}
			server, err := sc.Carrier()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close(nil)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			b, err := server.AcceptStream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var got [5]byte
			if _, err := io.ReadFull(b, got[:]); err != nil || string(got[:]) != "after" {
				t.Fatalf("first stream: %q, %v", got, err)
			}
		})
	}
}

func examKeys(t *testing.T, s Setup) {
	cc, sc := pair(t, s)
	if got := sc.PeerKey(); !bytes.Equal(got, s.Key) {
		t.Errorf("the server sees key %x; the client proved %x", got, s.Key)
	}
	if cc.Kind() != sc.Kind() || (cc.Kind() != "quic" && cc.Kind() != "tls") {
		t.Errorf("kinds are %q and %q", cc.Kind(), sc.Kind())
	}
	if !cc.RemoteAddr().IsValid() || !sc.RemoteAddr().IsValid() {
		t.Errorf("remote addresses are %v and %v", cc.RemoteAddr(), sc.RemoteAddr())
	}
	if err := greet(cc, sc, []byte("hello"), []byte("welcome")); err != nil {
		t.Fatal(err)
	}
	client, server := upgrade(t, cc, sc)
	export := func(c tunnel.Carrier, label, context string, n int) []byte {
		t.Helper()
		key, err := c.ExportKey(label, []byte(context), n)
		if err != nil || len(key) != n {
			t.Fatalf("ExportKey: %d bytes, %v; want %d", len(key), err, n)
		}
		return key
	}
	first := export(client, "EXPORTER-culvert-exam", "context", 32)
	if !bytes.Equal(first, export(server, "EXPORTER-culvert-exam", "context", 32)) {
		t.Error("the two ends export different keys")
	}
	if bytes.Equal(first, export(client, "EXPORTER-culvert-exam", "other", 32)) {
		t.Error("another context gives the same key")
	}
	if bytes.Equal(first, export(client, "EXPORTER-culvert-other", "context", 32)) {
		t.Error("another label gives the same key")
	}
	again, _ := carriers(t, s)
	if bytes.Equal(first, export(again, "EXPORTER-culvert-exam", "context", 32)) {
		t.Error("another connection gives the same key")
	}
}

func examClosedBeforeGreeting(t *testing.T, s Setup) {
	for _, closes := range []string{"client", "server"} {
		t.Run(closes, func(t *testing.T) {
			a, b := pair(t, s)
			if closes == "server" {
				a, b = b, a
			}
			read := begin(func() error {
				_, err := b.Read(make([]byte, 1))
				return err
			})
			for range 2 { // Close is idempotent
				if err := a.Close(); err != nil {
					t.Error("Close:", err)
				}
			}
			if err := wait(t, "peer's Read", read); err == nil {
				t.Error("the peer read from a closed candidate")
			}
			if _, err := a.Read(make([]byte, 1)); err == nil {
				t.Error("a closed candidate can be read")
			}
			if _, err := a.Write(make([]byte, 1)); err == nil {
				t.Error("a closed candidate can be written")
			}
		})
	}
}

func examCandidateDeadline(t *testing.T, s Setup) {
	for _, reads := range []string{"client", "server"} {
		t.Run(reads, func(t *testing.T) {
			c, other := pair(t, s)
			if reads == "server" {
				c, other = other, c
			}
			if err := c.SetDeadline(time.Now().Add(30 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			err := wait(t, "Read", begin(func() error {
				_, err := c.Read(make([]byte, 1))
				return err
			}))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read past its deadline: %v", err)
			}
		})
	}
}

func examCandidateCloseAfterCarrier(t *testing.T, s Setup) {
	cc, sc := pair(t, s)
	if err := greet(cc, sc, []byte("hello"), []byte("welcome")); err != nil {
		t.Fatal(err)
	}
	client, server := upgrade(t, cc, sc)
	if _, err := cc.Carrier(); err == nil {
		t.Error("Carrier succeeded twice")
	}
	if err := errors.Join(cc.Close(), sc.Close()); err != nil {
		t.Error("Close:", err)
	}
	open(t, client, server)
}

func examNoGreeting(t *testing.T, s Setup) {
	cc, sc := pair(t, s)
	client, server := upgrade(t, cc, sc)
	open(t, client, server)
	open(t, server, client)
}

func examEitherSideOpens(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	for i := range 3 {
		for _, way := range [][2]tunnel.Carrier{{client, server}, {server, client}} {
			a, b := open(t, way[0], way[1])
			for _, dir := range [][2]tunnel.Stream{{a, b}, {b, a}} {
				want := fmt.Sprint("message ", i)
				if _, err := dir[0].Write([]byte(want)); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(dir[1], got); err != nil || string(got) != want {
					t.Fatalf("read %q, %v; want %q", got, err, want)
				}
			}
			if a.LocalAddr() == nil || a.RemoteAddr() == nil {
				t.Error("a stream has no addresses")
			}
			a.Close()
			b.Close()
		}
	}
}

// noise is n bytes that depend on seed alone.
func noise(seed uint64, n int) []byte {
	p := make([]byte, n)
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	src.Read(p)
	return p
}

// pump writes p in random chunks and ends the direction.
func pump(s tunnel.Stream, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), 1+rand.IntN(64<<10))
		m, err := s.Write(p[:n])
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if m != n {
			return fmt.Errorf("Write took %d of %d bytes without an error", m, n)
		}
		p = p[n:]
	}
	return s.CloseWrite()
}

// sink reads to the end in random chunks and compares.
func sink(s tunnel.Stream, want []byte) error {
	buf := make([]byte, 64<<10)
	for at := 0; ; {
		n, err := s.Read(buf[:1+rand.IntN(len(buf))])
		if at+n > len(want) || !bytes.Equal(buf[:n], want[at:at+n]) {
			return fmt.Errorf("wrong bytes in [%d,%d) of %d", at, at+n, len(want))
		}
		at += n
		if err == io.EOF && at == len(want) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read after %d of %d bytes: %w", at, len(want), err)
		}
	}
}

func examIntegrity(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, b := open(t, client, server)
	up, down := noise(3, 10<<20), noise(4, 10<<20)
	ends := []<-chan error{
		begin(func() error { return pump(a, up) }), begin(func() error { return pump(b, down) }),
		begin(func() error { return sink(b, up) }), begin(func() error { return sink(a, down) }),
	}
	for i, end := range ends {
		select {
		case err := <-end:
			if err != nil {
				t.Fatal(i, err)
			}
		case <-time.After(3 * patience):
			t.Fatalf("10 MiB each way took more than %v", 3*patience)
		}
	}
}

func examHalfClose(t *testing.T, s Setup) {
	for _, first := range []string{"opener", "acceptor"} {
		t.Run(first+" first", func(t *testing.T) {
			client, server := carriers(t, s)
			a, b := open(t, client, server)
			if first == "acceptor" {
				a, b = b, a
			}
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := wait(t, "peer's Read", begin(func() error { return sink(b, nil) })); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Write([]byte("x")); err == nil {
				t.Error("Write after CloseWrite succeeded")
			}
			if s.CloseTimeout > 0 { // the passing of time is what is examined
				time.Sleep(s.CloseTimeout + s.CloseTimeout/2)
			}
			late := noise(5, 600<<10)
			write := begin(func() error { return pump(b, late) })
			if err := wait(t, "Read", begin(func() error { return sink(a, late) })); err != nil {
				t.Error(err)
			}
			if err := wait(t, "Write", write); err != nil {
				t.Error(err)
			}
		})
	}
}

func examCloseDelivers(t *testing.T, s Setup) {
	for _, n := range []int{0, 1, 10 << 10, 1 << 20} {
		t.Run(fmt.Sprint(n, " bytes"), func(t *testing.T) {
			client, server := carriers(t, s)
			a, b := open(t, client, server)
			want := noise(6, n)
			write := begin(func() error {
				if _, err := a.Write(want); err != nil {
					return err
				}
				return a.Close()
			})
			if n <= 10<<10 { // fits the smallest window: the reader comes after Close
				if err := wait(t, "Write and Close", write); err != nil {
					t.Fatal(err)
				}
			}
			if err := wait(t, "Read", begin(func() error { return sink(b, want) })); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("while the peer's bytes are unread", func(t *testing.T) {
		client, server := carriers(t, s)
		a, b := open(t, client, server)
		if _, err := b.Write(noise(7, 1000)); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Write([]byte("last words")); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if err := wait(t, "Read", begin(func() error { return sink(b, []byte("last words")) })); err != nil {
			t.Error(err)
		}
	})
}

func examCloseEndsPeersWrite(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, b := open(t, client, server)
	full := fill(t, b)
	a.Close()
	if err := wait(t, "peer's Write", full); err == nil {
		t.Error("Write to a closed stream succeeded")
	}
}

func examCloseUnblocks(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, b := open(t, client, server)
	read := begin(func() error {
		_, err := a.Read(make([]byte, 1))
		return err
	})
	written := fill(t, a)
	a.Close()
	if err := wait(t, "blocked Read", read); err == nil {
		t.Error("the blocked Read succeeded")
	}
	wait(t, "blocked Write", written)
	for name, err := range map[string]error{
		"Read":  second(a.Read(make([]byte, 1))),
		"Write": second(a.Write(make([]byte, 1))),
	} {
		if err == nil || err == io.EOF && name == "Write" {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	b.Close()
}

func second(_ int, err error) error { return err }

func examAbort(t *testing.T, s Setup) {
	// drain reads until it fails: bytes that have already arrived may be
	// delivered first, but the end must not look like a regular one.
	drain := func(s tunnel.Stream) <-chan error {
		return begin(func() error {
			_, err := io.Copy(io.Discard, s)
			return err
		})
	}
	flood := func(s tunnel.Stream) <-chan error {
		return begin(func() error {
			for chunk := make([]byte, 1000); ; {
				if _, err := s.Write(chunk); err != nil {
					return err
				}
			}
		})
	}
	reason := errors.New("the exam aborts")
	t.Run("idle stream", func(t *testing.T) {
		client, server := carriers(t, s)
		a, b := open(t, client, server)
		read := drain(b)
		a.Abort(reason)
		a.Abort(reason)
		a.Close()
		if err := wait(t, "peer's Read", read); err == nil {
			t.Error("the peer's Read saw a regular end")
		}
		if err := wait(t, "peer's Write", flood(b)); err == nil {
			t.Error("the peer's Write succeeded")
		}
		if second(a.Read(make([]byte, 1))) == nil || second(a.Write(make([]byte, 1))) == nil {
			t.Error("an aborted stream still works at its own end")
		}
	})
	t.Run("full window, aborted by the writer", func(t *testing.T) {
		client, server := carriers(t, s)
		a, b := open(t, client, server)
		full := fill(t, a)
		a.Abort(reason)
		if err := wait(t, "own blocked Write", full); err == nil {
			t.Error("the blocked Write succeeded")
		}
		if err := wait(t, "peer's Write", flood(b)); err == nil {
			t.Error("the peer's Write succeeded")
		}
		if err := wait(t, "peer's Read", drain(b)); err == nil {
			t.Error("the peer's Read saw a regular end")
		}
	})
	t.Run("full window, aborted by the one who does not read", func(t *testing.T) {
		client, server := carriers(t, s)
		a, b := open(t, client, server)
		full := fill(t, a)
		b.Abort(reason)
		if err := wait(t, "peer's blocked Write", full); err == nil {
			t.Error("the peer's blocked Write succeeded")
		}
		if err := wait(t, "peer's Read", drain(a)); err == nil {
			t.Error("the peer's Read saw a regular end")
		}
	})
	t.Run("both windows full", func(t *testing.T) {
		client, server := carriers(t, s)
		a, b := open(t, client, server)
		mine, theirs := fill(t, a), fill(t, b)
		b.Abort(reason)
		if wait(t, "own blocked Write", theirs) == nil || wait(t, "peer's blocked Write", mine) == nil {
			t.Error("a blocked Write succeeded")
		}
	})
	t.Run("after close", func(t *testing.T) {
		client, server := carriers(t, s)
		a, b := open(t, client, server)
		a.Close()
		a.Abort(reason) // must not panic; what the peer sees is not promised
		b.Abort(reason)
		open(t, client, server)
	})
	t.Run("others live on", func(t *testing.T) {
		client, server := carriers(t, s)
		a, _ := open(t, client, server)
		c, d := open(t, client, server)
		fill(t, a)
		a.Abort(reason)
		want := noise(8, 300<<10)
		write := begin(func() error { return pump(c, want) })
		if err := wait(t, "Read", begin(func() error { return sink(d, want) })); err != nil {
			t.Error(err)
		}
		if err := wait(t, "Write", write); err != nil {
			t.Error(err)
		}
	})
}

func examReadDeadline(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, b := open(t, client, server)
	for name, set := range map[string]func(time.Time) error{"SetReadDeadline": a.SetReadDeadline, "SetDeadline": a.SetDeadline} {
		set(time.Now().Add(-time.Second))
		if _, err := a.Read(make([]byte, 1)); !isTimeout(err) {
			t.Errorf("%s in the past: %v", name, err)
		}
		set(time.Time{})
		read := begin(func() error {
			_, err := a.Read(make([]byte, 1))
			return err
		})
		set(time.Now().Add(30 * time.Millisecond)) // while Read waits, or before: both must end it
		if err := wait(t, "Read", read); !isTimeout(err) {
			t.Errorf("%s: %v", name, err)
		}
		set(time.Time{})
		if _, err := b.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := wait(t, "Read after a deadline", begin(func() error {
			_, err := io.ReadFull(a, make([]byte, 1))
			return err
		})); err != nil {
			t.Errorf("%s: the stream did not survive: %v", name, err)
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) && errors.As(err, &n) && n.Timeout()
}

func examWriteDeadline(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, b := open(t, client, server)
	want := noise(9, 24<<20) // more than a carrier takes for a reader that does not read
	var taken atomic.Int64
	timedOut := make(chan error, 1)
	write := begin(func() error {
		seen := false
		for p := want; len(p) > 0; {
			n, err := a.Write(p[:min(len(p), 100_000)])
			taken.Add(int64(n))
			if p = p[n:]; err != nil {
				if seen {
					return err
				}
				seen = true
				timedOut <- err
				a.SetWriteDeadline(time.Time{})
				want = want[:min(len(want), int(taken.Load())+100_000)] // enough: write a little more
				p = want[taken.Load():]
			}
		}
		return a.CloseWrite()
	})
	blocked(t, &taken, write)
	a.SetWriteDeadline(time.Now().Add(30 * time.Millisecond))
	if err := wait(t, "Write", timedOut); !isTimeout(err) {
		t.Fatalf("Write past its deadline: %v", err)
	}
	read := begin(func() error {
		n, err := io.Copy(&compare{want: noise(9, 24<<20)}, b)
		if err == nil && n != taken.Load() {
			err = fmt.Errorf("%d bytes arrived; Write said it took %d", n, taken.Load())
		}
		return err
	})
	if err := wait(t, "Write after a deadline", write); err != nil {
		t.Error(err)
	}
	if err := wait(t, "Read", read); err != nil {
		t.Error(err)
	}
}

// compare is a Writer that fails on the first byte that differs.
type compare struct {
	want []byte
}

func (c *compare) Write(p []byte) (int, error) {
	if len(p) > len(c.want) || !bytes.Equal(p, c.want[:len(p)]) {
		return 0, errors.New("a byte was lost, repeated or changed")
	}
	c.want = c.want[len(p):]
	return len(p), nil
}

func examStreamCloseTwice(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, b := open(t, client, server)
	for _, st := range []tunnel.Stream{a, b, a, b} {
		st.Close()
		st.CloseWrite()
	}
	open(t, client, server)
}

func examContext(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	gone, cancel := context.WithCancel(t.Context())
	accept := begin(func() error {
		_, err := server.AcceptStream(gone)
		return err
	})
	cancel()
	if err := wait(t, "AcceptStream", accept); !errors.Is(err, context.Canceled) {
		t.Errorf("AcceptStream: %v", err)
	}
	if _, err := client.OpenStream(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("OpenStream: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := client.AcceptStream(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("AcceptStream: %v", err)
	}
	// A context that ends later has no effect on the stream it made.
	made, cancel := context.WithCancel(t.Context())
	a, err := client.OpenStream(made)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := a.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	b, err := server.AcceptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
		t.Error("a stream whose context has ended:", err)
	}
}

// echo answers every stream with what it says, until the carrier ends.
func echo(c tunnel.Carrier) {
	for {
		s, err := c.AcceptStream(context.Background())
		if err != nil {
			return
		}
		go func() {
			io.Copy(s, s)
			s.Close()
		}()
	}
}

func examManyStreams(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	go echo(server)
	const streams = 200
	var open, done sync.WaitGroup
	open.Add(streams)
	errs := make(chan error, streams)
	for i := range streams {
		done.Go(func() {
			st, err := client.OpenStream(t.Context())
			open.Done()
			if err != nil {
				errs <- err
				return
			}
			defer st.Close()
			want := noise(uint64(1000+i), 3000)
			if _, err := st.Write(want[:1]); err != nil {
				errs <- err
				return
			}
			open.Wait() // all of them are open at the same time
			if err := pump(st, want[1:]); err != nil {
				errs <- err
				return
			}
			errs <- sink(st, want)
		})
	}
	for range streams {
		if err := wait(t, "a stream of many", errs); err != nil {
			t.Fatal(err)
		}
	}
	done.Wait()
}

func examSlowReader(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	a, _ := open(t, client, server)
	fill(t, a)
	want := noise(10, 2<<20)
	for _, way := range [][2]tunnel.Carrier{{client, server}, {server, client}} {
		c, d := open(t, way[0], way[1])
		write := begin(func() error { return pump(c, want) })
		if err := wait(t, "Read", begin(func() error { return sink(d, want) })); err != nil {
			t.Error(err)
		}
		if err := wait(t, "Write", write); err != nil {
			t.Error(err)
		}
	}
}

func examChurn(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	go echo(server)
	for i := range 300 {
		st, err := client.OpenStream(t.Context())
		if err != nil {
			t.Fatal(i, err)
		}
		switch i % 4 {
		case 0: // never used
			st.Close()
		case 1: // given up at once
			st.Write([]byte("x"))
			st.Abort(errors.New("the exam changes its mind"))
		case 2: // closed before the answer
			st.Write([]byte("x"))
			st.Close()
		default:
			if err := pump(st, []byte("x")); err != nil {
				t.Fatal(i, err)
			}
			if err := wait(t, "echo", begin(func() error { return sink(st, []byte("x")) })); err != nil {
				t.Fatal(i, err)
			}
			st.Close()
		}
	}
}

func examCarrierClose(t *testing.T, s Setup) {
	for _, closes := range []string{"client", "server"} {
		t.Run(closes, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			near, far := carriers(t, s)
			if closes == "server" {
				near, far = far, near
			}
			a, b := open(t, near, far)
			c, d := open(t, far, near)
			pending := map[string]<-chan error{"peer's blocked Write": fill(t, c), "own blocked Write": fill(t, a)}
			for name, st := range map[string]tunnel.Stream{"own Read": a, "peer's Read": c} {
				pending[name] = begin(func() error {
					_, err := st.Read(make([]byte, 1))
					return err
				})
			}
			for name, end := range map[string]tunnel.Carrier{"own AcceptStream": near, "peer's AcceptStream": far} {
				pending[name] = begin(func() error {
					_, err := end.AcceptStream(context.Background())
					return err
				})
			}
			select {
			case <-near.Done():
				t.Fatal("Done is closed before Close")
			default:
			}
			reason := errors.New("the exam is over")
			if err := wait(t, "Close", begin(func() error { return near.Close(reason) })); err != nil {
				t.Error("Close:", err)
			}
			for name, end := range pending {
				if err := wait(t, name, end); err == nil {
					t.Errorf("%s succeeded", name)
				}
			}
			for name, end := range map[string]tunnel.Carrier{"closed": near, "other": far} {
				select {
				case <-end.Done():
				case <-time.After(patience):
					t.Fatalf("the %s end's Done stays open", name)
				}
				if end.Err() == nil {
					t.Errorf("the %s end's Err is nil", name)
				}
				if _, err := end.OpenStream(t.Context()); err == nil {
					t.Errorf("OpenStream at the %s end succeeded", name)
				}
			}
			if !errors.Is(near.Err(), reason) {
				t.Errorf("Err is %v; want the reason that Close was given", near.Err())
			}
			if second(b.Write([]byte("x"))) == nil || second(d.Write([]byte("x"))) == nil {
				t.Error("a stream outlived its carrier")
			}
			far.Close(nil)
			near.Close(nil) // again
			nothingRuns(t, before)
		})
	}
}

// nothingRuns waits until only the goroutines in before are left.
func nothingRuns(t *testing.T, before goleak.Option) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if err = goleak.Find(before); err == nil {
			return
		}
	}
	t.Error(err)
}

func examStats(t *testing.T, s Setup) {
	client, server := carriers(t, s)
	c, d := client.Stats(), server.Stats()
	if c.Kind != d.Kind || (c.Kind != "quic" && c.Kind != "tls") {
		t.Errorf("kinds are %q and %q", c.Kind, d.Kind)
	}
	if !c.Remote.IsValid() || !d.Remote.IsValid() || !d.Local.IsValid() {
		t.Errorf("ends are missing: client %+v, server %+v", c, d)
	}
}
