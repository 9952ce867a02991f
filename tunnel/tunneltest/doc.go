// Package tunneltest holds what tests of the tunnel share: carriers that live in
// memory, and the exam that every carrier sits.
//
// It promises that the carriers in memory keep the contract of package tunnel
// (they pass the exam themselves), that they use only channels, mutexes,
// conditions and timers, so that they work inside testing/synctest, and that
// their datagram way can be made to drop, delay, repeat, reorder and refuse.
// It does not model congestion, loss of stream bytes or path MTU, and nothing
// in the product imports it.
package tunneltest
