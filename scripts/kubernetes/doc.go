// Package kubernetes holds manifests that run Culvert in Kubernetes, and the
// test that they are right.
//
// It promises that each manifest decodes strictly against the Kubernetes API
// types and keeps what Culvert needs: a native sidecar, an app that waits for its
// call to end, an address for each cloud proxy, and no privilege beyond what capture
// needs. It does not talk to a cluster. It is a module of its own so that the
// product does not depend on the Kubernetes libraries.
package kubernetes
