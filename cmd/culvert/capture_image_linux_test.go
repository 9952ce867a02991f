package main

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/netpair"
	"culvert/sidecar/control"
)

// In the image culvert has CAP_NET_RAW as a file capability without the
// effective bit. A user who is not root then captures where it is granted, and
// where it is not, the program runs all the same.
func TestTheImagesFileCapability(t *testing.T) {
	near := netpair.New(t).Near
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	culvert := filepath.Join(dir, "culvert")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", culvert, "culvert/cmd/culvert")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as scripts/build.sh builds it
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	// setcap cap_net_raw+p: struct vfs_cap_data of linux/capability.h, revision 2.
	attribute := binary.LittleEndian.AppendUint32(nil, 0x02000000)
	attribute = binary.LittleEndian.AppendUint32(attribute, 1<<unix.CAP_NET_RAW)
	attribute = append(attribute, make([]byte, 12)...)
	if err := unix.Setxattr(culvert, "security.capability", attribute, 0); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("%s takes no file capabilities: %v", dir, err)
	}

	config := filepath.Join(dir, "culvert.yaml")
	text := "cloud_proxy: {address: 127.0.0.1:443, server_name: proxy.example}\nidentity: {app: a, token: a}\nfront: {listen: '127.0.0.1:0'}\nstart: manual\ncapture: {}\n"
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(dir, "run")
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(home, 1337, 1337); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(home, "c.sock")
	cmd := exec.Command(culvert, "run", "-c", config, "--control", socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1337, Gid: 1337}}
	log := &cmdtest.Text{}
	cmd.Stdout, cmd.Stderr = log, log
	near.Start(t, cmd)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(log)
		}
	})
	runEventually(t, "the sidecar takes captured traffic", func() bool {
		st, err := control.NewClient(socket).Status(t.Context())
		return err == nil && st.Capture != nil
	})

	out, err := exec.Command("setpriv", "--reuid=1337", "--regid=1337", "--clear-groups", "--bounding-set=-all", culvert, "--version").CombinedOutput()
	if err != nil {
		t.Errorf("where the capability is not granted, culvert does not run: %v\n%s", err, out)
	}
}
