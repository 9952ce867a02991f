package control

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"culvert/sidecar/check"
	"culvert/tunnel"
)

const (
	maxBody     = 16 << 10
	maxConns    = 100 // at once on one listener, which anybody on this machine may reach
	maxWait     = 24 * time.Hour
	readTime    = 5 * time.Second
	idleTime    = 30 * time.Second
	shutTime    = 2 * time.Second
	keepAlive   = 15 * time.Second // between comments on an event stream where nothing happens
	eventWrite  = 2 * time.Second  // for one event, to a reader that has stopped reading
	contentJSON = "application/json"
)

// Config is what a Server is made of.
type Config struct {
	Backend Backend
	Log     *slog.Logger // may be nil
}

// Server answers on a control socket.
type Server struct {
	b        Backend
	log      *slog.Logger
	mux      *http.ServeMux
	refusals *rate.Limiter // of log lines
	unlogged atomic.Int64
}

// NewServer checks the configuration.
func NewServer(c Config) (*Server, error) {
	if c.Backend == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Backend is missing")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{b: c.Backend, log: c.Log, mux: http.NewServeMux(), refusals: rate.NewLimiter(10, 50)}
	s.mux.HandleFunc("GET /v1/status", s.status)
	s.mux.HandleFunc("POST /v1/start", s.start)
	s.mux.HandleFunc("POST /v1/stop", s.stop)
	s.mux.HandleFunc("GET /v1/channels", s.channels)
	s.mux.HandleFunc("POST /v1/channels/{name}/join", s.join)
	s.mux.HandleFunc("POST /v1/channels/{name}/leave", s.leave)
	s.mux.HandleFunc("POST /v1/media", s.media)
	s.mux.HandleFunc("GET /v1/events", s.events)
	return s, nil
}

// Serve answers on l, which it closes, until ctx ends; it then returns nil. On a
// socket of Listen only its user, root and members of its group are answered.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	gid := -1
	if own, ok := l.(*listener); ok {
		gid = own.gid
	}
	return s.serve(ctx, l, s, func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, refusalKey{}, peerRefused(c, gid))
	})
}

// refusalKey is the key of why a connection's peer is not answered, a string.
type refusalKey struct{}

// ServeTCP answers on a loopback address, which it closes, until ctx ends. What
// it answers must show the token and name exactly the listener as its host.
// token is asked for each request.
func (s *Server) ServeTCP(ctx context.Context, l net.Listener, token func() (string, error)) error {
	host := l.Addr().String()
	return s.serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		why := foreign(r)
		if why == "" && r.Host != host {
			why = "the request is for another host; use http://" + host + "/v1/…"
		}
		if why != "" {
			s.refuse(w, http.StatusForbidden, why)
			return
		}
		want, err := token()
		shown, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		a, b := sha256.Sum256([]byte(shown)), sha256.Sum256([]byte(want)) // of one length, whatever was shown
		if err != nil || want == "" || !bearer || subtle.ConstantTimeCompare(a[:], b[:]) != 1 {
			w.Header().Set("WWW-Authenticate", "Bearer")
			s.refuse(w, http.StatusUnauthorized, "the request does not show the token of control.token_file as Authorization: Bearer")
			return
		}
		s.answer(w, r)
	}), nil)
}

// refuse answers a request that is not its client's.
func (s *Server) refuse(w http.ResponseWriter, status int, why string) {
	if s.refusals.Allow() {
		s.log.Warn("a control request was refused", "audit", "refused", "code", string(tunnel.NotPermitted), "why", why, "unlogged", s.unlogged.Swap(0))
	} else {
		s.unlogged.Add(1)
	}
	w.Header().Set("Connection", "close") // its place is for others
	reply(w, status, errorReply{errorBody{Code: tunnel.NotPermitted, Text: why}})
}

func (s *Server) serve(ctx context.Context, l net.Listener, handler http.Handler, conn func(context.Context, net.Conn) context.Context) error {
	var open atomic.Int64
	h := &http.Server{
		ConnState: func(c net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				if open.Add(1) > maxConns {
					c.Close()
				}
			case http.StateClosed:
				open.Add(-1)
			}
		},
		DisableGeneralOptionsHandler: true, // it would answer whoever asks
		Handler:                      handler, ConnContext: conn, ReadHeaderTimeout: readTime, ReadTimeout: readTime, IdleTimeout: idleTime, MaxHeaderBytes: maxBody,
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	go func() { served <- h.Serve(l) }()
	select {
	case err := <-served:
		h.Close()
		return tunnel.Errorf(tunnel.Internal, "the control socket has failed: %w", err)
	case <-ctx.Done():
	}
	// Requests see their context end and answer.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutTime)
	defer cancel()
	if h.Shutdown(end) != nil {
		h.Close()
	}
	<-served
	return nil
}

// ServeHTTP answers one request. It refuses all that a web page could send.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	why, _ := r.Context().Value(refusalKey{}).(string)
	if why == "" {
		why = foreign(r)
	}
	// A name that was made to point here (DNS rebinding) stands in Host.
	if host, _, _ := strings.Cut(r.Host, ":"); why == "" && host != Host && host != "localhost" {
		why = "the request is for another host; use http://" + Host + "/v1/… on the socket"
	}
	if why != "" {
		s.refuse(w, http.StatusForbidden, why)
		return
	}
	s.answer(w, r)
}

// answer answers a request of its client.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		w.Header().Set("Allow", "GET, POST")
		reply(w, http.StatusMethodNotAllowed, errorReply{errorBody{Code: tunnel.Unsupported, Text: "the control socket takes GET and POST only"}})
		return
	}
	if _, pattern := s.mux.Handler(r); pattern == "" {
		reply(w, http.StatusNotFound, errorReply{errorBody{Code: tunnel.Unsupported, Text: "there is no such request; those are GET /v1/status, /v1/channels and /v1/events, POST /v1/start, /v1/stop, /v1/media and /v1/channels/NAME/join or /leave"}})
		return
	}
	b, err := io.ReadAll(r.Body)
	var long *http.MaxBytesError
	if errors.As(err, &long) {
		err = tunnel.Errorf(tunnel.ConfigInvalid, "the request is longer than %d bytes", maxBody)
	} else if err != nil {
		err = tunnel.Errorf(tunnel.ConfigInvalid, "the request ended early: %w", err)
	}
	if err != nil {
		fail(w, err)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(b))
	// Past the body net/http lifts the read deadline, so a stop may wait.
	s.mux.ServeHTTP(w, r)
}

// foreign says why a request can not come from Culvert's own client or curl.
func foreign(r *http.Request) string {
	for name := range r.Header {
		if name == "Origin" || name == "Referer" || strings.HasPrefix(name, "Sec-Fetch-") || strings.HasPrefix(name, "Access-Control-") {
			return "the control socket does not serve web pages, and the request has the header " + name
		}
	}
	if r.Method == http.MethodPost && (r.ContentLength != 0 || r.Header.Get("Content-Type") != "") {
		if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != contentJSON {
			return "the body of a request must be declared as Content-Type: " + contentJSON
		}
	}
	return ""
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", contentJSON)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// fail answers with an error.
func fail(w http.ResponseWriter, err error) {
	body := errorBody{Code: tunnel.CodeOf(err), Text: tunnel.Sentence(err)}
	var active *ActiveError
	if errors.As(err, &active) {
		body.Channels = active.Channels
	}
	status := http.StatusBadGateway
	switch body.Code {
	case tunnel.ChannelActive, tunnel.NotPermitted, tunnel.ProxyStopped:
		status = http.StatusConflict
	case tunnel.ConfigInvalid:
		status = http.StatusBadRequest
	case tunnel.LimitExceeded:
		status = http.StatusTooManyRequests
	case tunnel.Internal:
		status = http.StatusInternalServerError
	case tunnel.TimedOut:
		status = http.StatusGatewayTimeout
	}
	reply(w, status, errorReply{body})
}

// decode reads a request's body strictly; an empty one leaves v as it is.
func decode(r *http.Request, v any) error {
	b, err := io.ReadAll(r.Body)
	if err != nil || len(bytes.TrimSpace(b)) == 0 {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the request is not what this call takes: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); err != io.EOF {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the request has something after its JSON object; send one object")
	}
	return nil
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) {
	st := s.b.Status()
	if st.Channels == nil {
		st.Channels = []Channel{}
	}
	reply(w, http.StatusOK, st)
}

func (s *Server) media(w http.ResponseWriter, r *http.Request) {
	var q mediaRequest
	err := decode(r, &q)
	var d time.Duration
	if err == nil {
		if d, err = time.ParseDuration(q.For); err != nil || d <= 0 || d > maxMedia {
			err = tunnel.Errorf(tunnel.ConfigInvalid, "for: %.40q is not a time of at most %v, such as 10s", q.For, maxMedia)
		}
	}
	var way check.Way
	if err == nil {
		way, err = s.b.Media(r.Context(), d)
	}
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, http.StatusOK, way)
}

func (s *Server) channels(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, channelsReply{append([]Channel{}, s.b.Channels()...)})
}

func (s *Server) done(w http.ResponseWriter, already bool, err error) {
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, http.StatusOK, Done{State: s.b.Status().State, Already: already})
}

func (s *Server) start(w http.ResponseWriter, r *http.Request) {
	var q startRequest
	if err := decode(r, &q); err != nil {
		fail(w, err)
		return
	}
	var mode tunnel.Mode // empty: the configured one
	if q.Mode != "" {
		var err error
		if mode, err = tunnel.ParseMode(q.Mode); err != nil {
			fail(w, err)
			return
		}
	}
	already, err := s.b.Start(r.Context(), mode)
	s.done(w, already, err)
}

func (s *Server) stop(w http.ResponseWriter, r *http.Request) {
	var q stopRequest
	if err := decode(r, &q); err != nil {
		fail(w, err)
		return
	}
	var wait time.Duration
	if q.Wait != "" {
		var err error
		if wait, err = time.ParseDuration(q.Wait); err != nil || wait < 0 || wait > maxWait {
			fail(w, tunnel.Errorf(tunnel.ConfigInvalid, "wait is not a time between 0s and 24h, such as 30s"))
			return
		}
	}
	already, err := s.b.Stop(r.Context(), wait, q.Force)
	s.done(w, already, err)
}

func (s *Server) join(w http.ResponseWriter, r *http.Request) {
	var q joinRequest
	err := decode(r, &q)
	if err == nil {
		err = s.b.Join(r.PathValue("name"), q.PID)
	}
	s.done(w, false, err)
}

func (s *Server) leave(w http.ResponseWriter, r *http.Request) {
	if err := decode(r, &struct{}{}); err != nil {
		fail(w, err)
		return
	}
	s.done(w, !s.b.Leave(r.PathValue("name")), nil)
}

func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	c := http.NewResponseController(w)
	events := s.b.Events(ctx)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for {
		line := []byte(": nothing new\n\n")
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				return
			}
			b, err := json.Marshal(e)
			if err != nil {
				return
			}
			line = append(append([]byte("data: "), b...), "\n\n"...)
		case <-tick.C:
		}
		// A recorder in a test knows no deadline.
		if err := c.SetWriteDeadline(time.Now().Add(eventWrite)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return
		}
		if _, err := w.Write(line); err != nil {
			return
		}
		if c.Flush() != nil {
			return
		}
	}
}
