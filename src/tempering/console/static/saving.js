// What leaves the page: a profile, a record, a link, a baked model.

import { packed } from "./address.js";
import { ask, stream } from "./api.js";
import { at, download } from "./dom.js";
import * as page from "./page.js";
import { records } from "./stages.js";
import { asked, columns } from "./writing.js";

/** @param {() => Promise<string>} act */
async function told(act) {
  page.complain("save-error");
  at("save-facts").textContent = "";
  try {
    at("save-facts").textContent = await act();
  } catch (error) {
    page.complain("save-error", error);
  }
}

async function profile() {
  const column = page.active();
  const found = await ask("profile/save", { profile: page.acting(column) });
  download(`profile-${column.name}.json`, `${JSON.stringify(found, null, 1)}\n`, "application/json");
  return `profile of column ${column.name}`;
}

async function record() {
  if (!asked || !columns.columns.some((c) => c.tokens.length)) throw new Error("write something first: a record holds the texts");
  const samples = columns.columns.map(({ name, tokens }) => ({
    label: name,
    seed: asked.seed,
    text: tokens.map((t) => t.text).join(""),
    tokens: tokens.length,
    finish: tokens.length === asked.tokens ? "length" : "end",
    trace: tokens.map((t) => ({ token: t.text, phase: t.phase, temperature: t.temperature, entropy: t.entropy, support: t.support, token_id: t.id, entropy_before: t.entropy_before, log_probability_raw: t.raw, log_probability: t.log_probability })),
  }));
  const found = await ask("record", {
    ...asked,
    columns: page.history.value.columns.map((c) => ({ label: c.name, ...page.acting(c) })),
    samples,
    measured: page.shared.measured ?? undefined,
    ...page.shared.results,
  });
  records();
  return `record ${found.name}, in the list of records`;
}

async function link() {
  const address = `${location.href.split("#")[0]}#${await packed(page.state())}`;
  if (!navigator.clipboard) return "this browser copies from secure pages alone; the address bar holds the same link";
  await navigator.clipboard.writeText(address);
  return "copied. The address holds this console's token: it works while this console runs. For another console, put the part from # on behind its address.";
}

async function bake() {
  const log = at("bake-log");
  log.hidden = false;
  log.textContent = "";
  let where = "";
  for await (const event of stream("bake", { profile: page.acting(page.active()), name: at("bake-name").value }, new AbortController().signal)) {
    if (event.type === "line") log.textContent += `${event.text}\n`;
    if (event.type === "baked") where = event.path;
  }
  return `baked into ${where}`;
}

export function start() {
  for (const [id, act] of /** @type {[string, () => Promise<string>][]} */ ([["save-profile", profile], ["save-record", record], ["copy-link", link], ["bake", bake]])) {
    at(id).addEventListener("click", async () => {
      at(id).disabled = true;
      await told(act);
      at(id).disabled = false;
    });
  }
}
