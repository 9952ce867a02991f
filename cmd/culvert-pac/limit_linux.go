package main

import "golang.org/x/sys/unix"

// limitMemory bounds the address space of this process, in bytes.
func limitMemory(n uint64) { unix.Setrlimit(unix.RLIMIT_AS, &unix.Rlimit{Cur: n, Max: n}) }
