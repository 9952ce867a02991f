//go:build unix

package egress

import (
	"math"
	"syscall"
)

// maxFiles is how many file descriptors the process may have; 0: not known.
func maxFiles() int {
	var r syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r) != nil {
		return 0
	}
	return int(min(uint64(r.Cur), math.MaxInt32)) // no limit is a number beyond
}
