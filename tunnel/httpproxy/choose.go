package httpproxy

import (
	"context"
	"net"
	"net/url"
	"strings"

	xhttpproxy "golang.org/x/net/http/httpproxy"

	"culvert/tunnel"
)

// ParseURL reads http://HOST:PORT or https://HOST:PORT. It refuses a password,
// which does not belong in a configuration that is passed on.
func ParseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the URL can not be read; write http://HOST:PORT") // it may hold a password: not to be repeated
	case u.User != nil:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the URL holds a user; name it in proxy.user, and its password in proxy.password_file")
	}
	return usable(u)
}

// usable checks a URL of a proxy and gives it its port.
func usable(u *url.URL) (*url.URL, error) {
	port := map[string]string{"http": "80", "https": "443"}[u.Scheme]
	switch {
	case u.Hostname() != "" && port == "":
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "a proxy with %.20q in its URL can not be used; Culvert goes through http:// and https:// proxies", u.Scheme)
	case u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "": // a password that was not encoded may be in any part: none is repeated
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the URL of the proxy, in proxy.url or HTTPS_PROXY, names none; write http://HOST:PORT; "+encoded)
	}
	if u.Port() != "" {
		port = u.Port()
	}
	return &url.URL{Scheme: u.Scheme, User: u.User, Host: net.JoinHostPort(u.Hostname(), port)}, nil
}

// Fixed chooses one proxy, besides for addresses that noProxy names as NO_PROXY
// does: names with what is below them, addresses, CIDRs.
func Fixed(proxy *url.URL, noProxy []string) Chooser {
	return from(&xhttpproxy.Config{HTTPSProxy: proxy.String(), NoProxy: strings.Join(noProxy, ",")})
}

// Direct chooses no proxy.
func Direct(context.Context, string) ([]*url.URL, error) { return nil, nil }

// Environment chooses what HTTPS_PROXY and NO_PROXY (or https_proxy, no_proxy)
// say now.
func Environment() Chooser {
	c := xhttpproxy.FromEnvironment()
	if _, err := url.Parse(c.HTTPSProxy); err == nil {
		return from(c)
	}
	if _, err := url.Parse("http://" + c.HTTPSProxy); err == nil {
		return from(c) // it is taken so
	}
	// The library would go directly.
	c.HTTPSProxy = "http://proxy.invalid"
	next := from(c)
	return func(ctx context.Context, address string) ([]*url.URL, error) {
		if ways, err := next(ctx, address); err != nil || len(ways) == 0 {
			return nil, err
		}
		return nil, errEnvironment
	}
}

// errEnvironment does not repeat the URL, which may hold a password.
var errEnvironment = tunnel.Errorf(tunnel.ConfigInvalid, "HTTPS_PROXY does not name a proxy; set it to http://HOST:PORT, or unset it; "+encoded)

// encoded is what people overlook who write a user and a password into a URL.
const encoded = "a user or password in it has %%23 for #, %%25 for %%, %%2F for /, %%3F for ?, and %%5C for a backslash"

// Except goes directly to what noProxy names, and asks next for the rest.
func Except(noProxy []string, next Chooser) Chooser {
	if len(noProxy) == 0 {
		return next
	}
	// Any URL does: it only has to be told from none.
	listed := (&xhttpproxy.Config{HTTPSProxy: "http://proxy.invalid", NoProxy: strings.Join(noProxy, ",")}).ProxyFunc()
	return func(ctx context.Context, address string) ([]*url.URL, error) {
		if u, err := listed(&url.URL{Scheme: "https", Host: address}); err == nil && u == nil {
			return nil, nil
		}
		return next(ctx, address)
	}
}

func from(c *xhttpproxy.Config) Chooser {
	choose := c.ProxyFunc()
	return func(_ context.Context, address string) ([]*url.URL, error) {
		u, err := choose(&url.URL{Scheme: "https", Host: address})
		switch {
		case err != nil:
			return nil, errEnvironment
		case u == nil:
			return nil, nil
		}
		if u, err = usable(u); err != nil {
			return nil, err
		}
		return []*url.URL{u}, nil
	}
}
