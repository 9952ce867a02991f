//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// What a turn and a round are bounded by.
const (
	pollEvents = 64
	pollBatch  = 8   // datagrams of one socket before it is the next one's turn
	pollStream = 512 // bytes of a stream, of which little is expected
)

// When a loop gives way; see keep.
const (
	keepEvery = 4 * time.Millisecond   // less than the 10 ms of the runtime's monitor
	crowded   = 200 * time.Microsecond // others who waited took so long
	keepPause = 100 * time.Millisecond // after that
)

// A Poller reads many sockets on few goroutines: one for each two processors,
// from the first socket on. The zero value is ready. Its methods may be called
// concurrently.
//
// Its sockets are not in the runtime's own poller, and its goroutines wait in
// epoll_wait themselves. That takes less than half of the CPU time for a packet
// that wakes us: no thread has to look for work, and none is woken to help.
// (Measured at 2,000 datagrams a second over 10 sockets, each answered: 22 µs,
// where a goroutine for each socket takes 50, and one that waits for the epoll
// descriptor in the runtime's poller 52.) With one processor it is the other way
// round: the runtime has no thread to wake, and would miss its only processor.
type Poller struct {
	// MaxAge is how long ago the kernel may have received a datagram; older ones
	// are dropped. 0: any. It is set before the first socket is taken.
	MaxAge time.Duration
	late   atomic.Uint64

	mu     sync.Mutex
	closed bool
	next   int
	loops  []*loop
	wg     sync.WaitGroup
}

// loop is one goroutine with its epoll descriptor.
type loop struct {
	poller *Poller
	epoll  int
	wake   int // an eventfd: written to once, when the poller closes
	batch  *Batch
	bytes  [pollStream]byte

	events []unix.EpollEvent
	n      int             // of them, filled in
	file   *os.File        // epoll, where the runtime's poller waits for it; else nil
	raw    syscall.RawConn // of file
	look   func(fd uintptr) bool

	mu      sync.Mutex
	ended   bool
	sockets []*Socket // by descriptor
}

// A Socket is one that a Poller reads. Send and the like are for datagrams.
type Socket struct {
	Sender
	loop   *loop
	fd     int
	r      Reader
	whole  TransparentReader // r, where it is one
	stream bool
	closed atomic.Bool
	users  atomic.Int32 // of fd, its being open counted; the last one closes it
}

// Packet takes over a socket that is not connected; conn is not to be used any
// more, also when it fails. Reading begins with Start. For a TransparentReader
// the socket must have been made with Transparent.
func (p *Poller) Packet(conn *net.UDPConn, r Reader) (*Socket, error) {
	sender, err := NewSender(conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	whole, _ := r.(TransparentReader)
	s, err := p.take(conn, &Socket{r: r, whole: whole, Sender: Sender{v6: sender.v6}})
	if err == nil && p.MaxAge > 0 {
		if err = Stamp(uintptr(s.fd)); err != nil {
			s.Close()
			return nil, err
		}
	}
	return s, err
}

// Late is how many datagrams were dropped for their age.
func (p *Poller) Late() uint64 { return p.late.Load() }

// Stream takes over a connection; conn is not to be used any more, also when it
// fails. Reading begins with Start.
func (p *Poller) Stream(conn *net.TCPConn, r Reader) (*Socket, error) {
	return p.take(conn, &Socket{r: r, stream: true})
}

func (p *Poller) take(conn interface {
	syscall.Conn
	Close() error
}, s *Socket) (*Socket, error) {
	// The runtime's poller knows the descriptor of conn, and would be woken too.
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		s.fd, failed = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, os.NewSyscallError("fcntl", failed)
	}
	s.raw = s
	s.users.Store(1)
	if s.loop, err = p.loop(); err != nil {
		unix.Close(s.fd)
		return nil, err
	}
	return s, nil
}

// loop returns the loop whose turn it is to get a socket.
func (p *Poller) loop() (*loop, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, net.ErrClosed
	}
	if p.loops == nil {
		p.loops = make([]*loop, max(runtime.GOMAXPROCS(0)/2, 1))
	}
	i := p.next % len(p.loops)
	p.next++
	if p.loops[i] == nil {
		l, err := newLoop(p)
		if err != nil {
			return nil, err
		}
		p.loops[i] = l
		p.wg.Go(l.run)
	}
	return p.loops[i], nil
}

// Close ends all reading and waits for that. Sockets that are still open have
// to be closed as well. It must not be called by a Reader.
func (p *Poller) Close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		for _, l := range p.loops {
			if l != nil {
				unix.Write(l.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
			}
		}
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func newLoop(p *Poller) (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epoll)
		return nil, os.NewSyscallError("eventfd", err)
	}
	l := &loop{poller: p, epoll: epoll, wake: wake, batch: NewBatch(pollBatch, 1<<16), events: make([]unix.EpollEvent, pollEvents)}
	err = os.NewSyscallError("epoll_ctl",
		unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}))
	if err == nil && runtime.GOMAXPROCS(0) == 1 {
		unix.SetNonblock(epoll, true) // or os would not ask the runtime's poller
		l.file = os.NewFile(uintptr(epoll), "epoll")
		l.raw, err = l.file.SyscallConn()
		l.look = func(uintptr) bool { return l.poll(0) != 0 }
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *loop) close() {
	if l.file != nil {
		l.file.Close()
	} else {
		unix.Close(l.epoll)
	}
	unix.Close(l.wake)
}

// add makes the loop read a socket, level-triggered: what one turn leaves is
// reported again.
func (l *loop) add(s *Socket) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || s.closed.Load() { // remove, which follows, has the lock after us or has had it
		return net.ErrClosed
	}
	for len(l.sockets) <= s.fd {
		l.sockets = append(l.sockets, nil)
	}
	l.sockets[s.fd] = s
	err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, s.fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP, Fd: int32(s.fd)})
	if err != nil {
		l.sockets[s.fd] = nil
	}
	return os.NewSyscallError("epoll_ctl", err)
}

// remove is for a socket whose descriptor is still open.
func (l *loop) remove(s *Socket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended && s.fd < len(l.sockets) && l.sockets[s.fd] == s {
		l.sockets[s.fd] = nil
		unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, s.fd, nil)
	}
}

func (l *loop) run() {
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.ended = true
		l.close()
	}()
	var yield time.Time
	for {
		if l.raw != nil {
			l.raw.Read(l.look)
		} else {
			yield = keep(yield)
			l.poll(-1)
		}
		for _, e := range l.events[:l.n] {
			if int(e.Fd) == l.wake {
				return
			}
			// An event may be older than the socket that has its descriptor by now:
			// a socket that has nothing is nothing unusual.
			l.mu.Lock()
			s := l.sockets[e.Fd]
			l.mu.Unlock()
			if s != nil && s.acquire() {
				l.serve(s, e.Events)
				s.release()
			}
		}
	}
}

// poll fills events; a timeout below 0 waits.
func (l *loop) poll(timeout int) int {
	n, err := unix.EpollWait(l.epoll, l.events, timeout)
	if err != nil && err != unix.EINTR {
		panic(os.NewSyscallError("epoll_wait", err)) // the descriptor is ours alone
	}
	l.n = max(n, 0)
	return l.n
}

// keep lets others run now and then, and returns when it is to do so again.
//
// It is for what the runtime's monitor does with a goroutine that it has not
// seen give way for 10 ms: it takes the processor (a P) from it 20 µs into each
// system call, and has to be woken when the call returns, which costs more than
// the rest together. One that gives way keeps its processor. That is right only
// while there is nobody to use it.
func keep(next time.Time) time.Time {
	now := time.Now()
	if now.Before(next) {
		return next
	}
	runtime.Gosched()
	if then := time.Now(); then.Sub(now) > crowded {
		return then.Add(keepPause)
	}
	return now.Add(keepEvery)
}

// serve gives a socket its turn.
func (l *loop) serve(s *Socket, events uint32) {
	if s.stream {
		n, _, err := unix.Recvfrom(s.fd, l.bytes[:], unix.MSG_DONTWAIT)
		switch {
		case n > 0:
			s.r.Take(l.bytes[:n], netip.AddrPort{})
			s.r.Flush()
		case err != unix.EAGAIN && err != unix.EINTR:
			l.remove(s)
			s.r.Failed()
		}
		return
	}
	if events&unix.EPOLLERR != 0 {
		s.r.Failed()
	}
	n, err := l.batch.TryRead(uintptr(s.fd))
	if err != nil {
		if err != tunnel.ErrBlocked && events&unix.EPOLLERR == 0 {
			s.r.Failed()
		}
		return
	}
	for i := range n {
		if s.closed.Load() {
			return
		}
		d := l.batch.At(i)
		// Asked of each: the process may stand still in the middle of a batch.
		if age := l.poller.MaxAge; age > 0 && Before(d.OOB, Oldest(age)) {
			l.poller.late.Add(1)
			continue
		}
		if s.whole != nil {
			s.whole.TakeFor(d.P, d.From, SentTo(d.OOB))
			continue
		}
		s.r.Take(d.P, d.From)
	}
	s.r.Flush()
}

// Start begins to read. It is called once.
func (s *Socket) Start() error {
	if !s.acquire() {
		return net.ErrClosed
	}
	defer s.release()
	return s.loop.add(s)
}

func (s *Socket) acquire() bool {
	for {
		n := s.users.Load()
		if n == 0 || s.closed.Load() {
			return false
		}
		if s.users.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (s *Socket) release() {
	if s.users.Add(-1) == 0 {
		unix.Close(s.fd)
	}
}

// Control calls f with the descriptor, which stays open until f returns. A
// closed socket is net.ErrClosed.
func (s *Socket) Control(f func(fd uintptr)) error {
	if !s.acquire() {
		return net.ErrClosed
	}
	defer s.release()
	f(uintptr(s.fd))
	return nil
}

// Close ends the socket. It never waits and may be called by its Reader, which
// is called no more except for a batch that has begun.
func (s *Socket) Close() error {
	if !s.closed.CompareAndSwap(false, true) {
		return net.ErrClosed
	}
	s.loop.remove(s)
	s.release()
	return nil
}

// Reset closes a stream with RST.
func (s *Socket) Reset() error {
	s.Control(func(fd uintptr) {
		unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	})
	return s.Close()
}
