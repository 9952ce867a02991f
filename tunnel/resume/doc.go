// Package resume is a stream of bytes that outlives the carrier streams under
// it: when one is lost another takes its place, and what the peer had not
// received yet is said again from a bounded buffer.
//
// It promises that every byte arrives once and in order, also across a change of
// carrier, that half-closes and aborts survive one too, that neither end holds
// more than Window bytes of a direction, that all Conns together hold little
// more than their Budget and what is Free to each, while each goes on, that where
// there is memory for it (Config.Kept) what nobody reads holds up no other stream of
// the carrier, and that a peer that breaks the rules ends its own stream only. It does not look for
// carriers or speak to the peer about resuming: whoever does (tunnel/session)
// detaches, tells the peer how much has come, and attaches the new stream. It
// does not survive the end of the process.
package resume
