//go:build unix

package httpproxy

import (
	"io/fs"
	"os"
	"syscall"
)

// ours says whether a file belongs to this process's user, or to root.
func ours(f fs.FileInfo) bool {
	s, ok := f.Sys().(*syscall.Stat_t)
	return ok && (s.Uid == 0 || int(s.Uid) == os.Geteuid())
}
