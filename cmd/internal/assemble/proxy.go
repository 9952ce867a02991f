package assemble

import (
	"crypto/tls"
	"net"

	"culvert/cmd/internal/config"
	"culvert/tunnel/httpproxy"
)

// throughProxy makes what dials TCP for the tunnel: through an HTTP proxy, where
// the configuration or the environment names one.
func throughProxy(c *config.HTTPProxy, below *net.Dialer) (*httpproxy.Dialer, error) {
	roots, err := rootsFrom("proxy.ca_file", c.CAFile)
	if err != nil {
		return nil, err
	}
	if _, _, err := c.Credentials(); err != nil {
		return nil, err
	}
	choose := httpproxy.Environment()
	switch c.URL {
	case "":
		choose = httpproxy.Except(c.NoProxy, choose)
	case config.NoProxy:
		choose = httpproxy.Direct
	default:
		u, err := httpproxy.ParseURL(c.URL)
		if err != nil {
			return nil, err
		}
		choose = httpproxy.Fixed(u, c.NoProxy)
	}
	return httpproxy.New(httpproxy.Config{Choose: choose, Credentials: c.Credentials, TLS: &tls.Config{RootCAs: roots}, Dial: below.DialContext})
}
