package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"culvert/tunnel"
)

// MaxMessage is the largest control message, in bytes of JSON.
const MaxMessage = 16 << 10

// Version is a protocol version. A peer of another major version is refused;
// of a newer minor version unknown fields and messages are ignored.
type Version struct{ Major, Minor int }

// Current is what this code speaks.
var Current = Version{1, 1}

// String returns "major.minor".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// MarshalText implements encoding.TextMarshaler.
func (v Version) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (v *Version) UnmarshalText(b []byte) error {
	var rest string
	if n, _ := fmt.Sscanf(string(b)+"\n", "%d.%d%s", &v.Major, &v.Minor, &rest); n != 2 || v.Major < 0 || v.Minor < 0 {
		return fmt.Errorf("%.20q is not a version", b)
	}
	return nil
}

// Message is one control message. Exactly one field is set.
type Message struct {
	// The opening exchange, on a candidate.
	Open     *Open     `json:"open,omitempty"`
	Join     *Join     `json:"join,omitempty"`
	Welcome  *Welcome  `json:"welcome,omitempty"`
	Redirect *Redirect `json:"redirect,omitempty"`
	Refused  *Refused  `json:"refused,omitempty"`

	// The first message on a carrier's stream says what the stream is for.
	Control *Control `json:"control,omitempty"`
	Stream  *Stream  `json:"stream,omitempty"`
	Opened  *Opened  `json:"opened,omitempty"`
	Resume  *Resume  `json:"resume,omitempty"`
	Resumed *Resumed `json:"resumed,omitempty"`

	// On the control stream.
	Closed  *Closed  `json:"closed,omitempty"`
	GoAway  *GoAway  `json:"go_away,omitempty"`
	Renew   *Renew   `json:"renew,omitempty"`
	Renewed *Renewed `json:"renewed,omitempty"`
	End     *End     `json:"end,omitempty"`
}

// Open asks for a session, bound to the key of the TLS client certificate.
type Open struct {
	Version  Version `json:"version"`
	App      string  `json:"app"`
	Token    string  `json:"token"` // a secret
	Region   string  `json:"region,omitempty"`
	Operator string  `json:"operator,omitempty"`
	// Instance is drawn at random when the sidecar starts, so that another one
	// with a copy of its key is told from it; empty: it does not say.
	Instance string `json:"instance,omitempty"`
	// Sealed are the AEADs that the sidecar takes for sealed packets on this
	// connection, best first; empty: none.
	Sealed []string `json:"sealed,omitempty"`
}

// Join brings another connection to a session. The TLS client certificate must
// hold the key that the session is bound to.
type Join struct {
	Version Version `json:"version"`
	Session string  `json:"session"`
	As      string  `json:"as"`
	// Sealed is as in Open, for this connection.
	Sealed []string `json:"sealed,omitempty"`
}

// What a connection joins as.
const (
	AsLane    = "lane"    // it carries datagrams only
	AsCarrier = "carrier" // it is one more carrier
)

// Welcome answers Open and Join.
type Welcome struct {
	Version Version            `json:"version"`
	Session string             `json:"session"`
	Limits  Limits             `json:"limits,omitzero"`
	Address string             `json:"address,omitempty"` // HOST:PORT of this very instance, to which every Join goes
	Region  string             `json:"region,omitempty"`
	Proxies []tunnel.ProxyAddr `json:"cloud_proxies,omitempty"` // the proxy information, in order of preference
	Sealed  *Sealed            `json:"sealed,omitempty"`        // what sealed packets on this connection are made with; nil: there are none
	Lanes   int                `json:"lanes,omitempty"`         // how many lanes serve this cloud proxy's TCP best; 0: it does not say
}

// Sealed says how sealed packets on a connection are made (PROTOCOL.md 5.4).
type Sealed struct {
	AEAD  string `json:"aead"`
	Nonce string `json:"nonce"` // 16 bytes in hex, fresh for each Open and Join
}

// The AEADs of sealed packets.
const (
	AES128GCM        = "aes-128-gcm"
	ChaCha20Poly1305 = "chacha20-poly1305"
)

// Limits are the session's bounds at the cloud proxy.
type Limits struct {
	Associations int `json:"associations"`
	Streams      int `json:"streams"`
	// Memory is how many bytes of all its streams the sidecar may have under way:
	// sent and not taken yet by their destinations, beside 64 KiB of each. 0: it is
	// not said. Since 1.1.
	Memory int `json:"memory,omitempty"`
}

// Redirect answers Open: ask one of these instead.
type Redirect struct {
	Addresses []string `json:"addresses"`
}

// Refused answers Open, Join, Stream and Resume.
type Refused struct {
	Code tunnel.Code `json:"code"`
	Text string      `json:"text"`
	Time time.Time   `json:"time,omitzero"` // the cloud proxy's clock; zero: it does not say. It answers Open and Join
}

// Control makes a stream the session's control stream, or goes on with the one
// that there was. It is answered with Resumed.
type Control struct {
	Received uint64 `json:"received"` // how many bytes have come here
}

// Stream asks for a TCP connection. Number is unique in the session.
type Stream struct {
	Number uint64 `json:"number"`
	Host   string `json:"host"` // a name or a numeric address
	Port   uint16 `json:"port"`
}

// Opened answers Stream; from here on the stream carries the connection's bytes.
type Opened struct{}

// Resume goes on with a stream on another carrier, or on a fresh stream of the
// same.
type Resume struct {
	Number   uint64 `json:"number"`
	Received uint64 `json:"received"` // how many bytes have come here
}

// Resumed answers Resume and Control; from here on the stream carries what
// follows those bytes.
type Resumed struct {
	Received uint64 `json:"received"`
}

// Closed ends an association. From the cloud proxy it says why.
type Closed struct {
	Association uint32      `json:"association"`
	Code        tunnel.Code `json:"code,omitempty"`
	Text        string      `json:"text,omitempty"`
}

// GoAway says that the cloud proxy takes nothing new and ends the session within this time.
type GoAway struct {
	Within Seconds `json:"within_seconds"`
}

// Renew brings another token for the session.
type Renew struct {
	Token string `json:"token"` // a secret
}

// Renewed answers Renew. Without a code the token is the session's from now on;
// with one the session goes on with that which it had.
type Renewed struct {
	Code tunnel.Code `json:"code,omitempty"`
	Text string      `json:"text,omitempty"`
}

// End ends the session. From the cloud proxy it says why.
type End struct {
	Code tunnel.Code `json:"code,omitempty"`
	Text string      `json:"text,omitempty"`
}

// Seconds is a duration that travels as whole seconds.
type Seconds int

// Err turns a refusal into an error for a person. What came from the peer is
// cut to a bounded, printable length.
func (r *Refused) Err() error { return peerError(r.Code, r.Text) }

// Err says why the association has ended; nil where no reason was given.
func (c *Closed) Err() error {
	if c.Code == "" {
		return nil
	}
	return peerError(c.Code, c.Text)
}

// Err says why the token was refused; nil: it was not.
func (r *Renewed) Err() error {
	if r.Code == "" {
		return nil
	}
	return peerError(r.Code, r.Text)
}

// Err says why the session has ended; nil where no reason was given.
func (e *End) Err() error {
	if e.Code == "" {
		return nil
	}
	return peerError(e.Code, e.Text)
}

func peerError(code tunnel.Code, text string) error {
	return &tunnel.Error{Code: tunnel.Code(printable(string(code), 40)), Text: printable(text, 400)}
}

// printable makes s fit for a log line and a terminal.
func printable(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}

// RefusedBy turns an error into the message that says so.
func RefusedBy(err error) Message {
	return Message{Refused: &Refused{Code: tunnel.CodeOf(err), Text: tunnel.Sentence(err)}}
}

// Write sends one control message in one Write.
//
//	+-----------------+----------------------------+
//	| length (16)     | JSON, length bytes         |
//	+-----------------+----------------------------+
func Write(w io.Writer, m Message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(body) > MaxMessage {
		return tunnel.Errorf(tunnel.LimitExceeded, "a control message of %d bytes is over the limit of %d", len(body), MaxMessage)
	}
	b := make([]byte, 2, 2+len(body))
	binary.BigEndian.PutUint16(b, uint16(len(body)))
	_, err = w.Write(append(b, body...))
	return err
}

// Read reads one control message and not a byte more. from is the peer's
// version; the zero Version means that the message itself tells it (Open, Join,
// Welcome). A malformed message is an error with the code VersionMismatch where
// that explains it, else Internal; io.EOF is returned as it is when nothing of
// a message has come.
func Read(r io.Reader, from Version) (Message, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Message{}, err
	}
	n := int64(binary.BigEndian.Uint16(head[:]))
	if n > MaxMessage {
		return Message{}, malformed("it declares %d bytes, the limit is %d", n, MaxMessage)
	}
	var body bytes.Buffer // grows with what arrives, not with what is declared
	if _, err := io.CopyN(&body, r, n); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Message{}, err
	}
	return decode(body.Bytes(), from)
}

func decode(body []byte, from Version) (Message, error) {
	var m Message
	if err := json.Unmarshal(body, &m); err != nil {
		return Message{}, malformed("%v", err)
	}
	switch {
	case from != Version{}:
	case m.Open != nil:
		from = m.Open.Version
	case m.Join != nil:
		from = m.Join.Version
	case m.Welcome != nil:
		from = m.Welcome.Version
	default:
		// A peer that refuses us has not said its version. Better to understand
		// what can be understood than to lose its code.
		from = Version{Current.Major, Current.Minor + 1}
	}
	if from.Major != Current.Major {
		return Message{}, tunnel.Errorf(tunnel.VersionMismatch, "the peer speaks version %s of the tunnel, this side %s; update the older one", from, Current)
	}
	if n := m.count(); n > 1 {
		return Message{}, malformed("it holds %d messages instead of one", n)
	}
	if from.Minor > Current.Minor {
		return m, nil
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	m = Message{}
	if err := d.Decode(&m); err != nil {
		return Message{}, malformed("%v", err)
	}
	if m.count() == 0 {
		return Message{}, malformed("it holds no message")
	}
	return m, nil
}

func malformed(format string, args ...any) error {
	return tunnel.Errorf(tunnel.Internal, "the peer sent a malformed control message: %s", printable(fmt.Sprintf(format, args...), 200))
}

func (m *Message) count() int {
	n := 0
	for _, set := range []bool{m.Open != nil, m.Join != nil, m.Welcome != nil, m.Redirect != nil, m.Refused != nil,
		m.Control != nil, m.Stream != nil, m.Opened != nil, m.Resume != nil, m.Resumed != nil, m.Closed != nil, m.GoAway != nil, m.Renew != nil, m.Renewed != nil, m.End != nil} {
		if set {
			n++
		}
	}
	return n
}
