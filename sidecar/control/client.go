package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"culvert/sidecar/check"
	"culvert/tunnel"
)

// maxReply bounds what a client reads of one answer or event, in bytes.
const maxReply = 4 << 20

// ErrNoSidecar says that nothing answers on any control socket.
var ErrNoSidecar = errors.New("no sidecar answers")

// Client speaks with a sidecar. Its errors carry the sidecar's codes; where
// nothing answers they are ErrNoSidecar.
type Client struct {
	paths []string
	http  http.Client
}

// NewClient uses the first of paths that answers; without any, those of Paths.
func NewClient(paths ...string) *Client {
	if len(paths) == 0 {
		paths = Paths()
	}
	c := &Client{paths: paths}
	c.http.Transport = &http.Transport{DialContext: c.dial, DisableKeepAlives: true}
	return c
}

func (c *Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	var why []error
	for _, p := range c.paths {
		conn, err := d.DialContext(ctx, "unix", p)
		if err == nil {
			return conn, nil
		}
		why = append(why, err)
	}
	return nil, fmt.Errorf("%w on %s; start one with 'culvert run', or name its socket with --control: %w", ErrNoSidecar, strings.Join(c.paths, " or "), errors.Join(why...))
}

// Status asks how things stand.
func (c *Client) Status(ctx context.Context) (st Status, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/status", nil, &st)
	return st, err
}

// Start starts the proxy; an empty mode is the configured one.
func (c *Client) Start(ctx context.Context, mode tunnel.Mode) (d Done, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/start", startRequest{string(mode)}, &d)
	return d, err
}

// Stop stops the proxy. wait is how long it may wait for channels to end.
func (c *Client) Stop(ctx context.Context, wait time.Duration, force bool) (d Done, err error) {
	q := stopRequest{Force: force}
	if wait > 0 {
		q.Wait = wait.String()
	}
	err = c.call(ctx, http.MethodPost, "/v1/stop", q, &d)
	return d, err
}

// Media sends a test call through the sidecar's tunnel for so long.
func (c *Client) Media(ctx context.Context, d time.Duration) (w check.Way, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/media", mediaRequest{d.String()}, &w)
	return w, err
}

// Channels lists live and quiet channels.
func (c *Client) Channels(ctx context.Context) ([]Channel, error) {
	var r channelsReply
	err := c.call(ctx, http.MethodGet, "/v1/channels", nil, &r)
	return r.Channels, err
}

// Join takes a lease on a channel, which ends with the process unless pid is 0.
func (c *Client) Join(ctx context.Context, name string, pid int) error {
	return c.call(ctx, http.MethodPost, "/v1/channels/"+url.PathEscape(name)+"/join", joinRequest{pid}, &Done{})
}

// Leave ends a lease; Already says that there was none.
func (c *Client) Leave(ctx context.Context, name string) (d Done, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/channels/"+url.PathEscape(name)+"/leave", nil, &d)
	return d, err
}

// Events calls each with the state now and with every change, until ctx ends,
// each returns an error, or the sidecar ends. It returns nil only when the
// sidecar has ended.
func (c *Client) Events(ctx context.Context, each func(Event) error) error {
	res, err := c.send(ctx, http.MethodGet, "/v1/events", nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, maxReply)
	for lines.Scan() {
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !ok {
			continue
		}
		var e Event
		if err := json.Unmarshal(data, &e); err != nil {
			return noSense(err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// However the connection ended, the sidecar has gone.
	return nil
}

func (c *Client) call(ctx context.Context, method, path string, body, into any) error {
	res, err := c.send(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(io.LimitReader(res.Body, maxReply)).Decode(into); err != nil {
		return noSense(err)
	}
	return nil
}

// send returns an answer with status 200, or the error that it carries.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var b io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		b = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://"+Host+path, b)
	if err != nil {
		return nil, err
	}
	if body != nil {
		r.Header.Set("Content-Type", contentJSON)
	}
	res, err := c.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) && ctx.Err() == nil {
			err = u.Err
		}
		return nil, err
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	var e errorReply
	if err := json.NewDecoder(io.LimitReader(res.Body, maxReply)).Decode(&e); err != nil {
		return nil, noSense(err)
	}
	if e.Error.Code == "" {
		return nil, noSense(fmt.Errorf("HTTP status %d", res.StatusCode))
	}
	err = &tunnel.Error{Code: e.Error.Code, Text: e.Error.Text}
	if len(e.Error.Channels) > 0 {
		err = &ActiveError{e.Error.Channels, err}
	}
	return nil, err
}

func noSense(err error) error {
	return tunnel.Errorf(tunnel.Internal, "what answers on the control socket is not a sidecar of this version: %w", err)
}
