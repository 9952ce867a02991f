package webcall

import (
	_ "embed" // the page
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"
)

//go:embed page.html
var page []byte

// Report is what a page says of its call, all since it began.
type Report struct {
	At             time.Time      `json:"-"`     // when it came
	Error          string         `json:"error"` // why there is no call
	ICE            []string       `json:"ice"`   // the connection's states, in order
	Pair           string         `json:"pair"`  // the selected one: "host udp ADDR:PORT - host udp ADDR:PORT"
	Pairs          int            `json:"pairs"` // how often one was selected
	Sent, Received map[string]int // packets, by "audio" and "video"
	Decoded        int            `json:"decoded"` // frames of video
}

// Room is a conference of two.
type Room struct {
	t     testing.TB
	base  string
	media *middle

	mu   sync.Mutex // guards last
	last map[string]Report
}

// New opens a room, whose pages come over web and whose media over media, until
// the test ends. It closes both. host is what pages call the address of web.
func New(t testing.TB, host string, web net.Listener, media net.PacketConn) *Room {
	base := url.URL{Scheme: "http", Host: net.JoinHostPort(host, strconv.Itoa(web.Addr().(*net.TCPAddr).Port))}
	r := &Room{t: t, base: base.String(), last: map[string]Report{}}
	r.media = newMiddle(t, media)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /", func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.Write(page)
	})
	mux.HandleFunc("POST /join", r.join)
	mux.HandleFunc("POST /report", r.report)
	server := &http.Server{Handler: mux}
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(web) }) // ends when it is closed
	t.Cleanup(func() {
		server.Close()
		serving.Wait()
	})
	return r
}

// Origin is where the pages come from.
func (r *Room) Origin() string { return r.base }

// Page is the address of the page of the first that takes part; it opens one for
// each of the others.
func (r *Room) Page(names ...string) string {
	return r.base + "/?" + url.Values{"name": names}.Encode()
}

// Heard are the addresses that media have come from.
func (r *Room) Heard() []string { return r.media.conn.all() }

// Last is what a page has said last; false: nothing so far.
func (r *Room) Last(name string) (Report, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last, ok := r.last[name]
	return last, ok
}

func (r *Room) report(w http.ResponseWriter, q *http.Request) {
	said := Report{At: time.Now()}
	if err := json.NewDecoder(q.Body).Decode(&said); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[q.FormValue("name")] = said
}

func (r *Room) join(w http.ResponseWriter, q *http.Request) {
	answer, err := r.media.join(q.Context(), q.FormValue("name"), q.Body)
	if err != nil {
		err = fmt.Errorf("%s does not join: %w", q.FormValue("name"), err)
		r.t.Error(err)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	json.NewEncoder(w).Encode(answer)
}
