// Text under every column's profile, streamed; tokens that can be asked about.

import { ask, floats, stream } from "./api.js";
import { COLOURINGS, Columns, facts } from "./columns.js";
import { Context } from "./context.js";
import { at, calm, make } from "./dom.js";
import { named, put } from "./engine.js";
import { drawScale } from "./grid.js";
import { visible } from "./lines.js";
import { short } from "./matrix.js";
import * as page from "./page.js";
import { live } from "./painting.js";
import * as session from "./session.js";
import { forget } from "./views.js";

/** @type {Columns} */
export let columns;
/** @type {Context} */
let context;
/** @type {AbortController|null} */
let running = null;
let run = "";
/** @type {{tokens: number[], texts: string[]}} */
let prompt = { tokens: [], texts: [] };
/** @type {page.Column[][]} what the columns were until each mark in the text */
export let earlier = [];
/** @type {page.Column[][]} edits that were sent while the text is written; the server says which acts */
let sent = [];
/** What the last text was asked with, for the record. */
export let asked = /** @type {any} */ (null);

/** @returns {any} */
function order() {
  return {
    profiles: page.history.value.columns.map(page.acting),
    names: named(),
    prompt: at("prompt").value,
    tokens: Number(at("tokens").value),
    seed: Number(at("seed").value),
    chat: at("chat").checked,
    policy: at("policy").value,
    watch: at("watch").checked,
  };
}

/** What stands above the columns. @returns {string[]} */
function titles() {
  return page.known.engine ? ["in force", ...named()] : ["untempered", ...page.history.value.columns.map((c) => c.name)];
}

/** Stop what is written; resolves at once. */
export function stop() {
  running?.abort();
}

/** Write anew. What was being written is stopped first. */
export async function write() {
  stop();
  const mine = (running = new AbortController());
  // randomUUID is for secure pages alone, and --host may be another machine's address.
  run = Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-");
  const wanted = order();
  page.complain("write-error");
  page.emit("writing");
  page.shared.writing = true;
  page.shared.token = null;
  at("stop").disabled = false;
  at("token-detail").hidden = at("attention-part").hidden = at("changed-facts").hidden = true;
  page.shared.written = page.history.value.columns;
  earlier = [];
  sent = [];
  asked = wanted;
  columns.reset(titles(), activeRow());
  forget(page.shared.written.length + 1);
  let ended = "";
  try {
    for await (const event of stream("write", { ...wanted, run }, mine.signal)) {
      if (mine !== running) return;
      if (event.type === "waiting") page.say(event.words);
      else if (event.type === "turn") page.say("writing");
      else if (event.type === "prompt") prompt = event;
      else if (event.type === "heads") live(event);
      else if (event.type === "token") columns.add(event);
      else if (event.type === "changed") {
        columns.mark();
        earlier.push(page.shared.written);
        page.shared.written = sent[event.edit];
        at("changed-facts").hidden = false;
      }
      else if (event.type === "done") {
        event.tokens.forEach((/** @type {number} */ n, /** @type {number} */ row) => columns.done(row, n, wanted.tokens));
        ended = "written";
      }
    }
    ended ||= "the server ended the text early";
  } catch (error) {
    if (mine !== running) return;
    if (mine.signal.aborted) ended = "stopped";
    else {
      ended = "not written";
      page.complain("write-error", error);
      columns.columns.forEach((column, row) => column.tokens.length && columns.tell(row, "cut off here; the message is above"));
    }
  }
  running = null;
  page.shared.writing = false;
  at("stop").disabled = true;
  page.say(ended);
  stale();
  page.emit("written");
  if (ended !== "written") return;
  // An edit that came after the last token acts on the next text.
  if (sent.length && at("auto").checked && !page.shared.written.every((own) => page.alike(own, now(own)))) write();
  else if (at("token-colour").value === "kl") divergences();
}

/** After an edit: go on with the new temperatures, or start again. */
async function edited() {
  if (!at("prompt").value.trim()) return;
  const next = page.history.value.columns;
  // "Write" was pressed before this edit's turn came: the text has it already.
  if (running && next === (sent.at(-1) ?? page.shared.written)) return;
  if (page.known.engine) {
    if (!at("auto").checked) return; // what is painted is not in force yet: the text goes on
    stop(); // a swap waits for the requests in flight
    if (await put()) write();
    return;
  }
  if (running && at("edit").value === "on" && next.length === page.shared.written.length) {
    try {
      const edit = sent.push(next) - 1;
      if ((await ask("write/change", { run, edit, profiles: next.map(page.acting) })).changed) return;
    } catch (error) {
      page.complain("write-error", error);
      return;
    }
  }
  if (running || at("auto").checked) write();
}

/** The column that is painted now under the name of one that was written.
 * @param {page.Column} own */
function now(own) {
  return page.history.value.columns.find((c) => c.name === own.name);
}

/** Mark the texts whose column is not as it was when they were written. */
function stale() {
  columns.columns.forEach((column, row) => {
    const own = page.shared.written[row - 1];
    column.stale.hidden = !own || !column.tokens.length || page.alike(own, now(own));
  });
}

/** The row of the text that the painted column writes. */
function activeRow() {
  return page.known.engine ? 0 : page.rowOf(page.active());
}

/** KL at every token of the written columns, both models reading the same text. */
async function divergences() {
  for (const [row, column] of columns.columns.entries()) {
    if (!column.tokens.length || column.tokens[0].kl !== undefined) continue;
    if (row === 0) column.tokens.forEach((token) => (token.kl = 0));
    else {
      const tokens = [...prompt.tokens, ...column.tokens.map((t) => t.id)];
      const body = { tokens, start: prompt.tokens.length, profile: page.acting(page.shared.written[row - 1]) };
      try {
        for await (const event of stream("divergence", body, new AbortController().signal)) {
          if (event.type === "divergence") event.kl.forEach((/** @type {number} */ kl, /** @type {number} */ i) => column.tokens[i] && (column.tokens[i].kl = kl));
        }
      } catch (error) {
        page.complain("write-error", error);
      }
    }
    columns.recolour("kl");
  }
}

function recolour() {
  const by = at("token-colour").value;
  columns.recolour(by);
  const how = COLOURINGS[by];
  at("token-low").textContent = how?.text[0] ?? "";
  at("token-high").textContent = how?.text[1] ?? "";
  at("token-scale").hidden = !how;
  if (how) drawScale(at("token-scale"), how.kind, how.low, how.high);
  if (by === "kl" && !running) divergences();
}

/** The tokens before a chosen one, and the profile of its column. */
function before() {
  const { row, index } = /** @type {{row: number, index: number}} */ (page.shared.token);
  const column = columns.columns[row];
  return {
    tokens: [...prompt.tokens, ...column.tokens.slice(0, index).map((t) => t.id)],
    texts: [...prompt.texts, ...column.tokens.slice(0, index).map((t) => t.text)],
    start: prompt.tokens.length,
    // The untempered column is compared with the profile that is painted.
    profile: page.acting(row ? page.shared.written[row - 1] : page.active()),
  };
}

/** A row of the table of alternatives. @param {{text: string, before: number|null, after: number}} token */
function alternative({ text, before, after }) {
  const shares = [before, after].map((p) => make("td", { className: "number" }, p === null ? "" : `${short(100 * p)}%`));
  return make("tr", {}, make("th", { scope: "row" }, make("code", {}, visible(text))), ...shares);
}

let chosen = 0; // of choices and looks the last one counts: answers to others come too late
let looked = 0;

/** @param {number} row @param {number} index */
async function choose(row, index) {
  page.shared.token = { row, index };
  page.emit("token");
  const token = columns.columns[row].tokens[index];
  at("token-detail").hidden = false;
  at("token-name").textContent = visible(token.text);
  at("token-facts").textContent = facts(token);
  page.complain("alternatives-error");
  const body = at("alternatives").tBodies[0];
  if (token.alternatives) {
    body.replaceChildren(...token.alternatives.map((t) => alternative({ ...t, before: null })));
    return;
  }
  body.replaceChildren(make("tr", {}, make("td", {}, "asking")));
  const mine = ++chosen;
  const { tokens, start, profile } = before();
  try {
    for await (const event of stream("alternatives", { tokens, start, profile, policy: asked.policy }, new AbortController().signal)) {
      if (mine !== chosen) continue;
      if (event.type === "waiting") body.replaceChildren(make("tr", {}, make("td", {}, event.words)));
      if (event.type === "alternatives") body.replaceChildren(...event.tokens.map(alternative));
    }
  } catch (error) {
    body.replaceChildren();
    page.complain("alternatives-error", error);
  }
}

/** What one head attends to at the chosen token, or at the last one. @param {[number, number]} cell */
async function look([layer, head]) {
  if (page.known.engine) return page.say("a server keeps attention in its workers and tells nothing about heads");
  if (!page.shared.token) {
    const row = activeRow();
    const last = (columns.columns[row]?.tokens.length ?? 0) - 1;
    if (last < 0) return page.say("write something first; then a head can be looked at");
    columns.highlight(row, last);
    page.shared.token = { row, index: last };
    page.emit("token");
  }
  at("attention-part").hidden = false;
  page.complain("attention-error");
  const known = page.known.layers[layer];
  at("attention-title").textContent = `Attention of layer ${known.index}, head ${head}`;
  at("attention-facts").textContent = "reading the context";
  const { tokens, texts, profile } = before();
  const mine = ++looked;
  try {
    for await (const event of stream("attention", { tokens, start: 1, profile, layer, head }, new AbortController().signal)) {
      if (mine !== looked) continue;
      if (event.type === "waiting") at("attention-facts").textContent = event.words;
      if (event.type !== "attention") continue;
      context.show(texts, floats(event.before), floats(event.after));
      const sinks = event.sink.map((/** @type {number|null} */ s) => (s === null ? null : short(100 * s)));
      at("attention-facts").textContent =
        `at the step that wrote the chosen token, over ${tokens.length} tokens of context; before is untempered` +
        (sinks[0] === null ? "" : `; the learned sink has ${sinks[0]}% before and ${sinks[1]}% after`);
    }
  } catch (error) {
    at("attention-facts").textContent = "";
    page.complain("attention-error", error);
  }
}

/** What is written, for a page that is reloaded. */
function keep() {
  if (!asked) return undefined;
  const { shared } = page;
  return { prompt, asked, earlier, written: shared.written, columns: columns.kept(), cut: shared.writing, error: at("write-error").textContent };
}

/** @param {any} kept what `keep` gave */
function comeBack(kept) {
  columns.comeBack(kept.columns, activeRow());
  ({ prompt, asked, earlier } = kept);
  page.shared.written = kept.written;
  page.emit("active"); // marks the painted column among them
  at("changed-facts").hidden = !earlier.length;
  if (kept.cut) columns.columns.forEach((column, row) => column.tokens.length && columns.tell(row, "cut off here, when the page was reloaded"));
  if (kept.error) page.complain("write-error", kept.error);
  forget(0); // what heads kept at each step is not kept
  recolour();
  stale();
}

export function start() {
  columns = new Columns(at("texts"), choose);
  columns.reset(titles(), page.known.engine ? 0 : page.history.value.active + 1);
  session.remember("the texts", keep, comeBack);
  context = new Context(at("context"), at("attended"));
  recolour();
  at("write").addEventListener("click", write);
  at("stop").addEventListener("click", stop);
  at("token-colour").addEventListener("change", recolour);
  at("attention-by").addEventListener("change", () => {
    context.by = at("attention-by").value;
    context.show(context.texts, context.before, context.after);
  });
  const policyRead = calm(120, async () => {
    try {
      await ask("policy", { text: at("policy").value });
      page.complain("policy-error");
    } catch (error) {
      page.complain("policy-error", error);
    }
  });
  at("policy").addEventListener("input", policyRead);
  at("policies").append(...page.known.policies.map((/** @type {string[]} */ [signature, summary, example]) => make("option", { value: example }, `${signature}: ${summary}`)));
  at("chat").disabled = !page.known.chat;
  if (!page.known.chat) at("chat").checked = false;
  const soon = calm(30, edited);
  let before = page.history.value;
  page.on("profile", () => {
    if (page.history.value === before) return;
    // A change of the tab alone changes no temperature.
    const same = before.columns === page.history.value.columns;
    before = page.history.value;
    if (same) return;
    if (!running) stale();
    soon();
  });
  page.on("look", look);
  page.on("active", () => {
    if (!page.known.engine) columns.box.querySelectorAll(".column").forEach((/** @type {Element} */ c, /** @type {number} */ i) => c.classList.toggle("active", i === activeRow()));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    recolour();
    context.draw();
  });
  addEventListener("pagehide", stop);
}
