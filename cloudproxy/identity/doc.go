// Package identity says who may use a cloud proxy: tokens, the keys that sign
// them, and how many sessions an App ID may have at once.
//
// A token is a JWT (RFC 7519) signed with Ed25519 (EdDSA, RFC 8037; no other
// algorithm is accepted). It names the App ID, its concurrency and expiry, may
// name a region and a network operator, and may be bound to one sidecar's key
// by cnf (RFC 7800 §3.4).
//
// It promises that nothing of a token is believed before its signature has been
// checked, that no error holds any part of a token, that the quota is exact
// within one process, and that Place.Check knows within one call of a token that
// has expired, of one that was revoked, and of a key that signs no longer.
//
// It does not share quotas between cloud proxies, does not look at files by
// itself (Admission.Change is told), and does not end sessions.
package identity
