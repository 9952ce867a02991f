// Package cloudproxy is the far end of the tunnel: it takes candidates from
// its listeners, hears what they ask for, admits sessions and brings the
// connections that join to the session they name.
//
// It promises that nothing is granted before the key, the token and the limits
// have been checked, that a peer which has not been admitted holds little
// memory and not for long, and that Run drains before it returns. It does not
// know carriers, tokens or policy: cmd hands in listeners and an Authorize.
package cloudproxy
