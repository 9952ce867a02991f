//go:build !unix

package egress

// maxFiles is how many file descriptors the process may have; 0: not known.
func maxFiles() int { return 0 }
