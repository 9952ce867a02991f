package sidecar

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"culvert/sidecar/channel"
	"culvert/tunnel"
)

const (
	switchStartTimeout = 30 * time.Second
	switchHoldFor      = 5 * time.Second
	// switchPoll is how soon a waiting stop notices that a channel has ended by
	// silence alone, of which nobody tells.
	switchPoll = 250 * time.Millisecond
	// switchChanges is how many changes of the link are remembered.
	switchChanges = 32
	// switchBacklog is how many events wait for one slow subscriber.
	switchBacklog = 64
)

// SwitchState is where the switch stands.
type SwitchState string

// The states.
const (
	Stopped  SwitchState = "stopped"
	Starting SwitchState = "starting"
	Running  SwitchState = "running"
	Stopping SwitchState = "stopping"
	Failed   SwitchState = "failed"
)

// SwitchConfig is what a Switch is made of.
type SwitchConfig struct {
	// Link is run from start to stop. The Switch is its only runner.
	Link tunnel.Link
	// Through is where traffic goes while Running: stages before the link, or
	// nil for the link itself.
	Through tunnel.Opener
	// Direct takes traffic while Stopped. Nil refuses it with ProxyStopped. It
	// is never used in Failed: a tunnel that broke must not leak.
	Direct tunnel.Opener
	// Channels returns the live and quiet channels. Nil: there are none.
	Channels func() []channel.Channel
	// Reconnecting is told true when the tunnel is lost while Running and false
	// when that has ended, in order; it must not block. Nil: nobody is.
	Reconnecting func(bool)
	// Mode is used by a start that names none; empty is auto.
	Mode tunnel.Mode
	// StartTimeout bounds Start; 0 is 30 s.
	StartTimeout time.Duration
	// HoldFor is how long a request waits for the tunnel; 0 is 5 s.
	HoldFor time.Duration
	// Log may be nil.
	Log *slog.Logger
}

// A Switch starts and stops the proxy. It is a stage of the path, so it sees
// every stream and association, and refuses to break a channel.
//
//	                 ┌──────────── lost: reconnecting, still Running
//	                 ▼          │
//	Stopped ─start─► Starting ─tunnel up─► Running ─stop─► Stopping ─► Stopped
//	   ▲  ▲            │   │                  │               ▲
//	   │  └─stop─┐     │   └───────stop───────┼───────────────┘
//	   │         │     ▼ refused: code        ▼ the link gave up
//	   │        Failed ◄──────────────────────┘
//	   │         │  ▲
//	   │         └──┴── start ─► Starting, always
//
// A stop first closes a gate for new requests, then looks at the channels:
// whatever was admitted before is seen. A request that meets the gate of a stop
// that does not wait is held until that stop is decided, and one that meets
// the gate of a stop that waits is refused.
type Switch struct {
	cfg SwitchConfig
	log *slog.Logger

	heldDrops atomic.Uint64
	ready     chan struct{}  // closed by Run
	wg        sync.WaitGroup // the link's goroutine and held associations; added to under mu

	mu      sync.Mutex // guards what follows; nothing is called while it is held
	began   bool
	over    bool
	state   SwitchState
	since   time.Time
	mode    tunnel.Mode
	cause   error // why Failed; the last failure while Starting or reconnecting
	link    tunnel.LinkState
	changes []tunnel.Change // of the link, the last switchChanges
	run     *switchRun      // from Starting to Stopping
	checks  int             // operations that are looking at the channels: requests wait
	drains  int             // stops that wait for channels to end: requests are refused
	opens   map[*switchOpen]struct{}
	changed chan struct{} // closed and replaced at every change
	subs    map[chan Event]struct{}
}

// switchRun is one run of the link.
type switchRun struct {
	cancel context.CancelFunc
	up     chan struct{} // closed when it is up for the first time
	no     chan struct{} // closed when it has been refused for the first time
	done   chan struct{} // closed when it has ended and the state says so
	refuse sync.Once     // closes no
	keep   bool          // guarded by Switch.mu
	failed error         // a start that took too long; guarded by Switch.mu
	lost   bool          // used by the link's goroutine only
}

// switchOpen is a stream or an association, from its request to its end.
type switchOpen struct {
	packets bool
	cancel  context.CancelCauseFunc // ends a wait or a dial
	// Guarded by Switch.mu:
	ended  error
	finish func(error) // ends what was opened; nil before
}

// StartOptions say how to start.
type StartOptions struct {
	Mode tunnel.Mode // empty: the configured one
	// Keep lets the link go on trying when Start returns for lack of time.
	Keep bool
}

// StopOptions say how to stop. The zero value stops only if no app is in a channel.
type StopOptions struct {
	Wait  time.Duration // how long to wait for channels to end
	Force bool          // stop in spite of channels
}

// Event is one change of the switch, the link or a channel.
type Event struct {
	At     time.Time         `json:"at"`
	Kind   string            `json:"kind"`           // "switch", "link", "channel" or "change"
	Name   string            `json:"name,omitempty"` // the channel's, or what changed
	From   string            `json:"from,omitempty"`
	To     string            `json:"to,omitempty"`
	Code   tunnel.Code       `json:"code,omitempty"`
	Cause  string            `json:"cause,omitempty"` // one sentence
	Link   *tunnel.LinkState `json:"link,omitempty"`
	Change *tunnel.Change    `json:"change,omitempty"`
}

// SwitchStatus describes the switch at one moment.
type SwitchStatus struct {
	State        SwitchState
	Since        time.Time
	Mode         tunnel.Mode
	Code         tunnel.Code // of Cause
	Cause        string      // why Failed, or the last failure while connecting
	Draining     bool        // a stop waits for channels to end
	Link         tunnel.LinkState
	Changes      []tunnel.Change // of the link, the last ones, oldest first
	Streams      int             // open through the switch, or being opened
	Associations int             // open through the switch, or held
	HeldDrops    uint64          // datagrams that came before there was a tunnel
}

// ChannelActiveError refuses a start or stop. Its code is ChannelActive.
type ChannelActiveError struct {
	Channels []channel.Channel
	cause    *tunnel.Error
}

// Error names the channels.
func (e *ChannelActiveError) Error() string { return e.cause.Error() }

// Unwrap returns an error with the code.
func (e *ChannelActiveError) Unwrap() error { return e.cause }

func switchActive(list []channel.Channel, hint string) error {
	names := make([]string, len(list))
	for i, c := range list {
		names[i] = c.Name
		if c.App != "" && !strings.Contains(c.Name, c.App) {
			names[i] += " of " + c.App
		}
		names[i] += " (" + c.State
		if n := len(c.Evidence); n > 0 {
			names[i] += ": " + c.Evidence[0]
			if n > 1 {
				names[i] += fmt.Sprintf(", and %d more", n-1)
			}
		}
		names[i] += ")"
	}
	return &ChannelActiveError{list, tunnel.Errorf(tunnel.ChannelActive, "an app is in a channel: %s; %s", strings.Join(names, ", "), hint)}
}

const (
	switchHintStop  = "leave the channel first, wait for its end with --wait, or break it with --force"
	switchHintStart = "leave the channel first, then start"
)

// NewSwitch checks the configuration. Errors have the code ConfigInvalid and
// name the field.
func NewSwitch(c SwitchConfig) (*Switch, error) {
	if c.Link == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Link is missing")
	}
	mode, err := tunnel.ParseMode(string(c.Mode))
	if err != nil {
		return nil, err
	}
	if c.StartTimeout < 0 || c.HoldFor < 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "StartTimeout and HoldFor can not be negative")
	}
	c.Mode = mode
	if c.Through == nil {
		c.Through = c.Link
	}
	if c.Channels == nil {
		c.Channels = func() []channel.Channel { return nil }
	}
	if c.Reconnecting == nil {
		c.Reconnecting = func(bool) {}
	}
	c.StartTimeout = cmp.Or(c.StartTimeout, switchStartTimeout)
	c.HoldFor = cmp.Or(c.HoldFor, switchHoldFor)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Switch{
		cfg: c, log: c.Log, ready: make(chan struct{}),
		state: Stopped, since: time.Now(), mode: mode,
		opens: map[*switchOpen]struct{}{}, changed: make(chan struct{}), subs: map[chan Event]struct{}{},
	}, nil
}

// Run lets the switch be started until ctx ends. It then stops the link,
// whoever is in a channel, ends everything that is open and returns nil. It can
// be called once.
func (s *Switch) Run(ctx context.Context) error {
	s.mu.Lock()
	if s.began {
		s.mu.Unlock()
		return tunnel.Errorf(tunnel.Internal, "the switch runs already")
	}
	s.began = true
	s.mu.Unlock()
	events, cancel := s.Subscribe()
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		var link tunnel.LinkState
		for e := range events {
			attrs := switchLogged(e, link)
			if e.Link != nil {
				link = *e.Link
			}
			if attrs != nil {
				if e.Kind == "switch" || e.Kind == "link" || e.Kind == "channel" {
					attrs = append(attrs, "audit", e.Kind)
				}
				s.log.Info(e.Kind, attrs...)
			}
		}
	}()
	close(s.ready)
	<-ctx.Done()
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	_, err := s.Stop(context.WithoutCancel(ctx), StopOptions{Force: true})
	s.mu.Lock()
	all := s.takeLocked(switchStopped())
	s.mu.Unlock()
	switchEnd(all)
	s.wg.Wait()
	cancel()
	<-logged
	return err
}

// switchLogged returns the attributes of an event's line, without empty ones,
// or nil where only figures of the link have changed since was, or the way, of
// which another event tells.
func switchLogged(e Event, was tunnel.LinkState) []any {
	var attrs []any
	add := func(name, value string) {
		if value != "" {
			attrs = append(attrs, name, value)
		}
	}
	if e.Kind == "link" && e.From == e.To && e.Link != nil {
		l := *e.Link
		told := was.Way != "" && l.Way != was.Way && l.Session == was.Session
		if told || l.WayWhy == was.WayWhy && l.Streams == was.Streams && l.Session == was.Session && l.Remote == was.Remote && l.Code == was.Code && l.Why == was.Why {
			return nil
		}
		add("phase", e.To)
		for _, c := range []struct{ name, was, is string }{
			{"way_why", was.WayWhy, l.WayWhy}, {"streams", was.Streams, l.Streams},
			{"session", was.Session, l.Session}, {"cloud_proxy", switchRemote(was), switchRemote(l)},
		} {
			if c.was != c.is {
				add(c.name, cmp.Or(c.is, "none"))
			}
		}
	} else {
		add("name", e.Name)
		add("from", e.From)
		add("to", e.To)
	}
	add("code", string(e.Code))
	add("cause", e.Cause)
	if e.Change != nil {
		add("cost", e.Change.Cost())
	}
	return attrs
}

func switchRemote(l tunnel.LinkState) string {
	if !l.Remote.IsValid() {
		return ""
	}
	return l.Remote.String()
}

// Start starts the proxy and returns when it is Running, or with the reason why
// it is not: ChannelActive, a refusal at once, or its last failure once
// StartTimeout has passed or ctx has ended. already says that it was Running.
// It waits for Run to have been called.
func (s *Switch) Start(ctx context.Context, o StartOptions) (already bool, err error) {
	if o.Mode != "" {
		if o.Mode, err = tunnel.ParseMode(string(o.Mode)); err != nil {
			return false, err
		}
	}
	select {
	case <-s.ready:
	case <-ctx.Done():
		return false, ctx.Err()
	}
	r, already, err := s.begin(ctx, o)
	if r == nil {
		return already, err
	}
	timer := time.NewTimer(s.cfg.StartTimeout)
	defer timer.Stop()
	select {
	case <-r.up:
		return false, nil
	case <-r.done:
	case <-r.no:
		err = s.giveUp(r, nil)
	case <-timer.C:
		err = s.giveUp(r, tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy did not answer within %s; check its address and that port 443 is open", s.cfg.StartTimeout))
	case <-ctx.Done():
		err = s.giveUp(r, tunnel.Errorf(tunnel.CodeOf(context.Cause(ctx)), "the start was abandoned before the tunnel was up"))
	}
	if err != nil {
		return false, err
	}
	// Up and then ended, or up in the moment in which time was up: it did start.
	select {
	case <-r.up:
		return false, nil
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == Failed {
		return false, s.cause
	}
	return false, switchStopped()
}

// begin makes a run, or joins the one that is starting.
func (s *Switch) begin(ctx context.Context, o StartOptions) (r *switchRun, already bool, err error) {
	s.mu.Lock()
	for {
		switch {
		case s.over:
			s.mu.Unlock()
			return nil, false, tunnel.Errorf(tunnel.ProxyStopped, "this sidecar is about to end; start it again with 'culvert run'")
		case s.state == Stopping:
			done := s.run.done
			s.mu.Unlock()
			select {
			case <-done:
			case <-ctx.Done():
				return nil, false, ctx.Err()
			}
			s.mu.Lock()
			continue
		case s.state == Running || s.state == Starting:
			defer s.mu.Unlock()
			if o.Mode != "" && o.Mode != s.mode {
				return nil, false, tunnel.Errorf(tunnel.NotPermitted, "the proxy is %s in mode %s; stop it first, then start it in mode %s", s.state, s.mode, o.Mode)
			}
			if s.state == Running {
				return nil, true, nil
			}
			s.run.keep = s.run.keep || o.Keep
			return s.run, false, nil
		}
		if s.state == Stopped && s.cfg.Direct != nil {
			// Only traffic that passes directly can make a channel while stopped.
			s.checks++
			s.mu.Unlock()
			list := s.cfg.Channels()
			s.mu.Lock()
			s.checks--
			s.wakeLocked()
			if s.state != Stopped || s.over {
				continue
			}
			if len(list) > 0 {
				s.mu.Unlock()
				return nil, false, switchActive(list, switchHintStart)
			}
		}
		break
	}
	s.mode = cmp.Or(o.Mode, s.cfg.Mode)
	run, cancel := context.WithCancel(context.Background())
	r = &switchRun{cancel: cancel, up: make(chan struct{}), no: make(chan struct{}), done: make(chan struct{}), keep: o.Keep}
	s.run = r
	s.link = tunnel.LinkState{Phase: tunnel.LinkConnecting}
	// What passes directly must not go on beside the tunnel.
	direct := s.takeLocked(tunnel.Errorf(tunnel.ProxyStopped, "the proxy is being started, which ends connections that passed it by; the app can open them again"))
	s.setLocked(Starting, nil, "start, mode "+string(s.mode))
	s.wg.Add(1)
	mode := s.mode
	s.mu.Unlock()
	switchEnd(direct)
	go s.runLink(run, r, mode)
	return r, false, nil
}

// giveUp ends a start that was refused or took too long, unless it is to be
// kept. It returns nil when it did start, else the last failure, or why where
// there was none.
func (s *Switch) giveUp(r *switchRun, why *tunnel.Error) error {
	s.mu.Lock()
	if s.run != r || s.state != Starting {
		s.mu.Unlock()
		<-r.upOrDone()
		return nil
	}
	var err error = why
	if s.cause != nil {
		err = s.cause
	}
	if r.keep {
		s.mu.Unlock()
		return err
	}
	r.failed = err
	s.mu.Unlock()
	r.cancel()
	<-r.done
	return err
}

func (r *switchRun) upOrDone() <-chan struct{} {
	select {
	case <-r.up:
		return r.up
	default:
		return r.done
	}
}

// runLink runs the link once.
func (s *Switch) runLink(ctx context.Context, r *switchRun, mode tunnel.Mode) {
	defer s.wg.Done()
	defer close(r.done)
	defer r.cancel()
	err := s.cfg.Link.Run(ctx, mode, func(l tunnel.LinkState) { s.linkState(r, l) })
	if r.lost {
		s.cfg.Reconnecting(false)
	}
	s.mu.Lock()
	s.run = nil
	s.link = tunnel.LinkState{}
	if s.state == Stopping {
		s.setLocked(Stopped, nil, "stopped")
		s.mu.Unlock()
		return
	}
	if r.failed != nil {
		err = r.failed
	}
	if err == nil {
		err = tunnel.Errorf(tunnel.Internal, "the tunnel ended without a reason; 'culvert start' starts it again")
	}
	all := s.takeLocked(switchFailed(err))
	s.setLocked(Failed, err, tunnel.Sentence(err))
	s.mu.Unlock()
	switchEnd(all)
}

// linkState takes a report of the link, on the link's goroutine.
func (s *Switch) linkState(r *switchRun, l tunnel.LinkState) {
	s.mu.Lock()
	if l.Change != nil { // beside the state, which stays as it is
		c := *l.Change
		if len(s.changes) == switchChanges {
			s.changes = s.changes[1:]
		}
		s.changes = append(s.changes, c)
		s.emitLocked(Event{Kind: "change", Name: c.What, From: c.From, To: c.To, Code: c.Cause, Cause: c.Why, Change: &c})
		if l.Change = nil; l.Why == "" && l.Session == "" {
			s.mu.Unlock()
			return
		}
	}
	was := s.link
	s.link = l
	s.emitLocked(Event{Kind: "link", From: string(was.Phase), To: string(l.Phase), Code: l.Code, Cause: l.Why, Link: &l})
	switch {
	case l.Phase == tunnel.LinkUp:
		s.cause = nil
		if s.state == Starting && r.failed == nil {
			s.setLocked(Running, nil, l.Why)
			close(r.up)
		}
	case l.Code != "":
		s.cause = &tunnel.Error{Code: l.Code, Text: l.Why}
		if l.Refused {
			r.refuse.Do(func() { close(r.no) })
		}
	}
	lost := s.state == Running && l.Phase != tunnel.LinkUp
	s.wakeLocked()
	s.mu.Unlock()
	if lost != r.lost {
		r.lost = lost
		s.cfg.Reconnecting(lost)
	}
}

// Stop stops the proxy and returns when it is Stopped. It refuses with
// ChannelActive while an app is in a channel. With Wait it refuses new streams
// and associations from now on and gives channels that long to end; if they
// have not, the proxy goes on as before. already says that it was Stopped.
func (s *Switch) Stop(ctx context.Context, o StopOptions) (already bool, err error) {
	s.mu.Lock()
	if s.state == Stopped {
		s.mu.Unlock()
		return true, nil
	}
	if !o.Force && (s.state == Running || s.state == Starting) {
		gate := &s.checks
		if o.Wait > 0 {
			gate = &s.drains
		}
		*gate++
		s.wakeLocked()
		r := s.run
		s.mu.Unlock()
		err = s.drain(ctx, r, o.Wait)
		s.mu.Lock()
		*gate--
		s.wakeLocked()
		if err == nil && s.run != r {
			// It was stopped meanwhile, and perhaps started anew: that start
			// is not ours to undo.
			s.mu.Unlock()
			return false, nil
		}
		if err != nil {
			s.mu.Unlock()
			return false, err
		}
	}
	// From looking at the channels to here the gate was closed.
	var all []*switchOpen
	switch s.state {
	case Failed:
		s.setLocked(Stopped, nil, "stop")
	case Running, Starting:
		all = s.takeLocked(switchStopped())
		s.setLocked(Stopping, nil, "stop")
	}
	r := s.run
	s.mu.Unlock()
	switchEnd(all)
	if r == nil {
		return false, nil
	}
	r.cancel()
	select {
	case <-r.done:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// drain returns nil when no app is in a channel, or the run has ended.
func (s *Switch) drain(ctx context.Context, r *switchRun, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		list := s.cfg.Channels()
		if len(list) == 0 {
			return nil
		}
		if wait <= 0 {
			return switchActive(list, switchHintStop)
		}
		select {
		case <-r.done:
			return nil
		case <-changed:
		case <-time.After(switchPoll):
		case <-timer.C:
			return switchActive(list, fmt.Sprintf("it did not end within %s and the proxy goes on; %s", wait, switchHintStop))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Status returns what is known now.
func (s *Switch) Status() SwitchStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := SwitchStatus{
		State: s.state, Since: s.since, Mode: s.mode, Draining: s.drains > 0,
		Link: s.link, Changes: slices.Clone(s.changes), HeldDrops: s.heldDrops.Load(),
	}
	if s.cause != nil {
		st.Code, st.Cause = tunnel.CodeOf(s.cause), tunnel.Sentence(s.cause)
	}
	for o := range s.opens {
		if o.packets {
			st.Associations++
		} else {
			st.Streams++
		}
	}
	return st
}

// Subscribe returns the state now and then every change, in order. Whoever
// reads too slowly loses the oldest. cancel closes the channel.
func (s *Switch) Subscribe() (events <-chan Event, cancel func()) {
	c := make(chan Event, switchBacklog)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := Event{At: s.since, Kind: "switch", To: string(s.state)}
	if s.cause != nil {
		now.Code, now.Cause = tunnel.CodeOf(s.cause), tunnel.Sentence(s.cause)
	}
	if s.run != nil {
		l := s.link
		now.Link = &l
	}
	c <- now
	s.subs[c] = struct{}{}
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if _, ok := s.subs[c]; ok {
			delete(s.subs, c)
			close(c)
		}
	}
}

// ChannelEvent passes a change of a channel to subscribers and to stops that
// wait. It fits channel.Config.Changed.
func (s *Switch) ChannelEvent(e channel.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.emitLocked(Event{Kind: "channel", Name: e.Channel.Name, From: e.Was, To: e.Is, Cause: e.Why})
	s.wakeLocked()
}

func (s *Switch) setLocked(to SwitchState, cause error, why string) {
	from := s.state
	s.state, s.since, s.cause = to, time.Now(), cause
	e := Event{Kind: "switch", From: string(from), To: string(to), Cause: why}
	if cause != nil {
		e.Code = tunnel.CodeOf(cause)
	}
	s.emitLocked(e)
	s.wakeLocked()
}

func (s *Switch) wakeLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// emitLocked never blocks: mu is held by the only sender.
func (s *Switch) emitLocked(e Event) {
	e.At = time.Now()
	for c := range s.subs {
		if len(c) == cap(c) {
			select {
			case <-c:
			default:
			}
		}
		c <- e
	}
}

// takeLocked takes everything that is open; it is to be given to switchEnd
// after mu has been released.
func (s *Switch) takeLocked(why error) []*switchOpen {
	all := make([]*switchOpen, 0, len(s.opens))
	for o := range s.opens {
		o.ended = why
		all = append(all, o)
	}
	clear(s.opens)
	return all
}

// switchEnd ends what was taken. Their finish can no longer change.
func switchEnd(all []*switchOpen) {
	for _, o := range all {
		o.cancel(o.ended)
		if o.finish != nil {
			o.finish(o.ended)
		}
	}
}

func switchStopped() error {
	return tunnel.Errorf(tunnel.ProxyStopped, "Culvert is stopped; 'culvert start' starts it")
}

func switchFailed(cause error) error {
	return &tunnel.Error{Code: tunnel.CodeOf(cause), Text: "Culvert has failed: " + tunnel.Sentence(cause) + "; 'culvert start' tries again", Err: cause}
}

// wayLocked says where a new request goes. Neither a stage nor an error: it is
// to wait for a change.
func (s *Switch) wayLocked() (tunnel.Opener, error) {
	switch {
	case s.over:
		return nil, switchStopped()
	case s.drains > 0 && (s.state == Running || s.state == Starting):
		return nil, tunnel.Errorf(tunnel.ProxyStopped, "Culvert is about to stop and waits only for channels to end; 'culvert start' starts it again")
	case s.checks > 0:
		return nil, nil
	case s.state == Running && s.link.Phase == tunnel.LinkUp:
		return s.cfg.Through, nil
	case s.state == Stopped && s.cfg.Direct != nil:
		return s.cfg.Direct, nil
	case s.state == Running, s.state == Starting, s.state == Stopping && s.cfg.Direct != nil:
		return nil, nil
	case s.state == Failed:
		return nil, switchFailed(s.cause)
	}
	return nil, switchStopped()
}

// admit registers o and returns where it goes, after at most HoldFor. ctx is
// o's. After an error the caller forgets o.
func (s *Switch) admit(ctx context.Context, o *switchOpen) (tunnel.Opener, error) {
	timer := time.NewTimer(s.cfg.HoldFor)
	defer timer.Stop()
	for {
		s.mu.Lock()
		next, err := s.wayLocked()
		if o.ended != nil {
			err = o.ended
		}
		if err != nil {
			s.mu.Unlock()
			return nil, err
		}
		// Where it goes and that it goes there is one step: a stop sees either
		// neither or both.
		s.opens[o] = struct{}{}
		changed, cause := s.changed, s.cause
		s.mu.Unlock()
		if next != nil {
			return next, nil
		}
		select {
		case <-changed:
			continue
		case <-timer.C:
			err = tunnel.Errorf(tunnel.CloudUnreachable, "there is no connection to the cloud proxy yet; Culvert keeps trying, 'culvert status' says why")
			if cause != nil {
				err = &tunnel.Error{Code: tunnel.CodeOf(cause), Text: "there is no connection to the cloud proxy: " + tunnel.Sentence(cause), Err: cause}
			}
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		return nil, err
	}
}

// opened records how to end what o has opened. It returns why o has ended
// meanwhile.
func (s *Switch) opened(o *switchOpen, finish func(error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o.ended == nil {
		o.finish = finish
	}
	return o.ended
}

// forget ends the tracking of o and reports whether it was still open.
func (s *Switch) forget(o *switchOpen) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.opens, o)
	if o.ended != nil {
		return false
	}
	o.ended = net.ErrClosed
	return true
}

// OpenStream implements tunnel.Opener. While there is no tunnel yet it waits
// up to HoldFor.
func (s *Switch) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	o := &switchOpen{cancel: cancel}
	next, err := s.admit(ctx, o)
	if err != nil {
		s.forget(o)
		return nil, err
	}
	st, err := next.OpenStream(ctx, by, to)
	if err != nil {
		if why := s.opened(o, nil); why != nil {
			err = why
		}
		s.forget(o)
		return nil, err
	}
	if why := s.opened(o, st.Abort); why != nil {
		st.Abort(why)
		return nil, why
	}
	return &switchStream{st, s, o}, nil
}

type switchStream struct {
	tunnel.Stream
	s *Switch
	o *switchOpen
}

func (st *switchStream) Close() error {
	st.s.forget(st.o)
	return st.Stream.Close()
}

func (st *switchStream) Abort(err error) {
	st.s.forget(st.o)
	st.Stream.Abort(err)
}

// OpenPackets implements tunnel.Opener. While there is no tunnel yet it returns
// an association that is attached once there is one, within HoldFor, or closed.
// What is sent meanwhile is dropped and counted.
func (s *Switch) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	p := &switchPackets{s: s, o: &switchOpen{packets: true, cancel: cancel}, r: r}
	s.mu.Lock()
	next, err := s.wayLocked()
	if err != nil {
		s.mu.Unlock()
		cancel(nil)
		return nil, err
	}
	s.opens[p.o] = struct{}{}
	p.o.finish = p.finish
	if next == nil {
		s.wg.Add(1)
	}
	s.mu.Unlock()
	if next == nil {
		go p.attachLater(ctx, by)
		return p, nil
	}
	if err := p.attach(next, by); err != nil {
		if s.forget(p.o) {
			return nil, err
		}
		// A stop was quicker, and has told or will tell the receiver.
		return p, nil
	}
	return p, nil
}

// switchEnding is added to switchPackets.calls when the association ends; below
// it the calls of the receiver that are under way are counted.
const switchEnding = 1 << 32

// switchPackets is one association as the app's side and the tunnel's side see
// it.
type switchPackets struct {
	s     *Switch
	o     *switchOpen
	r     tunnel.Receiver
	next  atomic.Pointer[tunnel.Packets] // nil: held
	calls atomic.Int64
	why   error // set before switchEnding is added
}

func (p *switchPackets) attachLater(ctx context.Context, by tunnel.Peer) {
	defer p.s.wg.Done()
	next, err := p.s.admit(ctx, p.o)
	if err == nil {
		err = p.attach(next, by)
	}
	if err != nil && p.s.forget(p.o) {
		p.closed(err)
	}
}

func (p *switchPackets) attach(next tunnel.Opener, by tunnel.Peer) error {
	inner, err := next.OpenPackets(by, (*switchReceiver)(p))
	if err != nil {
		return err
	}
	p.next.Store(&inner)
	p.s.mu.Lock()
	ended := p.o.ended
	p.s.mu.Unlock()
	if ended != nil {
		// Whoever ended it may have come before there was something to close.
		inner.Close()
	}
	return nil
}

func (p *switchPackets) Send(b []byte, to tunnel.Target) error {
	if next := p.next.Load(); next != nil {
		return (*next).Send(b, to)
	}
	if p.calls.Load() >= switchEnding {
		return net.ErrClosed
	}
	p.s.heldDrops.Add(1)
	return nil
}

func (p *switchPackets) Flush() {
	if next := p.next.Load(); next != nil {
		(*next).Flush()
	}
}

func (p *switchPackets) Close() error {
	if !p.s.forget(p.o) {
		return net.ErrClosed
	}
	p.o.cancel(net.ErrClosed)
	if next := p.next.Load(); next != nil {
		return (*next).Close()
	}
	return nil
}

// finish ends the association from the switch's side.
func (p *switchPackets) finish(why error) {
	if next := p.next.Load(); next != nil {
		(*next).Close()
	}
	p.closed(why)
}

// closed tells the receiver, after the last call that is under way.
func (p *switchPackets) closed(why error) {
	p.why = why
	p.o.cancel(why)
	if p.calls.Add(switchEnding) == switchEnding {
		p.last()
	}
}

func (p *switchPackets) enter() bool {
	if p.calls.Add(1) < switchEnding {
		return true
	}
	p.leave()
	return false
}

func (p *switchPackets) leave() {
	if p.calls.Add(-1) == switchEnding {
		p.last()
	}
}

// last is reached by whoever finds no call under way: the one that ended the
// association, or a call that left after it. One of them wins.
func (p *switchPackets) last() {
	if p.calls.CompareAndSwap(switchEnding, 2*switchEnding) {
		p.r.Closed(p.why)
	}
}

// switchReceiver is the side of switchPackets that the tunnel calls.
type switchReceiver switchPackets

func (r *switchReceiver) Deliver(b []byte, from netip.AddrPort) {
	p := (*switchPackets)(r)
	if p.enter() {
		p.r.Deliver(b, from)
		p.leave()
	}
}

func (r *switchReceiver) Unreachable(to netip.AddrPort, err error) {
	p := (*switchPackets)(r)
	if p.enter() {
		p.r.Unreachable(to, err)
		p.leave()
	}
}

func (r *switchReceiver) Closed(err error) {
	p := (*switchPackets)(r)
	if p.s.forget(p.o) {
		p.closed(err)
	}
}
