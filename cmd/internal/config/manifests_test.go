package config

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// A Secret's values are placeholders for what init writes, so only ConfigMaps
// are read.
func TestConfigurationsInTheManifestsAreValid(t *testing.T) {
	files, err := filepath.Glob("../../../scripts/kubernetes/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	found := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		docs := yaml.NewDecoder(bytes.NewReader(text))
		for {
			var doc struct {
				Kind string            `yaml:"kind"`
				Data map[string]string `yaml:"data"`
			}
			err := docs.Decode(&doc)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if doc.Kind != "ConfigMap" {
				continue
			}
			for name, conf := range doc.Data {
				switch {
				case name == "culvert.yaml":
					_, err = ReadSidecar(write(t, conf))
				case strings.HasPrefix(name, "cloudproxy") && strings.HasSuffix(name, ".yaml"):
					_, err = ReadCloudProxy(write(t, conf))
				default:
					t.Errorf("%s: %s is no configuration that is known here", file, name)
					continue
				}
				if err != nil {
					t.Errorf("%s: %s: %v", file, name, err)
				}
				found++
			}
		}
	}
	if found == 0 {
		t.Error("the manifests hold no configuration")
	}
}
