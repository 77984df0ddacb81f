// The sides that run on Node, driven as bench/rivals/worker.py is: a JSON order a line in, a JSON answer a line out.
import { mkdirSync, readFileSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";

const [, , name, place, rowFile] = process.argv;
const template = JSON.parse(readFileSync(rowFile, "utf8"));
const row = (turn) => ({ ...template, priceOpen: template.priceOpen + turn });
const symbol = (number) => `SYM${String(number).padStart(5, "0")}`;

const sides = {
  // npm write-file-atomic: a temporary file, fsync, rename.
  async writeFileAtomic() {
    const { default: writeFileAtomic } = await import("write-file-atomic");
    mkdirSync(place, { recursive: true });
    return {
      write: (number, turn) => writeFileAtomic(join(place, `${symbol(number)}.json`), JSON.stringify(row(turn))),
      async readAll() {
        const names = (await readdir(place)).filter((found) => found.endsWith(".json"));
        const rows = new Map();
        await Promise.all(names.map(async (found) => rows.set(found, JSON.parse(await readFile(join(place, found), "utf8")))));
        return rows.size;
      },
    };
  },
  // The reference's PersistBase: one entity, a file an id.
  async persistBase() {
    const { PersistBase } = await import("backtest-kit");
    const base = new PersistBase("signal", place);
    await base.waitForInit(true);
    return {
      write: (number, turn) => base.writeValue(symbol(number), row(turn)),
      async readAll() {
        const rows = new Map();
        for await (const id of base.keys()) rows.set(id, await base.readValue(id));
        return rows.size;
      },
    };
  },
  // The reference's signal adapter, as its live engine calls it: an instance and a directory for each context.
  async persistSignal() {
    mkdirSync(place, { recursive: true });
    process.chdir(place);
    const { PersistSignalAdapter } = await import("backtest-kit");
    return {
      write: (number, turn) => PersistSignalAdapter.writeSignalData(row(turn), symbol(number), "trend", "binance"),
      async readAll(count) {
        const rows = new Map();
        for (let number = 0; number < count; number++) {
          const found = await PersistSignalAdapter.readSignalData(symbol(number), "trend", "binance");
          if (found) rows.set(number, found);
        }
        return rows.size;
      },
    };
  },
};

const now = () => Number(process.hrtime.bigint()) / 1e9;
let turn = 0;
const orders = {
  async sequence(side, { count }) {
    const times = [];
    for (let at = 0; at < count; at++) {
      const began = now();
      await side.write(0, turn++);
      times.push(now() - began);
    }
    return { times };
  },
  async group(side, { lanes, each }) {
    const began = now();
    await Promise.all(Array.from({ length: lanes }, async (_, number) => {
      for (let at = 0; at < each; at++) await side.write(number, turn++);
    }));
    return { seconds: now() - began };
  },
  async fill(side, { count }) {
    const lanes = 16;
    await Promise.all(Array.from({ length: lanes }, async (_, lane) => {
      for (let number = lane; number < count; number += lanes) await side.write(number, turn++);
    }));
    return {};
  },
};

const console_error = console.error;
console.log = console_error; // standard output carries the answers only
const say = (answer) => process.stdout.write(`${JSON.stringify(answer)}\n`);
let side;
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  if (order.do === "end") break;
  const began = Date.now() / 1000;
  try {
    let answer;
    if (order.do === "open") {
      side = await sides[name]();
      answer = {};
    } else if (order.do === "cold") {
      await import(name === "writeFileAtomic" ? "write-file-atomic" : "backtest-kit"); // code is loaded, data is not
      const start = now();
      side = await sides[name]();
      answer = { rows: await side.readAll(order.count), seconds: now() - start };
    } else answer = await orders[order.do](side, order);
    say({ ...answer, began, ended: Date.now() / 1000 });
  } catch (error) {
    say({ error: String(error) });
  }
}
process.exit(0);
