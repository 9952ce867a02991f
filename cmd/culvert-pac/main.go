// Command culvert-pac says by which proxies a host is reached, according to a
// proxy auto-configuration (PAC) file on its standard input:
//
//	culvert-pac cloud.example.net < proxy.pac
//	PROXY proxy.example.net:3128; DIRECT
//
// With --mark the packets by which it looks up names have that mark (SO_MARK), where
// it may set one: by it culvert's rules leave them alone where they capture traffic.
//
// culvert runs it where proxy.pac is set. It is a program of its own because such
// a file is a program too, which comes from the network: here it runs without the
// sidecar's keys, in bounded time and memory, and the JavaScript engine, as large
// as half a sidecar, is not in those that need none.
//
// It promises the functions that such files may call and an end within a few
// seconds. It does not fetch anything, and connects to nothing but DNS.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/dop251/goja"

	"culvert/sidecar/capture"
)

const (
	maxScript = 1 << 20 // bytes
	maxAnswer = 4 << 10 // bytes
	maxTime   = 3 * time.Second
	maxDepth  = 1000      // of calls
	memory    = 512 << 20 // bytes
)

func main() {
	debug.SetMemoryLimit(memory / 4)
	limitMemory(memory) // what does not keep to that ends
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "culvert-pac:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	flags := flag.NewFlagSet("culvert-pac", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	mark := flags.Uint("mark", 0, "")
	if flags.Parse(args) != nil || flags.NArg() != 1 || uint64(*mark) > math.MaxUint32 {
		return errors.New("usage: culvert-pac [--mark NUMBER] HOST < FILE")
	}
	script, err := io.ReadAll(io.LimitReader(in, maxScript+1))
	switch {
	case err != nil:
		return err
	case len(script) > maxScript:
		return fmt.Errorf("the PAC file is longer than %d bytes", maxScript)
	}
	ctx, cancel := context.WithTimeout(context.Background(), maxTime)
	defer cancel()
	answer, err := find(ctx, string(script), flags.Arg(0), world{now: time.Now(), lookup: resolver(uint32(*mark)).LookupHost, own: ownAddress})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, answer)
	return err
}

// resolver looks names up by packets with a mark, where there is to be one and this
// process may set it.
func resolver(mark uint32) *net.Resolver {
	if mark == 0 || capture.MayMark() != nil {
		return net.DefaultResolver
	}
	return capture.Resolver(mark)
}

func failure(err error) error {
	if errors.As(err, new(*goja.StackOverflowError)) { // its text says nothing
		return fmt.Errorf("the PAC file fails: a function calls itself more than %d times", maxDepth)
	}
	return fmt.Errorf("the PAC file fails: %w", err)
}

// find asks the script. Of the URL it is given the scheme and the host alone, as
// browsers do with https.
func find(ctx context.Context, script, host string, w world) (answer string, err error) {
	vm := goja.New()
	vm.SetMaxCallStackSize(maxDepth)
	defer context.AfterFunc(ctx, func() { vm.Interrupt("it takes too long") })()
	for name, f := range w.functions(ctx) {
		if err := vm.Set(name, f); err != nil {
			return "", err
		}
	}
	if _, err := vm.RunString(script); err != nil {
		return "", failure(err)
	}
	ask, ok := goja.AssertFunction(vm.Get("FindProxyForURL"))
	if !ok {
		return "", errors.New("the PAC file has no FindProxyForURL")
	}
	url := "https://" + host + "/"
	if strings.Contains(host, ":") {
		url = "https://[" + host + "]/"
	}
	value, err := ask(goja.Undefined(), vm.ToValue(url), vm.ToValue(host))
	if err != nil {
		return "", failure(err)
	}
	if goja.IsNull(value) || goja.IsUndefined(value) {
		return "DIRECT", nil
	}
	answer = value.String()
	if len(answer) > maxAnswer || strings.ContainsAny(answer, "\r\n") {
		return "", errors.New("what the PAC file answers is no list of proxies")
	}
	return answer, nil
}
