package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"

	"culvert/policy"
	"culvert/tunnel"
)

// policyCommand shows and tries the policy. It reads files and, for nftables,
// asks DNS for the cloud proxy's address; it needs no sidecar.
func policyCommand() *cli.Command {
	source := []cli.Flag{
		&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read the policy of `FILE`: a culvert.yaml, or a file that holds only a policy", EnvVars: []string{"CULVERT_CONFIG"}},
		&cli.StringSliceFlag{Name: "profile", Usage: "add the built-in profile `NAME`: " + strings.Join(policy.Profiles(), ", ")},
	}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "print one JSON object"}
	return &cli.Command{
		Name:  "policy",
		Usage: "show which destinations are allowed, try one, or print what a firewall must open",
		Subcommands: []*cli.Command{
			{
				Name:   "show",
				Usage:  "print the rules in the order in which they decide; without a policy, the built-in profiles",
				Flags:  append(slices.Clone(source), asJSON),
				Action: policyShow,
			},
			{
				Name:      "test",
				Usage:     "say whether a destination is allowed and which rule decides (exit 0 allowed, 1 refused, 2 usage)",
				ArgsUsage: "tcp|udp HOST:PORT",
				Flags:     append(slices.Clone(source), asJSON),
				Action:    policyTest,
			},
			{
				Name:  "firewall",
				Usage: "print what IT must open with Culvert beside what that replaces",
				Flags: append(slices.Clone(source), asJSON,
					&cli.StringFlag{Name: "format", Value: "table", Usage: "`FORMAT`: " + strings.Join(policy.FirewallFormats(), ", ")},
					&cli.StringSliceFlag{Name: "cloud", Usage: "the cloud proxy is at `HOST[:PORT]` (default: cloud_proxy.address of the file; port 443)"},
				),
				Action: policyFirewall,
			},
		},
	}
}

func policyShow(c *cli.Context) error {
	if err := policyNoArguments(c); err != nil {
		return err
	}
	f, err := policyFromFlags(c)
	if err != nil {
		return err
	}
	if !f.given {
		f.policy, err = policy.New(policy.Config{Profiles: policy.Profiles()})
		if err != nil {
			return err
		}
	}
	rules := f.policy.Rules()
	if c.Bool("json") {
		out := struct {
			Profiles []string          `json:"profiles"`
			Special  []string          `json:"special"`
			Rules    []policy.RuleText `json:"rules"`
		}{append([]string{}, f.policy.Profiles()...), []string{}, []policy.RuleText{}}
		for _, p := range f.policy.Special() {
			out.Special = append(out.Special, p.String())
		}
		for i := range rules {
			out.Rules = append(out.Rules, rules[i].Text())
		}
		return policyJSON(c.App.Writer, out)
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 8, 3, ' ', 0)
	if !f.given {
		fmt.Fprintln(w, "The built-in profiles; none is in force by itself:")
	}
	fmt.Fprintln(w, "DECISION\tPROTOCOL\tTO\tPORTS\tTAG\tNAME\tFROM")
	for i := range rules {
		t := rules[i].Text()
		for j, to := range t.To {
			if j > 0 {
				fmt.Fprintf(w, "\t\t%s\t\t\t\t\n", to)
				continue
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", rules[i].Action(), rules[i].Proto, to, policyOr(t.Ports, "all"), policyOr(t.Tag, "-"), policyOr(t.Name, "-"), t.From)
		}
	}
	fmt.Fprintln(w, "deny\tany\tall else\tall\t-\t-\tdefault")
	if err := w.Flush(); err != nil {
		return err
	}
	listed := "none is listed"
	if list := f.policy.Special(); len(list) > 0 {
		var words []string
		for _, p := range list {
			words = append(words, p.String())
		}
		listed = "rules may allow those in " + strings.Join(words, ", ")
	}
	_, err = fmt.Fprintf(c.App.Writer, "\nSpecial addresses (loopback, private, link-local, metadata, ...) are refused before any rule; %s.\n", listed)
	return err
}

func policyTest(c *cli.Context) error {
	if c.NArg() != 2 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "policy test takes tcp or udp and one HOST:PORT, with flags before them: culvert policy test --profile public udp 192.0.2.1:3478")
	}
	proto, err := policy.ParseProto(c.Args().Get(0))
	if err == nil && proto == policy.Any {
		err = errors.New(`"any" is for rules; try tcp or udp`)
	}
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%w", err)
	}
	to, err := tunnel.ParseTarget(c.Args().Get(1))
	if err != nil {
		return err
	}
	f, err := policyFromFlags(c)
	if err != nil {
		return err
	}
	if !f.given {
		return tunnel.Errorf(tunnel.ConfigInvalid, "there is no policy to test; give a file with --config, or --profile %s", strings.Join(policy.Profiles(), "|"))
	}
	d := f.policy.Decide(proto, to)
	word := "refused"
	switch {
	case d.Undecided:
		word = "undecided"
	case d.Allow:
		word = "allowed"
	}
	if c.Bool("json") {
		out := struct {
			Decision string           `json:"decision"`
			Protocol string           `json:"protocol"`
			To       string           `json:"to"`
			Reason   string           `json:"reason"`
			Tag      string           `json:"tag,omitempty"`
			Special  string           `json:"special,omitempty"`
			Rule     *policy.RuleText `json:"rule,omitempty"`
		}{word, proto.String(), to.String(), d.Reason, d.Tag, d.Class, nil}
		if d.Rule != nil {
			text := d.Rule.Text()
			out.Rule = &text
		}
		err = policyJSON(c.App.Writer, out)
	} else {
		tag := ""
		if d.Tag != "" {
			tag = "; its traffic is tagged " + d.Tag
		}
		_, err = fmt.Fprintf(c.App.Writer, "%s: %s %s: %s%s\n", word, proto, to, d.Reason, tag)
	}
	if err == nil && !d.Allow {
		err = policy.Denied(proto, to, d)
	}
	return err
}

func policyFirewall(c *cli.Context) error {
	if err := policyNoArguments(c); err != nil {
		return err
	}
	format := c.String("format")
	if c.Bool("json") {
		format = "json"
	}
	if !slices.Contains(policy.FirewallFormats(), format) {
		return policy.Firewall{}.Write(io.Discard, format) // its error names the formats
	}
	f, err := policyFromFlags(c)
	if err != nil {
		return err
	}
	if !f.given {
		return tunnel.Errorf(tunnel.ConfigInvalid, "there is no policy to compare with; give a file with --config, or --profile %s", strings.Join(policy.Profiles(), "|"))
	}
	addresses := f.cloud
	if c.IsSet("cloud") {
		addresses = c.StringSlice("cloud")
	}
	if len(addresses) == 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the cloud proxy's address is not known; give it with --cloud HOST[:PORT]")
	}
	var cloud []policy.CloudProxy
	for _, s := range addresses {
		to, err := policyCloud(s)
		if err != nil {
			return err
		}
		proxy := policy.CloudProxy{Target: to}
		if format == "nftables" && !to.Addr.IsValid() {
			ctx, cancel := context.WithTimeout(c.Context, 5*time.Second)
			proxy.Addrs, err = net.DefaultResolver.LookupNetIP(ctx, "ip", to.Host)
			cancel()
			if err != nil {
				return tunnel.Errorf(tunnel.NameUnresolved, "nftables needs the address of the cloud proxy %q, but it was not found (%w); give it with --cloud ADDRESS:PORT", to.Host, err)
			}
		}
		cloud = append(cloud, proxy)
	}
	return f.policy.Firewall(cloud...).Write(c.App.Writer, format)
}

// policyFile is what this command knows of a configuration.
type policyFile struct {
	policy *policy.Policy
	cloud  []string // cloud_proxy.address
	given  bool     // a file or a profile was named
}

func policyFromFlags(c *cli.Context) (policyFile, error) {
	var f policyFile
	var config policy.Config
	file := c.String("config")
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return f, tunnel.Errorf(tunnel.ConfigInvalid, "the configuration can not be read: %w", err)
		}
		if config, f.cloud, err = readPolicyFile(data); err != nil {
			return f, policy.InFile(file, err)
		}
		for i := range config.Rules {
			config.Rules[i].File = file
		}
	}
	config.Profiles = append(config.Profiles, c.StringSlice("profile")...)
	f.given = file != "" || len(config.Profiles) > 0
	var err error
	f.policy, err = policy.New(config)
	return f, err
}

// readPolicyFile reads a culvert.yaml, of which it looks at two sections only,
// or a file that holds nothing but a policy.
func readPolicyFile(data []byte) (policy.Config, []string, error) {
	var sections struct {
		CloudProxy yaml.Node `yaml:"cloud_proxy"`
		Policy     yaml.Node `yaml:"policy"`
	}
	var config policy.Config
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		return config, nil, err
	}
	if root.Decode(&sections) != nil || sections.CloudProxy.IsZero() && sections.Policy.IsZero() {
		return config, nil, yaml.Unmarshal(data, &config)
	}
	var cloud []string
	if !sections.CloudProxy.IsZero() {
		var err error
		if cloud, err = cloudAddresses(&sections.CloudProxy); err != nil {
			return config, nil, err
		}
	}
	if sections.Policy.IsZero() {
		return config, cloud, nil
	}
	return config, cloud, sections.Policy.Decode(&config)
}

// cloudAddresses reads cloud_proxy.address: one, or a list.
func cloudAddresses(n *yaml.Node) ([]string, error) {
	var section struct {
		Address yaml.Node `yaml:"address"`
	}
	if err := n.Decode(&section); err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "line %d: cloud_proxy is not a mapping with an address", n.Line)
	}
	var list []string
	var one string
	switch {
	case section.Address.IsZero():
	case section.Address.Decode(&one) == nil:
		list = []string{one}
	case section.Address.Decode(&list) != nil:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "line %d: cloud_proxy.address is neither HOST:PORT nor a list of them", section.Address.Line)
	}
	return list, nil
}

// policyCloud reads HOST[:PORT]; the port is 443 unless given.
func policyCloud(s string) (tunnel.Target, error) {
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return tunnel.Target{Addr: a, Port: 443}, nil
	}
	if !strings.Contains(s, ":") {
		s += ":443"
	}
	return tunnel.ParseTarget(s)
}

func policyNoArguments(c *cli.Context) error {
	if c.NArg() == 0 {
		return nil
	}
	return tunnel.Errorf(tunnel.ConfigInvalid, "policy %s takes flags only, not %q", c.Command.Name, c.Args().First())
}

func policyJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func policyOr(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
