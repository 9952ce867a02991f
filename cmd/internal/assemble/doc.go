// Package assemble joins Culvert's parts: it turns a configuration into a
// sidecar or a cloud proxy that can be run.
//
// It is the one place that knows all packages; the commands share it. It
// promises that what it returns has checked its configuration and holds its
// ports, so that errors come before anything runs, and that Run leaves nothing
// behind. It decides nothing itself.
package assemble
