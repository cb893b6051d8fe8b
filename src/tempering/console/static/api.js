// What the page asks its server for. The token stands in the page's own address.

const token = new URLSearchParams(location.search).get("token") ?? "";

/** A refusal or a failure, in the server's words. column: where in a text, from 1. */
export class Refusal extends Error {
  /** @param {string} message @param {number|null} [column] */
  constructor(message, column = null) {
    super(message);
    this.column = column;
  }
}

/** @param {string} path @param {unknown} [body] @param {AbortSignal} [signal] */
async function fetched(path, body, signal) {
  let answer;
  try {
    answer = await fetch(`/api/${path}`, {
      method: body === undefined ? "GET" : "POST",
      headers: { authorization: `token ${token}`, "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("the console's server doesn't answer; is `tempering console` still running? What you painted stays here");
  }
  if (!answer.ok) {
    let told;
    const text = await answer.text();
    try {
      told = JSON.parse(text);
    } catch {
      throw new Refusal(text.trim().slice(0, 300) || `the server failed (${answer.status}); its terminal says why`);
    }
    throw new Refusal(told.message, told.column);
  }
  return answer;
}

/** @param {string} path @param {unknown} [body] @returns {Promise<any>} */
export async function ask(path, body) {
  const told = await (await fetched(path, body)).json();
  if (told.type === "error") throw new Refusal(told.message, told.column);
  return told;
}

/** @type {Set<object>} streams of this page whose turn it is */
const turns = new Set();

/** Each event of a stream as it comes; throws a Refusal for an event of the type "error". An event
 * of the type "waiting" says in `words` who has the model.
 * @param {string} path @param {unknown} body @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>} */
export async function* stream(path, body, signal) {
  const answer = await fetched(path, body, signal);
  const mine = {};
  try {
    for await (const event of events(answer, signal)) {
      if (event.type === "error") throw new Refusal(event.message, event.column);
      if (event.type === "turn") turns.add(mine);
      if (event.type === "waiting") {
        turns.delete(mine);
        event.words = `${event.ahead} ahead: ${turns.size ? "this page" : "another tab"} has the model (${event.whose})`;
      }
      yield event;
    }
  } finally {
    turns.delete(mine);
  }
}

/** The lines of an answer. @param {Response} answer @param {AbortSignal} signal @returns {AsyncGenerator<any>} */
async function* events(answer, signal) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Refusal("the server went away while it was answering; what you painted stays here");
    }
    rest += decoder.decode(part.value, { stream: !part.done });
    const lines = rest.split("\n");
    rest = /** @type {string} */ (lines.pop());
    if (part.done && rest) lines.push(rest); // a refusal is a whole answer, without a line's end
    for (const line of lines) yield JSON.parse(line);
    if (part.done) return;
  }
}

/** Numbers that the server packed as float32.
 * @param {string} text @returns {Float32Array} */
export function floats(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** @param {string} name of a record */
export function reportAddress(name) {
  return `/reports/${encodeURIComponent(name)}?token=${encodeURIComponent(token)}`;
}
