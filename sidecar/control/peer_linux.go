package control

import (
	"fmt"
	"net"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerRefused says why the process at the other end of a unix socket is not
// answered; "": it is. gid is the group whose members are; -1: none.
func peerRefused(c net.Conn, gid int) string {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return "" // a listener of the caller's own
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return unknownPeer
	}
	var cred *unix.Ucred
	var groups []uint32
	err2 := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && gid >= 0 {
			groups = peerGroups(fd)
		}
	})
	switch {
	case err != nil || err2 != nil:
		return unknownPeer
	case cred.Uid == 0, int64(cred.Uid) == int64(os.Geteuid()):
		return ""
	case gid >= 0 && (cred.Gid == uint32(gid) || slices.Contains(groups, uint32(gid))):
		return ""
	}
	return fmt.Sprintf("user %d may not control this sidecar; ask whoever runs it to set control.group to a group of yours", cred.Uid)
}

const unknownPeer = "the system does not tell who is at the other end of the control socket"

// maxGroups is what Linux lets a process have (NGROUPS_MAX).
const maxGroups = 65536

// peerGroups are the supplementary groups of the process when it connected
// (SO_PEERGROUPS, Linux 4.13); none where the kernel does not say.
func peerGroups(fd uintptr) []uint32 {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4]
		case errno == unix.ERANGE && len(groups) < maxGroups: // size says how many
			groups = make([]uint32, min(max(size/4, uint32(2*len(groups))), maxGroups))
		default:
			return nil
		}
	}
}
