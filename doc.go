// Package culvert is the root of the module and holds no code of its own, only
// the test of what may import what (imports_test.go).
//
// It promises that a package which breaks the import graph, or says neither
// what it promises nor what it leaves to others, fails go test with a sentence.
// It does not offer an API: the commands are in cmd, the contract that joins
// the parts is in tunnel.
package culvert
