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

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/tunnel"
)

// policyCommand shows and tries the policy. It reads files and, for packet filters,
// asks DNS for the cloud proxy's address; it needs no sidecar.
func policyCommand() *cli.Command {
	source := []cli.Flag{
		&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read the policy of `FILE`: a culvert.yaml, or a file that holds only a policy", EnvVars: []string{"CULVERT_CONFIG"}},
		&cli.StringSliceFlag{Name: "profile", Usage: "add the built-in profile `NAME`: " + strings.Join(policy.Profiles(), ", ")},
	}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "print one JSON object"}
	return &cli.Command{
		Name:  "policy",
		Usage: "show which destinations are allowed, try one, compare two policies, or print what a firewall must open",
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
				Flags: append(slices.Clone(source), asJSON,
					&cli.StringFlag{Name: "app", Usage: "in a cloudproxy.yaml, judge by the policy of the App `ID`"}),
				Action: policyTest,
			},
			{
				Name:      "diff",
				Usage:     "say what changes from one policy to another (exit 0 nothing, 1 something, 2 usage)",
				ArgsUsage: "A B",
				Flags:     []cli.Flag{asJSON},
				Action:    policyDiff,
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
	if f.policy == policy.Elsewhere() && !c.Bool("json") {
		_, err := fmt.Fprintln(c.App.Writer, "This file has no policy: the sidecar lets everything pass, and the cloud proxy decides.")
		return err
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
	d := f.policy.Explain(proto, to)
	word := policyWord(policy.Decision{Allow: d.Allow, Undecided: d.Undecided})
	if c.Bool("json") {
		out := struct {
			Decision string           `json:"decision"`
			Protocol string           `json:"protocol"`
			To       string           `json:"to"`
			Reason   string           `json:"reason"`
			Tag      string           `json:"tag,omitempty"`
			Special  string           `json:"special,omitempty"`
			Rule     *policy.RuleText `json:"rule,omitempty"`
			// What else there is for this destination.
			Also []policy.RuleText `json:"also_match,omitempty"`
			Near []policyNear      `json:"do_not_match,omitempty"`
		}{word, proto.String(), to.String(), d.Reason, d.Tag, d.Class, nil, nil, nil}
		for i := range d.Also {
			out.Also = append(out.Also, d.Also[i].Text())
		}
		for i := range d.Near {
			out.Near = append(out.Near, policyNear{d.Near[i].Rule.Text(), d.Near[i].Not})
		}
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
		var b strings.Builder
		fmt.Fprintf(&b, "%s: %s %s: %s%s\n", word, proto, to, d.Reason, tag)
		for i := range d.Also {
			fmt.Fprintf(&b, "  also matches, but comes later: %s\n", &d.Also[i])
		}
		for i := range d.Near {
			fmt.Fprintf(&b, "  same destination, other %s: %s\n", d.Near[i].Not, &d.Near[i].Rule)
		}
		_, err = io.WriteString(c.App.Writer, b.String())
	}
	if err == nil && !d.Allow {
		err = policy.Denied(proto, to, d.Decision)
	}
	return err
}

// policyNear is a rule for the same destination that does not match.
type policyNear struct {
	Rule policy.RuleText `json:"rule"`
	Not  string          `json:"because_of"` // "protocol" or "ports"
}

// policyFlip is a destination that two policies judge differently.
type policyFlip struct {
	Protocol string `json:"protocol"`
	To       string `json:"to"`
	Before   string `json:"before"`
	After    string `json:"after"`
	Why      string `json:"why"` // the reason of the second
}

func policyDiff(c *cli.Context) error {
	if c.NArg() != 2 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "policy diff takes two files, or names of built-in profiles: culvert policy diff old.yaml culvert.yaml")
	}
	var both [2]*policy.Policy
	for i, name := range c.Args().Slice() {
		p, err := policyNamed(name)
		if err != nil {
			return err
		}
		both[i] = p
	}
	d := policy.Diff(both[0], both[1])
	flips := []policyFlip{}
	for _, f := range d.Flips {
		flips = append(flips, policyFlip{f.Proto.String(), f.To.String(), policyWord(f.Before), policyWord(f.After), f.After.Reason})
	}
	var err error
	if c.Bool("json") {
		texts := func(rules []policy.Rule) []policy.RuleText {
			all := []policy.RuleText{}
			for i := range rules {
				all = append(all, rules[i].Text())
			}
			return all
		}
		words := func(list []netip.Prefix) []string {
			all := []string{}
			for _, p := range list {
				all = append(all, p.String())
			}
			return all
		}
		err = policyJSON(c.App.Writer, struct {
			Same           bool              `json:"same"`
			Removed        []policy.RuleText `json:"removed"`
			Added          []policy.RuleText `json:"added"`
			SpecialRemoved []string          `json:"special_removed"`
			SpecialAdded   []string          `json:"special_added"`
			Destinations   []policyFlip      `json:"destinations"`
		}{d.Same(), texts(d.Removed), texts(d.Added), words(d.SpecialRemoved), words(d.SpecialAdded), flips})
	} else {
		var b strings.Builder
		for i := range d.Removed {
			fmt.Fprintf(&b, "- %s\n", &d.Removed[i])
		}
		for i := range d.Added {
			fmt.Fprintf(&b, "+ %s\n", &d.Added[i])
		}
		for _, p := range d.SpecialRemoved {
			fmt.Fprintf(&b, "- special %s\n", p)
		}
		for _, p := range d.SpecialAdded {
			fmt.Fprintf(&b, "+ special %s\n", p)
		}
		const most = 100
		for i, f := range flips {
			if i == most {
				fmt.Fprintf(&b, "and %d more destinations; --json has all\n", len(flips)-most)
				break
			}
			fmt.Fprintf(&b, "%s %s: %s, was %s: %s\n", f.Protocol, f.To, f.After, f.Before, f.Why)
		}
		if d.Same() {
			b.WriteString("The policies are the same.\n")
		}
		_, err = io.WriteString(c.App.Writer, b.String())
	}
	if err == nil && !d.Same() {
		err = errDiffers
	}
	return err
}

// errDiffers makes the exit code 1, as diff's.
var errDiffers = errors.New("the policies differ")

// policyWord is a decision in one word.
func policyWord(d policy.Decision) string {
	word := "refused"
	switch {
	case d.Undecided:
		word = "undecided"
	case d.Allow:
		word = "allowed"
	}
	if d.Tag != "" {
		word += " (" + d.Tag + ")"
	}
	return word
}

// policyNamed reads a policy from a file, or makes a built-in profile's.
func policyNamed(name string) (*policy.Policy, error) {
	if slices.Contains(policy.Profiles(), name) {
		if _, err := os.Stat(name); err != nil {
			return policy.New(policy.Config{Profiles: []string{name}})
		}
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the policy can not be read: %w", err)
	}
	f, err := readPolicyFile(data, "")
	if err != nil {
		return nil, policy.InFile(name, err)
	}
	for i := range f.config.Rules {
		f.config.Rules[i].File = name
	}
	p, err := f.make()
	if err != nil {
		return nil, policy.InFile(name, err)
	}
	return p, nil
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
		if policy.NeedsAddresses(format) && !to.Addr.IsValid() {
			ctx, cancel := context.WithTimeout(c.Context, 5*time.Second)
			proxy.Addrs, err = net.DefaultResolver.LookupNetIP(ctx, "ip", to.Host)
			cancel()
			if err != nil {
				return tunnel.Errorf(tunnel.NameUnresolved, "%s needs the address of the cloud proxy %q, but it was not found (%w); give it with --cloud ADDRESS:PORT", format, to.Host, err)
			}
		}
		cloud = append(cloud, proxy)
	}
	return f.policy.Firewall(cloud...).Write(c.App.Writer, format)
}

// policyFile is what this command knows of a configuration.
type policyFile struct {
	policy  *policy.Policy
	config  policy.Config
	cloud   []string // cloud_proxy.address
	sidecar bool     // it is a sidecar's
	given   bool     // a file or a profile was named
}

// make makes the policy, as the end would whose configuration it is.
func (f *policyFile) make() (*policy.Policy, error) {
	if f.sidecar {
		return assemble.OwnPolicy(f.config)
	}
	return policy.New(f.config)
}

func policyFromFlags(c *cli.Context) (policyFile, error) {
	var f policyFile
	file := c.String("config")
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return f, tunnel.Errorf(tunnel.ConfigInvalid, "the configuration can not be read: %w", err)
		}
		if f, err = readPolicyFile(data, c.String("app")); err != nil {
			return f, policy.InFile(file, err)
		}
		for i := range f.config.Rules {
			f.config.Rules[i].File = file
		}
	}
	f.config.Profiles = append(f.config.Profiles, c.StringSlice("profile")...)
	f.given = file != "" || len(f.config.Profiles) > 0
	var err error
	f.policy, err = f.make()
	return f, err
}

// policyApp is what this command knows of an App ID.
type policyApp struct {
	ID     string         `yaml:"id"`
	Policy *policy.Config `yaml:"policy"`
}

// readPolicyFile reads a culvert.yaml or cloudproxy.yaml, of which it looks at
// some sections only, or a file that holds nothing but a policy. With an App ID
// the policy is that App's.
func readPolicyFile(data []byte, app string) (f policyFile, err error) {
	var sections struct {
		Apps       []policyApp `yaml:"apps"`
		CloudProxy yaml.Node   `yaml:"cloud_proxy"`
		Policy     yaml.Node   `yaml:"policy"`
	}
	var root yaml.Node
	if err := yaml.Unmarshal(data, &root); err != nil {
		return f, err
	}
	if err := root.Decode(&sections); err != nil && app != "" {
		return f, err
	} else if app == "" && (err != nil || sections.CloudProxy.IsZero() && sections.Policy.IsZero()) {
		return f, yaml.Unmarshal(data, &f.config)
	}
	for _, a := range sections.Apps {
		if a.ID == app && a.Policy != nil {
			f.config = *a.Policy
			return f, nil
		}
	}
	if app != "" && len(sections.Apps) > 0 && !slices.ContainsFunc(sections.Apps, func(a policyApp) bool { return a.ID == app }) {
		return f, tunnel.Errorf(tunnel.ConfigInvalid, "the App ID %.80q is not among apps, so it is not served; name one that is", app)
	}
	if !sections.CloudProxy.IsZero() {
		f.sidecar = true
		if f.cloud, err = cloudAddresses(&sections.CloudProxy); err != nil {
			return f, err
		}
	}
	if sections.Policy.IsZero() {
		return f, nil
	}
	return f, sections.Policy.Decode(&f.config)
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

// policyCloud reads HOST[:PORT] or wss://HOST[:PORT]/PATH; the port is 443 unless
// given.
func policyCloud(s string) (tunnel.Target, error) {
	if !strings.Contains(s, "://") {
		s = config.WithPort(s)
	}
	to, _, err := tunnel.ParseAddress(s)
	if err == nil {
		err = config.CheckAddress(to.String())
	}
	return to, err
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
