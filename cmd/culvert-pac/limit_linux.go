package main

import "golang.org/x/sys/unix"

// limitMemory bounds what this process may write to of memory of its own, in bytes. Of
// its address space Go reserves more than that, and more with each thread.
func limitMemory(n uint64) { unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: n, Max: n}) }
