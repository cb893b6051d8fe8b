import assert from "node:assert/strict";
import test from "node:test";
import * as m from "../../../src/tempering/console/static/matrix.js";

const BOUNDS = { coldest: 1e-3, hottest: 1e3 };

test("a brush is a temperature or a factor", () => {
  assert.deepEqual(m.brushOf("1.2"), { set: 1.2 });
  assert.deepEqual(m.brushOf(" x 1.1 "), { times: 1.1 });
  assert.deepEqual(m.brushOf("×1.1"), { times: 1.1 });
  assert.deepEqual(m.brushOf("*.5"), { times: 0.5 });
  assert.deepEqual(m.brushOf("/4"), { times: 0.25 });
  assert.deepEqual(m.brushOf("1e-2"), { set: 0.01 });
  for (const bad of ["", "hot", "-1", "0", "x 0", "1.2.3", "1,2", "1.2 1.3", "Infinity", "NaN", "x", "1e999", "<b>"]) {
    assert.throws(() => m.brushOf(bad), /is no brush/, bad);
  }
});

test("painting changes the cells alone and shares what it leaves", () => {
  const rows = [[1, 1], [1, 2], [1, 1]];
  const found = m.painted(rows, [[1, 0], [1, 1]], { times: 1.5 }, BOUNDS);
  assert.deepEqual(found, [[1, 1], [1.5, 3], [1, 1]]);
  assert.deepEqual(rows, [[1, 1], [1, 2], [1, 1]]);
  assert.equal(found[0], rows[0]);
  assert.equal(found[2], rows[2]);
});

test("a temperature outside of the bounds paints nothing at all", () => {
  const rows = [[1, 900]];
  assert.throws(() => m.painted(rows, [[0, 0], [0, 1]], { times: 2 }, BOUNDS), /layer 0, head 1: T = 1800/);
  assert.throws(() => m.painted(rows, [[0, 0]], { set: 1e-4 }, BOUNDS), /outside of 0.001 to 1000/);
  assert.deepEqual(rows, [[1, 900]]);
});

test("rectangles in any direction, over layers of unequal width", () => {
  const heads = [4, 2, 4];
  assert.deepEqual(m.rectangle([2, 3], [0, 1], heads), [[0, 1], [0, 2], [0, 3], [1, 1], [2, 1], [2, 2], [2, 3]]);
  assert.deepEqual(m.rectangle([0, 0], [0, 0], heads), [[0, 0]]);
  assert.deepEqual(m.rectangle([-5, -5], [0, 0], heads), [[0, 0]]);
  assert.equal(m.rectangle([0, 0], [99, 99], heads).length, 10);
});

test("a quick drag leaves no gaps", () => {
  for (const to of [[7, 3], [0, 9], [9, 0], [5, 5], [0, 0]]) {
    const cells = m.line([0, 0], to);
    assert.deepEqual(cells[0], [0, 0]);
    assert.deepEqual(cells.at(-1), to);
    for (let i = 1; i < cells.length; i++) {
      assert.ok(Math.abs(cells[i][0] - cells[i - 1][0]) <= 1 && Math.abs(cells[i][1] - cells[i - 1][1]) <= 1);
    }
  }
});

test("room is a power, 0 the untempered model and -1 the mirror image", () => {
  const rows = [[2, 0.5]];
  assert.deepEqual(m.withRoom(rows, 0), [[1, 1]]);
  assert.deepEqual(m.withRoom(rows, -1), [[0.5, 2]]);
  assert.deepEqual(m.withRoom(rows, 2), [[4, 0.25]]);
  assert.equal(m.withRoom(rows, 1), rows);
});

test("a difference is the log of the ratio", () => {
  assert.deepEqual(m.difference([[2, 1]], [[1, 1]]), [[Math.log(2), 0]]);
});

test("rows go into a link and come back exactly", () => {
  const rows = [[1, 1, 1], [1.1, 1.2345678901234567, 1e-3], [0.1 + 0.2, 0.1 + 0.2]];
  const packed = JSON.parse(JSON.stringify(m.packedRows(rows)));
  assert.equal(packed[0], 1);
  assert.deepEqual(m.unpackedRows(packed, [3, 3, 2]), rows);
});

test("rows that don't fit are refused", () => {
  for (const [bad, said] of [[null, /no layers/], [[1], /1 layers/], [[1, [1]], /2 heads/], [[1, "hot"], /doesn't fit/], [[1, [1, 0]], /doesn't fit/], [[1, [1, null]], /doesn't fit/], [[1, -1], /doesn't fit/]]) {
    assert.throws(() => m.unpackedRows(bad, [2, 2]), said);
  }
});

test("neutral is neutral until a rule or a temperature", () => {
  const profile = m.neutral([2, 3]);
  assert.deepEqual(profile.rows, [[1, 1], [1, 1, 1]]);
  assert.ok(m.isNeutral(profile));
  assert.ok(!m.isNeutral({ ...profile, rules: [null, "support(8)"] }));
  assert.ok(!m.isNeutral({ ...profile, rows: [[1, 1.01], [1, 1, 1]] }));
});

test("numbers in few digits", () => {
  assert.deepEqual([1, 1.23456, 0.00012, 123456, 0, -0.5, NaN].map(m.short), ["1", "1.235", "1.20e-4", "1.23e+5", "0", "-0.5", "NaN"]);
});

test("rows are the same where every head's temperature is", () => {
  const rows = [[1, 2], [3]];
  assert.ok(m.sameRows(rows, rows));
  assert.ok(m.sameRows(rows, [[1, 2], [3]]));
  for (const other of [[[1, 2]], [[1, 2], [3.0000001]], [[1], [3]], [[1, 2], [3, 4]], [[2, 1], [3]], []]) {
    assert.ok(!m.sameRows(rows, other), JSON.stringify(other));
    assert.ok(!m.sameRows(other, rows), JSON.stringify(other));
  }
});
