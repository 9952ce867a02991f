// Nobbr runs a program that can't choose its sockets' congestion control: the
// kernel refuses TCP_CONGESTION with EPERM, to it and all that it starts, as it
// does to an unprivileged program where net.ipv4.tcp_allowed_congestion_control
// does not list the algorithm. So its sockets use the namespace's own,
// net.ipv4.tcp_congestion_control.
//
//	nobbr culvert run -c culvert.yaml
//
// The sysctl of allowed algorithms would not do: it belongs to the whole machine,
// not to a namespace, and does not bind root. A seccomp filter binds this program
// alone.
package main

import (
	"log"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("nobbr: ")
	if len(os.Args) < 2 {
		log.Fatal("usage: nobbr PROGRAM [ARGUMENT]...")
	}
	path, err := exec.LookPath(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	// A filter belongs to a thread, and exec keeps the calling thread's.
	runtime.LockOSThread()
	if err := refuse(); err != nil {
		log.Fatal(err)
	}
	log.Fatal(syscall.Exec(path, os.Args[1:], os.Environ()))
}

// Of linux/prctl.h, linux/seccomp.h and linux/tcp.h.
const (
	prSetNoNewPrivs   = 38
	prSetSeccomp      = 22
	seccompModeFilter = 2
	allow             = 0x7fff0000
	deny              = 0x00050000 | uint32(syscall.EPERM)
	tcpCongestion     = 13
)

// Offsets in struct seccomp_data: the call's number, and the low halves of its
// second and third argument (little-endian machines).
const (
	callNumber = 0
	level      = 16 + 1*8
	option     = 16 + 2*8
)

// refuse installs the filter. It looks at the native call's number alone, so it
// is no sandbox: a program that wanted to could get round it.
func refuse() error {
	load := func(offset uint32) syscall.SockFilter {
		return syscall.SockFilter{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: offset}
	}
	// unless goes on where the value is k, else jumps ahead to the end, which allows.
	unless := func(k uint32, ahead uint8) syscall.SockFilter {
		return syscall.SockFilter{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: k, Jf: ahead}
	}
	answer := func(k uint32) syscall.SockFilter {
		return syscall.SockFilter{Code: syscall.BPF_RET | syscall.BPF_K, K: k}
	}
	filter := []syscall.SockFilter{
		load(callNumber), unless(syscall.SYS_SETSOCKOPT, 5),
		load(level), unless(syscall.IPPROTO_TCP, 3),
		load(option), unless(tcpCongestion, 1),
		answer(deny),
		answer(allow),
	}
	program := syscall.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return os.NewSyscallError("PR_SET_NO_NEW_PRIVS", errno)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetSeccomp, seccompModeFilter, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return os.NewSyscallError("PR_SET_SECCOMP", errno)
	}
	return nil
}
