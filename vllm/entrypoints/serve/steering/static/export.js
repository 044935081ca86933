// SPDX-License-Identifier: Apache-2.0
// A column's request as a curl command, Python, or a preset file.

import { BASE } from "./api.js";
import { fields, request } from "./specs.js";

export function asCurl(mode, state) {
  const { path, body } = request(mode, state);
  const json = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  return `curl ${location.origin}${BASE}${path} \\\n` +
    ' -H "Content-Type: application/json" -H "Authorization: Bearer $VLLM_API_KEY" \\\n' +
    ` -d '${json}'\n`;
}

export function asPython(mode, state) {
  const { path, body } = request(mode, state);
  const { model, max_tokens, temperature, seed, messages, prompt, ...extra } = body;
  const known = Object.entries({ model, max_tokens, temperature, seed, messages, prompt })
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `    ${name}=${python(value)},\n`)
    .join("");
  const chat = path.includes("chat");
  return "import os\n\nfrom openai import OpenAI\n\n" +
    `client = OpenAI(\n    base_url="${location.origin}${BASE}/v1",\n` +
    '    api_key=os.environ.get("VLLM_API_KEY", "-"),\n)\n' +
    `answer = client.${chat ? "chat.completions" : "completions"}.create(\n${known}` +
    `    extra_body=${python(extra)},\n)\n` +
    `print(answer.choices[0].${chat ? "message.content" : "text"})\n`;
}

/** A file for `--steering-presets`. */
export function asPreset(mode, state) {
  const { temperature, maxTokens, seed } = state;
  const sampling = { temperature, max_tokens: maxTokens, seed };
  return `${JSON.stringify({ ...fields(mode, state), sampling }, null, 2)}\n`;
}

/** A JSON value as a Python expression. */
function python(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${python(v)}`);
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value);
}
