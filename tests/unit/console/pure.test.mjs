import assert from "node:assert/strict";
import test from "node:test";
import { packed, unpacked } from "../../../src/tempering/console/static/address.js";
import { freeName } from "../../../src/tempering/console/static/columns.js";
import { fitted } from "../../../src/tempering/console/static/session.js";
import * as c from "../../../src/tempering/console/static/colour.js";
import { History } from "../../../src/tempering/console/static/history.js";
import * as l from "../../../src/tempering/console/static/lines.js";

test("undo and redo without end", () => {
  const history = new History(0);
  for (let i = 1; i <= 5000; i++) history.push(i);
  for (let i = 4999; i >= 0; i--) {
    assert.ok(history.undo());
    assert.equal(history.value, i);
  }
  assert.ok(!history.undo());
  for (let i = 1; i <= 5000; i++) assert.ok(history.redo());
  assert.ok(!history.redo());
  assert.equal(history.value, 5000);
});

test("a new step forgets what was undone; the same value is no step", () => {
  const history = new History("a");
  history.push("b");
  history.undo();
  history.push("c");
  assert.ok(!history.redo());
  history.push("c");
  assert.deepEqual(history.past, ["a"]);
});

test("what is amended is one step", () => {
  const history = new History(1);
  history.push(2);
  for (const value of [3, 4, 5]) history.amend(value);
  history.undo();
  assert.equal(history.value, 1);
  history.redo();
  assert.equal(history.value, 5);
});

const SCHEMES = ["light", "dark"];
const values = Array.from({ length: 201 }, (_, i) => (i - 100) / 100);

test("text on every colour has a contrast of 4.5 at least", () => {
  for (const scheme of SCHEMES) {
    for (const v of values) {
      for (const ground of [c.diverging(v, 1, scheme), c.sequential(v, -1, 1, scheme)]) {
        assert.ok(c.contrast(ground, c.inkOn(ground)) >= 4.5, `${scheme} ${v}`);
      }
    }
  }
});

test("contrast is that of WCAG", () => {
  assert.equal(c.contrast([0, 0, 0], [255, 255, 255]), 21);
  assert.ok(Math.abs(c.contrast([118, 118, 118], [255, 255, 255]) - 4.54) < 0.01);
});

// Machado, Oliveira and Fernandes 2009, severity 1, on linear light.
const BLIND = {
  protan: [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  deutan: [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
  tritan: [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
};
const linear = (x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
const seen = (rgb, matrix) => matrix.map((row) => row.reduce((sum, w, i) => sum + w * linear(rgb[i]), 0));
const lab = ([r, g, b]) => {
  const f = (t) => (t > 0.008856 ? Math.cbrt(t) : 7.787 * t + 16 / 116);
  const [x, y, z] = [(0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047, 0.2126 * r + 0.7152 * g + 0.0722 * b, (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883].map(f);
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
};
const distance = (a, b) => Math.hypot(...a.map((x, i) => x - b[i]));

test("cold, neutral and hot are told apart by the colour-blind", () => {
  for (const scheme of SCHEMES) {
    for (const [kind, matrix] of Object.entries(BLIND)) {
      const [cold, none, hot] = [-1, 0, 1].map((v) => lab(seen(c.diverging(v, 1, scheme), matrix)));
      for (const [a, b] of [[cold, hot], [cold, none], [none, hot]]) assert.ok(distance(a, b) > 25, `${scheme} ${kind}`);
    }
  }
});

test("a sequential colour goes one way in lightness", () => {
  for (const scheme of SCHEMES) {
    const lightness = values.map((v) => lab(c.sequential(v, -1, 1, scheme).map(linear))[0]);
    const steps = lightness.slice(1).map((x, i) => (scheme === "light" ? lightness[i] - x : x - lightness[i]));
    assert.ok(steps.every((s) => s > -0.8));
    assert.ok(Math.abs(lightness.at(-1) - lightness[0]) > 50);
  }
});

test("colours beyond the reach are the fullest, and no reach is neutral", () => {
  assert.deepEqual(c.diverging(9, 1, "light"), c.diverging(1, 1, "light"));
  assert.deepEqual(c.diverging(1, 0, "light"), c.diverging(0, 1, "light"));
  assert.deepEqual(c.sequential(-9, 0, 1, "dark"), c.sequential(0, 0, 1, "dark"));
  assert.equal(c.css([1, 2, 3]), "rgb(1 2 3)");
});

test("a state goes into the address and comes back", async () => {
  const state = { v: 1, text: "héllo </script> 温度 \u{1F525}", rows: [1.1, [1, 0.1 + 0.2]], none: null };
  const fragment = await packed(state);
  assert.match(fragment, /^s=[A-Za-z0-9_-]+$/);
  assert.deepEqual(await unpacked(`#${fragment}`), state);
  const wide = { rows: Array.from({ length: 80 }, (_, i) => Array.from({ length: 128 }, (_, j) => 1 + Math.sin(i * 128 + j))) };
  assert.deepEqual(await unpacked(await packed(wide)), wide);
});

test("a damaged address is said, and no address is none", async () => {
  const whole = await packed({ v: 1, text: "x".repeat(100) });
  for (const bad of [whole.slice(0, -4), "s=", "s=!!!!", "s=AAAA", await packed(3), await packed(null)]) {
    await assert.rejects(unpacked(bad), /is damaged/, bad);
  }
  for (const none of ["", "#", "#matrix", "#t=3"]) assert.equal(await unpacked(none), null);
});

test("an address that unpacks without end is refused", async () => {
  const bomb = await packed({ text: "a".repeat(40 * 2 ** 20) });
  assert.ok(bomb.length < 100_000);
  await assert.rejects(unpacked(bomb), /is damaged/);
});

test("only lines in view are drawn", () => {
  const count = l.lineCount(32768);
  assert.equal(count, Math.ceil(32768 / l.PER_LINE));
  for (const top of [0, 5, 12345, 1e9]) {
    const [first, last] = l.inView(top, 240, 22, count);
    assert.ok(first >= 0 && last <= count && first <= last && last - first <= 20);
  }
  assert.deepEqual(l.inView(0, 240, 22, 3), [0, 3]);
  assert.deepEqual(l.inView(0, 240, 22, 0), [0, 0]);
});

test("the largest values, the largest first", () => {
  assert.deepEqual(l.largest([0.1, 0.9, 0.5, 0.7], 2), [1, 3]);
  assert.deepEqual(l.largest([3, 3, 3], 2), [0, 1]);
  assert.deepEqual(l.largest([], 3), []);
  const many = Array.from({ length: 5000 }, (_, i) => (i * 7919) % 5003);
  const right = many.map((_, i) => i).sort((a, b) => many[b] - many[a]).slice(0, 8);
  assert.deepEqual(l.largest(many, 8), right);
});

test("tokens that one can't see have signs", () => {
  assert.deepEqual(["", " a", "a ", "\n\n", "a b", "\t"].map(l.visible), ["∅", "␣a", "a␣", "⏎⏎", "a b", "⇥"]);
});

test("a column's name is the first that no other has", () => {
  assert.equal(freeName([]), "A");
  assert.equal(freeName(["B", "A", "D"]), "C");
  const all = [..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"];
  assert.equal(freeName(all), "A2");
  assert.equal(freeName([...all, "A2", "A3", "C2"]), "B2");
});

test("what is kept fits, the first parts first, and what doesn't is named", () => {
  const part = (name, value) => ({ name, keep: () => value });
  const parts = [part("state", "abc"), part("texts", "x".repeat(50)), part("own", undefined), part("small", 7)];
  const all = fitted(parts, 1000);
  assert.deepEqual([...all.kept], [["state", '"abc"'], ["texts", JSON.stringify("x".repeat(50))], ["small", "7"]]);
  assert.deepEqual(all.dropped, []);
  const some = fitted(parts, 10);
  assert.deepEqual([...some.kept.keys()], ["state", "small"]);
  assert.deepEqual(some.dropped, ["texts"]);
  assert.deepEqual(fitted(parts, 5).dropped, ["texts", "small"]);
  assert.deepEqual([...fitted([part("none", null)], 4).kept], [["none", "null"]]);
});
