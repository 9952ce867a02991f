package assemble

import "golang.org/x/sys/unix"

// KeepSecrets makes this process leave no core, neither in a file nor to a program
// that collects them, and lets no other process of its user read its memory:
// tokens, keys and passwords are in there.
func KeepSecrets() {
	// A collector (core(5), a pattern that begins with |) is not bound by the limit.
	unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) // of programs that we start, too
}
