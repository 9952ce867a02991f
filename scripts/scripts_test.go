// Package scripts holds what builds, checks and runs Culvert outside Go.
package scripts

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestScriptsParse(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("bash is missing")
	}
	files, err := filepath.Glob("*.sh")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts here: %v", err)
	}
	for _, file := range append(files, "../.ci/run") {
		script, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(bash, "-n")
		cmd.Stdin = script
		out, err := cmd.CombinedOutput()
		script.Close()
		if err != nil {
			t.Errorf("bash cannot read %s: %v\n%s", file, err, out)
		}
	}
}
