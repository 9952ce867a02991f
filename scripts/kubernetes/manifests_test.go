package kubernetes

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// kinds are the only ones that a manifest here may hold.
var kinds = map[string]func() metav1.Object{
	"v1 ConfigMap":                  func() metav1.Object { return new(corev1.ConfigMap) },
	"v1 Secret":                     func() metav1.Object { return new(corev1.Secret) },
	"v1 Service":                    func() metav1.Object { return new(corev1.Service) },
	"apps/v1 Deployment":            func() metav1.Object { return new(appsv1.Deployment) },
	"apps/v1 StatefulSet":           func() metav1.Object { return new(appsv1.StatefulSet) },
	"policy/v1 PodDisruptionBudget": func() metav1.Object { return new(policyv1.PodDisruptionBudget) },
}

// decode reads all documents of a manifest; an unknown or doubled key is an error.
func decode(data []byte) ([]metav1.Object, error) {
	var objects []metav1.Object
	docs := yamlutil.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		var head metav1.TypeMeta
		if err := yaml.Unmarshal(doc, &head); err != nil {
			return nil, err
		}
		if head == (metav1.TypeMeta{}) {
			continue // comments only
		}
		make, ok := kinds[head.APIVersion+" "+head.Kind]
		if !ok {
			return nil, fmt.Errorf("%s %s is no kind that this test knows; add it to kinds", head.APIVersion, head.Kind)
		}
		object := make()
		if err := yaml.UnmarshalStrict(doc, object); err != nil {
			return nil, fmt.Errorf("%s: %w", head.Kind, err)
		}
		if object.GetName() == "" {
			return nil, fmt.Errorf("a %s has no name", head.Kind)
		}
		objects = append(objects, object)
	}
}

func manifest(t *testing.T, file string) []metav1.Object {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := decode(data)
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return objects
}

// all returns the objects of one type by name.
func all[T metav1.Object](objects []metav1.Object) map[string]T {
	found := map[string]T{}
	for _, o := range objects {
		if o, ok := o.(T); ok {
			found[o.GetName()] = o
		}
	}
	return found
}

func TestUnknownAndDoubledKeysAreRefused(t *testing.T) {
	for name, doc := range map[string]string{
		"unknown key":  "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {externalTraficPolicy: Local}\n",
		"doubled key":  "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {type: ClusterIP, type: NodePort}\n",
		"unknown kind": "apiVersion: v2\nkind: Service\nmetadata: {name: x}\n",
		"wrong type":   "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: https}]}\n",
	} {
		if _, err := decode([]byte(doc)); err == nil {
			t.Errorf("%s: decoded without an error", name)
		}
	}
}

// pods returns the pod templates of every manifest here, by file and name.
func pods(t *testing.T) map[string]corev1.PodSpec {
	t.Helper()
	files, err := filepath.Glob("*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests here: %v", err)
	}
	found := map[string]corev1.PodSpec{}
	for _, file := range files {
		objects := manifest(t, file)
		for name, d := range all[*appsv1.Deployment](objects) {
			found[file+" "+name] = checkedTemplate(t, d.Spec.Selector, d.Spec.Template)
		}
		for name, s := range all[*appsv1.StatefulSet](objects) {
			found[file+" "+name] = checkedTemplate(t, s.Spec.Selector, s.Spec.Template)
		}
	}
	return found
}

func checkedTemplate(t *testing.T, selector *metav1.LabelSelector, template corev1.PodTemplateSpec) corev1.PodSpec {
	t.Helper()
	if selector == nil || !maps.Equal(selector.MatchLabels, template.Labels) {
		t.Errorf("the selector %v does not match the labels %v of its own pods", selector, template.Labels)
	}
	return template.Spec
}

func TestNothingIsPrivilegedBeyondItsNeed(t *testing.T) {
	for name, pod := range pods(t) {
		s := pod.SecurityContext
		if s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.RunAsUser == nil || *s.RunAsUser == 0 {
			t.Errorf("%s: the pod must run as a numeric user that is not root", name)
		}
		if s == nil || s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			t.Errorf("%s: the pod must have the seccomp profile RuntimeDefault", name)
		}
		if pod.HostNetwork || pod.HostPID || pod.HostIPC {
			t.Errorf("%s: the pod must not share the host's namespaces", name)
		}
		if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
			t.Errorf("%s: the pod needs no service account token", name)
		}
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			may := privileges[name+" "+c.Name]
			s := c.SecurityContext
			switch {
			case s == nil:
				t.Errorf("%s: container %s has no securityContext", name, c.Name)
				continue
			case s.Privileged != nil && *s.Privileged:
				t.Errorf("%s: container %s is privileged", name, c.Name)
			case s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation != may.escalate:
				t.Errorf("%s: container %s: allowPrivilegeEscalation must be %t", name, c.Name, may.escalate)
			case s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
				t.Errorf("%s: container %s may write to its image", name, c.Name)
			case s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(s.Capabilities.Add, may.capabilities):
				t.Errorf("%s: container %s must drop ALL capabilities and add %q", name, c.Name, may.capabilities)
			}
			if root := s.RunAsUser != nil && *s.RunAsUser == 0; root != may.root {
				t.Errorf("%s: container %s runs as root: %t, want %t", name, c.Name, root, may.root)
			}
		}
	}
}

// privileges are what containers need beyond none.
var privileges = map[string]struct {
	root, escalate bool
	capabilities   []corev1.Capability
}{
	"sidecar-capture.yaml app capture": {root: true, capabilities: []corev1.Capability{"NET_ADMIN"}},
	// A file capability counts only with escalation, see the manifest.
	"sidecar-capture.yaml app culvert": {escalate: true, capabilities: []corev1.Capability{"NET_RAW"}},
}

func TestVolumesFitTogether(t *testing.T) {
	for name, pod := range pods(t) {
		var volumes []string
		for _, v := range pod.Volumes {
			volumes = append(volumes, v.Name)
		}
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			for _, m := range c.VolumeMounts {
				if !slices.Contains(volumes, m.Name) {
					t.Errorf("%s: container %s mounts volume %s, which the pod does not have", name, c.Name, m.Name)
				}
			}
		}
	}
}

func TestSidecarIsNativeAndTheAppWaitsForItsCall(t *testing.T) {
	for file, inits := range map[string]int{"sidecar.yaml": 1, "sidecar-capture.yaml": 2} {
		t.Run(file, func(t *testing.T) { nativeAndWaitedFor(t, appPod(t, file, inits)) })
	}
}

// appPod returns the pod of a manifest with one Deployment.
func appPod(t *testing.T, file string, inits int) corev1.PodSpec {
	t.Helper()
	deployments := all[*appsv1.Deployment](manifest(t, file))
	if len(deployments) != 1 {
		t.Fatalf("%s has %d deployments, want 1", file, len(deployments))
	}
	pod := deployments["app"].Spec.Template.Spec
	if len(pod.InitContainers) != inits {
		t.Fatalf("%s has %d init containers, want %d", file, len(pod.InitContainers), inits)
	}
	return pod
}

func TestCaptureSparesTheSidecarAndTheCluster(t *testing.T) {
	pod := appPod(t, "sidecar-capture.yaml", 2)
	rules, sidecar := pod.InitContainers[0], pod.InitContainers[1]
	if rules.RestartPolicy != nil || rules.Image != sidecar.Image {
		t.Error("the rules must be set by an init container that ends, from the sidecar's image")
	}
	if len(rules.Args) < 2 || !slices.Equal(rules.Args[:2], []string{"capture", "on"}) {
		t.Fatalf("the init container runs %q; it must be culvert capture on", rules.Args)
	}
	for _, flag := range []string{"--all", "--without-sidecar"} {
		if !slices.Contains(rules.Args, flag) {
			t.Errorf("culvert capture on must have %s", flag)
		}
	}
	user := sidecar.SecurityContext.RunAsUser
	if user == nil || after(rules.Args, "--sidecar-user") != fmt.Sprint(*user) {
		t.Errorf("--sidecar-user must be the user that the sidecar runs as, %v", user)
	}
	for _, c := range pod.Containers {
		as := pod.SecurityContext.RunAsUser
		if c.SecurityContext.RunAsUser != nil {
			as = c.SecurityContext.RunAsUser
		}
		if user != nil && *as == *user {
			t.Errorf("container %s runs as the sidecar's user, whose traffic is not captured", c.Name)
		}
	}
	excepted := 0
	for i, arg := range rules.Args {
		if arg != "--except" {
			continue
		}
		excepted++
		if _, err := netip.ParsePrefix(rules.Args[i+1]); err != nil {
			t.Errorf("--except: %v", err)
		}
	}
	if excepted == 0 {
		t.Error("the cluster's own ranges must be left alone (--except), its DNS among them")
	}
}

func nativeAndWaitedFor(t *testing.T, pod corev1.PodSpec) {
	sidecar := pod.InitContainers[len(pod.InitContainers)-1]
	if sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Error("the sidecar must have restartPolicy: Always, else the pod waits for it to end before the app starts")
	}
	socket := asked(t, sidecar.StartupProbe, "startupProbe")
	if got := after(sidecar.Args, "--control"); got != socket {
		t.Errorf("the startupProbe asks %q, the sidecar listens on %q", socket, got)
	}
	if got := asked(t, sidecar.ReadinessProbe, "readinessProbe"); got != socket {
		t.Errorf("the probes ask %q and %q; they must ask one control socket", socket, got)
	}

	app := pod.Containers[0]
	if app.Lifecycle == nil || app.Lifecycle.PreStop == nil || app.Lifecycle.PreStop.Exec == nil {
		t.Fatal("the app needs a preStop that waits for its channel to end")
	}
	command := app.Lifecycle.PreStop.Exec.Command
	if len(command) < 3 || !slices.Equal(command[1:3], []string{"channel", "wait"}) {
		t.Errorf("the app's preStop is %q; it must be culvert channel wait", command)
	}
	if got := after(command, "--control"); got != socket {
		t.Errorf("the app's preStop asks %q, the sidecar listens on %q", got, socket)
	}
	wait, err := time.ParseDuration(after(command, "--for"))
	if err != nil {
		t.Fatalf("the app's preStop has no limit: %v", err)
	}
	if grace := pod.TerminationGracePeriodSeconds; grace == nil || time.Duration(*grace)*time.Second <= wait {
		t.Errorf("terminationGracePeriodSeconds must be longer than the %v that preStop may take", wait)
	}

	for _, c := range []corev1.Container{sidecar, app} {
		if !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
			return m.MountPath == filepath.Dir(socket) && m.Name == "run" && !m.ReadOnly
		}) {
			t.Errorf("container %s must mount the shared volume run at %s, where the control socket is", c.Name, filepath.Dir(socket))
		}
	}
	program := command[0]
	if !slices.ContainsFunc(app.VolumeMounts, func(m corev1.VolumeMount) bool {
		return strings.HasPrefix(program, m.MountPath+"/") && slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool {
			return v.Name == m.Name && v.Image != nil && v.Image.Reference == sidecar.Image
		})
	}) {
		t.Errorf("the app's preStop runs %s, which must come from a volume of the sidecar's image %s", program, sidecar.Image)
	}
}

func TestEachCloudProxyHasItsOwnAddressOnBothProtocols(t *testing.T) {
	objects := manifest(t, "cloudproxy.yaml")
	sets := all[*appsv1.StatefulSet](objects)
	services := all[*corev1.Service](objects)
	configs := all[*corev1.ConfigMap](objects)
	if len(sets) != 1 {
		t.Fatalf("cloudproxy.yaml has %d StatefulSets, want 1", len(sets))
	}
	for name, set := range sets {
		if set.Spec.Replicas == nil || *set.Spec.Replicas < 2 {
			t.Fatal("the example must have two cloud proxies at least, to show how they are told apart")
		}
		if s := services[set.Spec.ServiceName]; s == nil || s.Spec.ClusterIP != corev1.ClusterIPNone {
			t.Errorf("the StatefulSet's serviceName %q must be a headless Service", set.Spec.ServiceName)
		}
		container := set.Spec.Template.Spec.Containers[0]
		for _, probe := range []*corev1.Probe{container.StartupProbe, container.ReadinessProbe} {
			if probe == nil || probe.TCPSocket == nil {
				t.Error("the cloud proxy must have a startupProbe and a readinessProbe on its TCP port")
			}
		}
		ports := map[string]corev1.ContainerPort{}
		for _, p := range container.Ports {
			ports[p.Name] = p
		}

		for i := range *set.Spec.Replicas {
			pod := fmt.Sprintf("%s-%d", name, i)
			config, ok := configs[name].Data[pod+".yaml"]
			if !ok {
				t.Errorf("pod %s has no configuration %s.yaml", pod, pod)
			}
			if !strings.Contains(config, "address: "+pod) {
				t.Errorf("pod %s must tell sidecars an address of its own", pod)
			}
			var service *corev1.Service
			for _, s := range services {
				if s.Spec.Selector["statefulset.kubernetes.io/pod-name"] == pod {
					service = s
				}
			}
			if service == nil {
				t.Errorf("pod %s has no Service of its own, so a Join could reach another pod", pod)
				continue
			}
			if len(service.Spec.Selector) != 1 {
				t.Errorf("service %s must select by the pod's name alone", service.Name)
			}
			if service.Spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
				t.Errorf("service %s must have externalTrafficPolicy: Local, else the sidecar's address is lost", service.Name)
			}
			open := map[corev1.Protocol]bool{}
			for _, p := range service.Spec.Ports {
				to, ok := ports[p.TargetPort.StrVal]
				if p.Port == 443 && ok && to.Protocol == p.Protocol {
					open[p.Protocol] = true
				}
			}
			if !open[corev1.ProtocolUDP] || !open[corev1.ProtocolTCP] {
				t.Errorf("service %s must have port 443 for UDP and for TCP, leading to the pod's ports of that protocol; it has %v", service.Name, open)
			}
		}
	}
	for name, s := range services {
		if pod, ok := s.Spec.Selector["statefulset.kubernetes.io/pod-name"]; !ok && s.Spec.ClusterIP != corev1.ClusterIPNone {
			t.Errorf("service %s spreads over pods (%q); a Join would reach any of them", name, pod)
		}
	}
}

// asked returns the control socket that a probe asks.
func asked(t *testing.T, p *corev1.Probe, name string) string {
	t.Helper()
	if p == nil || p.Exec == nil || !slices.Contains(p.Exec.Command, "--ready") {
		t.Fatalf("the sidecar needs a %s that runs culvert status --ready", name)
	}
	return after(p.Exec.Command, "--control")
}

// after returns what follows a flag.
func after(command []string, flag string) string {
	if i := slices.Index(command, flag); i >= 0 && i+1 < len(command) {
		return command[i+1]
	}
	return ""
}
