package control

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"culvert/tunnel"
)

// maxPath is what sun_path holds on every system that has unix sockets, less
// its last byte.
const maxPath = 103

// Paths returns where a sidecar's control socket may be, the likeliest first. A
// sidecar listens on the first that it can make; the command line tries each.
func Paths() []string {
	var all []string
	if d := os.Getenv("RUNTIME_DIRECTORY"); d != "" {
		// systemd separates several with colons; the first is ours.
		all = append(all, filepath.Join(filepath.SplitList(d)[0], "control.sock"))
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		all = append(all, filepath.Join(d, "culvert", "control.sock"))
	}
	return append(all, "/run/culvert/control.sock")
}

// Listen makes the control socket. With a group its members may use it (0660);
// without one only the user (0600). A folder that is missing is made for the
// user alone. A socket that nothing answers on any more is replaced.
func Listen(path, group string) (net.Listener, error) {
	if path == "" || len(path) > maxPath {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the path of the control socket must have 1 to %d bytes, and %q has %d", maxPath, path, len(path))
	}
	mode, gid := fs.FileMode(0o600), -1
	if group != "" {
		g, err := user.LookupGroup(group)
		if _, notNumber := strconv.ParseUint(group, 10, 31); err != nil && notNumber == nil {
			g, err = &user.Group{Gid: group}, nil // as in a container, which has no /etc/group
		}
		if err != nil {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "control.group: there is no group %s; create it or leave the field out: %w", group, err)
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "control.group: %s has no numeric ID: %w", group, err)
		}
		mode = 0o660
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, pathError(path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The socket is made under another name and moved, so that nobody can
	// connect before its rights are set.
	early := path + "." + strconv.Itoa(os.Getpid())
	if len(early) > maxPath {
		early = filepath.Join(filepath.Dir(path), "."+strconv.Itoa(os.Getpid()))
	}
	// What a process with our number has left there.
	os.Remove(early)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: early, Net: "unix"})
	if err != nil {
		return nil, pathError(path, err)
	}
	l.SetUnlinkOnClose(false)
	if err = setRights(early, mode, gid); err == nil {
		err = os.Rename(early, path)
	}
	if err != nil {
		l.Close()
		os.Remove(early)
		return nil, pathError(path, err)
	}
	return &listener{l, path, gid}, nil
}

// setRights sets the rights of a file in its own folder: whoever may write there can
// put a link in its place, which is not to lead to a file of root's.
func setRights(file string, mode fs.FileMode, gid int) error {
	dir, err := os.OpenRoot(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	name := filepath.Base(file)
	if gid >= 0 {
		if err := dir.Lchown(name, -1, gid); err != nil {
			return err
		}
	}
	return dir.Chmod(name, mode)
}

// listener removes its path when it is closed.
type listener struct {
	*net.UnixListener
	path string
	gid  int // whose members may use it; -1: none
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *listener) Close() error {
	err := l.UnixListener.Close()
	if err == nil {
		os.Remove(l.path)
	}
	return err
}

// removeStale removes a socket that nothing answers on. It never removes
// anything else.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return pathError(path, err)
	case st.Mode().Type() != fs.ModeSocket:
		return tunnel.Errorf(tunnel.ConfigInvalid, "the control socket can not be made at %s, which is something else; choose another path with --control", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return tunnel.Errorf(tunnel.ConfigInvalid, "a sidecar already answers on %s; stop it, or choose another path with --control", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return pathError(path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return pathError(path, err)
	}
	return nil
}

func pathError(path string, err error) error {
	code := tunnel.ConfigInvalid
	if errors.Is(err, fs.ErrPermission) {
		code = tunnel.NotPermitted
	}
	// The reason without the paths that Go's errors repeat.
	reason := err
	var errno syscall.Errno
	if errors.As(err, &errno) {
		reason = errno
	}
	return &tunnel.Error{Code: code, Text: "the control socket can not be made at " + path + ": " + reason.Error() + "; choose another path with --control", Err: err}
}
