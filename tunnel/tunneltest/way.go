package tunneltest

import (
	"slices"
	"sync"
	"time"

	"culvert/tunnel"
)

// A Fate is what happens to one datagram on its way.
type Fate struct {
	Drop  bool          // it is lost, and counted by nobody, as on a network
	Extra int           // how many further copies arrive
	Delay time.Duration // how much later it arrives; others may overtake it
}

// A parcel is a datagram that waits to be received. It takes one of the
// places that Config.Queue gives unless it is delayed: then it is in the network.
type parcel struct {
	due     time.Time
	delayed bool
	p       []byte
}

// A way is one end's datagrams. What it sends waits in the peer's inbox.
type way struct {
	net    *Net
	client bool
	name   string
	fate   func(fromClient bool, p []byte) Fate // may be nil
	max    int
	peer   *way

	mu       *sync.Mutex // shared with peer; guards what follows
	inbox    []parcel    // sent by the peer, not yet received here
	want     bool        // a Send has returned ErrBlocked since the last writable
	writable func()
	err      error         // why the way has ended
	done     chan struct{} // closed when run has returned; nil before Start

	arrived chan struct{} // 1 slot: inbox has grown
	stop    chan struct{} // closed when the way ends
}

func newWays(n *Net, name string, fate func(bool, []byte) Fate, max int) (client, server *way) {
	mu := new(sync.Mutex)
	make1 := func(client bool) *way {
		return &way{net: n, client: client, name: name, fate: fate, max: max, mu: mu,
			arrived: make(chan struct{}, 1), stop: make(chan struct{})}
	}
	client, server = make1(true), make1(false)
	client.peer, server.peer = server, client
	return client, server
}

func (w *way) Start(recv func([]byte), writable func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	w.writable = writable
	w.done = make(chan struct{})
	go w.run(recv, w.done)
}

func (w *way) run(recv func([]byte), done chan struct{}) {
	defer close(done)
	for {
		p, next := w.take()
		if p != nil {
			w.peer.unblock()
			recv(p)
			continue
		}
		var due <-chan time.Time
		if !next.IsZero() {
			due = time.After(time.Until(next))
		}
		select {
		case <-w.arrived:
		case <-due:
		case <-w.stop:
			return
		}
	}
}

// take returns the first datagram that is due, or when the next one will be.
func (w *way) take() (p []byte, next time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, time.Time{}
	}
	now := time.Now()
	for i, c := range w.inbox {
		if !c.due.After(now) {
			w.inbox = slices.Delete(w.inbox, i, i+1)
			return c.p, time.Time{}
		}
		if next.IsZero() || c.due.Before(next) {
			next = c.due
		}
	}
	return nil, next
}

func (w *way) Send(p []byte) error {
	if len(p) > w.Max() {
		return tunnel.ErrTooLarge
	}
	var fate Fate
	if w.fate != nil {
		fate = w.fate(w.client, p)
	}
	blocked := w.net.datagramsBlocked()
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
		return w.err
	case blocked || w.peer.waitingLocked() >= w.net.cfg.Queue:
		w.want = true
		return tunnel.ErrBlocked
	case fate.Drop:
		return nil
	}
	for range 1 + fate.Extra {
		// The copy is never nil, also where p is empty.
		w.peer.inbox = append(w.peer.inbox, parcel{time.Now().Add(fate.Delay), fate.Delay > 0, append([]byte{}, p...)})
	}
	select {
	case w.peer.arrived <- struct{}{}:
	default:
	}
	return nil
}

func (w *way) waitingLocked() (n int) {
	for _, c := range w.inbox {
		if !c.delayed {
			n++
		}
	}
	return n
}

// unblock calls writable if a Send was refused and could now succeed.
func (w *way) unblock() {
	if w.net.datagramsBlocked() {
		return
	}
	w.mu.Lock()
	call := w.writable
	if !w.want || w.err != nil || w.peer.waitingLocked() >= w.net.cfg.Queue {
		call = nil
	} else {
		w.want = false
	}
	w.mu.Unlock()
	if call != nil {
		call()
	}
}

// end ends the way; Send then returns err.
func (w *way) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
		w.inbox = nil
		close(w.stop)
	}
}

// wait returns when nothing of the way runs any more. It follows end.
func (w *way) wait() {
	w.mu.Lock()
	done := w.done
	w.mu.Unlock()
	if done != nil {
		<-done
	}
}

func (w *way) Max() int                { return w.max }
func (w *way) Name() string            { return w.name }
func (w *way) Lost() map[string]uint64 { return nil }
