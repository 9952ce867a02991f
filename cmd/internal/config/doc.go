// Package config reads the two configuration files, culvert.yaml and
// cloudproxy.yaml.
//
// It promises that an unknown key or a bad value is an error with the file, the
// line and what was meant, that nothing starts from a file that is not
// understood in whole, and that relative file names in it count from the
// file's own folder. It opens no sockets and makes no keys; cmd/internal/assemble
// turns what is read here into running parts.
package config
