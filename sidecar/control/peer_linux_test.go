package control

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// The rights of the socket are opened to everybody here: who asks decides.
func TestOnlyRootTheUserAndTheGroupAreAnswered(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "culvert-peer-") // which another user may reach
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	binary := filepath.Join(dir, "client")
	if err := exec.Command("cp", self, binary).Run(); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	for n, c := range []struct {
		name   string
		group  string
		as     syscall.Credential
		answer bool
	}{
		{"root", "", syscall.Credential{}, true},
		{"another user", "", syscall.Credential{Uid: nobody, Gid: nobody}, false},
		{"the primary group", "nogroup", syscall.Credential{Uid: nobody, Gid: nobody}, true},
		{"a further group", "daemon", syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{7, 1}}, true},
		{"a user without the group", "daemon", syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{7}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, strconv.Itoa(n))
			l, err := Listen(path, c.group)
			if err != nil {
				t.Fatal(err)
			}
			os.Chmod(path, 0o666)
			s, err := NewServer(Config{Backend: &fake{}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- s.Serve(ctx, l) }()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}()
			cmd := exec.Command(binary)
			cmd.Dir, cmd.Env = "/", []string{asOtherUser + "=" + path}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &c.as}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Skip("this root can not become another user: ", err)
			}
			if text := string(out); (text == "") != c.answer || !c.answer && !strings.Contains(text, "user 65534 may not control this sidecar") {
				t.Errorf("answered %q", text)
			}
		})
	}
}
