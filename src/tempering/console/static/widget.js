// The matrix in a notebook. Python puts this behind the page's own modules, as one module.

import { make } from "./dom.js";
import { Grid } from "./grid.js";
import { brushOf, painted, short } from "./matrix.js";

const SHOWN = { temperature: "temperature", support: "support", sink_share: "sink share", entropy: "entropy", peak: "peak", distance: "mean distance" };

/** @param {any} model of anywidget @param {HTMLElement} el */
function renderMatrix(model, el) {
  const known = model.get("_known");
  const brush = make("input", { value: "1.2", size: 6 });
  const tool = make("select", {}, ...["brush", "row", "column", "rectangle"].map((name) => make("option", { value: name }, name)));
  const what = make("select", {}, ...Object.entries(SHOWN).map(([value, name]) => make("option", { value }, name)));
  const when = make("select", {}, ...["before", "after", "change"].map((name) => make("option", { value: name }, name)));
  const undo = make("button", { type: "button" }, "Undo");
  const measure = make("button", { type: "button" }, "Measure");
  const canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": "Temperatures, a row a layer and a column a head" });
  const told = make("p", { role: "status" });
  const label = (/** @type {string} */ text, /** @type {any} */ control) => make("label", {}, `${text} `, control);
  const box = make("div", { className: "tempering-box" }, canvas);
  el.classList.add("tempering-widget");
  el.append(make("div", { className: "tempering-tools" }, label("Brush", brush), label("paints", tool), label("Show", what), when, measure, undo), box, told);
  /** @type {number[][][]} */
  const past = [];
  /** @type {number[][]|null} what a stroke began with */
  let before = null;
  const rows = () => /** @type {number[][]} */ (model.get("_rows"));
  const put = (/** @type {number[][]} */ next) => {
    model.set("_rows", next);
    model.save_changes();
  };
  const paint = (/** @type {[number, number][]} */ cells, /** @type {any} */ how) => {
    try {
      const next = painted(rows(), cells, how ?? brushOf(brush.value), known);
      if (before === null) past.push(rows());
      put(next);
      told.textContent = "";
    } catch (error) {
      told.textContent = error instanceof Error ? error.message : String(error);
    }
  };
  const view = () => {
    const tables = model.get("_tables");
    when.hidden = what.value === "temperature";
    if (what.value === "temperature") {
      const values = rows().map((row) => row.map(Math.log));
      const high = Math.max(Math.log(1.5), ...values.flat().map(Math.abs));
      return { values, kind: /** @type {"diverging"} */ ("diverging"), low: -high, high, label: (/** @type {number} */ v) => short(Math.exp(v)) };
    }
    const of = (/** @type {string} */ name) => (tables[name]?.[what.value] ?? []).map((/** @type {any[]} */ row) => row.map((v) => v ?? NaN));
    const change = when.value === "change";
    const values = change ? of("after").map((/** @type {number[]} */ row, /** @type {number} */ l) => row.map((v, h) => v - of("before")[l][h])) : of(when.value);
    const high = Math.max(1e-6, ...values.flat().filter(Number.isFinite).map(Math.abs));
    return { values, kind: /** @type {"diverging"|"sequential"} */ (change ? "diverging" : "sequential"), low: change ? -high : 0, high, label: short };
  };
  const grid = new Grid(canvas, known.rows, known.heads, {
    begin: () => (before = null),
    paint: (cells) => {
      paint(cells, null);
      before = rows();
    },
    end: () => (before = null),
    moved: ([layer, head]) => (told.textContent = `layer ${layer}, head ${head}: T = ${short(rows()[layer][head])}`),
    chosen: () => {},
    key: (event) => {
      const cells = grid.selection();
      if (event.key === "Enter" || event.key === " ") paint(cells, null);
      else if (event.key === "+" || event.key === "=") paint(cells, { times: 1.05 });
      else if (event.key === "-") paint(cells, { times: 1 / 1.05 });
      else if (event.key === "0") paint(cells, { set: 1 });
      else return false;
      return true;
    },
  });
  const show = () => grid.show(view());
  tool.addEventListener("change", () => (grid.tool = tool.value));
  for (const select of [what, when]) select.addEventListener("change", show);
  undo.addEventListener("click", () => {
    const last = past.pop();
    if (last) put(last);
  });
  measure.addEventListener("click", () => model.send("measure"));
  for (const name of ["_rows", "_tables"]) model.on(`change:${name}`, show);
  model.on("change:_said", () => (told.textContent = model.get("_said")));
  const watcher = new ResizeObserver(() => box.clientWidth && grid.size());
  watcher.observe(box);
  show();
  return () => watcher.disconnect();
}

export default { render: (/** @type {{model: any, el: HTMLElement}} */ { model, el }) => renderMatrix(model, el) };
