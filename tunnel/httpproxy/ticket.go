package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jcmturner/gokrb5/v8/client"
	"github.com/jcmturner/gokrb5/v8/config"
	ccache "github.com/jcmturner/gokrb5/v8/credentials"
	"github.com/jcmturner/gokrb5/v8/spnego"
)

// errNoTickets says that there is no ticket cache here, which is no fault.
var errNoTickets = errors.New("there is no ticket cache")

// Ticket makes Negotiate's answer to a proxy (RFC 4559 §4.1) from the Kerberos
// ticket cache of this process's user, as kinit leaves it: the file that
// KRB5CCNAME names, or /tmp/krb5cc_UID. It asks the KDC of krb5.conf.
func Ticket(ctx context.Context, host string) ([]byte, error) {
	cache, isFile := strings.CutPrefix(os.Getenv("KRB5CCNAME"), "FILE:")
	named := cache != ""
	switch {
	case !named:
		cache = "/tmp/krb5cc_" + strconv.Itoa(os.Getuid())
	case !isFile && strings.Contains(cache, ":") && !strings.HasPrefix(cache, "/"):
		return nil, fmt.Errorf("KRB5CCNAME names no file, but %.20q", cache)
	}
	if _, err := os.Stat(cache); errors.Is(err, fs.ErrNotExist) {
		return nil, errNoTickets
	}
	type made struct {
		token []byte
		err   error
	}
	done := make(chan made, 1)
	go func() { // the library knows no contexts; it gives up by itself after seconds
		token, err := ticket(cache, named, "HTTP/"+host)
		done <- made{token, err}
	}()
	select {
	case m := <-done:
		return m.token, m.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func ticket(cache string, named bool, service string) (token []byte, err error) {
	defer func() {
		if broken := recover(); broken != nil { // its parsers trust what they read, and no cache may end a call
			err = fmt.Errorf("the ticket cache %s, or what the KDC says, can not be read: %v", cache, broken)
		}
	}()
	file := os.Getenv("KRB5_CONFIG")
	if file == "" {
		file = "/etc/krb5.conf"
	}
	conf, err := config.Load(file)
	var unknown config.UnsupportedDirective
	if err != nil && !errors.As(err, &unknown) {
		return nil, err
	}
	text, err := readCache(cache, named)
	if err != nil {
		return nil, err
	}
	tickets := new(ccache.CCache)
	if err := tickets.Unmarshal(text); err != nil {
		return nil, err
	}
	if ended := expired(tickets, time.Now()); !ended.IsZero() {
		return nil, fmt.Errorf("the ticket in %s has expired on %s; kinit gets another", cache, ended.UTC().Format("2006-01-02 15:04 UTC"))
	}
	c, err := client.NewFromCCache(tickets, conf, client.DisablePAFXFAST(true))
	if err != nil {
		return nil, err
	}
	defer c.Destroy()
	made, err := spnego.SPNEGOClient(c, service).InitSecContext()
	if err != nil {
		return nil, err
	}
	return made.Marshal()
}

// maxCache bounds a ticket cache, in bytes. Those of people in many groups have 100 KiB.
const maxCache = 1 << 20

// readCache reads a ticket cache. Where nobody has named it, it lies where every
// user of the machine may put something: then it has to be this user's own, since
// the parser takes any number that it reads for a size.
func readCache(cache string, named bool) ([]byte, error) {
	f, err := os.OpenFile(cache, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would be waited for
	if err != nil {
		return nil, err
	}
	defer f.Close()
	is, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !is.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no file", cache)
	case !named && !ours(is):
		return nil, fmt.Errorf("%s is another user's", cache)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxCache+1))
	if err == nil && len(text) > maxCache {
		err = fmt.Errorf("%s is longer than %d bytes", cache, maxCache)
	}
	return text, err
}

// expired is when the last ticket-granting ticket ended; zero: one is good, or there is none.
func expired(tickets *ccache.CCache, now time.Time) (ended time.Time) {
	for _, t := range tickets.GetEntries() {
		if name := t.Server.PrincipalName.NameString; len(name) > 0 && name[0] == "krbtgt" {
			if t.EndTime.After(now) {
				return time.Time{}
			}
			ended = t.EndTime
		}
	}
	return ended
}
