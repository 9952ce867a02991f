//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// raise puts CAP_NET_RAW to use where this process has it in reserve only: a
// container's image grants it by a file capability without the effective bit,
// since with that bit the program could not even start where the capability is
// not to be had. Without it, or in a program with cgo, nothing changes.
func raise() {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	const raw = 1 << unix.CAP_NET_RAW
	if unix.Capget(&head, &sets[0]) != nil || sets[0].Permitted&raw == 0 || sets[0].Effective&raw != 0 {
		return
	}
	sets[0].Effective |= raw
	// Capabilities belong to threads, and any of them may open a socket.
	syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&sets)), 0)
}
