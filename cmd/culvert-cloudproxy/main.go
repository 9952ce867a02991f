// Command culvert-cloudproxy is the far end of the tunnel: it takes sidecars on
// port 443, UDP and TCP, and passes their traffic on where the policy allows.
//
// It promises that nothing is admitted without a valid token and nothing leaves
// that the policy has not allowed on the numeric address. It does not hold user
// accounts: a token says who may use it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
	"culvert/tunnel"
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
		Name:    "culvert-cloudproxy",
		Usage:   "the far end of Culvert's tunnel",
		Version: version,
		Description: `Once:    culvert-cloudproxy init --host cloud.example.net --dir /etc/culvert --profile public
         makes keys, a certificate, a token, cloudproxy.yaml, and culvert.yaml for a sidecar
Then:    culvert-cloudproxy run -c /etc/culvert/cloudproxy.yaml

Exit codes: 0 done, 1 failed, 2 usage.`,
		HideHelpCommand: true,
		Suggest:         true,
		Writer:          stdout,
		ErrWriter:       stderr,
		Reader:          os.Stdin,
		Commands:        []*cli.Command{initCommand(), runCommand(), tokenCommand()},
		ExitErrHandler:  func(*cli.Context, error) {}, // the code comes from exitCode
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usageError("%q is not a command of culvert-cloudproxy; 'culvert-cloudproxy --help' lists them", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	err := app.RunContext(ctx, args)
	if err != nil {
		fmt.Fprintln(stderr, "culvert-cloudproxy:", assemble.Line(err))
	}
	return exitCode(err)
}

func usageError(format string, args ...any) error {
	return tunnel.Errorf(tunnel.ConfigInvalid, format, args...)
}

// onUsage turns what the flag package says into an error with a code.
func onUsage(name string) cli.OnUsageErrorFunc {
	return func(_ *cli.Context, err error, _ bool) error {
		return usageError("culvert-cloudproxy %s: %w; see --help", name, err)
	}
}

func exitCode(err error) int {
	switch tunnel.CodeOf(err) {
	case "":
		return 0
	case tunnel.ConfigInvalid, tunnel.PolicyInvalid:
		return 2
	}
	return 1
}
