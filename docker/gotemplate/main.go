// temper-gotemplate renders a Go template on conversations, as Ollama's server would.
//
// It reads {"template": "...", "conversations": [[{"role": "...", "content": "..."}, ...], ...]} from standard input and
// writes {"texts": ["...", ...]} to standard output. A template that does not parse, or fails on a conversation, is a
// message on standard error and exit code 1.
//
// What Ollama does, by its template/template.go: messages of one role that follow each other are joined by an empty
// line; .System is every system message, joined the same way; a template that names .Messages is run once; any other is
// run once for each exchange with .System, .Prompt and .Response, the last time only up to .Response.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

// message has the fields of Ollama's api.Message that templates in use name.
type message struct {
	Role      string   `json:"role"`
	Content   string   `json:"content"`
	Thinking  string   `json:"-"`
	ToolName  string   `json:"-"`
	ToolCalls []string `json:"-"`
	Images    []string `json:"-"`
}

var functions = template.FuncMap{
	"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	},
	"currentDate": func(...string) string { return time.Now().Format("2006-01-02") },
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "temper-gotemplate:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	var request struct {
		Template      string      `json:"template"`
		Conversations [][]message `json:"conversations"`
	}
	if err := json.NewDecoder(in).Decode(&request); err != nil {
		return err
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(request.Template)
	if err != nil {
		return err
	}
	texts := make([]string, len(request.Conversations))
	for i, conversation := range request.Conversations {
		if texts[i], err = render(parsed, conversation); err != nil {
			return fmt.Errorf("conversation %d: %w", i+1, err)
		}
	}
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(map[string]any{"texts": texts})
}

func render(parsed *template.Template, conversation []message) (string, error) {
	system, messages := collate(conversation)
	if names(parsed, "Messages") {
		return execute(parsed, map[string]any{
			"System": system, "Messages": messages, "Response": "", "Tools": nil, "Think": false, "IsThinkSet": false,
		})
	}

	// The older way: one run for each exchange.
	var text strings.Builder
	var exchange struct{ system, prompt, response string }
	flush := func(t *template.Template) error {
		data := map[string]any{"System": exchange.system, "Prompt": exchange.prompt, "Response": exchange.response}
		part, err := execute(t, data)
		text.WriteString(part)
		exchange.system, exchange.prompt, exchange.response = "", "", ""
		return err
	}
	whole := parsed
	if !names(parsed, "Response") {
		whole = template.Must(template.Must(parsed.Clone()).Parse(parsed.Tree.Root.String() + "{{.Response}}"))
	}
	for _, m := range messages {
		begins := m.Role == "user" && exchange.response != "" ||
			m.Role == "system" && (exchange.prompt != "" || exchange.response != "")
		if begins {
			if err := flush(whole); err != nil {
				return "", err
			}
		}
		switch m.Role {
		case "system":
			exchange.system = m.Content
		case "user":
			exchange.prompt = m.Content
		case "assistant":
			exchange.response = m.Content
		}
	}
	tree := whole.Tree.Copy() // a clone shares its tree
	cutAfterResponse(tree.Root)
	last := template.Must(template.Must(whole.Clone()).AddParseTree(whole.Name(), tree))
	err := flush(last)
	return text.String(), err
}

func execute(t *template.Template, data map[string]any) (string, error) {
	var text strings.Builder
	err := t.Execute(&text, data)
	return text.String(), err
}

func collate(conversation []message) (string, []*message) {
	var system []string
	var collated []*message
	for _, m := range conversation {
		m := m
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(collated); n > 0 && collated[n-1].Role == m.Role && m.Role != "tool" {
			collated[n-1].Content += "\n\n" + m.Content
		} else {
			collated = append(collated, &m)
		}
	}
	return strings.Join(system, "\n\n"), collated
}

// names says whether any action of the template mentions the field.
func names(t *template.Template, field string) bool {
	for _, part := range t.Templates() {
		if part.Tree != nil && strings.Contains(actions(part.Tree.Root), "."+field) {
			return true
		}
	}
	return false
}

// actions gives the source of a tree without its text.
func actions(node parse.Node) string {
	switch n := node.(type) {
	case *parse.ListNode:
		var all strings.Builder
		if n != nil {
			for _, child := range n.Nodes {
				all.WriteString(actions(child))
			}
		}
		return all.String()
	case *parse.IfNode:
		return n.Pipe.String() + actions(n.List) + actions(n.ElseList)
	case *parse.RangeNode:
		return n.Pipe.String() + actions(n.List) + actions(n.ElseList)
	case *parse.WithNode:
		return n.Pipe.String() + actions(n.List) + actions(n.ElseList)
	case *parse.ActionNode:
		return n.Pipe.String()
	case *parse.TemplateNode:
		return n.String()
	}
	return ""
}

// cutAfterResponse drops every node after the one that writes .Response, at any depth, and says whether it found it.
func cutAfterResponse(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for i, node := range list.Nodes {
		found := false
		switch n := node.(type) {
		case *parse.ActionNode:
			found = strings.Contains(n.Pipe.String(), ".Response")
		case *parse.IfNode:
			found = cutBranches(&n.BranchNode)
		case *parse.RangeNode:
			found = cutBranches(&n.BranchNode)
		case *parse.WithNode:
			found = cutBranches(&n.BranchNode)
		}
		if found {
			list.Nodes = list.Nodes[:i+1]
			return true
		}
	}
	return false
}

func cutBranches(branch *parse.BranchNode) bool {
	if cutAfterResponse(branch.List) {
		if branch.ElseList != nil {
			branch.ElseList.Nodes = nil
		}
		return true
	}
	return cutAfterResponse(branch.ElseList)
}
