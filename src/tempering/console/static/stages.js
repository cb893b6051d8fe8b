// Stages of workers as they run, and the records of the folder.

import { ask, reportAddress, stream } from "./api.js";
import { at, make } from "./dom.js";
import { short } from "./matrix.js";
import * as page from "./page.js";
import * as session from "./session.js";

/** @type {AbortController|null} */
let running = null;
/** @type {Map<string, any>} */
const workers = new Map();
/** @type {any[]} the tree and the rows that are done, for a page that is reloaded */
let events = [];

/** @param {any} event */
function plant(event) {
  workers.clear();
  const rounds = [];
  for (let round = 1; round <= event.rounds; round++) {
    for (const stage of event.stages) {
      const list = make("ul");
      stage.workers.forEach((/** @type {any} */ worker, /** @type {number} */ i) => {
        const state = make("span", {}, "waiting");
        const output = make("div", { className: "output" });
        const item = make("li", { className: "worker" },
          make("span", { className: "quiet" }, `${i + 1}: T ${short(worker.temperature)} of 1, attention ${worker.attention ?? "untempered"}, `), state, output);
        workers.set(`${round}/${stage.stage}/${i + 1}`, { item, state, output });
        list.append(item);
      });
      rounds.push(make("li", {}, make("strong", {}, `${stage.stage}${event.rounds > 1 ? `, round ${round}` : ""}`), list));
    }
  }
  at("tree").replaceChildren(...rounds);
}

/** @param {any} event */
function grow(event) {
  const found = workers.get(`${event.round}/${event.stage}/${event.worker}`);
  if (!found) return;
  if (event.type === "row") {
    found.output.textContent = event.row.error ?? event.row.output;
    const sent = event.row.temperature_sent;
    found.state.textContent = `${event.row.error ? "failed" : "done"}, sampled at T ${sent === null ? "its own" : short(sent)}, ${event.row.tokens_out} tokens`;
    found.item.className = `worker ${event.row.error ? "failed" : "done"}`;
  } else if (event.state === "running" || event.state === "retrying") {
    found.output.append(event.text);
    found.state.textContent = `${event.state}, ${event.tokens} tokens`;
    found.item.className = "worker running";
  }
}

/** @param {any} body */
async function run(body) {
  running?.abort();
  const mine = (running = new AbortController());
  page.emit("writing");
  page.complain("stages-error");
  at("stop-stages").disabled = false;
  at("stages-facts").textContent = "waiting for the model";
  try {
    for await (const event of stream("throb", body, mine.signal)) {
      if (event.type === "waiting") at("stages-facts").textContent = event.words;
      else if (event.type === "turn") at("stages-facts").textContent = "running";
      else if (event.type === "tree") {
        events = [event];
        plant(event);
      } else if (event.type === "worker" || event.type === "row") {
        if (event.type === "row") events.push(event);
        grow(event);
      }
      else if (event.type === "record") at("stages-facts").textContent = `${event.stopped ?? "complete"}, ${event.tokens} tokens; record ${event.name}`;
    }
  } catch (error) {
    if (mine.signal.aborted) at("stages-facts").textContent = "stopped; what was done is in its record below";
    else page.complain("stages-error", error);
  }
  if (mine === running) at("stop-stages").disabled = true;
  page.emit("written");
  // A stopped run writes its record within a step.
  setTimeout(records, mine.signal.aborted ? 1500 : 0);
}

export async function records() {
  try {
    const found = await ask("records");
    at("records-facts").textContent = found.records.length ? `in ${found.out}, the newest first` : `none in ${found.out} yet`;
    at("records").replaceChildren(
      ...found.records.map((/** @type {any} */ record) => {
        const item = make("li", {}, make("a", { href: reportAddress(record.name), target: "_blank", rel: "noopener" }, record.name), make("span", { className: "quiet" }, record.model ?? ""));
        if (record.kind === "throb") {
          const button = make("button", { "aria-label": `Go on with ${record.name}` }, "Go on");
          button.addEventListener("click", () => run({ resume: record.name }));
          item.append(button);
        }
        return item;
      }),
    );
  } catch (error) {
    at("records-facts").textContent = error instanceof Error ? error.message : String(error);
  }
}

export function start() {
  session.remember("the stages", () => (events.length ? { events, facts: at("stages-facts").textContent, cut: !at("stop-stages").disabled } : undefined), (kept) => {
    events = kept.events;
    plant(events[0]);
    events.slice(1).forEach(grow);
    at("stages-facts").textContent = kept.cut ? "stopped when the page was reloaded; what was done is in its record below" : kept.facts;
  });
  at("run-stages").addEventListener("click", () =>
    run({ task: at("task").value, pattern: at("widths").value, amplitude: Number(at("stage-amplitude").value), tokens: Number(at("stage-tokens").value), seed: Number(at("seed").value) }));
  at("stop-stages").addEventListener("click", () => running?.abort());
  addEventListener("pagehide", () => running?.abort());
  records();
}
