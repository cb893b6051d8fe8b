// Where the page begins.

import { ask } from "./api.js";
import * as costs from "./costs.js";
import * as engine from "./engine.js";
import { at } from "./dom.js";
import * as page from "./page.js";
import * as painting from "./painting.js";
import * as saving from "./saving.js";
import * as session from "./session.js";
import * as stages from "./stages.js";
import * as writing from "./writing.js";

const PROMPT = "Suggest a name for a small bookshop by the sea, and say why.";

/** Ctrl+Z and its like, where no text is being edited. @param {KeyboardEvent} event */
function keys(event) {
  const field = /** @type {HTMLElement} */ (event.target).matches?.("input:not([type=range],[type=checkbox]), textarea");
  if (!(event.ctrlKey || event.metaKey) || event.altKey || field) return;
  const name = event.key.toLowerCase();
  if (name === "z" || name === "y") {
    event.preventDefault();
    painting.travel(name === "y" || event.shiftKey ? 1 : -1);
  }
}

async function begin() {
  let state;
  try {
    state = await ask("state");
  } catch (error) {
    at("refused").hidden = false;
    page.complain("refused", error);
    page.say("not connected");
    return;
  }
  at("model").textContent = state.name;
  document.title = `tempering console: ${state.name}`;
  if (state.refused !== null) {
    page.complain("refused", `This model's attention can't be tempered. ${state.refused}`);
    page.say("refused");
    for (const control of document.querySelectorAll("main button, main input, main select, main textarea")) /** @type {any} */ (control).disabled = true;
    return;
  }
  page.begin(state);
  if (!at("prompt").value) at("prompt").value = PROMPT;
  const whose = `${state.name} ${state.fingerprint}`;
  const kept = session.kept(whose);
  let complaint = "";
  try {
    await page.restore(kept && session.part("the state"));
  } catch (error) {
    complaint = /** @type {Error} */ (error).message;
  }
  // Before the other parts hear of it, which stop what they do.
  addEventListener("pagehide", () => session.store(whose));
  painting.start();
  writing.start();
  costs.start();
  stages.start();
  saving.start();
  if (state.engine) engine.start();
  page.rememberSteps(); // last: what was written and found has room first
  addEventListener("keydown", keys);
  addEventListener("hashchange", async () => {
    if (!page.addressed()) return;
    try {
      await page.restore();
      page.emit("active");
      page.emit("profile");
    } catch (error) {
      page.say(/** @type {Error} */ (error).message);
    }
  });
  const lost = kept ? session.restore(kept) : [];
  if (kept) page.keep(); // the address may lag behind
  if (lost.length) complaint ||= `not kept over the reload (too long for the browser?): ${lost.join(", ")}`;
  page.say(complaint || (state.start?.note ?? "ready"));
  document.body.dataset.ready = "yes";
}

begin();
