// Package cmdtest holds what the tests of several commands share.
//
// It promises to be used by tests alone. It does not start a command: each
// command's tests know their own.
package cmdtest
