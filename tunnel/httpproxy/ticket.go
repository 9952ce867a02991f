package httpproxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

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
	switch {
	case cache == "":
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
		token, err := ticket(cache, "HTTP/"+host)
		done <- made{token, err}
	}()
	select {
	case m := <-done:
		return m.token, m.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func ticket(cache, service string) (token []byte, err error) {
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
	tickets, err := ccache.LoadCCache(cache)
	if err != nil {
		return nil, err
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
