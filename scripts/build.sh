#!/usr/bin/env bash
# Builds static binaries of the commands into dist/.
#
#   OUT      the folder to write to (dist)
#   VERSION  what --version says (git describe)
#   GOOS, GOARCH  the target, as for go build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-dist}
version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo unknown)}

mkdir -p "$out"
# No C library, no paths of this machine. VERSION says the commit: -buildvcs would fail
# in a clone that belongs to another user and, in an image, for want of git.
# urfave_cli_no_docs leaves the manual page generator out of the product.
CGO_ENABLED=0 go build -trimpath -buildvcs=false -tags urfave_cli_no_docs \
	-ldflags "-s -w -X main.version=$version" -o "$out/" \
	./cmd/culvert ./cmd/culvert-cloudproxy ./cmd/culvert-pac ./cmd/culvert-demo
printf 'built %s in %s\n' "$version" "$out"
