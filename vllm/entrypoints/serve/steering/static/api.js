// SPDX-License-Identifier: Apache-2.0
// Requests to the server that this page came from, with the key of this tab.

/** An answer that is no success: `status`, the server's message, and its field. */
export class ServerError extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param || "";
  }
}

// The page is served at BASE/steering/; a proxy may put something before it.
export const BASE = location.pathname.replace(/\/steering\/.*$/, "");

export const key = {
  get() { return sessionStorage.getItem("server-key") || ""; },
  set(text) { sessionStorage.setItem("server-key", text); },
};

function headers() {
  const sent = { "Content-Type": "application/json" };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  return sent;
}

/** Call a route; a body makes it a POST. The parsed JSON, or a ServerError. */
export async function call(path, body, signal) {
  return (await send(path, body, signal)).json();
}

async function send(path, body, signal) {
  const options = { headers: headers(), signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(BASE + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let found = {};
  try {
    const data = await response.json();
    found = data.error && typeof data.error === "object" ? data.error : data;
  } catch { /* not JSON: the status must do */ }
  const message = found.message || (typeof found.error === "string" ? found.error : "");
  return new ServerError(
    response.status, message || `HTTP ${response.status}`, found.param);
}

/** Stream a completion: one object for each server-sent event. */
export async function* stream(path, body, signal) {
  const response = await send(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) {
        throw new ServerError(event.error.code || 500, event.error.message, event.error.param);
      }
      yield event;
    }
  }
}

/** The paths that the server declares; null where it declares none. */
export async function routes() {
  try {
    return Object.keys((await call("/openapi.json")).paths);
  } catch {
    return null;
  }
}
