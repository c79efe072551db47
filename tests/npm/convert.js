// Reads {name: {chat_template, bos_token, eos_token}} from standard input, writes {name: {template, stop} or null}.
import { readFileSync } from "node:fs";
import { convertGGUFTemplateToOllama } from "@huggingface/ollama-utils";

const found = {};
for (const [name, gguf] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const converted = convertGGUFTemplateToOllama(gguf);
  found[name] = converted ? { by: converted.model, template: converted.ollama.template, stop: converted.ollama.params?.stop ?? [] } : null;
}
console.log(JSON.stringify(found));
