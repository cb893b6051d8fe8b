// A running server instead of a model here: its profile is swapped, what it can't give is greyed.

import { stream } from "./api.js";
import { at, make } from "./dom.js";
import * as page from "./page.js";

/** The named profiles that are written beside the one in force. @returns {string[]} */
export function named() {
  if (!page.known.engine) return [];
  return [...new Set(/** @type {string} */ (at("named").value).split(",").map((name) => name.trim()).filter(Boolean))];
}

/** Swap, or ask; whether it was done. @param {any} body */
async function swap(body) {
  at("put-facts").textContent = body.ask ? "" : "waiting for requests in flight";
  try {
    for await (const event of stream("put", body, new AbortController().signal)) {
      if (event.type === "waiting") at("put-facts").textContent = event.words;
      if (event.type === "in force") at("put-facts").textContent = `in force: ${event.digest}`;
    }
    return true;
  } catch (error) {
    at("put-facts").textContent = error instanceof Error ? error.message : String(error);
    return false;
  }
}

/** Put the painted profile in force; whether it was done. */
export function put() {
  return swap({ profile: page.acting(page.active()) });
}

export function start() {
  const { engine } = page.known;
  at("engine-part").hidden = false;
  at("engine-facts").textContent = `${engine.model} on ${engine.address}`;
  for (const [id, why] of Object.entries(engine.cannot)) {
    const control = at(id);
    control.disabled = true;
    control.title = why;
    if (control.type === "checkbox") control.checked = false;
    const name = control.closest("label")?.textContent?.trim() || control.textContent.trim() || id;
    at("cannot").append(make("li", {}, `${name.split("\n")[0]}: ${why}`));
  }
  for (const option of at("token-colour").options) option.disabled = !["log_probability", "none"].includes(option.value);
  at("token-colour").value = "log_probability";
  at("token-colour").dispatchEvent(new Event("change"));
  at("put").addEventListener("click", put);
  at("put-none").addEventListener("click", () => swap({ profile: null }));
  swap({ ask: true });
}
