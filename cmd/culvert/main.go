// Command culvert is the sidecar and its controls: a proxy on loopback whose
// traffic goes through one tunnel on port 443 to a cloud proxy.
//
// It promises that a configuration which is not understood starts nothing, and
// that its words and exit codes stay what the README says. It does not contain
// a cloud proxy, but for trying things (run --embedded).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
)

// version is set by scripts/build.sh.
var version = "development"

func main() {
	assemble.KeepSecrets()
	os.Exit(run(context.Background(), os.Args, os.Stdout, os.Stderr))
}

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	app := &cli.App{
		Name:    "culvert",
		Usage:   "carry the calls of apps that cannot be changed through port 443",
		Version: version,
		Description: `Try it:         culvert run --embedded        both ends in one process
                curl --socks5-hostname 127.0.0.1:1080 https://example.net/

For real:       culvert-cloudproxy init --host HOST --dir DIR     outside; makes culvert.yaml
                culvert check -c culvert.yaml                     here: can it make calls, and if not, why
                culvert run -c culvert.yaml                       here

Then:           culvert status                what carries the traffic, and why
                culvert capture on --user me  apps that know no proxy (Linux, root)
                culvert stop --wait 30s       when the calls have ended

Exit codes: 0 done, 1 failed, 2 usage, 3 refused because an app is in a channel,
4 no sidecar answers on the control socket, 5 usable but degraded (check).`,
		HideHelpCommand: true,
		Suggest:         true,
		Writer:          stdout,
		ErrWriter:       stderr,
		Reader:          os.Stdin,
		Commands:        append(append([]*cli.Command{runCommand(), checkCommand()}, controlCommands()...), captureCommand(), policyCommand()),
		ExitErrHandler:  func(*cli.Context, error) {}, // the code comes from exitCode
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usageError("%q is not a command of culvert; 'culvert --help' lists them", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, group := range app.Commands {
		if len(group.Subcommands) > 0 && group.Action == nil {
			group.Action = subcommandOf(group.Name)
		}
	}
	err := app.RunContext(ctx, args)
	var told checkFailed
	if err != nil && !errors.As(err, &told) {
		fmt.Fprintln(stderr, "culvert:", assemble.Line(err))
	}
	return exitCode(err)
}

// subcommandOf is the action of a command that only has others below it. The
// library's own ends with 3, which here means that an app is in a channel.
func subcommandOf(name string) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.NArg() > 0 {
			return usageError("%.40q is not a command of culvert %s; 'culvert %s --help' lists them", c.Args().First(), name, name)
		}
		return cli.ShowSubcommandHelp(c)
	}
}
