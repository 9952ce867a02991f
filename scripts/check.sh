#!/usr/bin/env bash
# Everything that a change must pass, for people and for CI alike.
# Runs every check even when one fails, and names those that failed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

failed=()

# check SENTENCE COMMAND...: runs the command in $module; the sentence says what its failure means.
check() {
	local sentence=$1
	shift
	printf '== %s: %s\n' "$module" "$*"
	if ! (cd "$module" && "$@"); then
		failed+=("$module: $sentence")
	fi
}

formatted() {
	local files
	files=$(git ls-files -z --cached --others --exclude-standard -- '*.go' | while IFS= read -r -d '' f; do
		# A file that is deleted but not committed is still listed; nested modules list their own.
		if [[ -f $f ]]; then printf '%s\0' "$f"; fi
	done | xargs -0 -r gofmt -l)
	[[ -z $files ]] || { printf '%s\n' "$files"; return 1; }
}

# Built once from the root's go.mod, so that nested modules need no tool of their own.
staticcheck=$(go tool -n staticcheck)

mapfile -t modules < <(git ls-files --cached --others --exclude-standard -- go.mod '*/go.mod' | xargs -n1 dirname)
((${#modules[@]})) || { printf 'git names no module here, so nothing was checked.\n' >&2; exit 1; }
for module in "${modules[@]}"; do
	check 'these files are not formatted; run gofmt -w on them.' formatted
	check 'go vet found a mistake.' go vet ./...
	check 'staticcheck found a mistake.' "$staticcheck" ./...
	check 'go.mod or go.sum is not tidy; run go mod tidy there.' go mod tidy -diff
	check 'a test failed.' go test -timeout 20m ./... # cached where it was just run
	# Without those that only drive other programs, in which the detector would see nothing.
	check 'a test failed, or a race was found.' go test -race -shuffle=on -short -timeout 20m ./...
done

if ((${#failed[@]})); then
	printf '\n' >&2
	printf 'FAILED in %s\n' "${failed[@]}" >&2
	exit 1
fi
printf '\nAll checks passed.\n'
